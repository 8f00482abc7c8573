"""Pages, groups of pages, and the states a page can be in.

A page is 4096 bytes of one file. A group is 256 consecutive, aligned pages (1 MiB) of one file; it owns one slot of the
arena and keeps the state of its pages in *masks*: ints of which bit i stands for page i of the group. A request over
256 pages therefore costs the same few int operations as a request for one.

The states, and the bits a page has in each (no other combination is legal, `Group.check` says so):

    state       uptodate dirty writeback filling     equal to the backing
    ABSENT         -       -       -        -         nothing held
    FILLING        -       -       -        x         a thread is reading it from the backing
    CLEAN          x       -       -        -         yes
    DIRTY          x       x       -        -         newer
    WRITEBACK      x       -       x        -         being made so: a thread is writing it
    REDIRTIED      x       x       x        -         newer than what the thread is writing

    transition                          function            who calls it
    ABSENT    -> FILLING                start_fill          PageCache.start_fill
    FILLING   -> CLEAN | ABSENT         finish_fill         PageCache.finish_fill (ABSENT: failed, or poisoned meanwhile)
    ABSENT, CLEAN, DIRTY -> DIRTY       make_dirty          PageCache.write
    WRITEBACK -> REDIRTIED              make_dirty          PageCache.write
    ABSENT, CLEAN -> CLEAN              make_clean          PageCache.write_clean
    DIRTY     -> WRITEBACK              start_writeback     PageCache.start_writeback
    WRITEBACK -> CLEAN, REDIRTIED -> DIRTY   finish_writeback   PageCache.finish_writeback
    WRITEBACK, REDIRTIED -> DIRTY       fail_writeback      PageCache.finish_writeback
    CLEAN, DIRTY -> ABSENT              forget              PageCache._leave

A FILLING page whose contents become wrong (truncate, invalidate) is *poisoned*: finish_fill makes it ABSENT.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cachefs.cache.file import CachedFile
    from cachefs.cache.waits import Fill

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
GROUP_SHIFT = 8  # pages in a group, as a power of two: 1 MiB is the largest request that FUSE makes
GROUP_PAGES = 1 << GROUP_SHIFT
GROUP_SIZE = GROUP_PAGES * PAGE_SIZE
SMALL_PAGES = 16  # pages in the slot of a group of a small file, see Arena
IN_GROUP = GROUP_PAGES - 1  # index of a page & IN_GROUP = its bit
ALL = (1 << GROUP_PAGES) - 1
Stamp = tuple[str, float]  # of a read: the program's name, the time in seconds to the tick (`account.py`)
FIRST = tuple((1 << n) - 1 for n in range(GROUP_PAGES + 1))  # FIRST[n]: mask of the pages 0..n-1


def span(first: int, last: int) -> int:
    """Mask of the pages first..last, both inside the group, last included."""
    return FIRST[last - first + 1] << first


def runs(mask: int) -> Iterator[tuple[int, int]]:
    """The contiguous runs of a mask as (first, count), ascending."""
    first = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        first += skip
        count = (~mask & (mask + 1)).bit_length() - 1
        yield first, count
        mask >>= count
        first += count


def pieces(offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The pages of bytes [offset, end) by group: (group index, first page in it, last page in it)."""
    page, last = offset >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
    while page <= last:
        index = page >> GROUP_SHIFT
        stop = min(last, (index << GROUP_SHIFT) + IN_GROUP)
        yield index, page & IN_GROUP, stop & IN_GROUP
        page = stop + 1


def key_of(file_id: int, group_index: int) -> int:
    """The name of a group for policies: files have ids, never reused, so that a key never means two things."""
    return file_id << 44 | group_index  # 2**44 groups: 16 EiB


class Group:
    """256 pages of one file: their slot in the arena and the masks of their states.

    `touched` has every page with memory behind it in the slot: those that are resident and those that were (until the
    arena gives the memory back). `prefetched` has pages that readahead brought and nobody has read yet.
    `pinned` has pages, resident or not, that are not to be evicted.
    `born` and `used` tell people how old the group is and who read in it last; nothing else depends on them.
    """

    __slots__ = (
        "base", "born", "capacity", "dirty", "dirty_since", "file", "filling", "fills", "index", "key",
        "pinned", "poisoned", "prefetched", "touched", "uptodate", "used", "writeback",
    )  # fmt: skip

    def __init__(self, file: "CachedFile", index: int, base: int, capacity: int, touched: int) -> None:
        self.file = file
        self.index = index
        self.key = key_of(file.id, index)
        self.base = base  # bytes from the start of the arena
        self.capacity = capacity  # pages that the slot has room for: SMALL_PAGES or GROUP_PAGES
        self.touched = touched
        self.uptodate = self.dirty = self.writeback = self.filling = self.poisoned = self.prefetched = self.pinned = 0
        self.dirty_since = 0.0  # when the oldest dirty page became so; meaningful while `dirty`
        if file.pinned:
            self.pinned = ALL
        self.fills: list[Fill] = []  # under way, each covering some of `filling`
        self.born = 0.0  # when the first page came
        self.used: Stamp | None = None  # of the last read

    @property
    def resident(self) -> int:
        """Pages that take room in the cache."""
        return self.uptodate | self.filling

    @property
    def clean(self) -> int:
        """Pages that may be forgotten without a loss."""
        return self.uptodate & ~(self.dirty | self.writeback)

    @property
    def evictable(self) -> int:
        """Pages that may be forgotten now: the clean ones that nobody has pinned."""
        return self.uptodate & ~(self.dirty | self.writeback | self.pinned)

    def start_fill(self, mask: int, prefetched: int) -> None:
        self.filling |= mask
        self.prefetched |= prefetched

    def finish_fill(self, mask: int, good: bool) -> int:
        """Ends the fill of `mask`; returns the pages that became CLEAN."""
        clean = mask & ~self.poisoned if good else 0
        self.filling &= ~mask
        self.poisoned &= ~mask
        self.uptodate |= clean
        self.prefetched &= ~(mask & ~clean)
        return clean

    def make_dirty(self, mask: int, now: float) -> None:
        if not self.dirty:
            self.dirty_since = now
        self.uptodate |= mask
        self.dirty |= mask
        self.prefetched &= ~mask

    def make_clean(self, mask: int) -> None:
        self.uptodate |= mask
        self.prefetched &= ~mask

    def start_writeback(self, mask: int) -> None:
        self.dirty &= ~mask
        self.writeback |= mask

    def finish_writeback(self, mask: int) -> None:
        self.writeback &= ~mask

    def fail_writeback(self, mask: int, since: float) -> None:
        self.writeback &= ~mask
        self.dirty_since = min(since, self.dirty_since) if self.dirty else since
        self.dirty |= mask

    def forget(self, mask: int) -> None:
        self.uptodate &= ~mask
        self.dirty &= ~mask
        self.prefetched &= ~mask

    def check(self) -> None:
        """Asserts that every page is in one of the named states."""
        assert not self.filling & (self.uptodate | self.dirty | self.writeback), "filling and up to date"
        assert not (self.dirty | self.writeback) & ~self.uptodate, "dirty or in writeback but not up to date"
        assert not self.poisoned & ~self.filling, "poisoned but not filling"
        assert not self.prefetched & ~self.resident, "prefetched but absent"
        assert not self.prefetched & (self.dirty | self.writeback), "prefetched and written"
        assert not self.resident & ~self.touched, "resident without memory"
        assert not self.touched >> self.capacity, "outside the slot"
