"""What pyfuse3 gets in place of trio: it looks before it sleeps, and takes a free lock without giving its turn away.

pyfuse3's request loop takes a lock and waits for its descriptor before every request, each a trip through trio's
scheduler and epoll that costs more than a hit. `enable` puts a namespace in the place of `pyfuse3.trio`, as
`pyfuse3.asyncio` does, in which a request that is there already, or comes within microseconds, is taken at once.
"""

import select
from collections import deque
from types import TracebackType
from typing import Any

import pyfuse3
import trio

TRIES = 20  # looks at an empty descriptor before sleeping: about as long as a waiting program needs for its next request
TURN = 32  # requests in a row before other tasks get their turn


def enable() -> None:
    """To be called before pyfuse3.main()."""
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]


class _Trio:
    """trio, but for what stands below."""

    def __init__(self) -> None:
        self.Lock = EagerLock
        self.lowlevel = _LowLevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _LowLevel:
    """trio.lowlevel, but for `wait_readable`."""

    def __init__(self) -> None:
        self._polls: dict[int, select.poll] = {}
        self._in_a_row = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        poller = self._polls.get(fd)
        if poller is None:
            poller = self._polls[fd] = select.poll()
            poller.register(fd, select.POLLIN)
        if self._in_a_row < TURN:
            poll = poller.poll
            for _ in range(TRIES):
                if poll(0):
                    self._in_a_row += 1
                    return
        self._in_a_row = 0
        await trio.lowlevel.wait_readable(fd)


class EagerLock:
    """A lock that a task takes without a checkpoint when it is free, even past tasks that wait for it.

    A waiter is woken when the lock is given back, and runs when the task that did so sleeps: if that one has taken the
    lock again by then, the waiter goes on waiting; if it sleeps elsewhere (a miss), the waiter goes on in its place.
    """

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[trio.lowlevel.Task] = deque()

    async def __aenter__(self) -> None:
        while self._held:
            task = trio.lowlevel.current_task()
            self._waiting.append(task)

            def abort(_: object, task: trio.lowlevel.Task = task) -> trio.lowlevel.Abort:
                self._waiting.remove(task)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False
        if self._waiting:
            trio.lowlevel.reschedule(self._waiting.popleft())
