"""`cachefs set`: change settings of a live mount."""

from collections.abc import Iterator, Mapping
from typing import Any

import click

from cachefs import control
from cachefs.cli.paths import the_mount
from cachefs.errors import UsageError
from cachefs.units import format_size


@click.command("set")
@click.argument("words", metavar="[MOUNTPOINT] NAME=VALUE...", nargs=-1, required=True)
def command(words: tuple[str, ...]) -> int:
    """Change cache-size, policy or pin-limit of a live mount, as in: cachefs set cache-size=2G policy=sieve.

    MOUNTPOINT may be left out where only one is mounted. With the cache's size, the limits of unwritten data and of pins
    change in proportion. A smaller cache may have to wait for writeback.
    """
    mountpoint = None if "=" in words[0] and "/" not in words[0].partition("=")[0] else words[0]
    settings: dict[str, str] = {}
    for word in words if mountpoint is None else words[1:]:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} is not NAME=VALUE: write it like cache-size=2G")
        settings[name.replace("-", "_")] = value
    if not settings:
        raise UsageError("nothing to set: write it like cache-size=2G")
    answers: Iterator[Mapping[str, Any]] = control.request(
        the_mount(mountpoint).socket, {"command": "set", "settings": settings}, None
    )
    *_, last = answers
    cache, limit = format_size(last["cache_size_bytes"]), format_size(last["pin_limit_bytes"])
    click.echo(f"cache-size {cache}, policy {last['policy']}, pin-limit {limit}")
    return 0
