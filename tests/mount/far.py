"""A SOURCE that is really far away: an sshfs of this test's own, which can be frozen, killed and started again.

In the place of ssh there is a program that runs the SFTP server here. So no sshd, no keys and no network are needed, and
what is tested, the file system sshfs and its connection, is the real thing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mounts import DEADLINE_SECONDS, Mount, wait_until
from twin import forked, outcome

SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")


class Sshfs:
    """`remote` as `near`, through an sshfs process and an SFTP server; both can be sent signals."""

    def __init__(self, base: Path, *options: str) -> None:
        self.remote, self.near = base / "remote", base / "source"
        self._started, ssh = base / "servers", base / "ssh"
        for directory in (self.remote, self.near):
            directory.mkdir(exist_ok=True)
        server = next(path for path in SFTP_SERVERS if os.path.exists(path))
        self.full = base / "full"  # while it exists, a server that starts can write no file
        full = f'[ ! -e "{self.full}" ] || {{ trap "" XFSZ; ulimit -f 0; }}'
        ssh.write_text(f'#!/bin/sh\necho $$ >>"{self._started}"\n{full}\nexec {server}\n')
        ssh.chmod(0o755)
        self.command = ["sshfs", "-f", "-o", ",".join((f"ssh_command={ssh}", "dir_cache=no", *options))]
        self.command += [f"nowhere:{self.remote}", str(self.near)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: os.path.ismount(self.near), "sshfs")

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: states(self.process.pid) == {"T"}, "sshfs stops")

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_SECONDS)

    def let_go(self) -> None:
        """Takes the dead mount away, so that another one can take its place."""
        subprocess.run(["fusermount3", "-uz", str(self.near)], capture_output=True, timeout=DEADLINE_SECONDS)

    def drop_connection(self) -> None:
        """Kills the SFTP server; what becomes of sshfs is its own affair."""
        server = int(self._started.read_text().split()[-1])
        # If it is gone, its number may be another's by now.
        assert os.path.basename(os.readlink(f"/proc/{server}/exe")) == "sftp-server", "there is no connection to be lost"
        os.kill(server, signal.SIGKILL)

    def remove(self) -> None:
        self.thaw()
        self.let_go()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()


class FarMount(Mount):
    """A mount of an sshfs. `at(name)` is a path of the mount, `there(name)` where that is, seen without sshfs."""

    def __init__(self, base: Path, options: tuple[str, ...], sshfs_options: tuple[str, ...]) -> None:
        self.sshfs = Sshfs(base, *sshfs_options)
        super().__init__(base, "off", options, None)
        self.announce("has not answered|answers again|is not there|cannot write to the backing|not written|closing a file")

    def at(self, name: str) -> Path:
        return self.path / name

    def there(self, name: str) -> Path:
        return self.sshfs.remote / name

    def figures(self) -> Any:
        return self.ask("status")["statistics"]

    @property
    def lost(self) -> bool:
        return bool(self.figures()["backing"]["lost"])

    def threads_that_hang(self) -> set[str]:
        """What is in a sleep that no signal ends, of the daemon and of sshfs."""
        return {f"{pid}" for pid in (self.process.pid, self.sshfs.process.pid) if "D" in states(pid)}


@contextlib.contextmanager
def far_mount(*options: str, sshfs: tuple[str, ...] = ()) -> Iterator[FarMount]:
    """A FarMount; nothing of it is left afterwards, whatever happened."""
    if not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        pytest.skip("no FUSE here: /dev/fuse or fusermount3 is missing")
    if shutil.which("sshfs") is None or not any(map(os.path.exists, SFTP_SERVERS)):
        pytest.skip("sshfs or sftp-server is missing: bash scripts/setup.sh test")
    base = Path(tempfile.mkdtemp(prefix="cachefs-far-"))
    base.chmod(0o755)
    mount: FarMount | None = None
    try:
        mount = FarMount(base, options, sshfs)
        yield mount
        if mount.process.poll() is None:
            mount.unmount()
    finally:
        subprocess.run(["fusermount3", "-uz", str(base / "mnt")], capture_output=True, timeout=DEADLINE_SECONDS)
        if mount is not None:
            mount.sshfs.remove()
            mount.remove()
        shutil.rmtree(base)


def states(pid: int) -> set[str]:
    """The states of a process's threads, as in ps(1); empty when it is gone."""
    found = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found.add(Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0])
    return found


def in_time(function: Callable[[], Any]) -> Callable[[], tuple[Any, float]]:
    """Does it in a process of its own, which may hang; the result of that: what came of it, and after how many seconds."""

    def timed() -> tuple[Any, float]:
        start = time.monotonic()
        return outcome(function), time.monotonic() - start

    return forked(timed)
