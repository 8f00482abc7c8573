"""Writeback with files over a real directory: times, errors of handles, sizes, descriptors."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.cache import wishes
from cachefs.cache.page import GROUP_SIZE
from world import World

wait_all_tasks_blocked = trio.testing.wait_all_tasks_blocked


def over(top: Path, test: Callable[[World], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, **options)  # type: ignore[arg-type]
            nursery.start_soon(world.writeback.run)
            await test(world)
            world.check()
            world.backing.set_plan([])
            await world.writeback.flush_all()
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0) if options.get("seed") is not None else None)


both = pytest.mark.parametrize("blocking", [False, True])


@both
def test_the_time_of_a_write_is_kept_on_the_backing(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"x" * 10_000)
        shown = inode.attributes()
        await trio.sleep(0.05)
        await world.files.fsync(handle, False)
        assert os.stat(tmp_path / "file").st_mtime_ns == shown.mtime_ns == inode.attributes().mtime_ns
        assert inode.attributes().ctime_ns == shown.ctime_ns
        await world.files.attributes.refresh(inode)
        assert inode.attributes().mtime_ns == shown.mtime_ns and not world.changed
        assert world.cache.resident_pages == 3

    over(tmp_path, main, blocking=blocking)


@both
def test_each_handle_reports_an_error_once(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, first = await world.open("file")
        _, second = await world.open("file")
        await world.files.write(first, 0, b"x" * 10_000)
        world.backing.set_plan([{"op": "pwritev", "errno": "EIO", "count": 1}])
        with pytest.raises(OSError) as caught:
            await world.files.fsync(first, False)
        assert caught.value.errno == errno.EIO and inode.unwritten
        assert world.io.errors == world.writeback.errors == {"EIO": 1}
        await world.files.fsync(first, False)
        assert (tmp_path / "file").read_bytes() == b"x" * 10_000
        with pytest.raises(OSError):
            await world.files.flush(second)
        await world.files.flush(second)
        await world.files.fsync(second, False)
        _, third = await world.open("file")
        await world.files.flush(third)

    over(tmp_path, main, blocking=blocking)


def test_close_writes_out_on_a_backing_far_away(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        _, handle = await world.open("file")
        await world.files.write(handle, 0, b"x" * 10_000)
        await world.files.flush(handle)
        assert (tmp_path / "file").read_bytes() == b"x" * 10_000

    over(tmp_path, main, blocking=True)


@both
def test_regression_long_writes_through_a_tiny_cache(tmp_path: Path, blocking: bool) -> None:
    """1 MiB writes at the smallest cache: a hang in `throttle`, and another one where writeback knew of no dirty file."""

    async def main(world: World) -> None:
        _, handle = await world.open("file")
        data = os.urandom(GROUP_SIZE + 1234)
        with trio.fail_after(30):
            for number in range(3):
                assert await world.files.write(handle, number * len(data) + 5, data) == len(data)
            await world.files.fsync(handle, False)
        assert (tmp_path / "file").read_bytes() == bytes(5) + data * 3

    over(tmp_path, main, blocking=blocking, pages=16, limit_pages=4)


def test_regression_attributes_of_a_file_that_is_always_written_to(tmp_path: Path) -> None:
    """stat(2) was repeated until no write came in between: on a slow backing it never returned."""

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def writer() -> None:
                    while True:
                        await world.files.write(handle, 0, b"x")
                        await trio.lowlevel.checkpoint()

                world.backing.set_plan([{"op": "fstat", "delay_seconds": 0.01}])
                nursery.start_soon(writer)
                await world.files.attributes.refresh(inode)
                nursery.cancel_scope.cancel()

    over(tmp_path, main, blocking=True)


@pytest.mark.parametrize("seed", range(20))
def test_regression_an_overtaken_lookup_does_not_cut_the_file(tmp_path: Path, seed: int) -> None:
    """A look-up read the size, a write and its writeback came and went, then the old size was taken for a change.

    The file looked cut, and the next write into its last page filled the rest of it with zeros.
    """

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        for number in range(1, 20):
            await world.files.write(handle, number * 5000, b"x" * 5000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.files.fsync, handle, False)
                for _ in range(5):
                    nursery.start_soon(world.fs.lookup, world.table.root, b"file")
            assert inode.file is not None and inode.file.size == number * 5000 + 5000
        assert not world.changed

    over(tmp_path, main, blocking=True, seed=seed)


@both
def test_regression_two_writes_beyond_a_tebibyte_at_once(tmp_path: Path, blocking: bool) -> None:
    """The nearer one cut the backing behind the farther one's back, data written there included."""

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        far, near = 3 << 40, 2 << 40
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.files.write, handle, far, b"far")
            nursery.start_soon(world.files.write, handle, near, b"near")
        assert inode.file is not None and inode.file.size == far + 3
        await world.files.fsync(handle, False)
        wishes.drop(world.cache, inode.file)
        assert await world.read(handle, far, 10) == b"far"
        assert await world.read(handle, near, 4) == b"near"
        assert os.stat(tmp_path / "file").st_size == far + 3
        await world.truncate(inode, 0)

    over(tmp_path, main, blocking=blocking)


def test_regression_truncate_keeps_its_descriptor_open(tmp_path: Path) -> None:
    """The last close came while ftruncate ran: its descriptor was closed under it, and might have been another file's."""

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"x" * 100)
        await world.files.fsync(handle, False)
        world.backing.set_plan([{"op": "truncate", "hang": True}])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.truncate, inode, 50)
            await wait_all_tasks_blocked(0.05)
            await world.release(handle)
            assert inode.writer >= 0
            world.backing.set_plan([])
        assert os.stat(tmp_path / "file").st_size == 50
        world.fs.drop(inode)

    over(tmp_path, main, blocking=True)


def test_regression_writing_many_small_files_out_lets_others_have_their_turn(tmp_path: Path) -> None:
    """Short batches of local files wait for nothing: `cachefs sync` kept hits waiting until all were written."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, tmp_path, pages=256, at_once_bytes=1 << 16)
            for number in range(50):
                _, handle = await world.open(str(number))
                await world.files.write(handle, 0, b"x")
            written: list[int] = []

            async def watch() -> None:
                while world.writeback.dirty:
                    written.append(len(world.writeback.dirty))
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(watch)
            assert await world.writeback.flush_all() == []
            assert len(set(written)) >= 5
            await world.shut()

    trio.run(main)
