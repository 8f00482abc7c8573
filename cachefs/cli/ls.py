"""`cachefs ls`: which parts of which files are in the cache."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import click

from cachefs import control
from cachefs.cache.residency import STATES
from cachefs.cli import listing
from cachefs.cli.listing import CachedFile, Row, Summary
from cachefs.cli.paths import by_mount
from cachefs.errors import UsageError
from cachefs.state import DaemonRecord, daemons

T = TypeVar("T")
_EXTENT_KEYS: dict[str, Callable[[Row], Any]] = {
    "size": lambda row: row[1].length,
    "age": lambda row: row[1].age_seconds,
}
_SUMMARY_KEYS: dict[str, Callable[[Summary], Any]] = {
    "size": lambda summary: summary.cached_bytes,
    "age": lambda summary: summary.age_seconds,
    "share": lambda summary: summary.share,
    "hits": lambda summary: summary.file.page_hits,
}


@click.command("ls")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--summary", is_flag=True, help="One line a file: bytes cached, share of the file, hits and misses in pages.")
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="Only what is in this state (repeatable).")
@click.option("--sort", "key", default="file", type=click.Choice(("file", "size", "age", "share", "hits")), show_default=True,
              help="Largest first, but for file; share and hits with --summary.")  # fmt: skip
@click.option("--top", type=click.IntRange(1), metavar="N", help="Only the first N.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects.")
def command(paths: tuple[str, ...], summary: bool, states: tuple[str, ...], key: str, top: int | None, as_json: bool) -> int:
    """Show which parts of files are in the cache: offset, length, state, age and last reader of each extent.

    PATH is a file or directory on a mount, or a pattern; without one, everything cached is listed. Lengths are bytes, ages
    the time since the last use, or for unwritten data since it was written.
    """
    if not summary and key in ("share", "hits"):
        raise UsageError(f"--sort {key} needs --summary")
    files = _files(by_mount(paths) if paths else [(record, []) for record in daemons()])
    wanted = frozenset(states)
    if summary:
        summaries = _sorted(listing.summaries(files, wanted), _SUMMARY_KEYS.get(key), top)
        _print(listing.SUMMARY_HEADER, summaries, listing.summary_json if as_json else listing.summary_lines, as_json)
    else:
        rows = _sorted(listing.rows(files, wanted), _EXTENT_KEYS.get(key), top)
        _print(listing.EXTENT_HEADER, rows, listing.extent_json if as_json else listing.extent_lines, as_json)
    return 0


def _files(asked: Iterable[tuple[DaemonRecord, list[str]]]) -> Iterable[CachedFile]:
    found: dict[tuple[str, int], CachedFile] = {}
    for record, paths in asked:
        for message in control.request(record.socket, {"command": "ls", "paths": paths}):
            entries = message.get("files")
            if isinstance(entries, list):
                listing.gather(entries, record.mountpoint, found)
    return found.values()


def _sorted(items: Iterator[T], key: Callable[[T], Any] | None, top: int | None) -> Iterable[T]:
    """The first `top`, or all: as they come, or the largest first."""
    if key is None:
        return islice(items, top)
    return sorted(items, key=key, reverse=True) if top is None else heapq.nlargest(top, items, key=key)


def _print(header: str, items: Iterable[T], lines: Callable[[Iterable[T]], Iterator[str]], as_json: bool) -> None:
    first = True
    for chunk in _chunks(lines(items)):
        if as_json:
            click.echo(("[" if first else ",\n") + ",\n".join(chunk), nl=False)
        else:
            click.echo("\n".join([header, *chunk] if first else chunk))
        first = False
    if as_json:
        click.echo("[]" if first else "]")


def _chunks(lines: Iterator[str], most: int = 5000) -> Iterator[list[str]]:
    while chunk := list(islice(lines, most)):
        yield chunk
