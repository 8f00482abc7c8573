"""What a far away SOURCE is asked for, and how: a real sshfs, and a line that is only slow."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachefs.walk import FILES_FIRST
from far import FarMount, far_mount
from mounts import DEADLINE_SECONDS, wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20


def flags_of(mount: FarMount, name: str) -> list[int]:
    """The flags of the daemon's descriptors of a file of SOURCE."""
    path, found = str(mount.sshfs.near / name), []
    for link in Path(f"/proc/{mount.process.pid}/fd").iterdir():
        if os.readlink(link) == path:
            found.append(int((link.parent.parent / "fdinfo" / link.name).read_text().split("flags:")[1].split()[0], 8))
    return [flags for flags in found if not flags & os.O_PATH]


def test_sshfs_is_read_past_the_kernels_cache_and_written_through_it() -> None:
    data = random.Random(1).randbytes(5 * MIB + 4321)
    with far_mount() as mount:
        mount.there("file").write_bytes(data)
        with open(mount.at("file"), "rb", buffering=0) as file:
            assert file.read(100) == data[:100]
            assert [bool(flags & os.O_DIRECT) for flags in flags_of(mount, "file")] == [True]
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            assert file.readall() == data
        with open(mount.at("file"), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"ours", MIB + 17)
            os.fsync(file.fileno())
            assert not any(flags & os.O_DIRECT for flags in flags_of(mount, "file") if flags & os.O_ACCMODE)
        assert mount.there("file").read_bytes() == data[: MIB + 17] + b"ours" + data[MIB + 21 :]
        assert mount.at("file").read_bytes() == mount.there("file").read_bytes()


def reads_of(mount: Any) -> int:
    return sum(mount.ask("status")["statistics"]["backing"]["durations"].get("read", {"counts": []})["counts"])


def test_the_files_that_follow_are_fetched_before_they_are_opened(mounted: Callable[..., Any]) -> None:
    mount = mounted("--backing", "network", "--simulate-latency", "5ms", "--metadata-ttl", "1h")
    (mount.source / "d").mkdir()
    for number in range(40):
        (mount.source / "d" / f"f{number}").write_bytes(b"%d" % number * 1000)
    names = os.listdir(mount.path / "d")
    for i, name in enumerate(names):
        number = int(name[1:])
        assert (mount.path / "d" / name).read_bytes() == b"%d" % number * 1000
        if i == 2:
            wait_until(lambda: reads_of(mount) >= 3 + FILES_FIRST, "the next files are fetched")
    assert reads_of(mount) == len(names)
    assert mount.ask("status")["statistics"]["cache"]["readahead_unused_pages"] == 0


def test_opens_in_no_order_fetch_one_file_each(mounted: Callable[..., Any]) -> None:
    mount = mounted("--backing", "network", "--metadata-ttl", "1h")
    for number in range(100):
        (mount.source / f"f{number:02d}").write_bytes(b"x" * 100)
    names = os.listdir(mount.path)
    for name in (names[50], names[30], names[70], names[10]):
        assert (mount.path / name).read_bytes() == b"x" * 100
    assert reads_of(mount) == 4


def test_a_directory_that_was_just_read_is_not_read_again_but_after_changes_made_here(mounted: Callable[..., Any]) -> None:
    mount = mounted("--backing", "network", "--metadata-ttl", "1h")
    (mount.source / "d").mkdir()
    for number in range(50):
        (mount.source / "d" / f"f{number}").touch()

    def calls() -> int:
        durations = mount.ask("status")["statistics"]["backing"]["durations"]
        return sum(sum(durations[op]["counts"]) for op in ("readdir", "lookup", "stat", "open") if op in durations)

    names = os.listdir(mount.path / "d")
    assert len(names) == 50
    before = calls()
    assert os.listdir(mount.path / "d") == names
    assert calls() == before
    (mount.path / "d" / "new").touch()
    (mount.path / "d" / "f7").unlink()
    assert set(os.listdir(mount.path / "d")) == {*names, "new"} - {"f7"}


def killed_and_mounted_again(mount: FarMount, fd: int) -> None:
    mount.process.kill()
    mount.process.wait(DEADLINE_SECONDS)
    subprocess.run(["fusermount3", "-uz", str(mount.path)], check=True, timeout=DEADLINE_SECONDS)
    with contextlib.suppress(OSError):
        os.close(fd)
    mount.start()


@pytest.mark.parametrize("durability", ["backing", "journal"])
def test_regression_unwritten_data_of_a_name_that_goes_is_under_the_other_name(durability: str) -> None:
    """sshfs shows two names of one file as two files of one name each. git gives each of its files its name with link(2)."""
    data = random.Random(2).randbytes(100_000)
    with far_mount("--durability", durability, "--dirty-expire", "1h", "--writeback-interval", "1h") as mount:
        mount.at("temporary").write_bytes(data)
        os.link(mount.at("temporary"), mount.at("file"))
        assert mount.at("file").read_bytes() == data, "by its other name"
        os.unlink(mount.at("temporary"))
        assert mount.at("file").read_bytes() == data, "by the only one left"
        with open(mount.at("t2"), "wb") as file:  # open all the time, and written between and afterwards
            file.write(data)
            file.flush()
            os.link(mount.at("t2"), mount.at("f2"))
            file.write(b"between")
            file.flush()
            os.unlink(mount.at("t2"))
            file.write(b"afterwards")
        mount.there("a").write_bytes(data)  # two names that somebody else gave
        os.link(mount.there("a"), mount.there("b"))
        with open(mount.at("a"), "r+b") as file:
            file.write(b"ours")
        os.unlink(mount.at("a"))
        for name in ("c", "d"):
            mount.at(name).write_bytes(data)
        os.link(mount.at("c"), mount.at("e"))
        with open(mount.at("c"), "r+b") as file:
            file.write(b"ours")
        os.rename(mount.at("d"), mount.at("c"))
        mount.unmount()
        found = {name: mount.there(name).read_bytes() for name in ("file", "f2", "b", "c", "e")}
    ours = b"ours" + data[4:]
    assert found == {"file": data, "f2": data + b"betweenafterwards", "b": ours, "c": data, "e": ours}


@pytest.mark.parametrize("durability", ["backing", "journal"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_regression_a_file_open_to_be_read_and_never_read_before_outlives_its_name(durability: str, how: str) -> None:
    """It was to be opened at SOURCE when first needed. sshfs keeps what is open, and knows of no O_PATH."""
    data = random.Random(3).randbytes(150_000)
    with far_mount("--durability", durability) as mount:
        mount.there("f").write_bytes(data)
        mount.there("new").write_bytes(b"new")
        os.stat(mount.at("f"))
        with open(mount.at("f"), "rb", buffering=0) as file:
            if how == "removed":
                os.unlink(mount.at("f"))
            else:
                os.rename(mount.at("new"), mount.at("f"))
            assert os.fstat(file.fileno()).st_size == len(data)
            assert os.pread(file.fileno(), len(data), 0) == data


def test_regression_a_directory_that_is_renamed_takes_along_files_that_are_written_back_and_not_let_go_of() -> None:
    """The journal had the old path of a file that its durable index still named, and put what was fsynced next aside."""
    with far_mount("--durability", "journal", "--dirty-expire", "100ms", "--writeback-interval", "50ms") as mount:
        mount.announce("recovered")
        os.mkdir(mount.at("d"))
        fd = os.open(mount.at("d/c"), os.O_RDWR | os.O_CREAT)
        os.write(fd, b"1" * 5000)
        os.fsync(fd)
        wait_until(lambda: (mount.there("d/c").exists() and mount.there("d/c").stat().st_size == 5000), "it is written back")
        os.rename(mount.at("d"), mount.at("e"))
        os.pwrite(fd, b"2" * 5000, 0)
        os.fsync(fd)
        killed_and_mounted_again(mount, fd)
        assert mount.there("e/c").read_bytes() == b"2" * 5000
        assert not mount.figures()["journal"]["set_aside_files"]


@pytest.mark.parametrize("durability", ["backing", "journal"])
def test_regression_two_names_given_here_are_one_file(durability: str) -> None:
    """sshfs tells times in seconds, so that two inodes would not notice each other's writes."""
    with far_mount("--durability", durability, "--metadata-ttl", "0") as mount:
        a, b = mount.at("a"), mount.at("b")
        a.write_bytes(b"A" * 100)
        os.link(a, b)
        assert b.read_bytes() == b"A" * 100
        with open(a, "r+b") as file:
            file.write(b"B" * 50)
        assert b.read_bytes() == a.read_bytes() == b"B" * 50 + b"A" * 50
        assert os.stat(a).st_ino == os.stat(b).st_ino
        with open(b, "r+b") as file:
            file.seek(50)
            file.write(b"C" * 10)
        os.unlink(a)
        os.link(b, mount.at("c"))
        os.rename(b, mount.at("d"))
        with open(mount.at("c"), "ab") as file:
            file.write(b"D")
        expected = b"B" * 50 + b"C" * 10 + b"A" * 40 + b"D"
        assert mount.at("d").read_bytes() == expected
        mount.unmount()
        found = {path.name: path.read_bytes() for path in mount.sshfs.remote.iterdir()}
        # sshfs removes what it hid in its own time.
        assert {name: data for name, data in found.items() if ".fuse_hidden" not in name} == {"c": expected, "d": expected}


@pytest.mark.parametrize("durability", ["backing", "journal"])
def test_regression_what_is_written_by_a_handle_whose_first_name_is_gone_outlives_a_kill(durability: str) -> None:
    with far_mount("--durability", durability, "--dirty-expire", "1h", "--writeback-interval", "1h") as mount:
        fd = os.open(mount.at("t"), os.O_RDWR | os.O_CREAT)
        os.write(fd, b"1" * 5000)
        os.link(mount.at("t"), mount.at("f"))
        os.unlink(mount.at("t"))
        os.write(fd, b"2" * 5000)
        killed_and_mounted_again(mount, fd)
        assert mount.there("f").read_bytes() == b"1" * 5000 + b"2" * 5000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes the kernel forget names of a mount")
def test_regression_an_open_file_that_got_another_number_is_still_found() -> None:
    with far_mount() as mount:
        for name in "ab":
            mount.there(name).write_bytes(b"x" * 50_000)
            os.stat(mount.at(name))
        with open(mount.at("a"), "rb", buffering=0) as unread, open(mount.at("b"), "rb", buffering=0) as known:
            before = os.stat(mount.sshfs.near / "a").st_ino
            subprocess.run(["mount", "-i", "-o", "remount,rw", str(mount.sshfs.near)], check=True, timeout=30)
            assert os.stat(mount.sshfs.near / "a").st_ino != before
            assert os.pread(unread.fileno(), 60_000, 0) == os.pread(known.fileno(), 60_000, 0) == b"x" * 50_000
            assert os.fstat(unread.fileno()).st_size == os.fstat(known.fileno()).st_size == 50_000


@pytest.mark.parametrize("which", ["the first name", "the other name"])
def test_a_name_given_here_that_somebody_replaces_is_another_file(which: str) -> None:
    """Its number stays, as sshfs gives numbers to paths."""
    with far_mount("--metadata-ttl", "0") as mount:
        a, b = mount.at("a"), mount.at("b")
        a.write_bytes(b"ours")
        os.link(a, b)
        assert a.read_bytes() == b.read_bytes() == b"ours"
        new, name = mount.there("new"), "a" if which == "the first name" else "b"
        new.write_bytes(b"replaced")
        os.rename(new, mount.there(name))
        other = b if name == "a" else a
        wait_until(lambda: mount.at(name).read_bytes() == b"replaced", "sshfs sees it")
        assert other.read_bytes() == b"ours" and mount.at(name).read_bytes() == b"replaced"
        with open(other, "r+b") as file:
            file.write(b"OU")
        assert mount.at(name).read_bytes() == b"replaced" and other.read_bytes() == b"OUrs"
        mount.unmount()
        assert mount.there(name).read_bytes() == b"replaced" and mount.there(other.name).read_bytes() == b"OUrs"


@pytest.mark.parametrize("cache", ["yes", "no"])
def test_regression_a_look_at_one_name_does_not_undo_a_chmod_by_the_other(cache: str) -> None:
    """sshfs remembers the old mode by the other name for a while: it was set again to be told the truth."""
    with far_mount("--metadata-ttl", "0", sshfs=(f"dir_cache={cache}",)) as mount:
        a, b, c = mount.at("a"), mount.at("b"), mount.at("c")
        a.write_bytes(b"ours")
        os.link(a, b)
        os.link(a, c)
        with open(a, "ab") as file:
            file.write(b" and more")
        os.chmod(a, 0o600)
        for _ in range(2):
            assert b.read_bytes() == b"ours and more" and os.stat(b).st_mode & 0o777 == 0o600
        os.unlink(a)
        assert b.read_bytes() == c.read_bytes() == b"ours and more"
        assert mount.there("b").stat().st_mode & 0o777 == 0o600
