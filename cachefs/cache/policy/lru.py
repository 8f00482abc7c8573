"""Least recently used: exact, with a hit that leaves only a note behind."""

from typing import ClassVar

from cachefs.cache.policy.base import Evictable, Policy, RunQueue, Runs, lowest, split

# A longer log collapses more repeated hits but makes the hit that fills it wait longer (about 1 us a note).
LOG_NOTES = 512


class LRU(Policy):
    """One queue, least recently used first. Pages that may not go move to the newest end when they come up.

    A hit appends (key, mask) to a log. The log is replayed before anything that depends on the order, or when it is
    full (the read buffer of the Caffeine cache). The last hit of a page decides its place, so a replay moves every page
    once, however often the log names it. Invariant: all pages in the log are known.
    """

    name: ClassVar[str] = "lru"

    def __init__(self, capacity_pages: int) -> None:
        super().__init__(capacity_pages)
        self._queue = RunQueue()
        self._log: Runs = []
        self._last = (-1, 0)  # newest note of the log

    def admit(self, key: int, mask: int) -> None:
        if self._log:
            self._replay()
        self._queue.push(key, mask)

    def touch(self, key: int, mask: int) -> None:
        note = (key, mask)
        if note == self._last:
            return
        self._last = note
        self._log.append(note)
        if len(self._log) >= LOG_NOTES:
            self._replay()

    def remove(self, key: int, mask: int) -> None:
        if self._log:
            self._replay()
        self._queue.discard(key, mask)

    def victims(self, count: int, evictable: Evictable) -> Runs:
        if self._log:
            self._replay()
        queue, chosen = self._queue, []
        kept_pages = 0  # that many pages at the newest end may not go; once it is all of them, nothing is left to find
        while count > 0 and kept_pages < queue.page_count:
            key, run = queue.front()
            if kept_pages:
                run = lowest(run, queue.page_count - kept_pages)
            out, kept = split(run, run & evictable(key), count)
            if out:
                queue.shift(out)
                chosen.append((key, out))
                count -= out.bit_count()
            if kept:
                queue.requeue(kept)
                kept_pages += kept.bit_count()
        return chosen

    def _replay(self) -> None:
        seen: dict[int, int] = {}
        moves: Runs = []  # newest first
        for key, mask in reversed(self._log):
            newer = seen.get(key, 0)
            fresh = mask & ~newer
            if fresh:
                seen[key] = newer | mask
                moves.append((key, fresh))
        for key, mask in reversed(moves):
            self._queue.renew(key, mask)
        self._log.clear()
        self._last = (-1, 0)

    def __len__(self) -> int:
        return self._queue.page_count

    def pages(self) -> dict[int, int]:
        return dict(self._queue.members)

    def check(self) -> None:
        self._queue.check()
        assert len(self._log) < LOG_NOTES and self._last == (self._log[-1] if self._log else (-1, 0))
        for key, mask in self._log:
            assert mask & ~self._queue.members.get(key, 0) == 0
