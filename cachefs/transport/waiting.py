"""How the lane's leader waits for the next request: it looks again for a moment where that pays, then sleeps for all.

To be woken costs more than a hit: a program that reads on at once is answered sooner by somebody who kept looking. Whoever
looks in vain burns CPU. So a look is short, looking has to have paid lately, and with nothing to do nobody looks at all.
"""

import math
import os
import select
import time
from typing import Any

import trio

LOOK_NS = 50_000  # how long one look lasts: programs that read on come back within 10-20 us, a woken sleeper needs 30 and more
SOON_NS = 2 * LOOK_NS  # asleep for less than that, waking included: a look would have met the request
TRUST_MAX = 8
LOSS = 2  # for a look in vain


class Patience:
    """Whether to look: the account of looks that paid and looks in vain. Pure. On one processor looking never pays.

    `trust` grows when a request came during a look, or so soon after falling asleep that a look would have met it. It falls
    twice as fast, and with 0 nobody looks.
    """

    __slots__ = ("most", "trust")

    def __init__(self, processors: int) -> None:
        self.most = TRUST_MAX if processors > 1 else 0
        self.trust = 0

    def met(self) -> None:
        """A request came during a look."""
        if self.trust < self.most:
            self.trust += 1

    def in_vain(self) -> None:
        """None came."""
        self.trust = max(0, self.trust - LOSS)

    def slept(self, nanoseconds: int) -> None:
        """It came after that much sleep, with no look before."""
        if nanoseconds < SOON_NS and self.trust < self.most:
            self.trust += 1


class Runnable(trio.abc.Instrument):
    """The tasks that trio is going to run next. Its own figures leave out those of the turn under way that wait still."""

    def __init__(self) -> None:
        self.tasks: set[trio.lowlevel.Task] = set()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.tasks.discard(task)


class Waiting:
    """Waits for `fd` to be readable, by the one task at a time that wants to know."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.patience = Patience(len(os.sched_getaffinity(0)))
        self._runnable = Runnable()
        self._trio_fd = trio_descriptor()
        self._poller, self._trio_poller = select.poll(), select.poll()
        for each in {fd, self._trio_fd} - {-1}:
            self._poller.register(each, select.POLLIN)
        if self._trio_fd >= 0:
            self._trio_poller.register(self._trio_fd, select.POLLIN)

    async def start(self) -> None:
        """To be called first."""
        trio.lowlevel.add_instrument(self._runnable)
        for _ in range(2):  # tasks that were scheduled before have run then
            await trio.lowlevel.checkpoint()

    def stop(self) -> None:
        trio.lowlevel.remove_instrument(self._runnable)

    async def give_turn(self) -> None:
        """To the other tasks, if any can go on: a turn that nobody needs costs as much as three hits."""
        if self._trio_fd < 0 or self._runnable.tasks or self._trio_poller.poll(0) or seconds_to_next_deadline() <= 0:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def wait(self) -> bool:
        """Until `fd` may be readable, or other tasks have had a turn; whether they had."""
        if self._runnable.tasks:
            await trio.lowlevel.checkpoint()
            return True
        patience, began = self.patience, time.perf_counter_ns()
        looked = bool(patience.trust)
        ready = self._look(began) if looked else []
        if ready:
            patience.met()
        else:
            if looked:
                patience.in_vain()
            if self._trio_fd < 0:
                await self._sleep_in_trio()
                return True
            ready = self._sleep()
            if not looked and any(fd == self.fd for fd, _ in ready):
                patience.slept(time.perf_counter_ns() - began)
        if len(ready) == 1 and ready[0][0] == self.fd:
            return False
        await trio.lowlevel.checkpoint()
        return True

    def _look(self, began: int) -> list[tuple[int, int]]:
        poll, clock, end = self._poller.poll, time.perf_counter_ns, began + LOOK_NS
        ready: list[tuple[int, int]] = []
        while not ready and clock() < end:
            ready = poll(0)
        return ready

    def _sleep(self) -> list[tuple[int, int]]:
        """Every other task sleeps as well. So this one sleeps for all, on trio's descriptor too and until its next deadline.

        To go to the same sleep through trio's scheduler, and back, costs more than a hit.
        """
        seconds = seconds_to_next_deadline()
        return self._poller.poll(None if seconds == math.inf else max(0.0, seconds * 1000))

    async def _sleep_in_trio(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self.fd)
        except trio.ClosedResourceError:
            return


def trio_descriptor() -> int:
    """The descriptor that trio itself sleeps on, -1 if this trio does not have one: it is no part of its interface."""
    try:
        runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        number: int = runner.io_manager._epoll.fileno()
    except AttributeError:
        return -1
    return number


def seconds_to_next_deadline() -> float:
    """Until a task of this trio is to be woken up; not after that. Trio's own statistics say it too, for ten times the price."""
    try:
        runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        deadline: float = runner.deadlines.next_deadline()
    except AttributeError:
        return trio.lowlevel.current_statistics().seconds_to_next_deadline
    return deadline - trio.current_time()
