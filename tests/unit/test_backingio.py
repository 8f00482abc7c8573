"""What is asked of a store that is far away: no call more than needed."""

import os
from pathlib import Path

import pytest

from backing.directory import DirectoryBacking
from backing.latency import LatencyBacking
from cachefs.backingio import read_fully

LATENCY_SECONDS = 1.0


class Distant:
    """A store behind a line whose waits are counted, not waited for."""

    def __init__(self, top: Path) -> None:
        self.waits = 0
        self.backing = LatencyBacking(
            DirectoryBacking(str(top), blocking=False), LATENCY_SECONDS, sleep=self._sleep, clock=lambda: 0.0
        )
        self.root = self.backing.open_root()
        self.waits = 0

    def _sleep(self, seconds: float) -> None:
        self.waits += 1


@pytest.fixture
def distant(tmp_path: Path) -> Distant:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    return Distant(tmp_path)


def test_open_and_attributes_are_one_exchange(distant: Distant) -> None:
    fd, st = distant.backing.open_stat(distant.root, b"file", os.O_RDONLY)
    assert distant.waits == 1
    assert os.fstat(fd) == st
    os.close(fd)


def test_refused_open_stat_leaves_no_descriptor_open(distant: Distant) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        distant.backing.open_stat(distant.root, b"other", os.O_RDONLY)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("enough_bytes", "calls"), [(5000, 1), (5001, 2), (1, 1), (0, 0)])
def test_end_that_is_known_is_not_asked_for(distant: Distant, enough_bytes: int, calls: int) -> None:
    fd = distant.backing.open(distant.root, b"file", os.O_RDONLY)
    distant.waits = 0
    buffer = bytearray(8192)
    nbytes = read_fully(distant.backing, fd, [memoryview(buffer)], 0, enough_bytes)
    assert (nbytes, distant.waits) == (5000 if calls else 0, calls)
    assert buffer.startswith(b"x" * nbytes)
    os.close(fd)
