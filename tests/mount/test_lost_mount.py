"""A SOURCE that hangs, goes away and comes back under a live mount: an sshfs that is frozen, killed, or loses its connection."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachefs import mountinfo
from far import FarMount, far_mount, in_time, states
from mounts import PLAIN_ENVIRONMENT, ROOT, wait_until
from twin import NOBODY, as_user, forked, outcome, read_file

pytestmark = [pytest.mark.mount, pytest.mark.timeout(170)]

TIMEOUT = 2.0
OPTIONS = ("--backing-timeout", f"{TIMEOUT:g}s", "--dirty-expire", "300ms", "--writeback-interval", "100ms")
BOUND = TIMEOUT + 3.0  # for a machine that is busy
QUICK = 0.010
DATA = bytes(range(256)) * 1024
MIB = bytes(1 << 20)


def fill(mount: FarMount) -> None:
    """Files that programs have read (cached, dir/cached, link) and some that they have not."""
    for directory in ("dir", "unseen"):
        mount.there(directory).mkdir()
    for name in ("cached", "dir/cached", "partly", "uncached", "written", "unseen/file"):
        mount.there(name).write_bytes(DATA)
    mount.there("link").symlink_to("dir")
    for name in ("cached", "link/cached"):
        assert read_file(mount.at(name)) == DATA
        assert by_nobody(mount, name) == DATA
    with open(mount.at("partly"), "rb", buffering=0) as file:
        file.read(4096)
    for name in ("uncached", "written"):
        os.stat(mount.at(name))


def by_nobody(mount: FarMount, name: str) -> Any:
    """What somebody reads for whom the kernel has to ask whether there are ACLs."""
    return as_user(NOBODY, read_file, mount.at(name)) if os.geteuid() == 0 else read_file(mount.at(name))


def wait_until_lost(mount: FarMount) -> None:
    """Something asks, so that the silence is noticed."""
    asking = in_time(lambda: os.stat(mount.at("no such name")))
    wait_until(lambda: mount.lost, "SOURCE is known to be lost")
    assert asking()[0] in ("ETIMEDOUT", "EIO")


def operations(mount: FarMount, fd: int, partly: int) -> dict[str, Callable[[], Any]]:
    """What cannot be done without SOURCE."""
    at = mount.at
    return {
        "lookup": lambda: os.stat(at("unheard of")),
        "listdir": lambda: os.listdir(at("unseen")),
        "listdir of the top": lambda: os.listdir(mount.path),
        "read": lambda: read_file(at("uncached")),
        "read on": lambda: os.pread(partly, 4096, 200_000),
        "open to write": lambda: os.close(os.open(at("uncached"), os.O_RDWR)),
        "create": lambda: os.close(os.open(at("new"), os.O_RDWR | os.O_CREAT)),
        "mkdir": lambda: os.mkdir(at("newdir")),
        "symlink": lambda: os.symlink("a", at("newlink")),
        "unlink": lambda: os.unlink(at("uncached")),
        "rmdir": lambda: os.rmdir(at("unseen")),
        "rename": lambda: os.rename(at("uncached"), at("moved")),
        "truncate": lambda: os.truncate(at("uncached"), 1),
        "chmod": lambda: os.chmod(at("uncached"), 0o600),
        "utime": lambda: os.utime(at("uncached"), (1, 1)),
        "write into a page that is not here": lambda: os.pwrite(partly, b"w", 150_000),
        "fsync": lambda: os.fsync(fd),
    }


def reader(path: Path, stop: Path) -> Callable[[], Any]:
    """Reads a cached file through an open handle, over and over, until there is `stop`; gives the seconds each read took."""

    def read() -> list[float]:
        took = []
        with open(path, "rb", buffering=0) as file:
            while not stop.exists():
                time.sleep(0.01)
                start = time.monotonic()
                assert os.pread(file.fileno(), 65536, 65536) == DATA[:65536]
                took.append(time.monotonic() - start)
        return took

    return forked(read)


def quickest(function: Callable[[], object]) -> float:
    """Seconds of the quickest of five calls that must all be right: a busy machine makes single ones slow."""
    took = []
    for _ in range(5):
        start = time.monotonic()
        assert function()
        took.append(time.monotonic() - start)
    return min(took)


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
def test_a_frozen_source_costs_errors_in_time_and_nothing_that_was_written(seconds: int) -> None:
    with far_mount(*OPTIONS, "--metrics", "127.0.0.1:0") as mount:
        fill(mount)
        fd = os.open(mount.at("written"), os.O_RDWR)
        os.pwrite(fd, b"before", 0)
        os.fsync(fd)
        partly = os.open(mount.at("partly"), os.O_RDWR)
        stop = mount.base / "stop"
        reading = reader(mount.at("cached"), stop)
        mount.sshfs.freeze()
        frozen_at = time.monotonic()
        os.pwrite(fd, b"after", 0)
        try:
            victim = subprocess.Popen(["cat", str(mount.at("uncached"))], stdout=subprocess.DEVNULL)
            # All at once, for each may take as long as it takes to notice.
            waiting = {name: in_time(operation) for name, operation in operations(mount, fd, partly).items()}
            known = {name: in_time(lambda name=name: read_file(mount.at(name))) for name in ("cached", "link/cached")}  # type: ignore[misc]
            assert {name: answer()[0] == DATA for name, answer in known.items()} == {"cached": True, "link/cached": True}
            answers = {name: answer() for name, answer in waiting.items()}
            assert {name: answer for name, (answer, _) in answers.items() if answer not in ("ETIMEDOUT", "EIO")} == {}
            assert {name: took for name, (_, took) in answers.items() if took > BOUND} == {}
            victim.kill()
            victim.wait(BOUND)
            wait_until_lost(mount)

            # Now that it is known, all of it is quick.
            assert by_nobody(mount, "link/cached") == DATA
            for name in ("cached", "dir/cached", "link/cached"):
                assert quickest(lambda name=name: read_file(mount.at(name)) == DATA) < QUICK  # type: ignore[misc]
                assert quickest(lambda name=name: os.stat(mount.at(name)).st_size == len(DATA)) < QUICK  # type: ignore[misc]
            for name, operation in operations(mount, fd, partly).items():
                answer, took = in_time(operation)()
                assert answer in ("ETIMEDOUT", "EIO") and took < TIMEOUT, name
            os.pwrite(fd, DATA, 0)
            assert os.pread(fd, len(DATA), 0) == DATA
            with urllib.request.urlopen(str(mount.ask("status")["metrics"]), timeout=5) as metrics:
                assert b'"} 1.0' in next(line for line in metrics if line.startswith(b"cachefs_backing_lost{"))
            assert mount.figures()["backing"]["timeouts"] >= len(answers)
            wait_until(lambda: time.monotonic() > frozen_at + seconds, "so long is it frozen")
        finally:
            mount.sshfs.thaw()
            stop.touch()
            took = reading()
        thawed_at = time.monotonic()
        wait_until(lambda: mount.there("written").read_bytes() == DATA, "writeback goes on by itself")
        assert time.monotonic() - thawed_at < BOUND
        assert not mount.lost
        assert len(took) > 10 * seconds and statistics.quantiles(took, n=100)[94] < QUICK, max(took)
        os.mkdir(mount.at("newdir"))
        assert sorted(os.listdir(mount.path)) == sorted(os.listdir(mount.sshfs.remote))
        os.fsync(fd)
        os.close(fd)
        os.close(partly)
        wait_until(lambda: not mount.threads_that_hang(), "nothing is left in an unkillable sleep")



def test_what_could_not_be_written_when_source_was_killed_is_written_by_the_next_mount() -> None:
    with far_mount(*OPTIONS) as mount:
        fill(mount)
        fd, partly = (os.open(mount.at(name), os.O_RDWR) for name in ("written", "partly"))
        mount.sshfs.freeze()
        os.pwrite(fd, DATA[::-1], 0)
        wait_until_lost(mount)
        mount.sshfs.kill()
        wait_until(lambda: outcome(os.mkdir, mount.at("newdir")) == "EIO", "the calls that hung are back")
        for name in ("cached", "dir/cached", "link/cached"):
            assert read_file(mount.at(name)) == DATA
        assert os.pread(fd, len(DATA), 0) == DATA[::-1]
        answers = {name: in_time(operation)() for name, operation in operations(mount, fd, partly).items()}
        assert {answer for answer, _ in answers.values()} == {"EIO"}, "never ENOTCONN, for our mount is there; never nothing"
        assert max(took for _, took in answers.values()) < TIMEOUT
        assert mount.lost
        assert [outcome(os.fsync, fd), outcome(os.close, fd)] == ["EIO", "EIO"]
        os.close(partly)
        mount.exit_status = 1
        start = time.monotonic()
        mount.unmount()
        assert time.monotonic() - start < BOUND + 5.0
        assert '"path": "written", "offset": 0, "length": 262144, "error": "EIO"' in mount.log_text()
        mount.sshfs.let_go()
        mount.sshfs.start()
        mount.exit_status = 0
        mount.start()
        assert mount.there("written").read_bytes() == DATA[::-1]
        assert read_file(mount.at("uncached")) == DATA


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_an_unmount_while_source_hangs_ends_in_time_and_says_what_remains(how: str) -> None:
    with far_mount(*OPTIONS) as mount:
        fill(mount)
        fd = os.open(mount.at("written"), os.O_RDWR)
        open_for_reading = os.open(mount.at("partly"), os.O_RDONLY)
        mount.sshfs.freeze()
        os.pwrite(fd, DATA[::-1], 0)
        answer, took = in_time(lambda: os.close(fd))()
        assert answer == "ETIMEDOUT" and took < BOUND
        start = time.monotonic()
        assert outcome(os.close, fd) in (None, "ETIMEDOUT")
        if how == "umount":
            os.close(open_for_reading)
            code = "from cachefs.cli import main; main()"
            words = [sys.executable, "-c", code, "umount", str(mount.path)]
            environment = {**PLAIN_ENVIRONMENT, "CACHEFS_RUNTIME_DIR": str(mount.base / "run"), "PYTHONPATH": str(ROOT)}
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
            assert done.returncode == 1 and "written: bytes 0 to 262144: ETIMEDOUT" in done.stderr, done.stderr
        else:  # with a file open there
            mount.process.terminate()
        mount.exit_status = 1
        mount.announce("is in use")
        mount.wait_for_end()
        assert time.monotonic() - start < BOUND + 15.0, "two times 5 s for who has files open"
        assert '"path": "written", "offset": 0, "length": 262144, "error": "ETIMEDOUT"' in mount.log_text()
        assert mountinfo.top_mount(str(mount.path)) is None
        if how == "SIGTERM":
            assert outcome(os.close, open_for_reading) is None, "nothing can be lost that was only read"
        mount.sshfs.thaw()
        mount.exit_status = 0
        mount.start()
        assert mount.there("written").read_bytes() == DATA[::-1]


def test_a_source_that_connects_again_is_written_to_through_new_descriptors() -> None:
    with far_mount(*OPTIONS, sshfs=("reconnect",)) as mount:
        fill(mount)
        with open(mount.at("written"), "r+b", buffering=0) as file, open(mount.at("partly"), "rb", buffering=0) as partly:
            file.write(b"before")
            os.fsync(file.fileno())
            mount.sshfs.drop_connection()
            file.write(DATA)
            wait_until(lambda: mount.there("written").read_bytes() == b"before" + DATA, "writeback goes on by itself")
            wait_until(lambda: outcome(os.fsync, file.fileno()) is None, "fsync, when the error has been told")
            wait_until(lambda: outcome(os.pread, partly.fileno(), 4096, 100_000) == DATA[100_000:104_096], "reads")


def test_what_source_took_at_first_and_refused_afterwards_is_kept_and_tried_again() -> None:
    with far_mount(*OPTIONS, sshfs=("reconnect",)) as mount:
        mount.sshfs.full.touch()
        mount.sshfs.drop_connection()
        wait_until(lambda: outcome(os.stat, mount.at("no such name")) == "ENOENT", "it is there again")
        fd = os.open(mount.at("file"), os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"small", 0)  # sshfs says yes before the server has said no
        assert outcome(os.close, fd) == "EIO"
        assert mount.there("file").read_bytes() == b"" and mount.figures()["writeback"]["dirty_bytes"] == 4096
        mount.sshfs.full.unlink()
        mount.sshfs.drop_connection()
        wait_until(lambda: mount.there("file").read_bytes() == b"small", "it is written")


def test_a_source_that_hangs_is_refused_when_mounting() -> None:
    with far_mount(*OPTIONS) as mount:
        mount.unmount()
        mount.sshfs.freeze()
        start = time.monotonic()
        done = subprocess.run(
            mount.command, env={**PLAIN_ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
        assert time.monotonic() - start < BOUND
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"cachefs: SOURCE {mount.source} has not answered for 2.0 s" in done.stderr
        mount.sshfs.thaw()
        mount.start()


def test_hundreds_of_requests_that_wait_keep_none_from_what_is_cached() -> None:
    with far_mount("--backing-timeout", "6s") as mount:
        fill(mount)
        for i in range(4):
            mount.there(f"large {i}").write_bytes(MIB)
            os.stat(mount.at(f"large {i}"))
        reads = f"""
import os, threading
def read(i):
    try: os.pread(fds[i % 4], 4096, i // 4 << 14)
    except OSError: pass
fds = [os.open({str(mount.path)!r} + f"/large {{i}}", os.O_RDONLY) for i in range(4)]
print(flush=True)
input()
threads = [threading.Thread(target=read, args=(i,)) for i in range(250)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
        with open(mount.at("cached"), "rb", buffering=0) as file, contextlib.ExitStack() as pipes:
            process = pipes.enter_context(
                subprocess.Popen([sys.executable, "-c", reads], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            assert process.stdin is not None and process.stdout is not None
            process.stdout.readline()
            mount.sshfs.freeze()
            process.stdin.write(b"\n")
            process.stdin.flush()
            wait_until(lambda: len(os.listdir(f"/proc/{process.pid}/task")) > 250, "all of them wait")
            assert quickest(lambda: os.pread(file.fileno(), 4096, 0) == DATA[:4096]) < QUICK
            assert mount.figures()["cache"]["filling_pages"] >= 250
            process.wait(6.0 + BOUND)
            mount.sshfs.thaw()


def test_a_call_that_hangs_alone_costs_who_waits_for_it_an_error_and_others_nothing(mounted: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('[{"op": "pwritev", "hang": true}]')
    mount = mounted("--fault-plan", str(plan), *OPTIONS)
    with open(mount.path / "file", "w+b", buffering=0) as file:
        file.write(DATA)
        for answer, took in (in_time(lambda: os.fsync(file.fileno()))(), in_time(lambda: os.truncate(mount.path / "file", 5))()):
            assert answer == "ETIMEDOUT" and took < BOUND
        assert not mount.ask("status")["statistics"]["backing"]["lost"]
        os.mkdir(mount.path / "dir")
        assert sorted(os.listdir(mount.path)) == ["dir", "file"]
        plan.write_text("[]")
        wait_until(lambda: read_file(mount.source / "file") == DATA, "it is written")
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
    assert states(mount.process.pid) <= {"S", "R"}

