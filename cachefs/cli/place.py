"""Which mount a path lies on."""

import os
from dataclasses import dataclass

from cachefs import mountinfo
from cachefs.errors import CachefsError
from cachefs.state import STOPPING, DaemonRecord, daemons


@dataclass(frozen=True, slots=True)
class Place:
    """A path on a mount: its daemon, and the path relative to the mountpoint, "" for that itself."""

    record: DaemonRecord
    path: str


def place_of(path: str) -> Place:
    """The place of a path, which need not exist; CachefsError if it is on no mount of this user."""
    live = sorted(daemons(), key=lambda record: record.phase == STOPPING)
    for candidate in (os.path.abspath(path), real_path(path)):  # the second asks the mount, which may not answer
        for record in live:
            if candidate == record.mountpoint:
                return Place(record, "")
    real = real_path(path)
    below = [mount for mount in mountinfo.mounts() if (real + "/").startswith(mount.mountpoint.rstrip("/") + "/")]
    deepest = max(below, key=lambda mount: len(mount.mountpoint), default=None)
    if deepest is not None and deepest.fstype in mountinfo.CACHEFS_TYPES:
        for record in live:
            if record.mountpoint == deepest.mountpoint:
                return Place(record, os.path.relpath(real, record.mountpoint))
        if mountinfo.is_dead(deepest.mountpoint):
            raise CachefsError(f"{path} has no daemon any more: cachefs umount {deepest.mountpoint} tidies up")
        raise CachefsError(f"{path} is on a mount of another user or runtime directory: ask as that user")
    for record in live:
        if (real + "/").startswith(record.source + "/"):
            raise CachefsError(f"{path} is in the SOURCE of a mount: give its path below {record.mountpoint}")
    raise CachefsError(f"{path} is not on a cachefs mount: cachefs status lists them")


def real_path(path: str) -> str:
    """`path` with its symbolic links followed, or as it is where a dead mount keeps them."""
    try:
        return os.path.realpath(path)
    except OSError:
        return os.path.abspath(path)
