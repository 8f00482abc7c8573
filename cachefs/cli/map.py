"""`cachefs map`: the picture of the cache as a PNG file."""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

import click

from cachefs import control
from cachefs.cli.paths import the_mount
from cachefs.entries import printable
from cachefs.errors import CachefsError


@click.command("map")
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@click.option("--png", "target", metavar="FILE", required=True, help="Where to write it; an existing file is replaced.")
def command(mountpoint: str | None, target: str) -> int:
    """Draw what is in the cache: each file a strip, each page or group of pages a cell, coloured by state and age.

    It is the picture of the page that is served beside /metrics (cachefs status tells its address).
    """
    from cachefs.page.png import File, draw  # Pillow takes a while to load

    record = the_mount(mountpoint)
    facts: Mapping[str, Any] = {}
    files: list[File] = []
    for message in control.request(record.socket, {"command": "picture"}):
        facts = facts or dict(message.get("facts") or {})  # type: ignore[call-overload]
        files += [File(*strip) for strip in json.loads(str(message.get("strips", "[]")))]
    image = draw(facts, files)
    unfinished = f"{target}.new-{os.getpid()}"
    try:
        image.save(unfinished, "PNG")
        os.replace(unfinished, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise CachefsError(f"can't write {printable(target)}: {error.strerror or error}") from None
    return 0
