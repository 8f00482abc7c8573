"""`cachefs status`: what the daemons count, for people or as JSON."""

import json
from dataclasses import asdict

import click

from cachefs import __version__, control, mountinfo
from cachefs.cli.format import status_text
from cachefs.errors import CachefsError
from cachefs.state import DaemonRecord, daemons, find_daemon

_PATIENCE_SECONDS = 10.0


@click.command("status")
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for one MOUNTPOINT, else a list.")
def command(mountpoint: str | None, as_json: bool) -> int:
    """Show hit rates, memory, dirty data, readahead, writeback and errors of one mount, or of all of them."""
    try:
        records = daemons() if mountpoint is None else [_daemon_of(mountpoint)]
    except CachefsError as error:
        if as_json:
            _print_json({"error": str(error)})
        raise
    answers = [_answer_of(record) for record in records]
    if as_json:
        _print_json(answers if mountpoint is None else answers[0])
    else:
        click.echo("\n\n".join(map(status_text, answers)) or "no cachefs is mounted")
    return 1 if any("error" in answer for answer in answers) else 0


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
