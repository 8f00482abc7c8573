"""What holds the latest bytes of a page: `Cover` against a dict of every page."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cachefs.cache.page import GROUP_PAGES, GROUP_SHIFT, IN_GROUP
from cachefs.journal.cover import Cover, Entry, Lost

PAGES = st.one_of(st.integers(0, 40), st.integers(200, 300), st.just(511))
COUNTS = st.sampled_from((1, 2, 3, 20, 256))


def masks_of(first: int, count: int) -> dict[int, int]:
    masks: dict[int, int] = {}
    for page in range(first, first + count):
        masks[page >> GROUP_SHIFT] = masks.get(page >> GROUP_SHIFT, 0) | 1 << (page & IN_GROUP)
    return masks


class AgainstADict(RuleBasedStateMachine):
    """Slots are numbered on and on, so that a slot is also the time at which it was written."""

    @initialize()
    def begin(self) -> None:
        self.cover = Cover()
        self.slots: dict[int, int] = {}  # {page: slot}
        self.alone: set[int] = set()  # pages
        self.next_slot = 0

    def _gone(self, pages: set[int], lost: Lost) -> None:
        """These pages were held otherwise until now: that is what was to be told."""
        entries, slots = lost
        assert sorted(slots) == sorted(self.slots[page] for page in pages & self.alone)
        others = {self.slots[page] for page in pages - self.alone}
        assert others == {slot for slot in others for entry in entries if entry.slot <= slot < entry.slot + entry.count}
        assert len(entries) == len(set(entries))
        for page in pages:
            del self.slots[page]
        self.alone -= pages

    @rule(page=PAGES, count=COUNTS)
    def put(self, page: int, count: int) -> None:
        count = min(count, GROUP_PAGES - (page & IN_GROUP))
        pages = range(page, page + count)
        lost = self.cover.put(Entry(self.next_slot, page, self.next_slot, count), page, count)
        self._gone({at for at in pages if at in self.slots}, lost)
        self.slots |= {at: self.next_slot + at - page for at in pages}
        self.next_slot += count

    @rule(page=PAGES)
    def put_alone(self, page: int) -> None:
        lost = self.cover.put_alone(page, self.next_slot)
        self._gone({page} & set(self.slots), lost)
        self.slots[page] = self.next_slot
        self.alone.add(page)
        self.next_slot += 1

    @rule(page=PAGES, count=COUNTS, age=st.integers(0, 30))
    def take_what_is_older(self, page: int, count: int, age: int) -> None:
        """An entry is as old as its first slot."""
        last = self.next_slot - age
        starts = {slot: entry.slot for entry in self.cover.entries() for slot in range(entry.slot, entry.slot + entry.count)}
        expected = {
            at for at in range(page, page + count) if at in self.slots and starts.get(self.slots[at], self.slots[at]) <= last
        }
        going = self.cover.no_later(masks_of(page, count), last, lambda slot: slot)
        assert sum(map(int.bit_count, going.values())) == len(expected)
        for index, mask in going.items():
            pages = {index << GROUP_SHIFT | i for i in range(GROUP_PAGES) if mask >> i & 1}
            assert pages <= expected
            self._gone(pages, self.cover.take(index, mask))

    @rule()
    def join(self) -> None:
        self.cover.join(lambda slot: slot)
        self.alone.clear()

    @invariant()
    def it_is_the_same(self) -> None:
        self.cover.check()
        assert list(self.cover) == sorted(self.slots) and len(self.cover) == len(self.slots)
        assert all(self.cover.slot(page) == self.slots.get(page, -1) for page in range(520))
        assert sorted(self.cover.slots_alone()) == sorted(self.slots[page] for page in self.alone)
        behind = {page for page in self.slots if page >= 210}
        assert self.cover.masks(210) == {
            index: sum(1 << (page & IN_GROUP) for page in behind if page >> GROUP_SHIFT == index)
            for index in {page >> GROUP_SHIFT for page in behind}
        }


AgainstADict.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestAgainstADict = AgainstADict.TestCase
