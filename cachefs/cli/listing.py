"""What the daemon says of cached files, as extents and as lines or JSON; nothing here asks or decides anything."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cachefs.cache.residency import Cached, Extent, extents, unpack
from cachefs.entries import escaped, printable
from cachefs.units import format_duration

Row = tuple["CachedFile", Extent]
EXTENT_HEADER = "      OFFSET       LENGTH  STATE                  AGE  LAST READER      FILE"
SUMMARY_HEADER = "      CACHED   SHARE        HITS      MISSES       AGE  FILE"


@dataclass
class CachedFile:
    """A file with something of it in the cache; `path` has the mountpoint too, and is "" for a file that was removed."""

    path: str
    inode: int
    size: int
    page_hits: int
    page_misses: int
    groups: list[Cached] = field(default_factory=list)

    def extents(self) -> Iterator[Extent]:
        return extents(sorted(self.groups, key=lambda group: group.number), self.size)


@dataclass
class Summary:
    """What of one file is cached, counted by state."""

    file: CachedFile
    bytes: Counter[str]
    age_seconds: float  # since its last use

    @property
    def cached_bytes(self) -> int:
        return self.bytes.total()

    @property
    def share(self) -> float:
        return min(1.0, self.cached_bytes / self.file.size) if self.file.size else 0.0


def gather(entries: Iterable[Mapping[str, Any]], top: str, found: dict[tuple[str, int], CachedFile]) -> None:
    """Adds what one message has of files on the mountpoint `top` to what was found: a file comes in several entries."""
    for entry in entries:
        key = top, int(entry["inode"])
        file = found.get(key)
        if file is None:
            path = "" if entry["path"] is None else below(top, entry["path"])
            file = found[key] = CachedFile(path, key[1], entry["size"], entry["page_hits"], entry["page_misses"])
        file.groups += map(unpack, entry["groups"])


def below(top: str, path: str) -> str:
    """The path of what is called `path` on the mountpoint `top`."""
    return f"{top.rstrip('/')}/{path}"


def rows(files: Iterable[CachedFile], states: frozenset[str]) -> Iterator[Row]:
    """Every extent in one of these states (none: in any), by file and offset."""
    for file in sorted(files, key=lambda file: file.path):
        for extent in file.extents():
            if not states or extent.state in states:
                yield file, extent


def summaries(files: Iterable[CachedFile], states: frozenset[str]) -> Iterator[Summary]:
    """What is in these states (none: in any), a file at a time."""
    for file in sorted(files, key=lambda file: file.path):
        count: Counter[str] = Counter()
        for extent in file.extents():
            if not states or extent.state in states:
                count[extent.state] += extent.length
        if count:
            yield Summary(file, count, min(group.used_seconds for group in file.groups))


def extent_lines(found: Iterable[Row]) -> Iterator[str]:
    for file, (offset, length, state, age, reader) in found:
        who = printable(reader) or "-"
        yield f"{offset:12} {length:12}  {state:16} {format_duration(age):>9}  {who:15}  {title(file)}"


def summary_lines(found: Iterable[Summary]) -> Iterator[str]:
    for summary in found:
        file, age = summary.file, format_duration(summary.age_seconds)
        share = f"{100 * summary.share:.1f} %"
        yield f"{summary.cached_bytes:12} {share:>7} {file.page_hits:11} {file.page_misses:11} {age:>9}  {title(file)}"


def extent_json(found: Iterable[Row]) -> Iterator[str]:
    for file, extent in found:
        facts = {"inode": file.inode, **extent._asdict(), "last_reader": escaped(extent.last_reader)}
        yield json.dumps({**named(file.path), **facts})


def summary_json(found: Iterable[Summary]) -> Iterator[str]:
    for summary in found:
        file = summary.file
        figures = {
            "inode": file.inode,
            "size": file.size,
            "cached_bytes": summary.cached_bytes,
            "share": round(summary.share, 6),
            "bytes": dict(summary.bytes),
            "page_hits": file.page_hits,
            "page_misses": file.page_misses,
            "age_seconds": summary.age_seconds,
        }
        yield json.dumps({**named(file.path), **figures})


def title(file: CachedFile) -> str:
    return printable(file.path) or f"(removed, inode {file.inode})"


def named(path: str) -> dict[str, str | None]:
    """A path in JSON: text that every reader of JSON takes, see `entries.escaped`; null for a file that was removed."""
    return {"file": escaped(path) or None}
