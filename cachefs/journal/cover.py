"""Where the latest bytes of a file's pages are in the journal. Knows slots by number only, and no disk.

A page lies alone in a slot, or with others of one write in those of an *entry*, which has one row for all. The pages of an
entry lie in one group, so what happens to a run of pages takes a few steps, however long it is.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping

from cachefs.cache.page import FIRST, GROUP_PAGES, GROUP_SHIFT, IN_GROUP, SMALL_PAGES, runs

Masks = Mapping[int, int]  # {group index: mask of pages}


class Entry:
    """Pages in slots. `live` is a mask of those of which it has the latest bytes; `synced`: the durable index names it too."""

    __slots__ = ("count", "live", "page", "seq", "slot", "synced")

    def __init__(self, seq: int, page: int, slot: int, count: int) -> None:
        self.seq = seq
        self.page = page
        self.slot = slot
        self.count = count
        self.live = FIRST[count]  # bit i: page + i; `Cover` changes it
        self.synced = False

    def live_in(self, page: int, count: int) -> int:
        """Those of its live pages that are in [page, page + count)."""
        behind = page - self.page
        return self.live & (FIRST[count] << behind if behind >= 0 else FIRST[count] >> -behind)


Lost = tuple[list[Entry], list[int]]  # entries that have fewer live pages than before, slots of pages that were alone


class Cover:
    """{page: its slot}. A page that is alone has no entry: that would take time and memory to say what its row says."""

    __slots__ = ("_groups", "alone", "pages")

    def __init__(self) -> None:
        self.alone: dict[int, array[int]] = {}  # {group index: slots of its first pages, -1 for those that are not alone}
        self._groups: dict[int, list[Entry | None]] = {}  # {group index: entries of its first pages, None for those without}
        self.pages = 0  # how many there are

    def __len__(self) -> int:
        return self.pages

    def __iter__(self) -> Iterator[int]:
        for index, mask in sorted(self.masks().items()):
            yield from (index << GROUP_SHIFT | first + i for first, count in runs(mask) for i in range(count))

    def __contains__(self, page: int) -> bool:
        return self.slot(page) >= 0

    def slot(self, page: int) -> int:
        """That has the page, or -1."""
        index, i = page >> GROUP_SHIFT, page & IN_GROUP
        slots, at = self.alone.get(index, ()), self._groups.get(index, ())
        if i < len(slots) and slots[i] >= 0:
            return slots[i]
        entry = at[i] if i < len(at) else None
        return -1 if entry is None else entry.slot + page - entry.page

    def entries(self) -> list[Entry]:
        """Each of them once."""
        return [entry for entry in dict.fromkeys(entry for at in self._groups.values() for entry in at) if entry is not None]

    def slots_alone(self) -> list[int]:
        """Of the pages that are alone."""
        return [slot for slots in self.alone.values() for slot in slots if slot >= 0]

    def masks(self, from_page: int = 0) -> dict[int, int]:
        """The pages from `from_page` on."""
        found = {}
        for index in self.alone.keys() | self._groups.keys():
            mask = sum(1 << i for i, slot in enumerate(self.alone.get(index, ())) if slot >= 0)
            mask |= sum(1 << i for i, entry in enumerate(self._groups.get(index, ())) if entry is not None)
            skip = max(0, from_page - (index << GROUP_SHIFT))
            if mask := mask >> skip << skip:
                found[index] = mask
        return found

    def no_later(self, masks: Masks, last_seq: int, seq_of: Callable[[int], int]) -> dict[int, int]:
        """The pages of `masks` that were written no later than `last_seq`. `seq_of` is told the slot of a page that is alone."""
        found = {}
        for index, mask in masks.items():
            slots, at, old = self.alone.get(index), self._groups.get(index, []), 0
            for first, count in runs(mask):
                if slots is not None:
                    there = [i for i in range(first, min(first + count, len(slots))) if slots[i] >= 0]
                    old |= sum(1 << i for i in there if seq_of(slots[i]) <= last_seq)
                for entry in _each(at, first, count):
                    if entry.seq <= last_seq:
                        old |= entry.live_in(index << GROUP_SHIFT | first, count) << (entry.page & IN_GROUP)
            if old:
                found[index] = old
        return found

    # --- changes -----------------------------------------------------------------------------------------------------

    def put(self, entry: Entry, page: int, count: int) -> Lost:
        """The entry has the latest bytes of pages [page, page + count) from now on."""
        index, first = page >> GROUP_SHIFT, page & IN_GROUP
        known = index in self._groups or index in self.alone
        lost: Lost = self.take(index, FIRST[count] << first) if known else ([], [])
        at = self._groups.setdefault(index, [])
        if len(at) < first:
            at += [None] * (first - len(at))
        at[first : first + count] = [entry] * count
        self.pages += count
        return lost

    def put_alone(self, page: int, slot: int) -> Lost:
        """The page is alone in `slot` from now on."""
        index, i = page >> GROUP_SHIFT, page & IN_GROUP
        slots = self.alone.get(index)
        if slots is None:
            slots = self.alone[index] = array("i")
        if i >= len(slots):
            slots.extend([-1] * ((SMALL_PAGES if i < SMALL_PAGES else GROUP_PAGES) - len(slots)))
        before, slots[i] = slots[i], slot
        if before >= 0:
            return [], [before]
        self.pages += 1
        at = self._groups.get(index)
        if at is None or i >= len(at) or (entry := at[i]) is None:
            return [], []
        self._take_entries(index, i, 1)
        return [entry], []

    def take(self, index: int, mask: int) -> Lost:
        """These pages of a group are not here any more."""
        gone: list[int] = []
        entries: list[Entry] = []
        for first, count in runs(mask):
            if (slots := self.alone.get(index)) is not None:
                gone += [slot for slot in slots[first : first + count] if slot >= 0]
                slots[first : first + count] = array("i", [-1]) * min(count, len(slots) - first)
            entries += self._take_entries(index, first, count)
        self.pages -= len(gone)
        if index in self.alone and max(self.alone[index]) < 0:
            del self.alone[index]
        return list(dict.fromkeys(entries)), gone

    def _take_entries(self, index: int, first: int, count: int) -> list[Entry]:
        at = self._groups.get(index)
        if at is None:
            return []
        entries = _each(at, first, count)
        for entry in entries:
            lost = entry.live_in(index << GROUP_SHIFT | first, count)
            entry.live ^= lost
            self.pages -= lost.bit_count()
        at[first : first + count] = [None] * min(count, len(at) - first)
        if entries and not any(at):
            del self._groups[index]
        return entries

    def join(self, seq_of: Callable[[int], int]) -> None:
        """Gives pages that are alone an entry each, for the durable index to name."""
        for index, slots in self.alone.items():
            at = self._groups.setdefault(index, [])
            at += [None] * (len(slots) - len(at))
            for i, slot in enumerate(slots):
                if slot >= 0:
                    at[i] = Entry(seq_of(slot), index << GROUP_SHIFT | i, slot, 1)
        self.alone.clear()

    def check(self) -> None:
        """Asserts that lists, masks and the count agree."""
        for index, at in self._groups.items():
            assert any(at), "a group without pages"
            slots = self.alone.get(index, ())
            assert not any(entry is not None and slot >= 0 for entry, slot in zip(at, slots, strict=False)), "alone and not"
            for entry in {entry for entry in at if entry is not None}:
                start = entry.page - (index << GROUP_SHIFT)
                assert start >= 0 and start + entry.count <= GROUP_PAGES, "an entry across groups"
                live = [i for i, other in enumerate(at) if other is entry]
                assert entry.live << start == sum(1 << i for i in live), "live pages miscounted"
        assert all(max(slots) >= 0 for slots in self.alone.values()), "a group without pages"
        with_entries = sum(entry.live.bit_count() for entry in self.entries())
        assert self.pages == with_entries + len(self.slots_alone()), "pages miscounted"


def _each(at: list[Entry | None], first: int, count: int) -> list[Entry]:
    """The entries in `at[first : first + count]`, each once. Mostly one or two have all of it: then that is as many steps."""
    if first >= len(at):
        return []
    entry, end = at[first], min(first + count, len(at))
    if entry is not None:
        rest = (entry.page & IN_GROUP) + entry.count - first
        if entry.live >> entry.count - rest == FIRST[rest]:  # all of its pages from here on
            return [entry] if first + rest >= end else [entry, *_each(at, first + rest, end - first - rest)]
    return [entry for entry in dict.fromkeys(at[first:end]) if entry is not None]
