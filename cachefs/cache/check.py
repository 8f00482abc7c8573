"""The page cache's invariants, all of them, asserted: tests do so after every step."""

from typing import TYPE_CHECKING

from cachefs.cache.page import ALL, GROUP_SHIFT, IN_GROUP, PAGE_SIZE, Group

if TYPE_CHECKING:
    from cachefs.cache.pagecache import PageCache


def check(cache: "PageCache") -> None:
    """Raises AssertionError where figures, states, policy and memory of a cache do not agree."""
    groups = cache.groups()
    files = {group.file for group in groups}
    for file in files:
        file.check()
    assert cache.resident_pages == sum(file.resident_pages for file in files) <= cache.capacity_pages
    assert cache.dirty_pages == sum(file.dirty_pages for file in files)
    assert cache.writeback_pages == sum(file.writeback_pages for file in files)
    assert cache.pinned_pages == sum(file.resident_pages for file in files if file.pinned)
    assert cache.redirtied_pages == sum(file.redirtied_pages for file in files)
    assert all(file.pinned for file in cache.pinned_files)
    assert all(group.pinned == (ALL if group.file.pinned else 0) for group in groups), "a pin that half holds"
    assert cache.filling_pages == sum(group.filling.bit_count() for group in groups)
    assert all(group.file.groups[group.index] is group for group in groups)
    assert cache.policy.pages() == {group.key: group.uptodate for group in groups if group.uptodate}, "policy knows others"
    assert cache.accounts.total("page_misses") == sum(cache.misses.values())
    for group in groups:
        _check_fills(group)
        _check_tail(cache, group)
    cache.policy.check()
    cache.arena.check(groups)


def _check_fills(group: Group) -> None:
    filled = 0
    for fill in group.fills:
        assert not filled & fill.mask, "two fills of one page"
        filled |= fill.mask
    assert filled == group.filling, "filling without a fill"


def _check_tail(cache: "PageCache", group: Group) -> None:
    page, tail = divmod(group.file.size, PAGE_SIZE)
    if tail and page >> GROUP_SHIFT == group.index and group.uptodate >> (page & IN_GROUP) & 1:
        start = group.base + (page & IN_GROUP) * PAGE_SIZE
        assert not any(cache.arena.view[start + tail : start + PAGE_SIZE]), "bytes past the end of the file are not zero"
