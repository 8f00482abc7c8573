"""The last minutes of a mount, a sample every second or so: what the curves of `cachefs top` and of the page are drawn from."""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from cachefs.cache.page import PAGE_SIZE

if TYPE_CHECKING:
    from cachefs.stack import Stack

SAMPLES, SAMPLE_SECONDS = 600, 1.0  # ten minutes


class Sample(NamedTuple):
    """Counters as they stood at `time_seconds` since the mount; rates are differences of two."""

    time_seconds: float
    page_hits: int
    page_misses: int
    hit_bytes: int
    miss_bytes: int
    write_bytes: int
    evicted_pages: int  # to make room
    readahead_used_pages: int
    readahead_unused_pages: int
    written_bytes: int  # to the backing
    dirty_bytes: int
    writeback_bytes: int  # on their way to the backing
    resident_bytes: int


class History:
    """Samples of one mount, oldest first; `take` is to be called about once a second while anything happens."""

    def __init__(self, stack: "Stack") -> None:
        self.stack = stack
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self.take()

    def now(self) -> tuple[Sample, ...]:
        """All of them, the last one not much older than a second."""
        if self.stack.cache.clock() - self.stack.started - self.samples[-1].time_seconds > 2 * SAMPLE_SECONDS:
            self.take()
        return tuple(self.samples)

    def take(self) -> None:
        cache, writeback = self.stack.cache, self.stack.writeback
        total = cache.accounts.total
        self.samples.append(
            Sample(
                round(cache.clock() - self.stack.started, 3),
                total("page_hits"),
                total("page_misses"),
                total("hit_bytes"),
                total("miss_bytes"),
                total("write_bytes"),
                cache.evictions["capacity"],
                cache.readahead_used,
                cache.readahead_unused,
                writeback.written_bytes + self.stack.files.through.written_bytes,
                writeback.unwritten_pages * PAGE_SIZE,
                cache.writeback_pages * PAGE_SIZE,
                cache.resident_pages * PAGE_SIZE,
            )
        )
