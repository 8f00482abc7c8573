"""`cachefs sync`: has the daemon write out a file, a directory or all, and SOURCE make it durable."""

import click

from cachefs import control
from cachefs.cli.asking import OutOfTime, ask, timeout_option
from cachefs.cli.format import progress_line, undurable_line, unwritten_line
from cachefs.cli.place import Place, place_of
from cachefs.errors import CachefsError
from cachefs.state import daemons


@click.command("sync")
@click.argument("path", metavar="[PATH]", required=False)
@timeout_option
def command(path: str | None, timeout: float | None) -> int:
    """Write everything at or below PATH to SOURCE and make it durable there; the mount stays.

    PATH is a mountpoint, or a file or directory on a mount; without it, every mount of yours. Exit status 0 only when all is
    durable on SOURCE. What could not be written is listed.
    """
    if path is not None:
        return _sync(place_of(path), timeout)
    places = [Place(record, "") for record in daemons()]
    if not places:
        click.echo("no cachefs is mounted")
    return max([_sync_or_complain(place, timeout) for place in places], default=0)


def _sync_or_complain(place: Place, timeout: float | None) -> int:
    """One of several: that it fails must not keep the others from being written."""
    try:
        return _sync(place, timeout)
    except CachefsError as error:
        click.echo(f"cachefs: {error}", err=True)
        return error.exit_status


def _sync(place: Place, timeout: float | None) -> int:
    try:
        answer = ask(place.record, {"command": "sync", "path": place.path}, timeout)
    except control.ConnectionLost as error:
        raise CachefsError(f"{error}: see {place.record.log}") from None
    except OutOfTime as late:
        left = progress_line(late.last)
        raise CachefsError(f"not done after {timeout:g} seconds ({left}): it goes on in the background") from None
    lines = [f"not written: {unwritten_line(entry)}" for entry in answer.unwritten]
    lines += [f"not durable: {undurable_line(file)}" for file in answer.last.get("undurable") or ()]
    for line in lines:
        click.echo(f"cachefs: {line}", err=True)
    return 1 if lines else 0
