"""Paths of inodes and inodes of paths, whatever has been renamed, linked and removed."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from cachefs.inode import Inode
from cachefs.names import paths_of, reached
from world import CALLER, World


def with_world(top: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top)
            await test(world)
            world.check()
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(run)


def paths(world: World, inode: Inode) -> list[bytes]:
    return paths_of(inode, world.table.root, {})


async def make_tree(world: World) -> tuple[Inode, Inode, Inode]:
    """/a/b/file: the inodes of a, b and file."""
    a = await world.fs.mkdir(world.table.root, b"a", 0o755, CALLER)
    b = await world.fs.mkdir(a, b"b", 0o755, CALLER)
    file, _ = await world.fs.create(b, b"file", 0o100644, os.O_RDWR, CALLER)
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
            world.table.name(inode, above, b"d")
        assert paths(world, inode) == [b"/".join([b"d"] * 1500)]
        world.table.root.children = 0

    with_world(tmp_path, test)


def test_a_path_is_reached_and_nothing_stays_known_afterwards(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "file").write_text("there")
    (tmp_path / "x" / "link").symlink_to("y")

    async def test(world: World) -> None:
        async with reached(world.fs, b"x/y/file") as inode:
            assert inode.st.st_size == 5 and paths(world, inode) == [b"x/y/file"]
            assert len(world.table) == 4
        assert len(world.table) == 1
        async with reached(world.fs, b"") as inode:
            assert inode is world.table.root
        for path, error in (
            (b"x/none", FileNotFoundError), (b"x/y/file/z", NotADirectoryError), (b"x/link/file", NotADirectoryError),
        ):  # fmt: skip
            with pytest.raises(error):
                async with reached(world.fs, path):
                    pass
        assert len(world.table) == 1

    with_world(tmp_path, test)
