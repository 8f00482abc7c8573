"""A store made distant: for experiments, demos and benchmarks on one machine."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from backing.base import Backing
from backing.wrapper import Wrapper, buffer_bytes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")


class LatencyBacking(Wrapper):
    """A store behind a line: each call waits the latency, and file data then shares one link of limited bandwidth.

    Calls made at the same time wait out their latencies together, but their data goes over the link one after the
    other, in the order of the calls. A bandwidth of 0 has no limit. Closing and redirecting are free.
    """

    def __init__(
        self,
        inner: Backing,
        latency_seconds: float,
        bandwidth_bytes_per_second: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner, blocking=True)
        self.latency_seconds = latency_seconds
        self.bandwidth_bytes_per_second = bandwidth_bytes_per_second
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._link_free_at = 0.0

    def around(self, operation: str, call: Callable[..., T], args: tuple[Any, ...]) -> T:
        if operation in ("close", "redirect"):
            return call(*args)
        started = self._clock()
        if operation == "pwritev":
            self._wait(started, buffer_bytes(args[1]))  # before the call: what is on its way is not there yet
            return call(*args)
        result: Any = None
        try:
            result = call(*args)
        finally:  # a refusal travels as far as an answer
            self._wait(started, result if operation == "preadv" and result else 0)
        return result  # type: ignore[no-any-return]

    def preadv_nowait(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int, /) -> int:
        """Never has anything at hand: it is all on the other end of the line."""
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _wait(self, started: float, nbytes: int) -> None:
        """Sleeps until a call that began at `started` and moves `nbytes` would be over."""
        until = self._over_at(started, nbytes)
        left = until - self._clock()
        if left > 0:
            self._sleep(left)

    def _over_at(self, started: float, nbytes: int) -> float:
        ready = started + self.latency_seconds
        if not nbytes or not self.bandwidth_bytes_per_second:
            return ready
        with self._lock:
            begin = max(ready, self._link_free_at)
            self._link_free_at = begin + nbytes / self.bandwidth_bytes_per_second
            return self._link_free_at
