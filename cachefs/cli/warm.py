"""`cachefs warm`: bring files into memory."""

from typing import Any

import click

from cachefs import control
from cachefs.cli.listing import below
from cachefs.cli.paths import by_mount
from cachefs.cli.progress import progress
from cachefs.entries import printable
from cachefs.errors import UsageError
from cachefs.units import format_size, parse_size


@click.command("warm")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--range", "span", metavar="START-END", help="Only these bytes of each file: 0-64M, 1G-, -4K.")
def command(paths: tuple[str, ...], span: str | None) -> int:
    """Read files, and what is in directories, into the cache.

    It stops when the cache has no more room besides pins and unwritten data; exit status 1 then, and where a file could not
    be read.
    """
    start, end = (0, None) if span is None else _parse_range(span)
    status = 0
    for record, inside in by_mount(paths):
        request = {"command": "warm", "paths": inside, "start": start, "end": end}
        last: dict[str, Any] = {}
        with progress("warming") as show:
            for last in control.request(record.socket, request, None):
                show(last)
        for failure in last["failed"]:
            click.echo(f"cachefs: {printable(below(record.mountpoint, failure['path']))}: {failure['error']}", err=True)
        done, total = format_size(last["done_bytes"]), format_size(last["total_bytes"])
        if last["full"]:
            click.echo(f"cachefs: the cache has no more room: {done} of {total} are in memory", err=True)
        else:
            click.echo(f"{done} of {total} in memory, {last['files']} files")
        status |= bool(last["full"] or last["failed"])
    return status


def _parse_range(text: str) -> tuple[int, int | None]:
    """[start, end) in bytes; an end of None is that of the file."""
    first, dash, last = text.partition("-")
    try:
        start, end = parse_size(first) if first.strip() else 0, parse_size(last) if last.strip() else None
    except UsageError:
        dash = ""
    if not dash or not text.strip("- ") or (end is not None and end <= start):
        raise UsageError(f"--range {text!r} is not START-END: write it like 0-64M, 1G- or -4K")
    return start, end
