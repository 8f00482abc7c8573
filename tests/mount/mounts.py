"""A mount in a process of its own, that must end well and leave nothing bad in its log."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cachefs import control

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 60.0  # everything waited for here takes a fraction of a second; this is for a machine that is busy
POLL_SECONDS = 0.01
BAD = re.compile(r"WARNING|ERROR|CRITICAL|Traceback|Exception|Error:")
NOT_INHERITED = ("CACHEFS_", "XDG_", "NOTIFY_", "COLUMNS", "LINES")  # the last two: what pytest-xdist says of its own terminal
PLAIN_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
# Everything is imported before another user takes over: he may not be allowed to read the interpreter's files.
# A process that changed its user is not dumpable, and may not look at its own /proc/self/fd then.
START = """
import ctypes, encodings.ascii, encodings.idna, encodings.latin_1, os, sys
import cachefs.mount, cachefs.cli.mount
from cachefs.cli import main
user = int(sys.argv.pop(1))
if user:
    os.setgroups([]); os.setgid(user); os.setuid(user)
    PR_SET_DUMPABLE = 4
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
sys.exit(main())
"""

# CACHEFS_TEST_FAST_LANE=off runs every test that does not say otherwise with pyfuse3 in the place of the lane.
FAST_LANE = os.environ.get("CACHEFS_TEST_FAST_LANE", "on")

Factory = Callable[..., "Mount"]


def wait_until(true: Callable[[], object], what: str) -> None:
    """Looks again and again; fails the test when the time is over."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {DEADLINE_SECONDS:g} s")
        time.sleep(POLL_SECONDS)


class Mount:
    """One mount and its daemon. `path` is the mountpoint, `source` the directory behind it."""

    def __init__(self, base: Path, kernel_cache: str, options: tuple[str, ...], user: int | None) -> None:
        self.base, self.source, self.path, self.log = base, base / "source", base / "mnt", base / "stderr"
        self.kernel_cache = kernel_cache
        self.user = user
        self.announced: list[re.Pattern[str]] = []
        self.exit_status = 0  # what the daemon is expected to end with
        self._log_seen = 0
        for directory in (self.source, self.path, base / "state", base / "run"):
            directory.mkdir(exist_ok=True)
            if user is not None:
                os.chown(directory, user, user)
        arguments = [str(self.source), str(self.path), "--kernel-cache", kernel_cache, "--metrics", "off"]
        arguments += ["--state-dir", str(base / "state"), "--foreground", "--fast-lane", FAST_LANE, *options]
        self.command = [sys.executable, "-c", START, str(user or 0), "mount", *arguments]
        self.start()

    def start(self) -> None:
        """Starts the daemon and returns when the mountpoint answers."""
        runtime = {"CACHEFS_RUNTIME_DIR": str(self.base / "run"), "PYTHONPATH": str(ROOT)}
        notify = self.base / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("ab") as log:
            ready.bind(str(notify))
            os.chmod(notify, 0o666)
            ready.settimeout(POLL_SECONDS * 5)
            environment = {**PLAIN_ENVIRONMENT, **runtime, "NOTIFY_SOCKET": str(notify), "CACHEFS_CHECK": "1"}
            self.process = subprocess.Popen(
                self.command, env=environment, cwd=self.base, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            wait_until(lambda: self._is_ready(ready), "READY=1")

    def _is_ready(self, ready: socket.socket) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"cachefs mount ended with {self.process.returncode}:\n{self.log_text()}")
        with contextlib.suppress(TimeoutError):
            return b"READY=1" in ready.recv(4096)
        return False

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def announce(self, pattern: str) -> None:
        """Lines of the log that match are what the test wants to happen."""
        self.announced.append(re.compile(pattern))

    def check_log(self) -> None:
        """Fails if the log has got a line since the last check that speaks of trouble."""
        new, self._log_seen = self.log_text()[self._log_seen :], len(self.log_text())
        bad = [line for line in new.splitlines() if BAD.search(line)]
        bad = [line for line in bad if not any(pattern.search(line) for pattern in self.announced)]
        if bad:
            pytest.fail(f"the daemon's log has trouble:\n{new}")

    def ask(self, command: str) -> Mapping[str, object]:
        """The last answer of the daemon to a control request (status, sync), with all entries that came before it."""
        (address,) = (self.base / "run").glob("*.sock")
        *_, last = answers = list(control.request(str(address), {"command": command}, None, DEADLINE_SECONDS))
        return {**last, "unwritten": [entry for answer in answers for entry in answer.get("unwritten", ())]}

    def unmount(self) -> None:
        """Unmounts and waits for the daemon to have written out and ended; its exit status must be right."""
        done = subprocess.run(["fusermount3", "-u", str(self.path)], capture_output=True, text=True, timeout=DEADLINE_SECONDS)
        assert done.returncode == 0, done.stderr
        self.wait_for_end()

    def wait_for_end(self) -> None:
        status = self.process.wait(DEADLINE_SECONDS)
        assert status == self.exit_status, f"exit status {status}:\n{self.log_text()}"
        self.check_log()

    def remove(self) -> None:
        """Whatever happened, nothing is left afterwards."""
        if self.process.poll() is None:
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], capture_output=True, timeout=DEADLINE_SECONDS)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DEADLINE_SECONDS / 4)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_SECONDS)
        while os.path.ismount(self.path):
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=True, timeout=DEADLINE_SECONDS)


@contextlib.contextmanager
def mounting() -> Iterator[Factory]:
    """A function that mounts; what it mounted is unmounted and removed at the end, and the log looked at."""
    if not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        pytest.skip("no FUSE here: /dev/fuse or fusermount3 is missing")
    mounts: list[Mount] = []
    # Not pytest's tmp_path: other users may go in here.
    base = Path(tempfile.mkdtemp(prefix="cachefs-test-"))
    base.chmod(0o755)

    def make(*options: str, kernel_cache: str = "off", user: int | None = None) -> Mount:
        directory = base / str(len(mounts))
        directory.mkdir(mode=0o755)
        if user is not None:
            os.chown(directory, user, user)
        mounts.append(Mount(directory, kernel_cache, options, user))
        return mounts[-1]

    try:
        yield make
        for mount in mounts:
            if mount.process.poll() is None:
                mount.unmount()
    finally:
        for mount in mounts:
            mount.remove()
        shutil.rmtree(base)
