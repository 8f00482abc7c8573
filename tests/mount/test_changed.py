"""Changes in SOURCE behind the mount's back, told at once where SOURCE is local."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

import mounts
from backing.directory import DirectoryBacking
from mounts import Factory, Mount, wait_until
from sides import MODES, PAGE, RDWR_CREAT, copies
from twin import opened

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]

OLD_NS = 50_000_000  # more than a tick of the clock of file times
NEVER_ASKED = ("--metadata-ttl", "1h")  # what the kernel believes stays believed unless it is told
WITHOUT_INOTIFY = """
import inotify_simple
def INotify(**options): raise OSError(24, "Too many open files")  # as if others had all that a user may have
inotify_simple.INotify = INotify
"""


def watching(mount: Mount, path: Path) -> None:
    """Waits until the directory of `path` is watched: the daemon's inotify has a watch of its number."""
    wanted = f"ino:{os.stat(path.parent).st_ino:x} "

    def is_watched() -> bool:
        directory = Path(f"/proc/{mount.process.pid}/fdinfo")
        for entry in os.listdir(directory):
            with contextlib.suppress(OSError):
                if wanted in (directory / entry).read_text():
                    return True
        return False

    wait_until(is_watched, f"a watch of {path.parent}")


# --- told at once


@pytest.mark.parametrize("mode", MODES)
def test_contents_changed_in_a_local_source_are_seen_at_once(mounted: Factory, mode: str) -> None:
    mount = mounted(*NEVER_ASKED, kernel_cache=mode)
    (mount.source / "file").write_bytes(b"a" * 10_000)
    with opened(os.fspath(mount.path / "file"), os.O_RDONLY) as fd:
        assert os.pread(fd, 5, 0) == b"aaaaa" and os.fstat(fd).st_size == 10_000
        watching(mount, mount.source / "file")
        (mount.source / "file").write_bytes(b"b" * 20_000)
        wait_until(lambda: os.pread(fd, 5, 0) == b"bbbbb", "the new contents")
        assert os.fstat(fd).st_size == 20_000
        assert os.stat(mount.path / "file").st_size == 20_000
        with opened(os.fspath(mount.source / "file"), os.O_RDWR) as theirs:
            os.pwrite(theirs, b"c" * 100, 19_000)
        wait_until(lambda: os.pread(fd, 100, 19_000) == b"c" * 100, "a part of the contents")


@pytest.mark.parametrize("mode", MODES)
def test_a_mapping_shows_what_changed_in_a_local_source(mounted: Factory, mode: str) -> None:
    mount = mounted(*NEVER_ASKED, kernel_cache=mode)
    (mount.source / "file").write_bytes(b"a" * PAGE)
    with opened(os.fspath(mount.path / "file"), os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as memory:
        assert memory[:5] == b"aaaaa"
        watching(mount, mount.source / "file")
        with opened(os.fspath(mount.source / "file"), os.O_RDWR) as theirs:
            os.pwrite(theirs, b"b" * 100, 0)
        wait_until(lambda: memory[:5] == b"bbbbb", "the new contents")


@pytest.mark.parametrize("mode", MODES)
def test_names_that_go_or_are_replaced_in_a_local_source_are_seen_at_once(mounted: Factory, mode: str) -> None:
    mount = mounted(*NEVER_ASKED, kernel_cache=mode)
    os.mkdir(mount.source / "d")
    for name in ("removed", "moved", "replaced", "kept"):
        (mount.source / "d" / name).write_bytes(b"old")
        assert (mount.path / "d" / name).read_bytes() == b"old"
    watching(mount, mount.source / "d" / "kept")
    (mount.source / "d" / "removed").unlink()
    wait_until(lambda: not (mount.path / "d" / "removed").exists(), "a removed name")
    (mount.source / "d" / "moved").rename(mount.source / "d" / "elsewhere")
    wait_until(lambda: not (mount.path / "d" / "moved").exists(), "a moved name")
    assert (mount.path / "d" / "elsewhere").read_bytes() == b"old"
    (mount.source / "new").write_bytes(b"new")
    (mount.source / "new").rename(mount.source / "d" / "replaced")
    wait_until(lambda: (mount.path / "d" / "replaced").read_bytes() == b"new", "a replaced file")


def test_a_listing_that_the_kernel_keeps_is_as_the_directory_is_when_it_is_opened(mounted: Factory) -> None:
    mount = mounted()
    directory, there = mount.path / "directory", mount.source / "directory"
    there.mkdir()
    names = {str(i) for i in range(50)}
    for name in names:
        (there / name).touch()
    for step in range(20):
        if step % 3 == 0:  # else the kernel may have it from the time before
            wait_until(lambda: time.time_ns() - os.stat(there).st_ctime_ns > OLD_NS, "the last change to be some time ago")
        for _ in range(3):
            assert set(os.listdir(directory)) == names
        if step % 2:
            names.add(f"new {step}")
            (there / f"new {step}").touch()
        elif step % 4:
            names.remove(gone := min(names))
            (there / gone).unlink()
        else:
            names.remove(gone := max(names))
            (directory / gone).unlink()
    assert set(os.listdir(directory)) == names


def test_our_own_changes_are_not_taken_for_somebody_else_s(mounted: Factory) -> None:
    mount = mounted("--dirty-expire", "20ms", "--writeback-interval", "10ms", *NEVER_ASKED)
    contents = random.Random(1).randbytes(50_000)
    with opened(os.fspath(mount.path / "kept"), RDWR_CREAT) as fd:
        watching(mount, mount.source / "kept")
        for i in range(100):
            os.pwrite(fd, contents, i % 7)
            (mount.path / f"a{i % 5}").write_bytes(contents)
            os.rename(mount.path / f"a{i % 5}", mount.path / f"b{i % 5}")
            os.utime(mount.path / f"b{i % 5}", (i, i))
            os.truncate(mount.path / f"b{i % 5}", 10_000 + i)
            if i % 10 == 9:
                os.fsync(fd)
                os.unlink(mount.path / f"b{i % 5}")
    statistics: Any = mount.ask("status")["statistics"]
    assert not statistics["conflicts"]["total"] and not copies(mount)
    assert not statistics["cache"]["evictions"].get("invalidated"), "no page was dropped for a change of our own"


def test_without_inotify_the_log_says_so_once_and_the_ttl_does(mounted: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "START", WITHOUT_INOTIFY + mounts.START)
    mount = mounted("--metadata-ttl", "50ms")
    mount.announce("no inotify")
    (mount.source / "file").write_bytes(b"old")
    with opened(os.fspath(mount.path / "file"), os.O_RDONLY) as fd:
        assert os.pread(fd, 9, 0) == b"old"
        (mount.source / "file").write_bytes(b"newer")
        wait_until(lambda: os.fstat(fd).st_size == 5, "the new size")
        assert os.pread(fd, 9, 0) == b"newer"
    line = "no inotify (Too many open files): changes that others make in SOURCE are noticed after --metadata-ttl"
    wait_until(lambda: line in mount.log_text(), "the line in the log")
    assert mount.log_text().count(line) == 1


@pytest.mark.parametrize("pause_seconds", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES)
def test_appends_of_both_sides_to_one_file_overwrite_nothing(mounted: Factory, mode: str, pause_seconds: float) -> None:
    """Noticed by then or not: the kernel sends an append to the end that it knows, which is not where it is any more."""
    mount = mounted(kernel_cache=mode)
    if not DirectoryBacking(mount.source).has_fine_times():
        pytest.skip("nothing goes through here, and both sides may have unwritten data at a time")
    log, lines = mount.source / "log", []
    log.write_bytes(b"")
    with opened(os.fspath(mount.path / "log"), os.O_WRONLY | os.O_APPEND) as fd:
        for i in range(20):
            lines += [b"theirs %d\n" % i, b"ours %d\n" % i]
            with log.open("ab") as theirs:
                theirs.write(lines[-2])
            time.sleep(pause_seconds)  # not to wait for anything: both what was noticed and what was not are to be met
            os.write(fd, lines[-1])
    assert (mount.path / "log").read_bytes() == b"".join(lines)
    mount.unmount()
    assert log.read_bytes() == b"".join(lines) and not copies(mount)
