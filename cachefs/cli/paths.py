"""Paths on the command line: which mount each is in, and what it is called there."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from cachefs import mountinfo
from cachefs.errors import CachefsError
from cachefs.state import DaemonRecord, daemons


@dataclass
class Place:
    """Paths inside one mount, relative to it; "" is the whole of it."""

    record: DaemonRecord
    paths: list[str] = field(default_factory=list)


def places(paths: Iterable[str], must_exist: bool = True) -> list[Place]:
    """The mounts that these paths lie in, each with its paths; patterns that are no names are expanded."""
    found: dict[str, Place] = {}
    for match in (match for path in paths for match in _matches(path)):
        record, inside = locate(match, must_exist)
        found.setdefault(record.mountpoint, Place(record)).paths.append(inside)
    return list(found.values())


def locate(path: str, must_exist: bool = True) -> tuple[DaemonRecord, str]:
    """The daemon of the mount that a path lies in, and the path relative to it; CachefsError where it is in none."""
    try:
        real = os.path.realpath(path)
    except OSError:  # a dead mount, of which the kernel still knows a symbolic link
        real = os.path.abspath(path)
    for record in sorted(daemons(), key=lambda record: -len(record.mountpoint)):
        if real == record.mountpoint:
            return record, ""
        if real.startswith(record.mountpoint + "/"):
            if must_exist and not os.path.lexists(real):
                raise CachefsError(f"{path} does not exist")
            return record, real[len(record.mountpoint) + 1 :]
    raise CachefsError(_why_not(path, real))


def the_mount(mountpoint: str | None) -> DaemonRecord:
    """The daemon at a mountpoint, or the only one there is."""
    if mountpoint is not None:
        record, inside = locate(mountpoint)
        if inside:
            raise CachefsError(f"{mountpoint} is not a mountpoint: its mount is {record.mountpoint}")
        return record
    live = daemons()
    if len(live) != 1:
        raise CachefsError("several are mounted: give the MOUNTPOINT too" if live else "no cachefs is mounted")
    return live[0]


def _why_not(path: str, real: str) -> str:
    for mount in mountinfo.mounts():
        if mount.fstype in mountinfo.CACHEFS_TYPES and (real + "/").startswith(mount.mountpoint + "/"):
            if mountinfo.is_dead(mount.mountpoint):
                return f"{path} has no daemon any more: cachefs umount {mount.mountpoint} tidies up"
            return f"{path} is in a mount of another user or runtime directory"
    for record in daemons():
        if (real + "/").startswith(record.source + "/"):
            return f"{path} is in the SOURCE of a mount: give its path below {record.mountpoint}"
    return f"{path} is not in a cachefs mount: cachefs status lists them"


def _matches(path: str) -> list[str]:
    if not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise CachefsError(f"nothing matches {path}")
    return matches
