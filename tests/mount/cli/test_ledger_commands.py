"""What is not yet on SOURCE: seen with status --dirty, brought there by sync, given up by discard, named by umount."""

import json
import mmap
import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import CACHEFS_AS_NOBODY, Command, Done, ended, one_line, output_of_terminal, wait_until

from cachefs import state

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
LATER = ("--dirty-expire", "1h", "--write-through", "off")
FAILING = {"op": "pwritev", "errno": "EIO"}


def dirty(cachefs: Command, *path: object) -> list[dict[str, Any]]:
    done = cachefs.run("status", "--dirty", "--json", *path)
    assert (done.returncode, done.stderr) == (0, ""), done
    entries = json.loads(done.stdout)
    assert isinstance(entries, list)
    return entries


def where(entries: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(entry["path"], entry["offset"], entry["length"]) for entry in entries]


def write_failing(path: Path, data: bytes) -> None:
    """Writes a file that SOURCE does not take: close says so."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for start in range(0, len(data), 1 << 20):
        os.write(descriptor, data[start : start + (1 << 20)])
    with pytest.raises(OSError):
        os.close(descriptor)


@pytest.fixture
def failing(cachefs: Command) -> Iterator[Command]:
    """A mount with a file `d/bad` of 5000 bytes that SOURCE does not take."""
    with_failing_file(cachefs)
    yield cachefs


def with_failing_file(cachefs: Command, *options: object) -> None:
    (cachefs.source / "d").mkdir()
    cachefs.mount(*LATER, "--fault-plan", cachefs.plan(FAILING), *options)
    write_failing(cachefs.path / "d" / "bad", b"x" * 5000)


# --- status --dirty


def test_status_dirty_lists_what_is_not_in_source_the_oldest_first(cachefs: Command) -> None:
    cachefs.mount(*LATER)
    assert dirty(cachefs) == []
    assert "everything is on SOURCE" in cachefs.run("status", "--dirty").stdout
    (cachefs.path / "a").mkdir()
    descriptor = os.open(cachefs.path / "a" / "old", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"x" * 5000, 0)
    os.pwrite(descriptor, b"x" * 4096, 1 << 20)
    wait_until(lambda: dirty(cachefs)[0]["age_seconds"] > 0.2, "age")
    (cachefs.path / "young").write_bytes(b"y")
    entries = dirty(cachefs)
    assert where(entries) == [("a/old", 0, 8192), ("a/old", 1 << 20, 4096), ("young", 0, 1)]
    assert entries[1]["age_seconds"] >= entries[2]["age_seconds"] >= 0
    assert all(entry["mountpoint"] == str(cachefs.path) for entry in entries)
    assert all((entry["tries"], entry["error"]) == (0, None) for entry in entries)
    assert all(3000 < entry["next_try_seconds"] <= 3600 for entry in entries)
    for path, expected in ((cachefs.path / "a", 2), (cachefs.path / "a" / "old", 2), (cachefs.path / "y", 0), (cachefs.path, 3)):
        assert len(dirty(cachefs, path)) == expected
    os.rename(cachefs.path / "a", cachefs.path / "b")
    os.link(cachefs.path / "young", cachefs.path / "b" / "hard")
    os.unlink(cachefs.path / "young")
    assert where(dirty(cachefs)) == [("b/old", 0, 8192), ("b/old", 1 << 20, 4096), ("b/hard", 0, 1)]
    os.close(descriptor)
    os.unlink(cachefs.path / "b" / "old")
    assert where(dirty(cachefs)) == [("b/hard", 0, 1)]
    shown = cachefs.run("status", "--dirty", cachefs.path).stdout.splitlines()
    assert shown[0] == f"{cachefs.path} <- {cachefs.source}, 1 B of one file not on SOURCE"
    assert shown[1].split() == ["age", "offset", "length", "tries", "last", "error", "next", "try", "file"]
    assert shown[2].split()[-1] == "b/hard"
    cachefs.umount_well()


def test_status_dirty_tells_tries_and_errors(failing: Command) -> None:
    wait_until(lambda: dirty(failing)[0]["tries"] >= 1, "a try")
    (entry,) = dirty(failing)
    assert (entry["path"], entry["length"], entry["error"]) == ("d/bad", 5000, "EIO")
    assert 0 <= entry["next_try_seconds"] <= 30
    failing.plan({"op": "pwritev", "errno": "ENOSPC"})
    assert failing.run("sync").returncode == 1
    (entry,) = dirty(failing)
    assert entry["error"] == "ENOSPC" and entry["tries"] >= 2
    failing.plan()
    failing.umount_well()


def test_names_of_any_bytes_give_json_that_parses_and_one_line_each(cachefs: Command) -> None:
    cachefs.mount(*LATER)
    names = [b"new\nline", b"\xff\xfe", "\u00fcml\u00e4ut".encode(), b"back\\slash", b'quo"te', b"\x1b[2J"]
    for name in names:
        (cachefs.path / os.fsdecode(name)).write_bytes(b"x")
    done = cachefs.run("status", "--dirty", "--json")
    done.stdout.encode("ascii")
    entries = json.loads(done.stdout)
    shown = [b"new\nline", b"\\xff\\xfe", "\u00fcml\u00e4ut".encode(), b"back\\\\slash", b'quo"te', b"\x1b[2J"]
    assert sorted(entry["path"].encode("utf-8") for entry in entries) == sorted(shown)
    assert len(cachefs.run("status", "--dirty").stdout.splitlines()) == len(names) + 2
    for name in names:
        assert cachefs.run("sync", cachefs.path / os.fsdecode(name)).returncode == 0
    assert dirty(cachefs) == []
    cachefs.umount_well()


def test_a_list_of_100000_extents_holds_nobody_up(cachefs: Command) -> None:
    """Hits go on while it is sent; the bound is loose, for the machine may be busy."""
    extents = 100_000
    limit = ("--cache-size", "1G", "--dirty-limit", "512M", "--dirty-background", "512M")
    cachefs.mount(*LATER, *limit)
    descriptor = os.open(cachefs.path / "file", os.O_RDWR | os.O_CREAT)
    for number in range(extents):
        os.pwrite(descriptor, b"x", 2 * number * 4096)
    waits: list[float] = []
    stop = threading.Event()

    def read_again_and_again() -> None:
        while not stop.is_set():
            begin = time.monotonic()
            os.pread(descriptor, 1, 0)
            waits.append(time.monotonic() - begin)

    reader = threading.Thread(target=read_again_and_again)
    reader.start()
    try:
        done = cachefs.run("status", "--dirty", "--json")
    finally:
        stop.set()
        reader.join()
    entries = json.loads(done.stdout)
    assert len(entries) == extents and sum(entry["length"] for entry in entries) == (extents - 1) * 4096 + 1
    assert len(waits) > 100
    waits.sort()
    assert waits[len(waits) * 99 // 100] < 0.1, waits[-10:]
    os.close(descriptor)
    os.unlink(cachefs.path / "file")
    cachefs.umount_well()


# --- sync


def test_sync_of_a_file_a_directory_a_mount_and_all_mounts(cachefs: Command) -> None:
    cachefs.mount(*LATER)
    other_source, other = cachefs.directory("other-source"), cachefs.directory("other")
    words = ("mount", other_source, other, "--state-dir", cachefs.base / "state", "--metrics", "off", *LATER)
    assert cachefs.run(*words).returncode == 0
    for name in ("a", "b"):
        (cachefs.path / name).mkdir()
        (cachefs.path / name / "one").write_text("one")
        (cachefs.path / name / "two").write_text("two")
    (other / "file").write_text("text")

    def unwritten() -> list[str]:
        return sorted(entry["path"] for entry in dirty(cachefs))

    assert unwritten() == ["a/one", "a/two", "b/one", "b/two", "file"]
    for arguments, left in (
        ((cachefs.path / "a" / "one",), ["a/two", "b/one", "b/two", "file"]),
        ((cachefs.path / "a",), ["b/one", "b/two", "file"]),
        ((cachefs.path,), ["file"]),
        ((), []),
    ):
        done = cachefs.run("sync", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert unwritten() == left
    assert (cachefs.source / "b" / "two").read_text() == "two"
    assert (other_source / "file").read_text() == "text"
    (cachefs.base / "link").symlink_to(cachefs.path / "a")
    (cachefs.path / "a" / "one").write_text("again")
    assert cachefs.run("sync", "link/one", cwd=cachefs.base).returncode == 0
    assert (cachefs.source / "a" / "one").read_text() == "again"
    assert cachefs.run("umount", other).returncode == 0
    cachefs.umount_well()
    done = cachefs.run("sync")
    assert (done.returncode, done.stdout) == (0, "no cachefs is mounted\n")


def test_sync_lists_what_could_not_be_written_of_its_path_and_writes_the_rest(failing: Command) -> None:
    failing.plan({"op": "pwritev", "errno": "EIO", "count": 1})
    (failing.path / "d" / "good").touch()
    (failing.path / "other").touch()
    done = failing.run("sync", failing.path / "d")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "cachefs: not written: d/bad: bytes 0 to 5000: EIO\n"
    failing.plan({"op": "fsync", "errno": "EIO"})
    done = failing.run("sync", failing.path / "d" / "bad")
    assert (done.returncode, done.stderr) == (1, "cachefs: not durable: d/bad: EIO\n")
    failing.plan({"op": "syncfs", "errno": "EIO"})
    assert "can't be made durable: Input/output error" in one_line(failing.run("sync", failing.path / "d"), 1)
    failing.plan()
    assert failing.run("sync", failing.path / "d").returncode == 0
    assert (failing.source / "d" / "bad").read_bytes() == b"x" * 5000
    failing.umount_well()


def test_sync_returns_0_only_when_the_backing_has_synced(cachefs: Command) -> None:
    cachefs.mount(*LATER, "--fault-plan", cachefs.plan())
    (cachefs.path / "d").mkdir()
    (cachefs.path / "d" / "file").write_text("text")  # written at close, as SOURCE is far away
    for operation, path in (("fsync", cachefs.path / "d" / "file"), ("syncfs", cachefs.path / "d"), ("syncfs", cachefs.path)):
        cachefs.plan({"op": operation, "hang": True})
        process = cachefs.start(*cachefs.words("sync", path))
        time.sleep(0.5)
        assert process.poll() is None, operation
        cachefs.plan()
        assert process.wait(60) == 0
    cachefs.umount_well()


def test_sync_shows_progress_on_a_terminal(cachefs: Command) -> None:
    cachefs.mount(*LATER, "--simulate-bandwidth", "20M", "--dirty-limit", "64M", "--fault-plan", cachefs.plan(FAILING))
    write_failing(cachefs.path / "file", bytes(16 << 20))
    cachefs.plan()
    master, terminal = pty.openpty()
    process = cachefs.start(*cachefs.words("sync", cachefs.path / "file"), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = output_of_terminal(master, process)
    os.close(master)
    assert process.wait(60) == 0, shown
    assert shown.count(" MiB left to write") >= 2 and shown.endswith("\r\x1b[K")
    cachefs.umount_well()


# --- discard


def on_a_terminal(cachefs: Command, answer: str, *arguments: object) -> tuple[int, str]:
    """The exit status of a command whose terminal answers so, and what that terminal showed."""
    master, terminal = pty.openpty()
    process = cachefs.start(*cachefs.words(*arguments), stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.write(master, answer.encode())
    shown = output_of_terminal(master, process)
    os.close(master)
    return process.wait(60), shown


def test_discard_asks_and_gives_up_the_unwritten_data_of_one_file(failing: Command) -> None:
    (failing.source / "d" / "old").write_bytes(b"o" * 3000)
    write_failing(failing.path / "d" / "old", b"n" * 9000)
    bad, old = failing.path / "d" / "bad", failing.path / "d" / "old"
    line = one_line(failing.run("discard", bad), 2)
    assert "nobody to ask: say --yes" in line
    status, shown = on_a_terminal(failing, "n\n", "discard", old)
    assert (status, "nothing was discarded" in shown) == (1, True)
    assert "Give up 8.8 KiB that programs wrote to" in shown and "SOURCE does not take (EIO)?" in shown
    assert old.stat().st_size == 9000
    status, shown = on_a_terminal(failing, "y\n", "discard", old)
    assert (status, "9000 bytes of" in shown) == (0, True), shown
    assert old.read_bytes() == b"o" * 3000 and old.stat().st_size == 3000
    assert where(dirty(failing)) == [("d/bad", 0, 5000)]
    done = failing.run("discard", bad, "--yes")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"5000 bytes of {bad} discarded\n", "")
    assert bad.read_bytes() == b""
    assert "has no unwritten data" in one_line(failing.run("discard", bad, "--yes"), 1)
    assert f"discarded on request: 9000 unwritten bytes of {old}" in failing.log_text()
    failing.umount_well()
    assert (failing.source / "d" / "old").read_bytes() == b"o" * 3000


def test_discard_refuses_what_did_not_fail(cachefs: Command) -> None:
    cachefs.mount(*LATER)
    (cachefs.path / "d").mkdir()
    (cachefs.path / "d" / "file").write_text("text")
    for path, says in (("d/file", "nothing failed: cachefs sync writes it"), ("d", "no unwritten"), ("none", "no unwritten")):
        assert says in one_line(cachefs.run("discard", cachefs.path / path, "--yes"), 1)
    assert (cachefs.path / "d" / "file").read_text() == "text"
    cachefs.umount_well()
    assert (cachefs.source / "d" / "file").read_text() == "text"


@pytest.mark.parametrize("mode", ["off", "open", "keep"])
def test_after_a_discard_open_handles_mappings_and_the_kernel_see_what_source_has(cachefs: Command, mode: str) -> None:
    (cachefs.source / "file").write_bytes(b"o" * 8192)
    plan = cachefs.plan()
    cachefs.mount(*LATER, "--fault-plan", plan, "--kernel-cache", mode, "--metadata-ttl", "1h")
    descriptor = os.open(cachefs.path / "file", os.O_RDWR)
    with mmap.mmap(descriptor, 8192) as mapped:
        os.pwrite(descriptor, b"n" * 12288, 0)
        assert mapped[:1] == b"n" and os.pread(descriptor, 1, 0) == b"n"
        cachefs.plan(FAILING)
        with pytest.raises(OSError):
            os.fsync(descriptor)
        assert cachefs.run("discard", cachefs.path / "file", "--yes").returncode == 0
        theirs, shown = os.stat(cachefs.source / "file"), os.fstat(descriptor)
        assert (shown.st_size, shown.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns) and shown.st_size == 8192
        assert os.pread(descriptor, 20000, 0) == b"o" * 8192
        assert mapped[:] == b"o" * 8192
        cachefs.plan()
        os.pwrite(descriptor, b"again", 0)
        os.fsync(descriptor)
    os.close(descriptor)
    cachefs.umount_well()
    assert (cachefs.source / "file").read_bytes() == b"again" + b"o" * 8187


def test_discard_finds_a_file_that_is_gone_from_source(cachefs: Command) -> None:
    """What cannot be written and cannot be looked up any more is given up by its name."""
    plan = cachefs.plan(FAILING)
    cachefs.mount(*LATER, "--fault-plan", plan, "--metadata-ttl", "0s")
    descriptor = os.open(cachefs.path / "file", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"x" * 100)
    with pytest.raises(OSError):
        os.fsync(descriptor)
    os.unlink(cachefs.source / "file")
    assert not (cachefs.path / "file").exists()
    assert where(dirty(cachefs)) == [("file", 0, 100)]
    assert cachefs.run("discard", cachefs.path / "file", "--yes").returncode == 0
    assert dirty(cachefs) == []
    os.close(descriptor)
    cachefs.plan()
    cachefs.umount_well()


def test_discard_of_what_is_being_written_says_so_in_time(failing: Command) -> None:
    failing.plan({"op": "pwritev", "hang": True})
    writing = failing.start(*failing.words("sync", failing.path / "d" / "bad"))
    wait_until(lambda: failing.status()["statistics"]["cache"]["writeback_pages"], "the write")
    line = one_line(failing.run("discard", failing.path / "d" / "bad", "--yes"), 1)
    assert f"{failing.path}/d/bad is being written at this moment: try again when SOURCE answers" in line
    failing.plan()
    assert writing.wait(60) == 0
    assert (failing.source / "d" / "bad").read_bytes() == b"x" * 5000
    failing.umount_well()


# --- umount


def test_umount_returns_when_the_process_is_gone_and_all_is_written(cachefs: Command) -> None:
    pid = cachefs.mount(*LATER, "--backing", "local", "--simulate-bandwidth", "50M")
    descriptor = os.open(cachefs.path / "file", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, bytes(8 << 20))
    os.close(descriptor)
    done = cachefs.umount()
    assert ended(pid), "the daemon is still there"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (cachefs.source / "file").stat().st_size == 8 << 20
    cachefs.nothing_left()


@pytest.mark.parametrize("durability", ["backing", "none"])
def test_umount_that_cannot_write_lists_it_says_what_becomes_of_it_and_the_process_is_gone(
    cachefs: Command, durability: str
) -> None:
    with_failing_file(cachefs, "--durability", durability)
    pid = int(cachefs.record()["pid"])
    done = cachefs.umount()
    assert ended(pid)
    assert (done.returncode, done.stdout) == (1, "")
    listed, fate = done.stderr.splitlines()
    assert listed == "cachefs: not written: d/bad: bytes 0 to 5000: EIO"
    journal = next((cachefs.base / "state").iterdir()) / "journal"
    kept = f"is kept in the journal {journal}, for the next mount" if durability == "backing" else "is lost"
    assert fate.startswith(f"cachefs: 4.9 KiB of one file could not be written and {kept}: see ")
    cachefs.nothing_left()
    assert (cachefs.source / "d" / "bad").read_bytes() == b""
    cachefs.mount("--fault-plan", cachefs.plan())
    assert (cachefs.source / "d" / "bad").read_bytes() == (b"x" * 5000 if durability == "backing" else b"")
    cachefs.umount_well()


def test_what_was_discarded_does_not_come_back_from_the_journal(failing: Command) -> None:
    (failing.path / "d" / "other").touch()
    write_failing(failing.path / "d" / "other", b"y" * 100)
    assert failing.run("discard", failing.path / "d" / "bad", "--yes").returncode == 0
    pid = int(failing.record()["pid"])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid), "the end")
    failing.mount("--fault-plan", failing.plan())
    assert (failing.source / "d" / "bad").read_bytes() == b""
    assert (failing.source / "d" / "other").read_bytes() == b"y" * 100
    failing.umount_well()


@pytest.mark.parametrize("durability", ["backing", "none"])
def test_umount_with_a_timeout_lists_what_remains_and_where_it_is(cachefs: Command, durability: str) -> None:
    with_failing_file(cachefs, "--durability", durability)
    pid = int(cachefs.record()["pid"])
    cachefs.plan({"op": "pwritev", "hang": True})
    done = cachefs.umount("--timeout", "200ms")
    assert (done.returncode, done.stdout) == (1, "")
    listed, line = done.stderr.splitlines()
    assert listed == "cachefs: not written yet: d/bad: bytes 0 to 5000: EIO"
    assert "it goes on in the background, what is left is kept " in line and not ended(pid)
    assert ("in the journal " if durability == "backing" else f"in the memory of process {pid} until that ends") in line
    cachefs.plan()
    wait_until(lambda: ended(pid), "the end")
    assert (cachefs.source / "d" / "bad").read_bytes() == b"x" * 5000


def test_umount_with_a_timeout_that_is_long_enough_is_as_without(cachefs: Command) -> None:
    pid = cachefs.mount(*LATER)
    (cachefs.path / "file").write_text("text")
    done = cachefs.umount("--timeout", "60s")
    assert (done.returncode, done.stdout, done.stderr, ended(pid)) == (0, "", "", True)
    assert (cachefs.source / "file").read_text() == "text"


SLOW_TO_HEAR = """
import sys, time
from cachefs import control
asked = control.request
def request(path, message, *more):
    if message["command"] == "umount":
        print("about to ask", flush=True)
        sys.stdin.readline()
    return asked(path, message, *more)
control.request = request
from cachefs.cli import main
main()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_daemon_that_ended_before_it_heard_of_the_umount_has_left_word(cachefs: Command, fails: bool) -> None:
    pid = cachefs.mount(*LATER, "--fault-plan", cachefs.plan())
    if fails:
        cachefs.plan(FAILING)
        write_failing(cachefs.path / "file", b"x")
    else:
        (cachefs.path / "file").write_bytes(b"x")
    process = cachefs.start(*cachefs.words("umount", cachefs.path, program=SLOW_TO_HEAR), stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None and process.stderr is not None
    assert process.stdout.readline() == "about to ask\n"
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: ended(pid), "the end")
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(60) == fails
    assert ("not written: file: bytes 0 to 1: EIO" in process.stderr.read()) == fails
    (note,) = (cachefs.base / "state").glob("*/last-end.json")
    assert json.loads(note.read_text())["pid"] == pid


def test_a_daemon_that_was_killed_left_no_word(cachefs: Command) -> None:
    pid = cachefs.mount()
    (record,) = [json.loads(path.read_text()) for path in (cachefs.base / "run").glob("*.json")]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid), "the end")
    assert state.how_it_ended(state.DaemonRecord(**record)) is None
    assert cachefs.umount().returncode == 0


# --- paths outside


def test_paths_that_are_on_no_mount_of_ours_change_nothing(cachefs: Command) -> None:
    cachefs.mount(*LATER)
    (cachefs.path / "file").write_text("text")
    outside = {
        cachefs.base: "is not on a cachefs mount",
        cachefs.source: f"is in the SOURCE of a mount: give its path below {cachefs.path}",
        cachefs.source / "file": "is in the SOURCE of a mount",
        "/proc": "is not on a cachefs mount",
        cachefs.base / "none": "is not on a cachefs mount",
        cachefs.path / ".." / "x": "is not on a cachefs mount",
        "x" * 5000: "is not on a cachefs mount",
    }
    for command in (("sync",), ("discard", "--yes"), ("status", "--dirty")):
        for path, says in outside.items():
            assert says in one_line(cachefs.run(*command, path), 1)
    done = cachefs.run("status", "--dirty", "--json", "/proc")
    assert (done.returncode, json.loads(done.stdout)) == (1, [])
    assert where(dirty(cachefs)) == [("file", 0, 4)]
    cachefs.umount_well()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts something inside")
def test_what_is_mounted_inside_is_not_ours(cachefs: Command) -> None:
    (cachefs.source / "inside").mkdir()
    cachefs.mount(*LATER)
    assert cachefs.call("mount", "-t", "tmpfs", "none", cachefs.path / "inside").returncode == 0
    try:
        for path in (cachefs.path / "inside", cachefs.path / "inside" / "file"):
            assert "is not on a cachefs mount" in one_line(cachefs.run("sync", path), 1)
    finally:
        assert cachefs.call("umount", cachefs.path / "inside").returncode == 0
    cachefs.umount_well()


def test_a_dead_mount_is_named_as_one(cachefs: Command) -> None:
    pid = cachefs.mount()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid), "the end")
    for command in (("sync",), ("discard", "--yes"), ("status", "--dirty")):
        line = one_line(cachefs.run(*command, cachefs.path / "file"), 1)
        assert f"has no daemon any more: cachefs umount {cachefs.path} tidies up" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="changes users")
def test_the_mount_of_another_user_is_named_as_one(cachefs: Command) -> None:
    cachefs.mount()
    environment = {**cachefs.environment, "CACHEFS_RUNTIME_DIR": str(cachefs.base / "none")}
    for command in (("sync",), ("discard", "--yes"), ("status", "--dirty")):
        done: Done = cachefs.run(*command, cachefs.path / "file", program=CACHEFS_AS_NOBODY, env=environment)
        assert "is on a mount of another user" in one_line(done, 1)
    cachefs.umount_well()
