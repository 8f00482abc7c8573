"""Where a mount keeps its state, who holds it, and which daemons run: state directory, lock, runtime registry.

One state directory belongs to one SOURCE, and one process at a time holds its lock. The lock, not a process number,
says whether a daemon is alive: it vanishes with the process however that ends.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cachefs import mountinfo
from cachefs.config import Config
from cachefs.errors import CachefsError

STARTING, SERVING, STOPPING = "starting", "serving", "stopping"
DEFAULT_WAIT_SECONDS = 600.0  # a predecessor may have a cache full of dirty pages and a slow SOURCE
_QUIET_SECONDS = 1.0
_POLL_SECONDS = 0.05
_LOCK_FILE = "lock"
_RECORD_FILE = "daemon.json"
_LOG_FILE = "cachefs.log"
_END_FILE = "last-end.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonRecord:
    """What a daemon says of itself, in its state directory and in the runtime directory."""

    pid: int
    phase: str  # STARTING | SERVING | STOPPING
    source: str
    mountpoint: str
    state_dir: str
    socket: str
    log: str
    started: float  # seconds since the epoch
    metrics: str | None = None  # address in use
    config: dict[str, object] = field(default_factory=dict)  # as asked for, so that a remount knows what would change


class State:
    """The state directory of one SOURCE, held by this process until `close()` or its end, across fork()."""

    def __init__(self, config: Config, directory: str, lock_fd: int) -> None:
        self.directory = directory
        self.lock_fd = lock_fd
        self.log_path = os.path.join(directory, _LOG_FILE)
        self._runtime_record = os.path.join(runtime_directory(), short_hash(directory) + ".json")
        self.socket_path = self._runtime_record.removesuffix(".json") + ".sock"
        self.record = DaemonRecord(
            pid=os.getpid(),
            phase=STARTING,
            source=config.source,
            mountpoint=config.mountpoint,
            state_dir=directory,
            socket=self.socket_path,
            log=self.log_path,
            started=time.time(),
            config=asdict(config) | {"mount_flags": sorted(config.mount_flags)},
        )

    @classmethod
    def open(
        cls, config: Config, wait_seconds: float = DEFAULT_WAIT_SECONDS, say: Callable[[str], None] | None = None
    ) -> "State":
        """Takes the state of a SOURCE: waits for a predecessor that is finishing, refuses beside one that serves."""
        directory = state_directory(config)
        for path in (directory, runtime_directory()):
            if os.path.commonpath((path, config.mountpoint)) == config.mountpoint:
                raise CachefsError(f"MOUNTPOINT would hide {path}: give another directory with --state-dir")
            make_private(path)
        lock_fd = _open_lock(directory)
        try:
            _acquire(lock_fd, directory, wait_seconds, say or (lambda _: None))
            _release_remains(directory)
            state = cls(config, directory, lock_fd)
            _remove(state.socket_path)
            state.publish(STARTING)
        except BaseException:
            os.close(lock_fd)
            raise
        return state

    def publish(self, phase: str, metrics: str | None = None) -> None:
        """Tells others that this process holds the state and how far it is."""
        self.record = replace(self.record, pid=os.getpid(), phase=phase, metrics=metrics or self.record.metrics)
        text = json.dumps(asdict(self.record))
        for path in (os.path.join(self.directory, _RECORD_FILE), self._runtime_record):
            _write_atomically(path, text)

    def mark_stopping(self) -> None:
        """From now on a mount of the same SOURCE waits for us instead of being refused."""
        with contextlib.suppress(CachefsError):  # a full disk must not keep us from writing out
            self.publish(STOPPING)

    def note_end(self, unwritten: Sequence[Mapping[str, object]], kept: str | None) -> None:
        """Leaves a note of what could not be written, for who asked us to end and did not get our last words."""
        note = {"pid": os.getpid(), "kept": kept, "unwritten": unwritten}
        with contextlib.suppress(CachefsError):
            _write_atomically(os.path.join(self.directory, _END_FILE), json.dumps(note))

    def close(self) -> None:
        """Gives the state up: removes what names this process, then the lock."""
        for path in (self._runtime_record, self.socket_path, os.path.join(self.directory, _RECORD_FILE)):
            _remove(path)
        os.close(self.lock_fd)

    def leave_to_child(self) -> None:
        """Closes this process's share of a lock that a forked child goes on holding."""
        os.close(self.lock_fd)


def state_directory(config: Config) -> str:
    """The state directory of a SOURCE: the same for every mount of it by this user."""
    if config.state_dir is not None:
        base = config.state_dir
    elif os.geteuid() == 0:
        base = "/var/lib/cachefs"
    else:
        home_state = os.path.join(os.path.expanduser("~"), ".local", "state")
        base = os.path.join(_absolute_environment("XDG_STATE_HOME") or home_state, "cachefs")
    return os.path.join(os.path.realpath(base), short_hash(config.source))


def runtime_directory() -> str:
    """The directory of this user's live daemons and their sockets; CACHEFS_RUNTIME_DIR names another one."""
    named = _absolute_environment("CACHEFS_RUNTIME_DIR")
    if named is not None:
        return os.path.realpath(named)
    if os.geteuid() == 0:
        return "/run/cachefs"
    base = _absolute_environment("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return os.path.join(base, "cachefs") if os.access(base, os.W_OK) else f"/tmp/cachefs-{os.geteuid()}"


def _absolute_environment(name: str) -> str | None:
    value = os.environ.get(name, "")
    return value if os.path.isabs(value) else None


def short_hash(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def make_private(directory: str) -> None:
    """Makes a directory that only we can enter, or makes sure that an existing one is ours and no symbolic link."""
    try:
        os.makedirs(os.path.dirname(directory), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        status = os.lstat(directory)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise CachefsError(f"{directory} is not a directory of yours: remove it, or give another with --state-dir")
        if status.st_mode & 0o002:
            raise CachefsError(f"everybody may write to {directory}: remove it, or give another with --state-dir")
        _check_above(directory)
        if status.st_mode & 0o077:
            os.chmod(directory, 0o700)
    except OSError as error:
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise CachefsError(f"can't use {directory}: {reason}; give another with --state-dir") from None


def _check_above(directory: str) -> None:
    """Refuses a place where somebody else could put a directory of his own in the place of ours."""
    above = directory
    while above != "/":
        above = os.path.dirname(above)
        status = os.stat(above)
        if status.st_uid not in (0, os.geteuid()):
            whose = f"{above} belongs to user {status.st_uid}, who could exchange what is in it"
        elif status.st_mode & 0o002 and not status.st_mode & stat.S_ISVTX:
            whose = f"everybody may exchange what is in {above}"
        else:
            continue
        raise CachefsError(f"can't use {directory}: {whose}; give another with --state-dir")


def daemons() -> list[DaemonRecord]:
    """This user's live daemons by mountpoint; what dead ones left in the runtime directory is removed.

    CachefsError for a runtime directory of somebody else, whom only root may ask.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.geteuid() not in (0, os.stat(runtime_directory()).st_uid):
            who = "ask as that user or as root, or set CACHEFS_RUNTIME_DIR"
            raise CachefsError(f"the runtime directory {runtime_directory()} belongs to another user: {who}")
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(runtime_directory()) if name.endswith(".json")]
        found = (_live_record(os.path.join(runtime_directory(), name)) for name in names)
        return sorted((record for record in found if record is not None), key=lambda record: record.mountpoint)
    return []


def find_daemon(path: str) -> DaemonRecord | None:
    """The live daemon whose mountpoint, or else whose source, this path is; one that serves before one that is ending."""
    real = os.path.realpath(path)
    live = sorted(daemons(), key=lambda record: record.phase == STOPPING)
    for record in live:
        if record.mountpoint == real:
            return record
    return next((record for record in live if record.source == real), None)


def how_it_ended(record: DaemonRecord) -> Mapping[str, Any] | None:
    """The note that this daemon left at the end of its mount; None if it left none, as one that was killed."""
    try:
        with open(os.path.join(record.state_dir, _END_FILE), encoding="ascii") as file:
            note = json.load(file)
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and note.get("pid") == record.pid else None


def _live_record(path: str) -> DaemonRecord | None:
    record = _read_record(path)
    if record is None:
        return None
    with _shared_lock(record.state_dir) as free:
        if free:
            _remove(path)
            _remove(path.removesuffix(".json") + ".sock")
        return None if free else record


def is_held(state_dir: str) -> bool:
    """Whether a process holds this state directory."""
    with _shared_lock(state_dir) as free:
        return not free


@contextlib.contextmanager
def _shared_lock(state_dir: str) -> Iterator[bool]:
    """Gives True while nobody holds the state, and nobody can begin to."""
    try:
        fd = os.open(os.path.join(state_dir, _LOCK_FILE), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)


def _open_lock(directory: str) -> int:
    try:
        return os.open(os.path.join(directory, _LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CachefsError(f"can't write to {directory}: {error.strerror}; give another with --state-dir") from None


def _acquire(lock_fd: int, directory: str, wait_seconds: float, say: Callable[[str], None]) -> None:
    begin, said = time.monotonic(), False
    while not _try_lock(lock_fd, directory):
        holder = _read_record(os.path.join(directory, _RECORD_FILE))
        if holder and _serves(holder):
            where = f"{holder.source} is already mounted on {holder.mountpoint} by process {holder.pid}"
            raise CachefsError(f"{where}: first run cachefs umount {holder.mountpoint}")
        who = f"pid {holder.pid}" if holder else "another cachefs"
        what = "start" if holder and holder.phase == STARTING else "finish writing out"
        waited_seconds = time.monotonic() - begin
        if waited_seconds >= wait_seconds:
            log_path = os.path.join(directory, _LOG_FILE)
            raise CachefsError(f"{who} did not {what} in {wait_seconds:.0f} seconds: see {log_path}")
        if not said and waited_seconds >= _QUIET_SECONDS:
            say(f"waiting for {who} to {what}")
            said = True
        time.sleep(_POLL_SECONDS)


def _serves(holder: DaemonRecord) -> bool:
    """Whether this holder of a lock has a mountpoint that programs can use; else it is starting or finishing."""
    exists = os.path.exists(f"/proc/{holder.pid}")  # else its record is stale and somebody else holds the lock
    return exists and holder.phase == SERVING and mountinfo.is_cachefs(holder.mountpoint, holder.pid)


def _release_remains(directory: str) -> None:
    """Unmounts what the last holder of this state left mounted when it was killed."""
    last = _read_record(os.path.join(directory, _RECORD_FILE))
    if last is not None:
        with contextlib.suppress(CachefsError):  # another program's mount by now
            mountinfo.release_if_dead(last.mountpoint)


def _try_lock(lock_fd: int, directory: str) -> bool:
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise CachefsError(f"{directory} can't be locked: {error.strerror}; give another with --state-dir") from None
    return True


def _read_record(path: str) -> DaemonRecord | None:
    """What a record file says, or None where there is none that can be read."""
    try:
        with open(path, encoding="ascii") as file:
            return DaemonRecord(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None


def _write_atomically(path: str, text: str) -> None:
    temporary = path + ".new"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
        os.rename(temporary, path)
    except OSError as error:
        raise CachefsError(f"can't write {path}: {error.strerror}") from None


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
