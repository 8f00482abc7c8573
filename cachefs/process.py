"""Which program is behind a process id."""

import ctypes
import errno
import os

UNKNOWN = "unknown"  # gone already, or of another pid namespace
KNOWN_MAX = 16  # processes whose name can be asked for with one call in the place of four
NAME_BYTES = 64
_known: dict[int, int] = {}  # {pid: descriptor of its name}, the latest last; of the trio thread
_libc = ctypes.CDLL(None, use_errno=True)


def name_of(pid: int) -> str:
    """The program's name as ps(1) shows it, 15 bytes at most; for a thread that of its process."""
    if not pid:
        return UNKNOWN
    try:
        name = _known_name(pid)
        if name is None and _leads(pid):
            _remember(pid)
            name = _known_name(pid)
        return os.fsdecode(_read(_comm(_leader_of(pid)))).rstrip("\n") if name is None else name
    except (OSError, ValueError):
        return UNKNOWN


def _known_name(pid: int) -> str | None:
    """The name now, for it changes with exec(2); None where it is not one of the latest processes, or that one is gone."""
    fd = _known.get(pid)
    if fd is None:
        return None
    try:
        return os.fsdecode(os.pread(fd, NAME_BYTES, 0)).rstrip("\n")
    except ProcessLookupError:  # the number may come back: this descriptor stays the old one's
        os.close(_known.pop(pid))
        return None


def _remember(pid: int) -> None:
    """Of a process that is not known yet."""
    _known[pid] = os.open(_comm(pid), os.O_RDONLY | os.O_CLOEXEC)
    if len(_known) > KNOWN_MAX:
        os.close(_known.pop(next(iter(_known))))


def _leads(pid: int) -> bool:
    """Whether it is a process and not a further thread of one: FUSE tells which thread asks.

    Signal 0 is none; what counts is whether the thread is found in a process of its own number (/proc takes ten times as long).
    """
    return not _libc.tgkill(pid, pid, 0) or ctypes.get_errno() == errno.EPERM  # it is there, and somebody else's


def _leader_of(tid: int) -> int:
    for line in _read(b"/proc/%d/status" % tid).splitlines():
        if line.startswith(b"Tgid:"):
            return int(line[5:])
    raise ValueError("no Tgid")


def _comm(pid: int) -> bytes:
    return b"/proc/%d/comm" % pid


def _read(path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # open() and its buffers take twice as long
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)
