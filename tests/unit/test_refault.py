"""Distances of refaults, against a model that remembers each page; and the time that hits save."""

from __future__ import annotations

import random

import pytest

from cachefs.cache import leaving, reads
from cachefs.cache.page import GROUP_PAGES, PAGE_SIZE
from cachefs.cache.refault import QUANTA_PER_CACHE
from cachefs.savings import Savings
from cachefs.statistics import DISTANCE_BOUNDS_BYTES
from checked import Checked

P = PAGE_SIZE


class Watched(Checked):
    """An LRU cache that is read page by page, and the distance of each refault as a list of all evictions has it."""

    def __init__(self, pages: int) -> None:
        super().__init__("lru", pages)
        self.evicted: list[tuple[int, int]] = []
        self.distances: list[int] = []

    def read(self, file: object, page: int) -> None:
        if self.lookup(file, page * P, P) is not None:  # type: ignore[arg-type]
            return
        key = (file.id, page)  # type: ignore[attr-defined]
        if key in self.evicted:
            last = max(i for i, other in enumerate(self.evicted) if other == key)
            self.distances.append(len(self.evicted) - last)
        resident = self.pages()
        reads.count_request(self, file, page * P, (page + 1) * P)  # type: ignore[arg-type]
        fill = self.start_fill(file, page, 1, 1)  # type: ignore[arg-type]
        self.finish_fill(fill, P)
        self.evicted += sorted(resident - self.pages())

    def pages(self) -> set[tuple[int, int]]:
        found = [(group, bit) for group in self.groups() for bit in range(GROUP_PAGES)]
        return {(group.file.id, group.index * GROUP_PAGES + bit) for group, bit in found if group.uptodate >> bit & 1}


def test_a_loop_one_larger_than_the_cache_refaults_at_once() -> None:
    cache = Watched(16)
    file = cache.file(1000 * P)
    for _ in range(3):
        for page in range(17):
            cache.read(file, page)
    assert cache.refaults == 34 == sum(cache.refault_distances.counts)
    assert cache.refault_distances.counts[0] == 34, "a mebibyte more is enough"
    assert set(cache.distances) == {1} and cache.refault_distances.total_bytes == 34 * P


def test_distances_of_random_reads_are_right_to_a_quantum() -> None:
    cache = Watched(2 * QUANTA_PER_CACHE)
    files = [cache.file(600 * P) for _ in range(2)]
    rng = random.Random(1)
    for _ in range(4000):
        cache.read(rng.choice(files), int(rng.triangular(0, 600, 0)))
    distances = cache.refault_distances
    assert cache.refaults == len(cache.distances) == sum(distances.counts) > 500
    exact = sum(cache.distances) * P
    assert abs(distances.total_bytes - exact) <= len(cache.distances) * distances.quantum_pages * P
    cache.check_invariants()


def test_a_group_that_left_together_costs_one_number_until_its_pages_part() -> None:
    cache = Checked("lru", 2 * GROUP_PAGES)
    file = cache.file(10 * GROUP_PAGES * P)
    for index in range(4):
        cache.bring(file, index * GROUP_PAGES, GROUP_PAGES)
    assert file.evicted_at == {0: 0, 1: 128} and cache.refault_distances.quantum_pages == 2
    cache.bring(file, 5, 100)
    assert file.evicted_at == {0: 0, 1: 128, 2: 256}
    cache.bring(file, 8 * GROUP_PAGES, 156)
    assert list(file.evicted_at[2]) == [256] * 100 + [306] * 156  # type: ignore[arg-type]  # its pages have left in two parts
    leaving.truncate(cache, file, 0)
    assert not file.evicted_at and not file.evicted


def test_what_came_back_whole_is_remembered_no_more() -> None:
    cache = Checked("lru", 16)
    file, other = cache.file(16 * P), cache.file(16 * P)
    cache.bring(file, 0, 16)
    cache.bring(other, 0, 16)
    assert file.evicted and file.evicted_at
    cache.bring(file, 0, 16)
    assert not file.evicted and not file.evicted_at


def test_distances_fall_into_their_buckets() -> None:
    cache = Checked("lru", 256)
    refaults = cache.refault_distances
    file = cache.file(P)
    file.evicted[0] = file.evicted_at[0] = 0
    for bound in DISTANCE_BOUNDS_BYTES:
        refaults._evicted_pages = bound // P  # up to the largest that 16 bits of one page each can tell
        if bound // P <= 0xFFFF:
            refaults.came_back(file, 0, 1)
    assert refaults.counts[:5] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_hits_save_the_latency_that_holds_when_they_happen(latency: float) -> None:
    savings = Savings()
    savings.account(100, 0.0)
    assert savings.seconds == 0
    savings.account(150, latency)
    savings.account(150, 5.0)
    assert savings.seconds == pytest.approx(50 * latency)
