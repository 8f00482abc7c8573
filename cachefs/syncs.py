"""fsync of a local file while other requests go on, with no thread of ours where the store has something better."""

import os
from itertools import count

import trio

from backing.aio import SyncQueue
from backing.base import Backing


class Syncs:
    """Owns the store's queue of files that are being made durable, which it asks for when it is first needed."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._queue: SyncQueue | None = None
        self._asked = backing.blocking  # a store that may hang has its calls in threads that can be left behind
        self._waiting: dict[int, trio.lowlevel.Task] = {}  # {tag: who waits}
        self._ended: dict[int, int] = {}  # {tag: errno, 0 = all is well}, until who waits has it
        self._tags = count()

    async def fsync(self, fd: int, datasync: bool) -> bool:
        """fsync, or fdatasync. Not cancelled half way. False, and nothing done, where a thread has to do it."""
        tag = next(self._tags)
        if not self._begin(fd, datasync, tag):
            return False
        self._waiting[tag] = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        if number := self._ended.pop(tag):
            raise OSError(number, os.strerror(number))
        return True

    def _begin(self, fd: int, datasync: bool, tag: int) -> bool:
        if not self._asked:
            self._asked, self._queue = True, self._backing.sync_queue()
            if self._queue is not None:  # a system task: the last fsyncs come when other tasks have ended
                trio.lowlevel.spawn_system_task(self._wake, self._queue)
        if self._queue is None:
            return False
        try:
            self._queue.begin(fd, datasync, tag)
        except OSError:  # too many at a time, or not for such a file: whatever it is, a thread will tell
            return False
        return True

    async def _wake(self, queue: SyncQueue) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(queue.fd)
                for tag, number in queue.ended():
                    self._ended[tag] = number
                    trio.lowlevel.reschedule(self._waiting.pop(tag))
        finally:
            self._queue = None
            queue.close()
