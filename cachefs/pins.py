"""Files that stay in memory. A pin names a path: whatever file is there, now or later, is read and kept.

The paths lie in the state directory, so that pins outlive the mount. One task looks at all of them every `LOOK_SECONDS`, and
at once when it is told to: it finds the file that a path leads to now, pins it, and reads what of it is not in memory, because
it is new, has changed, or could not be read before. Pins together take at most the cache's pin limit: a file that has no room
is looked at again each time, in the order in which pins were made.
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from cachefs.cache import wishes
from cachefs.cache.file import CachedFile
from cachefs.cache.page import PAGE_SIZE
from cachefs.errors import CachefsError
from cachefs.fs import FileSystem
from cachefs.inode import Inode
from cachefs.names import paths_of
from cachefs.units import format_size
from cachefs.warm import Warming, pages_of

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
LOOK_SHARE = 20  # a look at all pins takes at most one part in so many of the time
_FORMAT = 1


@dataclass
class Pin:
    """One pinned path. `state`: "" = in memory, else why it is not (yet)."""

    path: bytes
    inode: Inode | None = None  # the file it led to when last looked at, which is pinned
    size: int = 0
    state: str = "waiting"


class Pins:
    """All pins of a mount; `store` is the file that keeps them (None: nothing does)."""

    def __init__(self, fs: FileSystem, store: str | None) -> None:
        self.fs = fs
        self.cache = fs.files.cache
        self.store = store
        self.pins: dict[bytes, Pin] = {}
        self.looked = trio.lowlevel.ParkingLot()  # those who wait for the next look at all of them to end
        self._held: Counter[Inode] = Counter()  # {pinned inode: pins that lead to it}
        self._wake = trio.Event()
        self._version = self._stored_version = 0  # of the set of pins
        self._storing = trio.Lock()

    @property
    def limit_bytes(self) -> int:
        return self.cache.pin_limit_pages * PAGE_SIZE

    # --- making and removing -------------------------------------------------------------------------------------------

    async def add(self, files: Iterable[tuple[bytes, int]]) -> None:
        """Pins files (path, size), all or none; CachefsError beyond the limit or where it cannot be stored."""
        new = {path: Pin(path, size=size) for path, size in files if path not in self.pins}
        asked = sum(pages_of(pin.size) for pin in (*self.pins.values(), *new.values())) * PAGE_SIZE
        if new and asked > self.limit_bytes:
            limit = format_size(self.limit_bytes)
            raise CachefsError(f"pins would take {format_size(asked)}, more than --pin-limit {limit}: nothing was pinned")
        self.pins |= new
        try:
            await self._save()
        except BaseException:
            for path in new:
                self._forget(path)
            raise
        self.kick()

    async def remove(self, paths: Iterable[bytes]) -> int:
        """Takes pins away from these paths and what is below them; returns how many there were."""
        wanted = tuple(paths)
        gone = [path for path in self.pins if is_at_or_below(path, wanted)]
        for path in gone:
            self._forget(path)
        self.kick()  # others may have room now
        await self._save()
        return len(gone)

    def of(self, inode: Inode) -> list[bytes]:
        """The names of a file that are pinned."""
        return [path for path in paths_of(inode, self.fs.table, {}) if path in self.pins]

    def _forget(self, path: bytes) -> None:
        pin = self.pins.pop(path, None)
        if pin is not None:
            self._let_go(pin)

    def kick(self) -> None:
        """Something has changed: all are looked at soon."""
        self._wake.set()

    # --- keeping -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks at all pins now and then until cancelled."""
        while True:
            self._wake, start = trio.Event(), trio.current_time()
            room = self.cache.pin_limit_pages
            for pin in list(self.pins.values()):
                room -= await self._look(pin, room)
                await trio.lowlevel.checkpoint()  # a local store answers without one
            self.looked.unpark_all()
            pause_seconds = max(LOOK_SECONDS, LOOK_SHARE * (trio.current_time() - start)) if self.pins else math.inf
            with trio.move_on_after(pause_seconds):
                await self._wake.wait()

    async def _look(self, pin: Pin, room_pages: int) -> int:
        """Pins the file that is at the path now, and reads what is missing; returns the pages it may take."""
        try:
            async with self.fs.at_path(pin.path) as inode:
                if self.pins.get(pin.path) is not pin:
                    return 0
                if not inode.is_regular:
                    raise CachefsError("not a regular file")
                pin.size = inode.attributes().size
                pages = pages_of(pin.size)
                if pages > room_pages:
                    raise CachefsError("over --pin-limit")
                file = self._hold(pin, inode)
                if file.resident_pages < pages:
                    await Warming(self.fs.files, pages).file(inode)
                self._set_state(pin, "")
                return pages
        except FileNotFoundError:
            self._set_state(pin, "no such file")
            self._let_go(pin)
        except CachefsError as error:
            self._set_state(pin, str(error))
            self._let_go(pin)
        except OSError as error:  # out of reach for now: what is in memory stays
            self._set_state(pin, error.strerror or str(error))
            return pages_of(pin.size)
        return 0

    def _set_state(self, pin: Pin, state: str) -> None:
        if state and state != pin.state:
            log.info("pinned %s is not in memory: %s", os.fsdecode(pin.path), state)
        pin.state = state

    def _hold(self, pin: Pin, inode: Inode) -> CachedFile:
        file = self.fs.files.ensure_file(inode)
        if pin.inode is not inode:
            self._let_go(pin)
            pin.inode = inode
            inode.kept += 1
            self._held[inode] += 1
            wishes.pin(self.cache, file, True)
        return file

    def _let_go(self, pin: Pin) -> None:
        inode, pin.inode = pin.inode, None
        if inode is None:
            return
        inode.kept -= 1
        self._held[inode] -= 1
        if not self._held[inode]:
            del self._held[inode]
            wishes.pin(self.cache, self.fs.files.ensure_file(inode), False)
        self.fs.drop(inode)

    # --- outliving the mount -------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Takes up the pins of the mount before; a file that makes no sense is put aside."""
        if self.store is None:
            return
        try:
            with open(self.store, encoding="ascii") as file:
                kept = json.load(file)
            if kept["version"] != _FORMAT:
                raise ValueError(f"version {kept['version']}")
            paths = [os.fsencode(path) for path in kept["paths"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("the pins in %s cannot be read (%s): there are none now", self.store, error)
            return
        self.pins = {path: Pin(path) for path in paths}

    async def _save(self) -> None:
        """Stores all pins as they are when their turn comes; who finds that somebody did so meanwhile has nothing to do."""
        self._version += 1
        mine = self._version
        async with self._storing:
            if self.store is None or mine <= self._stored_version:
                return
            version = self._version
            text = json.dumps({"version": _FORMAT, "paths": [os.fsdecode(path) for path in self.pins]})
            try:
                await trio.to_thread.run_sync(_store, self.store, text)
            except OSError as error:
                raise CachefsError(f"pins cannot be stored in {self.store}: {error.strerror}") from None
            self._stored_version = version


def _store(path: str, text: str) -> None:
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.rename(path + ".new", path)


def is_at_or_below(path: bytes, tops: Iterable[bytes]) -> bool:
    """Whether a path is one of `tops` or lies below one; b"" is above all."""
    return any(not top or path == top or path.startswith(top + b"/") for top in tops)
