"""The journal's data file: 4 KiB slots that hold pages until the backing has them, and which of them are taken.

A slot that is taken is never written again before it is given back, so what was acknowledged stays whole whatever happens
to a later write. Low slots are taken first: the file stays short, and the same few blocks of the disk are used again.
"""

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence

from cachefs.cache.page import ALL, FIRST, GROUP_PAGES, GROUP_SHIFT, PAGE_SHIFT, PAGE_SIZE

MADV_POPULATE_WRITE = 23  # linux/mman.h
READY_SLOTS = 32
RESERVE_SLOTS = 4096  # room on the disk is set aside in steps of 16 MiB

Run = tuple[int, int]  # (first slot, count)


class JournalFull(Exception):
    """There is no free slot: pages have to be written back first."""


class SlotMap:
    """Which of `count` slots are free; they lie in segments of 256, each with a mask of its free ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.used = 0
        self.runs = 0  # that are taken, one for each row
        whole, rest = divmod(count, GROUP_PAGES)
        self._free = [ALL] * whole + ([FIRST[rest]] if rest else [])
        self._lowest = 0  # no segment below has a free slot
        self._longest = [GROUP_PAGES] * len(self._free)  # no segment has a longer run of free ones; it may be shorter
        self.spare = -1  # a free slot that its segment does not show: a page that is written again leaves the next one's

    def take(self, count: int) -> list[Run]:
        """`count` slots (256 at most), in as few runs as can be; JournalFull where there are not so many."""
        if self.used + count > self.count:
            raise JournalFull
        self._show_spare()
        run = self._take_run(count)
        if run is not None:
            return [run]
        half = count // 2
        return self.take(half) + self.take(count - half)

    def take_one(self) -> int:
        """One slot, or JournalFull: what most writes need, without the search."""
        if self.used >= self.count:
            raise JournalFull
        self.used += 1
        self.runs += 1
        if (spare := self.spare) >= 0:
            self.spare = -1
            return spare
        free = self._free
        while not (mask := free[self._lowest]):
            self._lowest += 1
        bit = mask & -mask
        free[self._lowest] = mask ^ bit
        return (self._lowest << GROUP_SHIFT) + bit.bit_length() - 1

    def _take_run(self, count: int) -> Run | None:
        free = self._free
        while not free[self._lowest]:
            self._lowest += 1
        for segment in range(self._lowest, len(free)):
            if self._longest[segment] < count:
                continue
            first = first_run(free[segment], count)
            if first < 0:
                self._longest[segment] = count - 1
            else:
                free[segment] &= ~(FIRST[count] << first)
                self.used += count
                self.runs += 1
                return segment << GROUP_SHIFT | first, count
        return None

    def claim(self, run: Run) -> None:
        """Takes slots that a journal left behind has pages in."""
        self.runs += 1
        for slot in range(run[0], run[0] + run[1]):
            bit = 1 << (slot & GROUP_PAGES - 1)
            if slot < self.count and self._free[slot >> GROUP_SHIFT] & bit:
                self._free[slot >> GROUP_SHIFT] &= ~bit
                self.used += 1

    def give(self, run: Run) -> None:
        """Makes slots free again."""
        self._show(*run)
        self.used -= run[1]
        self.runs -= 1

    def give_one(self, slot: int) -> None:
        self._show_spare()
        self.spare = slot
        self.used -= 1
        self.runs -= 1

    def _show_spare(self) -> None:
        if (slot := self.spare) >= 0:
            self.spare = -1
            self._show(slot, 1)

    def _show(self, slot: int, count: int) -> None:
        segment = slot >> GROUP_SHIFT
        self._free[segment] |= FIRST[count] << (slot & GROUP_PAGES - 1)
        if (longest := self._longest[segment]) < GROUP_PAGES:
            self._longest[segment] = min(GROUP_PAGES, 2 * longest + count)  # between two as long
        if segment < self._lowest:
            self._lowest = segment

    def check(self) -> None:
        """Asserts that the count is that of the masks."""
        free = sum(mask.bit_count() for mask in self._free) + (self.spare >= 0)
        assert self.used == self.count - free, "slots miscounted"
        assert self.spare < 0 or not self._free[self.spare >> GROUP_SHIFT] >> (self.spare & GROUP_PAGES - 1) & 1
        assert not any(self._free[: self._lowest]), "a free slot below the lowest"
        for mask, longest in zip(self._free, self._longest, strict=True):
            assert longest == GROUP_PAGES or first_run(mask, longest + 1) < 0, "a longer run"


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
    """The file behind the slots. Whatever becomes of us, the kernel has what was written: single pages through a shared
    mapping (`map`), which costs a fifth of a pwrite; longer runs by pwrite, which takes no fault.
    """

    def __init__(self, path: str, slots: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.reserved = 0  # slots that the disk has set room aside for, and that are mapped
        self._slots = slots
        self.map = mmap.mmap(-1, PAGE_SIZE)
        self.used = 0  # slots before are reserved, and have been written to or made ready
        self.left = 0  # slots from here on have nothing in them that a predecessor left

    def steps(self, slots: int) -> int:
        """As many slots as are reserved where so many are needed."""
        return min(self._slots, -(-slots // RESERVE_SLOTS) * RESERVE_SLOTS)

    def reserve(self, slots: int) -> None:
        """Has the disk set room aside for so many, or some more: a store into a mapped page without would kill the process."""
        wanted = self.steps(slots)
        os.posix_fallocate(self.fd, 0, wanted << PAGE_SHIFT)
        before, self.map = self.map, mmap.mmap(self.fd, wanted << PAGE_SHIFT)
        before.close()
        self.map.madvise(mmap.MADV_RANDOM)
        self.reserved = wanted

    def write_one(self, slot: int, data: memoryview) -> None:
        """Writes one page into a slot that is reserved; OSError where the disk takes less."""
        if slot >= self.used:
            self._make_ready(slot, min(READY_SLOTS, self.reserved - slot) if slot >= self.left else 1)
        start = slot << PAGE_SHIFT
        self.map[start : start + PAGE_SIZE] = data

    def _make_ready(self, slot: int, count: int) -> None:
        """Has the kernel hold pages for slots with nothing in them: many at once cost a third of what each would alone."""
        if os.pwrite(self.fd, bytes(count << PAGE_SHIFT), slot << PAGE_SHIFT) != count << PAGE_SHIFT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with contextlib.suppress(OSError):  # Linux before 5.14; then each store has a fault
            self.map.madvise(MADV_POPULATE_WRITE, slot << PAGE_SHIFT, count << PAGE_SHIFT)
        self.used = slot + count

    def write(self, runs: Sequence[Run], data: memoryview) -> None:
        """Writes pages into `runs` one after the other; OSError where the disk takes less."""
        at = 0
        for slot, count in runs:
            self.used = max(self.used, slot + count)
            offset, stop = slot << PAGE_SHIFT, at + (count << PAGE_SHIFT)
            while at < stop:
                nbytes = os.pwrite(self.fd, data[at:stop], offset)
                at, offset = at + nbytes, offset + nbytes  # short where the disk is full; the next one says so

    def read(self, run: Run) -> bytes:
        """The pages of a run; shorter where the file ends before."""
        return os.pread(self.fd, run[1] << PAGE_SHIFT, run[0] << PAGE_SHIFT)

    def sync(self) -> None:
        """Makes what was written durable; slow."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)
