"""Two sides that change files a thousand times, and at random moments."""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mounts import Factory, Mount, wait_until
from sides import KEPT, LATER, PAGE, conflicts_of, copies
from twin import opened, outcome

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]


# --- a thousand


@dataclass
class Side:
    """One file of the test below: its contents as the mount has them, and every version that must be somewhere."""

    name: str
    contents: bytes
    copies: list[bytes] = field(default_factory=list)


def written(side: Side, rng: random.Random, fd: int) -> None:
    """Something that a program on the mount writes."""
    data = rng.randbytes(rng.randrange(1, 3 * PAGE))
    offset = rng.choice((0, rng.randrange(len(side.contents) + 1), len(side.contents)))
    if rng.random() < 0.2:
        os.ftruncate(fd, 0)
        side.contents, offset = b"", 0
    os.pwrite(fd, data, offset)
    side.contents = side.contents[:offset].ljust(offset, b"\0") + data + side.contents[offset + len(data) :]


def changed_in_place(path: Path, rng: random.Random) -> bytes:
    """Something that somebody else writes to the file in SOURCE; what it has then."""
    old = path.read_bytes()
    with opened(os.fspath(path), os.O_RDWR) as fd:
        match rng.randrange(4):
            case 0:
                os.ftruncate(fd, 0)
                os.pwrite(fd, rng.randbytes(rng.randrange(1, 5 * PAGE)), 0)
            case 1:
                os.pwrite(fd, rng.randbytes(500), len(old))
            case 2:
                os.ftruncate(fd, len(old) // 2)
            case 3:
                os.pwrite(fd, rng.randbytes(100), rng.randrange(len(old) + 1))
    return path.read_bytes()


def whole_pages(old: bytes, new: bytes, theirs: bytes) -> bytes:
    """What the file has once the pages that changed from `old` to `new` were written over `theirs`: our size, our pages."""
    result = bytearray(theirs[: len(new)].ljust(len(new), b"\0"))
    for start in range(0, len(new), PAGE):
        if old[start : start + PAGE] != new[start : start + PAGE]:
            result[start : start + PAGE] = new[start : start + PAGE]
    return bytes(result)


@pytest.mark.timeout(180)
def test_1000_conflicting_changes_lose_no_byte_of_either_side_and_are_all_counted(mounted: Factory) -> None:
    mount = mounted(*LATER, "--metadata-ttl", "0s")
    mount.announce(KEPT)
    rng = random.Random(5)
    sides = [Side(f"file{i}", rng.randbytes(rng.randrange(1, 6 * PAGE))) for i in range(100)]
    for side in sides:
        (mount.source / side.name).write_bytes(side.contents)
    for _ in range(10):
        for side in sides:
            one_conflict(mount, side, rng)
        assert mount.ask("sync")["unwritten"] == []
        for side in sides:
            path = mount.source / side.name
            if path.exists():
                assert path.read_bytes() == side.contents == (mount.path / side.name).read_bytes()
            else:
                assert not (mount.path / side.name).exists()
                path.write_bytes(side.contents)
    found: dict[str, list[bytes]] = {side.name: [] for side in sides}
    for name, contents in copies(mount).items():
        found[name.split(".")[0]].append(contents)
    for side in sides:
        assert sorted(found[side.name]) == sorted(side.copies)
    assert conflicts_of(mount)["total"] == 1000 == sum(map(len, found.values()))


def one_conflict(mount: Mount, side: Side, rng: random.Random) -> None:
    """A change on each side; notes what must be where once all is written."""
    path = mount.source / side.name
    with opened(os.fspath(mount.path / side.name), os.O_RDWR) as fd:
        before = side.contents
        assert os.pread(fd, 1 << 20, 0) == before
        written(side, rng, fd)
        match rng.randrange(6):
            case 0:
                path.unlink()
                side.copies.append(side.contents)
            case 1:
                (mount.source / "new").write_bytes(rng.randbytes(rng.randrange(1, 3 * PAGE)))
                (mount.source / "new").rename(path)
                side.copies.append(side.contents)
                side.contents = path.read_bytes()
            case _:
                theirs = changed_in_place(path, rng)
                side.copies.append(theirs)
                old = before if path.stat() else b""
                side.contents = whole_pages(old, side.contents, theirs)


# --- at random moments


@dataclass
class Race:
    """One file in which both sides write, each at places of its own but in the same pages."""

    path: Path
    source: Path
    ours: list[bytes] = field(default_factory=list)
    theirs: list[bytes] = field(default_factory=list)
    over: bool = False

    def write_theirs(self, seed: int, times: int) -> None:
        rng = random.Random(seed)
        for i in range(times):
            time.sleep(rng.random() * 0.2)
            token = b"theirs %05d;" % i
            with opened(os.fspath(self.source), os.O_RDWR) as fd:
                os.pwrite(fd, token, 32 * i)
            self.theirs.append(token)
        self.over = True

    def write_ours(self, seed: int) -> None:
        rng = random.Random(seed)
        with opened(os.fspath(self.path), os.O_RDWR) as fd:
            while not self.over:
                token = b"ours %05d;" % len(self.ours)
                os.pwrite(fd, token, 32 * len(self.ours) + 16)
                self.ours.append(token)
                if rng.random() < 0.5:
                    assert outcome(os.fsync, fd) in (None, "EBUSY")
                time.sleep(rng.random() * 0.004)


@pytest.mark.parametrize("through", ["off", "auto"])
def test_two_sides_that_write_at_random_moments_lose_nothing(mounted: Factory, through: str) -> None:
    """Written back all the time, and theirs opened for each write, so that there is no moment to slip through."""
    at_once = ("--dirty-expire", "0s", "--writeback-interval", "10ms")
    mount = mounted("--metadata-ttl", "0s", *at_once, "--write-through", through)
    for line in (KEPT, "EBUSY"):
        mount.announce(line)
    races = [Race(mount.path / f"file{i}", mount.source / f"file{i}") for i in range(6)]
    threads = []
    for i, race in enumerate(races):
        race.source.write_bytes(b"-" * 65_536)
        threads.append(threading.Thread(target=race.write_theirs, args=(i, 40)))
        threads.append(threading.Thread(target=race.write_ours, args=(i,)))
    with opened(os.fspath(races[0].source), os.O_RDWR) as probe:
        if outcome(fcntl.fcntl, probe, fcntl.F_SETLEASE, fcntl.F_WRLCK) != 0:
            pytest.skip("this file system has no leases: a change in the moment of our write may be overwritten")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: not mount.ask("sync")["unwritten"], "writeback")
    kept = copies(mount)
    for race in races:
        versions = [race.source.read_bytes(), *(data for name, data in kept.items() if name.startswith(race.source.name + "."))]
        assert not [token for token in race.theirs if not any(token in version for version in versions)]
        assert not [token for token in race.ours if token not in versions[0]]
    assert conflicts_of(mount)["total"] == len(kept)
    assert through == "auto" or len(kept) > 20
