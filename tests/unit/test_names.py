"""Paths of inodes and inodes of paths, whatever has been renamed, linked and removed."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from cachefs.inode import Inode
from cachefs.names import files_below, paths_of
from world import CALLER, World


def with_world(top: Path, test: Callable[[World], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, **options)  # type: ignore[arg-type]
            await test(world)
            world.check()
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(run)


def paths(world: World, inode: Inode) -> list[bytes]:
    return paths_of(inode, world.table, {})


async def make_tree(world: World) -> tuple[Inode, Inode, Inode]:
    """/a/b/file: the inodes of a, b and file."""
    a = await world.fs.creation.mkdir(world.table.root, b"a", 0o755, CALLER)
    b = await world.fs.creation.mkdir(a, b"b", 0o755, CALLER)
    file, _ = await world.fs.creation.create(b, b"file", 0o100644, os.O_RDWR, CALLER)
    return a, b, file


def test_names_follow_renames_links_and_removals(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        root = world.table.root
        a, b, file = await make_tree(world)
        assert paths(world, root) == [b""]
        assert (paths(world, b), paths(world, file)) == ([b"a/b"], [b"a/b/file"])
        await world.fs.rename(root, b"a", root, b"new", 0)
        assert paths(world, file) == [b"new/b/file"]
        await world.fs.link(file, root, b"second\xff")
        assert paths(world, file) == [b"new/b/file", b"second\xff"]
        await world.fs.unlink(b, b"file")
        assert paths(world, file) == [b"second\xff"]
        await world.fs.unlink(root, b"second\xff")
        assert paths(world, file) == []
        await world.fs.rmdir(a, b"b")
        assert paths(world, b) == []

    with_world(tmp_path, test)


def test_names_that_go_round_in_a_circle_are_no_paths(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        a, b, file = await make_tree(world)
        world.table.unname(a, world.table.root, b"a")  # as when SOURCE was changed behind our back
        world.table.name(a, b, b"a")
        assert paths(world, file) == []
        world.table.unname(a, b, b"a")
        world.table.name(a, world.table.root, b"a")

    with_world(tmp_path, test)


def test_trees_may_be_deeper_than_python_recurses(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode = world.table.root
        for i in range(1500):
            above, inode = inode, Inode(i + 2, world.table.root.st)
            inode.names[above, b"d"] = None
        world.table.name(inode, above, b"file")
        assert paths(world, inode) == [b"/".join([b"d"] * 1499) + b"/file"]
        world.table.unname(inode, above, b"file")

    with_world(tmp_path, test)


@pytest.mark.parametrize("blocking", [False, True])
def test_files_below_a_path_are_the_regular_ones_and_none_stays_known(tmp_path: Path, blocking: bool) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "file").write_text("there")
    (tmp_path / "x" / "b\udcff").write_text("")
    (tmp_path / "x" / "link").symlink_to("y")
    os.mkfifo(tmp_path / "x" / "fifo")

    async def test(world: World) -> None:
        assert await files_below(world.fs, b"x") == {b"x/b\xff": 0, b"x/y/file": 5}
        assert await files_below(world.fs, b"x/y/file") == {b"x/y/file": 5}
        assert list(await files_below(world.fs, b"")) == [b"x/b\xff", b"x/y/file"]
        assert await files_below(world.fs, b"x/fifo") == {} == await files_below(world.fs, b"x/link")
        for path, error in (
            (b"x/none", FileNotFoundError), (b"x/y/file/z", NotADirectoryError), (b"x/link/file", NotADirectoryError),
        ):  # fmt: skip
            with pytest.raises(error):
                await files_below(world.fs, path)
        assert len(world.table) == 1

    with_world(tmp_path, test, blocking=blocking)
