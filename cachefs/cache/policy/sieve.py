"""SIEVE (Zhang et al., NSDI 2024): a FIFO that a hand sifts, sparing what was hit since it last came by."""

from typing import ClassVar

from cachefs.cache.policy.base import Evictable, Policy, RunQueue, Runs, above, clear, lowest, split


class Sieve(Policy):
    """A FIFO cut in two at the hand: the pages it has passed in this round, then those it has still to reach.

    The hand walks from the oldest page to the newest and begins again at the oldest. A page it finds visited is spared
    and its bit cleared; an unvisited one that may go is evicted, and the hand stays there; one that may not go is
    passed. Nothing moves on a hit. Invariant: while any page is known, some page is ahead of the hand.
    """

    name: ClassVar[str] = "sieve"

    def __init__(self, capacity_pages: int) -> None:
        super().__init__(capacity_pages)
        self._behind = RunQueue()  # older than everything in _ahead
        self._ahead = RunQueue()
        self._visited: dict[int, int] = {}  # key -> mask, never 0

    def admit(self, key: int, mask: int) -> None:
        self._ahead.push(key, mask)

    def touch(self, key: int, mask: int) -> None:
        self._visited[key] = self._visited.get(key, 0) | mask

    def remove(self, key: int, mask: int) -> None:
        passed = mask & self._behind.members.get(key, 0)
        self._behind.discard(key, passed)
        self._ahead.discard(key, mask ^ passed)
        clear(self._visited, key, mask)
        self._wrap()

    def victims(self, count: int, evictable: Evictable) -> Runs:
        chosen = []
        vain_pages = 0  # the last pages passed were neither hit nor may they go; a whole round of them ends the search
        while count > 0 and vain_pages < len(self):
            if self._visited and self._ahead.pass_on(self._behind, self._visited):
                self._wrap()
                vain_pages = 0
                continue
            key, run = self._ahead.front()
            if vain_pages:
                run = lowest(run, len(self) - vain_pages)
            visited = run & self._visited.get(key, 0)
            out, passed = split(run, run & ~visited & evictable(key), count)
            self._move_hand(key, out, passed)
            if passed:
                spared = passed & visited
                vain_pages = above(passed, spared).bit_count() + (0 if spared else vain_pages)
            if out:
                chosen.append((key, out))
                count -= out.bit_count()
        return chosen

    def _move_hand(self, key: int, out: int, passed: int) -> None:
        self._ahead.shift(out | passed)
        if passed:
            self._behind.push(key, passed)
            clear(self._visited, key, passed)
        self._wrap()

    def _wrap(self) -> None:
        if not self._ahead.page_count:
            self._ahead, self._behind = self._behind, RunQueue()

    def __len__(self) -> int:
        return self._ahead.page_count + self._behind.page_count

    def pages(self) -> dict[int, int]:
        known = dict(self._behind.members)
        for key, mask in self._ahead.members.items():
            known[key] = known.get(key, 0) | mask
        return known

    def check(self) -> None:
        self._behind.check()
        self._ahead.check()
        assert self._ahead.page_count or not self._behind.page_count
        for key, mask in self._behind.members.items():
            assert mask & self._ahead.members.get(key, 0) == 0
        known = self.pages()
        for key, mask in self._visited.items():
            assert mask and mask & ~known.get(key, 0) == 0
