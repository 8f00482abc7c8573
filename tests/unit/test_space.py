"""Room on the backing: the budget by itself, and writes over a backing that is full, over quota or read-only."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.page import PAGE_SIZE
from cachefs.space import SAMPLE_SECONDS, SpaceBudget
from world import World

P = PAGE_SIZE


def statvfs(free_pages: int, *, kept: int = 0, unit: int = P, blocks: int = 1 << 20) -> os.statvfs_result:
    """What a file system says that has `free_pages`, `kept` of them for root alone."""
    free = free_pages * P // unit
    return SimpleNamespace(f_frsize=unit, f_blocks=blocks, f_bfree=free, f_bavail=free - kept * P // unit)  # type: ignore[return-value]


class Budget(SpaceBudget):
    """A budget for somebody who is not root."""

    def take(self, offset: int, nbytes: int, size: int, by_root: bool = False) -> bool:
        return super().take(offset, nbytes, size, by_root)


def budget(free_pages: int, promised_bytes: int = 0, unit: int = P) -> Budget:
    made = Budget()
    made.sample(statvfs(free_pages, unit=unit), promised_bytes, True)
    return made


# --- the budget


def test_before_the_first_sample_there_is_room_for_everything() -> None:
    assert Budget().take(0, 1 << 60, 0)


def test_files_grow_by_what_is_free_and_not_spoken_for() -> None:
    b = budget(10, promised_bytes=3 * P)
    assert b.take(0, 5 * P, 0)
    assert not b.take(5 * P, 3 * P, 5 * P)
    assert b.take(5 * P, 2 * P, 5 * P)
    assert not b.take(0, 1, 0)


def test_overwriting_a_hole_and_the_rest_of_the_last_page_need_no_room() -> None:
    b = budget(1)
    assert b.take(0, 100 * P, 100 * P) and b.take(100 * P + 10, 90, 100 * P + 10)
    assert b.take(1 << 40, 10, 0), "a hole takes none"
    assert not b.take(0, P + 1, P)


def test_units_smaller_than_a_page_are_counted_as_they_are() -> None:
    b = budget(1, unit=1024)
    assert [b.take(0, 1000, 0) for _ in range(5)] == [True, True, True, True, False]


def test_blocks_kept_for_root_are_for_root() -> None:
    """As far as we may write them, and but for those that ext4 lets nobody have."""
    b = Budget()
    b.sample(statvfs(9000, kept=8000), 0, True)
    assert not b.take(0, 1001 * P, 0) and b.take(0, 4904 * P, 0, True) and not b.take(0, 1, 0, True)
    b.sample(statvfs(9000, kept=8000), 0, True)
    assert b.take(0, 1000 * P, 0) and not b.take(0, 1, 0) and b.take(0, 3904 * P, 0, True)
    b.sample(statvfs(9000, kept=8000), 0, False)
    assert not b.take(0, 1001 * P, 0, True)
    b.sample(statvfs(20, kept=10, blocks=250), 0, True)
    assert b.take(0, 15 * P, 0, True) and not b.take(0, 1, 0, True)


def test_a_file_system_without_a_size_is_never_full() -> None:
    b = Budget()
    b.sample(statvfs(0, blocks=0), 0, True)
    assert b.take(0, 1 << 50, 0)


@given(
    st.integers(0, 50 * P), st.integers(1, 50 * P), st.integers(0, 50 * P), st.integers(-3 * P, 40 * P),
    st.sampled_from((512, 1024, P)),
)  # fmt: skip
def test_what_is_taken_in_part_is_the_most_that_fits(offset: int, nbytes: int, size: int, left: int, unit: int) -> None:
    def taken(count: int) -> bool:
        one = Budget()
        one._unit, one.left_bytes = unit, left
        return one.take(offset, count, size)

    b = Budget()
    b._unit, b.left_bytes = unit, left
    part = b.take_part(offset, nbytes, size, False)
    assert 0 <= part <= nbytes
    assert not part or taken(part)
    assert part == nbytes or not taken(part + 1) or offset + part < size
    assert b.left_bytes >= min(left, 0)


# --- writes


class Full:
    """What the backing of a world says to statvfs."""

    def __init__(self, world: World, free_pages: int) -> None:
        self.world, self.free_pages, self.looks = world, free_pages, 0
        world.backing.inner.statvfs = self  # type: ignore[assignment, method-assign]

    def __call__(self, fd: int) -> os.statvfs_result:
        self.looks += 1
        return statvfs(self.free_pages)


def over(top: Path, test: Callable[[World], Awaitable[None]], *, blocking: bool = False, pages: int = 256) -> None:
    """Runs a test with writeback and the watch over room running, on a clock that jumps."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, blocking=blocking, pages=pages, expire_seconds=3600, seed=1)
            nursery.start_soon(world.writeback.run)
            await test(world)
            world.check()
            world.backing.set_plan([])
            world.writeback.retry(errno.ENOSPC)
            assert await world.writeback.flush_all() == []
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def errno_of(call: Awaitable[object]) -> int:
    try:
        await call
    except OSError as error:
        return error.errno or 0
    return 0


both = pytest.mark.parametrize("blocking", [False, True])


@both
def test_a_write_that_cannot_fit_beside_what_is_unwritten_fails_at_once(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        (tmp_path / "old").write_bytes(bytes(20 * P))
        full = Full(world, 10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.files.space.watch, functools.partial(trio.sleep, SAMPLE_SECONDS))
            await trio.sleep(0.01)
            _, one = await world.open("one")
            _, two = await world.open("two")
            _, old = await world.open("old")
            assert await world.files.write(one, 0, bytes(6 * P)) == 6 * P
            assert await world.files.write(old, 0, bytes(20 * P)) == 20 * P, "overwriting needs no room"
            assert await world.files.write(two, 0, bytes(6 * P)) == 4 * P, "as much as there is room for"
            assert await errno_of(world.files.write(two, 4 * P, b"x")) == errno.ENOSPC
            assert await world.files.write(two, 4 * P - 10, b"x" * 10) == 10
            full.free_pages = 11
            assert await world.files.write(two, 4 * P, b"x") == 1, "a refusal has looked just before"
            nursery.cancel_scope.cancel()

    over(tmp_path, main, blocking=blocking)


def test_the_backing_is_asked_once_a_second_while_files_grow_and_not_when_they_do_not(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        full = Full(world, 10_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.files.space.watch, functools.partial(trio.sleep, SAMPLE_SECONDS))
            _, handle = await world.open("file")
            await trio.sleep(0.5)
            for i in range(100):
                await world.files.write(handle, i * 100, bytes(100))
                await trio.sleep(0.1)
            assert 9 <= full.looks <= 12
            await trio.sleep(100)
            looks = full.looks
            for _ in range(100):
                await world.files.write(handle, 0, bytes(100))
                await trio.sleep(1)
            assert full.looks == looks
            nursery.cancel_scope.cancel()

    over(tmp_path, main)


@pytest.mark.parametrize("ends", [True, False])
def test_what_a_thread_is_writing_does_not_count_twice(tmp_path: Path, ends: bool) -> None:
    """8 pages are written, and free no more, but their call has not returned when somebody asks for the last 2."""

    async def main(world: World) -> None:
        full = Full(world, 10)
        _, one = await world.open("one")
        _, two = await world.open("two")
        await world.files.write(one, 0, bytes(8 * P))
        written, end = trio.Event(), trio.Event()
        in_thread = world.io.in_thread

        async def slow(op: str, function: Callable[..., object], *args: object) -> object:
            result = await in_thread(op, function, *args)
            if op == "write":
                full.free_pages = 2
                written.set()
                await end.wait()
            return result

        world.io.in_thread = slow  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.files.fsync, one, False)
            await written.wait()
            await world.files.space._look()
            assert world.files.space.budget.left_bytes == -6 * P
            if ends:
                end.set()
            assert await world.files.write(two, 0, bytes(2 * P)) == 2 * P
            end.set()
        assert await errno_of(world.files.write(two, 2 * P, b"x")) == errno.ENOSPC

    over(tmp_path, main, blocking=True)


def test_a_backing_that_cannot_say_what_is_free_refuses_nothing(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        Full(world, 1)
        world.backing.set_plan([{"op": "statvfs", "errno": "EIO"}])
        world.files.space.budget.left_bytes = 0
        _, handle = await world.open("file")
        assert await world.files.write(handle, 0, bytes(5 * P)) == 5 * P
        assert world.files.space.budget.left_bytes > sys.maxsize // 2

    over(tmp_path, main)


# --- after writeback has failed


@pytest.mark.parametrize(
    ("name", "itself", "others", "overwriting"),
    [
        ("ENOSPC", errno.ENOSPC, errno.ENOSPC, 0),
        ("EDQUOT", errno.EDQUOT, 0, 0),
        ("EROFS", errno.EROFS, errno.EROFS, errno.EROFS),
        ("EIO", 0, 0, 0),
    ],
)
def test_what_writeback_found_out_is_told_to_writers_until_a_later_try_succeeds(
    tmp_path: Path, name: str, itself: int, others: int, overwriting: int
) -> None:
    async def main(world: World) -> None:
        _, failing = await world.open("failing")
        _, other = await world.open("other")
        await world.files.write(other, 0, bytes(P))
        await world.files.fsync(other, False)
        await world.files.write(failing, 0, b"a" * P)
        world.backing.set_plan([{"op": "pwritev", "errno": name}])
        assert await errno_of(world.files.fsync(failing, False)) == getattr(errno, name)
        assert await errno_of(world.files.write(failing, P, b"b")) == itself
        assert await errno_of(world.files.write(other, P, b"b")) == others
        assert await errno_of(world.files.write(other, 0, b"b")) == overwriting
        world.backing.set_plan([])
        await trio.sleep(60)  # it is tried again, although its data is not old
        assert not world.writeback.refused or name == "EIO"
        for handle in (failing, other):
            assert await errno_of(world.files.write(handle, P, b"c")) == 0
        if name != "EIO":  # then it waits until it is old
            assert (tmp_path / "failing").read_bytes()[:P] == b"a" * P

    over(tmp_path, main)


def test_what_could_not_be_written_is_tried_again_as_soon_as_there_is_room(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        full = Full(world, 0)
        _, handle = await world.open("failing")
        await world.files.write(handle, 0, b"a" * P)
        world.backing.set_plan([{"op": "pwritev", "errno": "ENOSPC"}])
        for _ in range(9):
            assert await errno_of(world.files.fsync(handle, False)) == errno.ENOSPC
        (inode,) = world.writeback.refused
        assert inode.retry_seconds == 30
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.files.space.watch, functools.partial(trio.sleep, SAMPLE_SECONDS))
            await trio.sleep(2.5)
            world.backing.set_plan([])
            full.free_pages = 100
            await trio.sleep(2 * SAMPLE_SECONDS)
            assert not inode.unwritten and not world.writeback.refused
            nursery.cancel_scope.cancel()

    over(tmp_path, main)


def test_a_file_that_is_gone_refuses_nothing_any_more(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        _, failing = await world.open("failing")
        _, other = await world.open("other")
        await world.files.write(failing, 0, b"a" * P)
        world.backing.set_plan([{"op": "pwritev", "errno": "ENOSPC"}])
        assert await errno_of(world.files.fsync(failing, False)) == errno.ENOSPC
        await world.release(failing)
        assert await errno_of(world.files.write(other, 0, b"b")) == errno.ENOSPC
        await world.fs.unlink(world.table.root, b"failing")
        await trio.sleep(2)
        assert await errno_of(world.files.write(other, 0, b"b")) == 0

    over(tmp_path, main)
