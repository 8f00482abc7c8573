"""Changes in SOURCE behind the mount's back: told at once where SOURCE is local, and no byte of either side lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import mounts
from mounts import Factory, Mount, wait_until
from twin import opened, outcome

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system of a certain size, or acts for others")

PAGE = 4096
RDWR_CREAT = os.O_RDWR | os.O_CREAT
OLD_NS = 50_000_000  # more than a tick of the clock of file times
LATER = ("--dirty-expire", "1h")  # nothing is written back unless something asks for it
NEVER_ASKED = ("--metadata-ttl", "1h")  # what the kernel believes stays believed unless it is told
KEPT = "kept as"  # in the line of the log that tells of a conflict
MODES = ("off", "open", "keep")
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL = 0x80086601, 0x40086602, 0x10  # linux/fs.h
WITHOUT_INOTIFY = """
import inotify_simple
def INotify(**options): raise OSError(24, "Too many open files")  # as if others had all that a user may have
inotify_simple.INotify = INotify
"""


def copies(mount: Mount) -> dict[str, bytes]:
    """{path in SOURCE: contents} of the copies of conflicts."""
    found = sorted(mount.source.rglob("*.conflict-*"))
    return {str(path.relative_to(mount.source)): path.read_bytes() for path in found}


def the_copy(mount: Mount) -> bytes:
    (contents,) = copies(mount).values()
    return contents


def conflicts_of(mount: Mount) -> Any:
    return mount.ask("status")["statistics"]["conflicts"]  # type: ignore[index]


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


# --- both sides


@pytest.mark.parametrize("mode", MODES)
def test_of_two_changes_to_a_file_both_are_kept(mounted: Factory, mode: str) -> None:
    mount = mounted(*LATER, "--metadata-ttl", "0s", kernel_cache=mode)
    mount.announce(KEPT)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.write(fd, b"ours")
        (mount.source / "file").write_bytes(b"theirs, and longer")
        os.chmod(mount.source / "file", 0o640)
        assert os.stat(mount.path / "file").st_size == 4
        os.fsync(fd)
        assert (mount.source / "file").read_bytes() == b"ours" == os.pread(fd, 99, 0)
    ((name, contents),) = copies(mount).items()
    assert contents == b"theirs, and longer"
    assert re.fullmatch(r"file\.conflict-\d{8}-\d{6}", name)
    assert os.stat(mount.source / name).st_mode & 0o7777 == 0o640
    assert (mount.path / name).read_bytes() == b"theirs, and longer"
    told = conflicts_of(mount)
    assert told["total"] == 1
    assert (told["recent"][0]["path"], told["recent"][0]["copy"], told["recent"][0]["kept"]) == ("file", name, "theirs")
    assert f'"file" was changed in SOURCE while data of ours was unwritten: that version is kept as "{name}"' in mount.log_text()


def test_what_was_changed_far_away_is_kept_when_ours_is_closed(mounted: Factory) -> None:
    mount = mounted(*LATER, "--backing", "network")
    mount.announce(KEPT)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.write(fd, b"ours")
        (mount.source / "file").write_bytes(b"theirs")
    assert (mount.source / "file").read_bytes() == b"ours" and the_copy(mount) == b"theirs"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["removed", "replaced", "removed with its directory"])
def test_a_file_that_others_took_away_lives_on_as_a_copy(mounted: Factory, mode: str, how: str) -> None:
    mount = mounted(*LATER, "--metadata-ttl", "0s", kernel_cache=mode)
    mount.announce(KEPT)
    (mount.source / "d").mkdir()
    (mount.source / "d" / "file").write_bytes(b"o" * 10_000)
    with opened(os.fspath(mount.path / "d" / "file"), os.O_RDWR) as fd:
        os.pwrite(fd, b"ours", 5000)
        if how == "replaced":
            (mount.source / "new").write_bytes(b"theirs")
            (mount.source / "new").rename(mount.source / "d" / "file")
        elif how == "removed":
            (mount.source / "d" / "file").unlink()
        else:
            shutil.rmtree(mount.source / "d")
        os.fsync(fd)
        ours = b"o" * 5000 + b"ours" + b"o" * 4996
        ((name, contents),) = copies(mount).items()
        assert contents == ours == os.pread(fd, 20_000, 0)
        assert os.path.dirname(name) == ("" if how == "removed with its directory" else "d")
        os.pwrite(fd, b"and more", 10_000)
        assert os.fstat(fd).st_size == 10_008
        os.fsync(fd)
    assert the_copy(mount) == ours + b"and more", "what is written later is in the same copy"
    assert (mount.path / name).read_bytes() == ours + b"and more"
    if how == "replaced":
        assert (mount.source / "d" / "file").read_bytes() == (mount.path / "d" / "file").read_bytes() == b"theirs"
    else:
        assert not (mount.path / "d" / "file").exists()
    assert conflicts_of(mount)["recent"][0]["kept"] == "ours" and conflicts_of(mount)["total"] == 1


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_conflict_that_is_met_at_the_unmount_is_dealt_with_like_any_other(mounted: Factory, how: str) -> None:
    mount = mounted(*LATER, kernel_cache="keep")
    mount.announce(KEPT)
    (mount.path / "file").write_bytes(b"ours")
    if how == "changed":
        (mount.source / "file").write_bytes(b"theirs")
    else:
        (mount.source / "file").unlink()
    mount.unmount()
    assert the_copy(mount) == (b"theirs" if how == "changed" else b"ours")
    assert how == "removed" or (mount.source / "file").read_bytes() == b"ours"


def test_a_file_that_a_program_on_the_mount_removed_leaves_no_copy(mounted: Factory) -> None:
    mount = mounted("--dirty-expire", "0s", "--writeback-interval", "10ms")
    for i in range(50):
        with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
            os.write(fd, b"x" * 100_000)
            if i % 2:
                os.unlink(mount.path / "file")
            else:
                (mount.path / "other").write_bytes(b"y")
                os.rename(mount.path / "other", mount.path / "file")
            os.write(fd, b"x" * 100_000)
    mount.ask("sync")
    assert not copies(mount) and not conflicts_of(mount)["total"]


def test_a_name_that_a_hard_link_has_left_does_not_matter(mounted: Factory) -> None:
    mount = mounted(*LATER)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.write(fd, b"ours")
        os.link(mount.source / "file", mount.source / "link")
        (mount.source / "file").unlink()
        os.fsync(fd)
    assert not copies(mount) and (mount.source / "link").read_bytes() == b"ours"


@pytest.mark.parametrize("ours", ["utime", "truncate", "O_TRUNC", "chmod", "rename"])
def test_no_change_of_ours_hides_theirs_from_unwritten_data(mounted: Factory, ours: str) -> None:
    mount = mounted(*LATER, "--metadata-ttl", "0s")
    mount.announce(KEPT)
    file, left = mount.path / "file", b"ours"
    with opened(os.fspath(file), RDWR_CREAT) as fd:
        os.write(fd, b"ours")
        (mount.source / "file").write_bytes(b"theirs")
        match ours:
            case "utime":
                os.utime(file, (1, 1))
            case "truncate":
                os.truncate(file, 2)
                left = b"ou"
            case "O_TRUNC":
                os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))
                left = b""
            case "chmod":
                os.chmod(file, 0o600)
            case "rename":
                os.rename(file, mount.path / "renamed")
                file = mount.path / "renamed"
        os.fsync(fd)
    assert the_copy(mount) == b"theirs"
    assert file.read_bytes() == (mount.source / file.name).read_bytes() == left


# --- where no copy can be made


@as_root
def test_where_a_copy_has_no_room_nothing_is_overwritten_and_ours_waits(mounted: Factory) -> None:
    mount = mounted_on_tmpfs(mounted, "1M")
    mount.announce("cannot write to the backing: ENOSPC")
    mount.announce(KEPT)
    theirs = random.Random(3).randbytes(600 << 10)
    fd = os.open(mount.path / "file", RDWR_CREAT)
    os.write(fd, b"ours")
    (mount.source / "file").write_bytes(theirs)
    assert outcome(os.fsync, fd) == "ENOSPC"
    assert (mount.source / "file").read_bytes() == theirs and not copies(mount)
    assert os.pread(fd, 4, 0) == b"ours"
    subprocess.run(["mount", "-o", "remount,size=8M", mount.source], check=True, timeout=60)
    assert outcome(os.fsync, fd) in (None, "ENOSPC")
    os.close(fd)
    mount.ask("sync")
    assert (mount.source / "file").read_bytes() == b"ours" and the_copy(mount) == theirs
    assert conflicts_of(mount)["total"] == 1
    mount.unmount()
    subprocess.run(["umount", mount.source], check=True, timeout=60)


def mounted_on_tmpfs(mounted: Factory, size: str) -> Mount:
    """A mount whose SOURCE is a file system of its own."""
    first = mounted()
    first.unmount()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", first.source], check=True, timeout=60)
    first.command += [*LATER, "--metadata-ttl", "0s"]
    first.start()
    return first


@contextlib.contextmanager
def immutable(directory: Path) -> Iterator[None]:
    """A directory in which nothing can be made or removed, not by root either; files in it may be written."""
    with opened(os.fspath(directory), os.O_RDONLY) as fd:
        try:
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags | FS_IMMUTABLE_FL))
        except OSError:
            pytest.skip("this file system has no such directories")
        try:
            yield
        finally:
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))


@as_root
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_where_the_directory_is_read_only_nothing_is_overwritten_and_ours_waits(mounted: Factory, how: str) -> None:
    mount = mounted(*LATER, "--metadata-ttl", "0s")
    mount.announce("cannot write to the backing: EPERM")
    mount.announce(KEPT)
    directory = mount.source / "d"
    directory.mkdir()
    (directory / "file").write_bytes(b"old")
    fd = os.open(mount.path / "d" / "file", os.O_RDWR)
    os.pwrite(fd, b"ours", 0)
    if how == "changed":
        (directory / "file").write_bytes(b"theirs")
    else:
        (directory / "file").unlink()
    with immutable(directory):
        assert outcome(os.fsync, fd) == "EPERM"
        assert not copies(mount) and os.pread(fd, 9, 0) == b"ours"
        assert how == "removed" or (directory / "file").read_bytes() == b"theirs"
    os.close(fd)
    mount.ask("sync")
    assert the_copy(mount) == (b"theirs" if how == "changed" else b"ours")
    assert how == "removed" or (directory / "file").read_bytes() == b"ours"


# --- killed


def killed(mount: Mount) -> None:
    mount.process.send_signal(signal.SIGKILL)
    mount.process.wait(60)


def put_plan(path: Path, *rules: dict[str, object]) -> None:
    """Makes `rules` the faults of SOURCE."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rules))
    new.rename(path)


def test_what_others_changed_while_nothing_was_mounted_is_kept_by_the_next_mount(mounted: Factory) -> None:
    mount = mounted(*LATER)
    mount.announce(KEPT)
    (mount.path / "file").write_bytes(b"ours")
    killed(mount)
    (mount.source / "file").write_bytes(b"theirs, and longer")
    mount.start()
    assert (mount.source / "file").read_bytes() == (mount.path / "file").read_bytes() == b"ours"
    assert the_copy(mount) == b"theirs, and longer" and conflicts_of(mount)["total"] == 1


@pytest.mark.parametrize("how", ["utime", "chmod", "truncate"])
def test_regression_a_kill_right_after_a_change_of_ours_does_not_make_theirs_look_like_it(mounted: Factory, how: str) -> None:
    """That the utime was over was noted with the next record, at most a second later: until then theirs was written over."""
    mount = mounted(*LATER)
    mount.announce(KEPT)
    (mount.path / "file").write_bytes(b"ours")
    if how == "utime":
        os.utime(mount.path / "file", ns=(1, 2))
    elif how == "chmod":
        os.chmod(mount.path / "file", 0o600)
    else:
        os.truncate(mount.path / "file", 3)
    killed(mount)
    (mount.source / "file").write_bytes(b"theirs, and longer")
    mount.start()
    assert (mount.source / "file").read_bytes() == (b"our" if how == "truncate" else b"ours")
    assert the_copy(mount) == b"theirs, and longer" and conflicts_of(mount)["total"] == 1


@pytest.mark.parametrize("operation", ["fsync", "open"])
def test_a_kill_before_a_copy_is_whole_costs_neither_side_anything(mounted: Factory, operation: str, tmp_path: Path) -> None:
    """While it is made (fsync hangs), or when it could not be made (open fails)."""
    plan = tmp_path / "plan"
    put_plan(plan)
    mount = mounted(*LATER, "--metadata-ttl", "0s", "--fault-plan", str(plan))
    for line in (KEPT, "cannot write to the backing: ENOSPC"):
        mount.announce(line)
    fd = os.open(mount.path / "file", RDWR_CREAT)
    os.write(fd, b"ours")
    (mount.source / "file").write_bytes(b"theirs, and longer")
    put_plan(plan, {"op": "fsync", "hang": True} if operation == "fsync" else {"op": "open", "errno": "ENOSPC"})
    syncing = threading.Thread(target=outcome, args=(os.fsync, fd))
    syncing.start()
    if operation == "fsync":
        wait_until(lambda: b"theirs, and longer" in copies(mount).values(), "a copy")
    else:
        syncing.join()
    killed(mount)
    syncing.join()
    assert outcome(os.close, fd) == "ENOTCONN"
    assert (mount.source / "file").read_bytes() == b"theirs, and longer"
    put_plan(plan)
    mount.start()
    assert (mount.source / "file").read_bytes() == b"ours"
    assert set(copies(mount).values()) == {b"theirs, and longer"}
    assert conflicts_of(mount)["total"] == 1, "the unfinished one was not counted"


@as_root
def test_a_mount_that_finds_no_room_for_a_copy_keeps_both_and_goes_on(mounted: Factory) -> None:
    mount = mounted_on_tmpfs(mounted, "1M")
    for line in (KEPT, "ENOSPC", "cannot be written now"):
        mount.announce(line)
    (mount.path / "file").write_bytes(b"ours")
    killed(mount)
    theirs = random.Random(4).randbytes(600 << 10)
    (mount.source / "file").write_bytes(theirs)
    mount.start()
    assert (mount.path / "file").read_bytes() == b"ours" and (mount.source / "file").read_bytes() == theirs
    subprocess.run(["mount", "-o", "remount,size=8M", mount.source], check=True, timeout=60)
    wait_until(lambda: not mount.ask("sync")["unwritten"], "room")
    assert (mount.source / "file").read_bytes() == b"ours" and the_copy(mount) == theirs
    mount.unmount()
    subprocess.run(["umount", mount.source], check=True, timeout=60)


# --- a thousand


@dataclass
class Side:
    """One file of the test below: its contents as the mount has them, and every version that must be somewhere."""

    name: str
    contents: bytes
    copies: list[bytes] = field(default_factory=list)


def written(side: Side, rng: random.Random, fd: int) -> None:
    """Something that a program on the mount writes."""
    data = rng.randbytes(rng.randrange(1, 3 * PAGE))
    offset = rng.choice((0, rng.randrange(len(side.contents) + 1), len(side.contents)))
    if rng.random() < 0.2:
        os.ftruncate(fd, 0)
        side.contents, offset = b"", 0
    os.pwrite(fd, data, offset)
    side.contents = side.contents[:offset].ljust(offset, b"\0") + data + side.contents[offset + len(data) :]


def changed_in_place(path: Path, rng: random.Random) -> bytes:
    """Something that somebody else writes to the file in SOURCE; what it has then."""
    old = path.read_bytes()
    with opened(os.fspath(path), os.O_RDWR) as fd:
        match rng.randrange(4):
            case 0:
                os.ftruncate(fd, 0)
                os.pwrite(fd, rng.randbytes(rng.randrange(1, 5 * PAGE)), 0)
            case 1:
                os.pwrite(fd, rng.randbytes(500), len(old))
            case 2:
                os.ftruncate(fd, len(old) // 2)
            case 3:
                os.pwrite(fd, rng.randbytes(100), rng.randrange(len(old) + 1))
    return path.read_bytes()


def whole_pages(old: bytes, new: bytes, theirs: bytes) -> bytes:
    """What the file has once the pages that changed from `old` to `new` were written over `theirs`: our size, our pages."""
    result = bytearray(theirs[: len(new)].ljust(len(new), b"\0"))
    for start in range(0, len(new), PAGE):
        if old[start : start + PAGE] != new[start : start + PAGE]:
            result[start : start + PAGE] = new[start : start + PAGE]
    return bytes(result)


@pytest.mark.timeout(180)
def test_1000_conflicting_changes_lose_no_byte_of_either_side_and_are_all_counted(mounted: Factory) -> None:
    mount = mounted(*LATER, "--metadata-ttl", "0s")
    mount.announce(KEPT)
    rng = random.Random(5)
    sides = [Side(f"file{i}", rng.randbytes(rng.randrange(1, 6 * PAGE))) for i in range(100)]
    for side in sides:
        (mount.source / side.name).write_bytes(side.contents)
    for _ in range(10):
        for side in sides:
            one_conflict(mount, side, rng)
        assert mount.ask("sync")["unwritten"] == []
        for side in sides:
            path = mount.source / side.name
            if path.exists():
                assert path.read_bytes() == side.contents == (mount.path / side.name).read_bytes()
            else:
                assert not (mount.path / side.name).exists()
                path.write_bytes(side.contents)
    found: dict[str, list[bytes]] = {side.name: [] for side in sides}
    for name, contents in copies(mount).items():
        found[name.split(".")[0]].append(contents)
    for side in sides:
        assert sorted(found[side.name]) == sorted(side.copies)
    assert conflicts_of(mount)["total"] == 1000 == sum(map(len, found.values()))


def one_conflict(mount: Mount, side: Side, rng: random.Random) -> None:
    """A change on each side; notes what must be where once all is written."""
    path = mount.source / side.name
    with opened(os.fspath(mount.path / side.name), os.O_RDWR) as fd:
        before = side.contents
        assert os.pread(fd, 1 << 20, 0) == before
        written(side, rng, fd)
        match rng.randrange(6):
            case 0:
                path.unlink()
                side.copies.append(side.contents)
            case 1:
                (mount.source / "new").write_bytes(rng.randbytes(rng.randrange(1, 3 * PAGE)))
                (mount.source / "new").rename(path)
                side.copies.append(side.contents)
                side.contents = path.read_bytes()
            case _:
                theirs = changed_in_place(path, rng)
                side.copies.append(theirs)
                old = before if path.stat() else b""
                side.contents = whole_pages(old, side.contents, theirs)


# --- at random moments


@dataclass
class Race:
    """One file in which both sides write, each at places of its own but in the same pages."""

    path: Path
    source: Path
    ours: list[bytes] = field(default_factory=list)
    theirs: list[bytes] = field(default_factory=list)
    over: bool = False

    def write_theirs(self, seed: int, times: int) -> None:
        rng = random.Random(seed)
        for i in range(times):
            time.sleep(rng.random() * 0.2)
            token = b"theirs %05d;" % i
            with opened(os.fspath(self.source), os.O_RDWR) as fd:
                os.pwrite(fd, token, 32 * i)
            self.theirs.append(token)
        self.over = True

    def write_ours(self, seed: int) -> None:
        rng = random.Random(seed)
        with opened(os.fspath(self.path), os.O_RDWR) as fd:
            while not self.over:
                token = b"ours %05d;" % len(self.ours)
                os.pwrite(fd, token, 32 * len(self.ours) + 16)
                self.ours.append(token)
                if rng.random() < 0.5:
                    assert outcome(os.fsync, fd) in (None, "EBUSY")
                time.sleep(rng.random() * 0.004)


def test_two_sides_that_write_at_random_moments_lose_nothing(mounted: Factory) -> None:
    """Written back all the time, and theirs opened for each write, so that there is no moment to slip through."""
    mount = mounted("--metadata-ttl", "0s", "--dirty-expire", "0s", "--writeback-interval", "10ms")
    for line in (KEPT, "EBUSY"):
        mount.announce(line)
    races = [Race(mount.path / f"file{i}", mount.source / f"file{i}") for i in range(6)]
    threads = []
    for i, race in enumerate(races):
        race.source.write_bytes(b"-" * 65_536)
        threads.append(threading.Thread(target=race.write_theirs, args=(i, 40)))
        threads.append(threading.Thread(target=race.write_ours, args=(i,)))
    with opened(os.fspath(races[0].source), os.O_RDWR) as probe:
        if outcome(fcntl.fcntl, probe, fcntl.F_SETLEASE, fcntl.F_WRLCK) != 0:
            pytest.skip("this file system has no leases: a change in the moment of our write may be overwritten")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: not mount.ask("sync")["unwritten"], "writeback")
    kept = copies(mount)
    for race in races:
        versions = [race.source.read_bytes(), *(data for name, data in kept.items() if name.startswith(race.source.name + "."))]
        assert not [token for token in race.theirs if not any(token in version for version in versions)]
        assert not [token for token in race.ours if token not in versions[0]]
    assert conflicts_of(mount)["total"] == len(kept) > 20
