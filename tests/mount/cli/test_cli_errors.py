"""Bad input to the real command: one line that says what to do, exit status 2 or 1, at once, and nothing is changed."""

import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import ROOT, Command, Done, is_mounted, one_line

from cachefs import mountinfo

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]
PATIENCE_SECONDS = 20.0
NOBODY = 65534


def picture(directory: Path) -> list[tuple[str, int, int]]:
    """Everything below a directory, with mode and time of the last change."""
    found = [directory, *sorted(directory.rglob("*"))]
    return [(str(path), path.lstat().st_mode, path.lstat().st_ctime_ns) for path in found]


def refused(cachefs: Command, status: int, *arguments: object) -> str:
    """The one line with which `cachefs mount` refuses; neither SOURCE nor MOUNTPOINT nor what is mounted has changed."""
    before = [picture(path) for path in (cachefs.source, cachefs.path)], mountinfo.mounts()
    done = cachefs.run("mount", *arguments, *cachefs.options, timeout=PATIENCE_SECONDS)
    line = one_line(done, status)
    after = [picture(path) for path in (cachefs.source, cachefs.path)], mountinfo.mounts()
    assert [mount for mount in after[1] if str(cachefs.base) in mount.mountpoint] == [
        mount for mount in before[1] if str(cachefs.base) in mount.mountpoint
    ]
    assert after[0] == before[0]
    assert not list((cachefs.base / "run").glob("*"))
    return line


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        # words
        ((), 2, "Missing argument 'SOURCE'"),
        (("SOURCE",), 2, "Missing argument 'MOUNTPOINT'"),
        (("SOURCE", "MOUNTPOINT", "MOUNTPOINT"), 2, "Got unexpected extra argument"),
        (("SOURCE", "MOUNTPOINT", "--cache-sise", "1G"), 2, "--cache-size"),
        (("SOURCE", "MOUNTPOINT", "--polcy=lru"), 2, "--policy"),
        (("SOURCE", "MOUNTPOINT", "-o", "cache_sise=1G"), 2, "did you mean cache_size?"),
        (("SOURCE", "MOUNTPOINT", "-o", "noatim"), 2, "did you mean noatime?"),
        (("SOURCE", "MOUNTPOINT", "--cache-size"), 2, "requires an argument"),
        # values
        (("SOURCE", "MOUNTPOINT", "--cache-size", "12X"), 2, "--cache-size '12X' is not a size"),
        (("SOURCE", "MOUNTPOINT", "-o", "cache_size=12X"), 2, "--cache-size '12X' is not a size"),
        (("SOURCE", "MOUNTPOINT", "--cache-size", "-1M"), 2, "is not a size"),
        (("SOURCE", "MOUNTPOINT", "--cache-size", ""), 2, "is not a size"),
        (("SOURCE", "MOUNTPOINT", "--cache-size", "61439"), 2, "is below 16 pages: give at least 64 KiB"),
        (("SOURCE", "MOUNTPOINT", "--cache-size", "60K"), 2, "is below 16 pages: give at least 64 KiB"),
        (("SOURCE", "MOUNTPOINT", "--cache-size", "1P"), 2, "is more than the memory there is"),
        (("SOURCE", "MOUNTPOINT", "--cache-size", "64M", "--dirty-limit", "48M"), 2, "is above half the cache"),
        (("SOURCE", "MOUNTPOINT", "--dirty-expire", "5x"), 2, "'5x' is not a time"),
        (("SOURCE", "MOUNTPOINT", "--simulate-bandwidth", "fast"), 2, "'fast' is not a bandwidth"),
        (("SOURCE", "MOUNTPOINT", "--kernel-cache", "kep"), 2, "is not one of off, open, keep; did you mean keep?"),
        (("SOURCE", "MOUNTPOINT", "--policy", "fifo"), 2, "is not one of lru, sieve, s3fifo"),
        (("SOURCE", "MOUNTPOINT", "--metrics", "here"), 2, "is not ADDRESS:PORT"),
        (("SOURCE", "MOUNTPOINT", "--metrics", "127.0.0.1:65536"), 2, "is not ADDRESS:PORT"),
        (("SOURCE", "MOUNTPOINT", "--fault-plan", "missing"), 1, "No such file"),
        # places
        (("missing", "MOUNTPOINT"), 1, "missing does not exist"),
        (("file", "MOUNTPOINT"), 1, "file is not a directory"),
        (("file/below", "MOUNTPOINT"), 1, "can't be reached: Not a directory"),
        (("loop", "MOUNTPOINT"), 1, "can't be reached: Too many levels of symbolic links"),
        (("x" * 300, "MOUNTPOINT"), 1, "can't be reached: File name too long"),
        (("", "MOUNTPOINT"), 1, "SOURCE"),
        (("SOURCE", "missing"), 1, "missing does not exist: create it first"),
        (("SOURCE", "file"), 1, "file is not a directory"),
        (("SOURCE", "SOURCE"), 1, "SOURCE and MOUNTPOINT are both"),
        (("SOURCE", "link-to-source"), 1, "SOURCE and MOUNTPOINT are both"),
        (("SOURCE", "SOURCE/inside"), 1, "is inside SOURCE"),
        (("MOUNTPOINT/inside", "MOUNTPOINT"), 1, "is inside MOUNTPOINT"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_mount_refuses(cachefs: Command, arguments: tuple[str, ...], status: int, says: str) -> None:
    (cachefs.base / "file").write_text("text")
    (cachefs.base / "link-to-source").symlink_to("source")
    (cachefs.base / "loop").symlink_to("loop")
    (cachefs.source / "inside").mkdir()
    (cachefs.path / "inside").mkdir()
    places = {"SOURCE": "source", "MOUNTPOINT": "mnt"}
    words = [word.replace(first, places[first]) for word in arguments for first in [word.partition("/")[0]] if first in places or True]
    assert says in refused(cachefs, status, *words)
