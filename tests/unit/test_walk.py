"""Readahead from file to file: it is for who goes in order, grows with use and shrinks with waste."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.cache import wishes
from cachefs.cache.figures import statistics_of
from cachefs.cache.page import PAGE_SIZE
from cachefs.handle import Handle
from cachefs.inode import Inode
from cachefs.walk import DISORDER, FILE_PAGES, FILES_FIRST, FILES_MAX, OPENS_MIN, SKIPPED_MAX, STREAMS_MAX, Walk, Walker
from world import World

NAMES = [b"%03d" % number for number in random.Random(1).sample(range(1000), 200)]  # in no order of their own
SORTED = sorted(NAMES)


def goes(walk: Walk, names: list[bytes], most: int = FILES_MAX) -> list[list[bytes]]:
    """What each of these opens has fetched."""
    return [walk.opened(name, most, lambda name: True) for name in names]


# what is next


def test_two_opens_from_the_beginning_or_three_elsewhere_start_it() -> None:
    assert [bool(found) for found in goes(Walk(NAMES), NAMES[:2])] == [False, True]
    assert [bool(found) for found in goes(Walk(NAMES), NAMES[50:53])] == [False, False, True]


@pytest.mark.parametrize("order", [NAMES, SORTED], ids=["listing", "names"])
def test_everything_is_fetched_once_ahead_of_who_goes_in_order(order: list[bytes]) -> None:
    walk, before = Walk(NAMES), OPENS_MIN - 1
    found = goes(walk, order)
    fetched = [name for names in found for name in names]
    assert fetched == order[before:]
    assert walk.account() == (len(order) - before, 0)
    assert walk.end() == 0


def test_what_is_ahead_grows_from_open_to_open_up_to_the_most() -> None:
    ahead = 0
    for i, found in enumerate(goes(Walk(NAMES), NAMES[:10])):
        ahead += len(found) - (1 if i >= OPENS_MIN - 1 else 0)
        if i >= 1:
            assert ahead == min(FILES_FIRST << (i - 1), FILES_MAX)
    assert sum(map(len, goes(Walk(NAMES), NAMES[:10], most=3))) == 10 + 3 - 2  # three ahead, all but the first two


def test_no_order_fetches_nothing() -> None:
    walk = Walk(NAMES)
    for name in NAMES[::7] + NAMES[::-9]:
        assert not walk.opened(name, FILES_MAX, lambda name: True)
    assert not any(goes(walk, [b"no such name"] * 5))


def test_a_file_opened_again_and_again_is_no_order() -> None:
    assert not any(goes(Walk(NAMES), [NAMES[30]] * 10))


def test_files_left_out_and_opens_in_disorder_go_on() -> None:
    walk = Walk(NAMES)
    goes(walk, NAMES[:4])
    after = goes(walk, [NAMES[4 + SKIPPED_MAX], NAMES[4], NAMES[5 + SKIPPED_MAX]])
    assert after[0]
    assert not after[1]  # behind: it was fetched before
    assert after[2]


def test_several_readers_of_one_directory_are_told_apart() -> None:
    walk = Walk(NAMES)
    places = [20 * reader for reader in range(STREAMS_MAX)]
    found = [goes(walk, [NAMES[at + step] for at in places]) for step in range(OPENS_MIN)]
    assert all(map(bool, found[-1]))


def test_what_is_not_wanted_is_neither_fetched_nor_waste() -> None:
    walk = Walk(NAMES)
    for name in NAMES:
        assert not walk.opened(name, FILES_MAX, lambda name: False)
    assert (walk.account(), walk.end()) == ((0, 0), 0)


def test_what_is_passed_by_or_never_opened_is_waste() -> None:
    walk = Walk(SORTED)  # one order alone
    step = SKIPPED_MAX + 1  # each open leaves two files out
    goes(walk, SORTED[:3])
    walk.account()
    for name in SORTED[3 + SKIPPED_MAX : 60 : step]:
        walk.opened(name, 8, lambda name: True)
    used, wasted = walk.account()
    assert wasted > used > 0
    assert 8 - 2 <= walk.end() <= 8 + DISORDER


# fetching it


def over(top: Path, test: Callable[[World, Walker], Awaitable[None]], pages: int = 4096, ttl_seconds: float = 60.0) -> None:
    """Runs a test with a walker over `top`; calls take turns of the event loop, and time passes only where a test sleeps."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, pages=pages, policy="s3fifo", blocking=True, seed=1, ttl_seconds=ttl_seconds)
            await test(world, Walker(world.fs, nursery))
            await trio.testing.wait_all_tasks_blocked()
            world.check()
            world.backing.set_plan([])
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock())


def make(top: Path, count: int = 60, nbytes: int = 5000) -> None:
    for number in range(count):
        (top / f"{number:03d}").write_bytes(bytes([number]) * nbytes)


async def listed(world: World) -> list[bytes]:
    """The names of the files at the top, each looked up, as after `ls -l`."""
    number = world.fs.directories.open(world.table.root)
    names = list(await world.names(number))
    await world.fs.directories.entries(number, names)
    world.fs.directories.close(number)
    return names


def inode_of(world: World, name: bytes) -> Inode:
    inode = world.table.named(world.table.root, name)
    assert inode is not None
    return inode


async def read_through(world: World, names: list[bytes]) -> None:
    for name in names:
        inode = inode_of(world, name)
        opened = await world.files.open(inode, os.O_RDONLY, 0)
        assert await world.read(opened.number, 0, inode.st.st_size) == bytes([int(name)]) * inode.st.st_size
        await world.release(opened.number)
        await trio.testing.wait_all_tasks_blocked()


def calls(world: World, op: str) -> int:
    return world.backing.calls[op]


def test_the_next_files_are_in_memory_before_they_are_opened(tmp_path: Path) -> None:
    make(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        await read_through(world, names[:2])
        assert [inode_of(world, name).file is not None for name in names[:7]] == [True] * 6 + [False]
        await read_through(world, names[2:])
        figures = statistics_of(world.cache)
        assert walker.fetched == walker.used == len(names) - 2
        assert (figures.readahead_used_pages, figures.readahead_unused_pages) == (2 * (len(names) - 2), 0)
        assert (walker.wasted, world.files.data.count) == (0, 0)

    over(tmp_path, test)


def test_only_the_beginning_of_a_large_file_is_fetched(tmp_path: Path) -> None:
    make(tmp_path, count=4, nbytes=(FILE_PAGES + 40) * PAGE_SIZE)

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        await read_through(world, names[:2])
        resident = [file.resident_pages if (file := inode_of(world, name).file) else 0 for name in names]
        assert resident[2:] == [FILE_PAGES] * 2

    over(tmp_path, test)


def test_opens_in_no_order_fetch_nothing(tmp_path: Path) -> None:
    make(tmp_path, count=250)

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        by_name, apart = sorted(names), list[bytes]()
        for name in names:  # those that are not near one another, in either order
            places = [(names.index(other), by_name.index(other)) for other in (name, *apart)]
            near = SKIPPED_MAX + DISORDER
            if all(abs(here - there) > near for other in places[1:] for here, there in zip(places[0], other, strict=True)):
                apart.append(name)
        assert len(apart) > 10
        await read_through(world, apart + apart[::-1])
        assert walker.fetched == 0

    over(tmp_path, test)


def test_waste_makes_it_back_off_and_use_brings_it_back(tmp_path: Path) -> None:
    make(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        names = sorted(await listed(world))
        await read_through(world, [*names[:12], *names[14::3]])  # two of three are left out
        assert walker.wasted
        assert walker.most <= 2
        for name in names:
            wishes.drop(world.cache, inode_of(world, name).file or world.files.ensure_file(inode_of(world, name)))
        least = walker.most
        await read_through(world, names)
        assert walker.most > least

    over(tmp_path, test)


def test_a_small_cache_has_no_room_for_it(tmp_path: Path) -> None:
    make(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        await read_through(world, await listed(world))
        assert walker.fetched == 0

    over(tmp_path, test, pages=8 * FILE_PAGES - 8)


def test_attributes_that_are_not_believed_any_more_are_looked_at_ahead(tmp_path: Path) -> None:
    make(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        await read_through(world, names)
        await trio.sleep(100)
        await read_through(world, names[:3])
        assert walker.fetched == len(names) - 2  # all of it the first time
        before = calls(world, "fstat"), calls(world, "open")
        await read_through(world, names[3:])
        assert (calls(world, "fstat"), calls(world, "open")) == before

    async def jumping(world: World, walker: Walker) -> None:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.autojump_threshold = 0
        await test(world, walker)

    over(tmp_path, jumping)


def test_a_file_changed_since_the_listing_is_read_as_it_is(tmp_path: Path) -> None:
    make(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        (tmp_path / os.fsdecode(names[4])).unlink()
        (tmp_path / os.fsdecode(names[5])).write_bytes(bytes([int(names[5])]) * 9999)
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(100)
        await read_through(world, [*names[:4], *names[5:]])
        assert inode_of(world, names[5]).st.st_size == 9999

    over(tmp_path, test)


def test_errors_are_left_to_who_reads(tmp_path: Path) -> None:
    make(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        await read_through(world, names[:1])
        world.backing.set_plan([{"op": "preadv", "errno": "EIO"}])
        opened = await world.files.open(inode_of(world, names[1]), os.O_RDONLY, 0)
        await trio.testing.wait_all_tasks_blocked()
        world.backing.set_plan([])
        await world.release(opened.number)
        await read_through(world, names)

    over(tmp_path, test)


# directories


def test_the_next_directories_are_listed_before_they_are_opened(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:03d}").mkdir()
        (tmp_path / f"{number:03d}" / "file").touch()

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        before = world.backing.calls["listdir"]
        for i, name in enumerate(names):
            number = world.fs.directories.open(inode_of(world, name))
            assert await world.names(number) == [b"file"]
            await trio.testing.wait_all_tasks_blocked()
            world.fs.directories.close(number)
            if i == 1:
                assert world.backing.calls["listdir"] == before + 2 + FILES_FIRST
        assert world.backing.calls["listdir"] == before + len(names)
        assert walker.used == len(names) - 2
        assert (walker.fetched, walker.wasted) == (0, 0)

    over(tmp_path, test)


def test_who_asks_for_a_listing_that_is_being_read_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def test(world: World, walker: Walker) -> None:
        found: list[list[bytes]] = []

        async def ask() -> None:
            found.append([entry.name for entry in await world.fs.directories.listed(world.table.root)])

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert found == [[b"file"]] * 3
        assert world.backing.calls["listdir"] == 1

    over(tmp_path, test)


def make_tree(top: Path, directories: int = 40, files: int = 3) -> None:
    for number in range(directories):
        directory = top / f"{number:03d}"
        directory.mkdir()
        for other in range(files):
            (directory / f"{other:03d}").write_bytes(b"contents")


async def enter(world: World, directory: Inode) -> list[bytes]:
    """Lists a directory as find and grep do."""
    number = world.fs.directories.open(directory)
    names = list(await world.names(number))
    await world.fs.directories.entries(number, names)
    world.fs.directories.close(number)
    await trio.testing.wait_all_tasks_blocked()
    return names


async def read_all_below(world: World, directory: Inode, names: list[bytes]) -> None:
    for name in names:
        inode = world.table.named(directory, name)
        assert inode is not None
        opened = await world.files.open(inode, os.O_RDONLY, 0)
        assert await world.read(opened.number, 0, 99) == b"contents"
        await world.release(opened.number)
        await trio.testing.wait_all_tasks_blocked()


def test_who_reads_one_directory_after_another_finds_the_files_of_the_next_ones_in_memory(tmp_path: Path) -> None:
    make_tree(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        reads: list[int] = []
        for name in await enter(world, world.table.root):
            directory = inode_of(world, name)
            names = await enter(world, directory)
            before = world.backing.calls["preadv"]
            await read_all_below(world, directory, names)
            reads.append(world.backing.calls["preadv"] - before)
        assert sum(reads[:2]) > 0
        assert not any(reads[12:])
        assert walker.wasted == 0

    over(tmp_path, test)


def test_who_only_lists_has_no_file_fetched(tmp_path: Path) -> None:
    make_tree(tmp_path)

    async def test(world: World, walker: Walker) -> None:
        top = await enter(world, world.table.root)
        for name in top:
            await enter(world, inode_of(world, name))
        assert world.backing.calls["preadv"] == 0
        first = inode_of(world, top[0])
        await read_all_below(world, first, await enter(world, first))  # one that is read to its end changes that for a moment
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(100)
        before = world.backing.calls["preadv"]
        for name in top[1:]:
            await enter(world, inode_of(world, name))
        assert world.backing.calls["preadv"] - before <= FILES_FIRST * 3
        assert walker.used <= 3 + len(top) * 2

    over(tmp_path, test)


def test_files_of_the_directories_ahead_take_no_more_room_than_a_window(tmp_path: Path) -> None:
    make_tree(tmp_path, files=0)
    for number in range(40):
        for other in range(6):
            (tmp_path / f"{number:03d}" / f"{other:03d}").write_bytes(b"contents".ljust(40 * PAGE_SIZE))

    async def test(world: World, walker: Walker) -> None:
        highest, most = 0, world.files.readahead_max_pages
        for name in await enter(world, world.table.root):
            directory = inode_of(world, name)
            for below in await enter(world, directory):
                inode = world.table.named(directory, below)
                assert inode is not None
                opened = await world.files.open(inode, os.O_RDONLY, 0)
                await world.read(opened.number, 0, 40 * PAGE_SIZE)
                await world.release(opened.number)
                await trio.testing.wait_all_tasks_blocked()
            files = [inode.file for inode in world.table if inode.file is not None]
            ahead = sum(group.prefetched.bit_count() for file in files for group in file.groups.values())
            highest = max(highest, ahead)
        assert 0 < highest <= most

    over(tmp_path, test, pages=16384)


def test_waste_among_files_of_the_next_directories_counts(tmp_path: Path) -> None:
    make_tree(tmp_path, directories=200)

    async def test(world: World, walker: Walker) -> None:
        for i, name in enumerate(await enter(world, world.table.root)):
            directory = inode_of(world, name)
            names = await enter(world, directory)
            await read_all_below(world, directory, names if i < 3 else names[:1])
        assert walker.wasted > 0
        assert walker.most < FILES_MAX

    over(tmp_path, test)


@pytest.mark.parametrize("what", ["transient", "random", "advice"])
def test_regression_what_is_read_once_or_here_and_there_has_nothing_fetched(tmp_path: Path, what: str) -> None:
    """Who backs up with `advice=noreuse` is to leave nothing in the cache."""
    make(tmp_path)

    def advise(handle: Handle, program: str) -> None:
        handle.readahead.transient = what == "transient"
        handle.readahead.most_pages = 0 if what == "random" else handle.readahead.most_pages

    async def test(world: World, walker: Walker) -> None:
        names = await listed(world)
        world.files.advise = advise
        if what == "advice":
            for name in names:
                inode_of(world, name).advice = "noreuse"
        await read_through(world, names[:10])
        assert walker.fetched == 0

    over(tmp_path, test)
