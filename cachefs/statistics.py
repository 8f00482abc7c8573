"""Frozen snapshots of what every component counted; the only thing that metrics and `cachefs status` read.

Counters are plain integers beside the code that changes them. `statistics()` of a component copies them into one of these.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

DURATION_BOUNDS_SECONDS = (
    0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip


class Histogram:
    """Durations in fixed buckets; `counts[i]` is the number at most `DURATION_BOUNDS_SECONDS[i]`, the last one the rest."""

    __slots__ = ("counts", "total_seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(DURATION_BOUNDS_SECONDS) + 1)
        self.total_seconds = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(DURATION_BOUNDS_SECONDS, seconds)] += 1
        self.total_seconds += seconds

    def snapshot(self) -> "HistogramSnapshot":
        return HistogramSnapshot(tuple(self.counts), self.total_seconds)


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """Counts per bucket (not cumulative) over `DURATION_BOUNDS_SECONDS` plus one bucket for the rest, and their sum."""

    counts: tuple[int, ...]
    total_seconds: float


DISTANCE_BOUNDS_BYTES = tuple(1 << power for power in range(20, 38, 2))  # 1 MiB, 4 MiB, ... 64 GiB


@dataclass(frozen=True, slots=True)
class DistanceSnapshot:
    """Counts per bucket (not cumulative) over `DISTANCE_BOUNDS_BYTES` plus one bucket for the rest, and their sum."""

    counts: tuple[int, ...]
    total_bytes: int


@dataclass(frozen=True, slots=True)
class UseStatistics:
    """What one program, or one user, got from the cache and put into it."""

    page_hits: int
    page_misses: int
    hit_bytes: int
    miss_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What the page cache holds and did. A *page hit* is a page that was up to date when the request arrived."""

    capacity_bytes: int
    resident_bytes: int
    clean_pages: int  # each page is in one of these five states
    dirty_pages: int
    writeback_pages: int
    filling_pages: int
    pinned_pages: int  # clean ones that are not evicted
    pin_limit_bytes: int
    page_hits: int
    page_misses: int
    hit_bytes: int
    miss_bytes: int
    write_bytes: int
    reads_hit: int  # read requests all of whose pages were hits
    reads_partial: int
    reads_miss: int
    evictions: Mapping[str, int]  # {reason: pages}
    misses: Mapping[str, int]  # {cold|capacity|invalidated: pages}; their sum is page_misses
    refaults: int  # misses on pages that were evicted before
    refault_distances: DistanceSnapshot  # pages evicted meanwhile, in bytes
    readahead_used_pages: int
    readahead_unused_pages: int  # evicted or dropped before anybody read them
    readahead_late_pages: int  # asked for while their fill was still under way
    programs: Mapping[str, UseStatistics]  # {name of a program, or other: ...}, together all there is
    users: Mapping[str, UseStatistics]  # {user's number, or other: ...}, together all there is


@dataclass(frozen=True, slots=True)
class WritebackStatistics:
    """What is not yet on the backing, and what was written there."""

    dirty_bytes: int
    dirty_limit_bytes: int
    dirty_expire_seconds: float
    oldest_dirty_seconds: float
    written_bytes: int  # out of the cache
    through_bytes: int  # that went there at once, see `writethrough.py`
    errors: Mapping[str, int]  # {errno name: calls that failed}
    failing_files: int  # whose last batch failed, and that wait to be tried again
    retries: int  # batches of files whose batch before had failed
    throttle_seconds: float


@dataclass(frozen=True, slots=True)
class JournalStatistics:
    """What of the unwritten data would survive this process, and what was brought back at the mount; zeros without a journal."""

    used_bytes: int
    size_bytes: int  # at most
    entries: int  # runs of pages, each with a row of its own
    written_through: int  # writes that it could not take, and that went to the backing at once
    recovery_seconds: float  # that the mount took for what a predecessor had left
    replayed_bytes: int  # found at the mount and put into the cache again
    replayed_files: int
    set_aside_files: int  # in recovered/: they had no place any more
    lost_bytes: int  # that could not be read


@dataclass(frozen=True, slots=True)
class BackingStatistics:
    """Calls to the backing and what they showed of it."""

    durations: Mapping[str, HistogramSnapshot]  # {op: ...}
    errors: Mapping[str, int]  # {errno name: calls}
    read_bytes: int
    latency_seconds: float  # estimate that readahead uses
    bandwidth_bytes_per_second: float
    lost: int  # 1 = it does not answer, or is not there
    silent_seconds: float  # for how long it has owed an answer and given none
    timeouts: int  # requests and calls that failed because of that


@dataclass(frozen=True, slots=True)
class Conflict:
    """A file that was changed on both sides. Paths are relative to SOURCE."""

    path: str
    copy: str
    kept: str  # whose version the copy has: theirs | ours
    when: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class ConflictStatistics:
    """Changes underneath that met unwritten data; each has left a copy."""

    total: int
    recent: tuple[Conflict, ...]  # the last ones, oldest first


@dataclass(frozen=True, slots=True)
class FileSystemStatistics:
    """Requests that programs made and what is open."""

    durations: Mapping[str, HistogramSnapshot]  # {FUSE op: ...}
    saved_seconds: float  # read requests that hit, times the backing's latency then
    ready_seconds: float  # for which idle processors were kept ready
    open_handles: int
    known_inodes: int
    open_descriptors: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """Everything one mount counted since it was mounted."""

    mountpoint: str
    source: str
    policy: str
    kernel_cache: str  # the mode in effect
    uptime_seconds: float
    cache: CacheStatistics
    writeback: WritebackStatistics
    backing: BackingStatistics
    journal: JournalStatistics
    conflicts: ConflictStatistics
    filesystem: FileSystemStatistics
