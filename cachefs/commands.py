"""What the daemon does for `cachefs status`, `sync`, `discard` and `umount`: the handlers behind the control socket."""

import contextlib
import dataclasses
import errno
import logging
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING

import trio

from cachefs import __version__
from cachefs.cache.page import PAGE_SIZE
from cachefs.controlserver import Handler, Send
from cachefs.errors import CachefsError
from cachefs.inode import Inode
from cachefs.ledger import ENTRIES_AT_ONCE

if TYPE_CHECKING:
    from cachefs.mount import Mount

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.1
DISCARD_SECONDS = 5.0  # for a batch that is on its way: what a thread is writing cannot be taken back


class Commands:
    """The handlers of one mount. `pending` umount commands wait for its end; `answered` is told of each that is done.

    A `path` in a request is relative to the mountpoint, "" = all of it. Lists come in parts, as messages with some of the
    entries under "unwritten" each, in the form of `cachefs.entries`.
    """

    def __init__(self, mount: "Mount") -> None:
        self.mount = mount
        self.stack = mount.stack
        self.ledger = mount.stack.ledger
        self.pending = 0
        self.answered = trio.lowlevel.ParkingLot()

    def handlers(self) -> dict[str, Handler]:
        return {
            "status": self._status,
            "dirty": self._dirty,
            "sync": self._sync,
            "discard": self._discard,
            "umount": self._umount,
        }

    async def _status(self, request: Mapping[str, object], send: Send) -> None:
        await send(
            {
                "done": True,
                "pid": os.getpid(),
                "version": __version__,
                "source": self.mount.config.source,
                "mountpoint": self.mount.config.mountpoint,
                "metrics": self.mount.metrics_url,
                "page": self.mount.page_url,
                "statistics": dataclasses.asdict(self.mount.statistics()),
            }
        )

    async def _dirty(self, request: Mapping[str, object], send: Send) -> None:
        """Lists what is not on the backing of a path; asks nothing of the backing."""
        rest = await send_parts(send, self.ledger.parts(path=path_of(request)))
        kept = self.mount.kept or f"in the memory of process {os.getpid()} until that ends"
        await send({"done": True, "unwritten": rest, "kept": kept})

    async def _sync(self, request: Mapping[str, object], send: Send) -> None:
        """Writes out what is at or below a path and has the backing make it durable; lists what could not be."""
        path = path_of(request)
        problem: OSError | None = None
        failed: list[Inode] = []
        undurable: list[Inode] = []
        try:
            async with self.ledger.selecting(path) as (inodes, tree), self._progress_to(send, inodes if path else None):
                try:
                    failed, undurable = await self.stack.io.ask(self.ledger.sync, inodes, tree)
                except OSError as error:
                    problem = error
        except OSError as error:
            raise CachefsError(f"{self._shown(path)}: {error.strerror}") from None
        if problem is not None:
            raise CachefsError(f"{self.mount.config.source} can't be made durable: {problem.strerror}")
        rest = await send_parts(send, self.ledger.parts(failed))
        names = [{"path": self.stack.path(inode), "error": errno.errorcode.get(inode.error_errno)} for inode in undurable]
        await send({"done": True, "unwritten": rest} | ({"undurable": names} if names else {}))

    async def _discard(self, request: Mapping[str, object], send: Send) -> None:
        """Gives up what cannot be written of the file of this name; without "sure", tells what that would be."""
        path = path_of(request)
        inodes = self.ledger.find_unwritten(path)
        failing = [inode for inode in inodes if inode.tries]
        if not inodes:
            raise CachefsError(f"{self._shown(path)} has no unwritten data")
        if not failing:
            raise CachefsError(f"{self._shown(path)} has unwritten data, but nothing failed: cachefs sync writes it")
        if not request.get("sure"):
            await send({"done": True, "unwritten": await send_parts(send, self.ledger.parts(failing))})
            return
        given_up_bytes = 0
        for inode in failing:
            with trio.move_on_after(DISCARD_SECONDS) as patience:
                nbytes = await self.stack.files.durability.discard_unwritten(inode)
            if patience.cancelled_caught:
                raise CachefsError(f"{self._shown(path)} is being written at this moment: try again when SOURCE answers")
            log.warning("discarded on request: %d unwritten bytes of %s", nbytes, self._shown(path))
            await self.mount.invalidate(inode.node)
            given_up_bytes += nbytes
        await send({"done": True, "discarded_bytes": given_up_bytes})

    async def _umount(self, request: Mapping[str, object], send: Send) -> None:
        """Writes out, unmounts, and answers when all is done."""
        self.pending += 1
        try:
            async with self._progress_to(send):
                await self.stack.write_out()
                try:
                    await self.mount.unmount(lazy=False)
                except OSError as error:
                    advice = "; close what is open there" if error.errno == errno.EBUSY else ""
                    await send({"error": f"{self.mount.config.mountpoint}: {error.strerror}{advice}", "done": True})
                    return
                self.mount.mark_stopping()
                await self.mount.finished.wait()
            failed, most = self.mount.failed, ENTRIES_AT_ONCE
            rest = await send_parts(send, (failed[start : start + most] for start in range(0, len(failed), most)))
            await send({"done": True, "unwritten": rest, "kept": self.mount.kept_at_end})
        finally:
            self.pending -= 1
            self.answered.unpark_all()

    def _shown(self, path: bytes) -> str:
        mountpoint = self.mount.config.mountpoint
        return os.path.join(mountpoint, os.fsdecode(path)) if path else mountpoint

    @contextlib.asynccontextmanager
    async def _progress_to(self, send: Send, inodes: Iterable[Inode] | None = None) -> AsyncIterator[None]:
        """Tells again and again how much is left to write, of these files or of all."""

        def left_pages() -> int:
            if inodes is None:
                return self.stack.writeback.unwritten_pages
            return sum(inode.file.dirty_pages + inode.file.writeback_pages for inode in inodes if inode.file is not None)

        async def report() -> None:
            while True:
                await send({"dirty_bytes": left_pages() * PAGE_SIZE})
                await trio.sleep(PROGRESS_SECONDS)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            yield
            nursery.cancel_scope.cancel()


async def send_parts(send: Send, parts: Iterable[list[dict[str, object]]]) -> list[dict[str, object]]:
    """Sends all parts of a list but the last, which is for the last message; others may run between two."""
    last: list[dict[str, object]] = []
    for part in parts:
        if last:
            await send({"unwritten": last})
        last = part
    return last


def path_of(request: Mapping[str, object]) -> bytes:
    """The path that a request is about; CachefsError for one that is none."""
    path = request.get("path", "")
    with contextlib.suppress(UnicodeEncodeError):
        if path == "" or (isinstance(path, str) and "\0" not in path and not {"", ".", ".."} & set(path.split("/"))):
            return os.fsencode(path)
    raise CachefsError(f"not a path below the mountpoint: {path!r}")
