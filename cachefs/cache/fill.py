"""The waiting side of the page cache: misses, readahead and writes that need something first.

`PageCache` never waits; this module does, and re-examines the cache after every await, because anything may have
happened meanwhile. Fills are shared: whoever finds a page FILLING waits for that fill and looks again. Whoever starts a
fill for itself runs it in its own task and looks at the result with no await in between, so that it makes progress even
where pages are evicted as fast as they come. Where the backing may hang, even one's own fill runs in another task.
"""

import math
from collections.abc import Callable

import trio

from cachefs.cache import reads
from cachefs.cache.account import Account
from cachefs.cache.file import CachedFile
from cachefs.cache.page import GROUP_PAGES, PAGE_SHIFT, PAGE_SIZE
from cachefs.cache.pagecache import PageCache
from cachefs.cache.readahead import Window
from cachefs.cache.waits import Busy, Fill, NoRoom, TooDirty
from cachefs.cache.wishes import drop_transient
from cachefs.tasks import Spawner
from cachefs.watchdog import Watchdog

TRIES = 4  # looks at the whole request before it is answered in pieces
FILL_PAGES_MIN = 32  # smallest backing call that a readahead window is cut into: 128 KiB
FILLS_PER_WINDOW = 4  # calls in flight that a window is cut into, so that transfer and latency overlap


class Filler:
    """Reads and writes of files through `cache`; readahead runs in `nursery`. `need_room` is called before waiting for room.

    `watchdog` bounds every wait for a backing that it watches. The fills go on, and have their pages until they are done.
    """

    def __init__(
        self, cache: PageCache, nursery: Spawner, need_room: Callable[[], None], watchdog: Watchdog | None = None
    ) -> None:
        self.cache = cache
        self.nursery = nursery
        self.need_room = need_room
        self.watchdog = watchdog or Watchdog(None, math.inf, lambda: None)

    # --- reading -------------------------------------------------------------------------------------------------

    async def read(
        self,
        file: CachedFile,
        offset: int,
        size: int,
        window: Window | None,
        account: Account | None = None,
        transient: bool = False,
    ) -> memoryview | bytes:
        """The bytes [offset, offset + size), cut at the end of the file, after a look-up that found some page missing.

        Counts the request. The view is good until the next await. Raises the OSError of a backing call that failed.
        """
        end = min(offset + size, file.size)
        if offset >= end:
            return b""
        reads.count_request(self.cache, file, offset, end, account)
        if (end - offset) >> PAGE_SHIFT <= self.cache.capacity_pages // 4:
            for _ in range(TRIES):
                await self._fill_once(file, offset, end, window, transient)
                end = min(end, file.size)  # it may have been truncated while we waited
                if offset >= end:
                    return b""
                view = reads.peek(self.cache, file, offset, end)
                if view is not None:
                    return view
                window = None
        return await self._read_in_pieces(file, offset, end, transient)

    async def fetch(self, file: CachedFile, start_page: int, end_page: int) -> None:
        """Brings what is absent of pages [start_page, end_page), as if somebody read them; raises OSError.

        Pages may be gone again, or not have come for want of room.
        """
        for _ in range(TRIES):
            if not file.absent_runs(start_page, min(end_page, file.end_page)):
                return
            await self._fill_once(file, start_page * PAGE_SIZE, min(end_page * PAGE_SIZE, file.size), None)

    async def _fill_once(
        self, file: CachedFile, offset: int, end: int, window: Window | None, transient: bool = False
    ) -> None:
        """Starts what is missing of [offset, end), and the rest of the window, and waits for what was asked for.

        May return early when the state changed while waiting for room; the caller looks again anyway.
        """
        self.watchdog.check()  # before pages that are here make room for some that cannot come
        start_page, end_page = offset >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT
        others = file.fills_of(start_page, end_page)
        mine: Fill | None = None
        for page, count in file.absent_runs(start_page, end_page):
            if mine is not None:
                self._run_soon(mine)
                others.append(mine)
                mine = None
            more = self._more(file, page, count, end_page, window)
            try:
                mine = self.cache.start_fill(file, page, count + more, count, transient)
            except (NoRoom, Busy) as reason:
                await self.wait_for(reason)
                return
        if window is not None:
            self.prefetch(file, window)
        if mine is not None and not self._try_now(mine):
            if self.watchdog.watching:
                others.append(mine)
                self.nursery.start_soon(self._run, mine, False)
            else:
                await self._run(mine, True)
        if others:
            with self.watchdog.patience():
                for fill in others:
                    await fill.done.wait()
        if mine is not None and mine.error is not None:
            raise mine.error

    def _more(self, file: CachedFile, page: int, count: int, end_page: int, window: Window | None) -> int:
        """Pages behind a wanted run that the same backing call can bring for the window, without making it much longer."""
        if window is None or page + count != end_page or count >= FILL_PAGES_MIN:
            return 0
        stop = min(window.start + window.size, page + FILL_PAGES_MIN, (page | GROUP_PAGES - 1) + 1, file.end_page)
        runs = file.absent_runs(end_page, stop) if stop > end_page else []
        return runs[0][1] if runs and runs[0][0] == end_page else 0

    def _run_soon(self, fill: Fill) -> None:
        if not self._try_now(fill):
            self.nursery.start_soon(self._run, fill, False)

    def _try_now(self, fill: Fill) -> bool:
        """Finishes the fill at once if the backing has the bytes at hand; a thread would cost more than the read."""
        try:
            nbytes = fill.group.file.source.read_now([fill.view], fill.offset)
        except OSError:  # BlockingIOError as well: whatever it is, the slow way finds out
            return False
        if nbytes < len(fill.view) and fill.offset + nbytes < fill.group.file.size:
            return False  # short, but not at the end
        self.cache.finish_fill(fill, nbytes)
        return True

    async def _run(self, fill: Fill, demand: bool) -> None:
        """One backing call. Errors of readahead are only noted: the page stays absent and whoever needs it finds out."""
        nbytes = -1
        try:
            with trio.CancelScope(shield=True):  # a thread writes into the pages: they stay FILLING until it is done
                nbytes = await fill.group.file.source.read([fill.view], fill.offset)
        except OSError as error:
            fill.error = error
            if demand:
                raise
        finally:
            self.cache.finish_fill(fill, nbytes)

    async def _read_in_pieces(self, file: CachedFile, offset: int, end: int, transient: bool) -> bytes:
        """For requests that are large for the cache: page by page into a buffer of our own."""
        parts: list[bytes] = []
        while offset < (end := min(end, file.size)):
            stop = min(end, (offset & -PAGE_SIZE) + PAGE_SIZE)
            view = reads.peek(self.cache, file, offset, stop)
            if view is None:
                await self._fill_once(file, offset, stop, None, transient)
                continue
            parts.append(bytes(view))
            if transient:
                drop_transient(self.cache, file)
            offset = stop
        return b"".join(parts)

    # --- readahead -----------------------------------------------------------------------------------------------

    def prefetch(self, file: CachedFile, window: Window) -> None:
        """Starts fills for what is absent of the window, with nobody waiting. Best effort: stops where there is no room."""
        if self.watchdog.lost:
            return
        most = max(FILL_PAGES_MIN, min(GROUP_PAGES, window.size // FILLS_PER_WINDOW))
        end = min(window.start + window.size, file.end_page)
        for page, count in file.absent_runs(window.start, end):
            for at in range(page, page + count, most):
                try:
                    fill = self.cache.start_fill(file, at, min(most, page + count - at), 0, window.transient)
                except (NoRoom, Busy):
                    return
                self._run_soon(fill)

    # --- writing -------------------------------------------------------------------------------------------------

    @property
    def piece_bytes(self) -> int:
        """The most that is written at once, from the start of a page on."""
        return max(1, min(self.cache.capacity_pages // 8, self.cache.dirty_limit_pages // 4)) * PAGE_SIZE

    async def write(
        self,
        file: CachedFile,
        offset: int,
        data: bytes | memoryview,
        dirtied: Callable[[int, int], None],
        account: Account | None = None,
        transient: bool = False,
    ) -> None:
        """Copies `data` into dirty pages; what must be read first is read. Long ones go in pieces.

        `dirtied(offset, bytes)` is called after each piece: while a later one waits for room, writeback has to know of those
        before it.
        """
        most = self.piece_bytes
        view = memoryview(data)
        while view:
            step = await self._write_piece(file, offset, view[: most - offset % PAGE_SIZE], account, transient)
            dirtied(offset, step)
            view, offset = view[step:], offset + step

    async def _write_piece(
        self, file: CachedFile, offset: int, data: memoryview, account: Account | None, transient: bool
    ) -> int:
        """Returns how much of `data` was written: less where both ends need a fill, for one could push out the other."""
        cache = self.cache
        while True:
            partial = file.pages_to_fill(offset, len(data))
            if len(partial) == 2:
                data = data[: partial[1] * PAGE_SIZE - offset]
                continue
            end_page = (offset + len(data) + PAGE_SIZE - 1) >> PAGE_SHIFT
            if fills := file.fills_of(offset >> PAGE_SHIFT, end_page):
                with self.watchdog.patience():
                    await fills[0].done.wait()
            elif partial:
                await self._fill_once(file, partial[0] * PAGE_SIZE, min((partial[0] + 1) * PAGE_SIZE, file.size), None)
            else:
                try:
                    cache.write(file, offset, data, account, transient)
                    return len(data)
                except (NoRoom, Busy) as reason:
                    await self.wait_for(reason)

    async def wait_for(self, reason: NoRoom | Busy) -> None:
        """Until what stood in the way has changed. May wake for nothing: look again."""
        if isinstance(reason, TooDirty) or (isinstance(reason, NoRoom) and not self.cache.filling_pages):
            self.need_room()  # else a fill will end before long, whatever becomes of writeback
        with self.watchdog.patience():
            await self.cache.room.park()  # every end of a fill or a writeback wakes it, and pages that are dropped

