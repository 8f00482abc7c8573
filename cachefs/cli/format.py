"""Answers of the daemon as text for people; nothing here asks or decides anything."""

from collections.abc import Iterator, Mapping
from typing import Any

from cachefs.cli.listing import one_line
from cachefs.units import format_duration, format_size

Figures = Mapping[str, Any]
_LABEL_WIDTH = 14
PROGRAMS_SHOWN = 5


def progress_line(message: Figures) -> str:
    """How much is left to write."""
    if "dirty_bytes" not in message:
        return "waiting for the daemon"
    return f"{format_size(float(message['dirty_bytes']))} left to write"


def unwritten_line(piece: object) -> str:
    """One piece of a file that could not be written."""
    if not isinstance(piece, Mapping):
        return str(piece)
    begin, length = int(piece.get("offset", 0)), int(piece.get("length", 0))
    return f"{piece.get('path')}: bytes {begin} to {begin + length}: {piece.get('error')}"


def status_text(status: Figures) -> str:
    """One daemon's figures, a dozen lines."""
    statistics = status.get("statistics")
    if not isinstance(statistics, Mapping):
        return f"{_title(status)}\n  {status.get('error', 'no figures')}"
    rows = [f"  {label:<{_LABEL_WIDTH}}{text}" for label, text in _rows(statistics, status.get("metrics"))]
    return "\n".join([_title(status), *rows])


def _title(status: Figures) -> str:
    uptime = (status.get("statistics") or {}).get("uptime_seconds")
    since = f", up {format_duration(uptime)}" if uptime is not None else ""
    return f"{status.get('mountpoint')} <- {status.get('source')}  ({status.get('phase')}, pid {status.get('pid')}{since})"


def _rows(statistics: Figures, metrics: object) -> Iterator[tuple[str, str]]:
    cache, writeback = _part(statistics, "cache"), _part(statistics, "writeback")
    backing, filesystem = _part(statistics, "backing"), _part(statistics, "filesystem")
    yield "cache", _cache(cache) + f", {statistics.get('policy')}, kernel cache {statistics.get('kernel_cache')}"
    if pinned := _count(cache, "pinned_pages"):
        yield "pinned", f"{format_size(4096 * pinned)} of at most {format_size(_count(cache, 'pin_limit_bytes'))}"
    yield "hit rate", _hit_rates(cache)
    yield "reads", _reads(cache)
    yield "misses", _by_name(_part(cache, "misses"), "pages") + f", {_count(cache, 'refaults')} of them refaults"
    yield from _programs(_part(cache, "programs"))
    yield "evictions", _by_name(_part(cache, "evictions"), "pages")
    yield "readahead", _readahead(cache)
    yield "dirty", _dirty(writeback)
    yield "written back", format_size(_count(writeback, "written_bytes")) + _throttled(writeback)
    yield "journal", _journal(_part(statistics, "journal"))
    yield "errors", _errors(_part(backing, "errors"), _part(writeback, "errors"))
    yield "backing", _backing(backing)
    yield from _calls(_part(backing, "durations"))
    yield "time saved", format_duration(_count(filesystem, "saved_seconds")) + " (hits x latency)"
    yield "open", _open(filesystem)
    yield "metrics", str(metrics) if metrics else "off"


def _part(figures: Figures, name: str) -> Figures:
    """A group of figures, empty where the daemon (another version) sends none."""
    part = figures.get(name)
    return part if isinstance(part, Mapping) else {}


def _count(figures: Figures, name: str) -> float:
    value = figures.get(name)
    return value if isinstance(value, int | float) else 0


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _cache(cache: Figures) -> str:
    resident, capacity = _count(cache, "resident_bytes"), _count(cache, "capacity_bytes")
    return f"{format_size(resident)} of {format_size(capacity)} in use ({_percent(resident, capacity)})"


def _programs(programs: Figures) -> Iterator[tuple[str, str]]:
    """The programs that read and wrote most."""
    amounts = ("hit_bytes", "miss_bytes", "write_bytes")
    totals = {name: sum(_count(use, amount) for amount in amounts) for name, use in programs.items()}
    label = "programs"
    for name in sorted(filter(totals.get, totals), key=lambda name: -totals[name])[:PROGRAMS_SHOWN]:
        hits, misses = (_count(programs[name], counter) for counter in ("page_hits", "page_misses"))
        hit, missed, written = (_count(programs[name], amount) for amount in amounts)
        amount = f"{format_size(hit + missed)} read, {format_size(written)} written"
        yield label, f"{one_line(name)}: {_percent(hits, hits + misses)} of pages hit, {amount}"
        label = ""


def _hit_rates(cache: Figures) -> str:
    hits, misses = _count(cache, "page_hits"), _count(cache, "page_misses")
    hit_bytes, miss_bytes = _count(cache, "hit_bytes"), _count(cache, "miss_bytes")
    pages = f"{_percent(hits, hits + misses)} of pages ({hits} hits, {misses} misses)"
    amounts = f"{format_size(hit_bytes)} hit, {format_size(miss_bytes)} missed"
    return f"{pages}, {_percent(hit_bytes, hit_bytes + miss_bytes)} of bytes ({amounts})"


def _reads(cache: Figures) -> str:
    counts = ((_count(cache, f"reads_{result}"), result) for result in ("hit", "partial", "miss"))
    written = format_size(_count(cache, "write_bytes"))
    return ", ".join(f"{count} {result}" for count, result in counts) + f" (requests); {written} written"


def _by_name(counts: Figures, unit: str) -> str:
    named = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
    return f"{named} ({unit})" if named else "none"


def _readahead(cache: Figures) -> str:
    used, unused = _count(cache, "readahead_used_pages"), _count(cache, "readahead_unused_pages")
    late = _count(cache, "readahead_late_pages")
    return f"{used} pages used, {unused} unused, {late} late ({_percent(used, used + unused)} used)"


def _dirty(writeback: Figures) -> str:
    dirty, limit = _count(writeback, "dirty_bytes"), _count(writeback, "dirty_limit_bytes")
    oldest = _count(writeback, "oldest_dirty_seconds")
    age = f", oldest {format_duration(oldest)}" if dirty else ""
    return f"{format_size(dirty)} of at most {format_size(limit)}{age}"


def _throttled(writeback: Figures) -> str:
    seconds = _count(writeback, "throttle_seconds")
    return f", writers slowed for {format_duration(seconds)}" if seconds else ""


def _journal(journal: Figures) -> str:
    size = _count(journal, "size_bytes")
    if not size:
        return "none: what is not written back is lost if the daemon dies"
    used, replayed = format_size(_count(journal, "used_bytes")), _count(journal, "replayed_bytes")
    through = int(_count(journal, "written_through"))
    notes = [f"{format_size(replayed)} replayed"] if replayed else []
    notes += [f"{through} writes could not be taken"] if through else []
    return ", ".join([f"{used} of at most {format_size(size)} in use", *notes])


def _errors(backing: Figures, writeback: Figures) -> str:
    groups = (("backing", backing), ("writeback", writeback))
    named = [f"{what} {_by_name(counts, 'calls')}" for what, counts in groups if any(counts.values())]
    return ", ".join(named) or "none"


def _backing(backing: Figures) -> str:
    latency, bandwidth = _count(backing, "latency_seconds"), _count(backing, "bandwidth_bytes_per_second")
    speed = f"latency {format_duration(latency)}, {format_size(bandwidth)}/s" if bandwidth else "not measured yet"
    return f"{speed}; {format_size(_count(backing, 'read_bytes'))} read"


def _calls(durations: Figures) -> Iterator[tuple[str, str]]:
    """Backing calls, those first that took the most time together."""
    totals = [(_count(snapshot, "total_seconds"), sum(snapshot["counts"]), op) for op, snapshot in durations.items()]
    for seconds, calls, op in sorted(totals, reverse=True)[:5]:
        if calls:
            yield f"  {op}", f"{calls} calls, {format_duration(seconds / calls)} each on average"


def _open(filesystem: Figures) -> str:
    handles, inodes = _count(filesystem, "open_handles"), _count(filesystem, "known_inodes")
    return f"{handles} handles, {inodes} inodes known, {_count(filesystem, 'open_descriptors')} descriptors"
