"""Prometheus metrics: a table of definitions, a collector over `statistics()`, an HTTP server of /metrics.

Nothing is counted here. A scrape asks for one `Statistics` snapshot and every series is read from it, so all figures of
a scrape belong to the same moment. METRICS.md describes `DEFINITIONS` for people; a test holds one against the other.
"""

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from errno import EADDRINUSE
from itertools import accumulate
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cachefs import __version__
from cachefs.errors import CachefsError
from cachefs.httpserver import Handler, Server
from cachefs.page.web import Page
from cachefs.statistics import (
    DISTANCE_BOUNDS_BYTES,
    DURATION_BOUNDS_SECONDS,
    DistanceSnapshot,
    Histogram,
    HistogramSnapshot,
    Statistics,
    UseStatistics,
)

PORTS_TRIED = 100  # a machine with more mounts than this names its ports
STATISTICS_TIMEOUT_SECONDS = 5.0  # under Prometheus's usual scrape_timeout, so that it is told why

log = logging.getLogger(__name__)

Value = float | HistogramSnapshot | DistanceSnapshot
Reading = Mapping[tuple[str, ...], Value]  # {values of the labels: value}

NO_DURATIONS = Histogram().snapshot()
BUCKETS = (*map(str, DURATION_BOUNDS_SECONDS), "+Inf")  # values of the label `le`
DISTANCE_BUCKETS = (*map(str, map(float, DISTANCE_BOUNDS_BYTES)), "+Inf")


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric: its name, what it means and how it is read from a snapshot. The label `mountpoint` is implied."""

    name: str
    type: str  # counter | gauge | histogram | info
    unit: str  # bytes | pages | seconds | requests | ...
    labels: tuple[str, ...]
    help: str
    read: Callable[[Statistics], Reading]


def one(value: float) -> Reading:
    return {(): value}


def by(values: Mapping[str, Value], *expected: str, zero: Value = 0) -> Reading:
    """One value a label; the expected ones are there from the first scrape, so that `rate()` sees their first step."""
    return {(name,): values.get(name, zero) for name in (*expected, *values)}


def uses(who: Mapping[str, UseStatistics], figure: Callable[[UseStatistics], int]) -> Reading:
    """One figure of each program or user; a few names may look the same in print."""
    sums = Counter[tuple[str, ...]]()
    for name, use in who.items():
        sums[(_printable(name),)] += figure(use)
    return dict(sums)


DEFINITIONS = (
    Definition("cachefs_page_hits_total", "counter", "pages", (),
        "Pages asked for by reads that were up to date in memory when the request arrived.",
        lambda s: one(s.cache.page_hits)),
    Definition("cachefs_page_misses_total", "counter", "pages", (),
        "Pages asked for by reads that were not up to date in memory when the request arrived.",
        lambda s: one(s.cache.page_misses)),
    Definition("cachefs_read_requests_total", "counter", "requests", ("result",),
        "Read requests by whether all (hit), some (partial) or none (miss) of their pages were hits.",
        lambda s: by({"hit": s.cache.reads_hit, "partial": s.cache.reads_partial, "miss": s.cache.reads_miss})),
    Definition("cachefs_hit_bytes_total", "counter", "bytes", (),
        "Bytes that reads got from pages that were up to date in memory.",
        lambda s: one(s.cache.hit_bytes)),
    Definition("cachefs_miss_bytes_total", "counter", "bytes", (),
        "Bytes that reads had to wait for the backing for.",
        lambda s: one(s.cache.miss_bytes)),
    Definition("cachefs_write_bytes_total", "counter", "bytes", (),
        "Bytes that programs wrote into the cache.",
        lambda s: one(s.cache.write_bytes)),
    Definition("cachefs_cache_capacity_bytes", "gauge", "bytes", (),
        "Memory that pages may take, as set by --cache-size.",
        lambda s: one(s.cache.capacity_bytes)),
    Definition("cachefs_cache_resident_bytes", "gauge", "bytes", (),
        "Memory that pages take now.",
        lambda s: one(s.cache.resident_bytes)),
    Definition("cachefs_cache_pages", "gauge", "pages", ("state",),
        "Pages in the cache by state.",
        lambda s: by({"clean": s.cache.clean_pages, "dirty": s.cache.dirty_pages, "writeback": s.cache.writeback_pages,
                      "filling": s.cache.filling_pages, "pinned": s.cache.pinned_pages})),
    Definition("cachefs_pin_limit_bytes", "gauge", "bytes", (),
        "Memory that pinned files may take, as set by --pin-limit.",
        lambda s: one(s.cache.pin_limit_bytes)),
    Definition("cachefs_evictions_total", "counter", "pages", ("reason",),
        "Pages that left the cache, by reason; capacity means to make room for others.",
        lambda s: by(s.cache.evictions, "capacity", "dropped", "invalidated", "noreuse", "truncated")),
    Definition("cachefs_refaults_total", "counter", "pages", (),
        "Page misses on pages evicted a short time ago; many of them mean that the cache is too small.",
        lambda s: one(s.cache.refaults)),
    Definition("cachefs_refault_distance_bytes", "histogram", "bytes", (),
        "How much was evicted between a page's eviction and its refault: a cache larger by this would have kept it.",
        lambda s: {(): s.cache.refault_distances}),
    Definition("cachefs_misses_total", "counter", "pages", ("reason",),
        "Page misses by reason: never seen before (cold), evicted (capacity), or changed underneath (invalidated).",
        lambda s: by(s.cache.misses, "cold", "capacity", "invalidated")),
    Definition("cachefs_readahead_pages_total", "counter", "pages", ("outcome",),
        "Prefetched pages that were read (used), left the cache unread (unused), or were asked for too soon (late).",
        lambda s: by({"used": s.cache.readahead_used_pages, "unused": s.cache.readahead_unused_pages,
                      "late": s.cache.readahead_late_pages})),
    Definition("cachefs_process_page_hits_total", "counter", "pages", ("comm",),
        "Page hits of the programs that use the cache most, by name; those that have no series of their own are other.",
        lambda s: uses(s.cache.programs, lambda use: use.page_hits)),
    Definition("cachefs_process_page_misses_total", "counter", "pages", ("comm",),
        "Page misses by program.",
        lambda s: uses(s.cache.programs, lambda use: use.page_misses)),
    Definition("cachefs_process_hit_bytes_total", "counter", "bytes", ("comm",),
        "Bytes that reads got from pages that were up to date in memory, by program.",
        lambda s: uses(s.cache.programs, lambda use: use.hit_bytes)),
    Definition("cachefs_process_miss_bytes_total", "counter", "bytes", ("comm",),
        "Bytes that reads had to wait for the backing for, by program.",
        lambda s: uses(s.cache.programs, lambda use: use.miss_bytes)),
    Definition("cachefs_process_write_bytes_total", "counter", "bytes", ("comm",),
        "Bytes written into the cache, by program.",
        lambda s: uses(s.cache.programs, lambda use: use.write_bytes)),
    Definition("cachefs_user_page_hits_total", "counter", "pages", ("uid",),
        "Page hits of the users, by number; those of whom there are too many are other.",
        lambda s: uses(s.cache.users, lambda use: use.page_hits)),
    Definition("cachefs_user_page_misses_total", "counter", "pages", ("uid",),
        "Page misses by user.",
        lambda s: uses(s.cache.users, lambda use: use.page_misses)),
    Definition("cachefs_user_hit_bytes_total", "counter", "bytes", ("uid",),
        "Bytes that reads got from pages that were up to date in memory, by user.",
        lambda s: uses(s.cache.users, lambda use: use.hit_bytes)),
    Definition("cachefs_user_miss_bytes_total", "counter", "bytes", ("uid",),
        "Bytes that reads had to wait for the backing for, by user.",
        lambda s: uses(s.cache.users, lambda use: use.miss_bytes)),
    Definition("cachefs_user_write_bytes_total", "counter", "bytes", ("uid",),
        "Bytes written into the cache, by user.",
        lambda s: uses(s.cache.users, lambda use: use.write_bytes)),
    Definition("cachefs_dirty_bytes", "gauge", "bytes", (),
        "Acknowledged bytes that are not yet on the backing.",
        lambda s: one(s.writeback.dirty_bytes)),
    Definition("cachefs_dirty_limit_bytes", "gauge", "bytes", (),
        "Dirty bytes that are never exceeded, as set by --dirty-limit; writers are slowed as they come near it.",
        lambda s: one(s.writeback.dirty_limit_bytes)),
    Definition("cachefs_dirty_expire_seconds", "gauge", "seconds", (),
        "Age at which dirty bytes are written back, as set by --dirty-expire.",
        lambda s: one(s.writeback.dirty_expire_seconds)),
    Definition("cachefs_oldest_dirty_seconds", "gauge", "seconds", (),
        "Age of the oldest byte that is not yet on the backing; 0 if there is none.",
        lambda s: one(s.writeback.oldest_dirty_seconds)),
    Definition("cachefs_writeback_bytes_total", "counter", "bytes", (),
        "Bytes written from the cache to the backing.",
        lambda s: one(s.writeback.written_bytes)),
    Definition("cachefs_write_through_bytes_total", "counter", "bytes", (),
        "Bytes that went to the backing at once, as small writes to local files do (--write-through).",
        lambda s: one(s.writeback.through_bytes)),
    Definition("cachefs_writeback_errors_total", "counter", "calls", ("errno",),
        "Writes to the backing that failed, by error; the pages stay dirty and are tried again.",
        lambda s: by(s.writeback.errors, "EIO", "ENOSPC")),
    Definition("cachefs_writeback_retries_total", "counter", "calls", (),
        "Writes to the backing of files whose write before had failed.",
        lambda s: one(s.writeback.retries)),
    Definition("cachefs_writeback_failing_files", "gauge", "files", (),
        "Files that the backing did not take the last time; each is tried again after a pause of at most 30 s.",
        lambda s: one(s.writeback.failing_files)),
    Definition("cachefs_write_throttle_seconds_total", "counter", "seconds", (),
        "Time for which writers were held back because of the dirty limit, summed over the writers.",
        lambda s: one(s.writeback.throttle_seconds)),
    Definition("cachefs_journal_bytes", "gauge", "bytes", (),
        "Room in the journal taken by pages that the backing does not have yet.",
        lambda s: one(s.journal.used_bytes)),
    Definition("cachefs_journal_size_bytes", "gauge", "bytes", (),
        "Most that the journal may take, as set by --journal-size; 0 without a journal.",
        lambda s: one(s.journal.size_bytes)),
    Definition("cachefs_journal_entries", "gauge", "entries", (),
        "Entries in the journal: runs of pages that one write left there.",
        lambda s: one(s.journal.entries)),
    Definition("cachefs_journal_replayed_bytes_total", "counter", "bytes", (),
        "Bytes that a killed predecessor had left in the journal, and that were put into the cache again at the mount.",
        lambda s: one(s.journal.replayed_bytes)),
    Definition("cachefs_journal_write_through_total", "counter", "requests", (),
        "Writes that the journal could not take (its disk is full, or fails) and that went to the backing before they returned.",
        lambda s: one(s.journal.written_through)),
    Definition("cachefs_recovery_seconds", "gauge", "seconds", (),
        "Time that the mount took to write out what a killed predecessor had left; 0 if it had left nothing.",
        lambda s: one(s.journal.recovery_seconds)),
    Definition("cachefs_recovery_files", "gauge", "files", ("outcome",),
        "Files of which a killed predecessor had left unwritten data, by what became of it at the mount.",
        lambda s: by({"replayed": s.journal.replayed_files, "set_aside": s.journal.set_aside_files})),
    Definition("cachefs_recovery_lost_bytes", "gauge", "bytes", (),
        "Acknowledged bytes that the journal had and that could not be read at the mount, as it was damaged.",
        lambda s: one(s.journal.lost_bytes)),
    Definition("cachefs_conflicts_total", "counter", "files", (),
        "Files that somebody else changed on the backing while bytes of ours were not yet there; each left a copy beside it.",
        lambda s: one(s.conflicts.total)),
    Definition("cachefs_fuse_request_duration_seconds", "histogram", "seconds", ("op",),
        "Time from a request's arrival to its answer, by FUSE operation.",
        lambda s: by(s.filesystem.durations, "read", "write", zero=NO_DURATIONS)),
    Definition("cachefs_backing_request_duration_seconds", "histogram", "seconds", ("op",),
        "Time that calls to the backing took, by operation; reads that a local backing had at hand are not among them.",
        lambda s: by(s.backing.durations, "read", "write", zero=NO_DURATIONS)),
    Definition("cachefs_backing_errors_total", "counter", "calls", ("errno",),
        "Calls to the backing that failed, by error; answers such as ENOENT or EEXIST are not failures.",
        lambda s: by(s.backing.errors, "EIO", "ENOSPC")),
    Definition("cachefs_backing_read_bytes_total", "counter", "bytes", (),
        "Bytes read from the backing, readahead included.",
        lambda s: one(s.backing.read_bytes)),
    Definition("cachefs_backing_latency_seconds", "gauge", "seconds", (),
        "The backing's latency as readahead estimates it.",
        lambda s: one(s.backing.latency_seconds)),
    Definition("cachefs_backing_bandwidth_bytes_per_second", "gauge", "bytes per second", (),
        "The backing's bandwidth as readahead estimates it.",
        lambda s: one(s.backing.bandwidth_bytes_per_second)),
    Definition("cachefs_backing_lost", "gauge", "none", (),
        "1 while the backing does not answer or is not there, else 0; what is cached is served meanwhile.",
        lambda s: one(s.backing.lost)),
    Definition("cachefs_backing_silent_seconds", "gauge", "seconds", (),
        "Time for which the backing has owed an answer without giving any; 0 while it owes none.",
        lambda s: one(s.backing.silent_seconds)),
    Definition("cachefs_backing_timeouts_total", "counter", "requests", (),
        "Requests that failed because the backing had not answered within --backing-timeout, or was known not to.",
        lambda s: one(s.backing.timeouts)),
    Definition("cachefs_saved_seconds_total", "counter", "seconds", (),
        "Time that programs did not wait: read requests that hit, times the backing's latency as measured then.",
        lambda s: one(s.filesystem.saved_seconds)),
    Definition("cachefs_processors_ready_seconds_total", "counter", "seconds", (),
        "Time for which idle processors were kept from deep sleep, as requests came one after another (--cpu-latency).",
        lambda s: one(s.filesystem.ready_seconds)),
    Definition("cachefs_open_handles", "gauge", "handles", (),
        "Files and directories that programs hold open.",
        lambda s: one(s.filesystem.open_handles)),
    Definition("cachefs_known_inodes", "gauge", "inodes", (),
        "Inodes that the kernel holds a reference to.",
        lambda s: one(s.filesystem.known_inodes)),
    Definition("cachefs_open_descriptors", "gauge", "descriptors", (),
        "Descriptors that the daemon holds open on the backing.",
        lambda s: one(s.filesystem.open_descriptors)),
    Definition("cachefs_uptime_seconds", "gauge", "seconds", (),
        "Time since the mountpoint was mounted.",
        lambda s: one(s.uptime_seconds)),
    Definition("cachefs_mount_info", "info", "none", ("version", "policy", "kernel_cache"),
        "Always 1; the labels tell cachefs's version, the eviction policy, and the kernel cache mode in effect.",
        lambda s: {(__version__, s.policy, s.kernel_cache): 1}),
)  # fmt: skip


class MountCollector(Collector):
    """Reads every metric of one mount from one snapshot a scrape.

    `statistics` is called in a thread of its own, at most one at a time: should the mount be stuck, each scrape fails
    after `timeout_seconds`, and however many scrapes come, one thread waits.
    """

    def __init__(
        self, statistics: Callable[[], Statistics], timeout_seconds: float = STATISTICS_TIMEOUT_SECONDS
    ) -> None:
        self._statistics = statistics
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._pending: Future[Statistics] | None = None  # the call under way; guarded by _lock

    def describe(self) -> Iterable[Metric]:
        return [_family(definition) for definition in DEFINITIONS]

    def collect(self) -> Iterator[Metric]:
        statistics = self._snapshot()
        mountpoint = _printable(statistics.mountpoint)
        for definition in DEFINITIONS:
            family = _family(definition)
            for values, value in definition.read(statistics).items():
                labels = {"mountpoint": mountpoint, **dict(zip(definition.labels, values, strict=True))}
                _add_samples(family, definition.name, labels, value)
            yield family

    def _snapshot(self) -> Statistics:
        with self._lock:
            if self._pending is None:
                self._pending = Future()
                threading.Thread(
                    target=self._ask, args=(self._pending,), name="cachefs-statistics", daemon=True
                ).start()
            pending = self._pending
        try:
            return pending.result(self._timeout_seconds)
        except TimeoutError:
            raise TimeoutError(f"the mount gave no statistics within {self._timeout_seconds:g} s") from None

    def _ask(self, answer: Future[Statistics]) -> None:
        try:
            statistics = self._statistics()
        except BaseException as error:  # handed to the scrapes that wait
            self._forget()
            answer.set_exception(error)
        else:
            self._forget()
            answer.set_result(statistics)

    def _forget(self) -> None:
        # Before the answer is out: a scrape that begins after another has ended never gets that one's snapshot.
        with self._lock:
            self._pending = None


def _family(definition: Definition) -> Metric:
    # The families of prometheus_client have their type's suffix added on output.
    suffix = {"counter": "_total", "info": "_info"}.get(definition.type, "")
    return Metric(definition.name.removesuffix(suffix), definition.help, definition.type)


def _add_samples(family: Metric, name: str, labels: dict[str, str], value: Value) -> None:
    if isinstance(value, HistogramSnapshot):
        _add_histogram(family, name, labels, BUCKETS, value.counts, value.total_seconds)
    elif isinstance(value, DistanceSnapshot):
        _add_histogram(family, name, labels, DISTANCE_BUCKETS, value.counts, value.total_bytes)
    else:
        family.add_sample(name, labels, value)


def _add_histogram(
    family: Metric, name: str, labels: dict[str, str], buckets: Sequence[str], counts: Sequence[int], total: float
) -> None:
    cumulative = list(accumulate(counts))
    for bound, count in zip(buckets, cumulative, strict=True):
        family.add_sample(f"{name}_bucket", labels | {"le": bound}, count)
    family.add_sample(f"{name}_count", labels, cumulative[-1])
    family.add_sample(f"{name}_sum", labels, total)


def _printable(path: str) -> str:
    """The path as UTF-8, which label values must be; bytes that are not show as \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def make_registry(statistics: Callable[[], Statistics]) -> CollectorRegistry:
    """What a daemon exports: its mount, and its own memory, CPU time and descriptors as the usual `process_*`."""
    registry = CollectorRegistry()
    registry.register(MountCollector(statistics))
    ProcessCollector(registry=registry)
    return registry


class MetricsServer:
    """HTTP server of /metrics, and of the page with the picture of the cache if there is one; it reads, and changes nothing."""

    def __init__(self, host: str, port: int, asked: bool, registry: CollectorRegistry, page: Page | None = None) -> None:
        """Listens at once. `asked`: the port was asked for by name, so that finding it taken is an error."""
        self._server = _bind(host, port, 1 if asked or port == 0 else PORTS_TRIED)
        self._server.set_app(_application(make_wsgi_app(registry), page))
        self.url = f"http://{_authority(host, self._server.server_port)}/metrics"
        forever = None  # it sleeps until there is a request: to look at times would be most of what an idle mount does
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(forever,), name="cachefs-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Frees the port; an answer under way is not waited for. May be called again."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _application(metrics: WSGIApplication, page: Page | None) -> WSGIApplication:
    def answer(start: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
        start(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
        return [f"{text}\n".encode(errors="backslashreplace")]

    def application(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if page is not None and path in page.paths:
            return page(environ, start)
        if path not in ("/", "/metrics"):
            return answer(start, "404 Not Found", "cachefs: only /metrics is here")
        if environ["REQUEST_METHOD"] != "GET":
            return answer(start, "405 Method Not Allowed", "cachefs: only GET is answered", ("Allow", "GET"))
        if path == "/":
            return answer(start, "200 OK", "cachefs: metrics for Prometheus are at /metrics")
        try:
            return metrics(environ, start)
        except Exception as error:  # a failed scrape must not cost the server or the mount
            log.warning("metrics: a scrape failed: %s", error)
            return answer(start, "500 Internal Server Error", f"cachefs: {error}")

    return application


def _bind(host: str, port: int, ports: int) -> Server:
    """A listening server on the first free one of `ports` ports from `port` on."""
    last = max(port, min(port + ports - 1, 65535))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server_class = type("_FamilyServer", (Server,), {"address_family": family})
        for candidate in range(port, last + 1):
            try:
                server: Server = server_class((address[0], candidate), Handler)
                return server
            except OSError as error:
                if error.errno != EADDRINUSE:
                    raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CachefsError(f"cannot serve metrics on {_authority(host, port)}: {reason}") from None
    if ports == 1:
        raise CachefsError(
            f"the metrics port {_authority(host, port)} is taken; choose another one, 0 for any, or --metrics off"
        )
    raise CachefsError(f"no free metrics port from {port} to {last} on {host}; name one with --metrics, or use off")


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
