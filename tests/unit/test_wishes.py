"""What people ask of the cache: pins, warm pages, pages for one use, another size, another policy."""

from __future__ import annotations

import pytest

from cachefs.cache import leaving, wishes
from cachefs.cache.figures import statistics_of
from cachefs.cache.file import CachedFile
from cachefs.cache.page import GROUP_PAGES, GROUP_SIZE, PAGE_SIZE
from cachefs.cache.policy import POLICIES, make
from cachefs.cache.waits import NoRoom
from checked import Checked, contents

P = PAGE_SIZE
ANY_POLICY = pytest.mark.parametrize("policy", sorted(POLICIES))


def scan(cache: Checked, pages: int, transient: bool = False) -> CachedFile:
    """Reads a file of its own once, page by page."""
    file = cache.file(pages * P)
    for page in range(pages):
        if cache.seen(file, page * P, P) is None:
            cache.end(cache.start_fill(file, page, 1, 1, transient))
            if transient:
                wishes.drop_transient(cache, file, page, page + 1)
    return file


def hits(cache: Checked, file: CachedFile, pages: int) -> int:
    return sum(cache.lookup(file, page * P, P) is not None for page in range(pages))


@ANY_POLICY
def test_a_pinned_file_stays_whatever_comes(policy: str) -> None:
    cache = Checked(policy, 64)
    file = cache.file(20 * P)
    cache.bring(file, 0, 10)
    wishes.pin(cache, file, True)
    cache.bring(file, 10, 10)
    cache.check_invariants()
    scan(cache, 500)
    assert hits(cache, file, 20) == 20
    assert (cache.pinned_pages, statistics_of(cache).pinned_pages) == (20, 20)
    assert cache.evict(64) == 44
    wishes.pin(cache, file, False)
    cache.check_invariants()
    assert cache.evict(64) == 20 and statistics_of(cache).pinned_pages == 0


@ANY_POLICY
def test_states_add_up_to_what_is_resident(policy: str) -> None:
    cache = Checked(policy, 64)
    file = cache.file(20 * P)
    wishes.pin(cache, file, True)
    cache.bring(file, 0, 10)
    cache.put(file, 0, b"x" * 3 * P)
    cache.start_writeback(file.groups[0], 0b11)
    cache.put(file, 0, b"y" * P)
    fill = cache.begin(file, 15, 3)
    s = statistics_of(cache)
    assert (s.clean_pages, s.dirty_pages, s.writeback_pages, s.filling_pages, s.pinned_pages) == (0, 2, 1, 3, 7)
    cache.end(fill)
    cache.finish_writeback(file.groups[0], 0b11, 1.0)
    cache.check_invariants()
    s = statistics_of(cache)
    assert (s.clean_pages, s.dirty_pages, s.writeback_pages, s.filling_pages, s.pinned_pages) == (0, 3, 0, 0, 10)
    leaving.discard(cache, file)
    cache.check_invariants()
    assert cache.pinned_pages == 0


def test_pins_beyond_their_limit_make_room_like_others() -> None:
    cache = Checked("lru", 64)
    cache.pin_limit_pages = 32
    file = cache.file(64 * P)
    wishes.pin(cache, file, True)
    cache.bring(file, 0, 64)
    scan(cache, 10)
    assert cache.resident_pages == 64 and cache.pinned_pages == 54
    scan(cache, 200)
    assert cache.pinned_pages == 32


def test_what_is_pinned_or_unwritten_is_not_dropped() -> None:
    cache = Checked("s3fifo", 64)
    pinned, file = cache.file(10 * P), cache.file(10 * P)
    wishes.pin(cache, pinned, True)
    for each in (pinned, file):
        cache.bring(each, 0, 10)
        cache.put(each, 0, b"x" * P)
        assert wishes.drop(cache, each) == (0 if each is pinned else 9)
        cache.check_invariants()
    assert file.groups[0].uptodate == 1 and pinned.groups[0].uptodate == 0x3FF


def test_groups_are_dropped_one_by_one() -> None:
    cache = Checked("lru", 3 * GROUP_PAGES)
    file = cache.file(3 * GROUP_SIZE)
    for index in range(3):
        cache.bring(file, index * GROUP_PAGES, GROUP_PAGES)
    assert wishes.drop(cache, file, [1, 7]) == GROUP_PAGES
    cache.check_invariants()
    assert sorted(file.groups) == [0, 2]


@pytest.mark.parametrize("policy", ["s3fifo", "sieve"])
def test_what_was_asked_for_by_name_survives_what_is_read_once(policy: str) -> None:
    cache = Checked(policy, 64)
    scan(cache, 100)  # full, and past the first eviction
    file = cache.file(30 * P)
    cache.bring(file, 0, 30)
    wishes.want(cache, file, 0, 30)
    cache.check_invariants()
    scan(cache, 60)
    assert hits(cache, file, 30) == 30


@ANY_POLICY
def test_pages_for_one_use_push_out_nothing_but_each_other(policy: str) -> None:
    cache = Checked(policy, 64)
    hot = cache.file(40 * P)
    cache.bring(hot, 0, 40)
    for _ in range(3):
        assert hits(cache, hot, 40) == 40
    scan(cache, 640, transient=True)
    assert hits(cache, hot, 40) == 40
    assert cache.evictions["capacity"] == 0 and cache.evictions["noreuse"] >= 630
    assert cache.refaults == 0


def test_pages_for_one_use_stay_until_they_are_used_and_while_others_are_dirty() -> None:
    cache = Checked("lru", 64)
    file = cache.file(20 * P)
    cache.end(cache.start_fill(file, 0, 8, 2, True))
    wishes.drop_transient(cache, file, 1, 2)
    assert file.groups[0].uptodate == 0b1111_1110, "the page being read, and those that nobody has read yet"
    assert cache.seen(file, P, 7 * P) is not None
    cache.put(file, 3 * P, b"x" * P)  # a writer who will want it
    wishes.drop_transient(cache, file)
    assert file.groups[0].uptodate == 0b1000
    cache.written(file)
    wishes.drop_transient(cache, file, unread_too=True)
    assert file.groups[0].uptodate == 0b1000 and not file.transient


def test_what_was_written_for_one_use_leaves_when_it_is_on_the_backing() -> None:
    cache = Checked("s3fifo", 64)
    file = cache.file(0)
    cache.write(file, 0, b"x" * 5 * P, transient=True)
    cache.put(file, 4 * P, b"y" * P)
    wishes.drop_transient(cache, file)
    assert cache.resident_pages == 5
    cache.written(file)
    assert file.groups[0].uptodate == 0b10000, "the page that somebody else has written to stays"


@ANY_POLICY
@pytest.mark.parametrize("other", sorted(POLICIES))
def test_another_policy_takes_over_and_keeps_the_order(policy: str, other: str) -> None:
    cache = Checked(policy, 64)
    old, new = cache.file(32 * P), cache.file(32 * P)
    cache.bring(old, 0, 32)
    cache.bring(new, 0, 32)
    wishes.use_policy(cache, make(other, 64))
    cache.check_invariants()
    assert cache.policy.name == other and cache.resident_pages == 64
    scan(cache, 20)
    if policy == other == "lru":
        assert (old.resident_pages, new.resident_pages) == (12, 32)
    assert old.resident_pages + new.resident_pages < 64
    cache.check_invariants()


@ANY_POLICY
def test_the_cache_grows_and_shrinks(policy: str) -> None:
    cache = Checked(policy, 64)
    big = cache.file(10_000 * P)
    for page in range(64):
        cache.bring(big, page * 100)  # each in a slot of its own, or nearly
    assert cache.arena.most_pages >= 64
    grown = cache.arena.most_pages
    assert wishes.resize(cache, grown) and cache.capacity_pages == grown
    cache.check_invariants()
    scan(cache, 200)
    assert cache.resident_pages == min(264, grown)
    assert wishes.resize(cache, 16)
    cache.check_invariants()
    assert cache.resident_pages == cache.capacity_pages == 16
    scan(cache, 50)


def test_shrinking_waits_for_what_may_not_go() -> None:
    cache = Checked("lru", 64)
    file = cache.file(0)
    cache.put(file, 0, b"x" * 20 * P)
    cache.bring(cache.file(40 * P), 0, 40)
    assert not wishes.resize(cache, 16)
    cache.check_invariants()
    assert cache.capacity_pages == 20
    with pytest.raises(NoRoom):
        cache.start_fill(cache.file(P), 0, 1, 1)
    cache.written(file)
    assert wishes.resize(cache, 16)
    cache.check_invariants()


def test_a_large_cache_shrinks_in_steps() -> None:
    cache = Checked("lru", 3 * wishes.SHRINK_PAGES)
    file = cache.file(3 * wishes.SHRINK_PAGES * P)
    for page in range(0, 3 * wishes.SHRINK_PAGES, GROUP_PAGES):
        fill = cache.start_fill(file, page, GROUP_PAGES, GROUP_PAGES)
        cache.finish_fill(fill, GROUP_SIZE)
    steps = 0
    while cache.capacity_pages > 16:
        assert wishes.resize(cache, 16)
        steps += 1
    assert steps == 3
    cache.check_invariants()


def test_memory_goes_back_when_the_cache_shrinks() -> None:
    cache = Checked("lru", 4096)
    file = cache.file(4096 * P)
    for page in range(0, 4096, GROUP_PAGES):
        cache.bring(file, page, GROUP_PAGES)
    before = cache.arena.physical_pages
    assert wishes.resize(cache, 512)
    assert before == 4096 and cache.arena.physical_pages <= 512 + cache.arena.slack_pages
    page = next(iter(file.groups)) * GROUP_PAGES
    assert cache.seen(file, page * P, P) == contents(page * P, P)
