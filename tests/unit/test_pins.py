"""Pins: they name paths, follow what is found there, outlive the mount, and keep to their limit."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.cache.page import PAGE_SIZE
from cachefs.errors import CachefsError
from cachefs.pins import LOOK_SECONDS, Pins
from world import World

P = PAGE_SIZE


@asynccontextmanager
async def pinning(top: Path, store: Path | None, **options: object) -> AsyncIterator[tuple[World, Pins]]:
    """A world of 64 pages that looks after its pins."""
    top.mkdir(exist_ok=True)
    async with trio.open_nursery() as nursery:
        world = World(nursery, top, **options)  # type: ignore[arg-type]
        world.cache.pin_limit_pages = 32
        pins = Pins(world.fs, None if store is None else str(store))
        pins.load()
        nursery.start_soon(pins.run)
        await trio.testing.wait_all_tasks_blocked()
        yield world, pins
        world.check()
        await pins.remove([b""])
        await world.shut()
        nursery.cancel_scope.cancel()


def simulated(test: Callable[[], Awaitable[None]]) -> None:
    """Runs a test in which time passes when everybody waits."""
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


async def settled(pins: Pins) -> None:
    """Returns when all pins have been looked at from now on."""
    for _ in range(2):
        pins.kick()
        await pins.looked.park()


async def misses_of(world: World, name: str, pages: int) -> int:
    """Misses of reading the first pages of a file."""
    _, number = await world.open(name, os.O_RDONLY)
    before = world.cache.accounts.total("page_misses")
    for page in range(pages):
        await world.read(number, page * P, P)
    await world.release(number)
    return world.cache.accounts.total("page_misses") - before


@pytest.mark.parametrize("policy", ["lru", "sieve", "s3fifo"])
def test_a_pinned_file_takes_no_miss_in_1000_seconds_of_pressure_nor_after_a_remount(tmp_path: Path, policy: str) -> None:
    top, store = tmp_path / "top", tmp_path / "pins.json"
    top.mkdir()
    (top / "pinned").write_bytes(os.urandom(20 * P))
    (top / "big").write_bytes(os.urandom(500 * P))

    async def pressure(world: World, seconds: int) -> None:
        rng = random.Random(1)
        _, big = await world.open("big", os.O_RDONLY)
        for _ in range(seconds):
            for _ in range(20):
                await world.read(big, rng.randrange(500) * P, P)
            assert await misses_of(world, "pinned", 20) == 0
            await trio.sleep(1)
        assert world.cache.evictions["capacity"] > 10 * seconds
        await world.release(big)

    async def test() -> None:
        async with pinning(top, store, policy=policy, readahead_pages=0) as (world, pins):
            await pins.add([(b"pinned", 20 * P)])
            await settled(pins)
            await pressure(world, 1000)
            kept = store.read_bytes()
        store.write_bytes(kept)  # the end of this world has taken its pins away
        async with pinning(top, store, policy=policy, readahead_pages=0) as (world, pins):
            await settled(pins)
            await pressure(world, 50)

    simulated(test)


def test_a_pin_follows_what_is_found_at_its_path(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()

    async def test() -> None:
        async with pinning(top, None) as (world, pins):
            await pins.add([(b"f", 3 * P)])
            await settled(pins)
            assert pins.pins[b"f"].state == "no such file"
            first, number = await world.open("f")
            await world.files.write(number, 0, b"1" * 3 * P)
            await settled(pins)
            assert (pins.pins[b"f"].state, pins.pins[b"f"].inode, world.cache.pinned_pages) == ("", first, 3)
            second, other = await world.open("new")
            await world.files.write(other, 0, b"2" * 5 * P)
            await world.fs.rename(world.table.root, b"new", world.table.root, b"f", 0)  # as editors save
            for handle in (number, other):
                await world.release(handle)
            world.fs.forget(first.node, first.lookups)
            await settled(pins)
            assert pins.pins[b"f"].inode is second and second.file is not None and second.file.pinned
            assert first not in list(world.table), "nobody needs the old one"
            assert (world.cache.pinned_pages, pins.of(second)) == (5, [b"f"])
            await world.writeback.flush_all()

    simulated(test)


def test_a_pinned_file_that_was_changed_in_source_is_read_again_within_a_look(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "f").write_bytes(b"1" * 8 * P)

    async def test() -> None:
        async with pinning(top, None) as (world, pins):
            await pins.add([(b"f", 8 * P)])
            await settled(pins)
            (top / "f").write_bytes(b"2" * 10 * P)
            await trio.sleep(LOOK_SECONDS + 1)
            assert world.cache.pinned_pages == 10 and world.changed
            assert await misses_of(world, "f", 10) == 0
            _, number = await world.open("f")
            assert await world.read(number, 0, 10 * P) == b"2" * 10 * P
            await world.release(number)

    simulated(test)


def test_a_file_that_cannot_be_read_is_read_later(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "f").write_bytes(b"1" * 8 * P)

    async def test() -> None:
        async with pinning(top, None) as (world, pins):
            world.backing.set_plan([{"op": "preadv", "errno": "EIO"}])
            await pins.add([(b"f", 8 * P)])
            await settled(pins)
            assert pins.pins[b"f"].state == os.strerror(errno.EIO) and world.cache.pinned_pages == 0
            world.backing.set_plan([])
            await trio.sleep(LOOK_SECONDS + 1)
            assert pins.pins[b"f"].state == "" and world.cache.pinned_pages == 8

    simulated(test)


def test_pins_beyond_the_limit_are_refused_and_files_that_grow_beyond_it_let_go(tmp_path: Path) -> None:
    top, store = tmp_path / "top", tmp_path / "pins.json"
    top.mkdir()
    for name in ("a", "b", "c"):
        (top / name).write_bytes(b"x" * 16 * P)

    async def test() -> None:
        async with pinning(top, store, pages=128) as (world, pins):
            await pins.add([(b"a", 16 * P), (b"b", 16 * P)])
            with pytest.raises(CachefsError, match=r"^pins would take 192 KiB, more than --pin-limit 128 KiB: nothing was"):
                await pins.add([(b"c", 16 * P)])
            assert list(pins.pins) == [b"a", b"b"] == [os.fsencode(p) for p in json.loads(store.read_text())["paths"]]
            await settled(pins)
            _, number = await world.open("a")
            await world.files.write(number, 16 * P, b"y" * P)
            await settled(pins)
            assert (pins.pins[b"a"].state, pins.pins[b"b"].state) == ("", "over --pin-limit")
            assert world.cache.pinned_pages == 17
            await world.truncate(world.files.handles[number].inode, 16 * P)
            await settled(pins)
            assert pins.pins[b"b"].state == "" and world.cache.pinned_pages == 32
            await world.release(number)

    simulated(test)


def test_pins_are_removed_with_what_is_below(tmp_path: Path) -> None:
    store = tmp_path / "pins.json"

    async def test() -> None:
        async with pinning(tmp_path / "top", store) as (_, pins):
            await pins.add([(b"d/\xff", 0), (b"d/e/f", 0), (b"dd", 0)])
            assert [os.fsencode(path) for path in json.loads(store.read_text())["paths"]] == [b"d/\xff", b"d/e/f", b"dd"]
            assert await pins.remove([b"d"]) == 2
            assert await pins.remove([b"d"]) == 0
            assert list(pins.pins) == [b"dd"] and json.loads(store.read_text())["paths"] == ["dd"]

    simulated(test)


def test_what_cannot_be_stored_is_not_pinned(tmp_path: Path) -> None:
    async def test() -> None:
        async with pinning(tmp_path / "top", tmp_path / "none" / "pins.json") as (_, pins):
            with pytest.raises(CachefsError, match=r"^pins cannot be stored in .*: No such file or directory$"):
                await pins.add([(b"f", 0)])
            assert not pins.pins
            pins.store = None

    simulated(test)


def test_many_pins_at_once_are_stored_with_few_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    monkeypatch.setattr("cachefs.pins._store", lambda path, text: writes.append(text))

    async def test() -> None:
        async with pinning(tmp_path / "top", tmp_path / "pins.json") as (_, pins), trio.open_nursery() as nursery:
            for i in range(100):
                nursery.start_soon(pins.add, [(b"f%d" % i, 0)])
        assert len(writes) < 10 and len(json.loads(writes[-2])["paths"]) == 100

    trio.run(test)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "paths": []}', '{"version": 1, "paths": [3]}'])
def test_a_store_that_makes_no_sense_is_none(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    store = tmp_path / "pins.json"
    store.write_text(text)

    async def test() -> None:
        async with pinning(tmp_path / "top", store) as (_, pins):
            assert not pins.pins

    simulated(test)
    assert "cannot be read" in caplog.text
