"""The real command in a place of its own: a SOURCE, a MOUNTPOINT, its own state and runtime directory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from cachefs import mountinfo
from mounts import NOT_INHERITED

ROOT = Path(__file__).parents[3]
DEADLINE_SECONDS = 60.0
NOBODY = 65534
CACHEFS = "from cachefs.cli import main; main()"
# A user may not be able to read this Python and this project, so they are loaded before root becomes one. A process that
# changes its user loses its own /proc entries, which execve() would have given back.
CACHEFS_AS_NOBODY = f"""
import ctypes, os
import encodings.ascii, encodings.idna
from cachefs.cli import main
import cachefs.mount
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE
main()
"""
POLL_SECONDS = 0.01
FAST_LANE = os.environ.get("CACHEFS_TEST_FAST_LANE", "on")
Done = subprocess.CompletedProcess[str]


def wait_until(true: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Looks again and again; fails when the time is over."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(POLL_SECONDS)


def ended(pid: int) -> bool:
    """Whether the process is gone, or dead and only waiting for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go while it is looked at
        return True


def is_mounted(path: Path) -> bool:
    return mountinfo.top_mount(str(path)) is not None


class Command:
    """Runs `cachefs`; what it left running or mounted is ended by `remove`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.source, self.path = self.directory("source"), self.directory("mnt")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
        self.environment = {
            **inherited, "CACHEFS_RUNTIME_DIR": str(base / "run"), "CACHEFS_CHECK": "1", "PYTHONPATH": str(ROOT),
            "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        self.processes: list[subprocess.Popen[str]] = []

    def directory(self, name: str) -> Path:
        path = self.base / name
        path.mkdir()
        return path

    @property
    def options(self) -> list[str]:
        """What keeps a mount apart from all others."""
        return ["--state-dir", str(self.base / "state"), "--metrics", "127.0.0.1:0", "--fast-lane", FAST_LANE]

    def words(self, *arguments: object, program: str = CACHEFS) -> list[str]:
        return [sys.executable, "-c", program, *map(str, arguments)]

    def run(self, *arguments: object, program: str = CACHEFS, timeout: float = DEADLINE_SECONDS, **more: Any) -> Done:
        """The command, to its end."""
        return self.call(*self.words(*arguments, program=program), timeout=timeout, **more)

    def give_to_nobody(self) -> None:
        """Makes SOURCE, MOUNTPOINT and what the daemon keeps the property of the user of CACHEFS_AS_NOBODY."""
        for directory in (self.source, self.path, self.directory("run"), self.directory("state")):
            os.chown(directory, NOBODY, NOBODY)

    def call(self, *words: str | Path, timeout: float = DEADLINE_SECONDS, **more: Any) -> Done:
        """Any program, with the environment that the command has."""
        more.setdefault("env", self.environment)
        more.setdefault("cwd", self.base)
        return subprocess.run(
            [str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="surrogateescape", timeout=timeout, check=False, **more,
        )  # fmt: skip

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """A program that goes on; killed at the end of the test if it is still there."""
        environment = {**self.environment, **more.pop("env", {})}
        process = subprocess.Popen(
            words, env=environment, cwd=self.base, text=True, stdin=more.pop("stdin", subprocess.DEVNULL),
            stdout=more.pop("stdout", subprocess.PIPE), stderr=more.pop("stderr", subprocess.PIPE), **more,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def mount(self, *options: object) -> int:
        """Mounts SOURCE in the background, without a word, and gives the daemon's pid."""
        done = self.run("mount", self.source, self.path, *self.options, *options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
        return int(self.record()["pid"])

    def foreground(self, *options: object) -> subprocess.Popen[str]:
        """A daemon that does not leave; returns when its mountpoint is there."""
        words = self.words("mount", self.source, self.path, "--foreground", *self.options, *options)
        with (self.base / "stderr").open("ab") as log:
            process = self.start(*words, stdout=log, stderr=log)
        wait_until(lambda: process.poll() is not None or self.phase() == "serving", "the mount")
        assert process.poll() is None, self.log_text()
        return process

    def record(self) -> Mapping[str, Any]:
        """What the daemon of MOUNTPOINT says of itself; nothing where there is none."""
        for path in (self.base / "run").glob("*.json"):
            with contextlib.suppress(OSError):
                record = json.loads(path.read_text())
                if record["mountpoint"] == str(self.path):
                    return dict(record)
        return {}

    def phase(self) -> str:
        return str(self.record().get("phase"))

    def status(self, path: Path | None = None) -> Mapping[str, Any]:
        done = self.run("status", path or self.path, "--json")
        assert done.returncode == 0, done
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer

    def umount(self, *options: object) -> Done:
        return self.run("umount", self.path, *options)

    def umount_well(self) -> None:
        done = self.umount()
        assert (done.returncode, done.stderr) == (0, ""), done
        self.nothing_left()

    def nothing_left(self) -> None:
        assert not is_mounted(self.path)
        assert list((self.base / "run").iterdir()) == []

    def plan(self, *rules: Mapping[str, object]) -> Path:
        """Makes `rules` the faults of SOURCE; a mount with --fault-plan sees the change at once."""
        path = self.base / "plan.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(rules))
        new.rename(path)
        return path

    def log_text(self) -> str:
        logs = [self.base / "stderr", *(self.base / "state").glob("*/cachefs.log")]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def remove(self) -> None:
        """Ends all that the test left."""
        for mount in mountinfo.mounts():
            if mount.mountpoint.startswith(str(self.base) + "/"):
                with contextlib.suppress(Exception):
                    mountinfo.detach(mount.mountpoint)
        for record in (self.base / "run").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.communicate()


def one_line(done: Done, status: int) -> str:
    """The one line of an error that a user reads; fails if there is more, less or anything but it."""
    assert done.returncode == status, done
    assert done.stdout == "", done
    assert done.stderr.startswith("cachefs: "), done
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done
    return done.stderr


def output_of_terminal(master: int, process: subprocess.Popen[Any]) -> str:
    """What the process writes to the terminal that it has, until it ends."""
    seen = b""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if wait([master], POLL_SECONDS):
            try:
                seen += os.read(master, 65536)
            except OSError:  # nobody has the other end open any more
                break
        elif process.poll() is not None:
            break
    return seen.decode()
