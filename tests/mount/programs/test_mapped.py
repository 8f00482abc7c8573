"""Files mapped into two processes at once: numpy.memmap, and LMDB with and without a writable map."""

import hashlib
import mmap
import os

import lmdb
import numpy
import pytest
from running import CACHE_BYTES, ProgramMount, results, worker

pytestmark = pytest.mark.mount

TRANSACTIONS = 40


def test_numpy_memmap_is_shared_by_two_processes(program_mount: ProgramMount) -> None:
    path, nbytes = program_mount.mountpoint / "array", CACHE_BYTES * 3 // 2
    with open(path, "wb") as file:
        file.truncate(nbytes)
    halves = [worker("memmap_blocks", path, number, 1 - number) for number in range(2)]
    for process in halves:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
    for process in halves:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results(halves)
    expected = numpy.arange(nbytes // 8, dtype=numpy.uint64)
    assert (numpy.fromfile(path, dtype=numpy.uint64) == expected).all()  # by read()
    program_mount.sync()
    assert (numpy.fromfile(program_mount.source / "array", dtype=numpy.uint64) == expected).all()


def test_stores_through_a_map_are_read_at_once_and_are_on_the_backing_after_msync(program_mount: ProgramMount) -> None:
    path = program_mount.mountpoint / "file"
    path.write_bytes(bytes(3 * 4096 + 100))
    with open(path, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as mapping:
        for at in (0, 4095, 4096, 2 * 4096 + 7, 3 * 4096 + 99):
            mapping[at] = 0x55
            assert os.pread(file.fileno(), 1, at) == b"\x55"
            os.pwrite(file.fileno(), b"\xaa", at)
            assert mapping[at] == 0xAA
        mapping[100:200] = b"s" * 100
        mapping.flush()
        os.fsync(file.fileno())
        assert (program_mount.source / "file").read_bytes() == path.read_bytes() == mapping[:]


@pytest.mark.parametrize("writemap", [False, True], ids=["default", "writemap"])
def test_lmdb_is_shared_by_two_processes(program_mount: ProgramMount, writemap: bool) -> None:
    path = program_mount.mountpoint / "environment"
    path.mkdir()
    results([worker("lmdb_writer", path, writemap, number, TRANSACTIONS) for number in range(2)])
    program_mount.unmount()
    with (
        lmdb.open(str(program_mount.source / "environment"), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        stored = dict(transaction.cursor())
    total = int(stored.pop(b"total"))
    assert len(stored) == 2 * TRANSACTIONS
    assert total == sum(len(value) - 32 for value in stored.values())
    assert all(hashlib.sha256(value[32:]).digest() == value[:32] for value in stored.values())
