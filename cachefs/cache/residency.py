"""Which parts of a file are cached, and in what state: extents out of the masks of its groups.

The daemon only copies masks (`look_at`, `pack`); whoever wants extents makes them (`unpack`, `extents`), so that a listing of
a large cache costs the mount next to nothing. A page shows one state: of those that are true, the first in `STATES`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cachefs.cache.page import GROUP_PAGES, GROUP_SHIFT, PAGE_SHIFT, Group

STATES = ("dirty", "writeback", "filling", "pinned", "readahead-unused", "clean")
UNWRITTEN = frozenset(("dirty", "writeback"))
_RUN = re.compile(r"([1-6])\1*")  # pages of one state: digit n stands for STATES[n - 1], 0 for absent
_MASKS = len(STATES)


class Cached(NamedTuple):
    """The pages of one group: a mask for each of STATES, and what is known of their use."""

    number: int  # of the group in the file
    masks: tuple[int, ...]  # in the order of STATES; they overlap
    used_seconds: float  # since the last read of a page, or since the first one came
    dirty_seconds: float  # since the oldest unwritten page was written to
    reader: str  # the program that read last; "" = nobody has yet


class Extent(NamedTuple):
    """A run of pages in one state: bytes [offset, offset + length) of a file.

    The age of unwritten data is that of its oldest write, else the time since the last read, or since the pages came. Age and
    reader are those of the groups that the extent lies in.
    """

    offset: int
    length: int
    state: str
    age_seconds: float
    last_reader: str


def look_at(group: Group, now: float) -> Cached:
    """A group as it is at time `now`."""
    reader, used = group.used or ("", 0.0)
    unwritten = group.dirty | group.writeback
    return Cached(
        group.index,
        (group.dirty, group.writeback, group.filling, group.pinned & group.uptodate, group.prefetched, group.uptodate),
        max(0.0, now - max(used, group.born)),
        max(0.0, now - group.dirty_since) if unwritten else 0.0,
        reader,
    )


def pack(cached: Cached) -> list[Any]:
    """What JSON can carry: masks as hexadecimal numbers, ages in milliseconds."""
    used_ms, dirty_ms = round(cached.used_seconds * 1000), round(cached.dirty_seconds * 1000)
    return [cached.number, " ".join([f"{mask:x}" for mask in cached.masks]), used_ms, dirty_ms, cached.reader]


def unpack(packed: Sequence[Any]) -> Cached:
    """The inverse of `pack`; ValueError where it cannot be."""
    number, masks, used_ms, dirty_ms, reader = packed
    split = tuple(int(mask, 16) for mask in masks.split())
    if len(split) != _MASKS:
        raise ValueError("wrong number of masks")
    return Cached(int(number), split, used_ms / 1000, dirty_ms / 1000, str(reader))


def extents(groups: Iterable[Cached], size: int) -> Iterator[Extent]:
    """The extents of a file of `size` bytes, ascending, across the ends of groups; `groups` ascending too."""
    row: list[Cached] = []  # neighbours in the file
    for group in groups:
        if row and group.number != row[-1].number + 1:
            yield from _extents_of(row, size)
            row = []
        row.append(group)
    if row:
        yield from _extents_of(row, size)


def _extents_of(row: list[Cached], size: int) -> Iterator[Extent]:
    start = row[0].number << GROUP_SHIFT << PAGE_SHIFT
    for run in _RUN.finditer("".join(map(_digits, row))):
        first, stop = run.span()
        offset = start + (first << PAGE_SHIFT)
        length = (stop - first) << PAGE_SHIFT
        if offset + length > size:
            length = size - offset
            if length <= 0:  # it has just been cut off
                return
        state = STATES[int(run[1]) - 1]
        at, last = first >> GROUP_SHIFT, (stop - 1) >> GROUP_SHIFT
        latest = oldest = row[at]
        if last > at:
            latest = min(row[at : last + 1], key=lambda group: group.used_seconds)
            oldest = max(row[at : last + 1], key=lambda group: group.dirty_seconds)
        age = oldest.dirty_seconds if state in UNWRITTEN else latest.used_seconds
        yield Extent(offset, length, state, age, latest.reader)


def _digits(group: Cached) -> str:
    """A digit for each page, page 0 first."""
    number, shown = 0, 0
    for digit, mask in enumerate(group.masks, 1):
        if here := mask & ~shown:
            number += digit * int(f"{here:b}", 16)  # bit i of the mask becomes hexadecimal digit i
            shown |= here
    return f"{number:0{GROUP_PAGES}x}"[::-1]
