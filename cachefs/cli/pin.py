"""`cachefs pin` and `unpin`: files that stay in memory."""

import json
from typing import Any

import click

from cachefs import control
from cachefs.cli.listing import below, named
from cachefs.cli.paths import by_mount
from cachefs.cli.progress import progress
from cachefs.entries import printable
from cachefs.state import DaemonRecord, daemons
from cachefs.units import format_size


@click.command("pin")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects.")
def command(paths: tuple[str, ...], as_json: bool) -> int:
    """Keep files, and what is in directories now, in memory; without PATH, list what is pinned.

    A pin names a path: what is found there is read into the cache and not evicted, again when it has changed, and after a
    remount. All pins together take at most --pin-limit. Exit status 1 if something is not in memory: it says why.
    """
    pins = _pin(paths) if paths else [(record, pin) for record in daemons() for pin in _asked(record, {"command": "pins"})]
    if as_json:
        click.echo(json.dumps([_as_json(*pin) for pin in pins], indent=2))
    elif not paths:
        click.echo("".join(map(_line, *zip(*pins, strict=True))) if pins else "", nl=False)
    bad = [(record, pin) for record, pin in pins if pin["state"]]
    if paths and not as_json:
        for record, pin in bad:
            click.echo(f"cachefs: {printable(below(record.mountpoint, pin['path']))}: {pin['state']}", err=True)
    return 1 if bad else 0


@click.command("unpin")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def unpin_command(paths: tuple[str, ...]) -> int:
    """Let files, and what is pinned in directories, be evicted again."""
    for record, inside in by_mount(paths, must_exist=False):
        for _ in control.request(record.socket, {"command": "unpin", "paths": inside}):
            pass
    return 0


def _pin(paths: tuple[str, ...]) -> list[tuple[DaemonRecord, dict[str, Any]]]:
    found = []
    for record, inside in by_mount(paths):
        with progress("pinning") as show:
            for message in control.request(record.socket, {"command": "pin", "paths": inside}, None):
                show(message)
                pins = message.get("pins", [])
                found += [(record, pin) for pin in pins] if isinstance(pins, list) else []
    return found


def _asked(record: DaemonRecord, request: dict[str, object]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in control.request(record.socket, request):
        pins = message.get("pins", [])
        found += pins if isinstance(pins, list) else []
    return found


def _as_json(record: DaemonRecord, pin: dict[str, Any]) -> dict[str, Any]:
    figures = {"size": pin["size"], "cached_bytes": pin["cached_bytes"], "problem": pin["state"] or None}
    return {**named(below(record.mountpoint, pin["path"])), **figures}


def _line(record: DaemonRecord, pin: dict[str, Any]) -> str:
    problem = f"  ({pin['state']})" if pin["state"] else ""
    cached, size = format_size(pin["cached_bytes"]), format_size(pin["size"])
    return f"{cached:>10} of {size:>10}  {printable(below(record.mountpoint, pin['path']))}{problem}\n"
