"""A progress bar on a terminal, of bytes; nothing elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from cachefs.units import format_size

Show = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def progress(label: str) -> Iterator[Show]:
    """A function that shows the "done_bytes" of "total_bytes" of a message."""
    if not sys.stderr.isatty():
        yield lambda message: None
        return
    done = 0
    with click.progressbar(length=1, label=label, file=sys.stderr, item_show_func=lambda text: text) as bar:

        def show(message: Mapping[str, Any]) -> None:
            nonlocal done
            if message.get("total_bytes"):
                bar.length = message["total_bytes"]
                bar.update(message["done_bytes"] - done, f"of {format_size(message['total_bytes'])}")
                done = message["done_bytes"]

        yield show
