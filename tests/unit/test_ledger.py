"""The ledger over files of a real directory: what is listed and under which name, what sync reaches, what discard gives up."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cachefs import control, ledger
from cachefs.cache import leaving
from cachefs.cache.page import GROUP_PAGES, GROUP_SIZE, PAGE_SIZE
from cachefs.creation import Caller
from cachefs.entries import merged
from cachefs.inode import Inode
from cachefs.ledger import Ledger
from world import World

P = PAGE_SIZE
CALLER = Caller(os.geteuid(), os.getegid(), 0o022)
both = pytest.mark.parametrize("blocking", [False, True])


def over(top: Path, test: Callable[[World, Ledger], Awaitable[None]], **options: Any) -> None:
    """Runs a test in a world where nothing is written back by itself, on a clock that jumps."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, **{"expire_seconds": 3600, "seed": 1, **options})
            await test(world, Ledger(world.fs))
            world.check()
            world.backing.set_plan([])
            assert await world.writeback.flush_all() == []
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def make(world: World, path: str, data: bytes = b"") -> tuple[Inode, int]:
    """A new file with unwritten data, in directories that are made as needed; its inode and a handle."""
    parent = world.table.root
    *above, name = path.encode().split(b"/")
    for part in above:
        try:
            parent = await world.fs.lookup(parent, part)
        except FileNotFoundError:
            parent = await world.fs.creation.mkdir(parent, part, 0o755, CALLER)
    inode, opened = await world.fs.creation.create(parent, name, 0o100644, os.O_RDWR | os.O_CREAT, CALLER)
    if data:
        await world.files.write(opened.number, 0, data)
    return inode, opened.number


def listed(book: Ledger, path: bytes = b"") -> list[tuple[object, ...]]:
    entries = merged(entry for part in book.parts(path=path) for entry in part)
    return sorted((entry["path"] or "", entry["offset"], entry["length"]) for entry in entries)


async def fails(world: World, inode: Inode, name: str = "EIO") -> None:
    """One try to write the file fails."""
    world.backing.set_plan([{"op": "pwritev", "errno": name}])
    with pytest.raises(OSError):
        await world.writeback.flush(inode)


# --- the list


@both
def test_each_unwritten_extent_is_listed_once_with_age_tries_and_error(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World, book: Ledger) -> None:
        inode, handle = await make(world, "d/file", b"x" * 5000)
        await world.files.write(handle, 10 * P, b"y" * 100)
        await trio.sleep(2)
        await make(world, "young", b"z")
        assert listed(book) == [("d/file", 0, 2 * P), ("d/file", 10 * P, 100), ("young", 0, 1)]
        old, *_, young = merged(entry for part in book.parts() for entry in part)
        assert (old["age_seconds"], old["tries"], old["error"], old["next_try_seconds"]) == (2, 0, None, 3598)
        assert young["age_seconds"] == 0
        await fails(world, inode, "EDQUOT")
        await trio.sleep(0.2)
        failing, *_ = merged(entry for part in book.parts() for entry in part)
        assert (failing["age_seconds"], failing["tries"], failing["error"]) == (2.2, 1, "EDQUOT")
        assert 0 < failing["next_try_seconds"] <= 0.3
        assert failing["inode"] == inode.node
        await fails(world, inode)
        assert {entry["tries"] for part in book.parts([inode]) for entry in part} == {2}
        world.backing.set_plan([])
        await world.writeback.flush(inode)
        assert listed(book) == [("young", 0, 1)]

    over(tmp_path, main, blocking=blocking)


def test_names_are_those_of_now_and_a_path_selects_what_is_below_it(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        for path in ("a/b/one", "a/two", "ab/three"):
            await make(world, path, b"x")
        assert [entry[0] for entry in listed(book)] == ["a/b/one", "a/two", "ab/three"]
        assert [entry[0] for entry in listed(book, b"a")] == ["a/b/one", "a/two"]
        assert [entry[0] for entry in listed(book, b"a/two")] == ["a/two"]
        assert listed(book, b"a/tw") == listed(book, b"none") == []
        root = world.table.root
        await world.fs.rename(root, b"a", root, b"new", 0)
        assert [entry[0] for entry in listed(book, b"new/b")] == ["new/b/one"]
        assert listed(book, b"a") == []

    over(tmp_path, main)


def test_hard_links_are_one_file_under_each_name(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        inode, _ = await make(world, "a/one", b"x")
        await make(world, "b/other")
        directory = await world.fs.lookup(world.table.root, b"b")
        await world.fs.link(inode, directory, b"two")
        assert listed(book) == listed(book, b"b") == listed(book, b"b/two") == [("a/one", 0, 1)]

    over(tmp_path, main)


def test_what_is_removed_is_not_to_be_written_and_not_listed(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        await make(world, "file", b"x")
        await world.fs.unlink(world.table.root, b"file")
        assert listed(book) == []

    over(tmp_path, main)


def test_a_file_whose_name_is_no_longer_known_is_listed_without_one(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        inode, _ = await make(world, "file", b"x")
        world.table.unname(inode, world.table.root, b"file")
        (entry,) = [entry for part in book.parts() for entry in part]
        assert (entry["path"], entry["inode"], entry["length"]) == (None, inode.node, 1)
        assert listed(book, b"file") == []

    over(tmp_path, main)


def test_pages_in_writeback_are_not_there_yet(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        inode, _ = await make(world, "file", b"x" * 3 * P)
        assert inode.file is not None
        batch = world.writeback.take_batch(inode.file, 0)
        assert not inode.file.dirty_pages and listed(book) == [("file", 0, 3 * P)]
        for _, _, pages in batch:
            for group, mask in pages:
                world.cache.finish_writeback(group, mask, 0.0)

    over(tmp_path, main)


def test_a_hundred_thousand_extents_are_made_in_parts_of_a_few_milliseconds(tmp_path: Path) -> None:
    """CPU time of one part, encoded: that is how long requests may have to wait for it."""
    extents = 100_000

    async def main(world: World, book: Ledger) -> None:
        inode, _ = await make(world, "file")
        assert inode.file is not None
        for start in range(0, 2 * extents * P, GROUP_SIZE):  # every second page
            for page in range(0, GROUP_PAGES, 2):
                if start // P + page < 2 * extents:
                    world.cache.write(inode.file, start + page * P, b"x")
        world.writeback.note(inode)
        durations, found, parts = [], 0, book.parts()
        begin = time.thread_time()
        for part in parts:
            control.encode({"unwritten": part})
            durations.append(time.thread_time() - begin)
            found += len(part)
            begin = time.thread_time()
        assert found == extents
        assert sorted(durations)[-3] < 0.02, sorted(durations)[-5:]  # the collector of garbage may come in between
        leaving.give_up(world.cache, inode.file)

    over(tmp_path, main, pages=300_000, limit_pages=200_000)


def test_a_file_with_many_clean_groups_is_looked_at_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SLICE_SECONDS", 0.0)

    async def main(world: World, book: Ledger) -> None:
        inode, handle = await make(world, "file", b"x")
        assert inode.file is not None
        await world.files.setter.truncate(inode, 500 * GROUP_SIZE, 0, frozenset())
        for group in range(1, 200):
            await world.read(handle, group * GROUP_SIZE, 1)
        inode.file.writeback_pages += 1  # as if some were on their way: all groups are looked at
        parts = list(book.parts())
        inode.file.writeback_pages -= 1
        assert len(parts) >= 200 // ledger.LOOKS_AT_ONCE
        assert sum(map(len, parts)) == 1

    over(tmp_path, main, pages=1024)


# --- sync


@both
def test_sync_reaches_what_is_at_or_below_and_nothing_else(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World, book: Ledger) -> None:
        for path in ("a/one", "a/b/two", "c/three"):
            await make(world, path, path.encode())
        async with book.selecting(b"a/b") as (inodes, tree):
            assert tree and await book.sync(inodes, tree) == ([], [])
        assert [(tmp_path / path).read_bytes() for path in ("a/b/two", "a/one", "c/three")] == [b"a/b/two", b"", b""]
        async with book.selecting(b"a/one") as (inodes, tree):
            assert not tree and await book.sync(inodes, tree) == ([], [])
        assert [(tmp_path / path).read_bytes() for path in ("a/one", "c/three")] == [b"a/one", b""]
        async with book.selecting(b"") as (inodes, tree):
            assert tree and await book.sync(inodes, tree) == ([], [])
        assert (tmp_path / "c/three").read_bytes() == b"c/three"

    over(tmp_path, main, blocking=blocking)


def test_a_hard_link_with_names_that_are_not_known_is_synced_with_any_directory(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        await make(world, "a/one", b"x")
        await make(world, "b/other")
        os.link(tmp_path / "a" / "one", tmp_path / "b" / "two")
        inode = await world.fs.lookup(await world.fs.lookup(world.table.root, b"a"), b"one")
        assert inode.st.st_nlink == 2 and len(inode.names) == 1
        async with book.selecting(b"b") as (inodes, tree):
            await book.sync(inodes, tree)
        assert (tmp_path / "b" / "two").read_bytes() == b"x"

    over(tmp_path, main)


@both
def test_a_file_that_is_clean_is_made_durable_all_the_same(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World, book: Ledger) -> None:
        inode, _ = await make(world, "d/file", b"x")
        await world.writeback.flush(inode)
        world.backing.calls.clear()
        async with book.selecting(b"d/file") as (inodes, tree):
            await book.sync(inodes, tree)
        assert world.backing.calls["fsync"] == 1 and not world.backing.calls["syncfs"]
        await world.files.write(1, 0, b"y")
        await world.writeback.flush(inode)
        world.backing.calls.clear()
        for _ in range(2):
            async with book.selecting(b"d") as (inodes, tree):
                await book.sync(inodes, tree)
        assert world.backing.calls["syncfs"] == 2
        assert world.backing.calls["fsync"] == blocking, "one that does not pass syncfs on is asked for the file, once"

    over(tmp_path, main, blocking=blocking)


@both
def test_sync_returns_what_could_not_be_written_and_what_not_be_made_durable(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World, book: Ledger) -> None:
        bad, _ = await make(world, "bad", b"x")
        good, handle = await make(world, "good", b"x")
        world.backing.set_plan([{"op": "pwritev", "errno": "EIO", "count": 1}])
        async with book.selecting(b"") as (inodes, tree):
            failed, undurable = await book.sync(inodes, tree)
        assert (len(failed), undurable) == (1, [])
        world.backing.set_plan([{"op": "fsync", "errno": "EIO"}])
        async with book.selecting(b"good") as (inodes, tree):
            assert await book.sync(inodes, tree) == ([], [good])
        with pytest.raises(OSError, match="Input/output error"):
            await world.files.flush(handle)
        world.backing.set_plan([{"op": "syncfs", "errno": "EIO"}])
        async with book.selecting(b"") as (inodes, tree):
            with pytest.raises(OSError, match="Input/output error"):
                await book.sync(inodes, tree)
        assert not bad.unwritten and not good.unwritten
        if blocking:
            assert good in world.files.data.unsynced, "the next sync asks again"

    over(tmp_path, main, blocking=blocking)


def test_paths_that_are_none(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        await make(world, "d/file", b"x")
        os.symlink("d", tmp_path / "link")
        for path, number in (
            (b"none", errno.ENOENT), (b"d/file/x", errno.ENOTDIR), (b"..", errno.EINVAL), (b"d/../..", errno.EINVAL),
            (b"link/file", errno.ENOTDIR),
        ):  # fmt: skip
            with pytest.raises(OSError) as caught:
                async with book.selecting(path):
                    pass
            assert caught.value.errno == number, path
        async with book.selecting(b"link") as (inodes, tree):
            assert (inodes, tree) == ([], False)
        assert [inode.lookups for inode in world.table] == [1, 1, 1], "looking left nothing behind"

    over(tmp_path, main)


# --- discard


@both
def test_discard_gives_up_what_is_dirty_and_shows_what_the_backing_has(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World, book: Ledger) -> None:
        (tmp_path / "file").write_bytes(b"o" * (3 * P + 10))
        os.utime(tmp_path / "file", ns=(5, 1_000_000_007))
        inode, handle = await world.open("file")
        assert await world.read(handle, 0, 99) == b"o" * 99
        await world.files.write(handle, P + 5, b"new")
        await world.files.write(handle, 10 * P, b"n" * 100)
        other, _ = await make(world, "other", b"stays")
        before = inode.attributes()
        assert (before.size, before.mtime_ns) == (10 * P + 100, inode.mtime_ns)
        world.backing.set_plan([{"op": "pwritev", "errno": "EIO"}])
        with pytest.raises(OSError):
            await world.files.fsync(handle, False)
        os.utime(tmp_path / "file", ns=(5, 1_000_000_007))
        assert book.find_unwritten(b"file") == [inode]
        assert await world.files.durability.discard_unwritten(inode) == P + 100
        assert not inode.unwritten and inode not in world.writeback.dirty and not inode.tries
        after = inode.attributes()
        assert (after.size, after.mtime_ns) == (3 * P + 10, 1_000_000_007)
        assert after.ctime_ns >= before.ctime_ns, "the contents have changed"
        assert await world.read(handle, 0, 99 * P) == b"o" * (3 * P + 10)
        assert world.changed[-1] is inode
        assert other.unwritten and book.find_unwritten(b"file") == []
        assert await world.files.durability.discard_unwritten(inode) == 0
        world.backing.set_plan([])
        await world.files.write(handle, P, b"again")
        await world.files.fsync(handle, False)
        assert (tmp_path / "file").read_bytes() == b"o" * P + b"again" + b"o" * (2 * P + 5)

    over(tmp_path, main, blocking=blocking)


@both
def test_discard_of_a_new_file_leaves_the_empty_one_that_the_backing_has(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World, book: Ledger) -> None:
        inode, handle = await make(world, "file", b"x" * 5000)
        await fails(world, inode)
        await world.release(handle)
        assert await world.files.durability.discard_unwritten(inode) == 5000
        assert inode.attributes().size == 0 and inode.reader == inode.writer == -1
        assert (tmp_path / "file").read_bytes() == b""

    over(tmp_path, main, blocking=blocking)


def test_discard_works_while_the_backing_cannot_be_looked_at(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        (tmp_path / "file").write_bytes(b"old")
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"newer")
        world.backing.set_plan([{"op": "*", "errno": "ESTALE"}])
        with pytest.raises(OSError):
            await world.writeback.flush(inode)
        assert await world.files.durability.discard_unwritten(inode) == 5
        assert inode.attributes().size == 3

    over(tmp_path, main)


def test_discard_waits_for_a_batch_under_way_and_writes_that_came_meanwhile_go_too(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        inode, handle = await make(world, "file", b"a" * P)
        discarded: list[int] = []

        async def discard() -> None:
            discarded.append(await world.files.durability.discard_unwritten(inode))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.writeback.flush, inode)
            while not world.cache.writeback_pages:
                await trio.lowlevel.checkpoint()
            await world.files.write(handle, 0, b"b" * P)  # redirtied
            nursery.start_soon(discard)
        assert inode.attributes().size == P
        # Of a page that changes while a thread writes it, the backing may have either.
        assert await world.read(handle, 0, P) == (tmp_path / "file").read_bytes() != b""
        assert discarded == [P] and not inode.unwritten

    over(tmp_path, main, blocking=True)


def test_discard_of_a_file_that_others_changed_shows_theirs(tmp_path: Path) -> None:
    async def main(world: World, book: Ledger) -> None:
        (tmp_path / "file").write_bytes(b"o" * 3 * P)
        inode, handle = await world.open("file")
        assert await world.read(handle, 2 * P, P) == b"o" * P
        await world.files.write(handle, 0, b"ours")
        (tmp_path / "file").write_bytes(b"t" * 4 * P)
        assert await world.files.durability.discard_unwritten(inode) == P
        assert await world.read(handle, 0, 9 * P) == b"t" * 4 * P

    over(tmp_path, main)
