"""The journal's data file: 4 KiB slots that hold pages until the backing has them, and which of them are taken.

A slot that is taken is never written again before it is given back, so what was acknowledged stays whole whatever happens
to a later write. Low slots are taken first: the file stays short, and the same few blocks of the disk are used again.
"""

import os
from collections.abc import Sequence

from cachefs.cache.page import ALL, FIRST, GROUP_PAGES, GROUP_SHIFT, PAGE_SIZE

Run = tuple[int, int]  # (first slot, count)


class JournalFull(Exception):
    """There is no free slot: pages have to be written back first."""


class SlotMap:
    """Which of `count` slots are free; they lie in segments of 256, each with a mask of its free ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.used = 0
        whole, rest = divmod(count, GROUP_PAGES)
        self._free = [ALL] * whole + ([FIRST[rest]] if rest else [])
        self._lowest = 0  # no segment below has a free slot

    def take(self, count: int) -> list[Run]:
        """`count` slots (256 at most), in as few runs as can be; JournalFull where there are not so many."""
        if self.used + count > self.count:
            raise JournalFull
        run = self._take_run(count)
        if run is not None:
            return [run]
        half = count // 2
        return self.take(half) + self.take(count - half)

    def _take_run(self, count: int) -> Run | None:
        free = self._free
        while not free[self._lowest]:
            self._lowest += 1
        for segment in range(self._lowest, len(free)):
            first = first_run(free[segment], count)
            if first >= 0:
                free[segment] &= ~(FIRST[count] << first)
                self.used += count
                return segment << GROUP_SHIFT | first, count
        return None

    def claim(self, run: Run) -> None:
        """Takes slots that a journal left behind has pages in."""
        for slot in range(run[0], run[0] + run[1]):
            bit = 1 << (slot & GROUP_PAGES - 1)
            if slot < self.count and self._free[slot >> GROUP_SHIFT] & bit:
                self._free[slot >> GROUP_SHIFT] &= ~bit
                self.used += 1

    def give(self, run: Run) -> None:
        """Makes slots free again."""
        slot, count = run
        segment = slot >> GROUP_SHIFT
        self._free[segment] |= FIRST[count] << (slot & GROUP_PAGES - 1)
        self.used -= count
        self._lowest = min(self._lowest, segment)

    def check(self) -> None:
        """Asserts that the count is that of the masks."""
        assert self.used == self.count - sum(mask.bit_count() for mask in self._free), "slots miscounted"
        assert not any(self._free[: self._lowest]), "a free slot below the lowest"


def first_run(mask: int, count: int) -> int:
    """The lowest position of `count` neighbouring ones in `mask`, or -1."""
    if mask.bit_count() < count:
        return -1
    have = 1
    while have < count:  # afterwards bit i stands for `have` ones from i on
        step = min(have, count - have)
        mask &= mask >> step
        have += step
    return (mask & -mask).bit_length() - 1


class SlotFile:
    """The file behind the slots. Written with pwrite: the kernel has the bytes when it returns, whatever becomes of us."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, runs: Sequence[Run], data: memoryview) -> None:
        """Writes pages into `runs` one after the other; OSError where the disk takes less."""
        at = 0
        for slot, count in runs:
            self._write_run(slot, data[at : at + count * PAGE_SIZE])
            at += count * PAGE_SIZE

    def _write_run(self, slot: int, data: memoryview) -> None:
        offset = slot * PAGE_SIZE
        while data:
            nbytes = os.pwrite(self.fd, data, offset)  # short where the disk is full; the next one says so
            data, offset = data[nbytes:], offset + nbytes

    def read(self, run: Run) -> bytes:
        """The pages of a run; shorter where the file ends before."""
        return os.pread(self.fd, run[1] * PAGE_SIZE, run[0] * PAGE_SIZE)

    def sync(self) -> None:
        """Makes what was written durable; slow."""
        os.fdatasync(self.fd)

    def empty(self) -> None:
        """Gives the disk its room back."""
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        os.close(self.fd)
