"""Descriptors: bounded in number, and never closed under a call that uses one."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from backing.directory import DirectoryBacking
from cachefs.backingio import BackingIO
from cachefs.descriptors import Descriptors
from cachefs.inode import Inode, InodeTable
from world import close_descriptors

BUDGET = 16


class World:
    """A directory with `count` directories in it, every one of them known."""

    def __init__(self, path: Path) -> None:
        self.backing = DirectoryBacking(path)
        self.io = BackingIO(self.backing)
        root = self.backing.open_root()
        self.table = InodeTable(self.backing.fstat(root))
        self.descriptors = Descriptors(self.io, self.table, root, BUDGET)

    async def look(self, name: bytes) -> Inode:
        st = await self.descriptors.at("lookup", self.table.root, self.backing.stat, name)
        inode = self.table.add(st)
        self.table.name(inode, self.table.root, name)
        return inode

    async def listing(self, inode: Inode) -> list[bytes]:
        return [entry.name for entry in await self.descriptors.at("readdir", inode, self.backing.listdir)]


def in_world(path: Path, main: Callable[[World], Awaitable[None]]) -> None:
    world = World(path)
    try:
        trio.run(main, world)
    finally:
        close_descriptors(world.table, world.backing)


def make_directories(path: Path, count: int) -> list[bytes]:
    names = [b"d%d" % i for i in range(count)]
    for name in names:
        os.makedirs(os.fsencode(path) + b"/" + name + b"/inside " + name)
    return names


def test_descriptors_stay_within_the_budget_and_closed_ones_are_found_again(tmp_path: Path) -> None:
    names = make_directories(tmp_path, 4 * BUDGET)

    async def main(world: World) -> None:
        for _ in range(2):
            for name in names:
                assert await world.listing(await world.look(name)) == [b"inside " + name]
                assert len(world.descriptors) <= BUDGET + 1

    in_world(tmp_path, main)


def test_regression_a_descriptor_just_opened_is_not_closed_again_where_all_others_are_in_use(tmp_path: Path) -> None:
    names = make_directories(tmp_path, BUDGET + 4)

    async def main(world: World) -> None:
        for name in names:
            inode = await world.look(name)
            inode.opens += 1
            assert await world.listing(inode) == [b"inside " + name]

    in_world(tmp_path, main)


def test_what_is_held_is_reached_when_its_name_is_gone_and_others_need_descriptors(tmp_path: Path) -> None:
    names = make_directories(tmp_path, 4 * BUDGET)

    async def main(world: World) -> None:
        inode = await world.look(names[0])
        async with world.descriptors.holding(inode):
            os.rename(tmp_path / "d0", tmp_path / "elsewhere")
            for name in names[1:]:
                await world.listing(await world.look(name))
            assert await world.listing(inode) == [b"inside d0"]

    in_world(tmp_path, main)
