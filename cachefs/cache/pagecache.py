"""The page cache: which pages are in memory, in what state, and who has to leave.

Everything here is synchronous and belongs to the trio thread; nothing waits. Where a caller has to wait for something
(a fill under way, room), a function says what for, and `cachefs.cache.fill` does the waiting. Between two awaits a task
is alone, so every method sees and leaves a state in which `check_invariants()` holds.

A read of any size up to 1 MiB that finds its pages costs two dict look-ups and a few int operations: see `lookup`.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import trio

from cachefs.cache.account import Account, Accounts
from cachefs.cache.arena import Arena
from cachefs.cache.check import check
from cachefs.cache.file import CachedFile, Source
from cachefs.cache.page import (
    ALL,
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
    span,
)  # fmt: skip
from cachefs.cache.policy import Policy
from cachefs.cache.reads import lookup_across
from cachefs.cache.refault import Refaults
from cachefs.cache.waits import Busy, Fill, NoRoom, TooDirty

GROUP_BITS = GROUP_SHIFT + PAGE_SHIFT
WHOLE_PAGES = GROUP_PAGES // 2  # a group that begins with so many, or goes on with a stream, is going to be filled
_BYTE_IN_GROUP = GROUP_SIZE - 1
_NOTHING: Mapping[int, int] = {}


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

        None means nothing was counted: `reads.count_request` and a fill come next. The view is good until the next await.
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
            return lookup_across(self, file, offset, end, account)
        mask = FIRST[count] << first
        if group.uptodate & mask != mask:
            return None
        fresh = group.prefetched & mask
        if fresh:
            self.first_use(group, fresh)
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

    def first_use(self, group: Group, fresh: int) -> None:
        """Readahead's pages are asked for the first time. That is their admission, not a second access: no touch."""
        group.prefetched &= ~fresh
        late = (fresh & group.filling).bit_count()
        self.readahead_late += late
        self.readahead_used += fresh.bit_count() - late

    # --- filling -------------------------------------------------------------------------------------------------

    def start_fill(self, file: CachedFile, page: int, count: int, wanted: int, transient: bool = False) -> Fill:
        """Makes `count` ABSENT pages of one group FILLING, all but the first `wanted` of them for readahead.

        `transient` ones are to leave once they have been read (`wishes.drop_transient`). Raises NoRoom or Busy, having changed
        nothing but evicted some pages.
        """
        self._make_room(count)
        first = page & IN_GROUP
        mask = FIRST[count] << first
        group = self._group(file, page >> GROUP_SHIFT, mask)
        self.arena.touch(group, mask)
        group.start_fill(mask, mask & ~(FIRST[wanted] << first))
        file.mark(group.index, mask, transient)
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
            group.file.remember_no_more(group.index, clean)
        if clean != mask:
            self._count_resident(group.file, clean.bit_count() - fill.count)
            self._shrink(group)
        fill.done.set()
        self.room.unpark_all()

    # --- writing -------------------------------------------------------------------------------------------------

    def write(
        self,
        file: CachedFile,
        offset: int,
        data: bytes | memoryview,
        account: Account | None = None,
        transient: bool = False,
    ) -> None:
        """Copies `data` into pages and makes them DIRTY; grows the file. Raises NoRoom or Busy, having written nothing.

        To be called when `CachedFile.pages_to_fill` is empty and no page of the range is FILLING, with no await in between.
        """
        end = offset + len(data)
        parts = list(pieces(offset, end))
        more = sum(file.not_dirty(index, span(first, last)).bit_count() for index, first, last in parts)
        if self.dirty_pages + self.writeback_pages + more > self.dirty_limit_pages:
            raise TooDirty
        # The pages of the range that are here stay: what `data` does not cover of them exists nowhere else in memory.
        keep = {key_of(file.id, index): span(first, last) for index, first, last in parts}
        self._make_room(sum(file.absent(index, span(first, last)).bit_count() for index, first, last in parts), keep)
        groups = [self._group(file, index, span(first, last)) for index, first, last in parts]
        for group, (index, first, last) in zip(groups, parts, strict=True):
            start = max(offset, index * GROUP_SIZE)
            stop = min(end, (index + 1) * GROUP_SIZE)
            self._copy_in(group, span(first, last), start, data[start - offset : stop - offset])
            self._make_dirty(group, span(first, last))
            file.mark(index, span(first, last), transient)
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
            if (offset | end) & PAGE_SIZE - 1 and mask & ~uptodate and file.pages_to_fill(offset, len(data)):
                return False
        if group is None or mask & ~uptodate:
            more = (mask & ~uptodate).bit_count()
            try:
                if self.resident_pages + more > self.capacity_pages:
                    self._make_room(more, {key_of(file.id, index): mask})
                group = self._group(file, index, mask)
            except (NoRoom, Busy):
                return False
        self._copy_in(group, mask, offset, data)
        if mask & ~group.dirty:
            self._make_dirty(group, mask)
        if transient or file.transient:
            file.mark(index, mask, transient)
        if end > file.size:
            file.size = end
        account.write_bytes += len(data)
        return True

    def write_clean(self, file: CachedFile, offset: int, data: memoryview) -> None:
        """Copies what the backing has just been given into pages, which stay or become CLEAN; grows the file.

        Inside one group, of a file with nothing unwritten and no page FILLING. Pages that are neither here nor wholly known
        now stay ABSENT, and all do where there is no room.
        """
        end = offset + len(data)
        for page in file.pages_to_fill(offset, len(data)):  # the first, the last, or both
            start = page << PAGE_SHIFT
            data = data[start + PAGE_SIZE - offset :] if start <= offset else data[: start - offset]
            offset = max(offset, start + PAGE_SIZE) if start <= offset else offset
        if data:
            self._write_clean(file, offset, data)
        file.size = max(file.size, end)

    def _write_clean(self, file: CachedFile, offset: int, data: memoryview) -> None:
        index, first = offset >> GROUP_BITS, offset >> PAGE_SHIFT & IN_GROUP
        mask = span(first, (offset + len(data) - 1) >> PAGE_SHIFT & IN_GROUP)
        try:
            self._make_room(file.absent(index, mask).bit_count(), {key_of(file.id, index): mask})
            group = self._group(file, index, mask)
        except (NoRoom, Busy):
            if (old := file.groups.get(index)) is not None:
                self.remove(old, old.uptodate & mask, "invalidated")
                self.room.unpark_all()
            return
        self._copy_in(group, mask, offset, data)
        group.make_clean(mask)
        file.mark(index, mask, False)

    def _copy_in(self, group: Group, mask: int, offset: int, data: bytes | memoryview) -> None:
        start = group.base + (offset & _BYTE_IN_GROUP)
        stop = start + len(data)
        old = group.uptodate & mask
        if old != mask:
            self._add_written(group, mask, mask & ~old, start, stop)
        if old:
            fresh = group.prefetched & old
            if fresh:
                self.first_use(group, fresh)
            self.policy.touch(group.key, old)
        self._view[start:stop] = data

    def _make_dirty(self, group: Group, mask: int) -> None:
        added = mask & ~group.dirty
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
        group.file.remember_no_more(group.index, new)

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

    def remove(self, group: Group, going: int, reason: str) -> int:
        """CLEAN (or, discarded, DIRTY) pages `going` of a group leave other than by eviction; returns how many."""
        if not going:
            return 0
        self.policy.remove(group.key, going)
        return self._leave(group, going, reason)

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

    # --- groups and counts -----------------------------------------------------------------------------------------

    def _group(self, file: CachedFile, index: int, mask: int) -> Group:
        """The group with room for pages `mask`, which are about to come."""
        group, pages = file.groups.get(index), mask.bit_length()
        if group is None:
            before = file.groups.get(index - 1)
            near = before.base + GROUP_SIZE if before is not None else -1
            there = max(pages, min(file.end_page - (index << GROUP_SHIFT), GROUP_PAGES))
            streamed = before is not None and mask & 1 and before.resident == ALL and there >= WHOLE_PAGES
            whole = bool(streamed) or mask.bit_count() >= WHOLE_PAGES
            group = Group(file, index, *self.arena.allocate(there if index == 0 else GROUP_PAGES, near, whole))
            if group.touched:
                self.arena.leave_holes(group)
            group.born = self.clock()
            file.groups[index] = self._groups[group.key] = group
        elif pages > group.capacity:
            if group.filling or group.writeback:
                raise Busy(group)
            self.arena.move(group)
        return group

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

    def groups(self) -> list[Group]:
        """Every group with resident pages."""
        return list(self._groups.values())

    def check_invariants(self) -> None:
        """Asserts everything this module promises; slow, for tests."""
        check(self)
