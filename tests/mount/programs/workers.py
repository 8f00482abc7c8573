"""Processes that use a file system in the way of real programs, for the tests to run several of: workers.py NAME ARGUMENT..."""

import hashlib
import mmap
import os
import random
import sqlite3
import sys
import time

BLOCK = 1 << 16  # of a memory-mapped array


def sqlite_writer(database: str, writer: str, transactions: str) -> None:
    """Commits transactions of a few rows each; prints how many rows were committed."""
    chance = random.Random(int(writer))
    connection = sqlite3.connect(database, timeout=120, isolation_level=None)
    rows = 0
    for number in range(int(transactions)):
        connection.execute("BEGIN IMMEDIATE")
        count = chance.randrange(1, 6)
        for row in range(count):
            blob = chance.randbytes(chance.randrange(100, 12_000))
            digest = hashlib.sha256(blob).hexdigest()
            connection.execute("INSERT INTO item VALUES (?, ?, ?, ?, ?)", (writer, number, row, blob, digest))
        if number % 5 == 4:
            connection.execute("ROLLBACK")
            continue
        connection.execute("COMMIT")
        rows += count
    connection.close()
    print(rows)


def memmap_blocks(path: str, me: str, others: str) -> None:
    """Fills every other block of a shared array; then, told on stdin that the other is done too, looks at the other's."""
    import numpy

    array = numpy.memmap(path, dtype=numpy.uint64, mode="r+")
    words = BLOCK // array.itemsize
    blocks = range(len(array) // words)
    for block in blocks[int(me) :: 2]:
        array[block * words : (block + 1) * words] = numpy.arange(words) + block * words
    array.flush()
    print("written", flush=True)
    sys.stdin.readline()
    for block in blocks[int(others) :: 2]:
        expected = numpy.arange(words) + block * words
        assert (array[block * words : (block + 1) * words] == expected).all(), f"block {block} of the other process"


def lmdb_writer(path: str, writemap: str, writer: str, transactions: str) -> None:
    """Commits transactions, each of which also counts on what was committed before; prints what it put in."""
    import lmdb

    chance = random.Random(int(writer))
    with lmdb.open(path, map_size=256 << 20, writemap=writemap == "True", max_readers=16) as environment:
        for number in range(int(transactions)):
            with environment.begin(write=True) as transaction:
                total = int(transaction.get(b"total", b"0"))
                value = chance.randbytes(chance.randrange(1, 20_000))
                transaction.put(f"{writer}/{number}".encode(), hashlib.sha256(value).digest() + value)
                transaction.put(b"total", str(total + len(value)).encode())
            with environment.begin() as transaction:  # and reads what the others have put in
                for _, stored in transaction.cursor():
                    assert len(stored) < 64 or hashlib.sha256(stored[32:]).digest() == stored[:32]
                    if chance.random() < 0.1:
                        break


class RandomOperations:
    """One file and a bytearray that must always be equal, under random operations (as fsx does)."""

    def __init__(self, path: str, seed: int, size_max: int) -> None:
        self.path = path
        self.chance = random.Random(seed)
        self.size_max = size_max
        self.model = bytearray()
        self.done: list[str] = []  # the last operations, for whoever has to find out
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.map: mmap.mmap | None = None

    def run(self, seconds: float) -> int:
        """Does operations for so long; returns how many."""
        operations = [
            (self.read, 30), (self.write, 30), (self.read_map, 10), (self.write_map, 12), (self.truncate, 6),
            (self.append, 6), (self.sync, 2), (self.reopen, 3), (self.rename, 1), (self.replace, 1),
        ]  # fmt: skip
        methods, weights = zip(*operations, strict=True)
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            self.chance.choices(methods, weights)[0]()
            count += 1
            size = os.fstat(self.fd).st_size
            assert size == len(self.model), self.explain(f"size {size}, expected {len(self.model)}")
        self.compare(0, len(self.model), os.pread)
        self.close_map()
        os.close(self.fd)
        return count

    def note(self, *words: object) -> None:
        self.done.append(" ".join(map(str, words)))
        del self.done[:-200]

    def explain(self, problem: str) -> str:
        return f"{self.path}: {problem}\n" + "\n".join(self.done)

    def span(self) -> tuple[int, int]:
        """A stretch inside the file: small ones often, page-aligned ones sometimes."""
        start = self.chance.randrange(len(self.model) + 1)
        length = self.chance.choice((1, 100, 4096, 20_000, 131_072, 1 << 20))
        length = self.chance.randrange(length) + 1
        if self.chance.random() < 0.3:
            start, length = start & -4096, (length + 4095) & -4096
        return start, min(start + length, len(self.model))

    def compare(self, start: int, end: int, read) -> None:  # type: ignore[no-untyped-def]
        while start < end:
            found = read(self.fd, min(end - start, 1 << 20), start)
            expected = self.model[start : start + len(found)]
            if not found or found != expected:
                at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), 0)
                raise AssertionError(self.explain(f"wrong at {start + at} ({len(found)} bytes read at {start})"))
            start += len(found)

    def read(self) -> None:
        start, end = self.span()
        self.note("read", start, end)
        self.compare(start, end, os.pread)

    def write(self) -> None:
        start, end = self.span()
        if self.chance.random() < 0.2:
            start = self.chance.randrange(self.size_max)
            end = start + self.chance.randrange(1, 200_000)
        self.put(start, self.chance.randbytes(min(end, self.size_max) - start))

    def append(self) -> None:
        length = min(self.chance.randrange(1, 500_000), self.size_max - len(self.model))
        self.put(len(self.model), self.chance.randbytes(max(0, length)))

    def put(self, start: int, data: bytes) -> None:
        self.note("write", start, start + len(data))
        if start > len(self.model) and data:
            self.model.extend(bytes(start - len(self.model)))
        view = memoryview(data)
        while view:
            view = view[os.pwrite(self.fd, view, start + len(data) - len(view)) :]
        self.model[start : start + len(data)] = data

    def truncate(self) -> None:
        size = self.chance.randrange(self.size_max) if self.chance.random() < 0.5 else self.span()[0]
        self.note("truncate", size)
        self.close_map()
        os.ftruncate(self.fd, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def mapped(self) -> mmap.mmap | None:
        """A shared mapping, kept across reads and writes; it may be of less than the whole file."""
        if self.map is None and self.model:
            self.note("map", len(self.model))
            self.map = mmap.mmap(self.fd, len(self.model))
        return self.map

    def read_map(self) -> None:
        mapping = self.mapped()
        if mapping is not None:
            start, end = self.span()
            self.note("read_map", start, end)
            end = min(end, len(mapping))
            self.compare(start, end, lambda fd, length, at: mapping[at : min(at + length, end)])

    def write_map(self) -> None:
        mapping = self.mapped()
        if mapping is None:
            return
        start, end = self.span()
        end = min(end, len(mapping))
        if start >= end:
            return
        data = self.chance.randbytes(end - start)
        self.note("write_map", start, end)
        mapping[start:end] = data
        self.model[start:end] = data
        if self.chance.random() < 0.2:
            self.note("msync")
            mapping.flush()

    def close_map(self) -> None:
        if self.map is not None:
            self.note("unmap")
            self.map.close()
            self.map = None

    def sync(self) -> None:
        self.note("fsync")
        os.fsync(self.fd)

    def reopen(self) -> None:
        self.note("reopen")
        if self.chance.random() < 0.5:
            self.close_map()
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)

    def rename(self) -> None:
        new = self.path + ".renamed"
        self.note("rename and back")
        os.rename(self.path, new)
        os.rename(new, self.path)

    def replace(self) -> None:
        """Writes a copy and puts it in the old file's place, as editors do."""
        self.note("replace")
        self.close_map()
        new = self.path + ".new"
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.close(self.fd)
        self.fd, view = fd, memoryview(bytes(self.model))
        while view:
            view = view[os.write(fd, view) :]
        os.rename(new, self.path)


def random_operations(path: str, seed: str, size_max: str, seconds: str) -> None:
    """Prints how many operations there were, and the digest that the file must have now."""
    operations = RandomOperations(path, int(seed), int(size_max))
    print(operations.run(float(seconds)), hashlib.sha256(operations.model).hexdigest())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
