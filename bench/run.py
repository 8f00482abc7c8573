"""`make bench`: what a hit costs over the floor, and whether cold reads, writes and memory keep their promises.

Figures are medians over rounds; those that are compared are measured in turn in one run. The table is printed, and kept
as JSON with --json FILE. On a shared machine compare ratios, not single figures.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mounts
from mounts import Mounted

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cachefs import control
from cachefs.state import find_daemon

KIB, MIB = 1 << 10, 1 << 20
HIT_CASES = (("4k x1", 4 * KIB, 20000, 1), ("4k x4", 4 * KIB, 20000, 4), ("128k", 128 * KIB, 4000, 1), ("1M", MIB, 600, 1))
SPAN_BYTES = 100 * MIB  # of the file that hits fall in
JOURNAL_SPAN_BYTES = 64 * MIB  # of the file that random writes fall in


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    args = parser.parse_args()
    unknown = [case for case in args.cases if case not in CASES]
    if unknown:
        parser.error(f"no such case: {unknown[0]}; there are {', '.join(CASES)}")
    results = {}
    for name in args.cases or CASES:
        print(f"\n{name}: {CASES[name].__doc__.splitlines()[0]}", flush=True)
        results[name] = CASES[name](args.rounds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def write_file(path: Path, nbytes: int) -> None:
    block = os.urandom(MIB)
    with open(path, "wb") as file:
        for _ in range(nbytes // MIB):
            file.write(block)


def read_through(path: Path, size: int = 128 * KIB) -> int:
    total = 0
    with open(path, "rb", buffering=0) as file:
        while part := file.read(size):
            total += len(part)
    return total


# --- hits


def random_reads(path: Path, size: int, count: int, threads: int) -> float:
    """Seconds for `count` reads of `size` bytes at random aligned places."""

    def work(seed: int) -> None:
        rng, fd = random.Random(seed), os.open(path, os.O_RDONLY)
        for _ in range(count // threads):
            os.pread(fd, size, rng.randrange(SPAN_BYTES // size) * size)
        os.close(fd)

    pool = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    start = time.perf_counter()
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return time.perf_counter() - start


def hit_round(mounted: Mounted) -> list[tuple[float, float]]:
    """(wall, daemon CPU) in us per request, for each of HIT_CASES."""
    out = []
    for _, size, count, threads in HIT_CASES:
        random_reads(mounted.path / "f", size, count // 10, threads)
        before = mounted.cpu_seconds()
        wall = random_reads(mounted.path / "f", size, count, threads)
        out.append((wall / count * 1e6, (mounted.cpu_seconds() - before) / count * 1e6))
    return out


def bench_hits(rounds: int) -> dict:
    """A hit against the floor, us per request: at most 1.25 x its CPU at 4 KiB, at least 0.85 x its throughput from 128 KiB."""
    rows: dict[str, list[list[tuple[float, float]]]] = {"floor": [], "cachefs": []}
    with mounts.scratch() as work:
        source = work / "source"
        source.mkdir()
        write_file(source / "f", SPAN_BYTES)
        for _ in range(rounds):
            with mounts.floor(work) as mounted:
                rows["floor"].append(hit_round(mounted))
            with mounts.cachefs(work, source, "--cache-size", "256M") as mounted:
                read_through(mounted.path / "f")
                rows["cachefs"].append(hit_round(mounted))
                figures = mounted.statistics()["cache"]
                assert figures["page_misses"] + figures["evictions"]["capacity"] <= SPAN_BYTES // 4096, "not all hits"
    result = {}
    for i, (case, *_) in enumerate(HIT_CASES):
        wall = {name: statistics.median(row[i][0] for row in table) for name, table in rows.items()}
        cpu = {name: statistics.median(row[i][1] for row in table) for name, table in rows.items()}
        wall_ratio = statistics.median(a[i][0] / b[i][0] for a, b in zip(rows["cachefs"], rows["floor"], strict=True))
        cpu_ratio = statistics.median(a[i][1] / b[i][1] for a, b in zip(rows["cachefs"], rows["floor"], strict=True))
        result[case] = {"wall_us": wall, "cpu_us": cpu, "wall_ratio": wall_ratio, "cpu_ratio": cpu_ratio}
        figures = "   ".join(f"{name} {wall[name]:7.1f} / {cpu[name]:7.1f}" for name in wall)
        print(
            f"  {case:6s} {figures}   CPU x {cpu_ratio:.2f}   throughput x {1 / wall_ratio:.2f}",
            flush=True,
        )
    return result


# --- cold reads


def bench_cold(rounds: int) -> dict:
    """Cold reads through 10 ms and 200 MB/s: sequential at least 150 MB/s; a random 4 KiB read fetches at most 16 KiB."""
    nbytes, rates, fetched = 256 * MIB, [], []
    slow = ("--simulate-latency", "10ms", "--simulate-bandwidth", "200M", "--cache-size", "512M")
    with mounts.scratch() as work:
        source = work / "source"
        source.mkdir()
        write_file(source / "f", nbytes)
        for i in range(min(rounds, 3)):
            with mounts.cachefs(work, source, *slow) as mounted:
                start = time.perf_counter()
                read_through(mounted.path / "f")
                rates.append(nbytes / (time.perf_counter() - start) / 1e6)
            with mounts.cachefs(work, source, *slow) as mounted:
                rng, fd = random.Random(i), os.open(mounted.path / "f", os.O_RDONLY)
                pages = rng.sample(range(1, nbytes // 4096), 100)
                for page in pages:
                    os.pread(fd, 4096, page * 4096)
                os.close(fd)
                fetched.append(mounted.statistics()["backing"]["read_bytes"] / len(pages))
    result = {"sequential_mb_per_second": statistics.median(rates), "random_read_fetches_bytes": statistics.median(fetched)}
    rate = result["sequential_mb_per_second"]
    print(f"  sequential, 128 KiB reads: {rate:.0f} MB/s of 200 ({min(rates):.0f}-{max(rates):.0f})")
    print(f"  random 4 KiB reads fetch {result['random_read_fetches_bytes']:.0f} bytes each", flush=True)
    return result


# --- writing, and memory


def write_and_sync(path: Path, nbytes: int) -> tuple[float, float]:
    """(seconds in all with a final fsync, longest single write)."""
    block, longest = os.urandom(MIB), 0.0
    start = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for _ in range(nbytes // MIB):
        before = time.perf_counter()
        os.write(fd, block)
        longest = max(longest, time.perf_counter() - before)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - start, longest


class Watch:
    """Samples of a mount every 100 ms: most dirty bytes, most memory."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted, self.dirty_bytes, self.rss_bytes = mounted, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        os.environ["CACHEFS_RUNTIME_DIR"] = self.mounted.environment["CACHEFS_RUNTIME_DIR"]
        record = find_daemon(str(self.mounted.path))
        while not self._stop.wait(0.1):
            for reply in control.request(record.socket, {"command": "status"}, 30.0, None):
                self.dirty_bytes = max(self.dirty_bytes, reply["statistics"]["writeback"]["dirty_bytes"])
            self.rss_bytes = max(self.rss_bytes, self.mounted.rss_bytes())


def bench_write(rounds: int) -> dict:
    """2 GiB written with --cache-size 256M --dirty-limit 64M, against the directory itself, both with a final fsync."""
    nbytes, rows = 2048 * MIB, []
    with mounts.scratch() as work:
        source = work / "source"
        source.mkdir()
        for i in range(min(rounds, 4)):
            bare = lambda: write_and_sync(source / "bare", nbytes)[0]  # noqa: E731
            bare_first = bare() if i % 2 == 0 else None  # in turn, so that neither always finds the disk busy
            with mounts.cachefs(work, source, "--cache-size", "256M", "--dirty-limit", "64M") as mounted, Watch(mounted) as watch:
                ours, longest = write_and_sync(mounted.path / "ours", nbytes)
            theirs = bare_first if bare_first is not None else bare()
            rows.append((theirs / ours, nbytes / ours / 1e6, nbytes / theirs / 1e6, longest, watch.dirty_bytes, watch.rss_bytes))
            for name in ("bare", "ours"):
                (source / name).unlink()
    result = {
        "throughput_ratio": statistics.median(row[0] for row in rows),
        "mb_per_second": statistics.median(row[1] for row in rows),
        "bare_mb_per_second": statistics.median(row[2] for row in rows),
        "longest_write_seconds": max(row[3] for row in rows),
        "most_dirty_bytes": max(row[4] for row in rows),
        "most_rss_bytes": max(row[5] for row in rows),
    }
    ratios = ", ".join(f"{row[0]:.2f}" for row in rows)
    print(f"  {result['mb_per_second']:.0f} MB/s, the directory itself {result['bare_mb_per_second']:.0f}: x {ratios}")
    print(f"  longest write {result['longest_write_seconds']:.3f} s, most dirty {result['most_dirty_bytes'] / MIB:.1f} MiB of 64")
    print(f"  RSS {result['most_rss_bytes'] / MIB:.0f} MiB of 256", flush=True)
    return result


def bench_memory(rounds: int) -> dict:
    """Memory after 2 million random 4 KiB reads over 4 GiB, with --cache-size 256M."""
    nbytes, count = 4096 * MIB, 2_000_000
    with mounts.scratch() as work:
        source = work / "source"
        source.mkdir()
        with open(source / "f", "wb") as file:
            file.truncate(nbytes)
        with mounts.cachefs(work, source, "--cache-size", "256M") as mounted:
            rng, fd = random.Random(1), os.open(mounted.path / "f", os.O_RDONLY)
            start = time.perf_counter()
            for _ in range(count):
                os.pread(fd, 4096, rng.randrange(nbytes // 4096) * 4096)
            seconds = time.perf_counter() - start
            os.close(fd)
            result = {"rss_bytes": mounted.rss_bytes(), "us_per_read": seconds / count * 1e6}
    print(f"  RSS {result['rss_bytes'] / MIB:.0f} MiB of 256, {result['us_per_read']:.0f} us a read", flush=True)
    return result


# --- the journal


class Writer:
    """Writes to one file of one mount, in bursts."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted, self.path = mounted, mounted.path / "random"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
        self.rng, self.page = random.Random(1), os.urandom(4 * KIB)
        block = os.urandom(MIB)
        for i in range(JOURNAL_SPAN_BYTES // MIB):
            os.pwrite(self.fd, block, i * MIB)
        os.fsync(self.fd)

    def random_4k(self, count: int = 2000) -> tuple[float, float]:
        """(wall, daemon CPU) in us a write of 4 KiB at a random place."""
        pages, cpu, start = JOURNAL_SPAN_BYTES // 4096, self.mounted.cpu_seconds(), time.perf_counter()
        for _ in range(count):
            os.pwrite(self.fd, self.page, self.rng.randrange(pages) * 4096)
        wall = time.perf_counter() - start
        return wall / count * 1e6, (self.mounted.cpu_seconds() - cpu) / count * 1e6

    def sequential_1m(self, nbytes: int = 1024 * MIB) -> tuple[float, float]:
        """(wall, daemon CPU) in us a MiB of a new file that is synced at its end."""
        cpu = self.mounted.cpu_seconds()
        seconds, _ = write_and_sync(self.mounted.path / "sequential", nbytes)
        used = self.mounted.cpu_seconds() - cpu
        os.unlink(self.mounted.path / "sequential")
        return seconds / (nbytes // MIB) * 1e6, used / (nbytes // MIB) * 1e6


def bench_journal(rounds: int) -> dict:
    """What the journal costs writers, against --durability none: at most 25 % of 4 KiB random, 15 % of 1 MiB sequential writes.

    Both mounts are there at once, and take turns after each burst.
    """
    with contextlib.ExitStack() as stack:
        writers = {}
        for durability in ("none", "backing"):
            work = stack.enter_context(mounts.scratch())
            (work / "source").mkdir()
            options = ("--durability", durability, "--cache-size", "1G", "--dirty-limit", "256M")
            mounted = stack.enter_context(mounts.cachefs(work, work / "source", *options))
            writers[durability] = Writer(mounted)
            stack.callback(os.close, writers[durability].fd)
        result = {}
        for case, turns in (("random_4k", 20 * rounds), ("sequential_1m", rounds)):
            for writer in writers.values():
                for _ in range(20 if case == "random_4k" else 1):  # until the journal's pages are warm
                    getattr(writer, case)()
            rows = []
            for turn in range(turns):
                order = ("none", "backing") if turn % 2 else ("backing", "none")
                rows.append({name: getattr(writers[name], case)() for name in order})
            ratios = sorted(row["none"][0] / row["backing"][0] for row in rows)
            median = {name: [statistics.median(row[name][i] for row in rows) for i in (0, 1)] for name in writers}
            ratio = statistics.median(ratios)
            result[case] = {"throughput_ratio": ratio, "wall_cpu_us": median}
            spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f}"
            figures = "   ".join(f"{name} {wall:7.1f} / {cpu:6.1f}" for name, (wall, cpu) in median.items())
            print(f"  {case:14s} {figures}   throughput x {ratio:.2f} (half of the rounds {spread})", flush=True)
    return result


# --- what it costs to see


def bench_see(rounds: int) -> dict:
    """4 KiB hits with metrics, accounting per program, ghosts and a page that is watched, against none of it: under 5 % more.

    Both mounts are there at once, and take turns after each burst of a tenth of a second; the one that is on is watched all the
    time. A ratio is that of twenty bursts of each, so that looks and scrapes fall into it as often as they come.
    """
    cases, bursts = {"4k x1": (5000, 1), "4k x4": (8000, 4)}, 20
    with contextlib.ExitStack() as stack:
        mounted = {}
        for name in ("off", "on"):
            work = stack.enter_context(mounts.scratch())
            (work / "source").mkdir()
            write_file(work / "source" / "f", SPAN_BYTES)
            options = ("--cache-size", "256M", *(("--metrics", "off") if name == "off" else ()))
            program = (str(mounts.HERE / "bare.py"),) if name == "off" else ("-m", "cachefs")
            mounted[name] = stack.enter_context(mounts.cachefs(work, work / "source", *options, program=program))
            read_through(mounted[name].path / "f")
        watcher = subprocess.Popen([sys.executable, str(mounts.HERE / "watcher.py"), mounted["on"].status()["page"]])
        stack.callback(watcher.kill)
        rows: dict[str, list[dict[str, tuple[float, float]]]] = {case: [] for case in cases}
        for turn in range(-1, 5 * rounds):
            for case, (count, threads) in cases.items():
                wall = dict.fromkeys(mounted, 0.0)
                cpu = {name: mounted[name].cpu_seconds() for name in mounted}
                for burst in range(bursts):
                    for name in ("off", "on") if burst % 2 else ("on", "off"):
                        wall[name] += random_reads(mounted[name].path / "f", 4 * KIB, count, threads)
                per = 1e6 / (count * bursts)
                row = {name: (wall[name] * per, (mounted[name].cpu_seconds() - cpu[name]) * per) for name in mounted}
                if turn >= 0:
                    rows[case].append(row)
        assert watcher.poll() is None, "nobody watched"
        assert mounted["off"].statistics()["cache"]["reads_hit"] < cases["4k x1"][0], "the other one counts too"
    result = {}
    for case, found in rows.items():
        ratios = [sorted(row["on"][i] / row["off"][i] for row in found) for i in (0, 1)]
        wall, cpu = map(statistics.median, ratios)
        median = {name: [statistics.median(row[name][i] for row in found) for i in (0, 1)] for name in ("off", "on")}
        result[case] = {"wall_ratio": wall, "cpu_ratio": cpu, "wall_cpu_us": median}
        figures = "   ".join(f"{name} {one:6.1f} / {two:5.1f}" for name, (one, two) in median.items())
        spread = f"{ratios[0][len(found) // 4]:.3f} to {ratios[0][3 * len(found) // 4]:.3f}"
        print(f"  {case:6s} {figures}   wall x {wall:.3f} (half of the rounds {spread})   CPU x {cpu:.3f}", flush=True)
    return result


CASES: dict[str, Callable[[int], dict]] = {
    "hits": bench_hits, "cold": bench_cold, "write": bench_write, "journal": bench_journal, "memory": bench_memory,
    "see": bench_see,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
