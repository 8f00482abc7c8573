"""Masks, runs, and each transition of a page's state."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.file import CachedFile
from cachefs.cache.page import ALL, FIRST, GROUP_PAGES, Group, key_of, runs, span

masks = st.integers(0, ALL)


def group() -> Group:
    return Group(CachedFile(1, None, 0), 0, 0, GROUP_PAGES, ALL)  # type: ignore[arg-type]  # nothing is read


@given(masks)
def test_runs_are_the_mask_in_order_and_not_adjacent(mask: int) -> None:
    found = list(runs(mask))
    assert sum(FIRST[count] << first for first, count in found) == mask
    assert all(a + n < b for (a, n), (b, _) in pairwise(found))


def test_spans() -> None:
    assert span(0, GROUP_PAGES - 1) == ALL
    assert span(3, 5) == 0b111000
    assert span(255, 255) == 1 << 255


def test_keys_of_a_large_file_are_not_those_of_the_next_file() -> None:
    assert key_of(1, (1 << 44) - 1) < key_of(2, 0)


def test_a_fill_makes_pages_clean() -> None:
    it = group()
    it.start_fill(0b1111, 0b1100)
    it.check()
    assert it.resident == 0b1111 and not it.evictable
    assert it.finish_fill(0b1111, True) == 0b1111
    it.check()
    assert it.evictable == it.uptodate == 0b1111 and it.prefetched == 0b1100


def test_a_fill_that_failed_leaves_pages_absent() -> None:
    it = group()
    it.start_fill(0b1111, 0b1111)
    assert it.finish_fill(0b1111, False) == 0
    it.check()
    assert not it.resident and not it.prefetched


def test_poisoned_pages_of_a_fill_become_absent() -> None:
    it = group()
    it.start_fill(0b1111, 0b1111)
    it.poisoned |= 0b0110
    it.check()
    assert it.finish_fill(0b1111, True) == 0b1001
    it.check()
    assert it.prefetched == 0b1001 and not it.poisoned


def test_a_page_keeps_the_time_when_its_group_first_became_dirty() -> None:
    it = group()
    it.make_dirty(0b01, 5.0)
    it.make_dirty(0b10, 9.0)
    it.check()
    assert it.dirty_since == 5.0 and not it.evictable


def test_writeback_makes_pages_clean() -> None:
    it = group()
    it.make_dirty(0b11, 1.0)
    it.start_writeback(0b11)
    it.check()
    assert not it.dirty and not it.evictable
    it.finish_writeback(0b11)
    it.check()
    assert it.evictable == 0b11


def test_redirtied_stays_dirty() -> None:
    it = group()
    it.make_dirty(0b11, 1.0)
    it.start_writeback(0b11)
    it.make_dirty(0b01, 7.0)
    it.check()
    assert it.dirty & it.writeback == 0b01
    it.finish_writeback(0b11)
    it.check()
    assert it.dirty == 0b01 and it.evictable == 0b10 and it.dirty_since == 7.0


@pytest.mark.parametrize("redirtied", [False, True])
def test_a_writeback_that_failed_leaves_pages_dirty_since_then(redirtied: bool) -> None:
    it = group()
    it.make_dirty(0b11, 1.0)
    it.start_writeback(0b11)
    if redirtied:
        it.make_dirty(0b01, 7.0)
    it.fail_writeback(0b11, 1.0)
    it.check()
    assert it.dirty == 0b11 and not it.writeback and it.dirty_since == 1.0


def test_writing_to_a_prefetched_page_is_its_use() -> None:
    it = group()
    it.start_fill(0b1, 0b1)
    it.finish_fill(0b1, True)
    it.make_dirty(0b1, 0.0)
    it.check()
    assert not it.prefetched


def test_forgotten_pages_are_absent() -> None:
    it = group()
    it.make_dirty(0b11, 0.0)
    it.forget(0b01)
    it.check()
    assert it.resident == it.dirty == 0b10


@pytest.mark.parametrize(
    "broken",
    [{"filling": 1, "uptodate": 1}, {"dirty": 1}, {"writeback": 1}, {"poisoned": 1}, {"prefetched": 1},
     {"prefetched": 1, "uptodate": 1, "dirty": 1}, {"uptodate": 1, "touched": 0}],
)  # fmt: skip
def test_check_refuses_states_without_a_name(broken: dict[str, int]) -> None:
    it = group()
    for name, mask in broken.items():
        setattr(it, name, mask)
    with pytest.raises(AssertionError):
        it.check()
