"""Extents out of masks: against a model that looks at one page after the other, and as lines and JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache.page import GROUP_PAGES, GROUP_SIZE, PAGE_SIZE
from cachefs.cache.residency import STATES, UNWRITTEN, Cached, Extent, extents, pack, unpack
from cachefs.cli import listing

P = PAGE_SIZE
FULL = (1 << GROUP_PAGES) - 1
sparse_masks = st.lists(st.integers(0, GROUP_PAGES - 1), max_size=6).map(lambda bits: sum(1 << bit for bit in set(bits)))
masks = st.one_of(sparse_masks, st.just(FULL), st.just(0), st.integers(0, FULL))


def cached(number: int, used: float = 1.0, dirty: float = 0.0, reader: str = "", **states: int) -> Cached:
    """A group with these masks; what is not said to be in a state is not."""
    return Cached(number, tuple(states.get(state.replace("-", "_"), 0) for state in STATES), used, dirty, reader)


def by_pages(groups: list[Cached], size: int) -> list[tuple[int, int, str]]:
    """(offset, length, state) of the extents, page by page."""
    found: list[tuple[int, int, str]] = []
    for group in groups:
        for bit in range(GROUP_PAGES):
            offset = (group.number * GROUP_PAGES + bit) * P
            state = next((state for state, mask in zip(STATES, group.masks, strict=True) if mask >> bit & 1), None)
            if state is None or offset >= size:
                continue
            length = min(P, size - offset)
            if found and found[-1][2] == state and found[-1][0] + found[-1][1] == offset:
                found[-1] = (found[-1][0], found[-1][1] + length, state)
            else:
                found.append((offset, length, state))
    return found


@given(
    st.dictionaries(st.integers(0, 4), st.tuples(*[masks] * len(STATES)), max_size=4),
    st.integers(1, 5 * GROUP_SIZE),
)
def test_extents_are_those_that_a_walk_over_the_pages_finds(states: dict[int, tuple[int, ...]], size: int) -> None:
    groups = [Cached(number, states[number], 1.0, 2.0, "x") for number in sorted(states)]
    assert [(e.offset, e.length, e.state) for e in extents(groups, size)] == by_pages(groups, size)


@given(st.tuples(*[masks] * len(STATES)), st.integers(0, 1 << 40), st.text(max_size=15))
def test_what_is_packed_survives_json(states: tuple[int, ...], number: int, reader: str) -> None:
    group = Cached(number, states, 12.345, 0.001, reader)
    assert unpack(json.loads(json.dumps(pack(group)))) == group


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="masks"):
        unpack([0, "1 2 3", 0, 0, ""])


def test_the_most_urgent_state_is_shown() -> None:
    group = cached(0, dirty=1.0, clean=0b111111, readahead_unused=0b11111, pinned=0b1111, filling=0b111, writeback=0b11)
    with_dirty = group._replace(masks=(1, *group.masks[1:]))
    assert [e.state for e in extents([with_dirty], GROUP_SIZE)] == list(STATES)


def test_an_extent_across_groups_has_the_latest_use_and_unwritten_data_the_oldest_write() -> None:
    clean = [cached(0, used=5, reader="tar", clean=FULL), cached(1, used=2, reader="cat", clean=1)]
    assert list(extents(clean, 1 << 40)) == [Extent(0, GROUP_SIZE + P, "clean", 2, "cat")]
    dirty = [group._replace(masks=(group.masks[-1], *group.masks[1:]), dirty_seconds=9 - group.number) for group in clean]
    assert list(extents(dirty, 1 << 40)) == [Extent(0, GROUP_SIZE + P, "dirty", 9, "cat")]
    assert set(UNWRITTEN) < set(STATES)


# --- lines and JSON


def files(*paths: str) -> list[listing.CachedFile]:
    found: dict[tuple[str, int], listing.CachedFile] = {}
    for inode, path in enumerate(paths):
        entry = {"path": path or None, "inode": inode, "size": 4 * GROUP_SIZE, "page_hits": 7, "page_misses": 1}
        for number in (1, 0):  # in two messages, not in order
            groups = [pack(cached(number, reader="a\n\udcff", clean=0b1011))]
            listing.gather([{**entry, "groups": groups}], "/mnt", found)
    return list(found.values())


def test_a_file_in_several_messages_is_one_file() -> None:
    (file,) = files("x")
    starts = [(e.offset, e.length) for e in file.extents()]
    assert starts == [(0, 2 * P), (3 * P, P), (GROUP_SIZE, 2 * P), (GROUP_SIZE + 3 * P, P)]
    (summary,) = listing.summaries([file], frozenset())
    assert (summary.cached_bytes, summary.share) == (6 * P, 6 / 1024)


def test_each_extent_is_one_line_whatever_the_names() -> None:
    lines = list(listing.extent_lines(listing.rows(files("z", "a\nb\x1b[2J\udcfe", ""), frozenset())))
    assert len(lines) == 12
    assert lines[0].split()[-4:] == ["a\\x0a\\xff", "(removed,", "inode", "2)"]
    assert lines[4].endswith("  /mnt/a\\x0ab\\x1b[2J\\xfe")
    assert lines[-1].split() == [str(GROUP_SIZE + 3 * P), str(P), "clean", "1.0", "s", "a\\x0a\\xff", "/mnt/z"]


def test_json_has_names_of_any_bytes_as_text() -> None:
    def first(name: str) -> dict[str, object]:
        return json.loads(next(listing.extent_json(listing.rows(files(name), frozenset()))))  # type: ignore[no-any-return]

    bad, good, gone = first("\udcff\\"), first("ü"), first("")
    assert bad["file"] == "/mnt/\\xff\\\\" and bad["last_reader"] == "a\n\\xff"
    assert good["file"] == "/mnt/ü"
    assert gone["file"] is None and gone["inode"] == 0
    assert {"file", "offset", "length", "state", "age_seconds", "last_reader", "inode"} == good.keys()
    (summary,) = map(json.loads, listing.summary_json(listing.summaries(files("x"), frozenset())))
    assert summary["cached_bytes"] == 6 * P and summary["bytes"] == {"clean": 6 * P}


def test_only_the_states_asked_for_count() -> None:
    found = files("x", "y")
    assert not list(listing.rows(found, frozenset({"dirty"})))
    assert not list(listing.summaries(found, frozenset({"dirty", "pinned"})))
    assert len(list(listing.rows(found, frozenset({"dirty", "clean"})))) == 8
