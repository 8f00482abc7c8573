"""`cachefs umount` and `cachefs sync`: let the daemon write out, show what is left, list what could not be written."""

import contextlib
import math
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping

import click

from cachefs import control, mountinfo
from cachefs.cli.format import progress_line, unwritten_line
from cachefs.errors import CachefsError
from cachefs.state import STOPPING, DaemonRecord, find_daemon, is_held
from cachefs.units import parse_duration

_POLL_SECONDS = 0.2  # how often to look whether the daemon has given up its state; its end is noticed at once
_END_SECONDS = 5.0  # for a daemon that has done so to end

_timeout = click.option(
    "--timeout", type=click.UNPROCESSED, metavar="TIME", help="Wait at most so long; the work goes on.",
    callback=lambda _context, _option, text: None if text is None else parse_duration(text),
)  # fmt: skip


@click.command("umount")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@_timeout
def command(mountpoint: str, timeout: float | None) -> int:
    """Write everything out and unmount; returns when the daemon is gone.

    Exit status 1 if something could not be written: each such piece is listed.
    """
    if find_daemon(mountpoint) is None and mountinfo.release_if_dead(os.path.realpath(mountpoint)):
        click.echo(f"cachefs: {mountpoint} had no daemon any more: unmounted", err=True)
        return 0
    record = _daemon_at(mountpoint)
    deadline = None if timeout is None else time.monotonic() + timeout
    with _process(record.pid) as process:
        status = _ask(record, "umount", timeout)
        _wait_until_gone(record, process, deadline)
    return status


@click.command("sync")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@_timeout
def sync_command(mountpoint: str, timeout: float | None) -> int:
    """Write everything out and make it durable; the mount stays.

    Exit status 1 if something could not be written: each such piece is listed.
    """
    return _ask(_daemon_at(mountpoint), "sync", timeout)


def _daemon_at(mountpoint: str) -> DaemonRecord:
    record = find_daemon(mountpoint)
    if record is not None and record.mountpoint == os.path.realpath(mountpoint):
        return record
    if record is not None:
        raise CachefsError(f"{mountpoint} is the SOURCE of a mount: give its MOUNTPOINT {record.mountpoint}")
    if mountinfo.is_cachefs(os.path.realpath(mountpoint)):
        raise CachefsError(f"{mountpoint} belongs to another user or runtime directory: use umount {mountpoint}")
    raise CachefsError(f"{mountpoint} is not a cachefs mountpoint: cachefs status lists them")


def _ask(record: DaemonRecord, name: str, timeout: float | None) -> int:
    """Sends the command, shows progress, and lists what could not be written; the exit status."""
    last: Mapping[str, object] = {}
    with _progress() as show:
        try:
            for last in control.request(record.socket, {"command": name}, None, timeout):
                show(last)
        except control.ConnectionLost as error:
            if record.phase == STOPPING:  # it ended by itself, between our look at it and the request
                return 0
            raise CachefsError(f"{error}: see {record.log}") from None
        except control.NoAnswer:
            left = progress_line(last)
            raise CachefsError(f"not done after {timeout:g} seconds ({left}): it goes on in the background") from None
    unwritten = last.get("unwritten")
    lines = [unwritten_line(piece) for piece in unwritten] if isinstance(unwritten, list) else []
    for line in lines:
        click.echo(f"cachefs: not written: {line}", err=True)
    return 1 if lines else 0


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


@contextlib.contextmanager
def _process(pid: int) -> Iterator[int | None]:
    """A descriptor that means this very process, even when its number is given to another; None if it is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_until_gone(record: DaemonRecord, process: int | None, deadline: float | None) -> None:
    if process is None:
        return
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    given_up_at = math.inf  # when the daemon was seen to hold its state no more: it is done, but a thread of it may hang
    while not waiting.poll(_POLL_SECONDS * 1000):
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise CachefsError(f"the daemon {record.pid} has not ended yet: see {record.log}")
        given_up_at = min(given_up_at, math.inf if is_held(record.state_dir) else now)
        if now - given_up_at >= _END_SECONDS:
            click.echo(f"cachefs: process {record.pid} hangs in a call to SOURCE, and ends when that returns", err=True)
            return
