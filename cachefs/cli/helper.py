"""`mount.cachefs` and `mount.fuse.cachefs`: what mount(8) runs for fstab and for `mount -t`."""

import getopt
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from cachefs.cli import run
from cachefs.cli.mount import config_of, mount_now
from cachefs.cli.mountoptions import MountOptions, changes_on_remount, parse_mount_options
from cachefs.config import make_config
from cachefs.errors import CachefsError, UsageError
from cachefs.state import find_daemon

USAGE = "mount.cachefs SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS] [-t TYPE]"
TYPES = ("cachefs", "fuse.cachefs", "fuse")
# What mount(8) means without saying it: it passes on nosuid and nodev, but never suid and dev.
MOUNT_8_DEFAULTS = "suid,dev"
# mount(8) hands our exit status on, so it has to be one of its own.
WRONG_INVOCATION, MOUNT_FAILURE = 1, 32


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def _mount_helper(arguments: tuple[str, ...]) -> int:
    return _mount(arguments)


def main() -> None:
    """Entry point of both helpers."""
    sys.exit(run_helper(sys.argv[1:]))


def run_helper(arguments: Sequence[str]) -> int:
    """Does what mount(8) asks; its exit status."""
    exit_statuses = {0: 0, UsageError.exit_status: WRONG_INVOCATION}
    return exit_statuses.get(run(_mount_helper, ["--", *arguments]), MOUNT_FAILURE)


def _mount(arguments: Sequence[str]) -> int:
    try:
        switches, paths = getopt.gnu_getopt(list(arguments), "sfnvhwrN:o:t:")
    except getopt.GetoptError as error:
        raise UsageError(f"{error}: {USAGE}") from None
    given = {switch for switch, _ in switches}
    if len(paths) != 2 or "-h" in given:
        raise UsageError(f"usage: {USAGE}")
    if "-N" in given:
        raise UsageError("-N is not possible: run cachefs inside the namespace (nsenter)")
    _check_type([value for switch, value in switches if switch == "-t"])
    words = [MOUNT_8_DEFAULTS, *(value for switch, value in switches if switch == "-o")]
    words += [word for switch, word in (("-r", "ro"), ("-w", "rw")) if switch in given]
    mounting = parse_mount_options(words, sloppy="-s" in given)
    return _do(_source_of(paths[0]), paths[1], mounting, fake="-f" in given)


def _check_type(types: list[str]) -> None:
    for name in types:
        if name not in TYPES:
            raise UsageError(f"-t {name} is not ours: write cachefs or fuse.cachefs")


def _source_of(spec: str) -> str:
    """The directory in the first field of fstab, where FUSE's own form is `cachefs#/directory`."""
    return spec.removeprefix("cachefs#")


def _do(source: str, mountpoint: str, mounting: MountOptions, *, fake: bool) -> int:
    if mounting.remount:
        return _remount(mountpoint, mounting)
    config = config_of(source, mountpoint, mounting)
    return 0 if fake else mount_now(config, foreground=False)


def _remount(mountpoint: str, mounting: MountOptions) -> int:
    """Succeeds if the live mount is already what is asked for, as nothing of it can be changed while it lives."""
    record = find_daemon(mountpoint)
    if record is None or record.mountpoint != os.path.realpath(mountpoint):
        raise CachefsError(f"{mountpoint} is not a live cachefs: mount it without remount")
    flags = frozenset(mounting.flags)
    asked = asdict(make_config(record.source, mountpoint, mounting.values, mount_flags=flags))
    changed = changes_on_remount(record.config, asked, mounting)
    if changed:
        names = ", ".join({"read_only": "ro/rw"}.get(name, name) for name in changed)
        raise CachefsError(f"{names} can't be changed while mounted: first run cachefs umount {mountpoint}")
    return 0
