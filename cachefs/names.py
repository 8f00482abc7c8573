"""Paths of inodes, many at a time, and the files below a path; paths are bytes, relative to the top."""

import contextlib

import trio

from cachefs.directories import STATS_AT_ONCE
from cachefs.fs import FileSystem
from cachefs.inode import Inode, InodeTable

Memory = dict[Inode, bytes | None]


def paths_of(inode: Inode, table: InodeTable, memory: Memory) -> list[bytes]:
    """Every name of the inode, as a path; none if it has been removed or replaced, or lies in what has been.

    `memory` keeps the paths of directories, for as long as nobody else has a turn.
    """
    if inode is table.root:
        return [b""]
    names = [(parent, name) for parent, name in inode.names if table.named(parent, name) is inode]
    found = ((_path_of(parent, table.root, memory), name) for parent, name in names)
    return [b"%b/%b" % (above, name) if above else name for above, name in found if above is not None]


def _path_of(directory: Inode, root: Inode, memory: Memory) -> bytes | None:
    """The path of a directory by its latest name."""
    climbed: list[tuple[Inode, bytes]] = []
    at, path = directory, memory.get(directory)
    while path is None and at not in memory:
        if at is root:
            path = b""
            break
        memory[at] = None  # also where names that changed in SOURCE seem to go round in a circle
        if not at.names:
            break
        above, name = next(reversed(at.names))
        climbed.append((at, name))
        at, path = above, memory.get(above)
    for inode, name in reversed(climbed):
        if path is None:
            break
        memory[inode] = path = b"%b/%b" % (path, name) if path else name
    return path


async def files_below(fs: FileSystem, path: bytes) -> dict[bytes, int]:
    """{path: size} of the regular files at and below a path; raises OSError if there is nothing. What goes meanwhile is left out.

    Links, devices and the like are passed over.
    """
    found: dict[bytes, int] = {}
    todo = [path]
    while todo:
        at = todo.pop()
        try:
            async with fs.at_path(at) as inode:
                if inode.is_regular:
                    found[at] = inode.attributes().size
                if inode.is_dir:
                    for name, below in await _entries(fs, inode):
                        below_path = b"%b/%b" % (at, name) if at else name
                        if below.is_dir:
                            todo.append(below_path)
                        elif below.is_regular:
                            found[below_path] = below.attributes().size
                        fs.drop(below)
        except OSError:
            if at == path:
                raise
        await trio.lowlevel.checkpoint()  # a local store answers without one
    return dict(sorted(found.items()))


async def _entries(fs: FileSystem, directory: Inode) -> list[tuple[bytes, Inode]]:
    """The names in a directory and what they are, looked at side by side; each inode is the caller's to drop at once."""
    entries = iter(await fs.descriptors.at("readdir", directory, fs.backing.listdir))
    found: list[tuple[bytes, Inode]] = []

    async def worker() -> None:
        for entry in entries:
            with contextlib.suppress(OSError):
                found.append((entry.name, await fs.find(directory, entry.name)))

    async with trio.open_nursery() as nursery:
        for _ in range(STATS_AT_ONCE if fs.backing.blocking else 1):
            nursery.start_soon(worker)
    return found
