"""Files that others removed or replaced while we had written to them, where their copies lie, and what these are called."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.page import PAGE_SIZE
from cachefs.copies import conflict_name, cut
from world import CALLER, World, copies, dirty, the_copy

P = PAGE_SIZE
WHEN = 1_795_000_000.0


# --- removed or replaced


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_lost_its_name_to_others_lives_on_under_another(
    play: Callable[..., None], tmp_path: Path, replaced: bool
) -> None:
    async def test(world: World) -> None:
        (tmp_path / "file").write_bytes(b"o" * 3 * P)
        inode, handle = await world.open("file")
        await world.files.write(handle, P, b"ours" * 1024)
        if replaced:
            (tmp_path / "new").write_bytes(b"theirs")
            (tmp_path / "new").rename(tmp_path / "file")
        else:
            (tmp_path / "file").unlink()
        await world.files.fsync(handle, False)
        ours = b"o" * P + b"ours" * 1024 + b"o" * P
        assert the_copy(tmp_path) == ours == await world.read(handle, 0, 4 * P)
        assert not replaced or (tmp_path / "file").read_bytes() == b"theirs"
        await world.files.write(handle, 0, b"and more")
        await world.truncate(inode, 2 * P)
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"and more" + ours[8 : 2 * P], "there is one copy, and it is what programs have open"
        assert world.files.conflicts.statistics().recent[0].kept == "ours"
        (name,) = copies(tmp_path)
        assert await world.fs.lookup(world.table.root, name.encode()) is inode
        assert (world.table.root, b"file") in world.gone
        await world.release(handle)
        assert (await world.open(name))[0] is inode

    play(test)


def test_what_was_removed_while_it_was_written_is_not_lost(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        backing: Any = world.backing.inner
        real = backing.pwritev

        def pwritev(*args: Any) -> int:
            (tmp_path / "file").unlink(missing_ok=True)
            nbytes: int = real(*args)
            return nbytes

        backing.pwritev = pwritev
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"ours"

    play(test)


def test_a_file_that_we_removed_is_gone(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        for number, remove in enumerate((world.fs.unlink, None)):
            _, handle = await dirty(world, f"file{number}", b"ours")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.writeback.flush_all)
                if remove is not None:
                    nursery.start_soon(remove, world.table.root, b"file0")
                else:
                    await dirty(world, "other", b"other")
                    nursery.start_soon(world.fs.rename, world.table.root, b"other", world.table.root, b"file1", 0)
            await world.files.write(handle, 0, b"more")
            await world.files.fsync(handle, False)
            await world.release(handle)
        await world.writeback.flush_all()
        assert not copies(tmp_path) and not world.files.conflicts.total
        assert [path.name for path in tmp_path.iterdir()] == ["file1"] and (tmp_path / "file1").read_bytes() == b"other"

    for seed in range(30):  # the name may be gone before we have heard that our unlink is done
        play(test, seed=seed)
        (tmp_path / "file1").unlink()


def test_a_hard_link_that_is_left_gets_ours(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        os.link(tmp_path / "file", tmp_path / "link")
        (tmp_path / "file").unlink()
        await world.files.fsync(handle, False)
        assert not copies(tmp_path) and (tmp_path / "link").read_bytes() == b"ours"

    play(test)


def test_a_copy_lies_beside_a_name_that_the_file_has(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await world.open("first")
        await world.fs.link(inode, world.table.root, b"second")
        await world.files.write(handle, 0, b"ours")
        (tmp_path / "first").unlink()
        (tmp_path / "first").write_bytes(b"another file")
        (tmp_path / "second").write_bytes(b"theirs")
        await world.files.fsync(handle, False)
        ((name, contents),) = copies(tmp_path).items()
        assert name.startswith("second.conflict-") and contents == b"theirs"

    play(test)


@pytest.mark.parametrize("depth", [1, 3])
def test_where_the_directory_is_gone_the_copy_lies_above(play: Callable[..., None], tmp_path: Path, depth: int) -> None:
    async def test(world: World) -> None:
        parent, path = world.table.root, tmp_path
        for level in range(3):
            parent = await world.fs.creation.mkdir(parent, b"d%d" % level, 0o755, CALLER)
            path = path / f"d{level}"
        inode, opened = await world.fs.creation.create(parent, b"file", 0o100644, os.O_RDWR, CALLER)
        await world.files.write(opened.number, 0, b"ours")
        path.joinpath("file").unlink()
        for _ in range(depth):
            path.rmdir()
            path = path.parent
        await world.files.fsync(opened.number, False)
        ((copy, contents),) = ((path, path.read_bytes()) for path in tmp_path.rglob("*.conflict-*"))
        assert contents == b"ours" and copy.parent == path
        assert list(inode.names) == [next(iter(inode.names))] and world.table.path_in(*next(iter(inode.names))) == os.fsencode(
            copy.relative_to(tmp_path)
        )

    play(test)


def test_a_file_without_a_name_for_which_there_is_no_room_stays_dirty(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").unlink()
        world.backing.set_plan([{"op": "open", "errno": "ENOSPC"}])
        with pytest.raises(OSError):
            await world.files.fsync(handle, False)
        assert inode.unwritten and await world.read(handle, 0, 9) == b"ours"
        world.backing.set_plan([])
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"ours"

    play(test)


def test_a_store_that_counts_no_links_has_no_conflicts_for_it(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        backing: Any = world.backing.inner
        real_fstat, real_stat = backing.fstat, backing.stat

        def without_links(found: os.stat_result) -> os.stat_result:
            names = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks")
            return os.stat_result((*found[:3], 0, *found[4:]), {name: getattr(found, name) for name in names})

        backing.fstat = lambda fd: without_links(real_fstat(fd))
        backing.stat = lambda dirfd, name: without_links(real_stat(dirfd, name))
        _, handle = await dirty(world, "file", b"ours")
        await world.files.fsync(handle, False)
        assert not copies(tmp_path)
        await world.files.write(handle, 0, b"OURS")
        (tmp_path / "file").write_bytes(b"theirs")
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"theirs" and (tmp_path / "file").read_bytes() == b"OURS"

    play(test)


# --- names


def test_a_copy_is_named_after_the_file_and_the_time() -> None:
    name = conflict_name(b"report.txt", WHEN, 1, 255)
    assert name.startswith(b"report.txt.conflict-2026") and len(name) == len(b"report.txt.conflict-20261122-153000")
    assert conflict_name(b"report.txt", WHEN, 7, 255) == name + b"-7"


@given(st.binary(min_size=1, max_size=255), st.integers(1, 99_999), st.integers(60, 255))
def test_a_name_is_never_too_long(name: bytes, number: int, longest: int) -> None:
    assert len(conflict_name(name, WHEN, number, longest)) <= longest


@given(st.text(min_size=1, max_size=255), st.integers(4, 255))
def test_cutting_leaves_whole_characters(text: str, nbytes: int) -> None:
    name = text.encode("utf-8", "surrogatepass")[:255]
    if name.decode("utf-8", "ignore").encode() == name:
        kept = cut(name, nbytes).decode()
        assert kept == text or (text.startswith(kept) and len(kept.encode()) > nbytes - 4)


def test_long_names_and_taken_ones(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        long = "ä" * 127
        for round in range(3):
            for name in (long, long[:-1] + "xy"):
                _, handle = await world.open(name)
                await world.files.write(handle, 0, b"ours")
                (tmp_path / name).write_bytes(b"theirs %d" % round)
                await world.files.fsync(handle, False)
        assert sorted(copies(tmp_path).values()) == sorted(b"theirs %d" % round for round in range(3) for _ in "ab")
        assert all(len(os.fsencode(name)) <= 255 for name in copies(tmp_path))

    play(test)


def test_descriptors_are_given_back(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for i in range(10):
            _, handle = await dirty(world, "file", b"ours")
            if i % 2:
                (tmp_path / "file").unlink()
            else:
                (tmp_path / "file").write_bytes(b"theirs")
            await world.files.fsync(handle, False)
            await world.release(handle)
        assert len(os.listdir("/proc/self/fd")) - before <= 1 + len(world.descriptors)
        assert world.files.data.count == 0

    play(test)
