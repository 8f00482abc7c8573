"""The page cache: which pages are in memory, in what state, and who has to leave.

Everything here is synchronous and belongs to the trio thread; nothing waits. Where a caller has to wait for something
(a fill under way, room), a function says what for, and `cachefs.cache.fill` does the waiting. Between two awaits a task
is alone, so every method sees and leaves a state in which `check_invariants()` holds.

A read of any size up to 1 MiB that finds its pages costs two dict look-ups and a few int operations: see `lookup`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import trio

from cachefs.cache.account import Account, Accounts
from cachefs.cache.arena import Arena
from cachefs.cache.check import check
from cachefs.cache.file import CachedFile, Source
from cachefs.cache.page import (
    FIRST,
    GROUP_PAGES,
    GROUP_SHIFT,
    GROUP_SIZE,
    IN_GROUP,
    PAGE_SHIFT,
    PAGE_SIZE,
    Group,
    key_of,
    pieces,
    runs,
    span,
)  # fmt: skip
from cachefs.cache.policy import Policy
from cachefs.cache.refault import Refaults
from cachefs.statistics import CacheStatistics

GROUP_BITS = GROUP_SHIFT + PAGE_SHIFT
_BYTE_IN_GROUP = GROUP_SIZE - 1
_NOTHING: Mapping[int, int] = {}


@dataclass(slots=True, eq=False)
class Fill:
    """Pages of one group that a thread is reading: [first, first + count) in the group, `view` their memory."""

    group: Group
    first: int
    count: int
    view: memoryview
    done: trio.Event
    error: OSError | None = None  # what kept the backing from reading them

    @property
    def mask(self) -> int:
        return FIRST[self.count] << self.first

    @property
    def offset(self) -> int:
        """Where the first page starts in the file, in bytes."""
        return (self.group.index << GROUP_SHIFT | self.first) << PAGE_SHIFT


class Busy(Exception):
    """Pages cannot be had now: a slot has to move first, but threads are at work in it. Wait for `group` to be quiet."""

    def __init__(self, group: Group) -> None:
        self.group = group


class NoRoom(Exception):
    """Every page is dirty, in writeback or filling; wait for `PageCache.room`."""


class TooDirty(NoRoom):
    """As many pages are unwritten as may be."""


class PageCache:
    """At most `capacity_pages` pages of any number of files; `clock` gives seconds that only grow.

    The capacity may be changed later (`wishes.py`), up to `most_pages`.
    """

    def __init__(self, policy: Policy, capacity_pages: int, clock: Callable[[], float], most_pages: int = 0) -> None:
        self.capacity_pages = capacity_pages
        self.policy = policy
        self.arena = Arena(capacity_pages, most_pages)
        self.clock = clock
        self.room = trio.lowlevel.ParkingLot()  # tasks that wait for pages to become evictable
        self.dirty_limit_pages = capacity_pages  # most pages that may be dirty or in writeback; writeback's to set
        self.pin_limit_pages = capacity_pages  # pinned pages beyond it are evicted like others
        self.resident_pages = 0
        self.pinned_pages = 0  # resident ones of pinned files, whatever their state
        self.dirty_pages = 0
        self.writeback_pages = 0
        self.redirtied_pages = 0
        self.filling_pages = 0
        self.pinned_files: set[CachedFile] = set()
        self._groups: dict[int, Group] = {}  # {key: Group} of every group with resident pages
        self._files = 0  # ids given out
        self._view = self.arena.view
        self.accounts = Accounts(clock())  # who reads and writes: hits, misses and bytes are counted there
        self.reads_hit = self.reads_partial = self.reads_miss = 0
        self.readahead_used = self.readahead_unused = self.readahead_late = 0
        self.refaults = 0
        self.refault_distances = Refaults(capacity_pages)
        self.evictions: Counter[str] = Counter(capacity=0, dropped=0, invalidated=0, noreuse=0, truncated=0)
        self.misses: Counter[str] = Counter(cold=0, capacity=0, invalidated=0)

    def add_file(self, source: Source, size: int) -> CachedFile:
        self._files += 1
        return CachedFile(self._files, source, size)

    # --- reading -------------------------------------------------------------------------------------------------

    def lookup(
        self, file: CachedFile, offset: int, size: int, last_page: int = -1, account: Account | None = None
    ) -> memoryview | bytes | None:
        """The bytes [offset, offset + size), cut at the end of the file, if all their pages are up to date, and counts a hit.

        None means nothing was counted: `count_request` and a fill come next. The view is good until the next await.
        `last_page` is where the reader's previous request ended: reading on in the same page is no second access.
        """
        if account is None:
            account = self.accounts.nobody
        end = offset + size
        if end > file.size:
            end = file.size
            if offset >= end:
                return b""
        page = offset >> PAGE_SHIFT
        count = ((end - 1) >> PAGE_SHIFT) - page + 1
        group = file.groups.get(page >> GROUP_SHIFT)
        first = page & IN_GROUP
        if group is None or first + count > GROUP_PAGES:
            return self._lookup_across(file, offset, end, account)
        mask = FIRST[count] << first
        if group.uptodate & mask != mask:
            return None
        fresh = group.prefetched & mask
        if fresh:
            self._first_use(group, fresh)
            mask &= ~fresh
        if page == last_page:
            mask &= ~(1 << first)
        if mask:
            self.policy.touch(group.key, mask)
        group.used = account.stamp
        account.page_hits += count
        account.hit_bytes += end - offset
        file.page_hits += count
        self.reads_hit += 1
        start = group.base + (offset & _BYTE_IN_GROUP)
        return self._view[start : start + end - offset]

    def _lookup_across(self, file: CachedFile, offset: int, end: int, account: Account) -> memoryview | bytes | None:
        if end <= offset:
            return b""
        view = self.peek(file, offset, end)
        if view is not None:
            self.count_request(file, offset, end, account)
        return view

    def peek(self, file: CachedFile, offset: int, end: int) -> memoryview | bytes | None:
        """The bytes [offset, end) if all their pages are up to date; counts nothing. `end` is at most the file's size."""
        parts: list[tuple[int, int]] = []  # [start, end) in the arena
        for index, first, last in pieces(offset, end):
            group = file.groups.get(index)
            mask = span(first, last)
            if group is None or group.uptodate & mask != mask:
                return None
            start = group.base + max(offset - index * GROUP_SIZE, 0)
            stop = group.base + min(end - index * GROUP_SIZE, GROUP_SIZE)
            if parts and parts[-1][1] == start:
                parts[-1] = (parts[-1][0], stop)
            else:
                parts.append((start, stop))
        if len(parts) == 1:
            return self._view[parts[0][0] : parts[0][1]]
        return b"".join(self._view[start:stop] for start, stop in parts)

    def count_request(self, file: CachedFile, offset: int, end: int, account: Account | None = None) -> None:
        """Counts a read of [offset, end) by what is up to date now, and tells the policy of the pages that are."""
        account = account or self.accounts.nobody
        hits = misses = 0
        for index, first, last in pieces(offset, end):
            mask = span(first, last)
            group = file.groups.get(index)
            up = 0
            if group is not None:
                up = group.uptodate & mask
                fresh = group.prefetched & mask
                if fresh:
                    self._first_use(group, fresh)
                if up & ~fresh:
                    self.policy.touch(group.key, up & ~fresh)
                group.used = account.stamp
            hits += up.bit_count()
            misses += self._count_misses(file, index, mask & ~up)
        file.page_hits += hits
        file.page_misses += misses
        account.page_hits += hits
        account.page_misses += misses
        if not misses:
            self.reads_hit += 1
        elif hits:
            self.reads_partial += 1
        else:
            self.reads_miss += 1
        missed_bytes = (end - offset) * misses // (hits + misses)
        account.miss_bytes += missed_bytes
        account.hit_bytes += end - offset - missed_bytes

    def _count_misses(self, file: CachedFile, index: int, mask: int) -> int:
        count = mask.bit_count()
        if count:
            invalidated = (mask & file.invalidated.get(index, 0)).bit_count()
            refaults = mask & file.evicted.get(index, 0)
            capacity = refaults.bit_count()
            if refaults:
                self.refault_distances.came_back(file, index, refaults)
            self.misses["invalidated"] += invalidated
            self.misses["capacity"] += capacity
            self.refaults += capacity
            self.misses["cold"] += count - invalidated - capacity
        return count

    def _first_use(self, group: Group, fresh: int) -> None:
        """Readahead's pages are asked for the first time. That is their admission, not a second access: no touch."""
        group.prefetched &= ~fresh
        late = (fresh & group.filling).bit_count()
        self.readahead_late += late
        self.readahead_used += fresh.bit_count() - late

    # --- filling -------------------------------------------------------------------------------------------------

    def absent_runs(self, file: CachedFile, start_page: int, end_page: int) -> list[tuple[int, int]]:
        """The runs (first page, count) of [start_page, end_page) that are neither up to date nor filling, none across groups."""
        found: list[tuple[int, int]] = []
        for index, first, last in pieces(start_page << PAGE_SHIFT, end_page << PAGE_SHIFT):
            group = file.groups.get(index)
            mask = span(first, last)
            if group is not None:
                mask &= ~group.resident
            found += ((index << GROUP_SHIFT | at, count) for at, count in runs(mask))
        return found

    def fills_of(self, file: CachedFile, start_page: int, end_page: int) -> list[Fill]:
        """The fills under way that cover any page of [start_page, end_page)."""
        found: list[Fill] = []
        for index, first, last in pieces(start_page << PAGE_SHIFT, end_page << PAGE_SHIFT):
            group = file.groups.get(index)
            if group is not None and group.filling:
                mask = span(first, last)
                found += [fill for fill in group.fills if fill.mask & mask]
        return found

    def start_fill(self, file: CachedFile, page: int, count: int, wanted: int, transient: bool = False) -> Fill:
        """Makes `count` ABSENT pages of one group FILLING, all but the first `wanted` of them for readahead.

        `transient` ones are to leave once they have been read (`wishes.drop_transient`). Raises NoRoom or Busy, having changed
        nothing but evicted some pages.
        """
        self._make_room(count)
        first = page & IN_GROUP
        group = self._group(file, page >> GROUP_SHIFT, first + count)
        mask = FIRST[count] << first
        self.arena.touch(group, mask)
        group.start_fill(mask, mask & ~(FIRST[wanted] << first))
        self._mark(group, mask, transient)
        self._count_resident(file, count)
        self._count_filling(file, count)
        start = group.base + first * PAGE_SIZE
        fill = Fill(group, first, count, self._view[start : start + count * PAGE_SIZE], trio.Event())
        group.fills.append(fill)
        return fill

    def finish_fill(self, fill: Fill, nbytes: int) -> None:
        """The thread is done: `nbytes` were read, the rest of the pages is past the end of the backing. -1: it failed."""
        group, mask = fill.group, fill.mask
        if nbytes >= 0:  # what somebody else has appended to the backing is not part of the file yet: zeros as well
            start = group.base + fill.first * PAGE_SIZE
            nbytes = max(0, min(nbytes, group.file.size - fill.offset))
            self.arena.zero(start + nbytes, start + fill.count * PAGE_SIZE)
        group.fills.remove(fill)
        clean = group.finish_fill(mask, nbytes >= 0)
        self._count_filling(group.file, -fill.count)
        if clean:
            self.policy.admit(group.key, clean)
            self._remember_no_more(group, clean)
        if clean != mask:
            self._count_resident(group.file, clean.bit_count() - fill.count)
            self._shrink(group)
        fill.done.set()
        self.room.unpark_all()

    # --- writing -------------------------------------------------------------------------------------------------

    def pages_to_fill(self, file: CachedFile, offset: int, size: int) -> list[int]:
        """Pages that a write of [offset, offset + size) covers only partly, that hold data, and that are not here yet."""
        end = offset + size
        wanted = {page for page, at in ((offset >> PAGE_SHIFT, offset), (end >> PAGE_SHIFT, end)) if at & (PAGE_SIZE - 1)}
        found = []
        for page in sorted(wanted):
            start = page << PAGE_SHIFT
            covered = offset <= start and end >= min(start + PAGE_SIZE, file.size)
            group = file.groups.get(page >> GROUP_SHIFT)
            here = group is not None and group.uptodate >> (page & IN_GROUP) & 1
            if not here and not covered and start < file.size:
                found.append(page)
        return found

    def write(
        self,
        file: CachedFile,
        offset: int,
        data: bytes | memoryview,
        account: Account | None = None,
        transient: bool = False,
    ) -> None:
        """Copies `data` into pages and makes them DIRTY; grows the file. Raises NoRoom or Busy, having written nothing.

        To be called when `pages_to_fill` is empty and no page of the range is FILLING, with no await in between.
        """
        end = offset + len(data)
        parts = list(pieces(offset, end))
        if self._unwritten_after(file, parts) > self.dirty_limit_pages:
            raise TooDirty
        # The pages of the range that are here stay: what `data` does not cover of them exists nowhere else in memory.
        keep = {key_of(file.id, index): span(first, last) for index, first, last in parts}
        self._make_room(sum(self._missing(file, index, span(first, last)) for index, first, last in parts), keep)
        groups = [self._group(file, index, last + 1) for index, _, last in parts]
        for group, (index, first, last) in zip(groups, parts, strict=True):
            start = max(offset, index * GROUP_SIZE)
            stop = min(end, (index + 1) * GROUP_SIZE)
            self._write_group(group, span(first, last), start, data[start - offset : stop - offset])
            self._mark(group, span(first, last), transient)
        file.size = max(file.size, end)
        (account or self.accounts.nobody).write_bytes += len(data)

    def write_now(self, file: CachedFile, offset: int, data: memoryview, account: Account, transient: bool) -> bool:
        """`write` inside one group, where nothing has to be read or waited for first; False, and nothing written, if it has.

        What most writes need: without lists of groups, and of a page that is dirty already little but the copy.
        """
        end = offset + len(data)
        index, first = offset >> GROUP_BITS, offset >> PAGE_SHIFT & IN_GROUP
        count = ((end - 1) >> PAGE_SHIFT) - (offset >> PAGE_SHIFT) + 1
        if first + count > GROUP_PAGES:
            return False
        mask = FIRST[count] << first
        group = file.groups.get(index)
        dirty, uptodate = (group.dirty, group.uptodate) if group is not None else (0, 0)
        if mask & ~dirty:
            unwritten = self.dirty_pages + self.writeback_pages + (mask & ~dirty).bit_count()
            if unwritten > self.dirty_limit_pages or (group is not None and group.filling & mask):
                return False
            if mask & ~uptodate and self.pages_to_fill(file, offset, len(data)):
                return False
        if group is None or mask & ~uptodate:
            try:
                self._make_room((mask & ~uptodate).bit_count(), {key_of(file.id, index): mask})
                group = self._group(file, index, first + count)
            except (NoRoom, Busy):
                return False
        self._write_group(group, mask, offset, data)
        if transient or file.transient:
            self._mark(group, mask, transient)
        if end > file.size:
            file.size = end
        account.write_bytes += len(data)
        return True

    def _unwritten_after(self, file: CachedFile, parts: list[tuple[int, int, int]]) -> int:
        count = self.dirty_pages + self.writeback_pages
        for index, first, last in parts:
            group = file.groups.get(index)
            count += (span(first, last) & ~(group.dirty if group is not None else 0)).bit_count()
        return count

    def _missing(self, file: CachedFile, index: int, mask: int) -> int:
        group = file.groups.get(index)
        return (mask if group is None else mask & ~group.uptodate).bit_count()

    def _write_group(self, group: Group, mask: int, offset: int, data: bytes | memoryview) -> None:
        start = group.base + (offset & _BYTE_IN_GROUP)
        stop = start + len(data)
        old = group.uptodate & mask
        if old != mask:
            self._add_written(group, mask, mask & ~old, start, stop)
        if old:
            fresh = group.prefetched & old
            if fresh:
                self._first_use(group, fresh)
            self.policy.touch(group.key, old)
        self._view[start:stop] = data
        added = mask & ~group.dirty
        if added:
            redirtied = added & group.writeback
            if redirtied:
                self._count_redirtied(group.file, redirtied.bit_count())
            group.make_dirty(added, self.clock())
            self._count_dirty(group, added.bit_count())

    def _add_written(self, group: Group, mask: int, new: int, start: int, stop: int) -> None:
        """Pages `new` of `mask` come, with bytes [start, stop) of the arena. The rest is past the file's end, or a hole."""
        self.arena.touch(group, new)
        if new & mask & -mask:
            self.arena.zero(start & -PAGE_SIZE, start)
        if new >> (mask.bit_length() - 1):
            self.arena.zero(stop, -(-stop // PAGE_SIZE) * PAGE_SIZE)
        self._count_resident(group.file, new.bit_count())
        self.policy.admit(group.key, new)
        self._remember_no_more(group, new)

    def start_writeback(self, group: Group, mask: int) -> None:
        """DIRTY pages `mask` go to the writeback thread."""
        group.start_writeback(mask)
        count = mask.bit_count()
        group.file.writeback_pages += count
        self.writeback_pages += count
        self._count_dirty(group, -count)

    def finish_writeback(self, group: Group, mask: int, failed_since: float | None) -> None:
        """The thread has written `mask`; or could not, and they have been dirty since `failed_since`."""
        count = mask.bit_count()
        self._count_redirtied(group.file, -(mask & group.dirty).bit_count())
        group.file.writeback_pages -= count
        self.writeback_pages -= count
        if failed_since is None:
            group.finish_writeback(mask)
        else:
            added = (mask & ~group.dirty).bit_count()
            group.fail_writeback(mask, failed_since)
            self._count_dirty(group, added)
        if group.file.transient:
            self.remove(group, group.file.transient.get(group.index, 0) & mask & group.evictable, "noreuse")
        self.room.unpark_all()

    # --- leaving -------------------------------------------------------------------------------------------------

    def truncate(self, file: CachedFile, size: int) -> None:
        """Cuts or grows the file to `size` bytes. Pages past it leave, whatever they held; none of them is in writeback."""
        if size < file.size:
            keep, tail = divmod(size, PAGE_SIZE)
            if tail:
                self._zero_tail(file, keep, tail)
            self._drop_pages(file, keep + bool(tail), True, "truncated")
        file.size = size

    def _zero_tail(self, file: CachedFile, page: int, tail: int) -> None:
        group = file.groups.get(page >> GROUP_SHIFT)
        if group is not None:
            bit = 1 << (page & IN_GROUP)
            group.poisoned |= group.filling & bit
            if group.uptodate & bit:
                start = group.base + (page & IN_GROUP) * PAGE_SIZE
                self.arena.zero(start + tail, start + PAGE_SIZE)

    def invalidate(self, file: CachedFile) -> int:
        """The backing changed underneath: every clean page leaves. Returns how many pages did."""
        return self._drop_pages(file, 0, False, "invalidated")

    def drop(self, file: CachedFile, indexes: Iterable[int] | None = None) -> int:
        """Every clean page that is not pinned leaves, on request, of all groups or those at `indexes`; returns how many did."""
        groups = [file.groups.get(index) for index in (list(file.groups) if indexes is None else indexes)]
        dropped = sum(self.remove(group, group.evictable, "dropped") for group in groups if group is not None)
        self.room.unpark_all()
        return dropped

    def _mark(self, group: Group, mask: int, transient: bool) -> None:
        """Pages `mask` came, or were written, for one use or not."""
        marks = group.file.transient
        if transient:
            marks[group.index] = marks.get(group.index, 0) | mask
        elif group.index in marks:
            marks[group.index] &= ~mask

    def remove(self, group: Group, going: int, reason: str) -> int:
        """CLEAN (or, discarded, DIRTY) pages `going` of a group leave other than by eviction; returns how many."""
        if not going:
            return 0
        self.policy.remove(group.key, going)
        return self._leave(group, going, reason)

    def give_up(self, file: CachedFile) -> int:
        """Every dirty page leaves unwritten, but for those a thread is working on; how many bytes of the file that were."""
        given_up = 0
        for index in list(file.dirty_groups):
            group = file.groups[index]
            going = group.dirty & ~group.writeback
            if not going:
                continue
            last_page = (index << GROUP_SHIFT) + going.bit_length()
            given_up += going.bit_count() * PAGE_SIZE - (last_page * PAGE_SIZE - file.size if last_page == file.end_page else 0)
            self.policy.remove(group.key, going)
            self._leave(group, going, "dropped")
        self.room.unpark_all()
        return given_up

    def discard(self, file: CachedFile) -> None:
        """The file is gone: every page leaves, dirty ones too, but for those a thread is working on."""
        self._drop_pages(file, 0, True, "truncated")

    def _drop_pages(self, file: CachedFile, from_page: int, dirty_too: bool, reason: str) -> int:
        dropped = 0
        for index in [i for i in file.groups if i >= from_page >> GROUP_SHIFT]:
            group = file.groups[index]
            mask = ~FIRST[min(max(from_page - (index << GROUP_SHIFT), 0), GROUP_PAGES)]
            group.poisoned |= group.filling & mask
            going = group.uptodate & ~group.writeback & mask
            if not dirty_too:
                going &= ~group.dirty
            dropped += self.remove(group, going, reason)
        if dropped:
            self.room.unpark_all()
        if reason == "truncated":
            for memory in (file.evicted, file.invalidated, file.evicted_at):
                for index in [i for i in memory if i >= from_page >> GROUP_SHIFT]:
                    memory.pop(index)
        return dropped

    def _make_room(self, count: int, keep: Mapping[int, int] = _NOTHING) -> None:
        """Evicts until `count` more pages fit, none of `keep` ({group key: mask}), or raises NoRoom."""
        over = self.resident_pages + count - self.capacity_pages
        if over > 0 and self.evict(over, keep) < over:
            raise NoRoom

    def evict(self, count: int, keep: Mapping[int, int] = _NOTHING) -> int:
        """Evicts up to `count` pages, none of `keep`; returns how many."""
        groups = self._groups
        heed_pins = self.pinned_pages <= self.pin_limit_pages  # not where files grew after they were pinned

        def may_go(key: int) -> int:
            group = groups[key]
            return (group.evictable if heed_pins else group.clean) & ~keep.get(key, 0)

        victims = self.policy.victims(count, may_go)
        return sum(self._leave(groups[key], mask, "capacity") for key, mask in victims)

    def _leave(self, group: Group, mask: int, reason: str) -> int:
        """CLEAN (or, discarded, DIRTY) pages become ABSENT; the policy has forgotten them already."""
        file, count = group.file, mask.bit_count()
        self.readahead_unused += (group.prefetched & mask).bit_count()
        discarded = (group.dirty & mask).bit_count()
        group.forget(mask)
        if discarded:
            self._count_dirty(group, -discarded)
        self._count_resident(file, -count)
        self.evictions[reason] += count
        if reason == "capacity":
            self.refault_distances.left(file, group.index, mask)
        if reason in ("capacity", "invalidated"):
            memory = file.evicted if reason == "capacity" else file.invalidated
            memory[group.index] = memory.get(group.index, 0) | mask
        self._shrink(group)
        return count

    def _remember_no_more(self, group: Group, mask: int) -> None:
        file, index = group.file, group.index
        for memory in (file.evicted, file.invalidated):
            if index in memory:
                memory[index] &= ~mask
                if not memory[index]:
                    del memory[index]
        if index not in file.evicted:
            file.evicted_at.pop(index, None)

    # --- groups and counts -----------------------------------------------------------------------------------------

    def _group(self, file: CachedFile, index: int, pages: int) -> Group:
        """The group with room for its first `pages` pages."""
        group = file.groups.get(index)
        if group is None:
            before = file.groups.get(index - 1)
            near = before.base + GROUP_SIZE if before is not None else -1
            need = max(pages, min(file.end_page - (index << GROUP_SHIFT), GROUP_PAGES)) if index == 0 else GROUP_PAGES
            group = Group(file, index, *self.arena.allocate(need, near))
            if group.touched:
                self.arena.leave_holes(group)
            group.born = self.clock()
            file.groups[index] = self._groups[group.key] = group
        elif pages > group.capacity:
            self._move(group)
        return group

    def _move(self, group: Group) -> None:
        """Gives a group that outgrew its small slot a large one; at most 64 KiB are copied, once in a group's life."""
        if group.filling or group.writeback:
            raise Busy(group)
        moved = Group(group.file, group.index, *self.arena.allocate(GROUP_PAGES, -1))
        self.arena.touch(moved, group.uptodate)
        for first, count in runs(group.uptodate):
            start, stop = first * PAGE_SIZE, (first + count) * PAGE_SIZE
            self._view[moved.base + start : moved.base + stop] = self._view[group.base + start : group.base + stop]
        self.arena.release(group)
        group.base, group.capacity, group.touched = moved.base, moved.capacity, moved.touched
        if group.touched & ~group.uptodate:
            self.arena.leave_holes(group)

    def _shrink(self, group: Group) -> None:
        """Pages of `group` left; so does the group with its last one."""
        if group.resident:
            self.arena.leave_holes(group)
        else:
            self.arena.release(group)
            del group.file.groups[group.index], self._groups[group.key]

    def _count_resident(self, file: CachedFile, count: int) -> None:
        file.resident_pages += count
        self.resident_pages += count
        if file.pinned:
            self.pinned_pages += count

    def _count_filling(self, file: CachedFile, count: int) -> None:
        file.filling_pages += count
        self.filling_pages += count

    def _count_redirtied(self, file: CachedFile, count: int) -> None:
        file.redirtied_pages += count
        self.redirtied_pages += count

    def _count_dirty(self, group: Group, count: int) -> None:
        file = group.file
        file.dirty_pages += count
        self.dirty_pages += count
        if group.dirty:
            file.dirty_groups[group.index] = None
        else:
            file.dirty_groups.pop(group.index, None)

    # --- looking at it -----------------------------------------------------------------------------------------------

    @property
    def page_hits(self) -> int:
        return self.accounts.total("page_hits")

    @property
    def page_misses(self) -> int:
        return self.accounts.total("page_misses")

    @property
    def hit_bytes(self) -> int:
        return self.accounts.total("hit_bytes")

    @property
    def miss_bytes(self) -> int:
        return self.accounts.total("miss_bytes")

    @property
    def write_bytes(self) -> int:
        return self.accounts.total("write_bytes")

    def statistics(self) -> CacheStatistics:
        pinned = sum(file.clean_pages for file in self.pinned_files)
        unclean = self.dirty_pages + self.writeback_pages - self.redirtied_pages
        return CacheStatistics(
            capacity_bytes=self.capacity_pages * PAGE_SIZE,
            resident_bytes=self.resident_pages * PAGE_SIZE,
            clean_pages=self.resident_pages - self.filling_pages - unclean - pinned,
            dirty_pages=self.dirty_pages,
            writeback_pages=self.writeback_pages - self.redirtied_pages,
            filling_pages=self.filling_pages,
            pinned_pages=pinned,
            pin_limit_bytes=self.pin_limit_pages * PAGE_SIZE,
            page_hits=self.page_hits,
            page_misses=self.page_misses,
            hit_bytes=self.hit_bytes,
            miss_bytes=self.miss_bytes,
            write_bytes=self.write_bytes,
            reads_hit=self.reads_hit,
            reads_partial=self.reads_partial,
            reads_miss=self.reads_miss,
            evictions=dict(self.evictions),
            misses=dict(self.misses),
            refaults=self.refaults,
            refault_distances=self.refault_distances.snapshot(),
            readahead_used_pages=self.readahead_used,
            readahead_unused_pages=self.readahead_unused,
            readahead_late_pages=self.readahead_late,
            programs=self.accounts.by_program(),
            users=self.accounts.by_user(),
        )

    def groups(self) -> list[Group]:
        """Every group with resident pages."""
        return list(self._groups.values())

    def check_invariants(self) -> None:
        """Asserts everything this module promises; slow, for tests."""
        check(self)
