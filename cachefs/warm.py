"""Bringing files into memory because somebody asked for it: in parallel, and no more than the cache can hold."""

from collections.abc import Iterator

import trio

from cachefs.cache import wishes
from cachefs.cache.file import CachedFile
from cachefs.cache.page import GROUP_PAGES, PAGE_SHIFT
from cachefs.files import Files
from cachefs.inode import Inode

CHUNKS_AT_ONCE = 4  # of one file, a group each
WHOLE_FILE = 1 << 52  # more pages than a file has


class Warming:
    """One such request; at most `budget_pages` are read for it. `full` says that it was not enough."""

    def __init__(self, files: Files, budget_pages: int) -> None:
        self.files = files
        self.cache = files.cache
        self.budget_pages = budget_pages
        self.done_pages = 0  # in memory now, read for this request or here before
        self.full = False

    async def file(self, inode: Inode, first_page: int = 0, end_page: int = WHOLE_FILE) -> None:
        """Brings pages [first_page, end_page) of a regular file that the caller keeps known; raises OSError."""
        file, problems = self.files.ensure_file(inode), list[OSError]()
        inode.busy += 1  # its descriptor stays open from chunk to chunk
        try:
            await self.files.data.reader(inode)
            chunks = _chunks(file, first_page, end_page)
            async with trio.open_nursery() as nursery:
                for _ in range(CHUNKS_AT_ONCE):
                    nursery.start_soon(self._worker, file, chunks, problems)
        finally:
            inode.busy -= 1
            self.files.data.settle(inode)
        if problems:
            raise problems[0]

    async def _worker(self, file: CachedFile, chunks: Iterator[tuple[int, int]], problems: list[OSError]) -> None:
        for page, end in chunks:
            absent = sum(count for _, count in file.absent_runs(page, end))
            if absent > self.budget_pages or problems:
                self.full = self.full or absent > self.budget_pages
                return
            self.budget_pages -= absent
            try:
                await self.files.filler.fetch(file, page, end)
            except OSError as problem:
                problems.append(problem)
                return
            wishes.want(self.cache, file, page, end)
            self.done_pages += end - page
            await trio.lowlevel.checkpoint()  # a local store answers without one


def _chunks(file: CachedFile, first_page: int, end_page: int) -> Iterator[tuple[int, int]]:
    """[page, end) of each group's part; the end of the file is looked at anew each time."""
    page = first_page
    while page < (stop := min(end_page, file.end_page)):
        end = min((page | GROUP_PAGES - 1) + 1, stop)
        yield page, end
        page = end


def budget_pages(files: Files) -> int:
    """What the cache can hold besides pins and unwritten data."""
    cache = files.cache
    return max(0, cache.capacity_pages - cache.pinned_pages - cache.dirty_limit_pages)


def pages_of(nbytes: int) -> int:
    return (nbytes + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT
