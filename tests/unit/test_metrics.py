"""Metrics: table, exposition, HTTP server, METRICS.md."""

import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import prometheus_client.openmetrics.exposition
import prometheus_client.openmetrics.parser
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from cachefs import __version__
from cachefs.errors import CachefsError
from cachefs.metrics import DEFINITIONS, MetricsServer, MountCollector, make_registry
from cachefs.statistics import (
    DISTANCE_BOUNDS_BYTES,
    DURATION_BOUNDS_SECONDS,
    DistanceSnapshot,
    Histogram,
    HistogramSnapshot,
    Statistics,
    UseStatistics,
)

ROOT = Path(__file__).parents[2]
MOUNTPOINT = "/mnt/data"

openmetrics: Any = prometheus_client.openmetrics  # it has no type hints


def invent(kind: Any, name: str, number: Callable[[], float]) -> Any:
    """A value of the type in which no number occurs twice, so that no field can be mistaken for another one."""
    if is_dataclass(kind) and kind not in (HistogramSnapshot, DistanceSnapshot):
        hints = get_type_hints(kind)
        values = {field.name: invent(hints[field.name], field.name, number) for field in fields(kind)}
        return kind(**values)  # type: ignore[operator]  # mypy takes it for an instance
    if kind is HistogramSnapshot:
        return HistogramSnapshot(tuple(int(number()) for _ in range(len(DURATION_BOUNDS_SECONDS) + 1)), number())
    if kind is DistanceSnapshot:
        return DistanceSnapshot(tuple(int(number()) for _ in range(len(DISTANCE_BOUNDS_BYTES) + 1)), int(number()))
    if kind is str:
        return MOUNTPOINT if name == "mountpoint" else name
    if kind in (int, float):
        return kind(number())
    if get_origin(kind) is tuple:
        return ()
    keys = {"misses": ("cold", "capacity", "invalidated"), "evictions": ("capacity", "dropped")}.get(name)
    if keys is None:
        keys = ("EIO", "ENOSPC") if name == "errors" else ("read", "fsync")
    return {key: invent(kind.__args__[1], key, number) for key in keys}


def busy() -> Statistics:
    numbers = count(1001)
    statistics: Statistics = invent(Statistics, "", lambda: next(numbers))
    return statistics


def idle() -> Statistics:
    statistics: Statistics = invent(Statistics, "", lambda: 0)
    return replace(
        statistics,
        cache=replace(statistics.cache, evictions={}, misses={}),
        writeback=replace(statistics.writeback, errors={}),
        backing=replace(statistics.backing, errors={}, durations={}),
        filesystem=replace(statistics.filesystem, durations={}),
    )


def registry_of(statistics: Callable[[], Statistics], timeout_seconds: float = 5.0) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(MountCollector(statistics, timeout_seconds))
    return registry


def series(statistics: Statistics) -> dict[str, float]:
    """{name{label=value,...}: value} of an exposition, without the label `mountpoint`, which every series must have."""
    found = {}
    for family in parse(generate_latest(registry_of(lambda: statistics)).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("mountpoint") == MOUNTPOINT
            found[sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(labels.items()))] = sample.value
    return found


# The table and the collector


def test_each_series_shows_the_figure_it_is_named_after() -> None:
    s = busy()
    cache, writeback, backing, filesystem = s.cache, s.writeback, s.backing, s.filesystem
    expected = {
        "cachefs_page_hits_total": cache.page_hits,
        "cachefs_page_misses_total": cache.page_misses,
        "cachefs_read_requests_total{result=hit}": cache.reads_hit,
        "cachefs_read_requests_total{result=partial}": cache.reads_partial,
        "cachefs_read_requests_total{result=miss}": cache.reads_miss,
        "cachefs_hit_bytes_total": cache.hit_bytes,
        "cachefs_miss_bytes_total": cache.miss_bytes,
        "cachefs_write_bytes_total": cache.write_bytes,
        "cachefs_cache_capacity_bytes": cache.capacity_bytes,
        "cachefs_cache_resident_bytes": cache.resident_bytes,
        "cachefs_cache_pages{state=clean}": cache.clean_pages,
        "cachefs_cache_pages{state=dirty}": cache.dirty_pages,
        "cachefs_cache_pages{state=writeback}": cache.writeback_pages,
        "cachefs_cache_pages{state=filling}": cache.filling_pages,
        "cachefs_cache_pages{state=pinned}": cache.pinned_pages,
        "cachefs_pin_limit_bytes": cache.pin_limit_bytes,
        "cachefs_evictions_total{reason=capacity}": cache.evictions["capacity"],
        "cachefs_evictions_total{reason=dropped}": cache.evictions["dropped"],
        "cachefs_refaults_total": cache.refaults,
        "cachefs_misses_total{reason=cold}": cache.misses["cold"],
        "cachefs_misses_total{reason=capacity}": cache.misses["capacity"],
        "cachefs_misses_total{reason=invalidated}": cache.misses["invalidated"],
        "cachefs_readahead_pages_total{outcome=used}": cache.readahead_used_pages,
        "cachefs_readahead_pages_total{outcome=unused}": cache.readahead_unused_pages,
        "cachefs_readahead_pages_total{outcome=late}": cache.readahead_late_pages,
        "cachefs_refault_distance_bytes_sum": cache.refault_distances.total_bytes,
        "cachefs_refault_distance_bytes_bucket{le=1048576.0}": cache.refault_distances.counts[0],
        "cachefs_process_page_hits_total{comm=read}": cache.programs["read"].page_hits,
        "cachefs_process_page_misses_total{comm=read}": cache.programs["read"].page_misses,
        "cachefs_process_hit_bytes_total{comm=read}": cache.programs["read"].hit_bytes,
        "cachefs_process_miss_bytes_total{comm=read}": cache.programs["read"].miss_bytes,
        "cachefs_process_write_bytes_total{comm=fsync}": cache.programs["fsync"].write_bytes,
        "cachefs_user_page_hits_total{uid=read}": cache.users["read"].page_hits,
        "cachefs_user_page_misses_total{uid=read}": cache.users["read"].page_misses,
        "cachefs_user_hit_bytes_total{uid=read}": cache.users["read"].hit_bytes,
        "cachefs_user_miss_bytes_total{uid=read}": cache.users["read"].miss_bytes,
        "cachefs_user_write_bytes_total{uid=fsync}": cache.users["fsync"].write_bytes,
        "cachefs_saved_seconds_total": filesystem.saved_seconds,
        "cachefs_dirty_bytes": writeback.dirty_bytes,
        "cachefs_dirty_limit_bytes": writeback.dirty_limit_bytes,
        "cachefs_oldest_dirty_seconds": writeback.oldest_dirty_seconds,
        "cachefs_writeback_bytes_total": writeback.written_bytes,
        "cachefs_write_through_bytes_total": writeback.through_bytes,
        "cachefs_writeback_errors_total{errno=EIO}": writeback.errors["EIO"],
        "cachefs_write_throttle_seconds_total": writeback.throttle_seconds,
        "cachefs_fuse_request_duration_seconds_sum{op=read}": filesystem.durations["read"].total_seconds,
        "cachefs_backing_request_duration_seconds_sum{op=fsync}": backing.durations["fsync"].total_seconds,
        "cachefs_backing_errors_total{errno=ENOSPC}": backing.errors["ENOSPC"],
        "cachefs_backing_read_bytes_total": backing.read_bytes,
        "cachefs_backing_latency_seconds": backing.latency_seconds,
        "cachefs_backing_bandwidth_bytes_per_second": backing.bandwidth_bytes_per_second,
        "cachefs_backing_lost": backing.lost,
        "cachefs_backing_silent_seconds": backing.silent_seconds,
        "cachefs_backing_timeouts_total": backing.timeouts,
        "cachefs_writeback_retries_total": writeback.retries,
        "cachefs_writeback_failing_files": writeback.failing_files,
        "cachefs_dirty_expire_seconds": writeback.dirty_expire_seconds,
        "cachefs_journal_bytes": s.journal.used_bytes,
        "cachefs_journal_size_bytes": s.journal.size_bytes,
        "cachefs_journal_entries": s.journal.entries,
        "cachefs_journal_write_through_total": s.journal.written_through,
        "cachefs_journal_replayed_bytes_total": s.journal.replayed_bytes,
        "cachefs_recovery_seconds": s.journal.recovery_seconds,
        "cachefs_recovery_files{outcome=replayed}": s.journal.replayed_files,
        "cachefs_recovery_files{outcome=set_aside}": s.journal.set_aside_files,
        "cachefs_recovery_lost_bytes": s.journal.lost_bytes,
        "cachefs_conflicts_total": s.conflicts.total,
        "cachefs_open_handles": filesystem.open_handles,
        "cachefs_known_inodes": filesystem.known_inodes,
        "cachefs_open_descriptors": filesystem.open_descriptors,
        "cachefs_uptime_seconds": s.uptime_seconds,
        f"cachefs_mount_info{{kernel_cache=kernel_cache}}{{policy=policy}}{{version={__version__}}}": 1,
    }
    found = series(s)
    assert {name: found.get(name) for name in expected} == expected


def test_nothing_that_statistics_counts_is_left_out() -> None:
    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, HistogramSnapshot):
            yield value.total_seconds
        elif is_dataclass(value):
            for field in fields(value):
                yield from numbers(getattr(value, field.name))
        elif isinstance(value, dict):
            for entry in value.values():
                yield from numbers(entry)
        elif isinstance(value, int | float):
            yield value

    assert set(numbers(busy())) <= set(series(busy()).values())


def test_every_definition_is_exported_under_its_name_and_type() -> None:
    for statistics in (busy(), idle()):
        exported = {
            (family.name + {"counter": "_total"}.get(family.type, ""), family.type, family.documentation)
            for family in parse(generate_latest(registry_of(partial(replace, statistics))).decode())
        }
        # The plain text format has no type for info.
        assert exported == {(d.name, "gauge" if d.type == "info" else d.type, d.help) for d in DEFINITIONS}


def test_bounded_label_values_are_there_before_anything_has_happened() -> None:
    found = series(idle())
    for name in (
        *(f"cachefs_misses_total{{reason={reason}}}" for reason in ("cold", "capacity", "invalidated")),
        *(f"cachefs_readahead_pages_total{{outcome={outcome}}}" for outcome in ("used", "unused", "late")),
        *(f"cachefs_read_requests_total{{result={result}}}" for result in ("hit", "partial", "miss")),
        *(
            f"cachefs_evictions_total{{reason={reason}}}"
            for reason in ("capacity", "dropped", "invalidated", "noreuse", "truncated")
        ),
        "cachefs_writeback_errors_total{errno=EIO}",
        "cachefs_backing_errors_total{errno=EIO}",
        "cachefs_fuse_request_duration_seconds_count{op=read}",
        "cachefs_backing_request_duration_seconds_count{op=write}",
    ):
        assert found[name] == 0


def test_histograms_are_cumulative_and_agree_with_what_was_observed() -> None:
    histogram = Histogram()
    for seconds in (0.00001, 0.00025, 0.0003, 0.2, 60.0):
        histogram.observe(seconds)
    statistics = idle()
    filesystem = replace(statistics.filesystem, durations={"read": histogram.snapshot()})
    found = series(replace(statistics, filesystem=filesystem))
    name = "cachefs_fuse_request_duration_seconds"
    buckets = {
        float(key.split("le=")[1].split("}")[0]): value
        for key, value in found.items()
        if key.startswith(f"{name}_bucket") and "{op=read}" in key
    }
    assert list(buckets) == [*DURATION_BOUNDS_SECONDS, float("inf")]
    assert [buckets[bound] for bound in (0.000025, 0.0001, 0.00025, 0.0005, 0.1, 0.25, 10.0)] == [1, 1, 2, 3, 3, 4, 4]
    assert found[f"{name}_count{{op=read}}"] == buckets[float("inf")] == 5
    assert found[f"{name}_sum{{op=read}}"] == pytest.approx(60.20056)


def test_names_of_programs_that_are_no_text_are_valid_labels_and_add_up() -> None:
    statistics = idle()
    programs = {
        "\udcff": UseStatistics(1, 2, 3, 4, 5), "\\xff": UseStatistics(10, 20, 30, 40, 50), 'a"\n': UseStatistics(7, 0, 0, 0, 0),
    }  # fmt: skip
    found = series(replace(statistics, cache=replace(statistics.cache, programs=programs)))
    assert found["cachefs_process_hit_bytes_total{comm=\\xff}"] == 33
    assert found['cachefs_process_page_hits_total{comm=a"\n}'] == 7


@pytest.mark.parametrize(
    ("mountpoint", "shown"),
    [('/mnt/a"b\\c\nd', '/mnt/a"b\\c\nd'), ("/mnt/\udcff", "/mnt/\\xff"), ("/mnt/münchen", "/mnt/münchen")],
)
def test_any_mountpoint_makes_a_valid_label(mountpoint: str, shown: str) -> None:
    statistics = replace(busy(), mountpoint=mountpoint)
    text = generate_latest(registry_of(lambda: statistics)).decode()
    assert {s.labels["mountpoint"] for family in parse(text) for s in family.samples} == {shown}


def test_openmetrics_which_prometheus_asks_for_is_valid() -> None:
    for statistics in (busy(), idle()):
        text = openmetrics.exposition.generate_latest(registry_of(partial(replace, statistics)))
        assert len(list(openmetrics.parser.text_string_to_metric_families(text.decode()))) == len(DEFINITIONS)


def test_statistics_are_asked_for_by_scrapes_only_and_once_each() -> None:
    calls: list[None] = []

    def statistics() -> Statistics:
        calls.append(None)
        return idle()

    registry = registry_of(statistics)
    assert not calls
    generate_latest(registry)
    assert len(calls) == 1


def test_a_daemon_also_exports_its_own_memory_and_cpu_time() -> None:
    names = {family.name for family in parse(generate_latest(make_registry(idle)).decode())}
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "cachefs_page_hits"} <= names


# The server


@contextmanager
def served(registry: CollectorRegistry) -> Iterator[MetricsServer]:
    server = MetricsServer("127.0.0.1", 0, True, registry)
    try:
        yield server
    finally:
        server.close()


def fetch(url: str, method: str = "GET") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_server_answers_get_metrics_and_points_to_it() -> None:
    with served(registry_of(busy)) as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", server.url)
        status, text = fetch(server.url)
        assert status == 200
        assert f'cachefs_page_hits_total{{mountpoint="{MOUNTPOINT}"}} {busy().cache.page_hits}' in text
        assert fetch(server.url.removesuffix("metrics")) == (
            200,
            "cachefs: metrics for Prometheus are at /metrics\n",
        )
        assert fetch(f"{server.url}?name[]=cachefs_dirty_bytes")[1].count("\ncachefs_") == 1


def test_server_does_nothing_else() -> None:
    with served(registry_of(busy)) as server:
        assert fetch(f"{server.url}/x")[0] == 404
        assert fetch(server.url.replace("/metrics", "/etc/passwd"))[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert fetch(server.url, method)[0] == 405


def test_failing_statistics_cost_one_scrape_and_nothing_more(capfd: pytest.CaptureFixture[str]) -> None:
    answers: list[Statistics | None] = [None, busy()]

    def statistics() -> Statistics:
        answer = answers.pop(0)
        if answer is None:
            raise RuntimeError("the mount is going away")
        return answer

    with served(registry_of(statistics)) as server:
        assert fetch(server.url) == (500, "cachefs: the mount is going away\n")
        assert fetch(server.url)[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_stuck_statistics_fail_each_scrape_in_time_and_hold_one_thread() -> None:
    released = threading.Event()
    calls: list[None] = []

    def statistics() -> Statistics:
        calls.append(None)
        released.wait(30)
        return busy()

    try:
        with served(registry_of(statistics, timeout_seconds=0.05)) as server:
            for _ in range(3):
                assert fetch(server.url) == (500, "cachefs: the mount gave no statistics within 0.05 s\n")
            assert len(calls) == 1
    finally:
        released.set()


def test_a_client_that_says_nothing_keeps_nobody_waiting() -> None:
    with served(registry_of(busy)) as server:
        host, port = server.url.removeprefix("http://").removesuffix("/metrics").split(":")
        with socket.create_connection((host, int(port))):
            assert fetch(server.url)[0] == 200


def test_a_taken_port_is_an_error_only_if_it_was_asked_for_by_name() -> None:
    with served(CollectorRegistry()) as first:
        port = int(first.url.split(":")[2].split("/")[0])
        with pytest.raises(CachefsError, match=rf"^the metrics port 127\.0\.0\.1:{port} is taken; [^\n]*$"):
            MetricsServer("127.0.0.1", port, True, CollectorRegistry())
        second = MetricsServer("127.0.0.1", port, False, registry_of(busy))
        try:
            assert port < int(second.url.split(":")[2].split("/")[0]) < port + 100
            assert fetch(second.url)[0] == 200
        finally:
            second.close()


def test_close_frees_the_port_and_may_be_repeated() -> None:
    server = MetricsServer("127.0.0.1", 0, True, CollectorRegistry())
    port = int(server.url.split(":")[2].split("/")[0])
    server.close()
    server.close()
    MetricsServer("127.0.0.1", port, True, CollectorRegistry()).close()


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 9477), ("127.0.0.1", 70000), ("x" * 70, 1)]
)
def test_an_address_that_cannot_be_had_is_one_clear_line(host: str, port: int) -> None:
    with pytest.raises(CachefsError, match=rf"^cannot serve metrics on {re.escape(host)}:{port}: [^\n]+$"):
        MetricsServer(host, port, False, CollectorRegistry())


# METRICS.md


def test_metrics_md_lists_exactly_what_is_exported() -> None:
    rows = re.findall(r"^\| `cachefs_.*$", (ROOT / "METRICS.md").read_text(), re.MULTILINE)
    assert rows == [
        f"| `{d.name}` | {d.type} | {d.unit} | {', '.join(f'`{label}`' for label in d.labels)} | {d.help} |".replace(
            "|  |", "| |"
        )
        for d in DEFINITIONS
    ]


@pytest.mark.parametrize("statistics", [busy, idle])
def test_promtool_finds_no_fault_with_the_metrics(statistics: Callable[[], Statistics]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    text = generate_latest(registry_of(statistics))
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done
