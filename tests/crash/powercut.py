"""A disk whose every write is recorded, and the states in which a power cut could have left it.

The disk is an ext4 on a loop device. What it was sent before the last flush is there after a cut; of what came later, each
4 KiB block may be there or not. Needs root, /dev/fuse and loop devices.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from daemons import DEADLINE_SECONDS, PLAIN_ENVIRONMENT, ROOT, wait_until
from recorder import EVENT, FLUSH

DISK_BYTES = 256 << 20
BLOCK = 4096
KEPT_SHARES = (0.0, 0.2, 0.5, 0.8, 1.0)  # of the blocks that no flush covers


def why_not() -> str | None:
    """Why there can be no recorded disk here, or None."""
    if os.geteuid() != 0:
        return "needs root for loop devices"
    missing = [name for name in ("losetup", "mkfs.ext4", "mount", "umount", "fusermount3") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            return f"no {device} here"
    return None


class Event(NamedTuple):
    """What the disk was asked: a write, or a flush if there is no data."""

    time_ns: int
    offset: int
    data: bytes


class Disk:
    """The recorded disk, mounted on `path` inside the context `recording`; afterwards `cut` gives its possible states."""

    def __init__(self, base: Path) -> None:
        self.base, self.path = base, base / "disk"
        self.empty, self._image, self._log, self._fuse = base / "empty", base / "image", base / "events", base / "fuse"
        base.mkdir()
        for directory in (self.path, self._fuse):
            directory.mkdir()
        with self.empty.open("wb") as file:
            file.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-J", "size=8", str(self.empty))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        copy_sparse(self.empty, self._image)
        words = [sys.executable, str(Path(__file__).with_name("recorder.py")), self._image, self._fuse, self._log]
        recorder = subprocess.Popen(words, env={**PLAIN_ENVIRONMENT, "PYTHONPATH": str(ROOT)})
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not (self._fuse / "image").exists():
                assert recorder.poll() is None and time.monotonic() < deadline, "the recorder does not start"
                time.sleep(0.01)
            with mounted(self._fuse / "image", self.path):
                yield
        finally:
            subprocess.run(["fusermount3", "-uz", self._fuse], check=False, timeout=DEADLINE_SECONDS)
            recorder.wait(DEADLINE_SECONDS)

    def events(self) -> list[Event]:
        data, at = self._log.read_bytes(), 0
        found = []
        while at < len(data):
            time_ns, offset, length = EVENT.unpack_from(data, at)
            at += EVENT.size
            found.append(Event(time_ns, offset, data[at : at + length]))
            at += length
        return found

    def cuts(self, moments: list[int], source: random.Random) -> Iterator[tuple[int, Path]]:
        """For each moment (ns, ascending) the image after a power cut; it is good until the next one."""
        events = self.events()
        durable = self.base / "durable"
        copy_sparse(self.empty, durable)
        done = 0
        for number, moment in enumerate(moments):
            stop = next((i for i, event in enumerate(events) if event.time_ns > moment), len(events))
            flushed = max((i for i in range(done, stop) if events[i].offset == FLUSH), default=done)
            with durable.open("r+b", buffering=0) as file:
                for event in events[done:flushed]:
                    write(file.fileno(), event, 1.0, source)
            done = flushed
            image = self.base / f"cut{number}"  # never the same file again: the kernel may not be done with the last one
            copy_sparse(durable, image)
            share = source.choice(KEPT_SHARES)
            with image.open("r+b", buffering=0) as file:
                for event in events[done:stop]:
                    write(file.fileno(), event, share, source)
            yield moment, image
            image.unlink()


def write(fd: int, event: Event, share: float, source: random.Random) -> None:
    """Does a write to an image, each of its blocks with the probability `share`."""
    if event.offset == FLUSH:
        return
    for start in range(0, len(event.data), BLOCK):
        if source.random() < share:
            os.pwrite(fd, event.data[start : start + BLOCK], event.offset + start)


@contextlib.contextmanager
def mounted(image: Path, path: Path) -> Iterator[None]:
    """The ext4 in an image, mounted on `path`."""
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        run("mount", "-t", "ext4", "-o", "nodiscard,noatime", device, str(path))
        try:
            yield
        finally:
            run("umount", str(path))
    finally:
        run("losetup", "--detach", device)
        wait_until(lambda: not Path(f"/sys/block/{Path(device).name}/loop").exists(), f"{device} to be free")


def copy_sparse(old: Path, new: Path) -> None:
    run("cp", "--sparse=always", "--reflink=auto", str(old), str(new))


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
