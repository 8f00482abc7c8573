"""The systemd unit, carried out line by line as systemd would: a daemon that is told to stop stops when all is written."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from command import DEADLINE_SECONDS, Command, Done, is_mounted

from cachefs import daemon

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
UNIT = Path(__file__).parents[3] / "deploy" / "systemd" / "cachefs@.service"
PROGRAM = "/usr/local/bin/cachefs"
WATCHDOG_SECONDS = 2.0


def lines(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


class Service:
    """What systemd is to one instance of the unit."""

    def __init__(self, cachefs: Command, *options: object) -> None:
        self.cachefs = cachefs
        self.environment = {
            "SOURCE": str(cachefs.source), "MOUNTPOINT": str(cachefs.path),
            "OPTIONS": " ".join(map(str, (*cachefs.options, *options))),
        }  # fmt: skip
        self.heard = ""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(cachefs.base / "notify"))

    def _words(self, line: str) -> list[str]:
        """The line's words: ${NAME} is one, $NAME is split at blanks; the program is this Python's."""
        words: list[str] = []
        for word in shlex.split(line.removeprefix("-")):
            if word in (f"${name}" for name in self.environment):
                words += self.environment[word[1:]].split()
            else:
                word = re.sub(r"\$\{(\w+)\}", lambda match: self.environment[match[1]], word)
                words.append(word.replace("$$", "$"))
        return self.cachefs.words(*words[1:]) if words[0] == PROGRAM else words

    def start(self) -> None:
        """ExecStart, until it says that it is ready."""
        assert lines("Type") == ["notify"] and len(lines("ExecStart")) == 1
        told = {"NOTIFY_SOCKET": str(self.cachefs.base / "notify"), "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6))}
        with (self.cachefs.base / "stderr").open("ab") as log:
            words = self._words(lines("ExecStart")[0])
            self.main = self.cachefs.start(*words, env={**self.environment, **told}, stdout=log, stderr=log)
        self.wait_for("READY=1")

    def wait_for(self, what: str, seconds: float = DEADLINE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while what not in self.heard.splitlines():
            assert self.listen(deadline), f"{what}: not within {seconds:g} s\n{self.cachefs.log_text()}"

    def listen(self, deadline: float) -> bool:
        """Takes the next message; False when the time is over."""
        if not wait([self._socket], max(0.0, deadline - time.monotonic())):
            return False
        self.heard += self._socket.recv(4096).decode() + "\n"
        return True

    def run(self, key: str) -> Done:
        """The one command of this key, to its end."""
        (line,) = lines(key)
        return self.cachefs.call(*self._words(line), env={**self.cachefs.environment, **self.environment})

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def service(cachefs: Command, *options: object) -> Iterator[Service]:
    it = Service(cachefs, *options)
    try:
        it.start()
        yield it
    finally:
        it.close()


def test_a_service_is_ready_when_its_mountpoint_answers_and_stops_when_all_is_written(cachefs: Command) -> None:
    with service(cachefs, "--dirty-expire 1h --write-through off") as it:
        assert is_mounted(cachefs.path)
        content = os.urandom(4 << 20)
        (cachefs.path / "file").write_bytes(content)
        assert not (cachefs.source / "file").stat().st_size
        assert it.run("ExecStop").returncode == 0
        assert it.main.wait(1) == 0, "it is over when ExecStop is, so that nothing is left to be killed"
        assert (cachefs.source / "file").read_bytes() == content
        it.wait_for("STOPPING=1")
    cachefs.nothing_left()


def test_a_service_in_use_is_stopped_by_the_signal_that_follows(cachefs: Command) -> None:
    with service(cachefs, "--dirty-expire 1h --write-through off") as it:
        fd = os.open(cachefs.path / "file", os.O_WRONLY | os.O_CREAT)
        try:
            os.write(fd, b"x" * 100_000)
            refused = it.run("ExecStop")
            assert refused.returncode == 1 and lines("ExecStop")[0].startswith("-"), "which is no failure of the service"
            assert is_mounted(cachefs.path) and it.main.poll() is None
            it.main.send_signal(signal.SIGTERM)
            assert it.main.wait(DEADLINE_SECONDS) == 0, cachefs.log_text()
        finally:
            with contextlib.suppress(OSError):  # its mount was taken away
                os.close(fd)
        assert (cachefs.source / "file").read_bytes() == b"x" * 100_000
    cachefs.nothing_left()


def test_a_service_that_serves_says_so_and_one_that_is_stuck_does_not(cachefs: Command) -> None:
    with service(cachefs, "--dirty-expire 1h --write-through off") as it:
        (cachefs.path / "file").write_bytes(b"x" * 5000)
        for _ in range(3):
            it.heard = ""
            it.wait_for("WATCHDOG=1", WATCHDOG_SECONDS)
        it.main.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + WATCHDOG_SECONDS
        while it.listen(deadline):
            assert time.monotonic() < deadline
        it.main.send_signal(signal.SIGABRT)  # as systemd does
        it.main.send_signal(signal.SIGCONT)
        assert it.main.wait(DEADLINE_SECONDS) == -signal.SIGABRT
        assert not (cachefs.source / "file").stat().st_size
        it.run("ExecStop")
        assert it.run("ExecStopPost").returncode == 0
        assert not is_mounted(cachefs.path)
        it.heard = ""
        it.start()
        assert (cachefs.source / "file").read_bytes() == b"x" * 5000
        assert it.run("ExecStop").returncode == 0
    cachefs.nothing_left()


def test_regression_a_systemd_that_does_not_listen_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be waiting for our mount: a ping that waited for it stopped both for good. What it must hear, it hears later."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "notify"))
        deaf.settimeout(DEADLINE_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for _ in range(40):  # the kernel keeps ten of them
            daemon.notify("WATCHDOG=1")
        daemon.notify("READY=1", must_arrive=True)
        heard = [deaf.recv(100)]
        while heard[-1] != b"READY=1":
            heard.append(deaf.recv(100))
        assert 1 < len(heard) < 40
