"""What others cannot do: get at state and socket, lead the daemon out of SOURCE, read through the cache, give commands."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import CACHEFS_AS_NOBODY, NOBODY, Command, ended, is_mounted, one_line, wait_until

from cachefs import control
from cachefs.errors import CachefsError
from twin import as_user, outcome

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(90),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for other users"),
]
OTHER = 1234
EXCHANGE, AT_FDCWD = 2, -100
RACE_SECONDS = 2.0
_libc = ctypes.CDLL(None, use_errno=True)


# --- state and socket


def open_to_others(directory: Path) -> list[Path]:
    """Of the directory and all in it, what is not 0700 if a directory and 0600 if not."""
    paths = [directory, *directory.rglob("*")]
    assert len(paths) > 2
    return [path for path in paths if stat.S_IMODE(path.lstat().st_mode) != (0o700 if path.is_dir() else 0o600)]


def test_state_and_socket_are_for_their_owner_alone(cachefs: Command) -> None:
    """Whatever the umask is."""
    mount = cachefs.words("mount", cachefs.source, cachefs.path, *cachefs.options)
    done = cachefs.call("sh", "-c", 'umask 0; exec "$@"', "-", *mount)
    assert done.returncode == 0, done
    (cachefs.path / "file").write_text("text")
    state = next((cachefs.base / "state").iterdir())
    assert open_to_others(cachefs.base / "run") == open_to_others(state) == []
    cachefs.umount_well()
    assert open_to_others(state) == []


def refused(cachefs: Command) -> str:
    """The one line with which mount refuses its state; nothing is mounted, changed or left running."""
    before = {path: path.lstat().st_ctime_ns for path in (cachefs.source, *cachefs.base.rglob("*"))}
    line = one_line(cachefs.run("mount", cachefs.source, cachefs.path, *cachefs.options), 1)
    assert {path: path.lstat().st_ctime_ns for path in before} == before
    assert not is_mounted(cachefs.path)
    return line


def test_a_state_or_runtime_directory_of_somebody_else_is_refused(cachefs: Command) -> None:
    cachefs.mount()
    leaf = next((cachefs.base / "state").iterdir())
    cachefs.umount_well()
    for directory in (leaf, cachefs.base / "run"):
        os.chown(directory, NOBODY, NOBODY)
        assert f"{directory} is not a directory of yours: remove it" in refused(cachefs)
        os.chown(directory, 0, 0)
        directory.chmod(0o777)
        assert f"everybody may write to {directory}: remove it" in refused(cachefs)
        directory.chmod(0o700)
    shutil.move(leaf, cachefs.base / "elsewhere")
    leaf.symlink_to(cachefs.base / "elsewhere")
    assert f"{leaf} is not a directory of yours" in refused(cachefs)


def test_a_state_directory_that_somebody_else_could_exchange_is_refused(cachefs: Command) -> None:
    cachefs.directory("state")
    os.chown(cachefs.base / "state", NOBODY, NOBODY)
    assert f"{cachefs.base}/state belongs to user {NOBODY}, who could exchange what" in _said_and_nothing_mounted(cachefs)
    os.chown(cachefs.base / "state", 0, 0)
    (cachefs.base / "state").chmod(0o777)
    assert f"everybody may exchange what is in {cachefs.base}/state" in _said_and_nothing_mounted(cachefs)
    (cachefs.base / "state").chmod(0o1777)
    cachefs.mount()
    cachefs.umount_well()


def _said_and_nothing_mounted(cachefs: Command) -> str:
    line = one_line(cachefs.run("mount", cachefs.source, cachefs.path, *cachefs.options), 1)
    assert not is_mounted(cachefs.path) and not list((cachefs.base / "run").glob("*"))
    return line


def test_files_planted_in_the_state_directory_lead_nowhere(cachefs: Command) -> None:
    """It was open once, and somebody has left symbolic links."""
    cachefs.mount()
    leaf = next((cachefs.base / "state").iterdir())
    cachefs.umount_well()
    target = cachefs.base / "target"
    target.write_text("of root")
    for name in ("lock", "daemon.json.new"):
        (leaf / name).unlink(missing_ok=True)
        (leaf / name).symlink_to(target)
        one_line(cachefs.run("mount", cachefs.source, cachefs.path, *cachefs.options), 1)
        (leaf / name).unlink()
    assert target.read_text() == "of root"
    cachefs.mount()
    cachefs.umount_well()


# --- commands


def connect(path: str, command: str) -> bytes:
    """What the daemon answers to a command, as bytes; b"" if it does not talk to us."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        with contextlib.suppress(BrokenPipeError):
            client.sendall(json.dumps({"command": command}).encode() + b"\n")
        with contextlib.suppress(ConnectionResetError):
            return client.recv(65536)
        return b""


def test_only_the_owner_and_root_command_a_daemon(cachefs: Command) -> None:
    pid = cachefs.mount()
    (address,) = (cachefs.base / "run").glob("*.sock")
    assert as_user(NOBODY, connect, str(address), "status") == "EACCES"
    (cachefs.base / "run").chmod(0o755)
    assert as_user(NOBODY, connect, str(address), "status") == "EACCES"
    address.chmod(0o777)  # even then: the daemon looks who asks
    for command in ("status", "sync", "umount", "discard", "dirty"):
        assert as_user(NOBODY, connect, str(address), command) == b""
        assert as_user(OTHER, connect, str(address), command) == b""
    assert b'"pid"' in connect(str(address), "status")
    file = cachefs.path / "file"
    for words in (("status",), ("sync",), ("umount", cachefs.path), ("discard", "--yes", file), ("status", "--dirty")):
        line = one_line(cachefs.run(*words, program=CACHEFS_AS_NOBODY), 1)
        assert f"the runtime directory {cachefs.base}/run belongs to another user: ask as that user or as root" in line
    assert not ended(pid) and is_mounted(cachefs.path)
    assert (cachefs.base / "run").exists() and address.exists()
    cachefs.umount_well()


def test_a_socket_that_somebody_else_listens_on_is_not_asked(cachefs: Command) -> None:
    """As it would be where a runtime directory was open to others once."""
    directory = cachefs.directory("open")
    directory.chmod(0o777)
    path = directory / "socket"
    child = os.fork()
    if child == 0:
        os.setgid(OTHER)
        os.setuid(OTHER)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        path.chmod(0o777)
        listening.listen()
        while True:
            client, _ = listening.accept()
            heard = client.recv(100)
            (directory / "heard").write_bytes(heard)
            client.sendall(b'{"done": true}\n')

    def ask() -> str:
        try:
            return str(list(control.request(str(path), {"command": "status"})))
        except CachefsError as error:
            return str(error)

    try:
        wait_until(lambda: as_user(OTHER, ask) == "[{'done': True}]", "the socket")
        (directory / "heard").unlink()
        assert "the control socket belongs to another user" in as_user(NOBODY, ask)
        wait_until((directory / "heard").exists, "the end of the connection")
        assert (directory / "heard").read_bytes() == b""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_root_commands_the_daemon_of_another_user(cachefs: Command) -> None:
    """Asked for with the runtime directory of that user."""
    cachefs.give_to_nobody()
    (cachefs.base / "devices").mkdir()
    os.mknod(cachefs.base / "devices" / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
    (cachefs.base / "devices" / "fuse").chmod(0o666)
    words = cachefs.words("mount", cachefs.source, cachefs.path, *cachefs.options, program=CACHEFS_AS_NOBODY)
    script = 'mount --bind "$1" /dev/fuse; shift; a="$1"; shift; "$@" && exec $a'
    umount = " ".join([cachefs.words()[0], "-m", "cachefs", "umount", str(cachefs.path)])
    done = cachefs.call("unshare", "--mount", "sh", "-c", script, "-", cachefs.base / "devices" / "fuse", umount, *words)
    assert (done.returncode, done.stderr) == (0, ""), done


# --- out of SOURCE


def exchange_again_and_again(one: Path, other: Path) -> Callable[[], None]:
    """A process that exchanges two names as fast as it can; returns what ends it."""
    child = os.fork()
    if child == 0:
        names = os.fsencode(one), os.fsencode(other)
        while True:
            _libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE)

    def end() -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    return end


def picture(directory: Path) -> dict[str, tuple[int, int, int, int, bytes]]:
    found = {}
    for path in (directory, *sorted(directory.rglob("*"))):
        st = path.lstat()
        contents = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (st.st_mode, st.st_uid, st.st_nlink, st.st_mtime_ns, contents)
    return found


def attack(mountpoint: Path, seconds: float) -> list[str]:
    """Uses names that are directories or files of SOURCE at one moment and symbolic links out of it at the next.

    Returns what should not have been possible, and whether anything worked at all.
    """
    wrong: list[str] = []
    worked = 0

    def opened(path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CREAT, 0o666)

    def read(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            if b"secret" in os.read(fd, 100):
                wrong.append(f"read {path}")
        finally:
            os.close(fd)

    def write(path: Path) -> None:
        fd = opened(path, os.O_RDWR)
        try:
            os.write(fd, b"attack")
            os.fsync(fd)
        finally:
            os.close(fd)

    directory, file = mountpoint / "d", mountpoint / "f"
    calls: list[Callable[[], object]] = [
        lambda: read(directory / "file"),
        lambda: read(file),
        lambda: write(directory / "file"),
        lambda: write(directory / "new"),
        lambda: write(file),
        lambda: os.truncate(directory / "file", 3),
        lambda: os.chmod(directory / "file", 0o666),
        lambda: os.chmod(file, 0o666),
        lambda: os.utime(directory / "file", (1, 1)),
        lambda: os.mkdir(directory / "made"),
        lambda: os.rmdir(directory / "made"),
        lambda: os.symlink("x", directory / "link"),
        lambda: os.mkfifo(directory / "fifo"),
        lambda: os.link(directory / "file", directory / "hard"),
        lambda: os.rename(directory / "new", directory / "renamed"),
        lambda: [os.unlink(directory / name) for name in ("link", "fifo", "hard", "renamed")],
        lambda: wrong.extend(name for name in os.listdir(directory) if name.startswith("outside")),
    ]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for call in calls:
            worked += not isinstance(outcome(call), str)
    return [*wrong, f"worked {worked > 20}"]


@pytest.mark.parametrize("options", [(), ("--backing", "network"), ("--kernel-cache", "keep")], ids=["local", "network", "keep"])
def test_a_symlink_planted_in_a_race_leads_the_daemon_nowhere(cachefs: Command, options: tuple[str, ...]) -> None:
    """Only root may go outside, to what is open to all: so what gets there or comes from there, came through the daemon."""
    outside = cachefs.directory("locked") / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"secret")
    (outside / "outside-name").write_bytes(b"secret")
    for path in (outside, *outside.iterdir()):
        path.chmod(0o777)
    outside.parent.chmod(0o700)
    (cachefs.source / "d").mkdir()
    (cachefs.source / "d" / "file").write_bytes(b"inside")
    (cachefs.source / "f").write_bytes(b"inside")
    for path in (cachefs.source / "d", cachefs.source / "d" / "file", cachefs.source / "f", cachefs.source):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o777)
    (cachefs.source / "evil-d").symlink_to(outside)
    (cachefs.source / "evil-f").symlink_to(outside / "file")
    cachefs.mount("--metadata-ttl", "0s", "--dirty-expire", "50ms", "--writeback-interval", "20ms", *options)
    before = picture(outside)
    ends = [exchange_again_and_again(cachefs.source / name, cachefs.source / f"evil-{name}") for name in ("d", "f")]
    try:
        assert as_user(NOBODY, attack, cachefs.path, RACE_SECONDS) == ["worked True"]
    finally:
        for end in ends:
            end()
    assert cachefs.run("sync", cachefs.path).returncode in (0, 1)
    assert picture(outside) == before
    cachefs.umount()
    assert picture(outside) == before


def test_a_path_out_of_source_is_no_path_of_a_command(cachefs: Command) -> None:
    cachefs.mount()
    (address,) = (cachefs.base / "run").glob("*.sock")
    for path in ("..", "../outside", "a/../../b", "/etc", "a//b", "\0", ".", 5, None):
        for command in ("sync", "discard", "dirty"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                client.connect(str(address))
                client.sendall(json.dumps({"command": command, "path": path}).encode() + b"\n")
                answer = json.loads(client.recv(65536))
            assert "not a path below the mountpoint" in answer["error"], (command, path)
    cachefs.umount_well()


# --- through the cache


@pytest.fixture(params=[(), ("--kernel-cache", "open"), ("--kernel-cache", "keep"), ("--backing", "network")], ids=str)
def shared(cachefs: Command, request: pytest.FixtureRequest) -> Iterator[Command]:
    """A mount that other users may enter, with a file of OTHER's."""
    (cachefs.source / "file").write_bytes(b"private" * 1000)
    os.chown(cachefs.source / "file", OTHER, OTHER)
    (cachefs.source / "file").chmod(0o600)
    cachefs.mount(*request.param)
    yield cachefs
    cachefs.umount_well()


def read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 7)
    finally:
        os.close(fd)


def test_a_cached_file_is_read_by_nobody_who_may_not(shared: Command) -> None:
    path = shared.path / "file"
    assert as_user(OTHER, read, path) == b"private"
    for _ in range(2):
        assert as_user(NOBODY, read, path) == "EACCES"
    assert as_user(NOBODY, os.open, path, os.O_WRONLY) == "EACCES"
    assert as_user(NOBODY, os.truncate, path, 0) == "EACCES"
    os.link(path, shared.path / "hard")
    assert as_user(NOBODY, read, shared.path / "hard") == "EACCES"
    assert as_user(NOBODY, os.link, path, shared.path / "another") in ("EPERM", "EACCES")


def test_a_cached_attribute_lets_nobody_in_after_a_chmod(shared: Command) -> None:
    path = shared.path / "file"
    for letting, closing in (
        (lambda: os.chmod(path, 0o644), lambda: as_user(OTHER, os.chmod, path, 0o600)),
        (lambda: os.chown(path, NOBODY, NOBODY), lambda: os.chown(path, OTHER, OTHER)),
    ):
        letting()
        assert as_user(NOBODY, read, path) == b"private"
        closing()
        assert as_user(NOBODY, read, path) == "EACCES", "at once, whatever the kernel and the daemon believe"
    assert as_user(OTHER, os.chmod, path, 0o644) is None
    assert as_user(NOBODY, read, path) == b"private"
    (shared.source / "file").chmod(0o600)  # behind the mount's back: after --metadata-ttl
    wait_until(lambda: as_user(NOBODY, read, path) == "EACCES", "the change in SOURCE")
    assert as_user(NOBODY, read, path) == "EACCES"


def test_a_cached_file_below_a_directory_that_was_closed_is_read_by_nobody(shared: Command) -> None:
    directory = shared.path / "d"
    directory.mkdir(mode=0o755)
    (directory / "file").write_bytes(b"private")
    assert as_user(NOBODY, read, directory / "file") == b"private"
    directory.chmod(0o700)
    assert as_user(NOBODY, read, directory / "file") == "EACCES"
    assert as_user(NOBODY, os.stat, directory / "file") == "EACCES"


def test_a_file_that_took_the_place_of_another_has_its_own_mode(shared: Command) -> None:
    """Renamed over, in the mount and in SOURCE: neither pages nor rights of the old one are the new one's."""
    path, public = shared.path / "file", shared.path / "public"
    public.write_bytes(b"for all")
    public.chmod(0o644)
    assert as_user(NOBODY, read, public) == b"for all"
    os.rename(path, public)
    assert as_user(NOBODY, read, public) == "EACCES"
    (shared.source / "new").write_bytes(b"for all")
    (shared.source / "new").chmod(0o644)
    os.rename(shared.source / "new", shared.source / "public")
    wait_until(lambda: as_user(NOBODY, read, public) == b"for all", "the change in SOURCE")

