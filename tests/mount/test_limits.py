"""Limits of one mount: of the file system as statvfs tells them, of descriptors and of time."""

import os
from typing import Any

import pytest

from twin import Twin, inside, opened, outcome, read_file, write_file

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]


def test_statvfs_tells_what_the_backing_says(twin: Twin) -> None:
    ours, theirs = os.statvfs(twin.mounted), os.statvfs(twin.source)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert abs(ours.f_bfree - theirs.f_bfree) < theirs.f_blocks / 10
    assert os.pathconf(twin.mounted, "PC_NAME_MAX") == 255


def test_access_answers_as_ext4(twin: Twin) -> None:
    def steps() -> object:
        answers = []
        write_file("file")
        for mode in (0, 0o100, 0o444, 0o755):
            os.chmod("file", mode)
            answers += [os.access("file", want) for want in (os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.X_OK)]
        return [*answers, os.access("missing", os.F_OK), os.access(".", os.X_OK)]

    twin.same(steps)


def test_hard_links_up_to_the_limit_of_the_backing(twin: Twin) -> None:
    def steps() -> object:
        write_file("file")
        for i in range(200):
            os.link("file", f"link {i}")
        return os.stat("link 7").st_nlink

    assert twin.same(steps) == 201


def test_many_open_files_at_once(twin: Twin) -> None:
    with inside(twin.mounted):
        fds = [os.open(str(i), os.O_RDWR | os.O_CREAT) for i in range(500)]
        for i, fd in enumerate(fds):
            os.write(fd, b"%d" % i)
        for i in range(0, 500, 2):
            os.unlink(str(i))
        assert [os.pread(fd, 9, 0) for fd in fds] == [b"%d" % i for i in range(500)]
        for fd in fds:
            os.close(fd)
        assert sorted(map(int, os.listdir("."))) == list(range(1, 500, 2))


def test_a_cache_of_16_pages_is_enough_for_everything(mounted: Any) -> None:
    mount = mounted("--cache-size", "64K")
    data = os.urandom(3 << 20)
    with inside(mount.path), opened("file", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, data)
        assert os.pread(fd, len(data), 0) == data
        os.pwrite(fd, b"x" * 70_000, 12_345)
        os.fsync(fd)
        data = data[:12_345] + b"x" * 70_000 + data[82_345:]
        assert read_file("file") == data == read_file(mount.source / "file")
        assert mount.ask("status")["statistics"]["cache"]["resident_bytes"] <= 65536


def test_reads_and_writes_larger_than_a_request_are_whole(twin: Twin) -> None:
    def steps() -> object:
        data = bytes(range(251)) * 20_000  # 5 MB, out of step with pages
        with opened("file", os.O_RDWR | os.O_CREAT) as fd:
            return os.pwrite(fd, data, 3), os.pread(fd, 6_000_000, 0) == bytes(3) + data, outcome(os.pread, fd, 0, 0)

    twin.same(steps)
