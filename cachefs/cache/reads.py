"""Reads that are more than one look at one group: across groups, of pages that are not all there, and how these are counted."""

from typing import TYPE_CHECKING

from cachefs.cache.account import Account
from cachefs.cache.file import CachedFile
from cachefs.cache.page import GROUP_SIZE, pieces, span

if TYPE_CHECKING:
    from cachefs.cache.pagecache import PageCache


def lookup_across(cache: "PageCache", file: CachedFile, offset: int, end: int, account: Account) -> memoryview | bytes | None:
    """`PageCache.lookup` where pages of more than one group may be asked for."""
    if end <= offset:
        return b""
    view = peek(cache, file, offset, end)
    if view is not None:
        count_request(cache, file, offset, end, account)
    return view


def peek(cache: "PageCache", file: CachedFile, offset: int, end: int) -> memoryview | bytes | None:
    """The bytes [offset, end) if all their pages are up to date; counts nothing. `end` is at most the file's size."""
    parts: list[tuple[int, int]] = []  # [start, end) in the arena
    for index, first, last in pieces(offset, end):
        group = file.groups.get(index)
        mask = span(first, last)
        if group is None or group.uptodate & mask != mask:
            return None
        start = group.base + max(offset - index * GROUP_SIZE, 0)
        stop = group.base + min(end - index * GROUP_SIZE, GROUP_SIZE)
        if parts and parts[-1][1] == start:
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
    if len(parts) == 1:
        return cache.arena.view[parts[0][0] : parts[0][1]]
    return b"".join(cache.arena.view[start:stop] for start, stop in parts)


def count_request(cache: "PageCache", file: CachedFile, offset: int, end: int, account: Account | None = None) -> None:
    """Counts a read of [offset, end) by what is up to date now, and tells the policy of the pages that are."""
    account = account or cache.accounts.nobody
    hits = misses = 0
    for index, first, last in pieces(offset, end):
        mask = span(first, last)
        group = file.groups.get(index)
        up = 0
        if group is not None:
            up = group.uptodate & mask
            fresh = group.prefetched & mask
            if fresh:
                cache.first_use(group, fresh)
            if up & ~fresh:
                cache.policy.touch(group.key, up & ~fresh)
            group.used = account.stamp
        hits += up.bit_count()
        misses += _count_misses(cache, file, index, mask & ~up)
    file.page_hits += hits
    file.page_misses += misses
    account.page_hits += hits
    account.page_misses += misses
    if not misses:
        cache.reads_hit += 1
    elif hits:
        cache.reads_partial += 1
    else:
        cache.reads_miss += 1
    missed_bytes = (end - offset) * misses // (hits + misses)
    account.miss_bytes += missed_bytes
    account.hit_bytes += end - offset - missed_bytes


def _count_misses(cache: "PageCache", file: CachedFile, index: int, mask: int) -> int:
    count = mask.bit_count()
    if count:
        invalidated = (mask & file.invalidated.get(index, 0)).bit_count()
        refaults = mask & file.evicted.get(index, 0)
        capacity = refaults.bit_count()
        if refaults:
            cache.refault_distances.came_back(file, index, refaults)
        cache.misses["invalidated"] += invalidated
        cache.misses["capacity"] += capacity
        cache.refaults += capacity
        cache.misses["cold"] += count - invalidated - capacity
    return count
