"""Eviction policies side by side: time per operation, memory per page, hit ratios on made-up loads and on traces.

Times are CPU time of this process, best of several rounds. The traces are read from a folder that is not part of this
repository (--traces); without it that table is left out.
"""

import argparse
import csv
import gc
import importlib.util
import itertools
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cachefs.cache.policy import PAGES_PER_GROUP, POLICIES, Policy, make  # noqa: E402

ALL = (1 << PAGES_PER_GROUP) - 1
ROUNDS = 5
LOAD_CACHE_PAGES = 8192
LOAD_REQUESTS = 300_000
TRACES = {"p3_4k": (1023, 5117, 10235), "lirs_sprite": (354, 708, 1769), "cp_4k": (13460, 26921, 67302)}
REFERENCES = ("OPT", "ARC", "W-TinyLFU")

Request = tuple[int, int]  # first page, number of pages
Row = dict[str, str | float]


def anything(_key: int) -> int:
    return ALL


# Time and memory.


def random_pages(rng: random.Random, count: int, file_pages: int) -> list[tuple[int, int]]:
    """(key, mask) of distinct single pages of a file."""
    return [(1 << 32 | page >> 8, 1 << (page & 255)) for page in rng.sample(range(file_pages), count)]


def best_ns(work: Callable[[], int]) -> float:
    """Runs the work, which returns how many operations it did, several times."""
    best = float("inf")
    for _ in range(ROUNDS):
        gc.collect()
        gc.disable()
        begin = time.process_time_ns()
        operations = work()
        best = min(best, (time.process_time_ns() - begin) / operations)
        gc.enable()
    return best


def filled(name: str, runs: Iterable[tuple[int, int]], capacity_pages: int) -> Policy:
    policy = make(name, capacity_pages)
    for key, mask in runs:
        policy.admit(key, mask)
    return policy


def touch_ns(name: str, resident: list[tuple[int, int]]) -> float:
    policy = filled(name, resident, 1 << 17)
    order = random.Random(2).choices(resident, k=50_000)

    def work() -> int:
        touch = policy.touch
        for key, mask in order:
            touch(key, mask)
        return len(order)

    return best_ns(work)


def replace_ns(name: str, resident: list[tuple[int, int]], fresh: Iterator[tuple[int, int]]) -> float:
    """One admission and the evictions that make room for it."""
    policy = filled(name, resident, sum(mask.bit_count() for _, mask in resident))

    def work() -> int:
        runs = list(itertools.islice(fresh, 2000))
        for key, mask in runs:
            policy.victims(mask.bit_count(), anything)
            policy.admit(key, mask)
        return len(runs)

    return best_ns(work)


def pause_ms(name: str, resident: list[tuple[int, int]]) -> float:
    """The longest call: one single victim right after every resident page was hit three times."""
    policy = filled(name, resident, len(resident))
    for key, mask in resident * 3:
        policy.touch(key, mask)
    begin = time.process_time_ns()
    policy.victims(1, anything)
    return (time.process_time_ns() - begin) / 1e6


def bytes_per_page(name: str, runs: Callable[[], Iterator[tuple[int, int]]]) -> float:
    gc.collect()
    tracemalloc.start()
    policy = make(name, 1 << 20)
    for key, mask in runs():
        policy.admit(key, mask)
        policy.touch(key, mask)
    size, pages = tracemalloc.get_traced_memory()[0], len(policy)
    tracemalloc.stop()
    return size / pages


def sparse_pages() -> Iterator[tuple[int, int]]:
    """The worst case: no two pages share a group."""
    rng = random.Random(3)
    for group in rng.sample(range(1 << 24), 50_000):
        yield 1 << 32 | group, 1 << rng.randrange(PAGES_PER_GROUP)


def dense_pages() -> Iterator[tuple[int, int]]:
    """Random pages, a quarter of their file."""
    for key, mask in random_pages(random.Random(3), 50_000, 200_000):
        yield key + 0, mask + 0


def short_runs() -> Iterator[tuple[int, int]]:
    order = random.Random(3).sample(range(50_000 // 16), 50_000 // 16)
    return ((1 << 32 | place >> 4, 0xFFFF << (place & 15) * 16) for place in order)


def costs(name: str) -> Row:
    rng = random.Random(1)
    pages = random_pages(rng, 220_000, 400_000)
    single, more = pages[:100_000], pages[100_000:]
    runs = [(2 << 32 | group, ALL) for group in range(400)]
    later = ((3 << 32 | group, ALL) for group in itertools.count())
    return {
        "policy": name,
        "touch_4k_ns": touch_ns(name, single),
        "touch_1m_ns": touch_ns(name, runs),
        "replace_4k_ns": replace_ns(name, single, iter(more)),
        "replace_1m_ns": replace_ns(name, runs, later),
        "pause_4k_ms": pause_ms(name, single),
        "pause_1m_ms": pause_ms(name, runs),
        "bytes_a_page_sparse": bytes_per_page(name, sparse_pages),
        "bytes_a_page_random": bytes_per_page(name, dense_pages),
        "bytes_a_page_64k_runs": bytes_per_page(name, short_runs),
    }


# Made-up loads: requests against a cache of LOAD_CACHE_PAGES. The working set is 0.8 of it, a scan reads 10 x it.


def zipf(rng: random.Random, pages: int, skew: float) -> Iterator[int]:
    """Draws of scattered pages whose popularity falls with rank ** -skew."""
    weights = list(itertools.accumulate((rank + 1) ** -skew for rank in range(pages)))
    shuffled = rng.sample(range(pages), pages)
    while True:
        for rank in rng.choices(range(pages), cum_weights=weights, k=4096):
            yield shuffled[rank]


def scan() -> Iterator[Request]:
    """A file of ten times the cache, read again and again, 128 KiB at a time."""
    first = 1 << 40
    while True:
        for at in range(0, 10 * LOAD_CACHE_PAGES, 32):
            yield first + at, 32


def working_set(skew: float) -> Iterator[Request]:
    return ((page, 1) for page in zipf(random.Random(4), LOAD_CACHE_PAGES * 8 // 10, skew))


def mixed() -> Iterator[Request]:
    """One scan request among every 32 to the working set: as many pages of the one as of the other."""
    reads, scanner = working_set(0.9), scan()
    while True:
        yield from itertools.islice(reads, 32)
        yield next(scanner)


def prefetched() -> Iterator[Request]:
    """As mixed, but every scan request comes twice: a prefetch, then the read that hits what it brought."""
    for request in mixed():
        yield request
        if request[1] > 1:
            yield request


def phases() -> Iterator[Request]:
    """The working set for a while, then one whole scan, and so on: a nightly backup."""
    reads, scanner = working_set(0.9), scan()
    while True:
        yield from itertools.islice(reads, 40_000)
        yield from itertools.islice(scanner, 10 * LOAD_CACHE_PAGES // 32)


def shifting() -> Iterator[Request]:
    """A working set that is replaced by another one every 50,000 requests: old favourites must go."""
    for generation in itertools.count():
        for page, count in itertools.islice(working_set(0.9), 50_000):
            yield page + (generation << 20), count


def loop() -> Iterator[Request]:
    """A file of 1.25 times the cache read in a circle, 128 KiB at a time."""
    for at in itertools.cycle(range(0, LOAD_CACHE_PAGES * 5 // 4, 32)):
        yield at, 32


def large_zipf() -> Iterator[Request]:
    """No scan at all: skewed reads of eight times the cache."""
    return ((page, 1) for page in zipf(random.Random(5), LOAD_CACHE_PAGES * 8, 0.9))


LOADS: dict[str, Callable[[], Iterator[Request]]] = {
    "mixed": mixed,
    "prefetched": prefetched,
    "phases": phases,
    "shifting": shifting,
    "loop": loop,
    "large_zipf": large_zipf,
}


def replay(policy: Policy, requests: Iterable[Request]) -> tuple[int, int, int, int]:
    """Feeds requests to a policy as a full cache would: (hits, pages) of single page requests, then of longer ones."""
    resident: dict[int, int] = {}
    known = 0
    counts = [0, 0, 0, 0]
    for page, count in requests:
        key, asked = page >> 8, ((1 << count) - 1) << (page & 255)
        assert asked <= ALL, "a request of a load does not leave its group"
        held = resident.get(key, 0)
        hit = asked & held
        place = 0 if count == 1 else 2
        counts[place] += hit.bit_count()
        counts[place + 1] += count
        if hit:
            policy.touch(key, hit)
        missed = asked ^ hit
        if missed:
            known += missed.bit_count()
            if known > policy.capacity_pages:
                for gone_key, gone in policy.victims(known - policy.capacity_pages, anything):
                    known -= gone.bit_count()
                    resident[gone_key] ^= gone
            policy.admit(key, missed)
            resident[key] = resident.get(key, 0) | missed
    return counts[0], counts[1], counts[2], counts[3]


def load_row(load: str) -> Row:
    row: Row = {"load": load}
    for name in POLICIES:
        policy = make(name, LOAD_CACHE_PAGES)
        hits, pages, long_hits, long_pages = replay(policy, itertools.islice(LOADS[load](), LOAD_REQUESTS))
        row[name] = 100 * (hits + long_hits) / (pages + long_pages)
        if pages and long_pages:
            row[f"{name}, working set"] = 100 * hits / pages
    return row


# Traces.


def trace_reader(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_trace", folder / "read_trace.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_ratios(folder: Path, trace: str, capacity: int) -> Row:
    """What simulators measured for other policies, in per cent; the best source of each."""
    best: Row = dict.fromkeys(REFERENCES, 0.0)
    with open(folder / "reference.csv", newline="") as file:
        for row in csv.DictReader(file):
            name = row["policy"]
            if row["trace"] == trace and int(row["cache_pages"]) == capacity and name in REFERENCES:
                best[name] = max(float(best[name]), 100 * float(row["hit_ratio"]))
    return best


def trace_rows(folder: Path) -> Iterator[Row]:
    sys.dont_write_bytecode = True
    reader = trace_reader(folder)
    for trace, capacities in TRACES.items():
        accesses = [(page, 1) for page in reader.accesses(folder / f"{trace}.csv.xz")]
        for capacity in capacities:
            row: Row = {"trace": trace, "cache_pages": capacity}
            for name in POLICIES:
                row[name] = 100 * replay(make(name, capacity), accesses)[0] / len(accesses)
            yield row | reference_ratios(folder, trace, capacity)


def print_table(title: str, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[f"{row.get(c, '-'):.1f}" if isinstance(row.get(c), float) else str(row.get(c, "-")) for c in columns]
             for row in rows]  # fmt: skip
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times, memory and hit ratios of the eviction policies.")
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces", help="folder of the traces")
    parser.add_argument("--only", choices=("costs", "loads", "traces"), help="one part instead of all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    parts: dict[str, tuple[str, Callable[[], Iterable[Row]]]] = {
        "costs": ("Costs: CPU ns an operation, bytes a page", lambda: map(costs, POLICIES)),
        "loads": (f"Hit ratio, %, {LOAD_CACHE_PAGES} pages of cache", lambda: map(load_row, LOADS)),
        "traces": ("Hit ratio on traces, %; last columns: other simulators", lambda: trace_rows(arguments.traces)),
    }
    if not (arguments.traces / "reference.csv").exists():
        if arguments.only == "traces":
            parser.error(f"no traces in {arguments.traces}")
        del parts["traces"]
    result = {}
    for part, (title, rows) in parts.items():
        if arguments.only in (None, part):
            result[part] = list(rows())
            if not arguments.json:
                print_table(title, result[part])
    if arguments.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
