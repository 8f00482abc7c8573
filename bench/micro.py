"""Small things: hits, cold reads, writes and metadata, by fio and by a few lines of Python."""

import functools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peers import Mounted, Peer, drop_kernel_caches, mounted
from processes import Failed, run
from results import Figure
from turns import Run

KIB, MIB = 1 << 10, 1 << 20
FILE_BYTES = 256 * MIB
# case: fio's words
READS = {
    "4k random": ("randread", "4k", 1), "4k random x4": ("randread", "4k", 4),
    "128k": ("read", "128k", 1), "128k x4": ("read", "128k", 4), "1M": ("read", "1M", 1), "1M x4": ("read", "1M", 4),
}  # fmt: skip
WRITES = {
    "4k random": ("randwrite", "4k", 1), "4k random x4": ("randwrite", "4k", 4), "4k": ("write", "4k", 1),
    "128k": ("write", "128k", 1), "1M": ("write", "1M", 1), "1M x4": ("write", "1M", 4),
}  # fmt: skip
HIT_PEERS = ("bare", "cachefs", "bindfs direct", "mergerfs direct", "unionfs", "pyfuse3", "rclone")
NAMES = 10_000


def fio(path: Path, mode: str, block: str, jobs: int, seconds: float, size: int = FILE_BYTES) -> dict:
    """fio's account of one job, all its threads together: reads or writes of `path`, an existing file."""
    words = ["fio", "--name=bench", f"--filename={path}", f"--rw={mode}", f"--bs={block}", f"--numjobs={jobs}", "--thread"]
    words += ["--ioengine=psync", "--group_reporting", "--time_based", f"--runtime={seconds * 1000:.0f}ms", f"--size={size}"]
    words += ["--invalidate=0", "--randrepeat=1", "--norandommap", "--fallocate=none", "--output-format=json", "--end_fsync=0"]
    words += [f"--offset_increment={size // jobs}" if mode in ("read", "write") and jobs > 1 else "--offset=0"]
    out = run(words, timeout=seconds + 120)
    job = json.loads(out[out.index("{") :])["jobs"][0]
    return job["read" if "read" in mode else "write"]


def measured(bench: Run, part: str, case: str, number: int, name: str, mount: Mounted, words: tuple[str, str, int]) -> None:
    """One fio job against a mount."""
    mode, block, jobs = words
    seconds = bench.some(7, 3) / 10
    path = mount.path / "f"
    try:
        cpu = mount.cpu_seconds()
        said = fio(path, mode, block, jobs, seconds)
        used = mount.cpu_seconds() - cpu
    except Failed as error:
        bench.results.note(f"{name}: {part} {case} failed: {error}")
        return
    count = max(1, said["total_ios"])
    latency = said["clat_ns"].get("percentile", {})
    bench.results.add(Figure(
        part, case, name, number, said["runtime"] * 1000 / count, used / count * 1e6,
        latency.get("50.000000", 0) / 1000, latency.get("99.000000", 0) / 1000, bench.load,
    ))  # fmt: skip


def hits(bench: Run) -> None:
    """4 KiB random and 128 KiB and 1 MiB sequential reads of a file that is in the cache, 1 and 4 jobs."""
    source = bench.directory("hits/source")
    write_file(source / "f", FILE_BYTES)

    def turn(number: int, peer: Peer) -> None:
        with fresh_mount(bench, "hits", peer, source) as mount:
            read_all(mount.path / "f")
            for case, words in READS.items():
                measured(bench, "hits", case, number, peer.name, mount, words)

    bench.each("hits", bench.peers(HIT_PEERS), turn)


def writes(bench: Run) -> None:
    """4 KiB random and sequential, 128 KiB and 1 MiB writes to an existing file, the journal of cachefs on."""
    source = bench.directory("writes/source")

    def turn(number: int, peer: Peer) -> None:
        write_file(source / "f", FILE_BYTES)
        with fresh_mount(bench, "writes", peer, source) as mount:
            for case, words in WRITES.items():
                measured(bench, "writes", case, number, peer.name, mount, words)

    bench.each("writes", bench.peers(HIT_PEERS), turn)


def cold(bench: Run) -> None:
    """The same reads of a file that neither the cache nor the kernel has: the disk's own speed is the limit."""
    source = bench.directory("cold/source")
    write_file(source / "f", FILE_BYTES)
    if not drop_kernel_caches():
        bench.results.note("cold reads of the local disk: skipped, only root can empty the kernel's caches")
        return
    jobs: dict[str, Callable[[Path], int]] = {"4k random": lambda p: read_some(p, 2000), "128k": read_all}

    def turn(number: int, peer: Peer) -> None:
        for case, job in jobs.items():
            with fresh_mount(bench, "cold", peer, source) as mount:
                drop_kernel_caches()
                timed(bench, "cold", case, number, peer.name, mount, functools.partial(job, mount.path / "f"))

    bench.each("cold", bench.peers(HIT_PEERS), turn)


def metadata(bench: Run) -> None:
    """stat of names that are there and that are not, create and unlink, readdir of 10,000, open+read+close of small files."""
    source, names = bench.directory("metadata/source"), bench.some(NAMES, 1000)
    many, tree = source / "many", source / "tree"
    many.mkdir()
    for i in range(names):
        (many / f"name-{i}").write_bytes(b"x" * 100)
    for i in range(100):
        (tree / f"{i}").mkdir(parents=True)
        for j in range(names // 200):
            (tree / f"{i}" / f"{j}").write_bytes(b"x")
    peers = bench.peers(("bare", "cachefs", "cachefs infinite", "cachefs keep", "bindfs", "mergerfs", "unionfs", "pyfuse3"))

    def turn(number: int, peer: Peer) -> None:
        with fresh_mount(bench, "metadata", peer, source) as mount:
            for case, job in metadata_jobs(mount.path, names).items():
                timed(bench, "metadata", case, number, peer.name, mount, job)

    bench.each("metadata", peers, turn)


def metadata_jobs(root: Path, names: int) -> dict[str, Callable[[], int]]:
    """{case: job}, each of which says how many things it did. To be done in this order: what one learns another may know."""
    many, tree, rounds = root / "many", root / "tree", 5

    def stat_missing() -> int:
        return sum(not os.path.lexists(many / f"no-{i}") for i in range(names))

    def stat_known() -> int:
        return sum(os.stat(many / f"name-{i}").st_size > 0 for i in range(names))

    def create_unlink() -> int:
        for i in range(names // 5):
            os.close(os.open(many / f"new-{i}", os.O_CREAT | os.O_WRONLY))
        for i in range(names // 5):
            os.unlink(many / f"new-{i}")
        return 2 * (names // 5)

    def open_read_close() -> int:
        for i in range(names // 5):
            with open(many / f"name-{i}", "rb", buffering=0) as file:
                file.read(4096)
        return names // 5

    def find_known() -> int:
        for _ in range(rounds):
            run(["find", str(tree)])
        return rounds

    def find_first() -> int:
        run(["find", str(tree)])
        return 1

    return {
        "stat": stat_known, "stat missing": stat_missing, "create+unlink": create_unlink,
        "readdir of 10,000": lambda: len([os.listdir(many) for _ in range(rounds)]), "open+read+close": open_read_close,
        "open+read+close again": open_read_close, "find": find_first, "find known": find_known,
    }  # fmt: skip


# --- helpers


def timed(bench: Run, part: str, case: str, number: int, name: str, mount: Mounted, job: Callable[[], int]) -> None:
    """One job, which says how many requests it made; a failure is noted, and counts as no figure."""
    cpu, start = mount.cpu_seconds(), time.perf_counter()
    try:
        count = job()
    except (OSError, Failed) as error:
        bench.results.note(f"{name}: {part} {case} failed: {error}")
        return
    wall, used = time.perf_counter() - start, mount.cpu_seconds() - cpu
    bench.results.add(Figure(part, case, name, number, wall / count * 1e6, used / count * 1e6, load=bench.load))


@contextmanager
def fresh_mount(bench: Run, part: str, peer: Peer, source: Path) -> Iterator[Mounted]:
    """A mount that remembers nothing."""
    work = bench.work / part / peer.name.replace(" ", "-")
    shutil.rmtree(work, ignore_errors=True)
    with mounted(peer, source, work) as mount:
        yield mount


def write_file(path: Path, nbytes: int) -> None:
    block = os.urandom(MIB)
    with open(path, "wb") as file:
        for _ in range(nbytes // MIB):
            file.write(block)


def read_all(path: Path, size: int = 128 * KIB) -> int:
    """How many reads it took."""
    count = 0
    with open(path, "rb", buffering=0) as file:
        while file.read(size):
            count += 1
    return count


def read_some(path: Path, count: int, seed: int = 1) -> int:
    """Reads of 4 KiB at places all over the file."""
    rng, fd = random.Random(seed), os.open(path, os.O_RDONLY)
    pages = os.fstat(fd).st_size // 4096
    for _ in range(count):
        os.pread(fd, 4096, rng.randrange(pages) * 4096)
    os.close(fd)
    return count
