"""Pages that leave because their contents are wrong or unwanted: the file was cut, is gone, or is another in the backing.

Plain code in the trio thread, like `PageCache` itself. Pages that a thread fills are *poisoned*, see `page.py`; those that one
writes stay.
"""

from cachefs.cache.file import CachedFile
from cachefs.cache.page import FIRST, GROUP_PAGES, GROUP_SHIFT, IN_GROUP, PAGE_SIZE
from cachefs.cache.pagecache import PageCache


def truncate(cache: PageCache, file: CachedFile, size: int) -> None:
    """Cuts or grows the file to `size` bytes. Pages past it leave, whatever they held; none of them is in writeback."""
    if size < file.size:
        keep, tail = divmod(size, PAGE_SIZE)
        if tail:
            _zero_tail(cache, file, keep, tail)
        _drop_pages(cache, file, keep + bool(tail), True, "truncated")
    file.size = size


def _zero_tail(cache: PageCache, file: CachedFile, page: int, tail: int) -> None:
    group = file.groups.get(page >> GROUP_SHIFT)
    if group is not None:
        bit = 1 << (page & IN_GROUP)
        group.poisoned |= group.filling & bit
        if group.uptodate & bit:
            start = group.base + (page & IN_GROUP) * PAGE_SIZE
            cache.arena.zero(start + tail, start + PAGE_SIZE)


def invalidate(cache: PageCache, file: CachedFile) -> int:
    """The backing changed underneath: every clean page leaves. Returns how many pages did."""
    return _drop_pages(cache, file, 0, False, "invalidated")


def give_up(cache: PageCache, file: CachedFile) -> int:
    """Every dirty page leaves unwritten, but for those a thread is working on; how many bytes of the file that were."""
    given_up = 0
    for index in list(file.dirty_groups):
        group = file.groups[index]
        going = group.dirty & ~group.writeback
        if not going:
            continue
        last_page = (index << GROUP_SHIFT) + going.bit_length()
        given_up += going.bit_count() * PAGE_SIZE - (last_page * PAGE_SIZE - file.size if last_page == file.end_page else 0)
        cache.remove(group, going, "dropped")
    cache.room.unpark_all()
    return given_up


def discard(cache: PageCache, file: CachedFile) -> None:
    """The file is gone: every page leaves, dirty ones too, but for those a thread is working on."""
    _drop_pages(cache, file, 0, True, "truncated")


def _drop_pages(cache: PageCache, file: CachedFile, from_page: int, dirty_too: bool, reason: str) -> int:
    dropped = 0
    for index in [i for i in file.groups if i >= from_page >> GROUP_SHIFT]:
        group = file.groups[index]
        mask = ~FIRST[min(max(from_page - (index << GROUP_SHIFT), 0), GROUP_PAGES)]
        group.poisoned |= group.filling & mask
        going = group.uptodate & ~group.writeback & mask
        if not dirty_too:
            going &= ~group.dirty
        dropped += cache.remove(group, going, reason)
    if dropped:
        cache.room.unpark_all()
    if reason == "truncated":
        file.forget_from(from_page)
    return dropped
