"""What a hit and its memory cost with more and more pages cached and files known, and what an idle mount costs."""

import mmap
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from micro import KIB, fio
from peers import Mounted, Peer, cachefs_command, mounted
from results import Figure
from turns import Run

PAGE = 4096
PAGES = (1000, 10_000, 100_000, 1_000_000, 4_000_000)
FILES = (10, 1000, 100_000, 1_000_000)
SPARE_BYTES = 5 << 30  # beside the cache: the machine's own, and what the kernel caches of the backing
IDLE_SECONDS = 60


def scale(bench: Run) -> None:
    """A 4 KiB hit with 10^3 to 4 x 10^6 pages cached and 10 to 10^6 files known; bytes of bookkeeping a page and a file."""
    pages = [count for count in PAGES if count * PAGE + SPARE_BYTES < available_bytes()][: bench.some(9, 3)]
    if len(pages) < bench.some(len(PAGES), 3):
        bench.results.note(f"scale: memory is there for {pages[-1]} pages, not for {PAGES[-1]}")
    hits_against_pages(bench, pages)
    memory_alone(bench, pages)
    page_bookkeeping(bench, bench.some(200_000, 20_000))
    hits_against_files(bench, FILES[: bench.some(4, 2)])


def hits_against_pages(bench: Run, counts: list[int]) -> None:
    """One mount with that much cache; each step reads on, and hits what is there then, all over it."""
    source = bench.directory("scale/source")
    with open(source / "f", "wb") as file:
        file.truncate(counts[-1] * PAGE)
    with cachefs(bench, source, counts[-1] * PAGE + (256 << 20)) as mount:
        have, start = 0, mount.rss_bytes()
        for count in counts:
            bench.say(f"scale: {count} pages")
            warm(mount.path / "f", source / "f", have * PAGE, count * PAGE)
            have = count
            bench.results.values[f"rss bytes beside data, {count} pages"] = mount.rss_bytes() - start - count * PAGE
        for number in range(bench.rounds):
            for count in counts:  # in turn: what else the machine does meets all sizes
                hit(bench, "pages", count, number, mount, count * PAGE)


def memory_alone(bench: Run, counts: list[int]) -> None:
    """What a copy of 4 KiB from anywhere in that much memory takes: the host of a virtual machine may not have it at hand."""
    memory = mmap.mmap(-1, counts[-1] * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # as the cache has it
    bench.say(f"scale: memory of {counts[-1]} pages, and nothing else")
    for at in range(0, len(memory), 1 << 20):
        memory[at : at + (1 << 20)] = b"x" * min(1 << 20, len(memory) - at)
    with memory, memoryview(memory) as view:
        for number in range(bench.rounds):
            for count in counts:
                seconds = copy_pages(view, count, bench.some(8, 3) / 10)
                bench.results.add(Figure("pages", str(count), "memory alone", number, seconds * 1e6, None))


def copy_pages(memory: memoryview, count: int, seconds: float) -> float:
    """Seconds that it takes to copy one of the first `count` pages, each at random, as `seconds` of it show."""
    page, copied, start = bytearray(PAGE), 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        for at in random.choices(range(count), k=100):
            page[:] = memory[at * PAGE : at * PAGE + PAGE]
        copied += 100
    return (now - start) / copied


def hit(bench: Run, part: str, count: int, number: int, mount: Mounted, nbytes: int) -> None:
    cpu = mount.cpu_seconds()
    said = fio(mount.path / "f", "randread", "4k", 1, bench.some(8, 3) / 10, nbytes)
    used, total = mount.cpu_seconds() - cpu, said["total_ios"]
    bench.results.add(Figure(part, str(count), "cachefs", number, said["runtime"] * 1000 / total, used / total * 1e6))


def warm(path: Path, backing: Path, begin: int, end: int) -> None:
    """Reads the file from `begin` on; the kernel's copy of the backing leaves behind it, or there were two of everything."""
    fd, behind = os.open(path, os.O_RDONLY), os.open(backing, os.O_RDONLY)
    for at in range(begin, end, 1 << 20):
        os.pread(fd, min(1 << 20, end - at), at)
        if not at % (256 << 20):
            os.posix_fadvise(behind, 0, at, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(behind, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    os.close(behind)


def page_bookkeeping(bench: Run, pages: int) -> None:
    """Memory beside the data itself, of single pages and of runs of 16 at random places: the daemon's RSS, before and after."""
    source = bench.directory("scale/source")
    for run_pages in (1, 16, 256):
        with open(source / "f", "wb") as file:
            file.truncate(pages * 4 * PAGE)
        with cachefs(bench, source, pages * 2 * PAGE, "--readahead-max", "0") as mount:
            fd, step = os.open(mount.path / "f", os.O_RDONLY), run_pages * PAGE
            places = random.Random(1).sample(range(pages * 4 // run_pages), pages // run_pages)
            os.pread(fd, step, places[0] * step)
            before = mount.rss_bytes()
            for place in places[1:]:
                os.pread(fd, step, place * step)
            grown = mount.rss_bytes() - before
            os.close(fd)
        value = (grown - (pages - run_pages) * PAGE) / pages
        bench.results.values[f"bookkeeping bytes a page, runs of {run_pages}"] = value
        bench.say(f"scale: {value:.0f} bytes of bookkeeping a page in runs of {run_pages}")


def hits_against_files(bench: Run, counts: tuple[int, ...]) -> None:
    """Files that the kernel asked for and still knows, so that we have to."""
    source = bench.directory("scale/source")
    with open(source / "f", "wb") as file:
        file.truncate(64 << 20)
    with cachefs(bench, source, 256 << 20) as mount:
        warm(mount.path / "f", source / "f", 0, 64 << 20)
        known, rss = 0, mount.rss_bytes()
        for count in counts:
            bench.say(f"scale: {count} files")
            for i in range(known, count):
                directory = source / f"d{i // 1000}"
                if not i % 1000:
                    directory.mkdir(exist_ok=True)
                os.close(os.open(directory / f"{i}", os.O_CREAT | os.O_WRONLY))
            for i in range(known, count):
                os.stat(mount.path / f"d{i // 1000}" / f"{i}")
            known = count
            if count >= 1000:
                bench.results.values[f"bytes a file known, {count} files"] = (mount.rss_bytes() - rss) / count
            for number in range(bench.rounds):
                hit(bench, "files", count, number, mount, 64 << 20)
    shutil.rmtree(source)


def idle(bench: Run) -> None:
    """CPU time of a mount that nobody uses, over a minute."""
    source, seconds = bench.directory("idle/source"), bench.some(IDLE_SECONDS, 5)
    (source / "f").write_bytes(b"x" * 64 * KIB)
    with cachefs(bench, source, 64 << 20) as mount:
        (mount.path / "f").read_bytes()
        time.sleep(2)
        before = mount.cpu_seconds()
        time.sleep(seconds)
        bench.results.values["idle CPU, per cent"] = (mount.cpu_seconds() - before) / seconds * 100


@contextmanager
def cachefs(bench: Run, source: Path, cache_bytes: int, *options: str) -> Iterator[Mounted]:
    work = bench.work / "scale-mount"
    shutil.rmtree(work, ignore_errors=True)
    peer = Peer("cachefs", "", "", cachefs_command("--cache-size", str(cache_bytes), *options))
    with mounted(peer, source, work) as mount:
        yield mount


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
