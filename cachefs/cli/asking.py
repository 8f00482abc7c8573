"""A command to a daemon that may take long: progress on a terminal, and the list that the answer brings."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from cachefs import control
from cachefs.cli.format import progress_line
from cachefs.entries import merged
from cachefs.state import DaemonRecord
from cachefs.units import parse_duration

timeout_option = click.option(
    "--timeout", type=click.UNPROCESSED, metavar="TIME", help="Wait at most so long; the work goes on.",
    callback=lambda _context, _option, text: None if text is None else parse_duration(text),
)  # fmt: skip


@dataclass
class Answer:
    """What a daemon said: its last message, and the entries of all that came before, merged."""

    last: Mapping[str, Any] = field(default_factory=dict)
    unwritten: list[dict[str, Any]] = field(default_factory=list)


class OutOfTime(Exception):
    """The time that the user gave is over; `last` is the newest word of the daemon."""

    def __init__(self, last: Mapping[str, Any]) -> None:
        self.last = last


def ask(record: DaemonRecord, message: Mapping[str, object], timeout: float | None = None) -> Answer:
    """Sends the command and shows progress until all is answered; OutOfTime after `timeout` seconds, CachefsError for trouble."""
    last: Mapping[str, Any] = {}
    entries: list[Mapping[str, Any]] = []
    with _progress() as show:
        try:
            for last in control.request(record.socket, message, None, timeout):
                show(last)
                unwritten = last.get("unwritten")
                entries += unwritten if isinstance(unwritten, list) else []
        except control.NoAnswer:
            raise OutOfTime(last) from None
    return Answer(last, merged(entries))


class _Progress:
    """One line on a terminal that is written over and over; nothing elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = False

    def __call__(self, message: Mapping[str, object]) -> None:
        if self._terminal and "dirty_bytes" in message:
            self._shown = True
            click.echo(f"\r\x1b[K{progress_line(message)}", err=True, nl=False)

    def clear(self) -> None:
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)


@contextlib.contextmanager
def _progress() -> Iterator[_Progress]:
    progress = _Progress()
    try:
        yield progress
    finally:
        progress.clear()
