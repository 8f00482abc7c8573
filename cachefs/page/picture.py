"""The picture of a mount, kept up to date in its trio thread while somebody looks at it, in slices that nobody notices.

A look goes over all inodes, and makes strips anew only of files of which something has changed since the last one. Each strip
is encoded once, however many clients want it; a client gets those that are newer than what it has. So a page that is watched
costs the mount a walk over the inodes a second (10,000 files: ~10 ms), and what has changed.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain
from operator import attrgetter

import trio

from cachefs.cache.figures import statistics_of
from cachefs.cache.file import CachedFile
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.residency import Cached, look_at
from cachefs.entries import escaped
from cachefs.history import History, Sample
from cachefs.inode import Inode
from cachefs.names import Memory, paths_of
from cachefs.page.cells import StripMaker
from cachefs.stack import Stack

FRESH_SECONDS = 0.8  # a look that is no older than this is new enough for whoever asks
SLICE_SECONDS = 0.002  # without a pause
PAUSE_SECONDS = 0.004  # at least a third of the time belongs to others, even in the first look at a large cache
GROUPS_BETWEEN = 50  # looks at the clock
INODES_BETWEEN = 200
STRIPS_BETWEEN = 2000
ANEW_EVERY = 30  # looks: each strip is made anew so often at the least (directories are renamed, pages change places)
MOST_GONE = 10_000  # files that left the cache and are remembered for clients that have them still
GROUPS_AT_ONCE = 400  # of one file, ~1 ms


@dataclass(slots=True)
class Shown:
    """One file of the picture, as it was when its strip was made last."""

    node: int
    path: str | None  # None: it has no name any more
    mark: tuple[object, ...]
    version: int  # of the look that made the strip
    text: str  # JSON, the fields of `png.File` in order
    size: int
    cached_bytes: int
    dirty_bytes: int
    page_hits: int
    page_misses: int
    hits_per_second: float
    pinned: bool


@dataclass(frozen=True, slots=True)
class Frame:
    """What one look has found; never changed, so that other threads may read it."""

    epoch: str  # versions of another epoch mean nothing
    version: int
    time_seconds: float  # since the mount
    strips: Sequence[tuple[int, str]]  # (version, JSON text)
    gone: tuple[tuple[int, int], ...]  # (version, node), oldest first
    oldest_gone: int  # a client whose version is below has to begin anew
    samples: tuple[Sample, ...]
    facts: Mapping[str, object]  # of the whole mount


class NotCached(Exception):
    """There is nothing of such a file in the cache."""


class Picture:
    """What is to be seen of one mount."""

    def __init__(self, stack: Stack, history: History) -> None:
        self.stack, self.history = stack, history
        self.shown: dict[int, Shown] = {}  # {node: ...}
        self._epoch = os.urandom(4).hex()
        self._version = 0
        self._gone: deque[tuple[int, int]] = deque()
        self._oldest_gone = 0
        self._began = 0.0  # the last look, since the mount
        self._ended = -FRESH_SECONDS
        self._between = FRESH_SECONDS  # seconds from the beginning of the look before the last one to that of the last
        self._looking = trio.Lock()
        self._frame: Frame | None = None

    async def look(self) -> Frame:
        """The picture as it is now, or was a moment ago; whoever asks while somebody else looks gets the same one."""
        async with self._looking:
            if self._frame is None or self._now() - self._ended > FRESH_SECONDS:
                now = self._now()
                self._between, self._began = max(FRESH_SECONDS, now - self._began), now
                await self._look()
                self._frame = await self._new_frame()
                self._ended = self._now()
            return self._frame

    def _now(self) -> float:
        return self.stack.cache.clock() - self.stack.started

    async def _look(self) -> None:
        self._version += 1
        slices = Slices()
        gone = set(self.shown)
        memory: Memory = {}
        for looked_at, inode in enumerate(list(self.stack.table)):
            if looked_at % INODES_BETWEEN == 0 and await slices.rest():
                memory = {}
            file = inode.file
            if file is None or not file.resident_pages:
                continue
            gone.discard(inode.node)
            mark, rate = self._mark(inode, file), self._rate(inode.node, file)
            if self._is_new(inode.node, mark, rate):
                path = next(iter(paths_of(inode, self.stack.table, memory)), None)
                maker = StripMaker(file.size)
                for groups in self._groups(file):
                    for cached in groups:
                        maker.add(cached)
                    if await slices.rest():
                        memory = {}
                self._show(inode.node, path, file, mark, rate, maker)
        for node in gone:
            del self.shown[node]
            self._gone.append((self._version, node))
        while len(self._gone) > MOST_GONE:
            self._oldest_gone, _ = self._gone.popleft()

    def _is_new(self, node: int, mark: tuple[object, ...], rate: float) -> bool:
        shown = self.shown.get(node)
        if shown is None or mark != shown.mark or rate != shown.hits_per_second:
            return True
        return (node + self._version) % ANEW_EVERY == 0

    def _mark(self, inode: Inode, file: CachedFile) -> tuple[object, ...]:
        """Another one, if the strip is to be made anew."""
        return (
            next(reversed(inode.names), None), file.size, file.resident_pages, file.filling_pages, file.dirty_pages,
            file.writeback_pages, file.page_hits, file.page_misses, file.pinned,
        )  # fmt: skip

    def _rate(self, node: int, file: CachedFile) -> float:
        """Page hits a second since the last look; at that time the file had those that its strip tells of."""
        shown = self.shown.get(node)
        if shown is None or file.page_hits <= shown.page_hits:
            return 0.0
        return round((file.page_hits - shown.page_hits) / self._between, 1)

    def _groups(self, file: CachedFile) -> Iterator[list[Cached]]:
        """The groups of a file, some at a time: what changes does so between two."""
        indexes = list(file.groups)
        for start in range(0, len(indexes), GROUPS_BETWEEN):
            now, some = self.stack.cache.clock(), indexes[start : start + GROUPS_BETWEEN]
            yield [look_at(file.groups[index], now) for index in some if index in file.groups]

    def _show(
        self, node: int, path: bytes | None, file: CachedFile, mark: tuple[object, ...], rate: float, maker: StripMaker
    ) -> None:
        now = self._now()
        name = None if path is None else os.fsdecode(path)
        cached = min(file.size, (file.resident_pages - file.filling_pages) * PAGE_SIZE)
        dirty = (file.dirty_pages + file.writeback_pages - file.redirtied_pages) * PAGE_SIZE
        strip = maker.strip()
        fields = (
            node, None if name is None else escaped(name), file.size, cached, dirty, file.page_hits, file.page_misses, rate,
            *strip, round(now, 1),
        )  # fmt: skip
        self.shown[node] = Shown(
            node, name, mark, self._version, json.dumps(fields), file.size, cached, dirty, file.page_hits, file.page_misses,
            rate, file.pinned,
        )  # fmt: skip

    async def _new_frame(self) -> Frame:
        slices, strips = Slices(), list[tuple[int, str]]()
        shown = list(self.shown.values())  # changed by looks alone, one at a time
        for start in range(0, len(shown), STRIPS_BETWEEN):
            strips += [(file.version, file.text) for file in shown[start : start + STRIPS_BETWEEN]]
            await slices.rest()
        samples, gone = self.history.now(), tuple(self._gone)
        return Frame(self._epoch, self._version, self._now(), strips, gone, self._oldest_gone, samples, self._facts())

    def _facts(self) -> dict[str, object]:
        config, cache = self.stack.config, statistics_of(self.stack.cache)
        return {
            "mountpoint": escaped(config.mountpoint),
            "source": escaped(config.source),
            "policy": self.stack.cache.policy.name,
            "capacity_bytes": cache.capacity_bytes,
            "resident_bytes": cache.resident_bytes,
            "pinned_bytes": cache.pinned_pages * PAGE_SIZE,
            "dirty_limit_bytes": config.dirty_limit_bytes,
            "page_hits": cache.page_hits,
            "page_misses": cache.page_misses,
        }

    async def file(self, node: int) -> tuple[str | None, int, list[Cached]]:
        """Name, size and cached groups of one file; NotCached if there is none."""
        try:
            inode = self.stack.table.get(node)
        except KeyError:
            raise NotCached(node) from None
        file = inode.file
        if file is None:
            raise NotCached(node)
        path = next(iter(paths_of(inode, self.stack.table, {})), None)
        found: list[Cached] = []
        for groups in self._groups(file):
            found += groups
            if len(found) % GROUPS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return None if path is None else os.fsdecode(path), file.size, found

    async def hottest(self, most: int) -> list[Shown]:
        """The files that lead in any of the ways in which people sort them, `most` for each way."""
        slices, shown = Slices(), list(self.shown.values())
        found: dict[int, Shown] = {}
        for key in map(attrgetter, ("hits_per_second", "page_hits", "page_misses", "cached_bytes", "dirty_bytes")):
            best: list[Shown] = []
            for start in range(0, len(shown), STRIPS_BETWEEN):
                best = nlargest(most, chain(best, shown[start : start + STRIPS_BETWEEN]), key)
                await slices.rest()
            found |= {file.node: file for file in best}
        return list(found.values())


class Slices:
    """Work that gives the turn away as soon as it has had it for `SLICE_SECONDS`."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def rest(self) -> bool:
        """Pauses if it is time to; says whether others may have had a turn."""
        if time.perf_counter() - self._began < SLICE_SECONDS:
            return False
        await trio.sleep(PAUSE_SECONDS)
        self._began = time.perf_counter()
        return True
