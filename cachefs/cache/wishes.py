"""What people ask of the cache beyond reading and writing: keep this, prefer that, let go of it, be larger, choose otherwise.

All of it plain code in the trio thread, like `PageCache` itself; what may take long is cut into steps for the caller to pause
between.
"""

from collections.abc import Iterable

from cachefs.cache.file import CachedFile
from cachefs.cache.page import ALL, GROUP_PAGES, GROUP_SHIFT, PAGE_SHIFT, pieces, span
from cachefs.cache.pagecache import PageCache
from cachefs.cache.policy import Policy

WANTED_USES = 2  # uses of a page after which no policy has it on probation
SHRINK_PAGES = 4096  # a step of `shrink`: a few ms


def pin(cache: PageCache, file: CachedFile, pinned: bool) -> None:
    """The file's pages, now and in future, are not evicted; or may be again."""
    if file.pinned == pinned:
        return
    file.pinned = pinned
    (cache.pinned_files.add if pinned else cache.pinned_files.remove)(file)
    cache.pinned_pages += file.resident_pages if pinned else -file.resident_pages
    for group in file.groups.values():
        group.pinned = ALL if pinned else 0
    cache.room.unpark_all()


def want(cache: PageCache, file: CachedFile, start_page: int, end_page: int) -> None:
    """Somebody asked for these pages by name: they count as used, more than once."""
    for index, first, last in pieces(start_page << PAGE_SHIFT, end_page << PAGE_SHIFT):
        group = file.groups.get(index)
        if group is not None and (mask := group.uptodate & span(first, last)):
            for _ in range(WANTED_USES):
                cache.policy.touch(group.key, mask)


def drop(cache: PageCache, file: CachedFile, indexes: Iterable[int] | None = None) -> int:
    """Every clean page that is not pinned leaves, on request, of all groups or those at `indexes`; returns how many did."""
    groups = [file.groups.get(index) for index in (list(file.groups) if indexes is None else indexes)]
    dropped = sum(cache.remove(group, group.evictable, "dropped") for group in groups if group is not None)
    cache.room.unpark_all()
    return dropped


def drop_transient(cache: PageCache, file: CachedFile, first: int = 0, stop: int = 0, unread_too: bool = False) -> None:
    """What came for one use, and has been used, leaves; but not pages [first, stop), which are being read now."""
    for index, mask in list(file.transient.items()):
        group = file.groups.get(index)
        if group is None:
            del file.transient[index]
            continue
        going = mask & group.evictable
        if not unread_too:
            going &= ~group.prefetched
        start = index << GROUP_SHIFT
        if first < start + GROUP_PAGES and stop > start:
            going &= ~span(max(first - start, 0), min(stop - start, GROUP_PAGES) - 1)
        cache.remove(group, going, "noreuse")
        if not mask & group.resident:
            del file.transient[index]
    cache.room.unpark_all()


def use_policy(cache: PageCache, policy: Policy) -> None:
    """Another policy takes over, with the pages in the order in which the old one would have let them go."""
    for key, mask in cache.policy.victims(len(cache.policy), lambda key: ALL):
        policy.admit(key, mask)
    cache.policy = policy


def resize(cache: PageCache, capacity_pages: int) -> bool:
    """One step towards another capacity, the last one if it grows.

    False: too few pages may go now. The others are dirty, filling or pinned, and have to be waited for.
    """
    step = max(capacity_pages, cache.capacity_pages - SHRINK_PAGES)
    if cache.resident_pages > step:
        cache.evict(cache.resident_pages - step)
    cache.capacity_pages = max(step, cache.resident_pages)
    cache.policy.resize(cache.capacity_pages)
    cache.arena.resize(cache.capacity_pages)
    cache.room.unpark_all()
    return cache.capacity_pages == step
