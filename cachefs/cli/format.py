"""Answers of the daemon as text for people; nothing here asks or decides anything."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cachefs.entries import printable
from cachefs.units import format_duration, format_size

Figures = Mapping[str, Any]
_LABEL_WIDTH = 14
PROGRAMS_SHOWN = 5


def progress_line(message: Figures) -> str:
    """How much is left to write."""
    if "dirty_bytes" not in message:
        return "waiting for the daemon"
    return f"{format_size(float(message['dirty_bytes']))} left to write"


def unwritten_line(entry: Figures) -> str:
    """One piece of a file that is not on SOURCE."""
    begin = int(entry.get("offset", 0))
    reason = entry.get("error") or "nothing failed"
    return f"{file_name(entry)}: bytes {begin} to {begin + int(entry.get('length', 0))}: {reason}"


def undurable_line(file: Figures) -> str:
    """One file that SOURCE has but could not make durable."""
    return f"{file_name(file)}: {file.get('error')}"


def file_name(entry: Figures) -> str:
    """What a file is called on one line."""
    path = entry.get("path")
    return f"(inode {entry.get('inode')}, no name known)" if path is None else printable(str(path))


def left_line(timeout_seconds: float, last: Figures) -> str:
    """What becomes of what was not done in time; `last` is the daemon's newest word."""
    kept = f", what is left is kept {last['kept']}" if last.get("kept") else ""
    return f"not done after {timeout_seconds:g} seconds ({progress_line(last)}): it goes on in the background{kept}"


def fate_line(entries: Sequence[Figures], last: Figures) -> str:
    """What becomes of the data that could not be written by the end; `last` is the daemon's last word."""
    fate = f"is kept {last['kept']}" if last.get("kept") else "is lost"
    return f"{_amount(entries)} could not be written and {fate}"


def _amount(entries: Sequence[Figures]) -> str:
    files = {(entry.get("path"), entry.get("inode")) for entry in entries}
    size = format_size(sum(entry["length"] for entry in entries))
    return f"{size} of {len(files)} files" if len(files) != 1 else f"{size} of one file"


def discard_question(path: str, entries: Sequence[Figures]) -> str:
    """What somebody is asked before data is given up."""
    reasons = ", ".join(sorted({str(entry.get("error")) for entry in entries}))
    size = format_size(sum(entry["length"] for entry in entries))
    return f"Give up {size} that programs wrote to {printable(path)} and SOURCE does not take ({reasons})?"


def discarded_line(path: str, last: Figures) -> str:
    return f"{int(last.get('discarded_bytes', 0))} bytes of {printable(path)} discarded"


def dirty_text(title: str, entries: Sequence[Figures]) -> str:
    """What is not on the backing, a line an extent; the oldest first, as they come."""
    if not entries:
        return f"{title}\n  everything is on SOURCE"
    rows = [_DIRTY_HEAD, *map(_dirty_row, entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_DIRTY_HEAD) - 1)]
    lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join([f"{title}, {_amount(entries)} not on SOURCE", *(f"  {line}" for line in lines)])


_DIRTY_HEAD = ("age", "offset", "length", "tries", "last error", "next try", "file")


def _dirty_row(entry: Figures) -> tuple[str, ...]:
    return (
        format_duration(entry["age_seconds"]), str(entry["offset"]), str(entry["length"]), str(entry["tries"]),
        str(entry["error"] or "-"), format_duration(entry["next_try_seconds"]), file_name(entry),
    )  # fmt: skip


def status_text(status: Figures) -> str:
    """One daemon's figures, a dozen lines."""
    statistics = status.get("statistics")
    if not isinstance(statistics, Mapping):
        return f"{_title(status)}\n  {status.get('error', 'no figures')}"
    rows = [f"  {label:<{_LABEL_WIDTH}}{text}" for label, text in _rows(statistics, status)]
    return "\n".join([_title(status), *rows])


def _title(status: Figures) -> str:
    uptime = (status.get("statistics") or {}).get("uptime_seconds")
    since = f", up {format_duration(uptime)}" if uptime is not None else ""
    return f"{status.get('mountpoint')} <- {status.get('source')}  ({status.get('phase')}, pid {status.get('pid')}{since})"


def _rows(statistics: Figures, status: Figures) -> Iterator[tuple[str, str]]:
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
    through = f", {format_size(_count(writeback, 'through_bytes'))} written through"
    yield "written back", format_size(_count(writeback, "written_bytes")) + through + _throttled(writeback)
    yield "journal", _journal(_part(statistics, "journal"))
    yield "conflicts", _conflicts(_part(statistics, "conflicts"))
    yield "errors", _errors(_part(backing, "errors"), _part(writeback, "errors"))
    yield "backing", _backing(backing)
    yield from _calls(_part(backing, "durations"))
    yield "time saved", format_duration(_count(filesystem, "saved_seconds")) + " (hits x latency)"
    yield "open", _open(filesystem)
    yield "metrics", str(status.get("metrics") or "off")
    yield "page", str(status.get("page") or "off")


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
        yield label, f"{printable(name)}: {_percent(hits, hits + misses)} of pages hit, {amount}"
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


def _conflicts(conflicts: Figures) -> str:
    """How many files were changed on both sides, and the last of them with its copy."""
    total, recent = _count(conflicts, "total"), conflicts.get("recent")
    if not isinstance(recent, list) or not recent:
        return f"{total} files changed on both sides" if total else "none"
    last = recent[-1]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_count(last, "when")))
    copy = f"{last.get('kept')} kept as {_path(last.get('copy'))}"
    return f"{total} files changed on both sides, the last {when}: {_path(last.get('path'))}, {copy}"


def _path(path: object) -> str:
    """A path for a terminal: what could move the cursor is escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _backing(backing: Figures) -> str:
    latency, bandwidth = _count(backing, "latency_seconds"), _count(backing, "bandwidth_bytes_per_second")
    speed = f"latency {format_duration(latency)}, {format_size(bandwidth)}/s" if bandwidth else "not measured yet"
    timeouts = _count(backing, "timeouts")
    failed = f"; {timeouts} requests failed for want of an answer" if timeouts else ""
    return f"{_state(backing)}{speed}; {format_size(_count(backing, 'read_bytes'))} read{failed}"


def _state(backing: Figures) -> str:
    if not backing.get("lost"):
        return ""
    silent = _count(backing, "silent_seconds")
    return f"LOST, no answer for {format_duration(silent)}; " if silent else "LOST, says it is not there; "


def _calls(durations: Figures) -> Iterator[tuple[str, str]]:
    """Backing calls, those first that took the most time together."""
    totals = [(_count(snapshot, "total_seconds"), sum(snapshot["counts"]), op) for op, snapshot in durations.items()]
    for seconds, calls, op in sorted(totals, reverse=True)[:5]:
        if calls:
            yield f"  {op}", f"{calls} calls, {format_duration(seconds / calls)} each on average"


def _open(filesystem: Figures) -> str:
    handles, inodes = _count(filesystem, "open_handles"), _count(filesystem, "known_inodes")
    return f"{handles} handles, {inodes} inodes known, {_count(filesystem, 'open_descriptors')} descriptors"
