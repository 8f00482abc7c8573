"""The kernel's end of a FUSE connection: a socket that requests are written to and answers read from, one a message."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

import trio

from cachefs.transport import wire

NODE_OF_ROOT = 1


@dataclass(frozen=True)
class Reply:
    """One answer, taken apart."""

    unique: int
    errno: int
    data: bytes

    @property
    def entry(self) -> int:
        """The node of a struct fuse_entry_out."""
        return int(wire.ENTRY.unpack_from(self.data)[0])

    @property
    def handle(self) -> int:
        return int(wire.OPENED.unpack_from(self.data)[0])


class Kernel:
    """Asks a lane that runs in another task of the same trio."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.ours.setblocking(False)
        self.lane_fd = theirs.detach()
        self._unique = 0
        self._replies: dict[int, Reply] = {}

    def close(self) -> None:
        """As at an unmount: the lane reads no more."""
        self.ours.close()

    def send(self, opcode: int, node: int = NODE_OF_ROOT, body: bytes = b"", length: int | None = None) -> int:
        """Returns the request's number. `length` is what it says of itself."""
        self._unique += 2
        size = wire.IN_HEADER.size + len(body)
        header = (size if length is None else length, opcode, self._unique, node, os.getuid(), os.getgid(), os.getpid(), 0)
        self.send_raw(wire.IN_HEADER.pack(*header) + body)
        return self._unique

    def send_raw(self, message: bytes) -> None:
        self.ours.send(message)

    def replies(self) -> dict[int, Reply]:
        """Every answer that has come so far, by the number of its request."""
        while True:
            try:
                message = self.ours.recv((1 << 20) + 4096)
            except BlockingIOError:
                return self._replies
            length, error, unique = wire.OUT_HEADER.unpack_from(message)
            assert length == len(message) and error <= 0 and unique not in self._replies
            self._replies[unique] = Reply(unique, -error, message[wire.OUT_HEADER.size :])

    async def reply(self, unique: int) -> Reply:
        while unique not in self.replies():
            await trio.lowlevel.wait_readable(self.ours)
        return self._replies[unique]

    async def ask(self, opcode: int, node: int = NODE_OF_ROOT, body: bytes = b"") -> Reply:
        return await self.reply(self.send(opcode, node, body))

    async def must(self, opcode: int, node: int = NODE_OF_ROOT, body: bytes = b"") -> Reply:
        reply = await self.ask(opcode, node, body)
        assert not reply.errno, errno.errorcode[reply.errno]
        return reply

    async def open(self, name: bytes, flags: int = os.O_RDWR) -> tuple[int, int]:
        """Node and handle of a file of the top directory."""
        node = (await self.must(wire.LOOKUP, body=name + b"\0")).entry
        return node, (await self.must(wire.OPEN, node, flags.to_bytes(8, "little"))).handle


def transfer(handle: int, offset: int, size: int, data: bytes = b"") -> bytes:
    """The body of a READ, or with `data` of a WRITE."""
    return (handle.to_bytes(8, "little") + offset.to_bytes(8, "little") + size.to_bytes(4, "little")).ljust(40, b"\0") + data
