"""Settings of a live mount: what may be asked, and what becomes of limits, pages and those who wait."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from backing.directory import DirectoryBacking
from backing.faulty import FaultyBacking
from cachefs.cache.page import PAGE_SIZE
from cachefs.config import Config, changed, make_config
from cachefs.creation import Caller
from cachefs.errors import CachefsError, UsageError
from cachefs.settings import Settings
from cachefs.stack import Stack

P, MIB = PAGE_SIZE, 1 << 20
CALLER = Caller(os.geteuid(), os.getegid(), 0o022)


def config(**options: str) -> Config:
    return make_config("/srv", "/mnt", {"cache_size": "4M", **options}, memory_bytes=64 * MIB)


# --- what may be asked


def test_limits_keep_their_share_of_the_cache() -> None:
    old = config(dirty_limit="1M", dirty_background="512K", pin_limit="50%")
    new = changed(old, {"cache_size": "8M"}, 64 * MIB)
    assert (new.cache_size_bytes, new.dirty_limit_bytes, new.dirty_background_bytes, new.pin_limit_bytes) == (
        8 * MIB, 2 * MIB, MIB, 4 * MIB,
    )  # fmt: skip
    assert changed(new, {"cache_size": "4M"}, 64 * MIB) == old
    tiny = changed(old, {"cache_size": "64K"}, 64 * MIB)
    assert (tiny.dirty_limit_bytes, tiny.pin_limit_bytes) == (16 << 10, 32 << 10)


def test_the_limit_of_unwritten_data_stays_below_half_the_journal() -> None:
    old = config(journal_size="4M")
    assert changed(old, {"cache_size": "32M"}, 64 * MIB).dirty_limit_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kernel_cache": "off"}, "^kernel-cache cannot be set while mounted, only cache-size, policy, pin-limit$"),
        ({"polcy": "lru"}, "did you mean policy"),
        ({"policy": "fifo"}, "'fifo' is not one of"),
        ({"cache_size": "1K"}, "is below 16 pages"),
        ({"cache_size": "65M"}, "is more than the memory there is"),
        ({"cache_size": "much"}, "is not a size"),
        ({"pin_limit": "90%"}, "leaves too little of the cache: give at most 2.5 MiB"),
    ],
)
def test_what_cannot_be_set_is_one_line(settings: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        changed(config(), settings, 64 * MIB)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 2 * MIB), ({"dirty_limit": "50%"}, 3 * MIB // 2), ({"pin_limit": "0"}, 0), ({"pin_limit": "1M"}, MIB)],
)
def test_pins_leave_room_for_unwritten_data_and_others(options: dict[str, str], limit: int) -> None:
    assert config(**options).pin_limit_bytes == limit


def test_a_limit_of_pins_that_is_asked_for_is_refused_where_it_leaves_no_room() -> None:
    with pytest.raises(UsageError, match="leaves too little of the cache"):
        config(pin_limit="50%", dirty_limit="50%")


# --- what becomes of it


def in_stack(tmp_path: Path, test: Callable[[Stack, Settings, list[Config]], Awaitable[None]]) -> None:
    source = tmp_path / "source"
    source.mkdir()

    async def run() -> None:
        seen: list[Config] = []
        async with trio.open_nursery() as nursery:
            settings = make_config(str(source), str(tmp_path / "mnt"), {"cache_size": "1M", "metrics": "off"})
            backing = FaultyBacking(DirectoryBacking(source))
            stack = Stack(settings, backing, nursery, lambda inode: None, lambda parent, name: None)
            nursery.start_soon(stack.writeback.run)
            nursery.start_soon(stack.pins.run)
            await test(stack, Settings(stack, seen.append), seen)
            stack.check()
            nursery.cancel_scope.cancel()

    trio.run(run)


def to(**settings: str) -> Callable[[Config], Config]:
    return lambda config: changed(config, settings, 64 * MIB)


async def write(stack: Stack, pages: int) -> int:
    """A file with so many dirty pages; its handle."""
    _, opened = await stack.fs.creation.create(stack.table.root, b"f", 0o100644, os.O_RDWR, CALLER)
    await stack.files.write(opened.number, 0, b"x" * pages * P)
    return opened.number


def test_a_cache_grows_at_once_and_shrinks_when_unwritten_data_is_written(tmp_path: Path) -> None:
    async def test(stack: Stack, settings: Settings, seen: list[Config]) -> None:
        await settings.apply(to(cache_size="2M", policy="sieve"))
        statistics = stack.statistics("off", {}, 0.0)
        assert (stack.cache.capacity_pages, statistics.policy, stack.writeback.limit_pages) == (512, "sieve", 128)
        number = await write(stack, 100)
        await settings.apply(to(cache_size="64K"))
        assert stack.cache.capacity_pages == 16 >= stack.cache.resident_pages
        assert stack.writeback.limit_pages == stack.cache.dirty_limit_pages == 4
        assert (tmp_path / "source" / "f").stat().st_size == 100 * P
        await stack.files.write(number, 0, b"y" * 20 * P)
        assert [config.cache_size_bytes for config in seen] == [2 * MIB, 64 << 10] and stack.config is seen[-1]
        assert stack.files.readahead_max_pages == 2
        await stack.files.release(number)
        await stack.writeback.flush_all()

    in_stack(tmp_path, test)


def test_a_cache_that_cannot_shrink_stays_as_it_is(tmp_path: Path) -> None:
    async def test(stack: Stack, settings: Settings, seen: list[Config]) -> None:
        number = await write(stack, 60)
        assert isinstance(stack.io.backing, FaultyBacking)
        stack.io.backing.set_plan([{"op": "pwritev", "errno": "ENOSPC"}])
        with trio.fail_after(30), pytest.raises(CachefsError, match=r"cannot be written .No space left on device.$"):
            await settings.apply(to(cache_size="64K"))
        assert (stack.cache.capacity_pages, stack.writeback.limit_pages, seen) == (256, 64, [])
        stack.io.backing.set_plan([])
        await stack.files.release(number)
        await stack.writeback.flush_all()

    in_stack(tmp_path, test)


def test_pins_must_fit_into_what_is_asked_for(tmp_path: Path) -> None:
    async def test(stack: Stack, settings: Settings, seen: list[Config]) -> None:
        await stack.pins.add([(b"f", 100 * P)])
        for impossible in ({"cache_size": "512K"}, {"pin_limit": "300K"}):
            with pytest.raises(CachefsError, match=r"^pins take 400 KiB, and could take no more than"):
                await settings.apply(to(**impossible))
        await settings.apply(to(pin_limit="600K"))
        assert stack.cache.pin_limit_pages == 150
        with pytest.raises(CachefsError, match=r"^this mount's cache can grow to"):
            await settings.apply(lambda config: changed(config, {"cache_size": "1T"}, 1 << 60))
        await stack.pins.remove([b""])

    in_stack(tmp_path, test)
