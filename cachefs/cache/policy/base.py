"""The contract of an eviction policy, and the queue of page runs that every policy here is made of.

A page is named by its group's key and one bit of a 256-bit mask. A *run* is a (key, mask) pair whose pages stand next
to each other in a queue, in ascending order. Runs make a hit, an admission or an eviction of 256 neighbours as cheap as
that of one page, and still every policy decides exactly as if it held a list of single pages: cutting a run in two, or
joining two that stand side by side in ascending order, never changes the order of the pages.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import ClassVar

PAGES_PER_GROUP = 256

Evictable = Callable[[int], int]
"""Key of a group -> mask of its pages that may go now; constant during one call of `victims`."""

Runs = list[tuple[int, int]]

# One shared object for every single-page mask, so that a lone page costs its queue two pointers and no big integer.
_SINGLE_PAGES = {1 << bit: 1 << bit for bit in range(PAGES_PER_GROUP)}

# Runs a queue may hold beyond twice those it needs before it is worth sweeping.
_SWEEP_SLACK_RUNS = 1024


class Policy(ABC):
    """The order in which resident pages should go. It proposes; the cache knows which pages may go, and disposes."""

    name: ClassVar[str]

    def __init__(self, capacity_pages: int) -> None:
        self.resize(capacity_pages)

    @abstractmethod
    def admit(self, key: int, mask: int) -> None:
        """These pages became resident, in ascending order. None of them was known."""

    @abstractmethod
    def touch(self, key: int, mask: int) -> None:
        """These pages were hit. All of them are known. The hot path: a few integer operations whatever their number."""

    @abstractmethod
    def remove(self, key: int, mask: int) -> None:
        """These pages went other than by eviction (truncate, drop, invalidate). All of them are known."""

    @abstractmethod
    def victims(self, count: int, evictable: Evictable) -> Runs:
        """Chooses up to `count` pages and forgets them; in order of eviction, pages of a run ascending.

        Pages that are not evictable stay known and get another round. Fewer than `count` only if nothing else may go.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Pages known."""

    @abstractmethod
    def pages(self) -> dict[int, int]:
        """Key -> mask of the known pages; a fresh dict."""

    @abstractmethod
    def check(self) -> None:
        """Asserts the policy's own invariants; walks everything, so for tests."""

    def resize(self, capacity_pages: int) -> None:
        """Changes the capacity. What is too much now goes when the cache next asks for victims."""
        if capacity_pages < 1:
            raise ValueError(f"a cache policy needs a capacity of at least 1 page, not {capacity_pages}")
        self.capacity_pages = capacity_pages


class RunQueue:
    """A FIFO of runs that pages can also leave from the middle, without looking for them.

    `discard` takes a page out of `members` at once but leaves its place in the queue behind as a *stale* one. A page
    may come back and be discarded again while older stale places are still queued, so they are counted: per group, as
    the bit planes of binary numbers. Invariant: of all places of a page in the queue only the newest can be live, the
    others are stale; so a place met at the oldest end is stale exactly if the page's count is not 0. Sweeping bounds
    the garbage.
    """

    __slots__ = ("_keys", "_masks", "_stale", "_sweep_at_runs", "members", "page_count")

    def __init__(self) -> None:
        self._keys: deque[int] = deque()  # oldest first
        self._masks: deque[int] = deque()  # parallel to _keys; live and stale pages
        self._stale: dict[int, list[int]] = {}  # key -> planes; plane i has weight 2**i, the last one is not 0
        self._sweep_at_runs = _SWEEP_SLACK_RUNS
        self.members: dict[int, int] = {}  # key -> mask of live pages, never 0; read-only to others
        self.page_count = 0

    def push(self, key: int, mask: int) -> None:
        """Appends pages that are no members, at the newest end."""
        if mask:
            held = self.members.get(key)
            self.members[key] = held | mask if held else _SINGLE_PAGES.get(mask, mask)
            self.page_count += mask.bit_count()
            self._append(key, mask)
            self._sweep_if_worth_it()

    def front(self) -> tuple[int, int]:
        """The oldest run, live pages only. The queue must not be empty."""
        while True:
            key, mask = self._keys[0], self._masks[0]
            live = self._without_stale(key, mask) if self._stale else mask
            if live:
                if live != mask:
                    self._masks[0] = live
                return key, live
            self._keys.popleft()
            self._masks.popleft()

    def shift(self, mask: int) -> None:
        """Takes pages of the run that `front` has just returned out of the queue."""
        self._leave(self._keys[0], mask)
        self._cut_front(mask)

    def requeue(self, mask: int) -> None:
        """Moves pages of the run that `front` has just returned to the newest end."""
        key = self._keys[0]
        self._cut_front(mask)
        self._append(key, mask)

    def discard(self, key: int, mask: int) -> None:
        """Takes members out, wherever they stand. The cost depends on neither the queue's length nor theirs."""
        if mask:
            self._leave(key, mask)
            if self.page_count:
                self._count_stale(key, mask)
            else:
                self._keys.clear()
                self._masks.clear()
                self._stale.clear()

    def renew(self, key: int, mask: int) -> None:
        """Moves members to the newest end, wherever they stand."""
        if self._masks[-1] == mask and self._keys[-1] == key:
            return
        self._count_stale(key, mask)
        self._append(key, mask)
        self._sweep_if_worth_it()

    def pass_on(self, to: "RunQueue", plane: dict[int, int]) -> bool:
        """Hands the oldest runs over to `to` while all their pages are set in a plane, clearing them there.

        Says whether there were any. The same could be had with `front`, `shift` and `push`, at three times the cost.
        """
        moved_pages = 0
        while self._keys:
            key, mask = self._keys[0], self._masks[0]
            held = plane.get(key, 0)
            if mask & ~held or key in self._stale:
                break
            plane[key] = held ^ mask
            self.members[key] ^= mask
            if held == mask:
                del plane[key]
            if not self.members[key]:
                del self.members[key]
            self._keys.popleft()
            self._masks.popleft()
            there = to.members.get(key)
            to.members[key] = there | mask if there else mask
            to._append(key, mask)
            moved_pages += mask.bit_count()
        self.page_count -= moved_pages
        to.page_count += moved_pages
        return moved_pages > 0

    def _append(self, key: int, mask: int) -> None:
        if self._keys and self._keys[-1] == key and self._masks[-1] < mask & -mask:
            self._masks[-1] |= mask
        else:
            self._keys.append(key)
            self._masks.append(_SINGLE_PAGES.get(mask, mask))

    def _cut_front(self, mask: int) -> None:
        rest = self._masks[0] ^ mask
        if rest:
            self._masks[0] = _SINGLE_PAGES.get(rest, rest)
        else:
            self._keys.popleft()
            self._masks.popleft()

    def _leave(self, key: int, mask: int) -> None:
        rest = self.members[key] ^ mask
        if rest:
            self.members[key] = rest
        else:
            del self.members[key]
        self.page_count -= mask.bit_count()

    def _count_stale(self, key: int, mask: int) -> None:
        planes = self._stale.get(key)
        if planes is None:
            self._stale[key] = [mask]
            return
        for i, plane in enumerate(planes):
            planes[i] = plane ^ mask
            mask &= plane
            if not mask:
                return
        planes.append(mask)

    def _without_stale(self, key: int, mask: int) -> int:
        """The live pages of the oldest run; its stale places are uncounted, so the caller must drop them."""
        planes = self._stale.get(key)
        if planes is None:
            return mask
        counted = 0
        for plane in planes:
            counted |= plane
        stale = borrow = mask & counted
        for i, plane in enumerate(planes):
            planes[i] = plane ^ borrow
            borrow &= ~plane
        while planes and not planes[-1]:
            planes.pop()
        if not planes:
            del self._stale[key]
        return mask ^ stale

    def _sweep_if_worth_it(self) -> None:
        if len(self._keys) > self._sweep_at_runs or len(self._keys) > 2 * self.page_count + _SWEEP_SLACK_RUNS:
            self._sweep()

    def _sweep(self) -> None:
        """Drops every stale place; a pass over the queue, at least half as many pushes or discards apart."""
        if self._stale:
            for _ in range(len(self._keys)):
                key, mask = self._keys.popleft(), self._masks.popleft()
                live = self._without_stale(key, mask)
                if live:
                    self._append(key, live)
        self._sweep_at_runs = 2 * len(self._keys) + _SWEEP_SLACK_RUNS

    def check(self) -> None:
        """Asserts that places, members and counts agree."""
        assert len(self._keys) == len(self._masks) <= 2 * self.page_count + _SWEEP_SLACK_RUNS + 1
        assert self.page_count == sum(mask.bit_count() for mask in self.members.values())
        assert all(self.members.values()) and all(planes and planes[-1] for planes in self._stale.values())
        places: dict[int, list[int]] = {}
        for key, mask in zip(self._keys, self._masks, strict=True):
            assert 0 < mask < 1 << PAGES_PER_GROUP
            counts = places.setdefault(key, [0] * PAGES_PER_GROUP)
            for bit in range(mask.bit_length()):
                counts[bit] += mask >> bit & 1
        assert places.keys() >= self.members.keys() | self._stale.keys()
        for key, counts in places.items():
            live, planes = self.members.get(key, 0), self._stale.get(key, [])
            for bit, count in enumerate(counts):
                assert count == (live >> bit & 1) + sum((plane >> bit & 1) << i for i, plane in enumerate(planes))


def lowest(mask: int, count: int) -> int:
    """The `count` lowest pages of a mask, or all of them if there are no more."""
    if count == 1:
        return mask & -mask
    if mask.bit_count() <= count:
        return mask
    low, high = 0, mask.bit_length()
    while low < high:  # invariant: fewer than `count` pages lie below bit `low`, at least that many below `high`
        middle = (low + high) // 2
        if (mask & ((1 << middle) - 1)).bit_count() < count:
            low = middle + 1
        else:
            high = middle
    return mask & ((1 << high) - 1)


def above(mask: int, limit: int) -> int:
    """The pages of a mask that stand behind every page of `limit` in a run."""
    top = limit.bit_length()
    return mask >> top << top


def split(run: int, ripe: int, count: int) -> tuple[int, int]:
    """Walks a run from its lowest page until `count` of the ripe ones are out: (pages that go, pages passed by)."""
    if not ripe:
        return 0, run
    if ripe == run:
        return lowest(run, count), 0
    out = lowest(ripe, count)
    walked = run ^ above(run, out) if out.bit_count() == count else run
    return out, walked ^ out


def clear(plane: dict[int, int], key: int, mask: int) -> None:
    """Clears pages in a key -> mask dict in which a group without pages has no entry."""
    held = plane.get(key)
    if held is not None:
        rest = held & ~mask
        if rest:
            plane[key] = rest
        else:
            del plane[key]
