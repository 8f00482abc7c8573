"""File systems under test: each mounted by a process of its own, measured from outside, and taken away whatever happens."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 30.0
HERE = Path(__file__).resolve().parent


@dataclass
class Mounted:
    """A mount and the process behind it."""

    path: Path
    source: Path | None
    pid: int
    environment: dict[str, str]

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def statistics(self) -> dict:
        """What it counted."""
        return self.status()["statistics"]

    def status(self) -> dict:
        """What `cachefs status --json` says."""
        command = [sys.executable, "-m", "cachefs", "status", str(self.path), "--json"]
        out = subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=30).stdout
        return json.loads(out)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory of our own, removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="cachefs-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def floor(work: Path) -> Iterator[Mounted]:
    with _running(work, [sys.executable, str(HERE / "floor.py"), str(_mountpoint(work))], None) as mounted:
        yield mounted


@contextlib.contextmanager
def cachefs(work: Path, source: Path, *options: str, program: tuple[str, ...] = ("-m", "cachefs")) -> Iterator[Mounted]:
    command = [sys.executable, *program, "mount", str(source), str(_mountpoint(work)), "--foreground"]
    command += ["--state-dir", str(work / "state"), "--metrics", "127.0.0.1:0", *options]
    with _running(work, command, source) as mounted:
        yield mounted


def _mountpoint(work: Path) -> Path:
    path = work / "mnt"
    path.mkdir(exist_ok=True)
    return path


@contextlib.contextmanager
def _running(work: Path, command: list[str], source: Path | None) -> Iterator[Mounted]:
    path = work / "mnt"
    environment = {**os.environ, "CACHEFS_RUNTIME_DIR": str(work / "run"), "PYTHONPATH": str(HERE.parent)}
    with open(work / "log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not os.path.ismount(path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[1:4]} did not mount:\n{(work / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield Mounted(path, source, process.pid, environment)
    finally:
        subprocess.run(["umount", str(path)], check=False, capture_output=True)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
