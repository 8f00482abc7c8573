"""Strips: every cell says what its pages say, whatever the size of the file and the state of its pages."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.cache.page import GROUP_PAGES, PAGE_SIZE
from cachefs.cache.residency import STATES, UNWRITTEN, Cached
from cachefs.page.cells import AGE_STEPS, AGES, CELLS, COLOURS, EMPTY, QUARTERS, StripMaker, age_letter, scale_of

P = PAGE_SIZE
ALL = (1 << GROUP_PAGES) - 1
CLEAN = STATES.index("clean")


def group(number: int, used_seconds: float = 0.0, dirty_seconds: float = 0.0, **masks: int) -> Cached:
    """Masks by the names of states, with _ for -."""
    named = {name.replace("_", "-"): mask for name, mask in masks.items()}
    return Cached(number, tuple(named.get(state, 0) for state in STATES), used_seconds, dirty_seconds, "")


def strip(size: int, *groups: Cached) -> tuple[str, str, int]:
    maker = StripMaker(size)
    for one in groups:
        maker.add(one)
    return maker.strip()


def letter(state: str, quarters: int = QUARTERS) -> str:
    return chr(ord("A") + QUARTERS * STATES.index(state) + quarters - 1)


def test_a_small_file_has_a_cell_for_each_page() -> None:
    pages = 0b11110000111
    cells, ages, cell_pages = strip(12 * P - 5, group(0, clean=pages, dirty=1 << 4, readahead_unused=1 << 10))
    clean, dirty, ahead = letter("clean"), letter("dirty"), letter("readahead-unused")
    assert cells == clean * 3 + "." + dirty + "." * 2 + clean * 3 + ahead + "."
    assert ages == AGES[0] and cell_pages == 1


def test_cells_of_several_pages_show_how_many_are_there() -> None:
    size = 4 * GROUP_PAGES * P  # 1024 pages, 8 a cell
    cells, _, cell_pages = strip(size, group(0, clean=0b11 | 0b1111 << 8 | 0b111111 << 16 | 0xFF << 24), group(3, clean=ALL))
    assert cell_pages == 8
    assert cells == "".join(letter("clean", n) for n in (1, 2, 3, 4)) + "." * 92 + letter("clean") * 32


def test_the_first_of_the_states_in_a_cell_is_shown() -> None:
    size = 1024 * P
    assert strip(size, group(0, clean=0xFF, dirty=1 << 7, pinned=0xFF))[0][0] == letter("dirty")
    assert strip(size, group(0, clean=0xFF, pinned=0xFF, readahead_unused=1))[0][0] == letter("pinned")


def test_of_a_large_file_a_cell_covers_whole_groups() -> None:
    size = 4 * CELLS * GROUP_PAGES * P
    groups = [group(0, 100.0, clean=ALL), group(1, 3.0, clean=ALL >> 128, writeback=1), group(8, clean=1)]
    cells, _, cell_pages = strip(size, *groups)
    assert cell_pages == 4 * GROUP_PAGES and len(cells) == CELLS
    assert cells[:3] == letter("writeback", 2) + "." + letter("clean", 1)
    assert strip(size, *reversed(groups))[0] == cells, "in any order"


def test_ages_are_right_to_a_step_and_those_of_unwritten_pages_are_since_the_write() -> None:
    for seconds in (0.0, 0.2, 1.0, 60.0, 3600.0, 86400.0, 1e6):
        told = 2 ** (AGES.index(chr(age_letter(seconds))) / AGE_STEPS) - 1
        assert told == pytest.approx(seconds, rel=0.3, abs=0.2)
    assert age_letter(1e12) == ord(AGES[-1]) and age_letter(-1.0) == ord(AGES[0])
    assert strip(2 * P, group(0, 0.0, 1000.0, clean=0b11, dirty=0b01))[1] == chr(age_letter(1000.0)) + AGES[0]


def test_what_lies_behind_the_end_is_not_shown() -> None:
    assert strip(0, group(0, clean=ALL)) == ("", "", 1)
    assert strip(3 * P, group(0, clean=ALL), group(7, clean=ALL))[0] == letter("clean") * 3
    assert len(strip(200 * P, group(0, clean=ALL))[0]) == 100
    assert strip(1 << 40, group(1 << 21, clean=ALL))[0] == EMPTY * CELLS


@given(st.integers(0, 1 << 44))
def test_a_strip_has_as_many_cells_as_it_may(size: int) -> None:
    pages, scale = -(-size // P), scale_of(size)
    assert pages <= CELLS << scale
    assert scale == 0 or pages > CELLS << (scale - 1)


def test_there_is_a_colour_for_each_state() -> None:
    assert len(COLOURS) == len(set(COLOURS)) == len(STATES)


@st.composite
def cached_groups(draw: st.DrawFn, pages: int) -> list[Cached]:
    found = []
    for number in range(-(-pages // GROUP_PAGES)):
        if draw(st.booleans()):
            masks = [draw(st.sampled_from((0, ALL, ALL >> 100, 0xF0F0F0))) & draw(st.integers(0, ALL)) for _ in STATES]
            used, dirty = draw(st.floats(0, 1e5)), draw(st.floats(0, 1e5))
            found.append(Cached(number, tuple(masks), used, dirty, ""))
    return draw(st.permutations(found))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from((1, 5, 128, 129, 700, 3000, 40_000)))
def test_cells_are_what_a_walk_over_the_pages_finds(data: st.DataObject, pages: int) -> None:
    groups = data.draw(cached_groups(min(pages, 3000)))
    cells, ages, cell_pages = strip(pages * P, *groups)
    states: dict[int, int] = {}
    for cached in groups:
        for bit in range(GROUP_PAGES):
            found = [number for number, mask in enumerate(cached.masks) if mask >> bit & 1]
            if found and (page := cached.number * GROUP_PAGES + bit) < pages:
                states[page] = found[0]
    assert len(cells) == math.ceil(pages / cell_pages)
    for at, cell in enumerate(cells):
        inside = range(at * cell_pages, min(pages, (at + 1) * cell_pages))
        there = [states[page] for page in inside if page in states]
        if not there:
            assert cell == EMPTY
            continue
        state, quarter = divmod(ord(cell) - ord("A"), QUARTERS)
        assert (state, quarter + 1) == (min(there), math.ceil(QUARTERS * len(there) / len(inside)))
        shown = ages if len(ages) == 1 else ages[at]
        possible = {
            chr(age_letter(cached.dirty_seconds if STATES[state] in UNWRITTEN else cached.used_seconds)) for cached in groups
        }
        assert shown in possible
