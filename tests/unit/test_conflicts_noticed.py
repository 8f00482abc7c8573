"""What is taken for a change by others beside unwritten data, and what is no conflict."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.cache.page import PAGE_SIZE
from cachefs.setattr import Changes
from world import World, copies, dirty, the_copy

P = PAGE_SIZE


# --- other changes of ours that would hide theirs


@pytest.mark.parametrize("ours", ["utime", "truncate", "O_TRUNC", "chmod", "rename", "link", "setxattr"])
def test_no_change_of_ours_hides_theirs(play: Callable[..., None], tmp_path: Path, ours: str) -> None:
    async def test(world: World) -> None:
        root = world.table.root
        inode, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"theirs")
        match ours:
            case "utime":
                await world.files.setter.setattr(inode, Changes(mtime_ns=10**18), 0)
            case "truncate":
                await world.truncate(inode, 2)
            case "O_TRUNC":
                await world.files.open(inode, os.O_WRONLY | os.O_TRUNC, 0)
            case "chmod":
                await world.files.setter.setattr(inode, Changes(mode=0o600), 0)
            case "rename":
                await world.fs.rename(root, b"file", root, b"renamed", 0)
            case "link":
                await world.fs.link(inode, root, b"linked")
            case "setxattr":
                await world.fs.xattrs.setxattr(inode, b"user.a", b"value")
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"theirs"
        left = {"truncate": b"ou", "O_TRUNC": b""}.get(ours, b"ours")
        assert await world.read(handle, 0, 99) == left
        assert (tmp_path / ("renamed" if ours == "rename" else "file")).read_bytes() == left

    play(test)


def test_a_change_is_noticed_at_the_next_look_and_the_clean_pages_leave_once(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        (tmp_path / "file").write_bytes(b"o" * 4 * P)
        inode, handle = await world.open("file")
        assert await world.read(handle, 0, 4 * P) == b"o" * 4 * P
        await world.files.write(handle, 0, b"ours" * 1024)
        (tmp_path / "file").write_bytes(b"t" * 4 * P)
        await world.files.attributes.refresh(inode)
        assert inode.file is not None and inode.file.resident_pages == 1
        assert await world.read(handle, 0, 4 * P) == b"ours" * 1024 + b"t" * 3 * P
        await world.files.attributes.refresh(inode)
        assert inode.file.resident_pages == 4, "seen already"
        assert world.changed == [inode]
        assert not copies(tmp_path), "a copy is made when there is something to overwrite"

    play(test)


# --- what is no conflict


def test_changes_of_ours_are_never_taken_for_theirs(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        root = world.table.root
        inode, handle = await dirty(world, "file", b"ours")
        async with trio.open_nursery() as nursery:  # side by side with writeback
            for i in range(20):
                nursery.start_soon(world.files.write, handle, i * P, b"x" * 100)
                nursery.start_soon(world.writeback.flush, inode)
                nursery.start_soon(world.files.setter.setattr, inode, Changes(mtime_ns=10**18 + i), 0)
                nursery.start_soon(world.files.setter.setattr, inode, Changes(mode=0o600 + i), 0)
                nursery.start_soon(world.files.attributes.refresh, inode)
                nursery.start_soon(world.truncate, inode, 10 * P + i)
                nursery.start_soon(world.fs.xattrs.setxattr, inode, b"user.a", b"%d" % i)
                nursery.start_soon(world.fs.lookup, root, b"file")
        for i in range(5):
            await world.files.write(handle, 0, b"y" * 100)
            await world.fs.rename(root, b"file", root, b"moved", 0)
            await world.fs.link(inode, root, b"file")
            await world.fs.unlink(root, b"moved")
            await world.files.fsync(handle, bool(i % 2))
        assert not copies(tmp_path) and not world.files.conflicts.total

    play(test)


@pytest.mark.parametrize("operation", ["fstat", "utime", "pwritev", "truncate", "stat"])
@pytest.mark.parametrize("after", range(4))
def test_a_failure_of_the_backing_is_not_taken_for_a_change_of_theirs(
    play: Callable[..., None], tmp_path: Path, operation: str, after: int
) -> None:
    async def test(world: World) -> None:
        inode, handle = await dirty(world, "file", b"ours" * P)
        await world.files.fsync(handle, False)
        await world.files.write(handle, 0, b"OURS")
        world.backing.set_plan([{"op": operation, "errno": "EIO", "after": after, "count": 2}])
        for attempt in range(6):
            for change in (
                lambda: world.files.fsync(handle, False),
                lambda: world.truncate(inode, 3 * P),
                lambda: world.files.setter.setattr(inode, Changes(mtime_ns=10**18), 0),
                lambda: world.files.attributes.refresh(inode),
            ):
                try:
                    await change()
                except OSError as error:
                    assert error.errno == errno.EIO
                await world.files.write(handle, 0, b"%d" % attempt)
        world.backing.set_plan([])
        await world.writeback.flush_all()
        assert not copies(tmp_path) and not world.files.conflicts.total

    play(test)


def test_a_change_of_a_clean_file_is_no_conflict(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        await world.files.fsync(handle, False)
        (tmp_path / "file").write_bytes(b"theirs")
        await world.release(handle)
        _, handle = await world.open("file")
        await world.files.write(handle, 6, b" and ours")
        await world.files.fsync(handle, False)
        assert (tmp_path / "file").read_bytes() == b"theirs and ours" and not copies(tmp_path)

    play(test)


def test_what_leaves_size_and_mtime_alone_is_not_noticed_beside_unwritten_data(play: Callable[..., None], tmp_path: Path) -> None:
    """Without unwritten data ctime tells; beside it every chmod and rename would make a copy if it did."""

    async def test(world: World) -> None:
        (tmp_path / "file").write_bytes(b"old...")
        before = os.stat(tmp_path / "file")
        _, handle = await dirty(world, "file", b"ours", offset=2 * P)
        (tmp_path / "file").write_bytes(b"theirs")
        os.utime(tmp_path / "file", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.chmod(tmp_path / "file", 0o600)
        await world.files.fsync(handle, False)
        assert not copies(tmp_path)
        assert (tmp_path / "file").read_bytes() == b"theirs".ljust(2 * P, b"\0") + b"ours"

    play(test)
