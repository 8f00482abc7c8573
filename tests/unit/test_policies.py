"""The policies against page-level models, golden hit counts, and independent simulators on public traces."""

import csv
import functools
import importlib.util
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.cache.policy import PAGES_PER_GROUP, POLICIES, Policy, make
from cachefs.cache.policy.base import RunQueue, lowest, split

NAMES = sorted(POLICIES)
ALL = (1 << PAGES_PER_GROUP) - 1
Page = tuple[int, int]  # key, bit
Step = tuple[str, int, int | list[int]]  # what, key, mask; or "victims", count, evictable mask of each key


def anything(_key: int) -> int:
    return ALL


def nothing(_key: int) -> int:
    return 0


def mask_of(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


def split_pages(key: int, mask: int) -> list[Page]:
    return [(key, bit) for bit in range(mask.bit_length()) if mask >> bit & 1]


def flat(runs: Iterable[tuple[int, int]]) -> list[Page]:
    return [page for key, mask in runs for page in split_pages(key, mask)]


# Models: the same policies on lists of single pages, oldest first, written to be obviously right.


class ModelLRU:
    def __init__(self, capacity: int) -> None:
        self.queue: list[Page] = []

    def admit(self, page: Page) -> None:
        self.queue.append(page)

    def touch(self, page: Page) -> None:
        self.queue.remove(page)
        self.queue.append(page)

    def remove(self, page: Page) -> None:
        self.queue.remove(page)

    def known(self) -> set[Page]:
        return set(self.queue)

    def victims(self, count: int, may: Callable[[Page], bool]) -> list[Page]:
        out: list[Page] = []
        for page in list(self.queue):
            if len(out) == count:
                break
            self.queue.remove(page)
            if may(page):
                out.append(page)
            else:
                self.queue.append(page)
        return out


class ModelSieve:
    def __init__(self, capacity: int) -> None:
        self.queue: list[Page] = []
        self.visited: set[Page] = set()
        self.hand: Page | None = None  # None: the oldest

    def admit(self, page: Page) -> None:
        self.queue.append(page)

    def touch(self, page: Page) -> None:
        self.visited.add(page)

    def after(self, page: Page) -> Page | None:
        place = self.queue.index(page) + 1
        return self.queue[place] if place < len(self.queue) else None

    def remove(self, page: Page) -> None:
        if page == self.hand:
            self.hand = self.after(page)
        self.visited.discard(page)
        self.queue.remove(page)

    def known(self) -> set[Page]:
        return set(self.queue)

    def victims(self, count: int, may: Callable[[Page], bool]) -> list[Page]:
        out: list[Page] = []
        vain = 0
        while len(out) < count and vain < len(self.queue):
            page = self.hand or self.queue[0]
            self.hand = self.after(page)
            if page in self.visited:
                self.visited.remove(page)
                vain = 0
            elif may(page):
                self.queue.remove(page)
                out.append(page)
            else:
                vain += 1
        return out


class ModelS3FIFO:
    def __init__(self, capacity: int) -> None:
        self.small_size = max(1, capacity // 10)
        self.main_size = capacity - self.small_size
        self.small: list[Page] = []
        self.main: list[Page] = []
        self.ghost: list[Page] = []
        self.hits: dict[Page, int] = {}
        self.evicting = False

    def admit(self, page: Page) -> None:
        self.hits[page] = 0
        if page in self.ghost:
            self.ghost.remove(page)
            self.main.append(page)
        elif not self.evicting and len(self.small) >= self.small_size:
            self.main.append(page)
        else:
            self.small.append(page)

    def touch(self, page: Page) -> None:
        self.hits[page] = min(3, self.hits[page] + 1)

    def remove(self, page: Page) -> None:
        (self.small if page in self.small else self.main).remove(page)
        del self.hits[page]

    def known(self) -> set[Page]:
        return {*self.small, *self.main}

    def victims(self, count: int, may: Callable[[Page], bool]) -> list[Page]:
        self.evicting = True
        out: list[Page] = []
        vain_small = vain_main = 0
        while len(out) < count:
            small_open, main_open = vain_small < len(self.small), vain_main < len(self.main)
            if main_open and (len(self.main) > self.main_size or not small_open):
                page = self.main.pop(0)
                if self.hits[page] == 0 and may(page):
                    out.append(page)
                    continue
                vain_main = 0 if self.hits[page] else vain_main + 1
                self.hits[page] = max(0, self.hits[page] - 1)
                self.main.append(page)
            elif small_open:
                page = self.small.pop(0)
                if self.hits[page] >= 2:
                    self.hits[page] = 0
                    self.main.append(page)
                    vain_main = 0 if may(page) else vain_main + 1
                elif may(page):
                    out.append(page)
                    self.ghost = [*self.ghost, page][-self.main_size :] if self.main_size else []
                else:
                    self.small.append(page)
                    vain_small += 1
            else:
                break
        return out


Model = ModelLRU | ModelSieve | ModelS3FIFO
MODELS: dict[str, type[Model]] = {"lru": ModelLRU, "sieve": ModelSieve, "s3fifo": ModelS3FIFO}

KEYS = st.integers(0, 2)
# Few neighbouring pages so that runs collide, split and join; now and then the far end of a group.
MASKS = st.one_of(st.integers(1, (1 << 9) - 1), st.integers(1, 15).map(lambda mask: mask << 252 | mask))
EVICTABLE = st.lists(st.one_of(st.just(ALL), st.just(0), MASKS), min_size=3, max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), KEYS, MASKS),
        st.tuples(st.just("touch"), KEYS, MASKS),
        st.tuples(st.just("touch"), KEYS, MASKS),
        st.tuples(st.just("remove"), KEYS, MASKS),
        st.tuples(st.just("victims"), st.integers(0, 12), st.just([ALL] * 3)),
        st.tuples(st.just("victims"), st.integers(0, 12), EVICTABLE),
    ),
    max_size=40,
)


def step(policy: Policy, model: Model, what: str, key: int, argument: int | list[int]) -> None:
    """One step on both; `key` is the count for victims. Masks are cut down to what the contract allows."""
    if isinstance(argument, list):
        got = flat(policy.victims(key, lambda group: argument[group]))
        assert got == model.victims(key, lambda page: bool(argument[page[0]] >> page[1] & 1))
        return
    known = policy.pages().get(key, 0)
    mask = argument & ~known if what == "admit" else argument & known
    if mask:
        getattr(policy, what)(key, mask)
        for page in split_pages(key, mask):
            getattr(model, what)(page)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(capacity=st.integers(1, 30), steps=STEPS)
def test_decides_as_its_page_level_model(name: str, capacity: int, steps: list[Step]) -> None:
    policy, model = make(name, capacity), MODELS[name](capacity)
    for what, key, argument in steps:
        step(policy, model, what, key, argument)
        policy.check()
        known = model.known()
        assert set(flat(policy.pages().items())) == known
        assert len(policy) == len(known)
    everything = flat(policy.victims(10_000, anything))
    assert everything == model.victims(10_000, lambda page: True)
    assert len(policy) == 0 and policy.pages() == {}
    policy.check()


@pytest.mark.parametrize("name", NAMES)
def test_decides_as_its_model_over_a_long_life(name: str) -> None:
    """Long enough that queues are swept, logs fill up and ghosts are forgotten."""
    rng = random.Random(7)
    capacity = 60
    policy, model = make(name, capacity), MODELS[name](capacity)
    for _ in range(6000):
        key, mask = rng.randrange(8), rng.choice((1, 3, 7, 15)) << rng.randrange(12)
        what = rng.choices(("admit", "touch", "remove"), (3, 6, 1))[0]
        step(policy, model, what, key, mask)
        if len(policy) > capacity:
            evictable = [ALL if rng.random() < 0.8 else rng.getrandbits(16) for _ in range(8)]
            step(policy, model, "victims", len(policy) - capacity, evictable)
    policy.check()
    assert set(flat(policy.pages().items())) == model.known()


def hits_of(policy: Policy, capacity: int, pages: Iterable[int]) -> int:
    """Feeds single page accesses to a policy as a full cache would."""
    resident: set[int] = set()
    hits = 0
    for page in pages:
        key, mask = page >> 8, 1 << (page & 255)
        if page in resident:
            hits += 1
            policy.touch(key, mask)
            continue
        if len(resident) == capacity:
            ((gone_key, gone),) = policy.victims(1, anything)
            resident.remove(gone_key << 8 | gone.bit_length() - 1)
        policy.admit(key, mask)
        resident.add(page)
    policy.check()
    assert len(policy) == len(resident)
    return hits


def model_hits(model: Model, capacity: int, pages: Iterable[int]) -> int:
    resident: set[int] = set()
    hits = 0
    for page in pages:
        if page in resident:
            hits += 1
            model.touch((0, page))
            continue
        if len(resident) == capacity:
            resident.remove(model.victims(1, lambda page: True)[0][1])
        model.admit((0, page))
        resident.add(page)
    return hits


def skewed(count: int) -> Iterator[int]:
    """Skewed draws from 4,000 pages; plain integer arithmetic, the same everywhere."""
    state = 12345
    for _ in range(count):
        state = (state * 1103515245 + 12345) % (1 << 31)
        draw = state >> 11
        yield draw * draw * draw * 4000 // (1 << 60)


def scanned(count: int) -> Iterator[int]:
    """The skewed draws with a long scan going on in between."""
    for number, page in enumerate(skewed(count)):
        yield page
        yield 10_000 + number % 5000


def looped(count: int) -> Iterator[int]:
    for number in range(count):
        yield number % 550


LOADS: dict[str, Callable[[int], Iterator[int]]] = {"skewed": skewed, "scanned": scanned, "looped": looped}
GOLDEN = {  # as the models above count them, 500 pages, 20,000 draws
    "skewed": {"lru": 7212, "sieve": 8296, "s3fifo": 8562},
    "scanned": {"lru": 4896, "sieve": 7640, "s3fifo": 8111},
    "looped": {"lru": 0, "sieve": 0, "s3fifo": 12956},
}


@pytest.mark.parametrize(("load", "name"), [(load, name) for load in LOADS for name in NAMES])
def test_golden_hit_counts(load: str, name: str) -> None:
    assert hits_of(make(name, 500), 500, LOADS[load](20_000)) == GOLDEN[load][name]


@pytest.mark.parametrize("name", NAMES)
def test_golden_hit_counts_are_those_of_the_models(name: str) -> None:
    for load in LOADS:
        pages = list(LOADS[load](3000))
        assert hits_of(make(name, 100), 100, pages) == model_hits(MODELS[name](100), 100, pages)


# Public traces, measured by simulators that have nothing to do with ours; not part of this repository.

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"


needs_traces = pytest.mark.skipif(
    not (TRACES / "reference.csv").exists(),
    reason="the public traces are not here: ../shared/traces, seen from the repository, does not exist",
)


@functools.cache
def trace_pages(trace: str) -> list[int]:
    path = TRACES / "read_trace.py"
    spec = importlib.util.spec_from_file_location("read_trace", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    return list(module.accesses(TRACES / f"{trace}.csv.xz"))


def reference_hits(trace: str, capacity: int, policies: Iterable[str]) -> dict[str, int]:
    """Source and policy -> hits."""
    with open(TRACES / "reference.csv", newline="") as file:
        return {
            f"{row['source']} {row['policy']}": int(row["hits"])
            for row in csv.DictReader(file)
            if row["trace"] == trace and int(row["cache_pages"]) == capacity and row["policy"] in policies
        }


@needs_traces
@pytest.mark.parametrize("name", ["lru", "sieve"])
@pytest.mark.parametrize(("trace", "capacity"), [("lirs_sprite", 71), ("lirs_sprite", 708), ("p3_4k", 10235)])
def test_lru_and_sieve_equal_three_independent_simulators(name: str, trace: str, capacity: int) -> None:
    reference = reference_hits(trace, capacity, [name.upper()])
    assert len(reference) == 3
    assert {hits_of(make(name, capacity), capacity, trace_pages(trace))} == set(reference.values())


@needs_traces
@pytest.mark.parametrize(("trace", "capacity"), [("lirs_sprite", 354), ("lirs_sprite", 1769), ("p3_4k", 5117)])
def test_s3fifo_is_within_a_point_of_two_independent_simulators(trace: str, capacity: int) -> None:
    pages = trace_pages(trace)
    hits = hits_of(make("s3fifo", capacity), capacity, pages)
    reference = reference_hits(trace, capacity, ["S3-FIFO", "S3-FIFO(t2)"])
    assert len(reference) == 2
    for source, expected in reference.items():
        assert abs(hits - expected) / len(pages) < 0.01, source


# The evictable callback.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("touches", [0, 1, 3])
def test_ends_when_nothing_may_go(name: str, touches: int) -> None:
    policy = make(name, 1000)
    for key in range(5):
        policy.admit(key, ALL)
        for _ in range(touches):
            policy.touch(key, ALL)
    for _ in range(3):
        assert policy.victims(1, nothing) == []
        policy.check()
    assert len(policy) == 5 * 256
    assert len(flat(policy.victims(10_000, anything))) == 5 * 256
    assert policy.victims(1, anything) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("touches", [0, 1, 3])
def test_finds_the_only_page_that_may_go(name: str, touches: int) -> None:
    policy = make(name, 1000)
    for key in range(4):
        policy.admit(key, ALL)
        for _ in range(touches):
            policy.touch(key, ALL)
    one = {2: mask_of(77)}
    assert policy.victims(50, lambda key: one.get(key, 0)) == [(2, mask_of(77))]
    assert policy.pages() == {0: ALL, 1: ALL, 2: ALL ^ mask_of(77), 3: ALL}
    policy.check()


@pytest.mark.parametrize("name", NAMES)
def test_takes_only_what_may_go_and_no_more_than_asked(name: str) -> None:
    policy = make(name, 256)
    policy.admit(1, ALL)
    odd = sum(1 << bit for bit in range(1, 256, 2))
    assert flat(policy.victims(3, lambda key: odd)) == [(1, 1), (1, 3), (1, 5)]
    assert len(flat(policy.victims(256, lambda key: odd))) == 125
    assert policy.pages() == {1: ALL ^ odd}


@pytest.mark.parametrize("name", NAMES)
def test_full_runs_go_whole(name: str) -> None:
    policy = make(name, 2560)
    for key in range(20):
        policy.admit(key, ALL)
    pairs = policy.victims(5 * 256, anything)
    assert len(flat(pairs)) == 5 * 256
    assert len(pairs) <= 6


@pytest.mark.parametrize("name", NAMES)
def test_a_page_forgotten_may_be_admitted_again(name: str) -> None:
    """A page may come and go any number of times while its old places are still queued."""
    policy = make(name, 100)
    policy.admit(0, mask_of(*range(50)))
    for _ in range(5000):
        policy.admit(9, mask_of(3, 4, 200))
        policy.touch(9, mask_of(4))
        policy.remove(9, mask_of(3, 4, 200))
    policy.check()
    assert policy.pages() == {0: mask_of(*range(50))}
    policy.admit(9, mask_of(4))
    assert len(flat(policy.victims(51, anything))) == 51


# What each policy is for.


def test_lru_takes_the_least_recently_used() -> None:
    policy = make("lru", 4)
    for bit in (9, 2, 5, 7):
        policy.admit(1, mask_of(bit))
    policy.touch(1, mask_of(9, 5))
    assert flat(policy.victims(4, anything)) == [(1, 2), (1, 7), (1, 5), (1, 9)]


def test_lru_touches_take_bounded_memory() -> None:
    policy = POLICIES["lru"](1000)
    policy.admit(1, ALL)
    policy.admit(2, ALL)
    for number in range(20_000):
        policy.touch(1 + number % 2, 1 << number % 251)
    policy.check()


def test_sieve_hand_stays_where_it_evicted() -> None:
    policy = make("sieve", 10)
    policy.admit(1, mask_of(0, 1, 2, 3, 4))
    policy.touch(1, mask_of(0, 2))
    assert flat(policy.victims(1, anything)) == [(1, 1)]
    policy.touch(1, mask_of(0))
    assert flat(policy.victims(1, anything)) == [(1, 3)]
    policy.admit(1, mask_of(1))
    assert flat(policy.victims(4, anything)) == [(1, 4), (1, 1), (1, 2), (1, 0)]


def test_s3fifo_remembers_what_failed_probation() -> None:
    policy = make("s3fifo", 100)
    policy.admit(1, ALL)
    policy.victims(156, anything)
    policy.admit(2, mask_of(*range(10)))
    (gone,) = flat(policy.victims(1, anything))
    while gone[0] != 2:
        (gone,) = flat(policy.victims(1, anything))
    policy.admit(*gone[:1], 1 << gone[1])
    policy.admit(3, mask_of(*range(10)))
    assert gone not in flat(policy.victims(18, anything))


@pytest.mark.parametrize(("name", "kept_pages"), [("lru", 0), ("s3fifo", 1024)])
def test_a_scan_longer_than_the_cache(name: str, kept_pages: int) -> None:
    policy = make(name, 1280)
    for key in range(5):
        policy.admit(key, ALL)
    for key in range(4):
        for _ in range(3):
            policy.touch(key, ALL)
    for key in range(100, 106):
        policy.victims(256, anything)
        policy.admit(key, ALL)
    assert sum(policy.pages().get(key, 0).bit_count() for key in range(4)) == kept_pages


@pytest.mark.parametrize("name", NAMES)
def test_resize(name: str) -> None:
    policy = make(name, 1000)
    for key in range(3):
        policy.admit(key, ALL)
    policy.victims(100, anything)
    policy.resize(50)
    policy.check()
    assert policy.capacity_pages == 50
    policy.victims(len(policy) - 50, anything)
    assert len(policy) == 50
    with pytest.raises(ValueError, match="at least 1 page"):
        policy.resize(0)


def test_make_names_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown cache policy 'clock': choose from lru, s3fifo, sieve"):
        make("clock", 10)


# The helpers.


@given(mask=st.integers(0, ALL), count=st.integers(0, 300))
def test_lowest(mask: int, count: int) -> None:
    assert split_pages(0, lowest(mask, count)) == split_pages(0, mask)[:count]


@given(run=st.integers(1, ALL), ripe=st.integers(0, ALL), count=st.integers(1, 300))
def test_split(run: int, ripe: int, count: int) -> None:
    out: list[Page] = []
    passed: list[Page] = []
    for page in split_pages(0, run):
        if len(out) == count:
            break
        (out if ripe >> page[1] & 1 else passed).append(page)
    got_out, got_passed = split(run, run & ripe, count)
    assert (split_pages(0, got_out), split_pages(0, got_passed)) == (out, passed)


def test_runs_that_follow_each_other_become_one() -> None:
    queue = RunQueue()
    for bit in range(256):
        queue.push(5, 1 << bit)
    assert queue.front() == (5, ALL)
    queue.push(5 + 1, 1)
    queue.shift(ALL)
    assert queue.front() == (6, 1)
    queue.check()
