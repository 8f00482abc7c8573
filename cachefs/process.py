"""Which program is behind a process id."""

import ctypes
import errno
import os

UNKNOWN = "unknown"  # gone already, or of another pid namespace
_libc = ctypes.CDLL(None, use_errno=True)


def name_of(pid: int) -> str:
    """The program's name as ps(1) shows it, 15 bytes at most; for a thread that of its process."""
    if not pid:
        return UNKNOWN
    try:
        return _comm(pid if _leads(pid) else _leader_of(pid))
    except (OSError, ValueError):
        return UNKNOWN


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


def _comm(pid: int) -> str:
    return os.fsdecode(_read(b"/proc/%d/comm" % pid).removesuffix(b"\n"))


def _read(path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # open() and its buffers take twice as long
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)
