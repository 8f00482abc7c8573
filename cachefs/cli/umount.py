"""`cachefs umount`: lets the daemon write out, shows what is left, lists what could not be written, waits for its end."""

import contextlib
import math
import os
import select
import time
from collections.abc import Iterator
from typing import Any

import click

from cachefs import control, mountinfo
from cachefs.cli.asking import Answer, OutOfTime, ask, timeout_option
from cachefs.cli.format import fate_line, left_line, unwritten_line
from cachefs.cli.place import real_path
from cachefs.errors import CachefsError
from cachefs.state import DaemonRecord, find_daemon, how_it_ended, is_held

_LAST_SECONDS = 10.0  # for a process whose control socket is gone to be gone as well
_LIST_SECONDS = 10.0  # for the list of what is left, when the user's time is over
_POLL_SECONDS = 0.2  # how often to look whether the daemon has given up its state; its end is noticed at once
_END_SECONDS = 5.0  # for a daemon that has done so to end


@click.command("umount")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@timeout_option
def command(mountpoint: str, timeout: float | None) -> int:
    """Write everything out and unmount; returns when the daemon is gone.

    Exit status 0 when all is on SOURCE, else 1: what is not is listed, and where it is kept. With --timeout, it may also return
    while the daemon is still writing: what remains is listed, and the daemon goes on and unmounts when it is done.
    """
    if find_daemon(mountpoint) is None and mountinfo.release_if_dead(real_path(mountpoint)):
        click.echo(f"cachefs: {mountpoint} had no daemon any more: unmounted", err=True)
        return 0
    record = _daemon_at(mountpoint)
    deadline = None if timeout is None else time.monotonic() + timeout
    with _process(record.pid) as process:
        try:
            answer = _ask_to_end(record, process, timeout, deadline)
            if not _is_gone(record, process, deadline):
                raise OutOfTime(answer.last)
        except OutOfTime as late:
            return _list_what_is_left(record, timeout or 0.0, late)
    _list("not written", answer.unwritten)
    if answer.unwritten:
        click.echo(f"cachefs: {fate_line(answer.unwritten, answer.last)}: see {record.log}", err=True)
    return 1 if answer.unwritten else 0


def _daemon_at(mountpoint: str) -> DaemonRecord:
    record = find_daemon(mountpoint)
    if record is not None and record.mountpoint == real_path(mountpoint):
        return record
    if record is not None:
        raise CachefsError(f"{mountpoint} is the SOURCE of a mount: give its MOUNTPOINT {record.mountpoint}")
    if mountinfo.is_cachefs(real_path(mountpoint)):
        raise CachefsError(f"{mountpoint} belongs to another user or runtime directory: use umount {mountpoint}")
    raise CachefsError(f"{mountpoint} is not a cachefs mountpoint: cachefs status lists them")


def _ask_to_end(record: DaemonRecord, process: int | None, timeout: float | None, deadline: float | None) -> Answer:
    """The daemon's last words; those that it left in writing, if it was ending by itself and did not hear us."""
    try:
        return ask(record, {"command": "umount"}, timeout)
    except control.ConnectionLost as error:
        soon = time.monotonic() + _LAST_SECONDS
        _is_gone(record, process, soon if deadline is None else min(soon, deadline))
        note = how_it_ended(record)
        if note is None:
            raise CachefsError(f"{error}: see {record.log}") from None
        return Answer(note, list(note["unwritten"]))


def _list_what_is_left(record: DaemonRecord, timeout: float, late: OutOfTime) -> int:
    """The user's time is over: what is not on SOURCE yet, and where it is meanwhile."""
    last = late.last
    try:
        answer = ask(record, {"command": "dirty"}, _LIST_SECONDS)
        _list("not written yet", answer.unwritten)
        last = {**last, **answer.last}
    except (CachefsError, OutOfTime):
        pass  # it has just ended, or does not answer: the line below is all that is known
    raise CachefsError(f"{left_line(timeout, last)}: see {record.log}")


def _list(how: str, entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        click.echo(f"cachefs: {how}: {unwritten_line(entry)}", err=True)


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


def _is_gone(record: DaemonRecord, process: int | None, deadline: float | None) -> bool:
    """Waits for the daemon to end, until `deadline` (None = for ever); whether it did, but for threads that hang."""
    if process is None:
        return True
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    given_up_at = math.inf  # when the daemon was seen to hold its state no more: it is done, but a thread of it may hang
    while not waiting.poll(_POLL_SECONDS * 1000):
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return False
        given_up_at = min(given_up_at, math.inf if is_held(record.state_dir) else now)
        if now - given_up_at >= _END_SECONDS:
            click.echo(f"cachefs: process {record.pid} hangs in a call to SOURCE, and ends when that returns", err=True)
            break
    return True
