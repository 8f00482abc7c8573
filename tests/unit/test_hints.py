"""Rules and the attributes that exist on the mount alone: what they do to readers, and what is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from cachefs.cache.page import PAGE_SIZE
from cachefs.handle import Handle
from cachefs.hints import ADVICE, PIN, RESIDENT, Hints
from cachefs.inode import Inode
from cachefs.pins import Pins
from cachefs.rules import parse_rules
from world import World

P = PAGE_SIZE


def hinting(top: Path, test: Callable[[World, Hints], Awaitable[None]], rules: str = "", **options: object) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, **options)  # type: ignore[arg-type]
            pins = Pins(world.fs, None)
            hints = Hints(world.files, pins, parse_rules(rules), nursery, world.changed.append)
            world.fs.xattrs.hints, world.files.advise = hints, hints.opened
            nursery.start_soon(pins.run)
            await test(world, hints)
            world.check()
            await pins.remove([b""])
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(run)


async def fails(world: World, inode: Inode, name: bytes, value: bytes | None) -> int | None:
    """The errno of setting an attribute, or removing it (None)."""
    with pytest.raises(OSError) as caught:
        if value is None:
            await world.fs.xattrs.removexattr(inode, name)
        else:
            await world.fs.xattrs.setxattr(inode, name, value)
    return caught.value.errno


async def fetched(world: World, number: int, *pages: int) -> int:
    """Pages that reads of single pages brought from the backing."""
    before = world.io.read_bytes
    for page in pages:
        await world.read(number, page * P, P)
    return -((before - world.io.read_bytes) // P)


def test_resident_tells_the_bytes_in_memory_and_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * (3 * P + 5))
    os.setxattr(tmp_path / "f", "user.mine", b"1")
    os.setxattr(tmp_path / "f", "user.cachefs.pin", b"stored by somebody")

    async def test(world: World, hints: Hints) -> None:
        inode = await world.fs.lookup(world.table.root, b"f")
        assert await world.fs.xattrs.getxattr(inode, RESIDENT) == b"0"
        number = (await world.files.open(inode, os.O_RDONLY, 0)).number
        assert await fetched(world, number, 3) == 1
        assert await world.fs.xattrs.getxattr(inode, RESIDENT) == b"5"
        await world.read(number, 0, P)
        assert await world.fs.xattrs.getxattr(inode, RESIDENT) == b"%d" % (P + 5)
        assert await world.fs.xattrs.listxattr(inode) == [b"user.mine"]
        assert await world.fs.xattrs.getxattr(inode, b"user.mine") == b"1"
        assert await fails(world, inode, RESIDENT, b"7") == await fails(world, inode, RESIDENT, None) == errno.EPERM

    hinting(tmp_path, test, readahead_pages=0)


def test_pin_pins_and_unpins(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3 * P)
    (tmp_path / "large").write_bytes(b"x" * 65 * P)

    async def test(world: World, hints: Hints) -> None:
        inode = await world.fs.lookup(world.table.root, b"f")
        large = await world.fs.lookup(world.table.root, b"large")
        for unpin in (b"0", None):
            with pytest.raises(OSError, match="No data"):
                await world.fs.xattrs.getxattr(inode, PIN)
            await world.fs.xattrs.setxattr(inode, PIN, b"1")
            assert await world.fs.xattrs.getxattr(inode, PIN) == b"1"
            hints.pins.kick()
            await hints.pins.looked.park()
            assert world.cache.pinned_pages == 3
            if unpin is None:
                await world.fs.xattrs.removexattr(inode, PIN)
            else:
                await world.fs.xattrs.setxattr(inode, PIN, unpin)
            assert world.cache.pinned_pages == 0
        assert await fails(world, inode, PIN, b"yes") == errno.EINVAL
        assert await fails(world, inode, PIN, None) == errno.ENODATA
        assert await fails(world, large, PIN, b"1") == errno.ENOSPC
        assert await fails(world, world.table.root, PIN, b"1") == errno.EPERM
        assert await fails(world, inode, b"user.cachefs.else", b"1") == errno.EPERM
        await world.fs.unlink(world.table.root, b"f")
        assert await fails(world, inode, PIN, b"1") == errno.ENOENT

    hinting(tmp_path, test)


def test_advice_holds_for_open_and_for_later_handles_until_it_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 400 * P)

    async def test(world: World, hints: Hints) -> None:
        inode, number = await world.open("f", os.O_RDONLY)
        await world.fs.xattrs.setxattr(inode, ADVICE, b"random")
        assert await world.fs.xattrs.getxattr(inode, ADVICE) == b"random"
        assert await fetched(world, number, 0, 1, 2, 3) == 4
        _, other = await world.open("f", os.O_RDONLY)
        assert await fetched(world, other, 100, 101) == 2
        await world.fs.xattrs.setxattr(inode, ADVICE, b"sequential")
        assert await fetched(world, other, 200, 201) >= world.files.readahead_max_pages // 2
        await world.fs.xattrs.removexattr(inode, ADVICE)
        assert await fails(world, inode, ADVICE, None) == errno.ENODATA
        assert await fails(world, inode, ADVICE, b"often") == errno.EINVAL
        assert (world.files.handles[other].readahead.least_pages, inode.kept) == (0, 0)

    hinting(tmp_path, test, pages=512)


def test_a_file_with_an_advice_stays_known_until_it_is_removed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")

    async def test(world: World, hints: Hints) -> None:
        inode, number = await world.open("f", os.O_RDONLY)
        await world.fs.xattrs.setxattr(inode, ADVICE, b"noreuse")
        await world.release(number)
        world.fs.forget(inode.node, inode.lookups)
        assert inode in list(world.table)
        again, number = await world.open("f", os.O_RDONLY)
        assert again is inode and world.files.handles[number].readahead.transient
        await world.release(number)
        world.fs.forget(inode.node, inode.lookups)
        await world.fs.unlink(world.table.root, b"f")
        assert inode not in list(world.table)

    hinting(tmp_path, test)


def test_willneed_brings_the_file_and_dontneed_drops_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 30 * P)

    async def test(world: World, hints: Hints) -> None:
        inode = await world.fs.lookup(world.table.root, b"f")
        await world.fs.xattrs.setxattr(inode, ADVICE, b"willneed")
        await trio.testing.wait_all_tasks_blocked()
        while await world.fs.xattrs.getxattr(inode, RESIDENT) != b"%d" % (30 * P):
            await trio.sleep(0.01)
        with pytest.raises(OSError, match="No data"):
            await world.fs.xattrs.getxattr(inode, ADVICE)
        await world.fs.xattrs.setxattr(inode, ADVICE, b"dontneed")
        assert await world.fs.xattrs.getxattr(inode, RESIDENT) == b"0" and world.changed == [inode]
        assert world.cache.evictions["dropped"] == 30

    hinting(tmp_path, test)


def test_advice_is_kept_for_so_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.hints.ADVISED_MAX", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(b"x")

    async def test(world: World, hints: Hints) -> None:
        a, b, c = [await world.fs.lookup(world.table.root, name) for name in (b"a", b"b", b"c")]
        await world.fs.xattrs.setxattr(a, ADVICE, b"random")
        await world.fs.xattrs.setxattr(b, ADVICE, b"random")
        await world.fs.xattrs.setxattr(b, ADVICE, b"noreuse")
        assert await fails(world, c, ADVICE, b"random") == errno.ENOSPC
        await world.fs.unlink(world.table.root, b"a")
        await world.fs.xattrs.setxattr(c, ADVICE, b"random")

    hinting(tmp_path, test)


def test_a_rule_goes_before_the_advice_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    for name in ("d/x.iso", "d/y"):
        (tmp_path / name).write_bytes(b"x" * 100 * P)
    program = "tar"
    monkeypatch.setattr("cachefs.files.name_of", lambda pid: program)

    async def test(world: World, hints: Hints) -> None:
        nonlocal program
        d = await world.fs.lookup(world.table.root, b"d")
        iso, other = [await world.fs.lookup(d, name) for name in (b"x.iso", b"y")]

        async def opened(inode: Inode) -> Handle:
            return world.files.handles[(await world.files.open(inode, os.O_RDONLY, 0)).number]

        await world.fs.xattrs.setxattr(iso, ADVICE, b"random")
        assert (await opened(iso)).readahead.transient and (await opened(other)).readahead.transient
        program = "cat"
        handle = await opened(iso)
        assert not handle.readahead.transient and handle.readahead.least_pages == world.files.readahead_max_pages
        assert (await opened(other)).readahead.least_pages == 0
        program = "warmer"
        await opened(other)
        while other.file is None or other.file.resident_pages < 100:
            await trio.sleep(0.01)

    rules = "comm=tar advice=noreuse; comm=warmer advice=willneed; path=d/*.iso advice=sequential"
    hinting(tmp_path, test, rules, pages=256)


@pytest.mark.parametrize("step", [P, 3000, 33 * P])
@pytest.mark.parametrize("readahead_pages", [0, 4096])
@pytest.mark.parametrize("blocking", [False, True])
def test_a_noreuse_reader_gets_the_right_bytes_and_leaves_nothing(
    tmp_path: Path, step: int, readahead_pages: int, blocking: bool
) -> None:
    data = os.urandom(700 * P + 77)
    (tmp_path / "big").write_bytes(data)
    (tmp_path / "hot").write_bytes(b"h" * 40 * P)

    async def test(world: World, hints: Hints) -> None:
        _, hot = await world.open("hot", os.O_RDONLY)
        for _ in range(3):
            await world.read(hot, 0, 40 * P)
        evicted = world.cache.evictions["capacity"]
        inode, number = await world.open("big", os.O_RDONLY)
        await world.fs.xattrs.setxattr(inode, ADVICE, b"noreuse")
        seen = b"".join([await world.read(number, offset, step) for offset in range(0, len(data), step)])
        assert seen == data
        await world.release(number)
        with trio.fail_after(30):
            while world.cache.filling_pages:
                await trio.sleep(0.001)
        assert world.cache.evictions["capacity"] == evicted, "the hot set was not touched"
        assert inode.file is not None and inode.file.resident_pages <= world.files.readahead_max_pages
        assert (world.cache.refaults, world.cache.misses["capacity"]) == (0, 0)

    hinting(tmp_path, test, pages=128, readahead_pages=readahead_pages, blocking=blocking)


def test_what_was_read_once_does_not_leave_before_a_read_that_begins_before_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(8 * P))

    async def test(world: World, hints: Hints) -> None:
        inode, one = await world.open("f", os.O_RDONLY)
        _, other = await world.open("f", os.O_RDONLY)
        for number in (one, other):
            world.files.handles[number].readahead.transient = True
        await world.read(one, P, P)
        assert inode.file is not None
        before = inode.file.page_misses
        await world.read(other, 0, 2 * P)
        assert inode.file.page_misses == before + 1, "the page that both have was read again"

    hinting(tmp_path, test, readahead_pages=0)
