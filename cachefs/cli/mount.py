"""`cachefs mount`: checks, takes the state, starts the daemon and returns when the mountpoint answers."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from cachefs import daemon, preflight
from cachefs.cli.mountoptions import MountOptions, parse_mount_options
from cachefs.config import OPTIONS, Config, Option, make_config
from cachefs.errors import UsageError
from cachefs.state import State

Function = TypeVar("Function", bound=Callable[..., object])


def _config_options(function: Function) -> Function:
    """Gives a command every option of `cachefs.config.OPTIONS`, as text: `make_config` reads them all."""
    for option in reversed(OPTIONS):
        function = click.option(*_declaration(option), default=None, help=_help(option), **_kind(option))(function)
    return function


def _declaration(option: Option) -> tuple[str, ...]:
    if option.name == "allow_other":
        return (f"{option.dashed}/--no-allow-other", option.name)
    return (option.dashed, option.name)


def _help(option: Option) -> str:
    choices = f": {', '.join(option.choices)}" if option.choices else ""
    return f"{option.help[0].upper()}{option.help[1:]}{choices}. [{option.default}]"


def _kind(option: Option) -> dict[str, Any]:
    return {"metavar": option.metavar, "hidden": option.hidden} if option.metavar else {"is_flag": True}


@click.command("mount")
@click.argument("source", metavar="SOURCE")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@_config_options
@click.option("--foreground", "-f", is_flag=True, help="Stay, and log to stderr (for systemd).")
@click.option("-o", "words", multiple=True, metavar="A,B=C", help="The same options and mount(8)'s, as in fstab.")
def command(source: str, mountpoint: str, foreground: bool, words: tuple[str, ...], **options: str | bool | None) -> int:
    """Mount SOURCE, a directory, on MOUNTPOINT, an empty one.

    Sizes are written 512M, 2G, 10%, times 10ms, 30s, 5m. Returns when the mountpoint answers.
    """
    given = {name: _as_text(value) for name, value in options.items() if value is not None}
    mounting = parse_mount_options(words)
    if mounting.remount:
        raise UsageError("-o remount is for mount(8): mount -o remount MOUNTPOINT")
    mounting.values |= given
    return mount_now(config_of(source, mountpoint, mounting), foreground=foreground)


def _as_text(value: str | bool) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def config_of(source: str, mountpoint: str, mounting: MountOptions) -> Config:
    """The `Config` of a mount asked for with these words."""
    preflight.check_answers(source, mounting.values.get("backing_timeout"))
    return make_config(source, mountpoint, mounting.values, mount_flags=frozenset(mounting.flags), fsname=mounting.fsname)


class _Start:
    """Shows how the start gets on: a bar while a journal is replayed, on a terminal, and what the user has to know of it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, message: Mapping[str, Any]) -> None:
        if "progress" in message:
            done, total = message["progress"]
            if self._bar is None:
                hidden = not sys.stderr.isatty()
                self._bar = click.progressbar(length=total, label="replaying the journal", file=sys.stderr, hidden=hidden)
            self._bar.update(done - self._bar.pos)
        elif self._bar is not None:
            self._bar.render_finish()
        for note in message.get("notes", ()):
            click.echo(f"cachefs: {note}", err=True)


def mount_now(config: Config, *, foreground: bool) -> int:
    """Mounts, in this process or in one that goes on in the background; the exit status."""
    preflight.check_source(config)
    preflight.check_fuse(config)
    state = State.open(config, say=lambda line: click.echo(f"cachefs: {line}", err=True))
    try:
        preflight.check_mountpoint(config)
        from cachefs.mount import serve  # late: it brings FUSE, which no other command needs
    except BaseException:
        state.close()
        raise
    return daemon.run(config, state, serve, foreground=foreground, show=_Start())
