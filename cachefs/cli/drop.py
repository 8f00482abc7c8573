"""`cachefs drop`: let go of what is cached of files."""

from collections.abc import Iterator, Mapping
from typing import Any

import click

from cachefs import control
from cachefs.cli.paths import by_mount
from cachefs.units import format_size


@click.command("drop")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def command(paths: tuple[str, ...]) -> int:
    """Drop clean pages of files, and of what is in directories, from the cache, and say what stayed.

    Unwritten data stays (cachefs sync writes it), and so do pinned files (cachefs unpin).
    """
    for record, inside in by_mount(paths):
        answers: Iterator[Mapping[str, Any]] = control.request(record.socket, {"command": "drop", "paths": inside})
        *_, last = answers
        stayed = ", ".join(f"{format_size(nbytes)} {reason}" for reason, nbytes in sorted(last["stayed"].items()))
        dropped = f"dropped {format_size(last['dropped_bytes'])} of {last['files']} files"
        click.echo(f"{dropped}; stayed: {stayed}" if stayed else dropped)
    return 0
