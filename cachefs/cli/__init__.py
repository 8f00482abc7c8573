"""The command `cachefs`: one module a command; each parses, calls and prints, and computes nothing."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from cachefs import __version__
from cachefs.cli import discard, drop, ls, map, mount, pin, settings, stat, status, sync, top, umount, warm
from cachefs.errors import CachefsError

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cachefs", message="%(prog)s %(version)s")
def commands() -> None:
    """A file system in front of a slow directory, through a page cache of its own.

    cachefs mount SOURCE MOUNTPOINT puts it there, cachefs status shows what it does, cachefs umount MOUNTPOINT writes
    everything out and takes it away.
    """


for _command in (
    mount.command, umount.command, sync.command, status.command, discard.command, ls.command, stat.command, warm.command,
    pin.command, pin.unpin_command, drop.command, settings.command, top.command, map.command,
):  # fmt: skip
    commands.add_command(_command)


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # file names are bytes
    sys.exit(run(commands, sys.argv[1:]))


def run(command: click.Command, arguments: Sequence[str]) -> int:
    """Runs a command and turns every way it may end into an exit status and at most one line."""
    try:
        result = command.main(args=list(arguments), prog_name="cachefs", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _complain(error.format_message().rstrip(".") + where, 2)
    except click.ClickException as error:
        return _complain(error.format_message(), error.exit_code)
    except CachefsError as error:
        return _complain(str(error), error.exit_status)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _leave_stdout()
        return 1
    except Exception as error:
        if os.environ.get("CACHEFS_DEBUG"):
            traceback.print_exc()
        return _complain(f"internal error: {error!r}: please report it (CACHEFS_DEBUG=1 shows more)", 1)


def _complain(message: str, exit_status: int) -> int:
    """Prints the one line of an error; what would break the line is shown as an escape."""
    line = "".join(character if character.isprintable() else _escape(character) for character in message)
    with contextlib.suppress(OSError):
        print(f"cachefs: {line}", file=sys.stderr)
    return exit_status


def _escape(character: str) -> str:
    is_raw_byte = "\udc80" <= character <= "\udcff"
    return character if is_raw_byte else repr(character)[1:-1]


def _leave_stdout() -> None:
    """Points stdout elsewhere, so that the interpreter's last flush does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
