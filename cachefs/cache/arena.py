"""The one piece of memory that all pages live in.

The arena is an anonymous mapping far larger than the cache: address space costs nothing, only pages that were touched
have memory behind them. So every group has a slot with a fixed place for each of its pages, and pages of a file that are
neighbours in the file are neighbours in memory, however they came and went. Slots come in two sizes, because page tables
cost 4 KiB for every 2 MiB of addresses in use: 1 MiB, and 64 KiB for groups of small files. A group is given the slot
behind its predecessor's where that is free, so that reads across a group's end find one run of memory too.

The kernel copies from huge pages nearly twice as fast as from small ones, and a first touch costs a quarter (docs/decisions.md).
But one touched byte puts 2 MiB behind it. So groups that are about to be filled whole have slots of their own, in pairs of the
size of a huge page; all of a pair counts as touched from the start, and other groups never get there.

Memory behind pages that left is kept for reuse (a first touch costs four times a copy here, docs/decisions.md), up to
`slack_pages`; beyond that it goes back to the kernel. `physical_pages` never exceeds `capacity_pages + slack_pages`.
"""

import contextlib
import ctypes
import mmap
from itertools import pairwise

from cachefs.cache.page import ALL, GROUP_PAGES, GROUP_SIZE, PAGE_SIZE, SMALL_PAGES, Group, runs
from cachefs.errors import CachefsError

MAP_NORESERVE = 0x4000  # linux/mman.h; Python names it from 3.13 on
LARGEST_BYTES = 1 << 46  # 64 TiB of addresses, half of what a process has
HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
HUGE_PAGE_BYTES = 2 * GROUP_SIZE
PAIRS_MOST = 1 << 14  # 32 GiB: the kernel has 65,530 parts of memory that differ, and each that is not huge may make two more
SLACK_MAX_PAGES = (32 << 20) // PAGE_SIZE


class Arena:
    """Memory for `capacity_pages` resident pages, later for up to `most_pages`; hands out slots and takes them back."""

    def __init__(self, capacity_pages: int, most_pages: int = 0) -> None:
        self.capacity_pages = capacity_pages
        self.slack_pages = _slack(capacity_pages)
        self.physical_pages = 0
        self._map = _reserve(capacity_pages, max(capacity_pages, most_pages))
        self.view = memoryview(self._map)
        half = len(self._map) // 2 // GROUP_SIZE * GROUP_SIZE  # large slots grow from 0, small ones from the middle
        most = len(self._map) * 3 // 4 // GROUP_SIZE * GROUP_SIZE
        self._large = _Slots(0, half, GROUP_PAGES)
        self._small = _Slots(half, most, SMALL_PAGES)
        self._whole = _Pairs(*_huge(self._map, most))
        self._holey: dict[Group, None] = {}  # groups with touched pages that are not resident, oldest first

    @property
    def most_pages(self) -> int:
        """The largest capacity that the addresses suffice for, wherever its pages lie in their files."""
        return max(self.capacity_pages, len(self._map) // (2 * GROUP_SIZE) - GROUP_PAGES)

    def resize(self, capacity_pages: int) -> None:
        """Another capacity, at least what is resident and at most `most_pages`."""
        self.capacity_pages = capacity_pages
        self.slack_pages = _slack(capacity_pages)
        self._give_back(None, 0)

    def allocate(self, pages: int, near: int, whole: bool = False) -> tuple[int, int, int]:
        """A slot for `pages` pages: (base, capacity, touched mask), at offset `near` if that one is free (-1: anywhere).

        `whole`: it is expected to be filled, or nearly.
        """
        room = self.physical_pages + 2 * GROUP_PAGES <= self.capacity_pages + self.slack_pages
        if whole and (room or self._whole.warm) and (found := self._whole.take_whole(near)) is not None:
            base, touched, fresh = found
            self.physical_pages += fresh
            if fresh:
                self._advise(base, mmap.MADV_HUGEPAGE)
            return base, GROUP_PAGES, touched
        slots = self._small if pages <= SMALL_PAGES else self._large
        base, touched = slots.take(near)
        return base, slots.pages, touched

    def move(self, group: Group) -> None:
        """Gives a group that outgrew its small slot a large one; at most 64 KiB are copied, once in a group's life."""
        moved = Group(group.file, group.index, *self.allocate(GROUP_PAGES, -1))
        self.touch(moved, group.uptodate)
        for first, count in runs(group.uptodate):
            start, stop = first * PAGE_SIZE, (first + count) * PAGE_SIZE
            self.view[moved.base + start : moved.base + stop] = self.view[group.base + start : group.base + stop]
        self.release(group)
        group.base, group.capacity, group.touched = moved.base, moved.capacity, moved.touched
        if group.touched & ~group.uptodate:
            self.leave_holes(group)

    def release(self, group: Group) -> None:
        """Takes back the slot of a group that has no resident page left."""
        self._holey.pop(group, None)
        slots = self._small if group.capacity == SMALL_PAGES else self._whole if self._whole.has(group.base) else self._large
        slots.give(group.base, group.touched)

    def touch(self, group: Group, mask: int) -> None:
        """To be called before anything is written to pages `mask`: accounts for their memory, gives back stale memory."""
        fresh = mask & ~group.touched
        if fresh:
            group.touched |= fresh
            self.physical_pages += fresh.bit_count()
            if self.physical_pages > self.capacity_pages + self.slack_pages:
                self._give_back(group, mask)

    def leave_holes(self, group: Group) -> None:
        """Notes that `group` has memory behind pages that are not resident."""
        self._holey[group] = None

    def zero(self, start: int, end: int) -> None:
        if end > start:
            self.view[start:end] = bytes(end - start)

    def _give_back(self, wanted_by: Group | None, wanted: int) -> None:
        """Returns stale memory to the kernel, but for the pages `wanted`, about to be used."""
        limit = self.capacity_pages + self.slack_pages
        while self.physical_pages > limit:
            if self._holey:
                group = next(iter(self._holey))
                del self._holey[group]
                stale = group.touched & ~group.resident
                if group is wanted_by:
                    stale &= ~wanted
                group.touched &= ~stale
                self._discard(group.base, stale)
            else:
                slots = next(slots for slots in (self._large, self._small, self._whole) if slots.warm)
                self._discard(*slots.cool())

    def _advise(self, base: int, advice: int) -> None:
        """Whether the kernel is to have a huge page there. By itself it would make one again of a page that is left of one."""
        if self._whole.changed(base, advice == mmap.MADV_NOHUGEPAGE):
            with contextlib.suppress(OSError):  # too many parts of memory that differ
                self._map.madvise(advice, self._whole.first(base), HUGE_PAGE_BYTES)

    def _discard(self, base: int, mask: int) -> None:
        self.physical_pages -= mask.bit_count()
        if mask and self._whole.has(base):
            self._advise(base, mmap.MADV_NOHUGEPAGE)
        for first, count in runs(mask):
            self._map.madvise(mmap.MADV_DONTNEED, base + first * PAGE_SIZE, count * PAGE_SIZE)

    def check(self, groups: list[Group]) -> None:
        """Asserts that memory is accounted for: what groups touched and what warm slots hold."""
        held = sum(group.touched.bit_count() for group in groups)
        every = (self._large, self._small, self._whole)
        warm = sum(mask.bit_count() for slots in every for mask in slots.warm.values())
        assert self.physical_pages == held + warm, (self.physical_pages, held, warm)
        assert all(group in self._holey for group in groups if group.touched & ~group.resident), "holes nobody knows of"
        assert self.physical_pages <= self.capacity_pages + self.slack_pages
        taken = [(g.base, g.base + g.capacity * PAGE_SIZE) for g in groups]
        taken += [(b, b + s.pages * PAGE_SIZE) for s in every for b in (*s.warm, *s.cold)]
        taken.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(taken)), "slots overlap"


class _Slots:
    """Free slots of one size in [start, end) of the arena. `warm` ones have memory behind some pages, `cold` ones none."""

    def __init__(self, start: int, end: int, pages: int) -> None:
        self.pages = pages
        self.warm: dict[int, int] = {}  # {base: touched mask}, in the order they were given back
        self.cold: dict[int, int] = {}  # {base: 0}
        self._next, self._end = start, end

    def take(self, near: int) -> tuple[int, int]:
        # Oldest first: slots come back in the order they were filled, so streams find their neighbours free again.
        for free in (self.warm, self.cold):
            if near in free:
                return near, free.pop(near)
        if self.warm:
            base = next(iter(self.warm))
            return base, self.warm.pop(base)
        if self.cold:
            base = next(iter(self.cold))
            return base, self.cold.pop(base)
        base = self._next
        if base + self.pages * PAGE_SIZE > self._end:
            raise MemoryError("the arena has no address space left")
        self._next += self.pages * PAGE_SIZE
        return base, 0

    def give(self, base: int, touched: int) -> None:
        (self.warm if touched else self.cold)[base] = touched

    def cool(self) -> tuple[int, int]:
        """Makes the youngest warm slot cold: (base, mask that has to be given back)."""
        base, touched = self.warm.popitem()
        self.cold[base] = 0
        return base, touched


class _Pairs(_Slots):
    """Slots of groups that are filled whole, two in each huge page."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__(start, min(end, start + PAIRS_MOST * HUGE_PAGE_BYTES), GROUP_PAGES)
        self._start = start
        self._small: set[int] = set()  # first slots of pairs that are to have small pages

    def first(self, base: int) -> int:
        """The first slot of the pair."""
        return base - (base - self._start) % HUGE_PAGE_BYTES

    def changed(self, base: int, small: bool) -> bool:
        """Notes which pages the pair is to have; whether it had others."""
        first = self.first(base)
        if small == (first in self._small):
            return False
        (self._small.add if small else self._small.remove)(first)
        return True

    def has(self, base: int) -> bool:
        return self._start <= base < self._end

    def take_whole(self, near: int) -> tuple[int, int, int] | None:
        """A slot, its touched mask, and how many pages were not touched until now; None where all are taken."""
        if self.warm:
            return *self.take(near if near in self.warm else -1), 0
        if not self.cold:
            if self._next + 2 * GROUP_SIZE > self._end:
                return None
            self.cold |= {self._next: 0, self._next + GROUP_SIZE: 0}
            self._next += 2 * GROUP_SIZE
        base, touched = self.take(near)
        other = self._start + (base - self._start ^ GROUP_SIZE)
        if other not in self.cold:  # what is left of this huge page is in small ones
            return base, touched, 0
        del self.cold[other]
        self.warm[other] = ALL
        return base, ALL, 2 * GROUP_PAGES


def _slack(capacity_pages: int) -> int:
    return min(SLACK_MAX_PAGES, max(GROUP_PAGES, capacity_pages // 8))


def _huge(memory: mmap.mmap, start: int) -> tuple[int, int]:
    """The part of `memory` behind `start` that huge pages fit into; nothing where the kernel has none."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start += -(address + start) % HUGE_PAGE_BYTES
    end = start + (len(memory) - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end <= start:
        return start, start
    try:
        with open(HUGE_PAGES) as file:
            if "[never]" in file.read():
                return start, start
        memory.madvise(mmap.MADV_HUGEPAGE, start, end - start)
    except OSError:
        return start, start
    return start, end


def _reserve(capacity_pages: int, most_pages: int) -> mmap.mmap:
    """Address space with a slot for every page, were each in a group of its own; less where the system is strict."""
    smallest = max(4, 4 * capacity_pages // GROUP_PAGES) * GROUP_PAGES * PAGE_SIZE
    length = max(smallest, min(LARGEST_BYTES, 2 * (most_pages + GROUP_PAGES) * GROUP_PAGES * PAGE_SIZE))
    while True:
        try:
            memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            break
        except (OSError, ValueError) as error:
            length //= 2
            if length < smallest:
                raise CachefsError(f"cannot reserve memory for the cache ({error}); use a smaller --cache-size") from None
    # A huge page would put 2 MiB behind a single touched page, and the size limit would mean nothing: `_huge` is for those
    # parts where that is known.
    for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK):
        memory.madvise(advice)
    return memory
