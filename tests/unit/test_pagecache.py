"""PageCache without anything that waits: hits and misses, fills, writes, truncates, evictions, and what is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.cache import leaving, reads, wishes
from cachefs.cache.figures import statistics_of
from cachefs.cache.page import GROUP_PAGES, GROUP_SIZE, PAGE_SIZE, SMALL_PAGES
from cachefs.cache.policy import POLICIES
from cachefs.cache.waits import Busy, Fill, NoRoom, TooDirty
from checked import Checked, contents

P = PAGE_SIZE


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_miss_then_a_hit(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(10 * P)
    assert cache.seen(file, 100, 2 * P) is None
    reads.count_request(cache, file, 100, 2 * P + 100)
    assert (cache.accounts.total("page_misses"), cache.accounts.total("miss_bytes")) == (3, 2 * P)
    assert (cache.reads_miss, cache.misses["cold"]) == (1, 3)
    cache.bring(file, 0, 3)
    assert cache.seen(file, 100, 2 * P) == contents(100, 2 * P)
    assert (cache.accounts.total("page_hits"), cache.reads_hit, cache.accounts.total("hit_bytes")) == (3, 1, 2 * P)


def test_reads_end_with_the_file(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(P + 10)
    cache.bring(file, 0, 2)
    assert cache.seen(file, P, P) == contents(P, 10)
    assert cache.seen(file, P + 10, P) == b""
    assert cache.seen(file, 1 << 60, P) == b""
    assert cache.seen(file, 5, 0) == b""
    assert cache.seen(cache.file(P), 0, 0) == b""


def test_a_read_across_groups_is_one_view_where_slots_are_neighbours() -> None:
    cache = Checked("lru", 600)
    file = cache.file(3 * GROUP_SIZE)
    cache.bring(file, 0, GROUP_PAGES)
    cache.bring(file, GROUP_PAGES, GROUP_PAGES)
    view = cache.lookup(file, GROUP_SIZE - P, 2 * P)
    assert isinstance(view, memoryview) and view == contents(GROUP_SIZE - P, 2 * P)
    assert cache.lookup(file, GROUP_SIZE, 2 * GROUP_SIZE) is None


def test_a_read_across_slots_that_lie_apart_is_joined() -> None:
    cache = Checked("lru", 600)
    file, other = cache.file(3 * GROUP_SIZE), cache.file(3 * GROUP_SIZE)
    cache.bring(file, 0)
    cache.bring(file, GROUP_PAGES - 1)
    cache.bring(other, 256)
    cache.bring(other, 512)
    cache.bring(file, GROUP_PAGES)
    assert cache.seen(file, GROUP_SIZE - 10, 20) == contents(GROUP_SIZE - 10, 20)


def test_a_partial_hit_is_counted_by_pages_and_bytes() -> None:
    cache = Checked("lru", 64)
    file = cache.file(4 * P)
    cache.bring(file, 0, 1)
    reads.count_request(cache, file, 0, 4 * P)
    assert (cache.accounts.total("page_hits"), cache.accounts.total("page_misses"), cache.reads_partial) == (1, 3, 1)
    assert (cache.accounts.total("hit_bytes"), cache.accounts.total("miss_bytes")) == (P, 3 * P)


def test_readahead_is_used_late_or_in_vain() -> None:
    cache = Checked("lru", 16)
    file = cache.file(16 * P)
    fill = cache.begin(file, 0, 8, 2)
    reads.count_request(cache, file, 2 * P, 3 * P)
    assert (cache.readahead_late, cache.readahead_used) == (1, 0)
    cache.end(fill)
    cache.seen(file, 3 * P, 2 * P)
    cache.seen(file, 3 * P, 2 * P)
    assert (cache.readahead_late, cache.readahead_used) == (1, 2)
    assert wishes.drop(cache, file) == 8
    assert cache.readahead_unused == 3 and cache.evictions["dropped"] == 8


# --- filling ----------------------------------------------------------------------------------------------------------


def test_what_the_backing_does_not_have_is_zero(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(2 * P)
    cache.bring(file, 0, 2)
    wishes.drop(cache, file)
    cache.end(cache.begin(file, 0, 2), b"x" * 100)
    assert cache.seen(file, 0, 2 * P) == b"x" * 100 + bytes(2 * P - 100)


def test_a_failed_fill_leaves_nothing(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(8 * P)
    fill = cache.begin(file, 0, 8)
    cache.finish_fill(fill, -1)
    cache.check_invariants()
    assert cache.resident_pages == 0 and not file.groups and fill.done.is_set()


def test_pages_are_absent_or_filling_or_here() -> None:
    cache = Checked("lru", 64)
    file = cache.file(20 * P)
    cache.bring(file, 2, 2)
    fill = cache.begin(file, 6, 3)
    assert file.absent_runs(0, 12) == [(0, 2), (4, 2), (9, 3)]
    assert file.fills_of(0, 7) == [fill] and file.fills_of(0, 6) == []
    cache.end(fill)


def test_runs_end_with_their_group() -> None:
    cache = Checked("lru", 64)
    file = cache.file(600 * P)
    assert file.absent_runs(250, 520) == [(250, 6), (256, 256), (512, 8)]


def test_truncate_poisons_a_fill_under_way(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(8 * P)
    fill = cache.begin(file, 0, 8)
    leaving.truncate(cache, file, 3 * P + 7)
    cache.check_invariants()
    leaving.truncate(cache, file, 8 * P)
    cache.end(fill)
    assert file.groups[0].uptodate == 0b111
    assert cache.seen(file, 0, 3 * P) == contents(0, 3 * P)
    assert cache.seen(file, 3 * P, P) is None


def test_invalidate_poisons_a_fill_under_way(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    file = cache.file(8 * P)
    fill = cache.begin(file, 0, 8)
    assert leaving.invalidate(cache, file) == 0
    cache.end(fill)
    assert not file.groups and not cache.resident_pages


def test_regression_what_somebody_appended_underneath_is_zero_until_it_is_noticed() -> None:
    """Later growth of our own would have shown bytes that were never in the file as programs knew it."""
    cache = Checked("lru", 64)
    file = cache.file(100)
    cache.end(cache.begin(file, 0), b"x" * 300)
    leaving.truncate(cache, file, P)
    assert cache.seen(file, 0, P) == b"x" * 100 + bytes(P - 100)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_only_pages_that_are_covered_in_part_and_hold_data_are_to_be_filled() -> None:
    cache = Checked("lru", 64)
    file = cache.file(4 * P + 100)
    assert file.pages_to_fill(0, P) == []
    assert file.pages_to_fill(1, P) == [0, 1]
    assert file.pages_to_fill(P - 1, 2) == [0, 1]
    assert file.pages_to_fill(10, 5) == [0]
    assert file.pages_to_fill(4 * P, 100) == []  # to the end of the file: nothing is left of the page
    assert file.pages_to_fill(4 * P, 99) == [4]
    assert file.pages_to_fill(4 * P + 200, 9) == [4]
    assert file.pages_to_fill(5 * P + 1, 9) == []
    cache.bring(file, 0)
    assert file.pages_to_fill(1, P) == [1]


places = st.tuples(st.integers(0, 20 * P) | st.integers(GROUP_SIZE - 3 * P, GROUP_SIZE + P), st.integers(1, 4 * P))


@given(st.lists(st.tuples(st.sampled_from(("write", "fill", "written", "drop")), places, st.booleans()), max_size=25))
def test_write_now_does_what_write_does_or_nothing(steps: list[tuple[str, tuple[int, int], bool]]) -> None:
    one, other = Checked("lru", 24), Checked("lru", 24)
    one.dirty_limit_pages = other.dirty_limit_pages = 12
    here, there = one.file(10 * P + 100), other.file(10 * P + 100)
    for byte, (what, (offset, length), transient) in enumerate(steps):
        for cache, file in ((one, here), (other, there)):
            if what == "drop":
                wishes.drop(cache, file)
            elif what == "written":
                cache.written(file)
            elif what == "fill" and file.absent_runs(offset // P, offset // P + 1) and offset < file.size:
                cache.bring(file, offset // P)
        if what == "write":
            data = memoryview(bytes([byte + 1]) * length)
            before = statistics_of(one)
            if one.write_now(here, offset, data, one.accounts.nobody, transient):
                assert not there.pages_to_fill(offset, length) and not there.fills_of(0, 1 << 20)
                other.write(there, offset, data, transient=transient)
            elif one.resident_pages == before.resident_bytes // P:
                assert statistics_of(one) == before
            else:  # room was made, in vain
                return
        one.check_invariants()
        assert statistics_of(one) == statistics_of(other)
        assert here.size == there.size and here.transient == there.transient and list(here.groups) == list(there.groups)
        for index, group in here.groups.items():
            twin = there.groups[index]
            assert (group.dirty, group.uptodate, group.touched) == (twin.dirty, twin.uptodate, twin.touched)
            start, end = index * GROUP_SIZE, min((index + 1) * GROUP_SIZE, here.size)
            for at in range(start, end, P):
                assert reads.peek(one, here, at, min(at + P, end)) == reads.peek(other, there, at, min(at + P, end))


def test_what_came_for_one_use_and_is_written_now_is_for_one_use_no_more() -> None:
    cache = Checked("lru", 64)
    file = cache.file(4 * P)
    cache.write(file, 0, b"x" * 2 * P, transient=True)
    assert cache.write_now(file, 0, memoryview(b"y" * P), cache.accounts.nobody, False)
    assert file.transient == {0: 0b10}


def test_write_now_leaves_alone_what_a_thread_is_reading() -> None:
    cache = Checked("lru", 64)
    file = cache.file(4 * P)
    fill = cache.begin(file, 1)
    data = memoryview(b"x" * P)
    assert not cache.write_now(file, P, data, cache.accounts.nobody, False)
    assert not cache.write_now(file, 2 * P + 1, data[:9], cache.accounts.nobody, False)  # would have to be read first
    cache.end(fill)
    assert cache.write_now(file, P, data, cache.accounts.nobody, False)
    assert not cache.write_now(file, GROUP_SIZE - 1, data[:2], cache.accounts.nobody, False)  # in two groups
    cache.check_invariants()


def test_a_write_into_a_hole_leaves_zeros_around_it(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    old = cache.file(3 * P)
    cache.bring(old, 0, 3)
    wishes.drop(cache, old)  # its memory is used again
    file = cache.file(0)
    cache.put(file, P + 10, b"abc")
    assert file.size == P + 13
    assert cache.seen(file, P, P) == bytes(10) + b"abc"
    leaving.truncate(cache, file, 3 * P)
    assert cache.seen(file, P, P) == bytes(10) + b"abc" + bytes(P - 13)


def test_a_write_across_groups() -> None:
    cache = Checked("lru", 600)
    file = cache.file(0)
    data = contents(5, GROUP_SIZE + 100)
    cache.put(file, GROUP_SIZE - 50, data)
    assert cache.seen(file, GROUP_SIZE - 50, len(data)) == data
    assert cache.dirty_pages == 258 and set(file.dirty_groups) == {0, 1, 2}
    assert file.dirty_extents() == [(GROUP_SIZE - P, len(data) + P - 50)]


def test_the_dirty_limit_is_never_passed(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    cache.dirty_limit_pages = 4
    file = cache.file(0)
    cache.put(file, 0, b"x" * 4 * P)
    with pytest.raises(TooDirty):
        cache.put(file, 4 * P, b"x")
    cache.put(file, 0, b"y" * P)  # dirty already
    cache.start_writeback(file.groups[0], 0b1111)
    with pytest.raises(TooDirty):
        cache.put(file, 0, b"z")  # would be dirty once more
    cache.finish_writeback(file.groups[0], 0b1111, None)
    cache.put(file, 4 * P, b"x")


def test_nothing_that_is_dirty_in_writeback_or_filling_is_evicted(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(16)
    file = cache.file(100 * P)
    cache.put(file, 0, b"x" * 4 * P)
    cache.put(file, 4 * P, b"y" * 4 * P)
    cache.start_writeback(file.groups[0], 0b1111)
    fill = cache.begin(file, 8, 6)
    cache.bring(file, 14, 2)
    cache.bring(file, 50, 2)
    with pytest.raises(NoRoom):
        cache.begin(file, 60, 3)
    cache.check_invariants()
    assert cache.seen(file, 0, 8 * P) == b"x" * 4 * P + b"y" * 4 * P
    cache.end(fill)
    cache.finish_writeback(file.groups[0], 0b1111, None)
    cache.bring(file, 60, 12)
    assert cache.seen(file, 4 * P, 4 * P) == b"y" * 4 * P


def test_regression_a_write_does_not_evict_the_page_it_covers_in_part(make_cache: Callable[[int], Checked]) -> None:
    """The cache is full and the page written to is the next to go: what it held besides was replaced by zeros."""
    cache = make_cache(16)
    file = cache.file(16 * P)
    cache.bring(file, 15)
    cache.bring(file, 0, 15)
    cache.put(file, 16 * P - 10, b"t" * 10 + b"u" * P)
    assert cache.seen(file, 15 * P, 2 * P) == contents(15 * P, P - 10) + b"t" * 10 + b"u" * P
    assert cache.resident_pages == 16


def test_redirtied_pages_stay_dirty(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(16)
    file = cache.file(0)
    cache.put(file, 0, b"x" * 2 * P)
    group = file.groups[0]
    cache.start_writeback(group, 0b11)
    cache.put(file, P, b"y")
    assert statistics_of(cache).dirty_pages == 1 and statistics_of(cache).writeback_pages == 1
    cache.finish_writeback(group, 0b11, None)
    cache.check_invariants()
    assert group.dirty == 0b10 and statistics_of(cache).clean_pages == 1


def test_a_failed_writeback_leaves_everything_dirty() -> None:
    cache = Checked("lru", 16)
    file = cache.file(0)
    cache.put(file, 0, b"x" * 2 * P)
    cache.now = 9.0
    cache.start_writeback(file.groups[0], 0b11)
    cache.put(file, 0, b"y")
    cache.finish_writeback(file.groups[0], 0b11, 0.0)
    cache.check_invariants()
    assert cache.dirty_pages == 2 and not cache.writeback_pages and file.dirty_since == 0.0


# --- eviction and slots ----------------------------------------------------------------------------------------------------


def test_pages_that_were_evicted_and_come_back_are_refaults(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(16)
    file = cache.file(64 * P)
    for page in range(32):
        cache.bring(file, page)
    assert cache.evictions["capacity"] == 16 and cache.resident_pages == 16
    missing = sum(count for _, count in file.absent_runs(0, 32))
    reads.count_request(cache, file, 0, 33 * P)
    assert (cache.refaults, cache.misses["capacity"], cache.misses["cold"]) == (missing, missing, 1)


def test_a_file_that_outgrows_its_small_slot_moves(make_cache: Callable[[int], Checked]) -> None:
    cache = make_cache(64)
    warm = cache.file(GROUP_SIZE)
    cache.bring(warm, 0, 60)
    wishes.drop(cache, warm)  # its slot, full of old bytes, is the one the small file will move to
    file = cache.file(4 * P + 5)
    cache.bring(file, 0, 5)
    cache.put(file, P, b"w" * P)
    assert file.groups[0].capacity == SMALL_PAGES
    leaving.truncate(cache, file, 40 * P)
    cache.bring(file, 30, 2)
    assert file.groups[0].capacity == GROUP_PAGES
    expected = contents(0, P) + b"w" * P + contents(2 * P, 2 * P + 5) + bytes(P - 5)
    assert cache.seen(file, 0, 5 * P) == expected
    assert cache.seen(file, 30 * P, 2 * P) == contents(30 * P, 2 * P)


def test_a_slot_that_threads_work_in_does_not_move() -> None:
    cache = Checked("lru", 64)
    file = cache.file(4 * P)
    fill = cache.begin(file, 0, 1)
    with pytest.raises(Busy):
        cache.begin(file, 20)
    with pytest.raises(Busy):
        cache.put(file, 20 * P, b"x" * P)
    cache.check_invariants()
    cache.end(fill)
    cache.put(file, 0, b"x" * P)
    cache.start_writeback(file.groups[0], 1)
    with pytest.raises(Busy):
        cache.put(file, 20 * P, b"x" * P)
    cache.check_invariants()
    cache.finish_writeback(file.groups[0], 1, None)
    cache.put(file, 20 * P, b"x" * P)


def test_regression_reads_here_and_there_after_a_stream() -> None:
    """Slots that a stream had filled were taken over by single pages, until the arena had nothing to give back: EIO."""
    cache = Checked("lru", 2048)
    file = cache.file(4096 * GROUP_SIZE)
    for index in range(8):
        cache.bring(file, index * GROUP_PAGES, GROUP_PAGES)
    wishes.drop(cache, file)
    for index in range(700):
        cache.finish_fill(cache.start_fill(file, index * GROUP_PAGES + 7, 1, 1), P)
    cache.check_invariants()


# --- anything, in any order ---------------------------------------------------------------------------------------------

actions = st.lists(
    st.tuples(st.sampled_from("ffeeewwwstrvdxu"), st.integers(0, 2), st.integers(0, 60), st.integers(1, 12), st.integers(0, P)),
    max_size=60,
)


@settings(max_examples=60)
@given(st.sampled_from(sorted(POLICIES)), actions)
def test_invariants_hold_after_any_steps(policy: str, steps: list[tuple[str, int, int, int, int]]) -> None:
    cache = Checked(policy, 24)
    cache.dirty_limit_pages = 12
    files = [cache.file(20 * P + 3), cache.file(500 * P), cache.file(0)]
    fills: list[Fill] = []
    for action, number, page, count, extra in steps:
        file = files[number]
        page = page * 9 if number == 1 else page
        cache.now += 1.0
        match action:
            case "f":
                for first, n in file.absent_runs(page, page + count)[:1]:
                    try:
                        fills.append(cache.start_fill(file, first, n, extra % (n + 1)))
                    except (NoRoom, Busy):
                        pass
            case "e" if fills:
                fill = fills.pop(page % len(fills))
                cache.finish_fill(fill, -1 if extra % 5 == 0 else min(extra * 3, fill.count * P))
            case "w":
                offset, size = page * P + extra, count * P - extra + 1
                if not file.pages_to_fill(offset, size) and not file.fills_of(page, page + count + 2):
                    try:
                        cache.write(file, offset, b"w" * size)
                    except (NoRoom, Busy):
                        pass
            case "s":
                for index in list(file.dirty_groups):
                    group = file.groups[index]
                    cache.start_writeback(group, group.dirty & ~group.writeback)
            case "v":
                for group in list(file.groups.values()):
                    if group.writeback:
                        cache.finish_writeback(group, group.writeback, 0.0 if extra % 2 else None)
            case "t" if not file.writeback_pages:
                leaving.truncate(cache, file, page * P + extra)
            case "r":
                if cache.lookup(file, page * P, count * P) is None:
                    reads.count_request(cache, file, page * P, min(file.size, (page + count) * P))
            case "d":
                wishes.drop(cache, file)
            case "x":
                leaving.discard(cache, file)
            case "u":
                leaving.invalidate(cache, file)
        cache.check_invariants()
        assert cache.dirty_pages + cache.writeback_pages <= 12


@pytest.mark.parametrize(
    "first, count, whole", [(0, 256, True), (100, 128, True), (0, 16, False), (40, 1, False), (200, 56, False)]
)
def test_a_group_that_begins_with_half_of_its_pages_is_expected_to_be_filled(first: int, count: int, whole: bool) -> None:
    cache = Checked("lru", 4096)
    file = cache.file(4096 * P)
    cache.end(cache.start_fill(file, 512 + first, count, count))
    assert cache.arena._whole.has(file.groups[2].base) == (whole and bool(cache.arena._whole._end - cache.arena._whole._start))


def test_a_group_behind_a_full_one_that_is_begun_at_its_start_is_expected_to_be_filled() -> None:
    cache = Checked("lru", 8192)
    file = cache.file(2100 * P)
    cache.put(file, 0, contents(0, 256 * P))
    kinds = []
    for page in (256, 512 + 7, 768, 2048):  # behind a full group, not at the start, behind one with a page, the file's short end
        if page == 2048:
            cache.put(file, 1792 * P, contents(1792 * P, 256 * P))
        cache.end(cache.start_fill(file, page, 1, 1))
        kinds.append(cache.arena._whole.has(file.groups[page >> 8].base))
    assert kinds == [cache.arena._whole._end > cache.arena._whole._start, False, False, False]
