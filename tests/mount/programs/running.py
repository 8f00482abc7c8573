"""What the tests of real programs share: running them, and holding what they left against the directory behind the mount."""

import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CACHE_BYTES = 64 << 20
WORKERS = Path(__file__).with_name("workers.py")
PATIENCE_SECONDS = 150.0  # less than pytest's own limit, so that the message names the program

# type, mode, links, then what there is of size, mtime_ns and contents
Entry = tuple[str | int, ...]


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """The standard output of a program that must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        capture_output=True,
        text=True,
        errors="backslashreplace",
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    output = f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, output
    return done.stdout


def worker(name: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs the function `name` of workers.py; what it prints is its result."""
    command = [sys.executable, str(WORKERS), name, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(processes: Sequence[subprocess.Popen[str]], patience_seconds: float = PATIENCE_SECONDS) -> list[str]:
    """What workers printed; all must succeed, and none outlives this call."""
    deadline = time.monotonic() + patience_seconds
    outputs = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            assert process.returncode == 0, f"{process.args!r}: status {process.returncode}\n{output[-8000:]}"
            outputs.append(output)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
    return outputs


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(root: Path) -> dict[str, Entry]:
    """Everything below `root` by relative path: kind, mode, links, and size, mtime and contents where it has them."""
    found: dict[str, Entry] = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(directory, name)
            st = os.lstat(path)
            entry: Entry = (stat.filemode(st.st_mode),)
            if stat.S_ISREG(st.st_mode):
                entry += (st.st_nlink, st.st_size, st.st_mtime_ns, sha256(path))
            elif stat.S_ISLNK(st.st_mode):
                entry += (os.readlink(path),)
            found[os.path.relpath(path, root)] = entry
    return found


def differences(ours: dict[str, Entry], theirs: dict[str, Entry]) -> list[str]:
    """Readable lines; no line where the manifests are the same."""
    paths = sorted(ours.keys() | theirs.keys())
    return [f"{p}: {ours.get(p)} != {theirs.get(p)}" for p in paths if ours.get(p) != theirs.get(p)]


class ProgramMount:
    """A mount that programs run on, with a cache of `CACHE_BYTES`. `mount` is what the fixture `mounted` makes."""

    def __init__(self, mount: Any) -> None:
        self.mount = mount
        self.mountpoint: Path = mount.path
        self.source: Path = mount.source
        self.kernel_cache: str = mount.kernel_cache
        self._unmounted = False

    def sync(self) -> None:
        assert self.mount.ask("sync")["unwritten"] == []

    def unmount(self) -> None:
        """Unmounts, once; what was to be seen there must be in the directory behind it, and the log must be clean."""
        if self._unmounted:
            return
        self._unmounted = True
        self.sync()
        seen = manifest(self.mountpoint)
        self.mount.unmount()
        assert differences(seen, manifest(self.source)) == []
