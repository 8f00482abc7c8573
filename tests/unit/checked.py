"""A page cache whose invariants are checked at every step; the tests are its backing."""

from __future__ import annotations

from cachefs.cache.file import CachedFile
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.cache.policy import make
from cachefs.cache.waits import Fill

P = PAGE_SIZE


class Checked(PageCache):
    """Checks every invariant when it is asked what it did."""

    def __init__(self, policy: str, pages: int) -> None:
        self.now = 0.0
        super().__init__(make(policy, pages), pages, lambda: self.now)

    def file(self, size: int) -> CachedFile:
        return self.add_file(None, size)  # type: ignore[arg-type]  # the tests are the backing

    def begin(self, file: CachedFile, page: int, count: int = 1, wanted: int | None = None) -> Fill:
        fill = self.start_fill(file, page, count, count if wanted is None else wanted)
        self.check_invariants()
        return fill

    def end(self, fill: Fill, data: bytes | None = None) -> None:
        data = contents(fill.offset, fill.count * P) if data is None else data
        fill.view[: len(data)] = data
        self.finish_fill(fill, len(data))
        self.check_invariants()

    def bring(self, file: CachedFile, page: int, count: int = 1) -> None:
        self.end(self.begin(file, page, count))

    def put(self, file: CachedFile, offset: int, data: bytes) -> None:
        assert not file.pages_to_fill(offset, len(data))
        self.write(file, offset, data)
        self.check_invariants()

    def written(self, file: CachedFile) -> None:
        """All that is dirty goes to the backing."""
        for index in list(file.dirty_groups):
            group, mask = file.groups[index], file.groups[index].dirty
            self.start_writeback(group, mask)
            self.check_invariants()
            self.finish_writeback(group, mask, None)
            self.check_invariants()

    def seen(self, file: CachedFile, offset: int, size: int) -> bytes | None:
        view = self.lookup(file, offset, size)
        self.check_invariants()
        return None if view is None else bytes(view)


def contents(offset: int, size: int) -> bytes:
    """What the backing has: bytes that tell their page."""
    first = offset // P
    pages = b"".join(bytes([page % 251 + 1]) * P for page in range(first, (offset + size) // P + 1))
    return pages[offset - first * P :][:size]
