"""The strip of one file: a cell for each page or power of two of pages, as text. Pure.

A cell says three things: the state of its pages (of several, the first in `STATES`), how many of them are there (in quarters),
and how long ago they were used, or for unwritten ones written to.
"""

import math
from typing import NamedTuple

from cachefs.cache.page import GROUP_SHIFT, PAGE_SHIFT, runs
from cachefs.cache.residency import STATES, UNWRITTEN, Cached

CELLS = 128  # most cells of a strip
EMPTY = "."
QUARTERS = 4
AGES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
AGE_STEPS = 3.0  # age steps each time the age doubles: the last one is two weeks
COLOURS = ("#e4572e", "#f3a712", "#b07aa1", "#2e86ab", "#8d99ae", "#3fa34d")  # of STATES

_EMPTY, _FIRST, _ZERO = ord(EMPTY), ord("A"), ord(AGES[0])  # _EMPTY is more than the number of any state
_ORDER = tuple(reversed(range(len(STATES))))  # what is painted later covers what was painted before
_IS_UNWRITTEN = tuple(state in UNWRITTEN for state in STATES)


class Strip(NamedTuple):
    """`cells` has `EMPTY` or a letter for each cell: "A" + 4 x the number of its state in `STATES` + quarters there - 1.

    `ages` has one of `AGES` for each cell, step n for 2 ** (n / AGE_STEPS) - 1 seconds; one letter stands for all, if equal.
    """

    cells: str
    ages: str
    cell_pages: int


def scale_of(size: int) -> int:
    """The power of two of pages in a cell, for a file of `size` bytes."""
    pages = (size + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT
    return max(0, math.ceil(pages / CELLS) - 1).bit_length()


def age_letter(seconds: float) -> int:
    step = int(AGE_STEPS * math.log2(1.0 + max(0.0, seconds)) + 0.5)
    return ord(AGES[min(step, len(AGES) - 1)])


class StripMaker:
    """Makes the strip of a file of `size` bytes out of its groups, one after the other, in any order."""

    def __init__(self, size: int) -> None:
        self.scale = scale_of(size)
        self._pages = (size + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT
        count = (self._pages + (1 << self.scale) - 1) >> self.scale
        self._states = bytearray([_EMPTY]) * count  # the number of a state, or _EMPTY
        self._ages = bytearray([_ZERO]) * count
        self._there = [0] * count  # pages

    def add(self, cached: Cached) -> None:
        first = cached.number << GROUP_SHIFT
        if first >= self._pages:
            return  # it has just been cut off
        if self.scale >= GROUP_SHIFT:
            self._add_whole(cached, first >> self.scale)
        else:
            self._add_pages(cached, first)

    def _add_whole(self, cached: Cached, at: int) -> None:
        """A group that is no more than one cell: what is there of others in the cell counts too."""
        there = 0
        for number in _ORDER:
            if mask := cached.masks[number]:
                there |= mask
                self._states[at] = min(number, self._states[at])
        if there:
            letter = age_letter(cached.dirty_seconds if _IS_UNWRITTEN[self._states[at]] else cached.used_seconds)
            self._ages[at] = min(letter, self._ages[at]) if self._there[at] else letter
            self._there[at] += there.bit_count()

    def _add_pages(self, cached: Cached, first: int) -> None:
        used, dirty = age_letter(cached.used_seconds), age_letter(cached.dirty_seconds)
        there = 0
        for number in _ORDER:
            if mask := cached.masks[number]:
                there |= mask
                self._paint(mask, first, number, dirty if _IS_UNWRITTEN[number] else used)
        if self.scale:
            self._count(there, first)

    def _paint(self, mask: int, first: int, number: int, age: int) -> None:
        for skip, count in runs(mask):
            start = (first + skip) >> self.scale
            stop = min(((first + skip + count - 1) >> self.scale) + 1, len(self._states))
            if start < stop:
                self._states[start:stop] = bytes((number,)) * (stop - start)
                self._ages[start:stop] = bytes((age,)) * (stop - start)

    def _count(self, mask: int, first: int) -> None:
        pages = 1 << self.scale
        cell_mask, cells = (1 << pages) - 1, self._there
        at, stop = first >> self.scale, len(cells)
        while mask and at < stop:
            cells[at] += (mask & cell_mask).bit_count()
            mask >>= pages
            at += 1

    def strip(self) -> Strip:
        ages = self._ages.decode("ascii")
        if ages.count(ages[:1]) == len(ages):
            ages = ages[:1]
        return Strip(self._letters(), ages, 1 << self.scale)

    def _letters(self) -> str:
        if not self.scale:
            return bytes(_EMPTY if n == _EMPTY else _FIRST + QUARTERS * n + QUARTERS - 1 for n in self._states).decode("ascii")
        full = 1 << self.scale
        letters = bytearray()
        for at, (number, there) in enumerate(zip(self._states, self._there, strict=True)):
            whole = min(full, self._pages - at * full)
            quarter = min(QUARTERS - 1, (there * QUARTERS - 1) // whole)
            letters.append(_EMPTY if number == _EMPTY else _FIRST + QUARTERS * number + quarter)
        return letters.decode("ascii")
