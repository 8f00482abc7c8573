"""What is let go of is gone at once, without a search; and what stays is looked at once."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cachefs.cache import wishes
from cachefs.cache.page import PAGE_SIZE
from cachefs.transport import wire
from fake_kernel import transfer
from test_lane import staged
from world import CALLER, World

FILES = 20


@pytest.fixture
def no_search() -> Iterator[None]:
    """Nothing is collected; what a search finds is kept to be looked at."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def ours_in_garbage() -> dict[str, int]:
    gc.collect()
    kinds = Counter(type(thing) for thing in gc.garbage)
    return {kind.__qualname__: count for kind, count in kinds.items() if kind.__module__.startswith(("cachefs", "backing"))}


async def miss(world: World) -> None:
    """Apart: the traceback of the error has this frame and all that is in it."""
    with contextlib.suppress(FileNotFoundError):
        await world.fs.lookup(world.table.root, b"missing")


async def live(world: World) -> None:
    """Files from their making to their end, in many ways."""
    root = world.table.root
    for number in range(FILES):
        name = b"%d" % number
        inode, opened = await world.fs.creation.create(root, name, 0o100644, os.O_RDWR | os.O_CREAT, CALLER)
        await world.files.write(opened.number, 0, b"x" * 3 * PAGE_SIZE)
        await world.read(opened.number, 100, PAGE_SIZE)
        if number % 2:
            await world.writeback.flush(inode)
            await world.truncate(inode, 5000)
        if number % 3:
            await world.fs.rename(root, name, root, b"new" + name, 0)
            name = b"new" + name
        if number % 4 == 0:
            await world.fs.unlink(root, name)
        await world.release(opened.number)
        await world.writeback.flush_all()
        if inode.file is not None:
            wishes.drop(world.cache, inode.file)
        world.fs.forget(inode.node, inode.lookups)
        await miss(world)
    number = world.fs.directories.open(root)
    await world.names(number)
    world.fs.directories.close(number)


@pytest.mark.parametrize("blocking", [False, True])
def test_files_that_are_let_go_of_leave_no_cycles(tmp_path: Path, no_search: None, blocking: bool) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "state").mkdir()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, tmp_path / "source", blocking=blocking, journal=tmp_path / "state")
            before = len(world.table)
            await live(world)
            assert len(world.table) == before
            # The traceback of an error out of one of trio's threads is a cycle, but one that dies young.
            assert set(ours_in_garbage()) <= ({"Call"} if blocking else set())
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_requests_leave_no_cycles(tmp_path: Path, no_search: None) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel = stage.kernel
            for _ in range(FILES):
                node, handle = await kernel.open(b"f")
                for _ in range(2):
                    await kernel.must(wire.READ, node, transfer(handle, 10, 5000))
                await kernel.must(wire.WRITE, node, transfer(handle, 1, 5, b"world"))
                await kernel.must(wire.GETATTR, node, bytes(16))
                assert (await kernel.ask(wire.READ, node, transfer(99, 0, 5))).errno
                assert (await kernel.ask(wire.LOOKUP, body=b"no end")).errno
                await kernel.must(wire.FSYNC, node, handle.to_bytes(16, "little"))
                await kernel.must(wire.RELEASE, node, handle.to_bytes(24, "little"))
            assert ours_in_garbage() == {}

    trio.run(main)


def test_what_has_survived_a_full_collection_is_not_looked_at_again() -> None:
    program = """
import gc
from cachefs import garbage
garbage.look_once()
looked = []
gc.callbacks.insert(0, lambda phase, info: looked.append(len(gc.get_objects(generation=2))) if phase == "stop" else None)
stay = [[i] for i in range(300_000)]
class Cycle: pass
for _ in range(100_000):
    cycle = Cycle()
    cycle.itself = cycle
print(max(looked), gc.get_freeze_count() > 250_000, sum(isinstance(thing, Cycle) for thing in gc.get_objects()) < 10_000)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert int(said[0]) < 60_000 and said[1:] == ["True", "True"], said
