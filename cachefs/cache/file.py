"""One file as the page cache sees it: its size, its groups of pages and what it remembers of pages that left."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from cachefs.cache.page import GROUP_SHIFT, IN_GROUP, PAGE_SHIFT, PAGE_SIZE, Group, pieces, runs, span
from cachefs.cache.waits import Fill

if TYPE_CHECKING:
    from cachefs.cache.refault import When


class Source(Protocol):
    """Where the pages of a file come from; all the cache knows of the backing."""

    def read_now(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes read into `buffers` from `offset`; raises BlockingIOError where that would wait for a device or network."""

    async def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes read into `buffers` from `offset`, fewer than asked only at the end of the backing file; raises OSError."""

    async def write(self, extents: Sequence[tuple[int, list[memoryview]]]) -> tuple[int, OSError | None]:
        """Writes extents (offset, buffers) in order; returns how many were written, and what stopped it."""


class CachedFile:
    """The cached part of one file.

    `size` is what programs see, in bytes; the backing's may lag behind while pages are dirty. Bytes of an up to date page
    that lie past `size` are zero, so that a file can grow without touching old pages.
    """

    __slots__ = (
        "dirty_groups", "dirty_pages", "evicted", "evicted_at", "filling_pages", "groups", "id", "invalidated", "page_hits",
        "page_misses", "pinned", "redirtied_pages", "resident_pages", "size", "source", "transient", "writeback_pages",
    )  # fmt: skip

    def __init__(self, file_id: int, source: Source, size: int) -> None:
        self.id = file_id
        self.source = source
        self.size = size
        self.groups: dict[int, Group] = {}  # {group index: Group}, only groups with resident pages
        self.dirty_groups: dict[int, None] = {}  # indexes of groups with dirty pages, first dirtied first
        self.resident_pages = 0
        self.dirty_pages = 0
        self.writeback_pages = 0
        self.redirtied_pages = 0  # both dirty and in writeback
        self.filling_pages = 0
        self.page_hits = self.page_misses = 0  # of reads, as long as the file is known
        self.pinned = False  # its pages are not evicted
        # {group index: mask} of pages that came for readers who will not come back, or were written by such; bits of absent
        # pages mean nothing
        self.transient: dict[int, int] = {}
        self.evicted: dict[int, int] = {}  # {group index: mask} of pages that were evicted and not filled since
        self.evicted_at: dict[int, When] = {}  # when these were, see `refault.py`
        self.invalidated: dict[int, int] = {}  # the same for pages dropped because the backing changed

    @property
    def end_page(self) -> int:
        """Index behind the last page."""
        return (self.size + PAGE_SIZE - 1) // PAGE_SIZE

    @property
    def clean_pages(self) -> int:
        return self.resident_pages - self.filling_pages - self.dirty_pages - self.writeback_pages + self.redirtied_pages

    @property
    def cached_bytes(self) -> int:
        """Bytes of the file that can be read from memory."""
        nbytes = sum(group.uptodate.bit_count() for group in self.groups.values()) << PAGE_SHIFT
        page, tail = divmod(self.size, PAGE_SIZE)
        last = self.groups.get(page >> GROUP_SHIFT)
        if tail and last is not None and last.uptodate >> (page & IN_GROUP) & 1:
            nbytes -= PAGE_SIZE - tail
        return nbytes

    @property
    def unwritten(self) -> bool:
        """Whether anything of this file is not on the backing yet."""
        return bool(self.dirty_pages or self.writeback_pages)

    @property
    def dirty_since(self) -> float:
        """When the page that has been dirty longest became so; only with dirty pages."""
        return min(self.groups[index].dirty_since for index in self.dirty_groups)

    def dirty_extents(self) -> list[tuple[int, int]]:
        """What is newer than the backing, as (offset, length) in bytes, ascending."""
        found: list[tuple[int, int]] = []
        for index in sorted(self.groups):
            group = self.groups[index]
            for first, count in runs(group.dirty | group.writeback):
                offset = (index << GROUP_SHIFT | first) << PAGE_SHIFT
                length = min(count << PAGE_SHIFT, self.size - offset)
                if found and sum(found[-1]) == offset:
                    found[-1] = (found[-1][0], found[-1][1] + length)
                else:
                    found.append((offset, length))
        return found

    def unwritten_behind(self, size: int) -> int:
        """Bytes newer than the backing in pages that lie wholly behind `size`, the end of the backing's file."""
        first, pages = -(-size // PAGE_SIZE), 0
        for index, group in self.groups.items():
            pages += ((group.dirty | group.writeback) >> max(0, first - (index << GROUP_SHIFT))).bit_count()
        return min(pages * PAGE_SIZE, max(0, self.size - size))

    def absent_runs(self, start_page: int, end_page: int) -> list[tuple[int, int]]:
        """The runs (first page, count) of [start_page, end_page) that are neither up to date nor filling, none across groups."""
        found: list[tuple[int, int]] = []
        for index, first, last in pieces(start_page << PAGE_SHIFT, end_page << PAGE_SHIFT):
            group = self.groups.get(index)
            mask = span(first, last)
            if group is not None:
                mask &= ~group.resident
            found += ((index << GROUP_SHIFT | at, count) for at, count in runs(mask))
        return found

    def fills_of(self, start_page: int, end_page: int) -> list[Fill]:
        """The fills under way that cover any page of [start_page, end_page)."""
        found: list[Fill] = []
        for index, first, last in pieces(start_page << PAGE_SHIFT, end_page << PAGE_SHIFT):
            group = self.groups.get(index)
            if group is not None and group.filling:
                mask = span(first, last)
                found += [fill for fill in group.fills if fill.mask & mask]
        return found

    def pages_to_fill(self, offset: int, size: int) -> list[int]:
        """Pages that a write of [offset, offset + size) covers only partly, that hold data, and that are not here yet."""
        end = offset + size
        if not offset & (PAGE_SIZE - 1) and (end >= self.size or not end & (PAGE_SIZE - 1)):
            return []
        wanted = {page for page, at in ((offset >> PAGE_SHIFT, offset), (end >> PAGE_SHIFT, end)) if at & (PAGE_SIZE - 1)}
        found = []
        for page in sorted(wanted):
            start = page << PAGE_SHIFT
            covered = offset <= start and end >= min(start + PAGE_SIZE, self.size)
            group = self.groups.get(page >> GROUP_SHIFT)
            here = group is not None and group.uptodate >> (page & IN_GROUP) & 1
            if not here and not covered and start < self.size:
                found.append(page)
        return found

    def absent(self, index: int, mask: int) -> int:
        """Those of pages `mask` of a group that are not up to date."""
        group = self.groups.get(index)
        return mask if group is None else mask & ~group.uptodate

    def not_dirty(self, index: int, mask: int) -> int:
        """Those of pages `mask` of a group that a write would make dirty."""
        group = self.groups.get(index)
        return mask if group is None else mask & ~group.dirty

    def mark(self, index: int, mask: int, transient: bool) -> None:
        """Pages `mask` of a group came, or were written, for one use or not."""
        if transient:
            self.transient[index] = self.transient.get(index, 0) | mask
        elif index in self.transient:
            self.transient[index] &= ~mask

    def remember_no_more(self, index: int, mask: int) -> None:
        """Pages `mask` of a group are there again."""
        for memory in (self.evicted, self.invalidated):
            if index in memory:
                memory[index] &= ~mask
                if not memory[index]:
                    del memory[index]
        if index not in self.evicted:
            self.evicted_at.pop(index, None)

    def forget_from(self, page: int) -> None:
        """Pages from `page`'s group on are nothing that could come back."""
        for memory in (self.evicted, self.invalidated, self.evicted_at):
            for index in [i for i in memory if i >= page >> GROUP_SHIFT]:
                memory.pop(index)

    def check(self) -> None:
        groups = self.groups.values()
        assert self.resident_pages == sum(g.resident.bit_count() for g in groups)
        assert self.filling_pages == sum(g.filling.bit_count() for g in groups)
        assert self.redirtied_pages == sum((g.dirty & g.writeback).bit_count() for g in groups)
        assert self.clean_pages == sum(g.clean.bit_count() for g in groups)
        assert self.dirty_pages == sum(g.dirty.bit_count() for g in groups)
        assert self.writeback_pages == sum(g.writeback.bit_count() for g in groups)
        assert set(self.dirty_groups) == {g.index for g in groups if g.dirty}
        for index, group in self.groups.items():
            assert group.index == index and group.file is self and group.resident, "group without pages"
            group.check()
