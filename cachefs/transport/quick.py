"""Requests that a local SOURCE lets us answer at once, in plain code: the frequent ones.

They look, open, make, close, or set attributes. Each is what `Operations` does, less the coroutines on the way. An errno is an
answer, too. None says that it has to wait, or went wrong: then nothing was done, and it goes the way of all requests.
"""

import time
from collections.abc import Callable
from typing import Any

from cachefs.creation import Caller
from cachefs.statistics import Histogram
from cachefs.transport import wire
from cachefs.transport.dispatch import DONE, Answer, WireOperations, sized
from cachefs.transport.operations import groups_of
from cachefs.transport.wire import Request

QuickHandler = Callable[[Request], Answer | int | None]


class Quick:
    """`handlers` by opcode; none where SOURCE is far away."""

    def __init__(self, operations: WireOperations) -> None:
        self.operations = operations
        self.fs, self.files, self.table = operations.fs, operations.files, operations.fs.table
        made = {
            wire.LOOKUP: (self.lookup, "lookup"), wire.GETATTR: (self.getattr, "getattr"), wire.OPEN: (self.open, "open"),
            wire.FLUSH: (self.flush, "flush"), wire.RELEASE: (self.release, "release"),
            wire.OPENDIR: (self.opendir, "opendir"), wire.RELEASEDIR: (self.releasedir, "releasedir"),
            wire.CREATE: (self.create, "create"), wire.SETATTR: (self.setattr, "setattr"),
            wire.GETXATTR: (self.getxattr, "getxattr"),
        }  # fmt: skip
        local = not operations.fs.backing.blocking
        self.handlers = {opcode: timed(*how, operations.durations) for opcode, how in made.items()} if local else {}

    def lookup(self, request: Request) -> Answer | None:
        try:
            inode = self.fs.lookup_now(self.table.get(request.node), request.name())
        except FileNotFoundError:
            return self.operations._nothing()
        if inode is None:
            return None
        if not inode.is_dir:
            self.operations.lookers.looked(request.pid, request.node)
        return self.operations._entry(inode)

    def getattr(self, request: Request) -> Answer | None:
        inode = self.table.get(request.node)
        return self.operations._attr(inode) if self.files.attributes.refresh_now(inode) else None

    def open(self, request: Request) -> Answer | None:
        inode, flags = self.table.get(request.node), wire.open_in(request.body)
        caller: Any = request  # it has what pyfuse3's has
        opened = self.files.open_now(inode, flags, request.uid, groups_of(caller, inode), request.pid)
        if opened is None:
            return None
        if opened.attributes_changed:
            self.operations.forget_quietly(request.node)
        return self.operations._info(opened)

    def create(self, request: Request) -> Answer | None:
        name, mode, flags = wire.create_in(request)
        who = Caller(request.uid, request.gid, request.umask, frozenset((request.gid,)), request.pid)
        made = self.fs.creation.create_now(self.table.get(request.node), name, mode, flags, who)
        if made is None:
            return None
        inode, opened = made
        return self.operations._entry(inode) + self.operations._info(opened)

    def setattr(self, request: Request) -> Answer | None:
        inode = self.table.get(request.node)
        if not self.files.setter.setattr_now(inode, wire.setattr_in(request.body)):
            return None
        return self.operations._attr(inode)

    def flush(self, request: Request) -> Answer | None:
        """Where nothing is to be reported; data goes to a local SOURCE later."""
        handle = self.files.handles[request.handle()]
        return None if handle.writable and handle.errors_seen != handle.inode.error_count else DONE

    def release(self, request: Request) -> Answer | None:
        number = request.handle()
        inode = self.files.handles[number].inode
        if not self.files.release_now(number):
            return None
        self.fs.drop(inode)
        return DONE

    def opendir(self, request: Request) -> Answer | None:
        return self.operations.opendir_now(self.table.get(request.node), request.pid)

    def releasedir(self, request: Request) -> Answer:
        self.fs.directories.close(request.handle())
        return DONE

    def getxattr(self, request: Request) -> Answer | int | None:
        room, name = wire.getxattr_in(request)
        found = self.fs.xattrs.getxattr_now(self.table.get(request.node), name)
        return found if found is None or isinstance(found, int) else sized(found, room)


def timed(handler: QuickHandler, op: str, durations: dict[str, Histogram]) -> QuickHandler:
    """The handler, timed as those of `Operations` are; what goes wrong is theirs to tell."""
    observe, clock = durations[op].observe, time.perf_counter

    def timed_handler(request: Request) -> Answer | int | None:
        start = clock()
        try:
            answer = handler(request)
        except Exception:
            return None
        if answer is not None:
            observe(clock() - start)
        return answer

    return timed_handler
