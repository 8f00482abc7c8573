"""The floor: an empty pyfuse3 file system with one 4 GiB file `f`, every read answered from the same memory.

What a request costs here is what pyfuse3 and the kernel cost; a cache can only add to it. `floor.py MOUNTPOINT`.
"""

import errno
import os
import stat
import sys

import pyfuse3
import trio

DATA = memoryview(os.urandom(1 << 20))
FILE = 2


class Floor(pyfuse3.Operations):
    """One directory, one file."""

    def _entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o755, 2
        else:
            entry.st_mode, entry.st_size = stat.S_IFREG | 0o666, 4 << 30
        return entry

    async def getattr(self, inode, ctx=None):
        return self._entry(inode)

    async def lookup(self, parent, name, ctx=None):
        if name == b"f":
            return self._entry(FILE)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=FILE, direct_io=True, keep_cache=False)

    async def read(self, fh, offset, size):
        return DATA[:size]


def main() -> None:
    pyfuse3.init(Floor(), sys.argv[1], {*pyfuse3.default_options, "fsname=floor"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
