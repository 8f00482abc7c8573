"""What the daemon does for `cachefs status`, `sync` and `umount`: the handlers behind the control socket."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

import trio

from cachefs import __version__
from cachefs.cache.page import PAGE_SIZE
from cachefs.controlserver import Handler, Send
from cachefs.errors import CachefsError
from cachefs.inode import Inode

if TYPE_CHECKING:
    from cachefs.mount import Mount

PROGRESS_SECONDS = 0.1


class Commands:
    """The handlers of one mount. `pending` umount commands wait for its end; `answered` is told of each that is done."""

    def __init__(self, mount: "Mount") -> None:
        self.mount = mount
        self.stack = mount.stack
        self.pending = 0
        self.answered = trio.lowlevel.ParkingLot()

    def handlers(self) -> dict[str, Handler]:
        return {"status": self._status, "umount": self._umount, "sync": self._sync}

    async def _status(self, request: Mapping[str, object], send: Send) -> None:
        await send(
            {
                "done": True,
                "pid": os.getpid(),
                "version": __version__,
                "source": self.mount.config.source,
                "mountpoint": self.mount.config.mountpoint,
                "metrics": self.mount.metrics_url,
                "statistics": dataclasses.asdict(self.mount.statistics()),
            }
        )

    async def _sync(self, request: Mapping[str, object], send: Send) -> None:
        failed: list[Inode] = []
        problem: OSError | None = None
        async with self._progress_to(send):
            try:
                failed = await self.stack.io.ask(self.stack.fs.sync)
            except OSError as error:
                problem = error
        if problem is not None:
            raise CachefsError(f"{self.mount.config.source} can't be made durable: {problem.strerror}")
        await send({"done": True, "unwritten": self.stack.unwritten() if failed else []})

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
            await send({"done": True, "unwritten": self.mount.failed})
        finally:
            self.pending -= 1
            self.answered.unpark_all()

    @contextlib.asynccontextmanager
    async def _progress_to(self, send: Send) -> AsyncIterator[None]:
        async def report() -> None:
            while True:
                await send({"dirty_bytes": self.stack.writeback.unwritten_pages * PAGE_SIZE})
                await trio.sleep(PROGRESS_SECONDS)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            yield
            nursery.cancel_scope.cancel()
