"""What the kernel says is mounted (/proc/PID/mountinfo), and how to let go of a mount whose daemon is dead."""

import ctypes
import errno
import os
import re
import subprocess
from dataclasses import dataclass

from cachefs.errors import CachefsError

CACHEFS_TYPES = ("fuse.cachefs", "cachefs")
_MNT_DETACH = 2
_UNMOUNT_TIMEOUT_SECONDS = 20
_MOST_LAYERS = 16  # dead mounts on top of one another on one mountpoint


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    mountpoint: str
    fstype: str
    source: str
    device: str  # major:minor, st_dev of what is in it


def parse(text: bytes) -> list[Mount]:
    """The mounts in a mountinfo file, oldest first; lines that can't be read are skipped."""
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(b" - ")
        fields, rest = before.split(b" "), after.split(b" ")
        if separator and len(fields) >= 5 and len(rest) >= 2:
            mounts.append(Mount(_unescape(fields[4]), _unescape(rest[0]), _unescape(rest[1]), os.fsdecode(fields[2])))
    return mounts


def _unescape(field: bytes) -> str:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def mounts(pid: int | None = None) -> list[Mount]:
    """What is mounted, as process `pid` sees it (default, and for a process we may not read: as we see it)."""
    for process in ("self",) if pid is None else (str(pid), "self"):
        try:
            with open(f"/proc/{process}/mountinfo", "rb") as file:
                return parse(file.read())
        except OSError:
            continue
    return []


def top_mount(mountpoint: str, pid: int | None = None) -> Mount | None:
    """What is mounted on exactly this path: the topmost, as the others can't be reached."""
    found = [mount for mount in mounts(pid) if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def is_cachefs(mountpoint: str, pid: int | None = None) -> bool:
    """Whether a cachefs, alive or dead, is what one sees at this path."""
    mount = top_mount(mountpoint, pid)
    return mount is not None and mount.fstype in CACHEFS_TYPES


def is_dead(mountpoint: str) -> bool:
    """Whether the path is a FUSE mountpoint whose daemon is gone (`Transport endpoint is not connected`)."""
    try:
        os.statvfs(mountpoint)  # always asks the daemon, where stat() may be answered from attributes that the kernel kept
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)  # the second while the daemon is dying
    return False


def release_if_dead(mountpoint: str) -> bool:
    """Unmounts what a killed cachefs left at this path; True if there was something. Refuses others' remains."""
    released = False
    for _ in range(_MOST_LAYERS):
        if not is_dead(mountpoint):
            return released
        if not is_cachefs(mountpoint):
            raise CachefsError(f"{mountpoint} is another program's dead mount: first run umount -l {mountpoint}")
        detach(mountpoint)
        released = True
    raise CachefsError(f"{mountpoint} is a dead mount that can't be unmounted: try umount -l {mountpoint} as root")


def detach(mountpoint: str) -> None:
    """Unmounts lazily: the name is free at once, what is still open goes when it is closed."""
    failure = _detach_as_root(mountpoint) if os.geteuid() == 0 else _detach_as_user(mountpoint)
    if failure:
        raise CachefsError(f"can't unmount {mountpoint}: {failure}")


def _detach_as_root(mountpoint: str) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _MNT_DETACH) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def _detach_as_user(mountpoint: str) -> str:
    try:
        done = subprocess.run(
            ["fusermount3", "-u", "-z", "--", mountpoint],
            capture_output=True, text=True, errors="replace", timeout=_UNMOUNT_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return "there is no fusermount3: install the package fuse3"
    except subprocess.TimeoutExpired:
        return f"fusermount3 did not answer in {_UNMOUNT_TIMEOUT_SECONDS} seconds"
    return "" if done.returncode == 0 else " ".join(done.stderr.split()) or f"fusermount3 ended with {done.returncode}"
