"""The fast lane and pyfuse3 in its place: the same answers, the same figures, and neither is busy when nothing happens."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachefs.transport.cpulatency import DEVICE, DRIVER, limit_microseconds
from mounts import Factory, Mount, wait_until
from twin import Twin, opened, outcome

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
both = pytest.mark.parametrize("lane", ["on", "off"])

KIB, MIB = 1 << 10, 1 << 20


def one_of_everything() -> list[Any]:
    """A call of each kind that reaches the daemon, and what it answered."""
    rng = random.Random(5)
    seen: list[Any] = []

    def do(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = outcome(function, *args, **options)
        seen.append((function.__name__, result))
        return result

    os.mkdir("d", 0o751)
    with opened("f", os.O_RDWR | os.O_CREAT, 0o640) as fd:
        for _ in range(60):
            data = rng.randbytes(rng.choice((1, 100, 4096, 70000, MIB)))
            seen.append(os.pwrite(fd, data, rng.randrange(3 * MIB)))
            seen.append(os.pread(fd, rng.choice((1, 4096, MIB)), rng.randrange(3 * MIB)))
        do(os.ftruncate, fd, 100_001)
        do(os.fsync, fd)
        do(os.fdatasync, fd)
        do(os.pread, fd, MIB, 99_000)
        with mmap.mmap(fd, 100_001) as memory:
            memory[70_000:70_005] = b"store"
            memory.flush()
        do(os.pread, fd, 10, 69_998)
        do(lambda: os.fstat(fd).st_size)
    do(os.open, "f", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    do(os.open, "none", os.O_RDONLY)
    with opened("f", os.O_WRONLY | os.O_TRUNC) as fd:
        os.write(fd, b"short")
    do(os.chmod, "f", 0o4711)
    do(os.chown, "f", 0, 0)
    do(os.utime, "f", ns=(-5, 10**18 + 7))
    do(lambda: (os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns, os.stat("f").st_mode))
    do(os.mknod, "fifo", 0o600 | 0o010000)
    do(os.symlink, "../somewhere/" + "x" * 3000, "link")
    do(os.readlink, "link")
    do(os.link, "f", "d/g")
    do(os.rename, "d/g", "h")
    do(os.rename, "h", "d/h")
    do(os.unlink, "d/h")
    do(os.unlink, "d/h")
    do(os.rmdir, "d")
    do(os.rmdir, "fifo")
    do(os.setxattr, "f", "user.x", b"value\0" * 100)
    do(os.setxattr, "f", "user.x", b"other", os.XATTR_CREATE)
    do(os.setxattr, "f", "user.y", b"other", os.XATTR_REPLACE)
    do(os.getxattr, "f", "user.x")
    do(os.getxattr, "f", "user.none")
    do(lambda: [name for name in os.listxattr("f") if name.startswith("user.")])
    do(os.removexattr, "f", "user.x")
    do(os.removexattr, "f", "user.x")
    do(lambda: os.statvfs(".").f_namemax)
    for i in range(1500):
        Path(f"name-{i:04}-{'y' * (i % 50)}").touch()
    do(lambda: sorted(os.listdir(".")))
    do(lambda: sorted((entry.name, entry.is_file()) for entry in os.scandir(".")))
    return seen


@both
def test_every_kind_of_request_is_answered_as_on_ext4(mounted: Factory, lane: str) -> None:
    mount = mounted("--fast-lane", lane)
    (mount.base / "plain").mkdir()
    Twin(mount.base / "plain" / "t", mount.path / "t", mount.source / "t").same(one_of_everything)


def test_requests_are_counted_and_timed_the_same_way(mounted: Factory) -> None:
    """But for what depends on when it comes: pages that the kernel reads ahead, attributes that have become old."""
    counts = []
    for lane in ("on", "off"):
        mount = mounted("--fast-lane", lane, "--metadata-ttl", "1h")
        os.mkdir(mount.path / "t")
        before = os.getcwd()
        os.chdir(mount.path / "t")
        try:
            one_of_everything()
        finally:
            os.chdir(before)
        durations: Any = mount.ask("status")["statistics"]["filesystem"]["durations"]  # type: ignore[index]
        counts.append({op: sum(found["counts"]) for op, found in durations.items()})
        assert all(found["total_seconds"] > 0 for found in durations.values() if sum(found["counts"]))
    ours, theirs = counts
    assert ours == theirs
    assert min(ours[op] for op in ("read", "write", "lookup", "create", "setattr", "readdir", "flush", "release")) > 0


@both
def test_many_processes_at_once(mounted: Factory, lane: str) -> None:
    mount = mounted("--fast-lane", lane, "--cache-size", "1M")
    script = """
import os, random, sys
rng = random.Random(int(sys.argv[2]))
name = sys.argv[1] + "/f" + sys.argv[2]
image = bytearray(1 << 20)
fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(fd, len(image))
for _ in range(400):
    at = rng.randrange(len(image) - 70000)
    if rng.random() < 0.5:
        data = rng.randbytes(rng.choice((10, 4096, 70000)))
        image[at : at + len(data)] = data
        assert os.pwrite(fd, data, at) == len(data)
    else:
        assert os.pread(fd, 70000, at) == image[at : at + 70000], at
    if rng.random() < 0.02:
        os.fsync(fd)
"""
    running = [subprocess.Popen([sys.executable, "-c", script, str(mount.path), str(i)]) for i in range(8)]
    assert [process.wait(80) for process in running] == [0] * 8


def cpu_seconds(mount: Mount) -> float:
    """What the daemon's threads have run since they began."""
    tasks = Path(f"/proc/{mount.process.pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


@both
def test_nothing_is_burnt_when_nothing_happens(mounted: Factory, lane: str) -> None:
    mount = mounted("--fast-lane", lane)
    with opened(mount.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        for i in range(2000):  # whoever looks for more requests is sure of them now
            os.pwrite(fd, b"x" * 4096, i % 100 * 4096)
            os.pread(fd, 4096, i % 100 * 4096)
        os.fsync(fd)
    wait_until(lambda: not mount.ask("status")["statistics"]["writeback"]["dirty_bytes"], "nothing dirty")  # type: ignore[index]
    least = 1.0
    for _ in range(3):  # others may make it a little busy: the best of three counts
        before, start = cpu_seconds(mount), time.monotonic()
        threading.Event().wait(3)
        least = min(least, (cpu_seconds(mount) - before) / (time.monotonic() - start))
        if least < 0.001:
            break
    assert least < 0.002  # of a processor


def times_asleep(mount: Mount) -> int:
    """How often the daemon's main thread has gone to sleep."""
    status = Path(f"/proc/{mount.process.pid}/task/{mount.process.pid}/status").read_text()
    return int(status.split("voluntary_ctxt_switches:")[1].split()[0])


@both
def test_an_idle_mount_is_not_woken_up_and_goes_on_when_it_is_used(mounted: Factory, lane: str) -> None:
    mount = mounted("--write-through", "off", "--dirty-expire", "1s", "--fast-lane", lane)
    path = mount.path / "f"
    path.write_bytes(b"x" * 100_000)

    def sleeps_on() -> bool:
        before = times_asleep(mount)
        threading.Event().wait(4)
        return times_asleep(mount) == before

    assert sleeps_on() or sleeps_on() or sleeps_on(), "nobody asks for anything"
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"y" * 200_000, 0)
    wait_until(lambda: (mount.source / "f").read_bytes() == b"y" * 200_000, "it is written back")


def test_on_one_processor_reader_and_daemon_share_it(mounted: Factory) -> None:
    """A daemon that kept looking would take the time that the reader needs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        mount = mounted()
        (mount.path / "f").write_bytes(bytes(MIB))
        with opened(mount.path / "f", os.O_RDONLY) as fd:
            start = cpu_seconds(mount)
            for i in range(5000):
                assert len(os.pread(fd, 4096, i % 256 * 4096)) == 4096
            assert (cpu_seconds(mount) - start) / 5000 < 0.0002
    finally:
        os.sched_setaffinity(0, before)


@both
def test_a_killed_reader_takes_nobody_along(mounted: Factory, lane: str) -> None:
    """Its READ waits for SOURCE when it is killed; others go on, and the answer that nobody wants does no harm."""
    mount = mounted("--fast-lane", lane, "--simulate-latency", "300ms", "--readahead-max", "0")
    (mount.source / "f").write_bytes(random.Random(1).randbytes(MIB))
    reader = subprocess.Popen([sys.executable, "-c", f"open({str(mount.path / 'f')!r}, 'rb', 0).read(100)"])
    wait_until(lambda: mount.ask("status")["statistics"]["filesystem"]["open_handles"] == 1, "an open file")  # type: ignore[index]
    reader.send_signal(signal.SIGINT)
    reader.kill()
    reader.wait(60)
    wait_until(lambda: mount.ask("status")["statistics"]["filesystem"]["open_handles"] == 0, "no open file")  # type: ignore[index]
    assert (mount.path / "f").read_bytes() == (mount.source / "f").read_bytes()


@pytest.mark.skipif(
    not os.access(DEVICE, os.W_OK) or limit_microseconds(DRIVER, len(os.sched_getaffinity(0))) is None,
    reason="processors cannot be kept ready here",
)
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_processors_are_kept_ready_for_requests_in_a_row_and_for_nothing_else(mounted: Factory, mode: str) -> None:
    mount = mounted("--cpu-latency", mode)
    (mount.path / "f").write_bytes(b"x" * MIB)

    def ready_seconds() -> float:
        seconds: float = mount.ask("status")["statistics"]["filesystem"]["ready_seconds"]  # type: ignore[index]
        return seconds

    def burst() -> tuple[float, float]:
        """Seconds that 2,000 requests took, and for how many of these processors were ready."""
        before, start = ready_seconds(), time.monotonic()
        with opened(mount.path / "f", os.O_RDONLY) as fd:
            for i in range(2000):
                os.pread(fd, 4096, i % 256 * 4096)
        passed = time.monotonic() - start
        return passed, ready_seconds() - before

    bursts = [burst() for _ in range(10)]
    if mode == "off":
        assert not any(held for _, held in bursts)
        return
    assert all(held < passed + 0.1 for passed, held in bursts)
    # Not all of them: on a processor that both have to share, the daemon never sleeps, as there always is a request.
    assert any(passed / 10 < held for passed, held in bursts)
    wait_until(lambda: ready_seconds() == ready_seconds(), 10)
    still = ready_seconds()
    time.sleep(0.3)  # in which nothing is to happen
    assert ready_seconds() == still
