"""A SOURCE that is full for a while: who is told, what is kept, and that it all gets there when there is room again."""

import json
import os
import subprocess
import sys
import time

import numpy
import pytest
from command import Command, wait_until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(150),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system to be SOURCE"),
]
MIB = 1 << 20
# Appends to files in turn, block after block, each 8 bytes their own place, syncs and closes now and then, and goes on until
# everything is written. What failed is tried again a little later. Tells what was acknowledged, and which call failed how.
WRITER = """
import collections, errno, json, os, sys, time
import numpy
directory, marker, files, total, block = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
def contents(number, start, end):
    return (numpy.arange(start, end, 8, dtype="<u8") | numpy.uint64(number << 48)).tobytes()
acknowledged = [0] * files
failures = collections.Counter()
def failed(call, error):
    failures[call + " " + errno.errorcode[error.errno]] += 1
    if not os.path.exists(marker):
        open(marker, "w").close()
    time.sleep(0.02)
handles = [os.open(f"{directory}/{number}", os.O_WRONLY | os.O_CREAT) for number in range(files)]
turn = 0
while sum(acknowledged) < total * files:
    number = turn = (turn + 1) % files
    at = acknowledged[number]
    if at == total:
        continue
    data = contents(number, at, min(at + block, total))
    try:
        written = os.write(handles[number], data)
    except OSError as error:
        failed("write", error)
        continue
    if written % 8:
        os.lseek(handles[number], at + written // 8 * 8, os.SEEK_SET)
    acknowledged[number] += written // 8 * 8
    if acknowledged[number] // block % 16 == number % 16:
        try:
            os.fsync(handles[number])
        except OSError as error:
            failed("fsync", error)
    if acknowledged[number] // block % 16 == (number + 8) % 16:
        try:
            os.close(handles[number])
        except OSError as error:
            failed("close", error)
        handles[number] = os.open(f"{directory}/{number}", os.O_WRONLY)
        os.lseek(handles[number], acknowledged[number], os.SEEK_SET)
print(json.dumps([acknowledged, failures]))
"""


def contents(number: int, size: int) -> bytes:
    return (numpy.arange(0, size, 8, dtype="<u8") | numpy.uint64(number << 48)).tobytes()


@pytest.fixture
def small(cachefs: Command) -> Command:
    """SOURCE is a tmpfs of 48 MiB, of which 32 MiB are taken by a file. `Command.remove` unmounts it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48M,mode=755", "none", str(cachefs.source)], check=True, timeout=60)
    (cachefs.source / "filler").write_bytes(bytes(32 * MIB))
    return cachefs


def full_for_a_while(cachefs: Command, files: int, each: int, seconds: float, too_much: int | None = None) -> None:
    """Writes more than there is room for; makes room some seconds after the first error. Nothing acknowledged is missing.

    At most `too_much` bytes were acknowledged that there is no room for.
    """
    marker = cachefs.base / "full"
    words = [sys.executable, "-c", WRITER, cachefs.path, marker, files, each, MIB // 4]
    writer = cachefs.start(*map(str, words))
    wait_until(lambda: marker.exists() or writer.poll() is not None, "an error")
    assert writer.poll() is None, writer.communicate()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert writer.poll() is None
        time.sleep(0.1)
    if too_much is not None:
        done = cachefs.run("sync", cachefs.path)
        left = json.loads(cachefs.run("status", "--dirty", "--json").stdout)
        assert sum(entry["length"] for entry in left) <= too_much, done
    (cachefs.source / "filler").unlink()
    out, err = writer.communicate(timeout=120)
    assert writer.returncode == 0, err
    acknowledged, failures = json.loads(out)
    assert acknowledged == [each] * files
    assert failures and all(failure.split()[1] == "ENOSPC" for failure in failures), failures
    assert {failure.split()[0] for failure in failures} == {"write"} or too_much != 0, failures
    for number in range(files):
        assert (cachefs.path / str(number)).read_bytes() == contents(number, each)
    done = cachefs.run("sync", cachefs.path)
    assert (done.returncode, done.stderr) == (0, "")
    for number in range(files):
        assert (cachefs.source / str(number)).read_bytes() == contents(number, each)


def test_full_for_a_while_writers_are_told_at_once_and_what_was_acknowledged_gets_there(small: Command) -> None:
    small.mount("--dirty-limit", "8M", "--cache-size", "64M", "--dirty-expire", "100ms", "--writeback-interval", "50ms")
    full_for_a_while(small, 4, 10 * MIB, 2.0, too_much=0)
    small.umount_well()


def test_full_far_away_and_without_a_word_of_room_what_was_acknowledged_gets_there(small: Command) -> None:
    """The backing does not say what is free: writeback finds out."""
    plan = small.plan({"op": "statvfs", "errno": "EIO"})
    small.mount("--dirty-limit", "8M", "--cache-size", "64M", "--dirty-expire", "100ms", "--fault-plan", plan)
    full_for_a_while(small, 4, 10 * MIB, 2.0)
    small.umount_well()


def test_a_large_write_gets_what_there_is_room_for(small: Command) -> None:
    small.mount("--dirty-expire", "1h", "--write-through", "off")
    descriptor = os.open(small.path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        written = 0
        with pytest.raises(OSError, match="No space left on device"):
            while True:
                written += os.write(descriptor, bytes(MIB - 4096))
        assert 15 * MIB < written <= 16 * MIB
        os.lseek(descriptor, 0, os.SEEK_SET)
        assert os.write(descriptor, b"x" * MIB) == MIB, "what is there may be overwritten"
        os.fsync(descriptor)
        assert (small.source / "file").stat().st_size == written
        with pytest.raises(OSError, match="No space left on device"):
            os.pwrite(descriptor, bytes(8192), written)
        (small.source / "filler").unlink()
        assert os.pwrite(descriptor, bytes(8192), written) == 8192, "the refusal looks again"
    finally:
        os.close(descriptor)
    small.umount_well()


def test_a_file_that_is_removed_gives_its_room_back_at_once(small: Command) -> None:
    """Again and again 12 MiB, where there are 16."""
    small.mount("--dirty-expire", "1h", "--write-through", "off")
    for _ in range(10):
        (small.path / "temporary").write_bytes(bytes(12 * MIB))
        (small.path / "temporary").unlink()
    small.umount_well()


def test_a_source_that_becomes_read_only_refuses_all_writes_until_it_is_writable_again(small: Command) -> None:
    """By faults: a file system does not become read-only while somebody has a file open for writing, as the daemon has."""
    (small.source / "file").write_bytes(b"before")
    small.mount("--dirty-expire", "1h", "--write-through", "off", "--fault-plan", small.plan({"op": "pwritev", "errno": "EROFS"}))
    descriptor = os.open(small.path / "file", os.O_RDWR)
    os.pwrite(descriptor, b"KEPT", 0)
    with pytest.raises(OSError, match="Read-only file system"):
        os.fsync(descriptor)
    with pytest.raises(OSError, match="Read-only file system"):
        os.pwrite(descriptor, b"x", 0)
    small.plan()
    wait_until(lambda: (small.source / "file").read_bytes()[:4] == b"KEPT", "the next try")
    wait_until(lambda: _can_write(descriptor), "writes are taken again")
    os.close(descriptor)
    small.umount_well()


def _can_write(descriptor: int) -> bool:
    try:
        return os.pwrite(descriptor, b"x", 5) == 1
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_full_for_a_minute_on_ext4_while_500_mib_are_written(cachefs: Command) -> None:
    image = cachefs.base / "image"
    with image.open("wb") as file:
        file.truncate(900 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(image), str(cachefs.source)], check=True, timeout=60)
    (cachefs.source / "filler").write_bytes(bytes(600 * MIB))
    cachefs.mount("--dirty-limit", "64M", "--cache-size", "256M")
    full_for_a_while(cachefs, 10, 50 * MIB, 60.0, too_much=MIB)  # room that ext4 needs for its own is not foreseen
    cachefs.umount_well()
