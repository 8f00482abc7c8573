"""`cachefs stat`: what of one file is cached, who has it open, and what readahead does for them."""

import json
from typing import Any

import click

from cachefs import control
from cachefs.cli import listing
from cachefs.cli.listing import CachedFile
from cachefs.cli.paths import located
from cachefs.entries import escaped, printable
from cachefs.units import format_size


@click.command("stat")
@click.argument("path", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(path: str, as_json: bool) -> int:
    """Show what of FILE is cached, its counters, who has it open, and the readahead of each."""
    place = located(path)
    record, inside = place.record, place.path
    found: dict[tuple[str, int], CachedFile] = {}
    facts: dict[str, Any] = {}
    for message in control.request(record.socket, {"command": "stat", "path": inside}):
        entries = message.pop("files", [])
        if isinstance(entries, list):
            listing.gather(entries, record.mountpoint, found)
        facts |= message
    shown = listing.below(record.mountpoint, inside)
    facts["names"] = [listing.below(record.mountpoint, name) for name in facts["names"]]
    file = next(iter(found.values()), None) or CachedFile(shown, 0, int(facts["size"]), 0, 0)
    click.echo(json.dumps(_as_json(shown, file, facts), indent=2) if as_json else "\n".join(_lines(shown, file, facts)))
    return 0


def _as_json(path: str, file: CachedFile, facts: dict[str, Any]) -> dict[str, Any]:
    summary = next(listing.summaries([file], frozenset()), None)
    return {
        **listing.named(path),
        "names": [escaped(name) for name in facts["names"]],
        "size": facts["size"],
        "cached_bytes": summary.cached_bytes if summary else 0,
        "bytes": dict(summary.bytes) if summary else {},
        "page_hits": file.page_hits,
        "page_misses": file.page_misses,
        "window_pages": facts["window_pages"],
        "handles": facts["handles"],
        "extents": [extent._asdict() for extent in file.extents()],
    }


def _lines(path: str, file: CachedFile, facts: dict[str, Any]) -> list[str]:
    summary = next(listing.summaries([file], frozenset()), None)
    share = f"{format_size(summary.cached_bytes)} ({100 * summary.share:.1f} %)" if summary else "nothing"
    by_state = ", ".join(f"{format_size(count)} {state}" for state, count in summary.bytes.items()) if summary else ""
    names = [printable(name) for name in facts["names"]]
    lines = [
        printable(path),
        *([f"  names      {', '.join(names)}"] if len(names) > 1 else []),
        f"  size       {facts['size']} bytes",
        f"  cached     {share}{': ' if by_state else ''}{by_state}",
        f"  reads      {file.page_hits} page hits, {file.page_misses} page misses",
        f"  readahead  windows of up to {facts['window_pages']} pages",
        *(f"  open       {_handle(handle)}" for handle in facts["handles"]),
    ]
    if summary:
        lines += [listing.EXTENT_HEADER, *listing.extent_lines((file, extent) for extent in file.extents())]
    return lines


def _handle(handle: dict[str, Any]) -> str:
    who = f"{printable(handle['program'])}, user {handle['uid']}, {'writing' if handle['writable'] else 'reading'}"
    streams = [f"at page {s['position']}, {s['stop'] - s['position']} pages ahead" for s in handle["streams"]]
    return f"{who}: {'; '.join(streams)}" if streams else who
