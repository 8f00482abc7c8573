"""Calls to the backing: inline where it is local, in threads where it may take long, and timed in either case."""

import errno
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import trio

from backing.base import Backing
from cachefs.cache.speed import BackingSpeed
from cachefs.statistics import BackingStatistics, Histogram

T = TypeVar("T")
LOCAL_CALL_BYTES = 128 << 10  # of one pwritev to a local file: for larger ones ext4 looks for large folios, up to 10 x as long
THREADS_MAX = 64  # calls under way at once; readahead over a distant store wants many, each thread costs 8 KiB or so


class BackingIO:
    """The one place that calls `backing`. State belongs to the trio thread; threads only run the call itself."""

    def __init__(self, backing: Backing) -> None:
        self.backing = backing
        self.speed = BackingSpeed()
        self.durations: dict[str, Histogram] = {}  # {op: durations}
        self.errors: Counter[str] = Counter()  # {errno name: calls}
        self.read_bytes = 0
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._writers = trio.CapacityLimiter(THREADS_MAX)  # of their own: reads that hang must not keep data from being saved

    async def call(self, op: str, function: Callable[..., T], *args: object) -> T:
        """`function(*args)`, which calls the backing. Inline it is atomic: no checkpoint."""
        if self.backing.blocking:
            return await self.in_thread(op, function, *args)
        start = time.perf_counter()
        try:
            return function(*args)
        except OSError as error:
            self._count_error(error)
            raise
        finally:
            self._observe(op, time.perf_counter() - start)

    async def in_thread(self, op: str, function: Callable[..., T], *args: object) -> T:
        """The same in a thread. Not cancelled half way: a call that was begun is waited for."""
        start = time.perf_counter()
        try:
            # Not abandoned when cancelled (trio's default): the call was begun.
            limiter = self._writers if op in ("write", "fsync", "syncfs") else self._limiter
            return await trio.to_thread.run_sync(function, *args, limiter=limiter)
        except OSError as error:
            self._count_error(error)
            raise
        finally:
            self._observe(op, time.perf_counter() - start)

    def read_now(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """What the backing has at hand; BlockingIOError where it would wait."""
        start = time.perf_counter()
        nbytes = self.backing.preadv_nowait(fd, buffers, offset)
        self._observe("read", time.perf_counter() - start)
        self.read_bytes += nbytes
        return nbytes

    async def read(self, fd: int, buffers: list[memoryview], offset: int, enough_bytes: int) -> int:
        """Fills `buffers` from `offset`; fewer bytes only at the end of the file, or where there are enough."""
        start = time.perf_counter()
        nbytes = await self.in_thread("read", read_fully, self.backing, fd, buffers, offset, enough_bytes)
        now = time.perf_counter()
        self.speed.observe(nbytes, now - start, now)
        self.read_bytes += nbytes
        return nbytes

    def _observe(self, op: str, seconds: float) -> None:
        histogram = self.durations.get(op)
        if histogram is None:
            histogram = self.durations[op] = Histogram()
        histogram.observe(seconds)

    def _count_error(self, error: OSError) -> None:
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
