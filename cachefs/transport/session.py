"""The two ways to serve requests, behind one interface: our own lane, and pyfuse3."""

from collections.abc import Callable
from typing import Protocol

import pyfuse3

from cachefs.fs import FileSystem
from cachefs.statistics import Histogram
from cachefs.transport import negotiate, seam
from cachefs.transport.lane import WORKERS_MAX, Lane
from cachefs.transport.operations import Operations


class Session(Protocol):
    """What serves the requests of one mount. `durations` has those of each operation.

    `ready_seconds` is for how long it has kept idle processors ready.
    """

    durations: dict[str, Histogram]

    @property
    def ready_seconds(self) -> float: ...

    async def run(self) -> None:
        """Serves until the file system is unmounted or `terminate` was called."""

    def when_asked(self, rouse: Callable[[], None]) -> bool:
        """Calls `rouse` once, before the next request is handled, or when it ends a sleep; False where it cannot."""

    def terminate(self) -> None:
        """Reads no more requests; `run` ends when those under way are answered."""

    def invalidate(self, node: int, attributes_only: bool = False) -> None:
        """Makes the kernel forget an inode; OSError if it does not know it. Not for the trio thread, but for attributes."""

    def forget_name(self, parent: int, name: bytes) -> None:
        """Makes the kernel look a name up again, soon."""

    def close(self) -> None:
        """Gives the connection back, after `run`."""


class Pyfuse3Session:
    """libfuse reads and writes, pyfuse3 calls `Operations`."""

    ready_seconds = 0.0

    def __init__(
        self,
        connection: negotiate.Connection,
        fs: FileSystem,
        kernel_cache: str,
        ttl_seconds: float,
        begun: Callable[[], None],
    ) -> None:
        def begin() -> None:
            connection.hand_over()
            begun()

        self._operations = Operations(fs, kernel_cache, ttl_seconds, self._forget_attributes, begin)
        self.durations = self._operations.durations
        pyfuse3.init(self._operations, connection.for_libfuse(), set())
        seam.enable()

    def _forget_attributes(self, node: int) -> None:
        self.invalidate(node, attributes_only=True)

    async def run(self) -> None:
        await pyfuse3.main(max_tasks=WORKERS_MAX)

    def when_asked(self, rouse: Callable[[], None]) -> bool:
        self._operations.rouse = rouse
        return True

    def terminate(self) -> None:
        pyfuse3.terminate()

    def invalidate(self, node: int, attributes_only: bool = False) -> None:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(node), attr_only=attributes_only)

    def forget_name(self, parent: int, name: bytes) -> None:
        pyfuse3.invalidate_entry_async(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name), ignore_enoent=True)

    def close(self) -> None:
        pyfuse3.close(unmount=False)


def open_session(
    connection: negotiate.Connection,
    fs: FileSystem,
    kernel_cache: str,
    ttl_seconds: float,
    begun: Callable[[], None],
    fast_lane: bool,
    cpu_latency: bool,
) -> Session:
    """The session of a connection just made: the lane if it is wanted. `begun` is called when requests are answered.

    We make none of our own: were we killed before it is answered, our thread would wait for ever.
    """
    if fast_lane:
        return Lane(connection.fuse_fd, fs, kernel_cache, ttl_seconds, begun, cpu_latency)
    return Pyfuse3Session(connection, fs, kernel_cache, ttl_seconds, begun)
