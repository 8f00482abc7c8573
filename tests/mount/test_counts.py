"""Right numbers: what is counted outside of the daemon equals its metrics, to the page and the byte.

Programs are counted by the programs (what they asked for and got), the backing by strace on the daemon (what its calls on
files in SOURCE moved). Hits and misses are those that a model of the cache predicts from the programs' own record. Requests
are of half a MiB at most: the kernel makes several of one that spans more than 256 pages of the program's memory.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from mounts import DEADLINE_SECONDS, Factory, Mount

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]
P, MIB = 4096, 1 << 20
NO_READAHEAD = ("--readahead-max", "0")
LATER = ("--dirty-expire", "1h", "--write-through", "off")


# --- the reference


@dataclass
class Reference:
    """What a cache without readahead has to count: the pages of one file each, least recently used first to go."""

    capacity_pages: int
    resident: OrderedDict[tuple[str, int], None] = field(default_factory=OrderedDict)
    evicted: set[tuple[str, int]] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("page_hits", "page_misses", "hit_bytes", "miss_bytes", "write_bytes", "reads_hit", "reads_partial", "reads_miss",
         "refaults", "capacity"), 0))  # fmt: skip

    def read(self, name: str, offset: int, nbytes: int) -> None:
        """A read that got `nbytes`."""
        if not nbytes:
            return
        pages = [(name, page) for page in range(offset // P, (offset + nbytes - 1) // P + 1)]
        missing = [page for page in pages if page not in self.resident]
        hits = len(pages) - len(missing)
        missed_bytes = nbytes * len(missing) // len(pages)
        self.add(
            page_hits=hits, page_misses=len(missing), miss_bytes=missed_bytes, hit_bytes=nbytes - missed_bytes,
            reads_hit=not missing, reads_partial=bool(missing and hits), reads_miss=not hits,
            refaults=len(self.evicted.intersection(missing)),
        )  # fmt: skip
        for page in pages:
            if page in self.resident:
                self.resident.move_to_end(page)
        self.bring(missing)

    def write(self, name: str, offset: int, nbytes: int) -> None:
        pages = [(name, page) for page in range(offset // P, (offset + nbytes - 1) // P + 1)]
        self.add(write_bytes=nbytes)
        self.bring([page for page in pages if page not in self.resident])

    def truncate(self, name: str, size: int) -> None:
        for gone in [page for page in self.resident if page[0] == name and page[1] * P >= size]:
            del self.resident[gone]

    def bring(self, pages: list[tuple[str, int]]) -> None:
        while len(self.resident) + len(pages) > self.capacity_pages:
            self.evicted.add(self.resident.popitem(last=False)[0])
            self.add(capacity=1)
        for page in pages:
            self.resident[page] = None
            self.evicted.discard(page)

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.counts[name] += count


class Program:
    """Reads and writes on the mount, and records what it did in a reference."""

    def __init__(self, mount: Mount, reference: Reference) -> None:
        self.mount, self.reference = mount, reference

    def read(self, name: str, *spans: tuple[int, int]) -> None:
        fd = os.open(self.mount.path / name, os.O_RDONLY)
        for offset, size in spans:
            data = os.pread(fd, size, offset)
            assert data == os.pread(self.source_fd(name), size, offset)
            self.reference.read(name, offset, len(data))
        os.close(fd)

    def source_fd(self, name: str) -> int:
        if not hasattr(self, f"_{name}"):
            setattr(self, f"_{name}", os.open(self.mount.source / name, os.O_RDONLY))
        return int(getattr(self, f"_{name}"))

    def write(self, name: str, offset: int, nbytes: int) -> None:
        fd = os.open(self.mount.path / name, os.O_RDWR | os.O_CREAT)
        assert os.pwrite(fd, os.urandom(nbytes), offset) == nbytes
        self.reference.write(name, offset, nbytes)
        os.close(fd)


def cache_of(mount: Mount) -> Mapping[str, Any]:
    return statistics_of(mount)["cache"]  # type: ignore[no-any-return]


def statistics_of(mount: Mount) -> Mapping[str, Any]:
    return mount.ask("status")["statistics"]  # type: ignore[return-value]


def assert_equal(mount: Mount, reference: Reference) -> None:
    cache = cache_of(mount)
    counted = {name: cache["evictions"][name] if name == "capacity" else cache[name] for name in reference.counts}
    assert counted == reference.counts
    assert cache["resident_bytes"] == len(reference.resident) * P
    assert cache["misses"]["capacity"] == cache["refaults"] == sum(cache["refault_distances"]["counts"])
    assert sum(cache["misses"].values()) == cache["page_misses"]
    for who in ("programs", "users"):
        for counter in ("page_hits", "page_misses", "hit_bytes", "miss_bytes", "write_bytes"):
            assert sum(use[counter] for use in cache[who].values()) == cache[counter], (who, counter)


@contextmanager
def traced(mount: Mount) -> Iterator[dict[str, int]]:
    """Bytes that the daemon's calls on SOURCE's files move inside the block, as strace sees them, when it has ended."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = mount.base / "strace"
    moved = {"read": 0, "write": 0}
    calls = ("pread64", "preadv", "preadv2", "read", "readv", "pwrite64", "pwritev", "pwritev2", "write", "writev")
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "0", "-e", f"trace={','.join(calls)}", "-o", str(log), "-p", str(mount.process.pid)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert tracer.stderr is not None
        first = tracer.stderr.readline()
        if "attached" not in first:
            pytest.skip(f"strace cannot attach here: {first}")
        yield moved
    finally:
        tracer.terminate()
        tracer.communicate(timeout=DEADLINE_SECONDS)
    source = re.escape(str(mount.source))
    line = re.compile(rf"\d+ +(p?(read|write)\w*)\(\d+<{source}/[^>]*>.*\) += (\d+)$")
    resumed = re.compile(r"(\d+) +<\.\.\. \w+ resumed>.*\) += (-?\d+)")
    unfinished = re.compile(rf"(\d+) +p?(read|write)\w*\(\d+<{source}/[^>]*>.* <unfinished")
    pending: dict[str, str] = {}
    for text in log.read_text(errors="replace").splitlines():
        if match := line.match(text):
            moved[match[2]] += int(match[3])
        elif match := unfinished.match(text):
            pending[match[1]] = match[2]
        elif (match := resumed.match(text)) and match[1] in pending and int(match[2]) > 0:
            moved[pending.pop(match[1])] += int(match[2])


def make(mount: Mount, name: str, nbytes: int) -> None:
    (mount.source / name).write_bytes(os.urandom(nbytes))


# --- exactly


@pytest.mark.parametrize("policy", ["lru", "sieve", "s3fifo"])
def test_sequential_and_random_reads(mounted: Factory, policy: str) -> None:
    mount = mounted(*NO_READAHEAD, "--cache-size", "32M", "--policy", policy)
    make(mount, "f", 3 * MIB + 123)
    make(mount, "g", 5 * MIB)
    reference = Reference(32 * MIB // P)
    program = Program(mount, reference)
    with traced(mount) as moved:
        program.read("f", *((offset, 1000) for offset in range(0, MIB, 1000)))
        program.read("f", *((offset, 128 << 10) for offset in range(0, 4 * MIB, 128 << 10)))
        rng = random.Random(1)
        program.read("g", *((rng.randrange(5 * MIB), rng.choice((1, P, 10_000, MIB // 2))) for _ in range(300)))
        program.read("g", (5 * MIB - 1, 100), (5 * MIB, 100), (7 * MIB, 1))
        assert_equal(mount, reference)
    sizes = {"f": 3 * MIB + 123, "g": 5 * MIB}
    fetched = sum(min(P, sizes[name] - page * P) for name, page in reference.resident)
    assert moved["read"] == statistics_of(mount)["backing"]["read_bytes"] == fetched
    assert moved["write"] == 0


def test_evictions_and_refaults(mounted: Factory) -> None:
    mount = mounted(*NO_READAHEAD, "--cache-size", "1M", "--policy", "lru")
    make(mount, "f", 3 * MIB)
    reference = Reference(256)
    program = Program(mount, reference)
    with traced(mount) as moved:
        program.read("f", *((offset, P) for offset in range(0, 3 * MIB, P)))
        rng = random.Random(2)
        program.read("f", *((int(rng.triangular(0, 700, 0)) * P, rng.choice((P, 2 * P))) for _ in range(3000)))
        assert_equal(mount, reference)
    assert reference.counts["refaults"] > 200
    assert moved["read"] == statistics_of(mount)["backing"]["read_bytes"] == reference.counts["page_misses"] * P


def test_overwrites_and_truncates(mounted: Factory) -> None:
    mount = mounted(*NO_READAHEAD, *LATER, "--cache-size", "32M")
    make(mount, "f", 2 * MIB)
    reference = Reference(32 * MIB // P)
    program = Program(mount, reference)
    with traced(mount) as moved:
        for _ in range(3):
            program.write("f", 0, MIB // 2)
            program.write("f", MIB // 2, MIB // 2)  # only what is there at the end is written
        program.write("f", 3 * MIB, 5 * P)
        program.write("new", 0, 777)
        os.truncate(mount.path / "f", 512 << 10)
        reference.truncate("f", 512 << 10)
        assert_equal(mount, reference)
        assert statistics_of(mount)["writeback"]["dirty_bytes"] == (512 << 10) + P
        mount.ask("sync")
        program.read("f", *((offset, 64 << 10) for offset in range(0, 2 * MIB, 64 << 10)))
        program.read("new", (0, P))
        assert_equal(mount, reference)
    statistics = statistics_of(mount)
    assert moved["write"] == statistics["writeback"]["written_bytes"] == (512 << 10) + 777
    assert moved["read"] == statistics["backing"]["read_bytes"] == 0
    assert statistics["cache"]["evictions"]["truncated"] == 128 + 5


def test_a_partial_write_reads_the_page_around_it(mounted: Factory) -> None:
    mount = mounted(*NO_READAHEAD, *LATER)
    make(mount, "f", 10 * P)
    with traced(mount) as moved:
        Program(mount, Reference(1000)).write("f", P + 10, 20)
        mount.ask("sync")
    statistics = statistics_of(mount)
    assert (moved["read"], moved["write"]) == (P, P)
    assert (statistics["backing"]["read_bytes"], statistics["writeback"]["written_bytes"]) == (P, P)
    assert (statistics["cache"]["page_misses"], statistics["cache"]["write_bytes"]) == (0, 20), "nobody has read"


def test_mapped_reads_and_stores(mounted: Factory) -> None:
    """The kernel asks for a mapped page once, in requests of its own making, and writes it back when it is told to."""
    mount = mounted(*NO_READAHEAD, *LATER)
    make(mount, "f", 2 * MIB)
    with traced(mount) as moved:
        fd = os.open(mount.path / "f", os.O_RDWR)
        with mmap.mmap(fd, 2 * MIB) as mapped:
            assert sum(mapped[offset] for offset in range(0, 2 * MIB, 512)) > 0
            before = cache_of(mount)
            assert before["page_hits"] + before["page_misses"] == before["page_misses"] == 512
            assert (before["hit_bytes"], before["miss_bytes"]) == (0, 2 * MIB)
            for page in (3, 4, 100):
                mapped[page * P] ^= 1
            mapped.flush()
            after = cache_of(mount)
            assert after["write_bytes"] == 3 * P and after["page_misses"] == 512
            expected = bytes(mapped)
        os.fsync(fd)
        os.close(fd)
    assert (mount.source / "f").read_bytes() == expected
    statistics = statistics_of(mount)
    assert moved["read"] == statistics["backing"]["read_bytes"] == 2 * MIB
    assert moved["write"] == statistics["writeback"]["written_bytes"] == 3 * P


READERS = """
import os, sys
path, seed = sys.argv[1], int(sys.argv[2])
open("/proc/self/comm", "w").write(f"reader{seed}")
import random
rng, fd, pages, got = random.Random(seed), os.open(path, os.O_RDONLY), 0, 0
for _ in range(400):
    offset, size = rng.randrange(8 << 20), rng.choice((100, 4096, 65536))
    data = os.pread(fd, size, offset)
    pages += (offset + len(data) - 1) // 4096 - offset // 4096 + 1 if data else 0
    got += len(data)
print(pages, got)
"""


def test_concurrent_readers_each_by_name(mounted: Factory) -> None:
    """Who comes while a page is on its way has missed it too: so hits and misses add up, and the backing is asked once."""
    mount = mounted(*NO_READAHEAD, "--cache-size", "64M", "--simulate-latency", "1ms")
    make(mount, "f", 8 * MIB)
    with traced(mount) as moved:
        readers = [
            subprocess.Popen([sys.executable, "-c", READERS, str(mount.path / "f"), str(i)], stdout=subprocess.PIPE, text=True)
            for i in range(6)
        ]
        told = [tuple(map(int, reader.communicate(timeout=DEADLINE_SECONDS)[0].split())) for reader in readers]
    cache = cache_of(mount)
    for i, (pages, got) in enumerate(told):
        use = cache["programs"][f"reader{i}"]
        assert (use["page_hits"] + use["page_misses"], use["hit_bytes"] + use["miss_bytes"]) == (pages, got)
    assert cache["page_hits"] + cache["page_misses"] == sum(pages for pages, _ in told)
    assert cache["users"][str(os.geteuid())]["page_hits"] == cache["page_hits"] > 0
    assert moved["read"] == statistics_of(mount)["backing"]["read_bytes"] == cache["resident_bytes"]
    saved = statistics_of(mount)["filesystem"]["saved_seconds"]
    latency = statistics_of(mount)["backing"]["latency_seconds"]
    assert 0.001 * cache["reads_hit"] * 0.5 < saved <= latency * cache["reads_hit"] * 2


def test_writers_by_name_and_what_they_overwrite(mounted: Factory) -> None:
    mount = mounted(*LATER)
    code = "import sys; open('/proc/self/comm','w').write(sys.argv[2]); open(sys.argv[1], 'wb', buffering=0).write(b'x' * 50_000)"
    for name in ("one", "two", "two"):
        subprocess.run([sys.executable, "-c", code, str(mount.path / name), name], check=True, timeout=DEADLINE_SECONDS)
    cache = cache_of(mount)
    assert (cache["programs"]["one"]["write_bytes"], cache["programs"]["two"]["write_bytes"]) == (50_000, 100_000)
    assert cache["write_bytes"] == 150_000
