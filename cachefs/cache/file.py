"""One file as the page cache sees it: its size, its groups of pages and what it remembers of pages that left."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from cachefs.cache.page import GROUP_SHIFT, IN_GROUP, PAGE_SHIFT, PAGE_SIZE, Group, runs

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
