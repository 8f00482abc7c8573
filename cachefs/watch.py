"""Changes that others make in SOURCE, told at once by inotify: only where SOURCE is local, and beside --metadata-ttl.

The directories of files that are open or cached are watched, for what could make that wrong: contents that were written,
names that went or were replaced. A name that appears takes nothing from what we or the kernel know, so it is not asked for.
An event only says where to look. Our own changes cause events too: what is found is as we know it, and nothing happens.
"""

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable

import inotify_simple  # type: ignore[import-untyped]
import trio
from inotify_simple import flags

from cachefs.descriptors import Descriptors
from cachefs.files import Files
from cachefs.inode import Inode

log = logging.getLogger(__name__)

Place = tuple[Inode, bytes]  # a directory, and a name in it
MODIFY, OVERFLOW, IGNORED = int(flags.MODIFY), int(flags.Q_OVERFLOW), int(flags.IGNORED)
MASK = MODIFY | int(flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO | flags.ONLYDIR | flags.EXCL_UNLINK)
TOLD_AFTER_SECONDS = 0.02  # events are gathered so long: a burst costs one look at each file
WATCH_AFTER_SECONDS = 0.1  # files opened meanwhile are dealt with together; many are gone again by then
TIDY_WATCHES = 10  # at how many watches to look at a time: are they needed?
READ_BYTES = 64 << 10  # events of one turn, ~2000
STEP_INODES, STEP_PAUSE_SECONDS = 64, 0.005  # when everything is looked at: ~1 ms, then others have their turn
WATCHES_MAX = 4096  # ~1 KiB of the kernel's memory each
SHARE = 8  # of the watches that a user may have, we take one in so many at most
MAX_USER_WATCHES = "/proc/sys/fs/inotify/max_user_watches"


class Watch:
    """One directory that is watched, and the files that it is watched for."""

    __slots__ = ("files", "number", "prune_at")

    def __init__(self, number: int) -> None:
        self.number = number
        self.files: dict[Inode, None] = {}
        self.prune_at = 64

    def add(self, inode: Inode) -> None:
        self.files[inode] = None
        if len(self.files) > self.prune_at:
            self.files = {file: None for file in self.files if is_needed(file)}
            self.prune_at = 2 * len(self.files) + 64

    @property
    def needed(self) -> bool:
        while self.files:
            inode, _ = self.files.popitem()
            if is_needed(inode):
                self.files[inode] = None
                return True
        return False


def is_needed(inode: Inode) -> bool:
    """Whether anything of the file's contents is known here that could become wrong."""
    return inode.file is not None and bool(inode.opens or inode.file.resident_pages)


def watches_max() -> int:
    try:
        with open(MAX_USER_WATCHES, encoding="ascii") as file:
            return min(WATCHES_MAX, int(file.read()) // SHARE)
    except (OSError, ValueError):
        return WATCHES_MAX


class Watcher:
    """Owns the watches. `gone(parent, name)` is called when a name does not mean any more what was found under it."""

    def __init__(self, descriptors: Descriptors, files: Files, gone: Callable[[Inode, bytes], None]) -> None:
        self.descriptors = descriptors
        self.table = descriptors.table
        self.backing = files.io.backing
        self.files = files
        self.gone = gone
        self.most = watches_max()
        self.watches: dict[Inode, Watch] = {}  # {directory: its watch}, that which was needed longest ago first
        self._directories: dict[int, Inode] = {}  # {number of a watch: directory}
        self._opened: dict[Inode, None] = {}  # files to be watched
        self._woken = trio.Event()  # there is one
        self._later: dict[Place, None] = {}  # what to look at when a change of ours is done
        self._inotify: inotify_simple.INotify | None = None
        files.opened = self.opened

    async def run(self) -> None:
        """Watches until cancelled. Where there is no inotify, the log says so and --metadata-ttl has to do."""
        self.files.opened = self.opened
        try:
            # In a thread: it looks for the C library with the help of other programs.
            inotify = await trio.to_thread.run_sync(functools.partial(inotify_simple.INotify, nonblocking=True))
        except OSError as error:
            self._fall_back("no inotify", error)
            self._forget()
            await trio.sleep_forever()
        self._inotify = inotify
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tend)
                nursery.start_soon(self._listen)
        finally:
            inotify.close()
            self._forget()

    def _forget(self) -> None:
        self.files.opened = lambda inode: None
        for collection in (self.watches, self._directories, self._opened, self._later):
            collection.clear()

    def opened(self, inode: Inode) -> None:
        """The file's directories are to be watched; called at every open, so it only takes a note."""
        if not self._opened:
            self._woken.set()
        self._opened[inode] = None

    def _fall_back(self, what: str, error: OSError) -> None:
        log.warning("%s (%s): changes that others make in SOURCE are noticed after --metadata-ttl", what, error.strerror)

    # --- watching ------------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            await self._woken.wait()
            await trio.sleep(WATCH_AFTER_SECONDS)
            opened, self._opened, self._woken = self._opened, {}, trio.Event()
            for i, inode in enumerate(opened):
                if i % STEP_INODES == 0:
                    await trio.lowlevel.checkpoint()
                if is_needed(inode):
                    await self._watch_for(inode)
            self._drop_one()

    def tidy(self) -> None:
        """To be called every second or so while programs use the mount: some watches may not be needed any more."""
        for _ in range(min(TIDY_WATCHES, len(self.watches))):
            self._drop_one()

    async def _watch_for(self, inode: Inode) -> None:
        for parent, name in list(inode.names):
            watch = self.watches.pop(parent, None)
            new = watch is None
            if watch is None:
                watch = await self._add(parent)
            if watch is not None:
                self.watches[parent] = watch
                watch.add(inode)
                if new:  # nobody has told us what happened until now
                    await self._look_at((parent, name))

    async def _add(self, directory: Inode) -> Watch | None:
        if len(self.watches) >= self.most > 0:
            self._drop(next(iter(self.watches)))
        if not self.most:
            return None
        try:
            number = await self.descriptors.at("watch", directory, self._add_at)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # others have taken what there was: we go on with those we have
                self.most = len(self.watches)
                self._fall_back("no inotify watches left", error)
            return None
        self._directories[number] = directory
        return Watch(number)

    def _add_at(self, dirfd: int) -> int:
        assert self._inotify is not None
        path = self.backing.watch_path(dirfd)
        if path is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        number: int = self._inotify.add_watch(path, MASK)
        return number

    def _drop(self, directory: Inode) -> None:
        watch = self.watches.pop(directory)
        if self._directories.pop(watch.number, None) is not None and self._inotify is not None:
            with contextlib.suppress(OSError):  # the directory is gone, and its watch with it
                self._inotify.rm_watch(watch.number)

    def _drop_one(self) -> None:
        """Looks whether the watch that was needed longest ago is needed still."""
        directory = next(iter(self.watches), None)
        if directory is not None:
            watch = self.watches[directory]
            if watch.needed:
                self.watches[directory] = self.watches.pop(directory)
            else:
                self._drop(directory)

    # --- events --------------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        assert self._inotify is not None
        while True:
            with trio.move_on_after(TOLD_AFTER_SECONDS if self._later else float("inf")):
                await trio.lowlevel.wait_readable(self._inotify.fileno())
            await trio.sleep(TOLD_AFTER_SECONDS)
            await self._take(self._events())

    def _events(self) -> list[inotify_simple.Event]:
        assert self._inotify is not None
        try:
            return inotify_simple.parse_events(os.read(self._inotify.fileno(), READ_BYTES))  # type: ignore[no-any-return]
        except BlockingIOError:
            return []

    async def _take(self, events: list[inotify_simple.Event]) -> None:
        """Looks once at each place that events are about."""
        places, self._later = self._later, {}
        overflow = False
        for number, mask, _, name in events:
            directory = self._directories.get(number)
            if mask & OVERFLOW:
                overflow = True
            elif directory is not None and mask & IGNORED:
                del self._directories[number]
                self.watches.pop(directory, None)
            elif directory is not None:
                places[directory, os.fsencode(name)] = None
        for i, place in enumerate(places):
            if i % STEP_INODES == STEP_INODES - 1:
                await trio.lowlevel.checkpoint()
            await self._look_at(place)
        if overflow:
            await self._look_at_everything()

    async def _look_at(self, place: Place) -> None:
        """Whether a name means the file that we know under it, and whether that has the contents that we know."""
        inode = self.table.named(*place)
        if inode is None:
            return
        if inode.locked:  # it may be a change of ours, which is not done yet
            self._later[place] = None
            return
        directory, name = place
        try:
            st = await self.descriptors.at("lookup", directory, self.backing.stat, name)
        except OSError:  # most likely it is gone; whoever wants it will be told what there is
            st = None
        if st is None or (st.st_dev, st.st_ino) != inode.key:
            self.gone(directory, name)
        elif is_needed(inode):
            self.files.attributes.absorb(inode, st)

    async def _look_at_everything(self) -> None:
        """Events were lost."""
        log.info("inotify events were lost: looking at everything again")
        for i, inode in enumerate(list(self.table)):
            if i % STEP_INODES == 0:
                await trio.sleep(STEP_PAUSE_SECONDS)
            for place in list(inode.names):
                await self._look_at(place)
