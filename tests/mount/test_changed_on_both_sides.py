"""Files that both sides changed: no byte of either is lost, whatever stands in the way of a copy or is killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounts import Factory, Mount, wait_until
from sides import KEPT, LATER, MODES, RDWR_CREAT, conflicts_of, copies, the_copy
from twin import opened, outcome

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system of a certain size, or acts for others")

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL = 0x80086601, 0x40086602, 0x10  # linux/fs.h


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
