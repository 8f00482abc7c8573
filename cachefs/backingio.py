"""Calls to the backing: inline where it is local, in threads where it may take long, and timed in either case."""

import errno
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TypeVar

import trio

from backing.base import Backing
from cachefs.cache.speed import BackingSpeed
from cachefs.statistics import BackingStatistics, Histogram
from cachefs.syncs import Syncs
from cachefs.tasks import Spawner
from cachefs.watchdog import GONE, Unreachable, Watchdog, getting_on

log = logging.getLogger(__name__)
T = TypeVar("T")
TIMEOUT_SECONDS = 30.0
LOCAL_CALL_BYTES = 128 << 10  # of one pwritev to a local file: for larger ones ext4 looks for large folios, up to 10 x as long
THREADS_MAX = 64  # calls of a kind under way at once; readahead over a distant store wants many, a thread costs 8 KiB or so
# Each kind has threads of its own, the rest is one kind: reads that hang must not keep data from being saved.
KINDS = {"read": "read", "write": "write", "fsync": "sync", "syncfs": "sync", "close": "close"}


class BackingIO:
    """The one place that calls `backing`. State belongs to the trio thread; threads only run the call itself.

    `watchdog` bounds the waiting for a backing that may hang; `tasks` runs what goes on when nobody waits for it any more.
    """

    def __init__(self, backing: Backing, tasks: Spawner | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.backing = backing
        self.watchdog = Watchdog(tasks if backing.blocking else None, timeout_seconds, self._probe)
        self._syncs = Syncs(backing)
        self.speed = BackingSpeed()
        self.durations: defaultdict[str, Histogram] = defaultdict(Histogram)  # {op: durations}
        self.errors: Counter[str] = Counter()  # {errno name: calls}
        self.read_bytes = 0
        self._limiters: defaultdict[str, trio.CapacityLimiter] = defaultdict(lambda: trio.CapacityLimiter(THREADS_MAX))
        self._unlimited = trio.CapacityLimiter(math.inf)

    def ask(
        self,
        function: Callable[..., Awaitable[T]],
        *args: object,
        memory: Callable[[], T | None] | None = None,
        undo: Callable[[T], Awaitable[object]] | None = None,
    ) -> Awaitable[T]:
        """`function(*args)`, for a request; on a backing far away it waits no longer than it may, see `Watchdog.ask`."""
        return self.watchdog.ask(function, args, memory, undo) if self.watchdog.watching else function(*args)

    async def call(self, op: str, function: Callable[..., T], *args: object) -> T:
        """`function(*args)`, which calls the backing. Inline it is atomic: no checkpoint."""
        if self.backing.blocking:
            return await self.in_thread(op, function, *args)
        return self.call_now(op, function, *args)

    def call_now(self, op: str, function: Callable[..., T], *args: object) -> T:
        """The same of a local backing, in plain code."""
        start = perf_counter()
        try:
            return function(*args)
        except OSError as error:
            self.count_error(error)
            raise self.told(error) from None
        finally:
            self.durations[op].observe(perf_counter() - start)

    async def in_thread(self, op: str, function: Callable[..., T], *args: object) -> T:
        """The same in a thread. Not cancelled half way: a call that was begun is waited for."""
        limiter = self._limiters[KINDS.get(op, "")]
        call = await self.watchdog.begin(op, limiter) if self.watchdog.watching else None
        start = perf_counter()
        try:
            if call is None:  # not abandoned when cancelled (trio's default)
                return await trio.to_thread.run_sync(function, *args, limiter=limiter)
            with call.scope:  # a shield
                return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=self._unlimited)
            await trio.lowlevel.checkpoint_if_cancelled()  # at the end of the mount, see `Watchdog.abandon`
            raise self.watchdog.refusal()
        except OSError as error:
            self.count_error(error)
            raise self.told(error) from None
        finally:
            if call is not None:
                self.watchdog.end(call)
            self.durations[op].observe(perf_counter() - start)

    async def fsync(self, fd: int, datasync: bool) -> None:
        """Makes a file durable, while other requests go on."""
        start = perf_counter()
        try:
            done = await self._syncs.fsync(fd, datasync)
        except OSError as error:
            self.count_error(error)
            raise self.told(error) from None
        if done:
            self.durations["fsync"].observe(perf_counter() - start)
        else:
            await self.in_thread("fsync", self.backing.fsync, fd, datasync)

    def close(self, fd: int) -> None:
        """Gives back a descriptor of file data. Far away that is a call like others, and nobody waits for it."""
        if self.watchdog.tasks:
            self.watchdog.tasks.start_soon(self._close, fd)
        else:
            self.backing.close(fd)

    async def _close(self, fd: int) -> None:
        try:
            await self.in_thread("close", self.backing.close, fd)
        except OSError as error:
            if not self.watchdog.lost:  # else no news
                log.warning("closing a file of SOURCE: %s", error.strerror)

    def _probe(self) -> None:
        """Asks for something that nobody this side of the backing has in store; in a thread."""
        fd = self.backing.open_root()
        try:
            self.backing.statvfs(fd)
        except OSError as error:
            if error.errno in GONE:
                raise
            self.backing.fstat(fd)  # maybe it can do all but this one thing
        finally:
            self.backing.close(fd)

    def told(self, error: OSError) -> OSError:
        """The error as programs are to have it: the errnos of a backing that is gone would say that our mount is."""
        if error.errno not in GONE and error.errno != errno.ETIMEDOUT:
            return error
        self.watchdog.doubt()
        number = errno.EIO if error.errno in GONE else errno.ETIMEDOUT
        return Unreachable(number, os.strerror(number))

    def read_now(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """What the backing has at hand; BlockingIOError where it would wait."""
        start = perf_counter()
        nbytes = self.backing.preadv_nowait(fd, buffers, offset)
        self.durations["read"].observe(perf_counter() - start)
        self.read_bytes += nbytes
        return nbytes

    async def read(self, fd: int, buffers: list[memoryview], offset: int, enough_bytes: int) -> int:
        """Fills `buffers` from `offset`; fewer bytes only at the end of the file, or where there are enough."""
        start = perf_counter()
        nbytes = await self.in_thread("read", read_fully, self.backing, fd, buffers, offset, enough_bytes)
        now = perf_counter()
        self.speed.observe(nbytes, now - start, now)
        self.read_bytes += nbytes
        return nbytes

    def count_error(self, error: OSError) -> None:
        """To be called besides for what a thread hands back instead of raising it."""
        number = error.errno or errno.EIO
        # Names that are not there and pages that would wait are answers, not failures.
        if number not in (errno.ENOENT, errno.ENODATA, errno.EAGAIN, errno.EEXIST, errno.ENOTEMPTY, errno.EOPNOTSUPP):
            self.errors[errno.errorcode.get(number, str(number))] += 1

    def statistics(self) -> BackingStatistics:
        return BackingStatistics(
            durations={op: histogram.snapshot() for op, histogram in sorted(self.durations.items())},
            errors=dict(self.errors),
            read_bytes=self.read_bytes,
            latency_seconds=self.speed.latency_seconds,
            bandwidth_bytes_per_second=self.speed.bandwidth_bytes_per_second,
            lost=int(self.watchdog.lost),
            silent_seconds=self.watchdog.silent_seconds,
            timeouts=self.watchdog.timeouts,
        )


def read_fully(backing: Backing, fd: int, buffers: list[memoryview], offset: int, enough_bytes: int) -> int:
    """Reads until `buffers` are full, the file ends or `enough_bytes` are there; runs in a thread.

    Who knows how long the file is saves the call that would only say that it has ended.
    """
    total = 0
    while buffers and total < enough_bytes:
        nbytes = backing.preadv(fd, buffers, offset + total)
        if not nbytes:
            break
        total += nbytes
        buffers = _after(buffers, nbytes)
    return total


def write_fully(backing: Backing, fd: int, buffers: list[memoryview], offset: int) -> None:
    """Writes all of `buffers`; runs in a thread."""
    while buffers:
        if backing.blocking:
            getting_on(sum(len(buffer) for buffer in buffers))
        nbytes = backing.pwritev(fd, buffers if backing.blocking else _first(buffers, LOCAL_CALL_BYTES), offset)
        if not nbytes:
            raise OSError(errno.EIO, "the backing wrote nothing")
        offset += nbytes
        buffers = _after(buffers, nbytes)


def _first(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """The first `nbytes` bytes of `buffers`, or all if there are no more."""
    taken = []
    for buffer in buffers:
        taken.append(buffer[:nbytes])
        nbytes -= len(taken[-1])
        if not nbytes:
            break
    return taken


def _after(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of `buffers` behind their first `nbytes` bytes."""
    for i, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[i + 1 :]]
        nbytes -= len(buffer)
    return []
