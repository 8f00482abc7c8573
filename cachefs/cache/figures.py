"""All figures of a page cache in one snapshot."""

from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.statistics import CacheStatistics


def statistics_of(cache: PageCache) -> CacheStatistics:
    """What is in the cache now, and what was counted since it began."""
    pinned = sum(file.clean_pages for file in cache.pinned_files)
    unclean = cache.dirty_pages + cache.writeback_pages - cache.redirtied_pages
    return CacheStatistics(
        capacity_bytes=cache.capacity_pages * PAGE_SIZE,
        resident_bytes=cache.resident_pages * PAGE_SIZE,
        clean_pages=cache.resident_pages - cache.filling_pages - unclean - pinned,
        dirty_pages=cache.dirty_pages,
        writeback_pages=cache.writeback_pages - cache.redirtied_pages,
        filling_pages=cache.filling_pages,
        pinned_pages=pinned,
        pin_limit_bytes=cache.pin_limit_pages * PAGE_SIZE,
        page_hits=cache.accounts.total("page_hits"),
        page_misses=cache.accounts.total("page_misses"),
        hit_bytes=cache.accounts.total("hit_bytes"),
        miss_bytes=cache.accounts.total("miss_bytes"),
        write_bytes=cache.accounts.total("write_bytes"),
        reads_hit=cache.reads_hit,
        reads_partial=cache.reads_partial,
        reads_miss=cache.reads_miss,
        evictions=dict(cache.evictions),
        misses=dict(cache.misses),
        refaults=cache.refaults,
        refault_distances=cache.refault_distances.snapshot(),
        readahead_used_pages=cache.readahead_used,
        readahead_unused_pages=cache.readahead_unused,
        readahead_late_pages=cache.readahead_late,
        programs=cache.accounts.by_program(),
        users=cache.accounts.by_user(),
    )
