"""fsync with no thread: what the kernel does by itself, and what happens where it cannot."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from backing.aio import UNDER_WAY_MAX, SyncQueue
from backing.base import Backing
from backing.directory import DirectoryBacking
from backing.faulty import FaultyBacking
from cachefs.backingio import BackingIO


@pytest.fixture
def queue() -> Any:
    try:
        queue = SyncQueue()
    except OSError as error:
        pytest.skip(f"no Linux AIO here: {error.strerror}")
    yield queue
    queue.close()


def wait(queue: SyncQueue) -> list[tuple[int, int]]:
    select.select([queue.fd], [], [], 10)
    return queue.ended()


@pytest.mark.parametrize("datasync", [False, True])
def test_an_fsync_is_begun_and_its_end_is_told(queue: SyncQueue, tmp_path: Path, datasync: bool) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.write(b"x" * 10_000)
        file.flush()
        queue.begin(file.fileno(), datasync, 7)
        assert wait(queue) == [(7, 0)]
    assert queue.ended() == []


def test_several_are_under_way_at_once(queue: SyncQueue, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    for tag in range(20):
        queue.begin(directory, False, tag)
    ended: list[tuple[int, int]] = []
    while len(ended) < 20:
        ended += wait(queue)
    assert sorted(ended) == [(tag, 0) for tag in range(20)]
    os.close(directory)


def test_what_cannot_be_synced_is_refused_at_once(queue: SyncQueue) -> None:
    ours, theirs = os.pipe()
    with pytest.raises(OSError) as refused:
        queue.begin(theirs, False, 1)
    assert refused.value.errno == errno.EINVAL
    os.close(ours)
    os.close(theirs)
    with pytest.raises(OSError) as refused:
        queue.begin(theirs, False, 1)
    assert refused.value.errno == errno.EBADF


class FakeQueue:
    """Ends what was begun when it is told to, with the errno that it is told."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, bool, int]] = []
        self.full = self.closed = False
        self._results: list[tuple[int, int]] = []
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)

    def begin(self, fd: int, datasync: bool, tag: int) -> None:
        if self.full:
            raise BlockingIOError(errno.EAGAIN, "too many")
        self.begun.append((fd, datasync, tag))

    def end(self, tag: int, number: int = 0) -> None:
        self._results.append((tag, number))
        os.eventfd_write(self.fd, 1)

    def ended(self) -> list[tuple[int, int]]:
        os.eventfd_read(self.fd)
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        self.closed = True
        os.close(self.fd)


class Store(DirectoryBacking):
    """A directory whose queue is ours, and which notes the threads that call fsync."""

    def __init__(self, root: Path, queue: FakeQueue | None) -> None:
        super().__init__(str(root))
        self.queue = queue
        self.threads: list[threading.Thread] = []

    def sync_queue(self) -> Any:
        return self.queue

    def fsync(self, fd: int, datasync: bool) -> None:
        self.threads.append(threading.current_thread())
        super().fsync(fd, datasync)


def run(test: Callable[..., Any], *args: object) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await test(*args)

    trio.run(main)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    with open(tmp_path / "file", "wb") as file:
        yield file.fileno()


def test_each_who_waits_hears_of_his_own(tmp_path: Path, file: int) -> None:
    queue = FakeQueue()
    io = BackingIO(Store(tmp_path, queue))
    heard: list[str] = []

    async def sync(name: str, datasync: bool) -> None:
        try:
            await io.fsync(file, datasync)
            heard.append(name)
        except OSError as error:
            heard.append(f"{name} {error.errno}")

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync, "one", False)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(sync, "two", True)
            await trio.testing.wait_all_tasks_blocked()
            (_, first, one), (_, second, two) = queue.begun
            assert (first, second) == (False, True)
            queue.end(two, errno.ENOSPC)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert heard == [f"two {errno.ENOSPC}"]
            queue.end(one)
        assert heard[1:] == ["one"]
        statistics = io.statistics()
        assert sum(statistics.durations["fsync"].counts) == 1 and statistics.errors == {"ENOSPC": 1}

    run(test)
    assert queue.closed, "with the end of the mount"


def test_one_that_was_begun_is_waited_for_though_it_is_cancelled(tmp_path: Path, file: int) -> None:
    queue = FakeQueue()
    io = BackingIO(Store(tmp_path, queue))

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(io.fsync, file, False)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    assert len(queue.begun) == 1 and not queue.closed
                    queue.end(queue.begun[0][2])

    run(test)


@pytest.mark.parametrize("queue", [None, "full"])
def test_a_thread_does_what_the_queue_does_not(tmp_path: Path, file: int, queue: str | None) -> None:
    fake = FakeQueue() if queue else None
    if fake is not None:
        fake.full = True
    store = Store(tmp_path, fake)

    async def test() -> None:
        await BackingIO(store).fsync(file, False)
        assert store.threads and store.threads[0] is not threading.current_thread()

    run(test)


def test_a_store_that_is_wrapped_sees_each_fsync(tmp_path: Path, file: int) -> None:
    wrapped: Backing = FaultyBacking(DirectoryBacking(str(tmp_path)))
    assert wrapped.sync_queue() is None


def test_more_than_fit_are_done_all_the_same(tmp_path: Path, file: int) -> None:
    store = DirectoryBacking(str(tmp_path))

    async def test() -> None:
        io = BackingIO(store)
        async with trio.open_nursery() as nursery:
            for _ in range(3 * UNDER_WAY_MAX):
                nursery.start_soon(io.fsync, file, False)
        assert sum(io.statistics().durations["fsync"].counts) == 3 * UNDER_WAY_MAX

    run(test)
