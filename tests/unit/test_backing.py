"""The stores: the contract over each, and what the wrappers add."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from backing.base import Backing
from backing.direct import DirectDirectoryBacking
from backing.directory import DirectoryBacking
from backing.faulty import FaultyBacking
from backing.latency import LatencyBacking
from backing.wrapper import Wrapper
from backing_contract import BackingContract, refused


class TestDirectory(BackingContract):
    def make(self, path: Path) -> Backing:
        return DirectoryBacking(path)


class TestDirectWhereReadsNeedNotBeAligned(BackingContract):
    def make(self, path: Path) -> Backing:
        return DirectDirectoryBacking(path)  # on a local disk they need to be: what is not aligned is read as ever


class TestLatencyWithoutDistance(BackingContract):
    def make(self, path: Path) -> Backing:
        return LatencyBacking(DirectoryBacking(path), 0)


class TestFaultyWithoutRules(BackingContract):
    def make(self, path: Path) -> Backing:
        return FaultyBacking(DirectoryBacking(path))


class TestFaultyOverLatency(BackingContract):
    def make(self, path: Path) -> Backing:
        return FaultyBacking(LatencyBacking(DirectoryBacking(path), 0, 1e12))


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[DirectoryBacking]:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "file").write_bytes(b"0123456789" * 100)
    backing = DirectoryBacking(directory)
    yield backing
    backing.shutdown()


@pytest.fixture
def fd(inner: DirectoryBacking) -> Iterator[int]:
    root = inner.open_root()
    descriptor = inner.open(root, b"file", os.O_RDWR)
    yield descriptor
    inner.close(root)
    inner.close(descriptor)


# directory


def test_a_source_that_is_no_readable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(errno.ENOENT, DirectoryBacking, tmp_path / "none")
    refused(errno.ENOTDIR, DirectoryBacking, tmp_path / "file")


def test_a_directory_is_not_blocking_unless_told_so(tmp_path: Path) -> None:
    assert not DirectoryBacking(tmp_path).blocking
    assert DirectoryBacking(tmp_path, blocking=True).blocking


def test_the_directory_stays_the_same_when_its_name_moves(inner: DirectoryBacking, tmp_path: Path) -> None:
    (tmp_path / "source").rename(tmp_path / "moved")
    root = inner.open_root()
    assert [entry.name for entry in inner.listdir(root)] == [b"file"]
    inner.close(root)


def test_readers_alone_are_direct_and_one_that_cannot_be_reads_as_ever(inner: DirectoryBacking, tmp_path: Path) -> None:
    backing = DirectDirectoryBacking(tmp_path / "source", blocking=True)
    root = backing.open_root()
    reader, writer = backing.open(root, b"file", os.O_RDONLY), backing.open(root, b"file", os.O_RDWR)
    try:
        assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_DIRECT
        direct = fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_DIRECT  # tmpfs may have no such thing
        page, odd = memoryview(mmap.mmap(-1, 4096)), memoryview(bytearray(101))[1:]
        assert backing.preadv(reader, [page], 0) == 1000
        assert fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_DIRECT == direct
        assert backing.preadv(reader, [odd], 13) == 100
        assert bytes(odd) == bytes(page[13:113]) == (b"0123456789" * 100)[13:113]
    finally:
        for opened in (reader, writer, root):
            backing.close(opened)
        backing.shutdown()


def test_nowait_answers_from_memory_what_the_kernel_has_cached(inner: DirectoryBacking, fd: int) -> None:
    buffer = bytearray(10)
    assert inner.preadv(fd, [buffer], 0) == 10
    try:
        assert inner.preadv_nowait(fd, [buffer], 5) == 10
    except BlockingIOError:
        pytest.skip("this file system cannot tell whether it would wait")
    assert buffer == b"5678901234"


def test_handles_are_not_given_for_another_file_system_inside(inner: DirectoryBacking) -> None:
    proc = os.open("/proc", os.O_PATH)
    refused(errno.EOPNOTSUPP, inner.file_handle, proc)
    os.close(proc)


def test_syncfs_reaches_another_file_system_inside(inner: DirectoryBacking) -> None:
    shm = os.open("/dev/shm", os.O_PATH)
    inner.syncfs(shm)
    os.close(shm)


def test_wrappers_pass_on_every_operation() -> None:
    assert not [name for name in Backing.__abstractmethods__ if name not in vars(Wrapper)]
    assert Wrapper.__abstractmethods__ == {"around"}


# latency


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 9))
        self.now += seconds


def test_every_call_waits_the_latency_and_close_does_not(inner: DirectoryBacking) -> None:
    clock = Clock()
    far = LatencyBacking(inner, 0.005, 0, clock.sleep, clock)
    root = far.open_root()
    far.listdir(root)
    far.stat(root, b"file")
    refused(errno.ENOENT, far.stat, root, b"none")
    assert clock.slept == [0.005] * 4
    far.close(root)
    assert clock.slept == [0.005] * 4
    assert far.blocking


def test_data_takes_its_time_on_the_link_by_the_bytes_that_move(inner: DirectoryBacking, fd: int) -> None:
    clock = Clock()
    far = LatencyBacking(inner, 0.5, 100, clock.sleep, clock)
    assert far.preadv(fd, [bytearray(50), bytearray(150)], 900) == 100
    assert far.pwritev(fd, [b"x" * 20, b"y" * 30], 0) == 50
    assert far.preadv(fd, [bytearray(50)], 5000) == 0
    assert clock.slept == [1.5, 1.0, 0.5]


def test_calls_at_the_same_time_share_the_bandwidth_but_not_the_latency(inner: DirectoryBacking, fd: int) -> None:
    clock = Clock()
    slept: list[float] = []
    far = LatencyBacking(inner, 0.5, 100, slept.append, clock)  # the clock stands still: all calls begin at once
    for _ in range(3):
        far.preadv(fd, [bytearray(100)], 0)
    assert slept == [1.5, 2.5, 3.5]
    clock.now += 100
    far.preadv(fd, [bytearray(100)], 0)
    assert slept[-1] == 1.5


def test_a_distant_store_has_nothing_at_hand(inner: DirectoryBacking, fd: int) -> None:
    far = LatencyBacking(inner, 60)
    refused(errno.EAGAIN, far.preadv_nowait, fd, [bytearray(1)], 0)


def test_a_write_arrives_only_after_its_way(inner: DirectoryBacking, fd: int) -> None:
    seen: list[bytes] = []
    far = LatencyBacking(inner, 1, sleep=lambda _: seen.append(os.pread(fd, 3, 0)))
    far.pwritev(fd, [b"abc"], 0)
    assert seen == [b"012"]
    assert os.pread(fd, 3, 0) == b"abc"


# faulty


def test_a_rule_strikes_after_some_calls_and_so_often(inner: DirectoryBacking, fd: int) -> None:
    faulty = FaultyBacking(inner, [{"op": "pwritev", "after": 1, "count": 2, "errno": "ENOSPC"}])
    assert faulty.pwritev(fd, [b"a"], 0) == 1
    refused(errno.ENOSPC, faulty.pwritev, fd, [b"b"], 0)
    assert faulty.fstat(fd).st_size == 1000
    refused(errno.ENOSPC, faulty.pwritev, fd, [b"c"], 0)
    assert faulty.pwritev(fd, [b"d"], 0) == 1
    assert os.pread(fd, 2, 0) == b"d1"


def test_a_rule_for_everything_strikes_everything_but_close(inner: DirectoryBacking) -> None:
    faulty = FaultyBacking(inner, [{"op": "*", "count": None, "errno": "EIO"}])
    root = inner.open_root()
    refused(errno.EIO, faulty.open_root)
    refused(errno.EIO, faulty.stat, root, b"file")
    refused(errno.EIO, faulty.syncfs, root)
    faulty.close(root)


def test_short_reads_and_writes_move_only_so_much(inner: DirectoryBacking, fd: int) -> None:
    faulty = FaultyBacking(inner, [{"op": "preadv", "short": 7}, {"op": "pwritev", "short": 3, "count": 1}])
    first, second = bytearray(5), bytearray(5)
    assert faulty.preadv(fd, [first, second], 0) == 7
    assert (first, second) == (b"01234", b"56\0\0\0")
    assert faulty.pwritev(fd, [b"ab", b"cd"], 0) == 3
    assert faulty.pwritev(fd, [b"ab", b"cd"], 10) == 4
    assert os.pread(fd, 14, 0) == b"abc3456789abcd"


def test_a_delay_passes_before_the_call(inner: DirectoryBacking, fd: int) -> None:
    slept: list[float] = []
    plan = [{"op": "fstat", "delay_seconds": 2, "count": 1, "errno": "EIO"}]
    faulty = FaultyBacking(inner, plan, sleep=slept.append)
    refused(errno.EIO, faulty.fstat, fd)
    assert slept == [2]
    assert faulty.blocking


def test_a_hanging_call_goes_on_when_released(inner: DirectoryBacking, fd: int) -> None:
    faulty = FaultyBacking(inner, [{"op": "preadv", "hang": True, "count": 1}])
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(faulty.preadv(fd, [bytearray(9)], 0)), daemon=True)
    thread.start()
    while not faulty.calls["preadv"]:
        thread.join(0.001)
    assert faulty.preadv(fd, [bytearray(5)], 0) == 5
    assert results == []
    faulty.release()
    thread.join(10)
    assert results == [9]


def test_calls_are_counted_by_operation(inner: DirectoryBacking, fd: int) -> None:
    faulty = FaultyBacking(inner)
    threads = [threading.Thread(target=lambda: [faulty.fstat(fd) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    root = faulty.open_root()
    refused(errno.ENOENT, faulty.stat, root, b"none")
    faulty.close(root)
    assert faulty.calls == {"fstat": 2000, "open_root": 1, "stat": 1, "close": 1}


def test_rules_about_reads_see_reads_that_would_not_wait(inner: DirectoryBacking, fd: int) -> None:
    faulty = FaultyBacking(inner, [{"op": "preadv", "errno": "EIO"}])
    refused(errno.EAGAIN, faulty.preadv_nowait, fd, [bytearray(1)], 0)
    refused(errno.EIO, faulty.preadv, fd, [bytearray(1)], 0)
    assert faulty.calls == {"preadv": 1}


def test_a_new_plan_begins_anew(inner: DirectoryBacking, fd: int) -> None:
    faulty = FaultyBacking(inner, [{"op": "fstat", "errno": "EIO"}])
    refused(errno.EIO, faulty.fstat, fd)
    faulty.set_plan([{"op": "fstat", "after": 1, "errno": "EROFS"}])
    faulty.fstat(fd)
    refused(errno.EROFS, faulty.fstat, fd)
    faulty.set_plan([])
    faulty.fstat(fd)


def write_plan(path: Path, plan: object) -> None:
    """A plan file that changes at once, as one on a live mount should."""
    path.with_suffix(".new").write_text(plan if isinstance(plan, str) else json.dumps(plan))
    path.with_suffix(".new").rename(path)


def test_a_plan_file_is_read_again_when_it_changes(inner: DirectoryBacking, fd: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, [])
    faulty = FaultyBacking(inner, str(path))
    faulty.fstat(fd)
    write_plan(path, [{"op": "fstat", "errno": "EIO"}])
    refused(errno.EIO, faulty.fstat, fd)
    write_plan(path, '[{"op": "fst')
    refused(errno.EIO, faulty.fstat, fd)
    path.unlink()
    faulty.fstat(fd)
    write_plan(path, [{"op": "*", "errno": "ESTALE"}])
    refused(errno.ESTALE, faulty.fstat, fd)


def test_a_changed_plan_file_lets_go_of_hanging_calls(inner: DirectoryBacking, fd: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, [{"op": "preadv", "hang": True, "errno": "EIO"}])
    faulty = FaultyBacking(inner, str(path))
    thread = threading.Thread(target=refused, args=(errno.EIO, faulty.preadv, fd, [bytearray(1)], 0), daemon=True)
    thread.start()
    while not faulty.calls["preadv"]:
        thread.join(0.001)
    write_plan(path, [])
    thread.join(10)
    assert not thread.is_alive()
    assert faulty.preadv(fd, [bytearray(1)], 0) == 1


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"op": "*"}, "a plan is a list of rules"),
        (["preadv"], 'rule 1: a rule is an object with an "op"'),
        ([{"op": "*"}, {"op": "fly"}], "rule 2: op: 'fly' will not do"),
        ([{"op": "close", "errno": "EIO"}], "rule 1: op: 'close' will not do"),
        ([{"op": "*", "errno": "EVERYTHING"}], "rule 1: errno: 'EVERYTHING' will not do"),
        ([{"op": "*", "errno": "errorcode"}], "rule 1: errno: 'errorcode' will not do"),
        ([{"op": "*", "count": -1}], "rule 1: count: -1 will not do"),
        ([{"op": "*", "delay_seconds": float("nan")}], "rule 1: delay_seconds: nan will not do"),
        ([{"op": "*", "seen": 1}], "rule 1: seen: 1 will not do"),
        ([{"op": ["*"]}], "rule 1: op: ['*'] will not do"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(inner: DirectoryBacking, plan: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        FaultyBacking(inner, plan)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_missing_plan_file_is_refused_at_the_start(inner: DirectoryBacking, tmp_path: Path) -> None:
    refused(errno.ENOENT, FaultyBacking, inner, str(tmp_path / "none.json"))


def test_times_that_tell_changes_apart_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backing, stamps, seconds = DirectoryBacking(tmp_path), itertools.count(1), itertools.count()
    with monkeypatch.context() as patched:
        for times, fine in ((stamps, True), (itertools.repeat(7), False), ((n // 2 for n in stamps), False)):
            patched.setattr(os, "fstat", lambda fd, times=times: SimpleNamespace(st_ctime_ns=next(times)))
            assert backing.has_fine_times() == fine
        patched.setattr(os, "fstat", lambda fd: SimpleNamespace(st_ctime_ns=next(stamps)))
        patched.setattr(time, "monotonic", lambda: next(seconds))
        assert not backing.has_fine_times(), "it took so long that ticks may have passed"
    assert not list(tmp_path.iterdir())
    backing.shutdown()
    far = DirectoryBacking(tmp_path, blocking=True)
    assert not far.has_fine_times()
    far.shutdown()
