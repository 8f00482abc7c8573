"""`cachefs top`: one mount as it works, a frame a second; keys sort, pin and drop."""

import io
import json
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import click

from cachefs import control
from cachefs.cli.listing import below, named
from cachefs.cli.paths import the_mount
from cachefs.entries import printable
from cachefs.errors import CachefsError, UsageError
from cachefs.state import DaemonRecord
from cachefs.units import format_size, parse_duration

PATIENCE_SECONDS = 5.0
ONCE_WIDTH, ONCE_HEIGHT = 80, 24
SHORTEST_INTERVAL_SECONDS = 0.2


@click.command("top")
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@click.option("--interval", default="1s", metavar="TIME", show_default=True, help="From one frame to the next.")
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option("--json", "as_json", is_flag=True, help="Print what a frame shows as a JSON object, and end.")
def command(mountpoint: str | None, interval: str, once: bool, as_json: bool) -> int:
    """Watch a mount: hit rate, hottest files, programs, unwritten data, readahead and evictions.

    Keys: s sorts by another figure, the arrows select a file, p pins and u unpins it, d drops it from the cache, q ends.
    Exit status 1 if the daemon goes away.
    """
    seconds = max(SHORTEST_INTERVAL_SECONDS, parse_duration(interval))
    if not (once or as_json or (sys.stdin.isatty() and sys.stdout.isatty())):
        raise UsageError("cachefs top is for a terminal: --once prints one frame, --json its figures")
    record = the_mount(mountpoint)
    if as_json:
        click.echo(json.dumps(_as_json(record, _news(record)), indent=2))
    elif once:
        _print_once(_news(record))
    else:
        _watch(record, seconds)
    return 0


def _news(record: DaemonRecord) -> Mapping[str, Any]:
    """What the daemon says now; CachefsError if it says nothing."""
    try:
        *_, last = control.request(record.socket, {"command": "top"}, total_seconds=PATIENCE_SECONDS)
    except control.NoAnswer:
        raise
    except CachefsError as error:
        raise type(error)(f"{record.mountpoint}: {error}") from None
    return last


def _as_json(record: DaemonRecord, news: Mapping[str, Any]) -> dict[str, Any]:
    files = [
        {**named("" if path is None else below(record.mountpoint, path)), **figures}
        for path, figures in ((file.pop("path"), file) for file in map(dict, news["files"]))
    ]
    samples = [dict(zip(news["fields"], sample, strict=True)) for sample in news["samples"]]
    return {"statistics": news["statistics"], "samples": samples, "files": files}


def _print_once(news: Mapping[str, Any]) -> None:
    from rich.console import Console

    from cachefs.cli.topview import View, frame

    console = Console(width=None if sys.stdout.isatty() else ONCE_WIDTH, highlight=False)
    console.print(frame(news, View(), console.width, ONCE_HEIGHT, _bars()))


def _bars() -> str:
    """What sparks are drawn with; whatever else the terminal cannot show becomes a question mark."""
    from cachefs.cli.topview import BARS, PLAIN_BARS

    if sys.stdout.encoding.lower().startswith("utf"):
        return BARS
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return PLAIN_BARS


def _watch(record: DaemonRecord, interval_seconds: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from cachefs.cli.keys import keys
    from cachefs.cli.topview import View, frame

    view, console, bars = View(), Console(highlight=False), _bars()
    news = _news(record)

    def draw() -> None:
        live.update(frame(news, view, console.width, console.height, bars), refresh=True)

    with keys() as typed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            draw()
            due = time.monotonic() + interval_seconds
            while (left_seconds := due - time.monotonic()) > 0:
                key = typed.next(left_seconds)
                if key in ("q", ""):
                    return
                if key is not None:
                    _press(key, view, record, news)
                    draw()
            try:
                news = _news(record)
            except control.NoAnswer as error:
                view.message = str(error)


def _press(key: str, view: Any, record: DaemonRecord, news: Mapping[str, Any]) -> None:
    """What a key does; what takes longer goes on in a thread, and leaves its message."""
    files = view.files(news)
    view.message = ""
    if key == "s":
        view.next_order()
    elif key in ("up", "k", "down", "j"):
        view.move(-1 if key in ("up", "k") else 1, files)
    elif key in _ACTIONS and files:
        path = files[view.selected(files)]["path"]
        view.message = f"{_ACTIONS[key]} {printable(path)} ..."
        threading.Thread(target=_act, args=(_ACTIONS[key], path, view, record), daemon=True).start()


_ACTIONS = {"p": "pin", "u": "unpin", "d": "drop"}


def _act(action: str, path: str, view: Any, record: DaemonRecord) -> None:
    try:
        *_, last = control.request(record.socket, {"command": action, "paths": [path]}, None)
        view.message = _outcome(action, path, last)
    except CachefsError as error:
        view.message = f"{action} {printable(path)}: {error}"


def _outcome(action: str, path: str, last: Mapping[str, Any]) -> str:
    name = printable(path)
    if action == "drop":
        stayed = ", ".join(f"{format_size(nbytes)} {reason}" for reason, nbytes in sorted(last["stayed"].items()))
        return f"dropped {format_size(last['dropped_bytes'])} of {name}" + (f"; stayed: {stayed}" if stayed else "")
    if action == "unpin":
        return f"unpinned {name}"
    problems = [str(pin["state"]) for pin in last.get("pins", ()) if pin["state"]]
    return f"{name}: {problems[0]}" if problems else f"pinned {name}"
