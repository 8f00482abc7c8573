"""Several paths on the command line: the mounts that they lie on, and what they are called there."""

import glob
import os
from collections.abc import Iterable

from cachefs.cli.place import Place, place_of
from cachefs.errors import CachefsError
from cachefs.state import DaemonRecord, daemons


def by_mount(paths: Iterable[str], must_exist: bool = True) -> list[tuple[DaemonRecord, list[str]]]:
    """The mounts that these paths lie on, each with its paths; patterns that are no names are expanded."""
    found: dict[str, tuple[DaemonRecord, list[str]]] = {}
    for match in (match for path in paths for match in _matches(path)):
        place = located(match) if must_exist else place_of(match)
        found.setdefault(place.record.mountpoint, (place.record, []))[1].append(place.path)
    return list(found.values())


def located(path: str) -> Place:
    """The place of a path that exists."""
    place = place_of(path)
    if not os.path.lexists(path):
        raise CachefsError(f"{path} does not exist")
    return place


def the_mount(mountpoint: str | None) -> DaemonRecord:
    """The daemon at a mountpoint, or the only one there is."""
    if mountpoint is not None:
        place = place_of(mountpoint)
        if place.path:
            raise CachefsError(f"{mountpoint} is not a mountpoint: its mount is {place.record.mountpoint}")
        return place.record
    live = daemons()
    if len(live) != 1:
        raise CachefsError("several are mounted: give the MOUNTPOINT too" if live else "no cachefs is mounted")
    return live[0]


def _matches(path: str) -> list[str]:
    if not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise CachefsError(f"nothing matches {path}")
    return matches
