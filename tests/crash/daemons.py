"""A place to mount in, and its daemon: started quickly, killed at any moment, whatever it was doing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from cachefs import mountinfo

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 60.0
BAD = re.compile(r"WARNING|ERROR|CRITICAL|Traceback|Exception|Error:|cachefs: ")
PLAIN_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("CACHEFS_", "XDG_", "NOTIFY_"))}


def wait_until(true: Callable[[], object], what: str) -> None:
    """Looks again and again; raises Crashed when the time is over."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise Crashed(f"{what}: not within {DEADLINE_SECONDS:g} s")
        time.sleep(0.005)


class Crashed(AssertionError):
    """The daemon did what no kill of ours explains."""


class Aside(NamedTuple):
    """Pages of a file that recovery put aside."""

    directory: Path
    note: Mapping[str, Any]
    data: bytes

    @property
    def paths(self) -> set[str]:
        """What the file was called, relative to SOURCE."""
        return {str(self.note["path"]), *map(str, self.note["other_paths"])}


class Spawner:
    """The process that runs cachefs commands, and knows how they ended."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel = ours
        self._lines = ours.makefile("rb", buffering=0)
        self.statuses: dict[int, int] = {}
        environment = {**PLAIN_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        keep = theirs.fileno()
        program = str(Path(__file__).with_name("spawner.py"))
        start = f"import os, runpy; os.dup2({keep}, 3); runpy.run_path({program!r}, None, '__main__')"
        self._process = subprocess.Popen([sys.executable, "-c", start], pass_fds=[keep], env=environment)
        theirs.close()

    def start(self, words: list[str], environment: Mapping[str, str], output: Path) -> int:
        """Runs `cachefs WORDS`; its pid."""
        request = {"words": words, "environment": {**PLAIN_ENVIRONMENT, **environment}, "output": str(output)}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while (pid := self._hear()) is None:
            pass
        return pid

    def _hear(self) -> int | None:
        """One line: the pid of what was started, or None after one that tells of an end."""
        line = self._lines.readline()
        if not line:
            raise Crashed("the spawner has ended")
        pid, status = json.loads(line)
        if status is None:
            return int(pid)
        self.statuses[pid] = status
        return None

    def ended(self, pid: int, wait_seconds: float = 0.0) -> bool:
        deadline = time.monotonic() + wait_seconds
        while pid not in self.statuses:
            if not wait([self._channel], max(0.0, deadline - time.monotonic())):
                return False
            self._hear()
        return True

    def wait(self, pid: int) -> int:
        """The exit status of a command; of one that was killed, minus the signal."""
        if not self.ended(pid, DEADLINE_SECONDS):
            raise Crashed(f"process {pid} did not end within {DEADLINE_SECONDS:g} s")
        return self.statuses.pop(pid)

    def close(self) -> None:
        self._channel.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._channel.close()
        self._process.wait(DEADLINE_SECONDS)


class Place:
    """A SOURCE, a MOUNTPOINT, a state directory, and at most one daemon. The state and SOURCE may lie elsewhere."""

    def __init__(self, base: Path, spawner: Spawner, *, source: Path | None = None, state: Path | None = None) -> None:
        self.base, self.spawner = base, spawner
        self.source, self.state = source or base / "source", state or base / "state"
        self.path, self.log = base / "mnt", base / "log"
        for directory in (self.source, self.state, self.path, base / "run"):
            directory.mkdir(mode=0o755, exist_ok=True, parents=True)
        self.options: list[str] = []
        self.environment = {"CACHEFS_RUNTIME_DIR": str(base / "run"), "CACHEFS_CHECK": "1"}
        self.pid = 0
        self._pidfd = -1  # so that no signal of ours can meet another process
        self._notify: socket.socket | None = None
        self._log_seen = 0
        self.start_seconds = 0.1

    # --- starting ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts the daemon, and does not wait for it."""
        address = self.base / "notify"
        address.unlink(missing_ok=True)
        self._deafen()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify.bind(str(address))
        words = ["mount", str(self.source), str(self.path), "--foreground", "--metrics", "off", "--state-dir", str(self.state)]
        environment = {**self.environment, "NOTIFY_SOCKET": str(address)}
        self.pid = self.spawner.start([*words, *self.options], environment, self.log)
        self._pidfd = os.pidfd_open(self.pid)

    def start(self) -> None:
        """Starts the daemon and returns when the mountpoint answers."""
        begun = time.monotonic()
        self.begin()
        self.wait_until_ready()
        self.start_seconds = time.monotonic() - begun

    def wait_until_ready(self) -> None:
        assert self._notify is not None
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            if wait([self._notify], 0.1):
                if b"READY=1" in self._notify.recv(4096):
                    self._deafen()
                    assert self.record()["pid"] == self.pid
                    return
            elif self.spawner.ended(self.pid):
                raise Crashed(f"cachefs mount ended with {self._forget()}:\n{self.log_text()}")
        raise Crashed(f"no READY=1 within {DEADLINE_SECONDS:g} s:\n{self.log_text()}")

    def _deafen(self) -> None:
        if self._notify is not None:
            self._notify.close()
            self._notify = None

    def record(self) -> Mapping[str, object]:
        """What the state directory says of the daemon."""
        (path,) = self.state.glob("*/daemon.json")
        record = json.loads(path.read_text())
        assert isinstance(record, dict)
        return record

    # --- ending --------------------------------------------------------------------------------------------------------

    def ended(self, wait_seconds: float = 0.0) -> bool:
        return self.spawner.ended(self.pid, wait_seconds)

    def kill(self) -> bool:
        """SIGKILL for the daemon; returns when it is gone: True, or False if it had ended by itself with status 0."""
        self._signal(signal.SIGKILL)
        status = self._forget()
        if status not in (0, -signal.SIGKILL):
            raise Crashed(f"exit status {status}:\n{self.log_text()}")
        return status == -signal.SIGKILL

    def _forget(self) -> int:
        """Waits for the end of the daemon; its exit status."""
        status = self.spawner.wait(self.pid)
        os.close(self._pidfd)
        self.pid = 0
        return status

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def ask_to_end(self, how: str) -> int:
        """Begins an unmount and does not wait: `umount` the command (its pid, else 0), `signal` or `fusermount`."""
        if how == "umount":
            return self.spawner.start(["umount", str(self.path)], self.environment, self.base / "umount")
        if how == "signal":
            self._signal(signal.SIGTERM)
        else:
            subprocess.run(["fusermount3", "-u", str(self.path)], check=True, timeout=DEADLINE_SECONDS)
        return 0

    def unmount(self) -> None:
        """Unmounts, waits for the daemon, and makes sure that it ended well."""
        command = self.ask_to_end("umount")
        status = self.spawner.wait(command)
        if status:
            raise Crashed(f"cachefs umount: {status}: {(self.base / 'umount').read_text()}\n{self.log_text()}")
        if self.kill():
            raise Crashed(f"the daemon was still there after cachefs umount:\n{self.log_text()}")
        if os.listdir(self.path):
            raise Crashed(f"beside the mount there are {os.listdir(self.path)}")

    def remove(self) -> None:
        """Whatever happened, nothing is left running or mounted."""
        if self.pid:
            self._signal(signal.SIGKILL)
            self.ended(DEADLINE_SECONDS)
            os.close(self._pidfd)
        for mount in mountinfo.mounts():
            if mount.mountpoint == str(self.path):
                subprocess.run(["fusermount3", "-uz", str(self.path)], check=False, timeout=DEADLINE_SECONDS)
        self._deafen()

    # --- looking -------------------------------------------------------------------------------------------------------

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def bad_lines(self, ordinary: re.Pattern[str] | None = None) -> list[str]:
        """Lines of the log, since the last look, that speak of trouble."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._log_seen)
            new = log.read()
            self._log_seen += len(new)
            bad = [line for line in new.decode(errors="replace").splitlines() if BAD.search(line)]
            return [line for line in bad if not (ordinary and ordinary.search(line))]
        return []

    def recovered(self) -> list[Aside]:
        """What recovery found no place for."""
        notes = sorted(self.state.glob("*/recovered/*/note.json"))
        return [Aside(note.parent, json.loads(note.read_text()), (note.parent / "data").read_bytes()) for note in notes]
