"""A FUSE file system with one file, `image`, that notes every write and every flush in order: the disk under a power cut.

An ext4 on a loop device on that file sends its barriers as fsync. Run as a program: `python recorder.py IMAGE MOUNTPOINT LOG`;
it ends with the unmount. The log is a row of `EVENT`s, each write followed by its data.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import time

import pyfuse3
import trio

EVENT = struct.Struct("<qqq")  # CLOCK_MONOTONIC in ns, offset, length
FLUSH = -1  # the offset of a flush
NAME, NODE = b"image", pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)
FOR_EVER_SECONDS = 1e6


class Recorder(pyfuse3.Operations):
    """The file system. Each request is done before the next one is looked at, so the log has the order of the disk."""

    def __init__(self, image: str, log: str) -> None:
        super().__init__()
        self.image = os.open(image, os.O_RDWR)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_mode = stat.S_IFREG | 0o600 if inode == NODE else stat.S_IFDIR | 0o700
        attributes.st_size = os.fstat(self.image).st_size if inode == NODE else 0
        attributes.st_nlink = 1
        attributes.entry_timeout = attributes.attr_timeout = FOR_EVER_SECONDS
        return attributes

    async def lookup(self, parent: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(NODE)

    async def open(self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1))

    async def read(self, fh: pyfuse3.FileHandleT, offset: int, size: int) -> bytes:
        return os.pread(self.image, size, offset)

    async def write(self, fh: pyfuse3.FileHandleT, offset: int, data: bytes) -> int:
        os.write(self.log, EVENT.pack(time.monotonic_ns(), offset, len(data)) + data)
        return os.pwrite(self.image, data, offset)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        os.write(self.log, EVENT.pack(time.monotonic_ns(), FLUSH, 0))


def main(image: str, mountpoint: str, log: str) -> None:
    pyfuse3.init(Recorder(image, log), mountpoint, {"fsname=cachefs-test-disk"})
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
