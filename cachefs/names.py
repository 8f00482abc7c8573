"""From an inode to its paths and from a path to its inode; paths are bytes, relative to the top."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cachefs.fs import FileSystem
from cachefs.inode import Inode

Memory = dict[Inode, bytes | None]


def paths_of(inode: Inode, root: Inode, memory: Memory) -> list[bytes]:
    """Every known name of the inode, as a path; none if it has been removed, or lies in what has been.

    `memory` keeps the paths of directories, for as long as nobody else has a turn.
    """
    if inode is root:
        return [b""]
    found = ((_path_of(parent, root, memory), name) for parent, name in inode.names)
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


@asynccontextmanager
async def reached(fs: FileSystem, path: bytes) -> AsyncIterator[Inode]:
    """The inode at a path, looked up name by name, known as long as the block lasts; raises OSError.

    Names are those of the backing: a symbolic link is not followed.
    """
    inode = fs.table.root
    inode.fd_busy += 1  # in use: not to be forgotten
    try:
        for name in filter(None, path.split(b"/")):
            below = await fs.find(inode, name)
            below.fd_busy += 1
            _let_go(fs, inode)
            inode = below
        yield inode
    finally:
        _let_go(fs, inode)


def _let_go(fs: FileSystem, inode: Inode) -> None:
    inode.fd_busy -= 1
    fs.drop(inode)
