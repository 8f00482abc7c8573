"""Readahead from file to file: who opens the files of a far away directory in order finds the next ones in memory.

`Walk` decides, and is pure: it is told of the opens in one directory, and says which files are next. There are two orders in
which programs go: that of the listing (grep -r, tar, cp -r) and that of the names (what a shell makes of `*`, rsync). Like the
window of a sequential reader, what is fetched ahead grows from open to open. What was fetched and passed by, or never opened, is
waste, and halves the most that is fetched ahead; each use adds one to it.

`Walker` does what is decided: it looks at the files that are next, and has the beginning of each fetched as readahead does it.
Who goes through the directories of a directory in order (find, ls -R) has the next ones listed in the same way, and who has
read one to its last file has the first files of the next ones fetched as well.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from backing.base import Entry
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.readahead import Window
from cachefs.fs import FileSystem
from cachefs.handle import Handle
from cachefs.inode import Inode
from cachefs.tasks import Spawner

OPENS_MIN = 3  # in order, before anything is fetched; two where they begin with the first file
SKIPPED_MAX = 2  # files that may be left out between two opens
DISORDER = 4  # files that an open may lag behind, where several are read side by side
STREAMS_MAX = 4  # readers of one directory that are told apart
FILES_FIRST, FILES_MAX = 4, 32  # fetched ahead at first, and at most
FILES_BEFORE = 16  # fetched before the first open of who goes through one directory after another
FILE_PAGES = 64  # of each: small files whole, of others what readahead would not have asked for before the second read
UNDER_WAY_MAX = 64  # files and directories side by side
WALKS_MAX = 128  # directories
NAMES_MAX = 20_000  # of one directory: to put them in order takes 20 ms


Bring = Callable[[Inode, bytes], Awaitable[None]]  # (directory, name)


class Stream:
    """One reader who goes through the files in order."""

    __slots__ = ("opens", "pending", "position", "stop")

    def __init__(self, position: int) -> None:
        self.position = position  # behind the furthest file opened
        self.stop = position  # behind the last one fetched
        self.opens = 1 + (position == 1)
        self.pending: dict[int, None] = {}  # fetched and not opened yet

    def takes(self, at: int) -> bool:
        return -DISORDER <= at - self.position <= SKIPPED_MAX

    def passed(self) -> int:
        """Forgets what was fetched and will not be opened any more; returns how much that is."""
        gone = [at for at in self.pending if at < self.position - DISORDER]
        for at in gone:
            del self.pending[at]
        return len(gone)


class Order:
    """The files of a directory in one order, and those who go through them in it."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.names = names
        self.streams: list[Stream] = []  # the one used last first
        self._places = {name: at for at, name in enumerate(names)}
        self.used = self.wasted = 0

    def opened(self, name: bytes, most: int, wanted: Callable[[bytes], bool]) -> Sequence[bytes]:
        """Which files to fetch now: those `wanted` of the next `most`."""
        at = self._places.get(name)
        if at is None:
            return ()
        for stream in self.streams:
            if at in stream.pending:
                del stream.pending[at]
                self.used += 1
        stream = self._stream_at(at)
        if at >= stream.position:
            stream.position = at + 1
            stream.opens += 1
            self.wasted += stream.passed()
        return self._next(stream, most, wanted) if stream.opens >= OPENS_MIN else ()

    def begin(self, most: int, wanted: Callable[[bytes], bool]) -> Sequence[bytes]:
        """The same before the first open, unless there was one."""
        if self.streams:
            return ()
        self.streams = [Stream(0)]
        self.streams[0].opens = OPENS_MIN
        return self._next(self.streams[0], most, wanted, most)

    def _stream_at(self, at: int) -> Stream:
        stream = next((stream for stream in self.streams if stream.takes(at)), None)
        if stream is None:
            stream = Stream(at + 1)
        others = [other for other in self.streams if other is not stream]
        self.streams, dropped = [stream, *others[: STREAMS_MAX - 1]], others[STREAMS_MAX - 1 :]
        self.wasted += sum(len(other.pending) for other in dropped)
        return stream

    def _next(self, stream: Stream, most: int, wanted: Callable[[bytes], bool], least: int = 0) -> Sequence[bytes]:
        ahead = min(max(FILES_FIRST << min(stream.opens - OPENS_MIN, 10), least), most)
        start = max(stream.stop, stream.position)
        stop = min(stream.position + ahead, len(self.names))
        if start >= stop:
            return ()
        stream.stop = stop
        places = [at for at in range(start, stop) if wanted(self.names[at])]
        stream.pending.update(dict.fromkeys(places))
        return [self.names[at] for at in places]


class Walk:
    """How programs go through the files of one directory."""

    def __init__(self, names: Iterable[bytes]) -> None:
        listed = list(names)
        by_name = sorted(listed)
        self.orders = [Order(listed)] if listed == by_name else [Order(listed), Order(by_name)]

    def opened(self, name: bytes, most: int, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """A file was opened; which are to be fetched now: those `wanted` of the next `most`."""
        return list(dict.fromkeys(following for order in self.orders for following in order.opened(name, most, wanted)))

    def begin(self, most: int, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """What to fetch before the first file is opened, of who is expected to go through all of them as they are listed."""
        return list(self.orders[0].begin(most, wanted))

    def is_through(self) -> bool:
        """Whether somebody has gone on to the last file."""
        return any(stream.position == len(order.names) for order in self.orders for stream in order.streams[:1])

    def account(self) -> tuple[int, int]:
        """(fetched files that were opened, fetched files that were passed by) since the last time."""
        used, wasted = sum(order.used for order in self.orders), sum(order.wasted for order in self.orders)
        for order in self.orders:
            order.used = order.wasted = 0
        return used, wasted

    def end(self) -> int:
        """How many fetched files nobody has opened."""
        return sum(len(stream.pending) for order in self.orders for stream in order.streams)


class Walker:
    """Fetches what is next. Best effort: what goes wrong with a file is found out by who reads it."""

    def __init__(self, fs: FileSystem, tasks: Spawner) -> None:
        self.fs = fs
        self.files = fs.files
        self.tasks = tasks
        self.most = FILES_MAX  # files ahead: less after waste
        self.fetched = self.used = self.wasted = 0  # files
        self._under_way = 0
        self._files_opened = False  # since the last directory was opened
        self._goes_through = False  # somebody opens all files of one directory after another
        # {(directory, whether it is about those in it): its listing, and who goes through its files or directories}
        self._walks: dict[tuple[Inode, bool], tuple[Sequence[Entry], Walk]] = {}
        self.files.handed = self.handed
        self.fs.directories.entered = self.opened

    def handed(self, handle: Handle) -> None:
        """Called at every open of a file. Who reads here and there, or only once, has nothing fetched."""
        if handle.readahead.most_pages and not handle.readahead.transient:
            self.opened(handle.inode)

    def opened(self, inode: Inode) -> None:
        """A file was opened, or a directory."""
        most = self._most_files()
        if not most or not inode.names:
            return
        if inode.is_dir:
            self._goes_through, self._files_opened = self._goes_through and self._files_opened, False
        directory, name = next(reversed(inode.names))
        walk = self._walk(directory, inode.is_dir)
        if walk is None:
            return
        wanted, bring = (self._is_unlisted, self._list) if inode.is_dir else (self._is_wanted, self._fetch)
        following = walk.opened(name, most, lambda name: wanted(directory, name))
        self._learn(*walk.account())
        if not inode.is_dir:
            self._files_opened, self._goes_through = True, self._goes_through or walk.is_through()
        self._bring_soon(bring, directory, following)

    def _most_files(self) -> int:
        return min(self.most, self.files.readahead_max_pages // FILE_PAGES)

    def _bring_soon(self, bring: Bring, directory: Inode, names: Iterable[bytes]) -> None:
        for name in names:
            if self._under_way < UNDER_WAY_MAX:
                self._under_way += 1
                self.tasks.start_soon(self._bring, bring, directory, name)

    def _walk(self, directory: Inode, of_directories: bool) -> Walk | None:
        """As long as the directory has the same names it is the same one, also while its listing has to be read anew."""
        key = directory, of_directories
        entries, before = self.fs.listings.last(directory), self._walks.pop(key, None)
        if before is not None and (entries is None or entries is before[0] or entries == before[0]):
            self._walks[key] = before[0] if entries is None else entries, before[1]
            return before[1]
        if before is not None:
            self._learn(0, before[1].end())
        if entries is None or len(entries) > NAMES_MAX:
            return None
        walk = Walk(entry.name for entry in entries if self._may_be(directory, entry.name, of_directories))
        self._walks[key] = entries, walk
        if len(self._walks) > WALKS_MAX:
            _, oldest = self._walks.pop(next(iter(self._walks)))
            self._learn(0, oldest.end())
        return walk

    def _may_be(self, directory: Inode, name: bytes, a_directory: bool) -> bool:
        inode = self.fs.table.named(directory, name)
        return inode is None or (inode.is_dir if a_directory else inode.is_regular)

    def _is_wanted(self, directory: Inode, name: bytes) -> bool:
        """Whether who opens the file would have to ask for anything. One that was never looked at is left alone."""
        inode = self.fs.table.named(directory, name)
        if inode is None or not inode.is_regular or inode.unwritten or self.fs.io.watchdog.silent:
            return False
        if inode.advice not in ("", "sequential"):
            return False
        return not self.files.attributes.believed(inode) or self._absent(inode)

    def _is_unlisted(self, directory: Inode, name: bytes) -> bool:
        inode = self.fs.table.named(directory, name)
        if inode is None or not inode.is_dir or self.fs.io.watchdog.silent:
            return False
        return self._goes_through or self.fs.listings.entries(inode) is None

    def _absent(self, inode: Inode) -> bool:
        end_page = _pages(inode)
        return bool(end_page) and (inode.file is None or bool(inode.file.absent_runs(0, end_page)))

    def _learn(self, used: int, wasted: int) -> None:
        self.used += used
        self.wasted += wasted
        if wasted:
            self._goes_through = False
            self.most = max(1, self.most // 2)
        elif used:
            self.most = min(FILES_MAX, self.most + used)

    async def _bring(self, bring: Bring, directory: Inode, name: bytes) -> None:
        try:
            await bring(directory, name)
        except OSError:
            return
        finally:
            self._under_way -= 1

    async def _list(self, directory: Inode, name: bytes) -> None:
        inode = self.fs.table.named(directory, name)
        if inode is None or not inode.is_dir:
            return
        entries = await self.fs.directories.listed(inode)
        if self._goes_through:
            await self._begin(inode, [entry.name for entry in entries[: min(FILES_BEFORE, self._most_files())]])
        self.fs.drop(inode)

    async def _begin(self, directory: Inode, names: Sequence[bytes]) -> None:
        """Fetches the first files of a directory that nobody has opened yet: of all directories ahead no more than a window."""
        found: dict[bytes, Inode] = {}

        async def look(name: bytes) -> None:
            with contextlib.suppress(OSError):
                found[name] = await self.fs.find(directory, name)

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(look, name)
        left_pages, few = self.files.readahead_max_pages // FILES_MAX, set[bytes]()
        for name in names:
            left_pages -= _pages(found[name]) if name in found else 0
            if left_pages >= 0 and self._is_wanted(directory, name):
                few.add(name)
        walk = self._walk(directory, False)
        if walk is not None:
            self._bring_soon(self._fetch, directory, walk.begin(len(few), few.__contains__))
        for inode in found.values():
            self.fs.drop(inode)

    async def _fetch(self, directory: Inode, name: bytes) -> None:
        """The attributes first, unless they are believed: who opens the file then need not ask."""
        inode = self.fs.table.named(directory, name)
        if inode is None or not self.files.attributes.believed(inode):
            inode = await self.fs.find(directory, name)
        if inode.is_regular and self._absent(inode):
            self.fetched += 1
            await self._fill(inode)
        self.fs.drop(inode)

    async def _fill(self, inode: Inode) -> None:
        file = self.files.ensure_file(inode)
        inode.busy += 1  # all of it through one descriptor
        try:
            await self.files.data.reader(inode)
            self.files.filler.prefetch(file, Window(0, FILE_PAGES))
            for fill in file.fills_of(0, FILE_PAGES):
                await fill.done.wait()
        finally:
            inode.busy -= 1
            self.files.data.settle(inode)


def _pages(inode: Inode) -> int:
    """How many of a file are fetched ahead."""
    return min(FILE_PAGES, -(-inode.st.st_size // PAGE_SIZE))
