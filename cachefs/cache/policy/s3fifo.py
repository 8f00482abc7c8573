"""S3-FIFO (Yang et al., SOSP 2023): a small queue on probation, a main queue, and a memory of who failed probation."""

from typing import ClassVar

from cachefs.cache.policy.base import Evictable, Policy, RunQueue, Runs, above, clear, lowest, split

SMALL_PERCENT = 10
WALK_MOST_RUNS = 8192  # of main in one search, ~15 ms: behind that pages go even if they were hit, lest requests wait


class S3FIFO(Policy):
    """Three FIFOs: small (10 %), main (90 %), and the names of as many pages as main holds that left small unused.

    New pages enter small, or main if their name is remembered. At the end of small a page that was hit twice moves to
    main, the others go. At the end of main a page that was hit goes round again with its count lowered by one. Counts
    saturate at 3: two bit planes per group. Pages that may not go also go round in their queue. Threshold, sizes and
    the rule that until the first eviction main takes what small has no room for are those of libCacheSim, the authors'
    simulator.
    """

    name: ClassVar[str] = "s3fifo"

    def __init__(self, capacity_pages: int) -> None:
        self._small = RunQueue()
        self._main = RunQueue()
        self._ghost = RunQueue()  # names only: not resident
        self._ones: dict[int, int] = {}  # key -> mask: low bit of the hit count
        self._twos: dict[int, int] = {}  # key -> mask: high bit of the hit count
        self._evicting = False  # a victim was asked for at least once
        super().__init__(capacity_pages)

    def resize(self, capacity_pages: int) -> None:
        super().resize(capacity_pages)
        self._small_pages = max(1, capacity_pages * SMALL_PERCENT // 100)
        self._main_pages = capacity_pages - self._small_pages
        self._trim_ghost()

    def admit(self, key: int, mask: int) -> None:
        back = mask & self._ghost.members.get(key, 0)
        new = mask ^ back
        if back:
            self._ghost.discard(key, back)
        if not self._evicting:
            overflow = new ^ lowest(new, max(0, self._small_pages - self._small.page_count))
            back, new = back | overflow, new ^ overflow
        self._main.push(key, back)
        self._small.push(key, new)

    def touch(self, key: int, mask: int) -> None:
        ones = self._ones.get(key, 0)
        carry = ones & mask
        if carry:
            twos = self._twos.get(key, 0)
            if carry & twos == mask:  # as often as counts
                return
            self._ones[key] = (ones ^ mask) | (carry & twos)
            self._twos[key] = twos | carry
        else:
            self._ones[key] = ones | mask

    def remove(self, key: int, mask: int) -> None:
        on_probation = mask & self._small.members.get(key, 0)
        self._small.discard(key, on_probation)
        self._main.discard(key, mask ^ on_probation)
        self._clear_hits(key, mask)

    def victims(self, count: int, evictable: Evictable) -> Runs:
        self._evicting = True
        # That many pages at the newest end of each queue have no hits and may not go; once it is all, leave it alone.
        self._vain_small = self._vain_main = 0
        self._patience = WALK_MOST_RUNS
        chosen = []
        while count > 0:
            small_open = self._vain_small < self._small.page_count
            main_open = self._vain_main < self._main.page_count
            surplus = self._main.page_count - self._main_pages
            if main_open and (surplus > 0 or not small_open):
                key, out = self._sift_main(min(count, surplus) if small_open else count, evictable)
            elif small_open:
                key, out = self._sift_small(count, evictable)
            else:
                break
            if out:
                chosen.append((key, out))
                count -= out.bit_count()
        return chosen

    def _sift_main(self, count: int, evictable: Evictable) -> tuple[int, int]:
        """Walks main's oldest run until `count` pages are out; what was hit, or may not go, goes round again."""
        main = self._main
        key, run = main.front()
        if self._vain_main:
            run = lowest(run, main.page_count - self._vain_main)
        hit = run & (self._ones.get(key, 0) | self._twos.get(key, 0)) if self._patience else 0
        self._patience = max(0, self._patience - 1)
        out, passed = split(run, run ^ hit and (run ^ hit) & evictable(key), count)
        if out:
            main.shift(out)
            self._clear_hits(key, out)
        if passed:
            main.requeue(passed)
            spared = passed & hit
            self._vain_main = above(passed, spared).bit_count() + (0 if spared else self._vain_main)
            if spared:
                self._lower_hits(key, spared)
        return key, out

    def _sift_small(self, count: int, evictable: Evictable) -> tuple[int, int]:
        """Walks small's oldest run as far as its pages share one fate: promotion, or eviction if they may go."""
        small = self._small
        key, run = small.front()
        if self._vain_small:
            run = lowest(run, small.page_count - self._vain_small)
        passing = run & self._twos.get(key, 0)  # two hits or three
        failing = run ^ passing
        if passing & run & -run:
            self._promote(key, run & ((failing & -failing) - 1), evictable)
            return key, 0
        run &= (passing & -passing) - 1
        out, kept = split(run, run & evictable(key), count)
        if out:
            small.shift(out)
            self._clear_hits(key, out)
            self._ghost.push(key, out)
            self._trim_ghost()
        if kept:
            small.requeue(kept)
            self._vain_small += kept.bit_count()
        return key, out

    def _promote(self, key: int, run: int, evictable: Evictable) -> None:
        """Moves pages to main, no more than make it the next queue to evict from; their counts begin anew."""
        run = lowest(run, max(1, self._main_pages + 1 - self._main.page_count))
        self._small.shift(run)
        self._clear_hits(key, run)
        self._main.push(key, run)
        may = run & evictable(key)
        self._vain_main = above(run, may).bit_count() + (0 if may else self._vain_main)

    def _lower_hits(self, key: int, mask: int) -> None:
        """Subtracts one from the counts of these pages, none of which is 0."""
        ones = self._ones.get(key, 0)
        clear(self._twos, key, mask & ~ones)
        self._ones[key] = ones ^ mask
        clear(self._ones, key, 0)

    def _clear_hits(self, key: int, mask: int) -> None:
        clear(self._ones, key, mask)
        clear(self._twos, key, mask)

    def _trim_ghost(self) -> None:
        while self._ghost.page_count > self._main_pages:
            _, run = self._ghost.front()
            self._ghost.shift(lowest(run, self._ghost.page_count - self._main_pages))

    def __len__(self) -> int:
        return self._small.page_count + self._main.page_count

    def pages(self) -> dict[int, int]:
        known = dict(self._small.members)
        for key, mask in self._main.members.items():
            known[key] = known.get(key, 0) | mask
        return known

    def check(self) -> None:
        for queue in (self._small, self._main, self._ghost):
            queue.check()
        assert self._ghost.page_count <= self._main_pages
        for key, mask in self._small.members.items():
            assert mask & self._main.members.get(key, 0) == 0
        known = self.pages()
        for key, mask in self._ghost.members.items():
            assert mask & known.get(key, 0) == 0
        for plane in (self._ones, self._twos):
            for key, mask in plane.items():
                assert mask & ~known.get(key, 0) == 0
                assert mask or self._twos.get(key)
