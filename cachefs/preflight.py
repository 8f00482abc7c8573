"""Checks before mounting: a mount that could not work here and now is refused in one line that says what to do."""

import contextlib
import os
import select
import shutil
import signal
import stat

from cachefs import mountinfo
from cachefs.config import Config
from cachefs.errors import CachefsError, UsageError
from cachefs.units import format_duration, parse_duration

TIMEOUT_SECONDS, SHORTEST_SECONDS = 30.0, 1.0  # for SOURCE to answer at all
FUSE_DEVICE = "/dev/fuse"
FUSE_CONF = "/etc/fuse.conf"
AUTOMOUNT = "autofs"  # what waits there to be mounted over


def check_paths(config: Config) -> None:
    """Raises CachefsError if this can't be mounted here and now."""
    check_source(config)
    check_fuse(config)
    check_mountpoint(config)


def check_answers(source: str, timeout: str | None) -> None:
    """Refuses a SOURCE that hangs, before anything else looks at it: a process of its own looks, and may hang with it."""
    seconds = TIMEOUT_SECONDS
    with contextlib.suppress(UsageError):  # who reads the options will say so
        seconds = max(SHORTEST_SECONDS, parse_duration(timeout or ""))
    child = os.fork()
    if child == 0:
        os.closerange(0, 256)  # it may hang for ever, and nobody is to wait for what it inherited (a pipe of ours) until then
        with contextlib.suppress(OSError):
            os.statvfs(source)  # stat() may be answered from what the kernel keeps, and what comes next would hang
        os._exit(0)
    process, ended = os.pidfd_open(child), select.poll()
    try:
        ended.register(process, select.POLLIN)
        if not ended.poll(seconds * 1000):
            os.kill(child, signal.SIGKILL)
            raise CachefsError(f"SOURCE {source} has not answered for {format_duration(seconds)}: try when it does")
        os.waitpid(child, 0)
    finally:
        os.close(process)


def check_source(config: Config) -> None:
    """Refuses a SOURCE that can't be read, or that overlaps with MOUNTPOINT."""
    _check_source(config.source)
    _check_distinct(config.source, config.mountpoint)


def _check_source(source: str) -> None:
    try:
        mode = os.stat(source).st_mode
    except FileNotFoundError:
        raise CachefsError(f"SOURCE {source} does not exist: create the directory or check the name") from None
    except OSError as error:
        raise CachefsError(f"SOURCE {source} can't be reached: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise CachefsError(f"SOURCE {source} is not a directory: give the directory that holds the files")
    if not os.access(source, os.R_OK | os.X_OK):
        raise CachefsError(f"SOURCE {source} is not readable: its owner must allow reading and searching (chmod u+rx)")


def _check_distinct(source: str, mountpoint: str) -> None:
    if source == mountpoint:
        raise CachefsError(f"SOURCE and MOUNTPOINT are both {source}: give another, empty directory as MOUNTPOINT")
    common = os.path.commonpath((source, mountpoint))
    if common == source:
        raise CachefsError(f"MOUNTPOINT {mountpoint} is inside SOURCE {source}: choose a directory outside it")
    if common == mountpoint:
        raise CachefsError(f"SOURCE {source} is inside MOUNTPOINT {mountpoint}, which would hide it: choose another")


def check_mountpoint(config: Config) -> None:
    """Refuses a MOUNTPOINT that can't be mounted on; lets go first of what a killed cachefs left there."""
    mountpoint = config.mountpoint
    mountinfo.release_if_dead(mountpoint)
    if mountinfo.is_cachefs(mountpoint):
        raise CachefsError(f"MOUNTPOINT {mountpoint} is already a cachefs: first run cachefs umount {mountpoint}")
    _check_not_mounted(mountpoint)
    try:
        mode = os.stat(mountpoint).st_mode
    except FileNotFoundError:
        raise CachefsError(f"MOUNTPOINT {mountpoint} does not exist: create it first (mkdir -p {mountpoint})") from None
    except OSError as error:
        raise CachefsError(f"MOUNTPOINT {mountpoint} can't be reached: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise CachefsError(f"MOUNTPOINT {mountpoint} is not a directory: give an empty directory")
    if os.geteuid() != 0 and not os.access(mountpoint, os.W_OK):  # fusermount3 asks this of users
        raise CachefsError(f"MOUNTPOINT {mountpoint} is not writable for you: choose a directory of your own")


def _check_not_mounted(mountpoint: str) -> None:
    mount = mountinfo.top_mount(mountpoint)
    if mount is not None and mount.fstype != AUTOMOUNT:
        what = f"MOUNTPOINT {mountpoint} has a {mount.fstype} mounted on it"
        raise CachefsError(f"{what}: choose another directory, or first run umount {mountpoint}")


def check_fuse(config: Config) -> None:
    """Refuses where the kernel, the container or missing rights allow no FUSE mount."""
    if not os.path.exists(FUSE_DEVICE):
        raise CachefsError(f"there is no {FUSE_DEVICE}: modprobe fuse, or run a container with --device {FUSE_DEVICE}")
    _check_device_opens()
    if os.geteuid() != 0:
        _check_unprivileged(config)


def _check_device_opens() -> None:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:  # fusermount3 opens it with the rights of its user
        how = f"chmod a+rw {FUSE_DEVICE} as root, or allow it to the container"
        raise CachefsError(f"{FUSE_DEVICE} may not be opened: {how}") from None
    except OSError as error:
        how = "modprobe fuse, or run a container with --device /dev/fuse --cap-add SYS_ADMIN"
        raise CachefsError(f"{FUSE_DEVICE} can't be opened ({error.strerror}): {how}") from None


def _check_unprivileged(config: Config) -> None:
    if shutil.which("fusermount3") is None:
        raise CachefsError("there is no fusermount3: install the package fuse3 (apt install fuse3), or mount as root")
    if config.allow_other and not _conf_allows_other():
        raise CachefsError(f"--allow-other needs the line user_allow_other in {FUSE_CONF}: add it, or drop the option")


def _conf_allows_other() -> bool:
    try:
        with open(FUSE_CONF, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False
