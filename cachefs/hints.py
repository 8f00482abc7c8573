"""What programs say about files: by rules when they open them, and through extended attributes that exist on the mount alone.

    user.cachefs.advice    sequential | random | noreuse, of all readers of the file until it is taken away; willneed and
                           dontneed, which are done at once and not kept
    user.cachefs.pin       1, while the file is pinned
    user.cachefs.resident  bytes of the file that are in memory; read only

They are not stored in the backing and not listed, or copies made with all attributes would carry them along.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence

from cachefs.cache import wishes
from cachefs.errors import CachefsError
from cachefs.files import Files
from cachefs.handle import Handle
from cachefs.inode import Inode
from cachefs.names import paths_of
from cachefs.pins import Pins
from cachefs.rules import DONTNEED, LASTING, NOREUSE, RANDOM, SEQUENTIAL, WILLNEED, Rule, advice_of
from cachefs.tasks import Spawner
from cachefs.warm import Warming, budget_pages
from cachefs.xattrs import HINTS

ADVICE, PIN, RESIDENT = HINTS + b"advice", HINTS + b"pin", HINTS + b"resident"
ADVISED_MAX = 4096  # files that keep an advice: each keeps its inode known
NOREUSE_PART = 4  # of the largest window: what is read once shall not take much room meanwhile


class Hints:
    """Applies rules to new handles, and answers for the attributes. `dropped(inode)` is told of files dropped on request."""

    def __init__(
        self, files: Files, pins: Pins, rules: Sequence[Rule], tasks: Spawner, dropped: Callable[[Inode], None]
    ) -> None:
        self.files = files
        self.cache = files.cache
        self.pins = pins
        self.rules = rules
        self.tasks = tasks
        self.dropped = dropped
        self._advised: set[Inode] = set()

    # --- handles -------------------------------------------------------------------------------------------------------

    def opened(self, handle: Handle, program: str) -> None:
        """A handle is new: a rule for it goes before what was said of the file."""
        if not self.rules and not handle.inode.advice:
            return
        advice = advice_of(self.rules, program, handle.uid, lambda: map(os.fsdecode, self._paths(handle.inode)))
        if advice == WILLNEED:
            self._bring_soon(handle.inode)
        self._apply(handle, advice if advice in LASTING else handle.inode.advice)

    def _paths(self, inode: Inode) -> list[bytes]:
        return paths_of(inode, self.files.descriptors.table, {})

    def _apply(self, handle: Handle, advice: str) -> None:
        most, readahead = self.files.readahead_max_pages, handle.readahead
        readahead.transient = advice == NOREUSE
        readahead.least_pages = most if advice == SEQUENTIAL else 0
        readahead.most_pages = {RANDOM: 0, NOREUSE: max(1, most // NOREUSE_PART)}.get(advice, sys.maxsize)

    def _bring_soon(self, inode: Inode) -> None:
        self.tasks.start_soon(self._bring, inode)

    async def _bring(self, inode: Inode) -> None:
        inode.kept += 1
        try:
            await Warming(self.files, budget_pages(self.files)).file(inode)
        except OSError:
            return  # best effort, like readahead
        finally:
            inode.kept -= 1
            self.pins.fs.drop(inode)

    # --- attributes ----------------------------------------------------------------------------------------------------

    def get(self, inode: Inode, name: bytes) -> bytes:
        if inode.is_regular:
            if name == RESIDENT:
                return b"%d" % (inode.file.cached_bytes if inode.file is not None else 0)
            if name == PIN and self.pins.of(inode):
                return b"1"
            if name == ADVICE and inode.advice:
                return inode.advice.encode()
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    async def set(self, inode: Inode, name: bytes, value: bytes) -> None:
        if not inode.is_regular or name not in (ADVICE, PIN):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if name == ADVICE:
            self._advise(inode, value.decode(errors="replace"))
        elif value == b"1":
            await self._pin(inode)
        elif value == b"0":
            await self.pins.remove(self.pins.of(inode))
        else:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    async def remove(self, inode: Inode, name: bytes) -> None:
        self.get(inode, name)  # ENODATA if there is none
        if name == RESIDENT:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if name == PIN:
            await self.pins.remove(self.pins.of(inode))
        else:
            self._advise(inode, "")

    def _advise(self, inode: Inode, advice: str) -> None:
        if advice == WILLNEED:
            return self._bring_soon(inode)
        if advice == DONTNEED:
            if inode.file is not None:
                wishes.drop(self.cache, inode.file)
                self.dropped(inode)
            return
        if advice and advice not in LASTING:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._keep_advice(inode, advice)
        for handle in self.files.handles.values():
            if handle.inode is inode:
                self._apply(handle, advice)

    def _keep_advice(self, inode: Inode, advice: str) -> None:
        self._advised = {other for other in self._advised if not other.unlinked}
        if advice and inode not in self._advised:
            if len(self._advised) >= ADVISED_MAX:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._advised.add(inode)
            inode.kept += 1
        elif not advice and inode in self._advised:
            self._advised.remove(inode)
            inode.kept -= 1
        inode.advice = advice

    async def _pin(self, inode: Inode) -> None:
        paths = self._paths(inode)
        if not paths:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            await self.pins.add([(paths[0], inode.attributes().size)])
        except CachefsError:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
