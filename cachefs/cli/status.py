"""`cachefs status`: what the daemons count, or what is not yet on SOURCE, for people or as JSON."""

import json
from dataclasses import asdict
from typing import Any

import click

from cachefs import __version__, control, mountinfo
from cachefs.cli.asking import OutOfTime, ask
from cachefs.cli.format import dirty_text, status_text
from cachefs.cli.place import Place, place_of
from cachefs.entries import escaped, merged
from cachefs.errors import CachefsError
from cachefs.state import DaemonRecord, daemons, find_daemon

_PATIENCE_SECONDS = 10.0


@click.command("status")
@click.argument("path", metavar="[MOUNTPOINT]", required=False)
@click.option("--dirty", is_flag=True, help="List what is not on SOURCE yet: of a mount, or of any file or directory on one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for one MOUNTPOINT, else a list; --dirty: a list.")
def command(path: str | None, dirty: bool, as_json: bool) -> int:
    """Show hit rates, memory, dirty data, readahead, writeback and errors of one mount, or of all of them.

    With --dirty, show instead which bytes are not on SOURCE yet, the oldest first: for how long, how many tries failed, with
    what error, and when the next one comes at the latest. In JSON, names have \\xHH for a byte that is no UTF-8 and \\\\ for
    a backslash.
    """
    if dirty:
        return _dirty([Place(record, "") for record in daemons()] if path is None else _place_of(path, as_json), as_json)
    try:
        records = daemons() if path is None else [_daemon_of(path)]
    except CachefsError as error:
        if as_json:
            _print_json({"error": str(error)})
        raise
    answers = [_answer_of(record) for record in records]
    if as_json:
        _print_json(answers if path is None else answers[0])
    else:
        click.echo("\n\n".join(map(status_text, answers)) or "no cachefs is mounted")
    return 1 if any("error" in answer for answer in answers) else 0


def _dirty(places: list[Place], as_json: bool) -> int:
    """Shows what is not on SOURCE of each place; the exit status is 1 if one of the daemons did not answer."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    status = 0
    for place in places:
        try:
            entries = ask(place.record, {"command": "dirty", "path": place.path}, _PATIENCE_SECONDS).unwritten
        except (CachefsError, OutOfTime) as problem:
            reason = problem if isinstance(problem, CachefsError) else "the daemon does not answer"
            click.echo(f"cachefs: {place.record.mountpoint}: {reason}", err=True)
            status = 1
            continue
        texts.append(dirty_text(f"{place.record.mountpoint} <- {place.record.source}", entries))
        found += [{"mountpoint": place.record.mountpoint} | entry for entry in entries]
    if as_json:
        _print_json([entry | _names_of(entry) for entry in merged(found)])
    elif texts or not status:
        click.echo("\n\n".join(texts) or "no cachefs is mounted")
    return status


def _place_of(path: str, as_json: bool) -> list[Place]:
    try:
        return [place_of(path)]
    except CachefsError:
        if as_json:
            _print_json([])
        raise


def _names_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The names in an entry as every JSON parser takes them."""
    return {key: None if entry[key] is None else escaped(entry[key]) for key in ("mountpoint", "path")}


def _daemon_of(path: str) -> DaemonRecord:
    record = find_daemon(path)
    if record is not None:
        return record
    if mountinfo.is_dead(path):
        raise CachefsError(f"{path} has no daemon any more: cachefs umount {path} tidies up")
    raise CachefsError(f"{path} is not a cachefs mountpoint: cachefs status lists them")


def _answer_of(record: DaemonRecord) -> dict[str, object]:
    """What is on record of a daemon and what it answers, or "error" if it does not."""
    known = asdict(record) | {"version": __version__}
    del known["config"]
    try:
        for answer in control.request(record.socket, {"command": "status"}, total_seconds=_PATIENCE_SECONDS):
            known |= answer
    except CachefsError as error:
        known["error"] = str(error)
    known.pop("done", None)
    return known


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))
