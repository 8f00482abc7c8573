"""Attributes: modes, owners, times, extended attributes; and which operation changes which time of which file."""

import os
import stat
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from twin import (
    EXCHANGE,
    UTIME_NOW,
    UTIME_OMIT,
    Twin,
    opened,
    outcome,
    read_file,
    rename,
    tick,
    times_changed,
    utimensat,
    write_file,
)

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

SYMLINK_NOFOLLOW = 0x100
NS = 1_234_567_891_123_456_789


def test_modes_of_files_directories_and_special_files_are_what_chmod_says(twin: Twin) -> None:
    def steps() -> object:
        write_file("file")
        os.mkdir("dir")
        os.mkfifo("fifo")
        os.symlink("file", "link")
        answers = []
        for mode in (0, 0o7777, 0o4755, 0o2755, 0o2644, 0o640, 0o1777):
            for name in ("file", "dir", "fifo", "link", "missing"):
                answers += [outcome(os.chmod, name, mode), oct(os.lstat(name).st_mode) if os.path.exists(name) else None]
        with opened("file", os.O_RDONLY) as fd:
            os.fchmod(fd, 0o604)
            answers.append(oct(os.fstat(fd).st_mode))
        return answers

    twin.same(steps)


def test_chown_sets_owner_and_group_each_on_its_own_and_of_symlinks_too(twin: Twin) -> None:
    def steps() -> object:
        write_file("file", b"x", 0o6755)
        os.symlink("file", "link")
        answers = []
        for owner, group in ((1000, -1), (-1, 1001), (4_000_000_000, 7), (-1, -1), (0, 0)):
            answers.append(outcome(os.chown, "file", owner, group))
            answers.append(outcome(os.chown, "link", owner, group, follow_symlinks=False))
            for name in ("file", "link"):
                st = os.lstat(name)
                answers.append((st.st_uid, st.st_gid, oct(st.st_mode)))
        return answers

    twin.same(steps)


@pytest.mark.parametrize("mode", [0o6755, 0o6644, 0o2755, 0o4711, 0o2644])
def test_chown_takes_set_id_bits_of_programs_away(twin: Twin, mode: int) -> None:
    owner, group = (1, 1) if os.geteuid() == 0 else (os.geteuid(), os.getegid())  # to whom one has it already, it counts too

    def steps() -> object:
        write_file("file", b"x", mode)
        os.mkdir("dir")
        os.chmod("dir", mode | stat.S_IXUSR)
        os.chown("file", owner, group)
        os.chown("dir", owner, group)
        return oct(os.stat("file").st_mode), oct(os.stat("dir").st_mode)

    twin.same(steps)


def test_times_are_kept_to_the_nanosecond_before_1970_and_after_2106_too(twin: Twin) -> None:
    def steps() -> object:
        write_file("file", b"data")
        os.mkdir("dir")
        os.symlink("file", "link")
        seen = []
        for ns in (NS, NS + 1, 0, 1, 999_999_999, 5_000_000_000_000_000_001, -1, -1_500_000_000):
            for name in ("file", "dir", "link"):
                os.utime(name, ns=(ns, ns + 7), follow_symlinks=False)
                st = os.lstat(name)
                seen.append((st.st_atime_ns, st.st_mtime_ns))
        return seen

    twin.same(steps)


def test_utime_now_and_omit(twin: Twin) -> None:
    def steps() -> object:
        write_file("file", b"data")
        seen = []
        now, omit, fixed = (0, UTIME_NOW), (0, UTIME_OMIT), (1000, 5)
        for atime in (now, omit, fixed):
            for mtime in (now, omit, fixed):
                utimensat("file", (7, 7), (8, 8))
                before, ctime = time.time_ns() - 50_000_000, os.stat("file").st_ctime_ns
                tick()
                utimensat("file", atime, mtime)
                st = os.stat("file")
                seen += [ns if ns < before else "now" for ns in (st.st_atime_ns, st.st_mtime_ns)]
                seen.append(st.st_ctime_ns > ctime)
        seen += [outcome(utimensat, "file", (0, 1_000_000_000), now), outcome(utimensat, "missing", now, omit)]
        return [*seen, outcome(utimensat, "file", (0, UTIME_NOW - 2), fixed)]

    twin.same(steps)


def test_the_mtime_that_a_program_set_survives_writeback(twin: Twin) -> None:
    def steps() -> object:
        seen = []
        with opened("file", os.O_RDWR | os.O_CREAT) as fd:
            os.write(fd, b"data")
            os.utime(fd, ns=(NS, NS))
            seen.append(os.fstat(fd).st_mtime_ns)
            os.fsync(fd)
            seen.append(os.fstat(fd).st_mtime_ns)
            os.write(fd, b"more")
            tick()
            written = os.fstat(fd).st_mtime_ns
            os.fsync(fd)
            seen += [os.fstat(fd).st_mtime_ns == written, written > NS]
        tick()
        return [*seen, os.stat("file").st_mtime_ns == written]

    assert twin.same(steps) == [NS, NS, True, True, True]
    assert os.stat(twin.source / "file").st_mtime_ns == os.stat(twin.mounted / "file").st_mtime_ns


def open_and(how: int, *actions: Callable[[int], object]) -> Callable[[], None]:
    def operation() -> None:
        with opened("d/file", how) as fd:
            for action in actions:
                action(fd)

    return operation


CHANGES: dict[str, Callable[[], Any]] = {
    "stat": lambda: os.stat("d/file"),
    "write": open_and(os.O_WRONLY, lambda fd: os.write(fd, b"x")),
    "write past the end": open_and(os.O_WRONLY, lambda fd: os.pwrite(fd, b"x", 9999)),
    "write of nothing": open_and(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "append": open_and(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"x")),
    "write and fsync": open_and(os.O_WRONLY, lambda fd: os.write(fd, b"x"), os.fsync),
    "fsync": open_and(os.O_WRONLY, os.fsync),
    "open for writing": open_and(os.O_RDWR),
    "open with O_TRUNC": open_and(os.O_WRONLY | os.O_TRUNC),
    "open of an empty file with O_TRUNC": lambda: os.close(os.open("d/nothing", os.O_WRONLY | os.O_TRUNC)),
    "truncate shorter": lambda: os.truncate("d/file", 3),
    "truncate longer": lambda: os.truncate("d/file", 30_000),
    "truncate to the same size": lambda: os.truncate("d/file", 8),
    "ftruncate to the same size": open_and(os.O_RDWR, lambda fd: os.ftruncate(fd, 8)),
    "chmod": lambda: os.chmod("d/file", 0o600),
    "chmod to the same": lambda: os.chmod("d/file", 0o644),
    "chown": lambda: os.chown("d/file", 1, 1),
    "chown to nobody new": lambda: os.chown("d/file", -1, -1),
    "link": lambda: os.link("d/file", "d/hard2"),
    "link elsewhere": lambda: os.link("d/file", "e/hard"),
    "unlink one of two": lambda: os.unlink("d/hard"),
    "rename": lambda: rename("d/file", "d/renamed") or rename("d/renamed", "d/file"),
    "rename elsewhere": lambda: rename("d/file", "e/file") or rename("e/file", "d/file"),
    "rename over": lambda: rename("d/nothing", "d/other"),
    "exchange": lambda: rename("d/file", "e/thing", EXCHANGE) or rename("d/file", "e/thing", EXCHANGE),
    "mkdir": lambda: os.mkdir("d/sub"),
    "rmdir": lambda: os.rmdir("d/dir"),
    "symlink": lambda: os.symlink("target", "d/sym"),
    "mkfifo": lambda: os.mkfifo("d/fifo"),
    "create": lambda: write_file("d/new"),
    "unlink": lambda: os.unlink("d/nothing"),
    "failing unlink": lambda: outcome(os.unlink, "d/missing"),
    "failing mkdir": lambda: outcome(os.mkdir, "d/file"),
    "failing rmdir": lambda: outcome(os.rmdir, "d"),
    "failing rename": lambda: outcome(rename, "d/file", "d/dir"),
    "setxattr": lambda: os.setxattr("d/file", "user.a", b"1"),
    "removexattr": lambda: os.removexattr("d/file", "user.there"),
    "setxattr of a directory": lambda: os.setxattr("d", "user.a", b"1"),
    "listdir": lambda: os.listdir("d"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_mtime_and_ctime_change_with_the_operations_that_change_them_on_ext4(twin: Twin, what: str) -> None:
    def steps() -> object:
        for directory in ("d", "e", "d/dir"):
            os.mkdir(directory)
        for name in ("d/file", "d/other", "e/thing"):
            write_file(name, b"contents")
        write_file("d/nothing")
        os.link("d/file", "d/hard")
        os.setxattr("d/file", "user.there", b"1")
        watched = ["d", "e", "d/file", "e/thing", "."]
        return times_changed(CHANGES[what], *watched)

    twin.same(steps)


def test_mtime_and_ctime_do_not_change_again_when_data_reaches_source(mount: Any, twin: Twin) -> None:
    file = twin.mounted / "file"
    file.write_bytes(b"x" * 10_000)
    before = os.stat(file)
    tick()
    assert mount.ask("sync")["unwritten"] == []
    tick()
    after = os.stat(file)
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (before.st_mtime_ns, before.st_ctime_ns, 10_000)
    assert (twin.source / "file").read_bytes() == b"x" * 10_000


def test_ctime_never_goes_back_and_mtime_follows_the_order_of_changes(twin: Twin) -> None:
    with opened(twin.mounted / "file", os.O_RDWR | os.O_CREAT) as fd:
        last = os.fstat(fd)
        for i in range(60):
            for change in (partial(os.ftruncate, fd, i), partial(os.write, fd, b"x"), partial(os.fchmod, fd, 0o600 | i % 8)):
                change()
                now = os.fstat(fd)
                assert now.st_ctime_ns >= last.st_ctime_ns and now.st_mtime_ns >= last.st_mtime_ns
                last = now


def test_extended_attributes_with_flags_lists_and_limits(twin: Twin) -> None:
    def steps() -> object:
        write_file("file")
        os.mkdir("dir")
        os.symlink("file", "link")
        answers: list[object] = []
        for name in ("file", "dir"):
            answers += [
                os.listxattr(name),
                outcome(os.getxattr, name, "user.a"),
                outcome(os.setxattr, name, "user.a", b"1", os.XATTR_REPLACE),
                outcome(os.setxattr, name, "user.a", b"\0\xff", os.XATTR_CREATE),
                outcome(os.setxattr, name, "user.a", b"2", os.XATTR_CREATE),
                os.getxattr(name, "user.a"),
                outcome(os.setxattr, name, "user.a", b"longer value", os.XATTR_REPLACE),
                outcome(os.setxattr, name, "user.empty", b""),
                os.getxattr(name, "user.empty"),
                outcome(os.setxattr, name, "user." + "n" * 250, b"1"),
                outcome(os.setxattr, name, "user." + "n" * 251, b"1"),
                outcome(os.setxattr, name, "user.big", b"x" * 65536),
                outcome(os.setxattr, name, "user.bigger", b"x" * 65537),
                outcome(os.setxattr, name, "nonsense", b"1"),
                outcome(os.setxattr, name, "trusted.t", b"1"),
                outcome(os.removexattr, name, "user.missing"),
                outcome(os.removexattr, name, "user.empty"),
                sorted(os.listxattr(name)),
            ]
        answers.append(outcome(os.setxattr, "link", "user.a", b"1", follow_symlinks=False))
        answers.append(os.listxattr("link", follow_symlinks=False))
        return [*answers, outcome(os.getxattr, "missing", "user.a")]

    twin.same(steps)


def test_attributes_of_an_open_file_without_a_name_can_be_changed(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", os.O_RDWR | os.O_CREAT) as fd:
            os.write(fd, b"data")
            os.unlink("file")
            os.fchmod(fd, 0o604)
            os.fchown(fd, 5, 6)
            os.utime(fd, ns=(NS, NS))
            os.setxattr(fd, "user.a", b"1")
            os.ftruncate(fd, 2)
            st = os.fstat(fd)
            return oct(st.st_mode), st.st_uid, st.st_gid, st.st_atime_ns, st.st_nlink, st.st_size, os.getxattr(fd, "user.a")

    twin.same(steps)


def test_blocks_and_block_size_are_sensible_while_data_is_unwritten(twin: Twin) -> None:
    write_file(twin.mounted / "file", b"x" * 100_000)
    st = os.stat(twin.mounted / "file")
    assert st.st_blocks * 512 >= 100_000 and st.st_blksize >= 4096
    assert stat.S_ISREG(st.st_mode) and read_file(twin.mounted / "file") == b"x" * 100_000
