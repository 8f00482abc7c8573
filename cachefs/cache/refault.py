"""How far away refaults are: how many pages were evicted between a page's eviction and the miss that wanted it back.

A cache that is larger by this distance would still have had the page (Linux's mm/workingset.c reasons the same way). When a
page was evicted is remembered in *quanta* of evictions, as 16 bits: one number for a group whose pages left together, which
is what scans cost, and 256 of them for one whose pages left at different times. A distance of 65,536 quanta (256 times the
cache) or more would be taken for a small one again.
"""

from array import array
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

from cachefs.cache.page import GROUP_PAGES, PAGE_SIZE, runs
from cachefs.statistics import DISTANCE_BOUNDS_BYTES, DistanceSnapshot

if TYPE_CHECKING:
    from cachefs.cache.file import CachedFile

QUANTA_PER_CACHE = 256
_WRAP = 0xFFFF

When: TypeAlias = "int | array[int]"  # quantum of a group's evictions, or one for each of its pages


class Refaults:
    """Remembers evictions in `CachedFile.evicted_at`, beside `CachedFile.evicted`, and counts distances."""

    def __init__(self, capacity_pages: int) -> None:
        self.quantum_pages = max(1, capacity_pages // QUANTA_PER_CACHE)  # stays: what is remembered is counted in it
        self.counts = [0] * (len(DISTANCE_BOUNDS_BYTES) + 1)
        self.total_bytes = 0
        self._evicted_pages = 0

    def left(self, file: "CachedFile", index: int, mask: int) -> None:
        """Pages `mask` of a group were evicted; `CachedFile.evicted` does not have them yet."""
        now = self._now()
        then = file.evicted_at.get(index)
        if then is None or not file.evicted.get(index, 0) & ~mask:
            file.evicted_at[index] = now
        elif then != now:
            each = then if isinstance(then, array) else array("H", [then]) * GROUP_PAGES
            for first, count in runs(mask):
                each[first : first + count] = array("H", [now]) * count
            file.evicted_at[index] = each
        self._evicted_pages += mask.bit_count()

    def came_back(self, file: "CachedFile", index: int, mask: int) -> None:
        """Pages `mask` of a group, evicted once, are missed."""
        then = file.evicted_at.get(index, 0)
        if isinstance(then, array):
            quanta = Counter(then[bit] for first, count in runs(mask) for bit in range(first, first + count))
        else:
            quanta = Counter({then: mask.bit_count()})
        for quantum, count in quanta.items():
            distance_bytes = ((self._now() - quantum) & _WRAP) * self.quantum_pages * PAGE_SIZE
            self.counts[bisect_left(DISTANCE_BOUNDS_BYTES, distance_bytes)] += count
            self.total_bytes += distance_bytes * count

    def _now(self) -> int:
        return self._evicted_pages // self.quantum_pages & _WRAP

    def snapshot(self) -> DistanceSnapshot:
        return DistanceSnapshot(tuple(self.counts), self.total_bytes)
