"""Bad input to the real command: one line that says what to do, exit status 2 or 1, at once, and nothing is changed."""

import os
import shlex
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from command import CACHEFS, CACHEFS_AS_NOBODY, NOBODY, Command, Done, ended, is_mounted, one_line

from cachefs import mountinfo

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]
PATIENCE_SECONDS = 20.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes users, namespaces or mounts of others")


def picture(base: Path) -> tuple[list[object], list[mountinfo.Mount]]:
    """What SOURCE and MOUNTPOINT hold, with mode and time of the last change, and what is mounted here."""
    paths = [path for name in ("source", "mnt") for path in (base / name, *sorted((base / name).rglob("*")))]
    found = [(path, path.lstat().st_mode, path.lstat().st_ctime_ns) for path in paths]
    return list(found), [mount for mount in mountinfo.mounts() if mount.mountpoint.startswith(str(base))]


def refused(cachefs: Command, status: int, *arguments: object) -> str:
    """The one line with which `cachefs mount` refuses; it leaves neither a change nor a daemon."""
    before = picture(cachefs.base)
    done = cachefs.run("mount", *arguments, *cachefs.options, timeout=PATIENCE_SECONDS)
    line = one_line(done, status)
    assert picture(cachefs.base) == before
    assert not list((cachefs.base / "run").glob("*"))
    return line


WORDS = [
    ("", "Missing argument 'SOURCE'"),
    ("source", "Missing argument 'MOUNTPOINT'"),
    ("source mnt other", "Got unexpected extra argument"),
    ("source mnt --cache-sise 1G", "--cache-size"),
    ("source mnt --polcy=lru", "--policy"),
    ("source mnt -o cache_sise=1G", "did you mean cache_size?"),
    ("source mnt -o noatim", "did you mean noatime?"),
    ("source mnt -o cache_size", "-o cache_size needs a value"),
    ("source mnt -o sync", "-o sync is not possible: cachefs holds writes back"),
    ("source mnt --cache-size", "requires an argument"),
]
VALUES = [
    ("--cache-size 12X", "--cache-size '12X' is not a size"),
    ("-o cache_size=12X", "--cache-size '12X' is not a size"),
    ("--cache-size -1M", "is not a size"),
    ("--cache-size ''", "is not a size"),
    ("--cache-size 60K", "--cache-size 60K is below 16 pages: give at least 64 KiB"),
    ("--cache-size 1P", "is more than the memory there is"),
    ("--cache-size 64M --dirty-limit 48M", "is above half the cache"),
    ("--dirty-expire 5x", "'5x' is not a time"),
    ("--simulate-bandwidth fast", "'fast' is not a bandwidth"),
    ("--kernel-cache kep", "is not one of off, open, keep; did you mean keep?"),
    ("--policy fifo", "is not one of lru, sieve, s3fifo"),
    ("--metrics here", "'here' is not ADDRESS:PORT"),
    ("--metrics 127.0.0.1:65536", "is not ADDRESS:PORT"),
]
PLACES = [
    ("missing mnt", "SOURCE {base}/missing does not exist"),
    ("file mnt", "SOURCE {base}/file is not a directory"),
    ("file/below mnt", "can't be reached: Not a directory"),
    ("loop mnt", "can't be reached: Too many levels of symbolic links"),
    ("x" * 300 + " mnt", "can't be reached: File name too long"),
    ("source missing", "MOUNTPOINT {base}/missing does not exist: create it first"),
    ("source file", "MOUNTPOINT {base}/file is not a directory"),
    ("source source", "SOURCE and MOUNTPOINT are both {base}/source"),
    ("source link-to-source", "SOURCE and MOUNTPOINT are both {base}/source"),
    ("source source/inside", "MOUNTPOINT {base}/source/inside is inside SOURCE {base}/source"),
    ("mnt/inside mnt", "SOURCE {base}/mnt/inside is inside MOUNTPOINT {base}/mnt"),
    ("source mnt --fault-plan missing", "cannot open the fault plan {base}/missing: No such file or directory"),
]


@pytest.mark.parametrize(("words", "says"), WORDS + [(f"source mnt {words}", says) for words, says in VALUES])
def test_a_command_line_that_makes_no_sense(cachefs: Command, words: str, says: str) -> None:
    # The options of a test's own mounts must not follow an option without its value.
    done = cachefs.run("mount", *shlex.split(words), timeout=PATIENCE_SECONDS)
    assert says in one_line(done, 2)
    assert not (cachefs.base / "run").exists()


@pytest.mark.parametrize(("words", "says"), PLACES)
def test_places_that_can_t_be_mounted(cachefs: Command, words: str, says: str) -> None:
    (cachefs.base / "file").write_text("text")
    (cachefs.base / "link-to-source").symlink_to("source")
    (cachefs.base / "loop").symlink_to("loop")
    (cachefs.source / "inside").mkdir()
    (cachefs.path / "inside").mkdir()
    assert says.format(base=cachefs.base) in refused(cachefs, 1, *shlex.split(words))


@pytest.mark.parametrize("words", ["umont x", "umount", "umount a b", "umount --timout 3s x", "status --jsn", "--no-such"])
def test_other_commands_that_make_no_sense(cachefs: Command, words: str) -> None:
    one_line(cachefs.run(*words.split(), timeout=PATIENCE_SECONDS), 2)


NO_MOUNTPOINT, NO_MOUNT = "is not a cachefs mountpoint", "is not on a cachefs mount"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("umount", NO_MOUNTPOINT), ("status", NO_MOUNTPOINT), ("sync", NO_MOUNT), ("status --dirty", NO_MOUNT),
        ("discard --yes", NO_MOUNT),
    ],
)  # fmt: skip
def test_a_path_that_is_no_mountpoint(cachefs: Command, name: str, says: str) -> None:
    for path in (cachefs.path, cachefs.base / "missing", cachefs.source / "below"):
        assert f"{path} {says}" in one_line(cachefs.run(*name.split(), path, timeout=PATIENCE_SECONDS), 1)


def test_a_mountpoint_that_is_a_cachefs_already(cachefs: Command) -> None:
    pid = cachefs.mount()
    other = cachefs.directory("other")
    done = cachefs.run("mount", other, cachefs.path, *cachefs.options, timeout=PATIENCE_SECONDS)
    line = one_line(done, 1)
    assert f"MOUNTPOINT {cachefs.path} is already a cachefs: first run cachefs umount {cachefs.path}" in line
    inside = cachefs.path / "inside"
    inside.mkdir()
    assert "is inside SOURCE" in one_line(cachefs.run("mount", cachefs.source, cachefs.source / "inside", *cachefs.options), 1)
    assert "SOURCE of a mount: give its MOUNTPOINT" in one_line(cachefs.run("umount", cachefs.source), 1)
    assert not ended(pid)
    cachefs.umount_well()


@needs_root
def test_a_mountpoint_that_has_something_else_mounted(cachefs: Command) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(cachefs.path)], check=True, timeout=60)
    try:
        assert f"MOUNTPOINT {cachefs.path} has a tmpfs mounted on it" in refused(cachefs, 1, cachefs.source, cachefs.path)
    finally:
        subprocess.run(["umount", str(cachefs.path)], check=True, timeout=60)


@pytest.mark.parametrize("foreground", [False, True])
def test_a_metrics_port_that_is_taken(cachefs: Command, foreground: bool) -> None:
    """Asked for by name, it is an error; the mount that was there already is taken away again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = ["--foreground", "--log-level", "error"] if foreground else []
        words += ["--state-dir", str(cachefs.base / "state"), "--metrics", address]
        line = one_line(cachefs.run("mount", cachefs.source, cachefs.path, *words, timeout=PATIENCE_SECONDS), 1)
    assert f"{address} is taken" in line
    cachefs.nothing_left()


def test_a_state_directory_that_can_t_be_used(cachefs: Command) -> None:
    (cachefs.base / "file").write_text("text")
    for directory, says in (
        (cachefs.base / "file", "Not a directory"),
        (cachefs.path / "state", "MOUNTPOINT would hide"),
    ):
        done = cachefs.run("mount", cachefs.source, cachefs.path, "--state-dir", directory, timeout=PATIENCE_SECONDS)
        line = one_line(done, 1)
        assert says in line
        assert "--state-dir" in line
    assert not is_mounted(cachefs.path)


# --- machines that can't


def in_a_namespace(cachefs: Command, *lines: str) -> Done:
    """Runs shell commands on a machine of their own mounts; nothing is left of them here."""
    script = "\n".join(("set -e", *lines))
    return cachefs.call("unshare", "--mount", "sh", "-c", script, timeout=PATIENCE_SECONDS)


def command_line(cachefs: Command, *arguments: object, program: str = CACHEFS) -> str:
    return shlex.join(cachefs.words(*arguments, program=program))


def mount_line(cachefs: Command, program: str = CACHEFS) -> str:
    return command_line(cachefs, "mount", cachefs.source, cachefs.path, *cachefs.options, program=program)


def device(cachefs: Command, mode: int) -> Path:
    """A /dev/fuse to bind over the machine's."""
    devices = cachefs.directory("devices")
    os.mknod(devices / "fuse", stat.S_IFCHR | 0o600, os.makedev(10, 229))
    (devices / "fuse").chmod(mode)
    return devices


@needs_root
def test_a_machine_without_dev_fuse(cachefs: Command) -> None:
    cachefs.directory("dev")
    done = in_a_namespace(cachefs, f"mount --bind {cachefs.base}/dev /dev", mount_line(cachefs))
    assert "there is no /dev/fuse: modprobe fuse" in one_line(done, 1)


@needs_root
def test_a_dev_fuse_that_may_not_be_opened(cachefs: Command) -> None:
    """As in a container that has the device's name but not the right to use it."""
    devices = device(cachefs, 0o666)
    no_devices = f"mount --bind {devices} {devices} && mount -o remount,bind,nodev {devices}"
    done = in_a_namespace(cachefs, no_devices, f"mount --bind {devices}/fuse /dev/fuse", mount_line(cachefs))
    assert "/dev/fuse may not be opened: chmod a+rw /dev/fuse as root, or allow it to the container" in one_line(done, 1)


@needs_root
def test_what_a_user_is_refused(cachefs: Command) -> None:
    """Without fusermount3, with a MOUNTPOINT that is not the user's, with a SOURCE that can't be read."""
    cachefs.give_to_nobody()
    bind = f"mount --bind {device(cachefs, 0o666)}/fuse /dev/fuse"
    mount = mount_line(cachefs, CACHEFS_AS_NOBODY)

    def line(*preparation: str) -> str:
        before = picture(cachefs.base)
        done = in_a_namespace(cachefs, bind, *preparation, mount)
        assert picture(cachefs.base) == before
        return one_line(done, 1)

    assert "there is no fusermount3: install the package fuse3" in line("PATH=/nonexistent")
    (cachefs.base / "devices" / "fuse").chmod(0o600)
    assert "/dev/fuse may not be opened: chmod a+rw /dev/fuse as root" in line()
    (cachefs.base / "devices" / "fuse").chmod(0o666)
    os.chown(cachefs.path, 0, 0)
    assert f"MOUNTPOINT {cachefs.path} is not writable for you" in line()
    cachefs.source.chmod(0)
    assert f"SOURCE {cachefs.source} is not readable" in line()


@needs_root
def test_a_user_mounts_and_umounts(cachefs: Command) -> None:
    """Through fusermount3; while one of the user's programs has a file open, the mount stays."""
    cachefs.give_to_nobody()
    as_nobody = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups sh -c"
    umount = command_line(cachefs, "umount", cachefs.path, program=CACHEFS_AS_NOBODY)
    done = in_a_namespace(
        cachefs,
        f"mount --bind {device(cachefs, 0o666)}/fuse /dev/fuse",
        mount_line(cachefs, CACHEFS_AS_NOBODY),
        f"{as_nobody} 'echo text > mnt/file; exec 3< mnt/file; touch source/is-open; exec sleep 60' &",
        "until [ -e source/is-open ]; do sleep 0.01; done",
        f"! {umount}",
        "kill $!; wait $! 2>&- || :",
        umount,
    )
    assert f"{cachefs.path}: Device or resource busy; close what is open there" in one_line(done, 0)
    assert (cachefs.source / "file").read_text() == "text\n"
    assert (cachefs.source / "file").stat().st_uid == NOBODY
    cachefs.nothing_left()
