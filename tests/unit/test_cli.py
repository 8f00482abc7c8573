"""The command line: what it refuses, what it prints, and daemons in fore- and background (of a made-up mount)."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from cachefs import __version__, state
from cachefs.cli import commands, format, helper, run
from cachefs.cli.mountoptions import parse_mount_options
from cachefs.errors import UsageError
from cachefs.statistics import (
    BackingStatistics,
    CacheStatistics,
    Conflict,
    ConflictStatistics,
    DistanceSnapshot,
    FileSystemStatistics,
    Histogram,
    JournalStatistics,
    Statistics,
    UseStatistics,
    WritebackStatistics,
)

FAKE = str(Path(__file__).with_name("fake_cachefs.py"))
ROOT = str(Path(__file__).parents[2])
Cachefs = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of this test's own for daemons, sources and mountpoints."""
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    for name in ("source", "mountpoint"):
        (tmp_path / name).mkdir()


def fake(tmp_path: Path, behaviour: str, *arguments: str) -> list[str]:
    places = [str(tmp_path / word) if word in ("source", "mountpoint") else word for word in arguments]
    state_dir = ["--state-dir", str(tmp_path / "state")] if "mount" in arguments else []
    return [sys.executable, FAKE, behaviour, *places, *state_dir]


@pytest.fixture
def cachefs(tmp_path: Path) -> Iterator[Cachefs]:
    """Runs the command around a made-up mount; daemons left at the end are ended."""

    def call(behaviour: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = fake(tmp_path, behaviour, *arguments)
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    yield call
    for record in state.daemons():
        os.kill(record.pid, signal.SIGKILL)


def log_of(tmp_path: Path) -> str:
    (log,) = (tmp_path / "state").glob("*/cachefs.log")
    return log.read_text()


# --- what is refused, in one line


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["mount"], 2, "cachefs: Missing argument 'SOURCE'"),
        (["mount", "--cahe-size", "1G", "s", "m"], 2, "cachefs: No such option '?--cahe-size'?.* '?--cache-size"),
        (["moumt"], 2, "cachefs: No such command 'moumt'"),
        (["mount", "s", "m", "--cache-size", "12X"], 2, "cachefs: --cache-size '12X' is not a size"),
        (["mount", "s", "m", "-o", "cache_siz=1G"], 2, "cachefs: no such mount option: cache_siz; did you mean cache_"),
        (["mount", "s", "m", "-o", "remount"], 2, "cachefs: -o remount is for mount"),
        (["mount", "/nonexistent", "m"], 1, "cachefs: SOURCE /nonexistent does not exist"),
        (["mount", "/nonexistent\n\udcff", "m"], 1, r"cachefs: SOURCE /nonexistent\\n"),
        (["mount", "/", "/mnt"], 1, "cachefs: MOUNTPOINT /mnt is inside SOURCE /"),
        (["umount", "/"], 1, "cachefs: / is not a cachefs mountpoint"),
        (["umount", "/", "--timeout", "5x"], 2, "cachefs: '5x' is not a time"),
        (["sync", "/"], 1, "cachefs: / is not on a cachefs mount"),
        (["discard", "/", "--yes"], 1, "cachefs: / is not on a cachefs mount"),
        (["status", "--dirty", "/"], 1, "cachefs: / is not on a cachefs mount"),
        (["status", "/"], 1, "cachefs: / is not a cachefs mountpoint"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_an_exit_status(
    arguments: list[str], status: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(commands, arguments) == status
    output, errors = capfd.readouterr()
    assert re.match(line, errors)
    assert errors.count("\n") == 1
    assert output == ""


def test_an_unforeseen_failure_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(path: str) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr("cachefs.cli.status.find_daemon", fail)
    assert run(commands, ["status", "/"]) == 1
    assert capsys.readouterr().err.startswith("cachefs: internal error: ZeroDivisionError('bug')")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(commands, ["--version"]) == 0
    assert capsys.readouterr().out == f"cachefs {__version__}\n"
    assert run(commands, ["mount", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--cache-size SIZE" in text
    assert "--fault-plan" not in text
    assert run(commands, []) == 2


def test_status_without_daemons(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(commands, ["status"]) == 0
    assert capsys.readouterr().out == "no cachefs is mounted\n"
    assert run(commands, ["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run(commands, ["status", "/", "--json"]) == 1
    assert "not a cachefs mountpoint" in json.loads(capsys.readouterr().out)["error"]


# --- daemons


def test_mount_status_sync_umount_in_the_background(cachefs: Cachefs, tmp_path: Path) -> None:
    mounted = cachefs("serve", "mount", "source", "mountpoint")
    assert (mounted.returncode, mounted.stdout, mounted.stderr) == (0, "", "")
    (status,) = json.loads(cachefs("serve", "status", "--json").stdout)
    assert status["phase"] == "serving"
    assert status["statistics"] == {"uptime_seconds": 1.5}
    assert os.path.exists(status["socket"])
    one = json.loads(cachefs("serve", "status", "mountpoint", "--json").stdout)
    assert one == status
    assert f"{tmp_path}/mountpoint <- {tmp_path}/source" in cachefs("serve", "status").stdout
    assert cachefs("serve", "sync", "mountpoint").returncode == 0
    umounted = cachefs("serve", "umount", "mountpoint", "--timeout", "30s")
    assert (umounted.returncode, umounted.stdout, umounted.stderr) == (0, "", "")
    assert not state.is_held(status["state_dir"])
    assert cachefs("serve", "status").stdout == "no cachefs is mounted\n"
    assert not os.path.exists(status["socket"])


def test_the_daemon_has_left_its_terminal(cachefs: Cachefs, tmp_path: Path) -> None:
    cachefs("serve", "mount", "source", "mountpoint")
    (record,) = state.daemons()
    descriptors = Path(f"/proc/{record.pid}/fd")
    assert os.readlink(descriptors / "0") == os.devnull
    assert os.readlink(descriptors / "1") == record.log == os.readlink(descriptors / "2")
    assert os.getsid(record.pid) == record.pid
    assert os.readlink(f"/proc/{record.pid}/cwd") == "/"
    log = log_of(tmp_path)
    assert "a library prints" in log
    assert re.search(r"WARNING py.warnings: .*a library warns", log)


def test_what_could_not_be_written_is_listed(cachefs: Cachefs) -> None:
    cachefs("unwritten", "mount", "source", "mountpoint")
    umounted = cachefs("unwritten", "umount", "mountpoint")
    assert umounted.returncode == 1
    first, last = umounted.stderr.splitlines()
    assert first == "cachefs: not written: a/b: bytes 4096 to 12288: No space left on device"
    assert last.startswith("cachefs: 8 KiB of one file could not be written and is lost: see ")


def test_an_error_before_the_mount_reaches_the_user(cachefs: Cachefs, tmp_path: Path) -> None:
    for _ in range(2):  # the first one has given the state up
        mounted = cachefs("refuse", "mount", "source", "mountpoint")
        assert mounted.returncode == 1
        assert mounted.stderr == "cachefs: --metrics 127.0.0.1:9477 is taken: give another port\n"
    assert cachefs("serve", "status").stdout == "no cachefs is mounted\n"


@pytest.mark.parametrize(("behaviour", "how"), [("crash", "ended with status 1"), ("die", "was killed by signal 9")])
def test_a_daemon_that_dies_without_a_word(cachefs: Cachefs, tmp_path: Path, behaviour: str, how: str) -> None:
    mounted = cachefs(behaviour, "mount", "source", "mountpoint")
    assert mounted.returncode == 1
    assert re.fullmatch(rf"cachefs: the daemon {how} before it was ready: see \S+/cachefs.log\n", mounted.stderr)
    assert ("ZeroDivisionError: bug" in log_of(tmp_path)) == (behaviour == "crash")


def test_a_log_that_can_t_be_written_is_one_line(cachefs: Cachefs, tmp_path: Path) -> None:
    assert cachefs("refuse", "mount", "source", "mountpoint").returncode == 1
    (log,) = (tmp_path / "state").glob("*/cachefs.log")
    log.unlink()
    log.mkdir()
    mounted = cachefs("serve", "mount", "source", "mountpoint")
    assert (mounted.returncode, mounted.stderr) == (1, f"cachefs: can't write the log {log}: Is a directory\n")


@pytest.mark.parametrize("behaviour", ["refuse", "crash"])
def test_errors_in_the_foreground(cachefs: Cachefs, behaviour: str) -> None:
    mounted = cachefs(behaviour, "mount", "source", "mountpoint", "--foreground")
    assert mounted.returncode == 1
    assert ("cachefs: --metrics" in mounted.stderr) == (behaviour == "refuse")
    assert ("CRITICAL" in mounted.stderr) == (behaviour == "crash")
    assert state.daemons() == []


def test_the_foreground_tells_systemd(cachefs: Cachefs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(30)
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        command = fake(tmp_path, "serve", "mount", "source", "mountpoint", "--foreground")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert systemd.recv(4096).startswith(b"READY=1\nSTATUS=serving ")
            assert cachefs("serve", "umount", "mountpoint").returncode == 0
            assert systemd.recv(4096).startswith(b"STOPPING=1")
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "a library warns" in errors


def test_a_killed_daemon_is_forgotten(cachefs: Cachefs) -> None:
    cachefs("serve", "mount", "source", "mountpoint")
    (record,) = state.daemons()
    process = os.pidfd_open(record.pid)
    os.kill(record.pid, signal.SIGKILL)
    wait([process], 30)
    os.close(process)
    assert cachefs("serve", "status").stdout == "no cachefs is mounted\n"
    assert cachefs("serve", "mount", "source", "mountpoint").returncode == 0


def test_a_daemon_that_does_not_answer_has_a_place_in_the_json(
    cachefs: Cachefs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cachefs("serve", "mount", "source", "mountpoint")
    (record,) = state.daemons()
    os.unlink(record.socket)
    assert run(commands, ["status", "--json"]) == 1
    (status,) = json.loads(capsys.readouterr().out)
    assert status["mountpoint"] == str(tmp_path / "mountpoint")
    assert "not running" in status["error"]


# --- -o and fstab


def test_mount_options_are_options_flags_and_words_for_others() -> None:
    options = parse_mount_options(["cache_size=64M,dirty-limit=8M,ro,nosuid,noatime", "_netdev,x-systemd.automount,defaults"])
    assert options.values == {"cache_size": "64M", "dirty_limit": "8M", "read_only": "yes"}
    assert options.flags == {"nosuid", "noatime"}
    assert not options.remount


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("nosuid,suid", {"suid"}), ("suid,nosuid", {"nosuid"}), ("user", {"nosuid", "nodev", "noexec"}),
        ("user,exec", {"nosuid", "nodev"}), ("noatime,relatime", {"relatime"}), ("noatime,atime", set()),
        ("owner,dev", {"nosuid", "dev"}), ("user=bob", {"nosuid", "nodev", "noexec"}),
    ],
)  # fmt: skip
def test_later_flags_win(words: str, flags: set[str]) -> None:
    assert parse_mount_options([words]).flags == flags


def test_other_forms_of_mount_options() -> None:
    assert parse_mount_options(["ro,rw"]).values == {"read_only": "no"}
    assert parse_mount_options(["fsname=a\\,b,subtype=cachefs"]).fsname == "a,b"
    assert parse_mount_options(["remount,ro"]).remount
    assert parse_mount_options(["allow_other,default_permissions"]).values == {"allow_other": "yes"}
    assert parse_mount_options(["nonsense"], sloppy=True).values == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("nosiud", "no such mount option: nosiud; did you mean nosuid"),
        ("cachesize=1G", "did you mean cache_size"),
        ("cache_size", "-o cache_size needs a value: cache_size=SIZE"),
        ("sync", "-o sync is not possible: cachefs holds writes back"),
    ],
)
def test_mount_options_that_are_refused(words: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        parse_mount_options([words])


def test_the_helper_mounts_as_mount_8_asks(cachefs: Cachefs, tmp_path: Path) -> None:
    words = f"rw,noatime,_netdev,cache_size=8M,fsname=data,state_dir={tmp_path}/state"
    source = f"cachefs#{tmp_path}/source"
    mounted = cachefs("serve", "helper", source, "mountpoint", "-n", "-v", "-o", words, "-t", "fuse.cachefs")
    assert (mounted.returncode, mounted.stderr) == (0, "")
    (record,) = state.daemons()
    assert record.source == str(tmp_path / "source")
    assert (record.config["cache_size_bytes"], record.config["fsname"]) == (8 << 20, "data")
    assert record.config["mount_flags"] == ["dev", "noatime", "suid"]
    shown = "user_id=0,group_id=0" + ",allow_other" * (os.geteuid() == 0)  # by the kernel
    for words, status in (
        ("remount,rw,noatime,cache_size=8M", 0), (f"remount,rw,noatime,{shown}", 0),
        ("remount,ro,noatime", 32), ("remount,noatime,nosuid", 32), ("remount", 32),
    ):  # fmt: skip
        assert cachefs("serve", "helper", source, "mountpoint", "-o", words).returncode == status
    refused = cachefs("serve", "helper", source, "mountpoint", "-o", "remount,ro,cache_size=9M,noatime")
    assert refused.stderr.startswith("cachefs: ro/rw, cache_size can't be changed while mounted: first run cachefs umount")


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["/source"], 1, "usage: mount.cachefs SOURCE MOUNTPOINT"),
        (["/source", "/m", "-z"], 1, "option -z not recognized"),
        (["/source", "/m", "-o", "nosiud"], 1, "did you mean nosuid"),
        (["/source", "/m", "-t", "ext4"], 1, "-t ext4 is not ours"),
        (["/nonexistent", "/m", "-o", "rw"], 32, "SOURCE /nonexistent does not exist"),
        (["/source", "/m", "-o", "remount,ro"], 32, "is not a live cachefs"),
        (["/nonexistent", "/m", "-f", "-s", "-o", "nonsense"], 0, ""),
    ],
)
def test_the_helper_s_exit_status_is_one_of_mount_8(
    arguments: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert helper.run_helper(arguments) == status
    assert line in capsys.readouterr().err


# --- text for people


def a_status() -> dict[str, object]:
    histogram = Histogram()
    histogram.observe(0.004)
    statistics = Statistics(
        mountpoint="/mnt", source="/srv", policy="s3fifo", kernel_cache="off", uptime_seconds=7500.0,
        cache=CacheStatistics(
            capacity_bytes=1 << 30, resident_bytes=1 << 29, clean_pages=100, dirty_pages=2, writeback_pages=0,
            filling_pages=0, pinned_pages=0, pin_limit_bytes=1 << 28, page_hits=999, page_misses=1,
            hit_bytes=999 * 4096, miss_bytes=4096, write_bytes=8192, reads_hit=9, reads_partial=1, reads_miss=0,
            evictions={"capacity": 5}, misses={"cold": 1, "capacity": 0}, refaults=0, readahead_used_pages=3,
            readahead_unused_pages=1, readahead_late_pages=0, refault_distances=DistanceSnapshot((0,) * 10, 0),
            programs={"tar": UseStatistics(999, 1, 999 * 4096, 4096, 8192), "other": UseStatistics(0, 0, 0, 0, 0)},
            users={"0": UseStatistics(999, 1, 999 * 4096, 4096, 8192)},
        ),
        writeback=WritebackStatistics(
            dirty_bytes=8192, dirty_limit_bytes=1 << 28, dirty_expire_seconds=5.0, oldest_dirty_seconds=1.5, written_bytes=4096,
            through_bytes=512,
            errors={"EIO": 2}, failing_files=1, retries=1, throttle_seconds=0.25,
        ),
        backing=BackingStatistics(
            durations={"read": histogram.snapshot()}, errors={}, read_bytes=1 << 20, latency_seconds=0.005,
            bandwidth_bytes_per_second=1e8, lost=1, silent_seconds=12.0, timeouts=3,
        ),
        journal=JournalStatistics(
            used_bytes=8192, size_bytes=1 << 30, entries=1, written_through=0, recovery_seconds=0.0, replayed_bytes=0,
            replayed_files=0, set_aside_files=0, lost_bytes=0,
        ),
        conflicts=ConflictStatistics(total=2, recent=(Conflict("d/a", "d/a.conflict-20261122-153000", "theirs", 0.0),)),
        filesystem=FileSystemStatistics(
            durations={}, saved_seconds=4000.0, ready_seconds=0.0, open_handles=1, known_inodes=2, open_descriptors=3
        ),
    )  # fmt: skip
    figures = json.loads(json.dumps(dataclasses.asdict(statistics)))
    return {
        "mountpoint": "/mnt",
        "source": "/srv",
        "pid": 7,
        "phase": "serving",
        "metrics": None,
        "statistics": figures,
    }


def test_status_for_people_shows_the_figures() -> None:
    text = format.status_text(a_status())
    for words in (
        "/mnt <- /srv  (serving, pid 7, up 2 h 5 m)", "512 MiB of 1 GiB in use (50.0 %), s3fifo, kernel cache off",
        "99.9 % of pages (999 hits, 1 misses)", "1 cold (pages)", "5 capacity (pages)",
        "3 pages used, 1 unused, 0 late",
        "8 KiB of at most 256 MiB, oldest 1.5 s", "writers slowed for 250 ms", "writeback 2 EIO (calls)",
        "tar: 99.9 % of pages hit, 3.9 MiB read, 8 KiB written", "time saved    1 h 6 m (hits x latency)",
        "2 files changed on both sides", "d/a, theirs kept as d/a.conflict-20261122-153000",
        "LOST, no answer for 12 s; latency 5.0 ms", "3 requests failed for want of an answer",
        "1 calls, 4.0 ms each on average", "metrics       off",
    ):  # fmt: skip
        assert words in text


def test_status_for_people_copes_with_another_version_s_figures() -> None:
    assert "hit rate" in format.status_text({"mountpoint": "/mnt", "statistics": {"cache": 3}})
    assert format.status_text({"mountpoint": "/mnt", "error": "no answer"}).endswith("no answer")


def test_progress_is_in_readable_sizes() -> None:
    assert format.progress_line({"dirty_bytes": 3 << 20}) == "3 MiB left to write"
