"""fsync with `--durability journal`: what it returned for is in the durable index or durable on the backing, at every moment."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from cachefs.journal.journal import SYNCED_FILE
from cachefs.journal.load import read
from cachefs.journal.synced import Synced
from cachefs.ledger import Ledger
from world import JOURNAL_PAGES, World

P = 4096
both = pytest.mark.parametrize("blocking", [False, True])


def over(tmp_path: Path, main: Callable[[World], Awaitable[None]], blocking: bool) -> None:
    """Runs `main` over an empty SOURCE with a journal whose fsync is local."""
    source, state = tmp_path / "source", tmp_path / "state"
    source.mkdir()
    state.mkdir()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, source, blocking=blocking, journal=state)
            world.keeper.synced = Synced(os.fspath(state / SYNCED_FILE), JOURNAL_PAGES)
            world.keeper.make_durable = world.fs.make_durable
            try:
                await main(world)
                world.check()
            finally:
                world.keeper.synced.close()
                await world.shut()
                nursery.cancel_scope.cancel()

    trio.run(run)


def kept(world: World) -> int:
    """Pages that the durable index has."""
    assert world.keeper.synced is not None
    return sum(len(row.pages) for rows in read(world.keeper.synced.index.env).pages.values() for row in rows)


async def calls_of(world: World, operation: str, number: int) -> None:
    with trio.fail_after(20):
        while world.backing.calls[operation] < number:
            await trio.sleep(0.001)


@both
def test_what_was_written_back_while_the_backing_was_synced_needs_another_sync(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.fsync(handle, False)
        await world.files.write(handle, 0, b"a" * P)
        world.backing.set_plan([{"op": "pwritev", "hang": True, "count": 1}])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.writeback.flush, inode)
            await calls_of(world, "pwritev", 1)
            await world.files.fsync(handle, False)
            assert kept(world) == 1, "the backing does not have it yet"
            world.backing.set_plan([])
        assert not inode.unwritten and inode.unsynced
        before = world.backing.calls["fsync"]
        await world.files.fsync(handle, False)
        assert world.backing.calls["fsync"] == before + 1 and kept(world) == 0

    over(tmp_path, main, blocking)


@both
def test_an_fsync_does_not_return_before_the_one_that_it_relies_on(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        _, other = await world.open("file")
        await world.files.write(handle, 0, b"a" * P)
        await world.writeback.flush(inode)
        returned: list[int] = []

        async def sync(number: int) -> None:
            await world.files.fsync(number, False)
            returned.append(number)

        world.backing.set_plan([{"op": "fsync", "hang": True}])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync, handle)
            await calls_of(world, "fsync", 1)
            nursery.start_soon(sync, other)
            await trio.sleep(0.05)
            assert returned == []
            world.backing.set_plan([])
        assert sorted(returned) == sorted([handle, other])

    over(tmp_path, main, blocking)


@pytest.mark.parametrize("path", [b"", b"file"])
@both
def test_cachefs_sync_leaves_no_older_version_to_come_back_after_a_power_cut(tmp_path: Path, blocking: bool, path: bytes) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        for byte in (b"a", b"b"):
            await world.files.write(handle, 0, byte * P)
            if byte == b"a":
                await world.files.fsync(handle, False)
        assert kept(world) == 1
        ledger = Ledger(world.fs)
        async with ledger.selecting(path) as (inodes, tree):
            assert await ledger.sync(inodes, tree) == ([], [])
        assert kept(world) == 0 and not inode.unsynced

    over(tmp_path, main, blocking)


@both
def test_regression_an_fsync_of_a_file_without_a_name_has_the_backing_do_it(tmp_path: Path, blocking: bool) -> None:
    """It was durable nowhere: the journal knows no file without a name, and after a power cut the name came back."""

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"a" * P)
        await world.files.fsync(handle, False)
        assert kept(world) == 1
        await world.fs.unlink(world.table.root, b"file")
        await world.files.write(handle, 0, b"b" * P)
        before = world.backing.calls["fsync"]
        await world.files.fsync(handle, False)
        assert not inode.unwritten and not inode.unsynced and world.backing.calls["fsync"] == before + 1
        assert kept(world) == 0, "what was synced before would come back with the name"

    over(tmp_path, main, blocking)
