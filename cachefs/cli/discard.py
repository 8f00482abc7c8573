"""`cachefs discard`: gives up, after asking, the data of a file that SOURCE does not take."""

import sys

import click

from cachefs import control
from cachefs.cli.asking import Answer, ask
from cachefs.cli.format import discard_question, discarded_line
from cachefs.cli.place import Place, place_of
from cachefs.errors import CachefsError, UsageError


@click.command("discard")
@click.argument("path", metavar="PATH")
@click.option("--yes", "sure", is_flag=True, help="Do not ask.")
def command(path: str, sure: bool) -> int:
    """Give up what was written to the file PATH and cannot be brought to SOURCE.

    The file then has the contents, size and times that it has in SOURCE. Refused for a file of which nothing failed.
    """
    if not sure and not sys.stdin.isatty():
        raise UsageError("discard asks before it gives data up, and there is nobody to ask: say --yes if you are sure")
    place = place_of(path)
    at_stake = _ask(place, sure=False)
    if not sure and not click.confirm(discard_question(path, at_stake.unwritten), err=True):
        raise CachefsError("nothing was discarded")
    click.echo(discarded_line(path, _ask(place, sure=True).last))
    return 0


def _ask(place: Place, *, sure: bool) -> Answer:
    try:
        return ask(place.record, {"command": "discard", "path": place.path, "sure": sure})
    except control.ConnectionLost as error:
        raise CachefsError(f"{error}: see {place.record.log}") from None
