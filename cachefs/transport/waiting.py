"""How the lane's leader waits for the next request: ready to be woken at once where that pays, and asleep for all else.

To be woken costs more than a hit. Where the kernel can be asked that idle processors stay ready (cpulatency.py), it is,
as long as requests come one after another: then a sleep that short is cheap. Elsewhere the leader looks again for a moment
before it sleeps: a program that reads on at once is answered sooner by somebody who kept looking. Whoever looks in vain
burns CPU. So a look is short, looking has to have paid lately, and with nothing to do nobody looks at all.
"""

import math
import os
import select
import time
from collections.abc import Callable
from typing import Any

import trio

from cachefs.transport.cpulatency import CpuLatency

LOOK_NS = 50_000  # how long one look lasts: programs that read on come back within 10-20 us, a woken sleeper needs 30 and more
SOON_NS = 2 * LOOK_NS  # asleep for less than that, waking included: a look would have met the request
TRUST_MAX = 8
LOSS = 2  # for a look in vain
READY_TRUST = 3  # before processors are kept ready: each change of that wakes all idle ones up
READY_SECONDS = 0.002  # how long processors stay ready for a request that does not come
LOOKS = range(14)  # before a light sleep: a program that reads on at once is back sooner than one falls asleep and wakes up
READY_SOON_NS = 500_000  # the time between two requests for which that pays


class Patience:
    """Whether to be ready: the account of when that paid and when it was in vain. Pure. On one processor it never pays.

    `trust` grows when a request came during a look, or so soon after falling asleep that a look would have met it. It falls
    twice as fast, and with 0 nobody looks, and processors sleep as they like.
    """

    __slots__ = ("most", "trust")

    def __init__(self, processors: int) -> None:
        self.most = TRUST_MAX if processors > 1 else 0
        self.trust = 0

    def met(self) -> None:
        """A request came during a look, or soon while processors were ready."""
        if self.trust < self.most:
            self.trust += 1

    def in_vain(self) -> None:
        """None came, or late."""
        self.trust = max(0, self.trust - LOSS)

    def give_up(self) -> None:
        """None came for so long that whoever asked is doing something else."""
        self.trust = 0

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
    """Waits for `fd` to be readable, by the one task at a time that wants to know.

    Holds `latency`, which it owns, while requests come one after another.
    """

    def __init__(self, fd: int, latency: CpuLatency) -> None:
        self.fd = fd
        self.latency = latency
        self.patience = Patience(len(os.sched_getaffinity(0)))
        self._runnable = Runnable()
        self._trio_fd = trio_descriptor()
        self.at_once = False  # whether `expect` met a request that was there already
        self.rouse: Callable[[], None] | None = None  # to be called once, when a request ends the next sleep
        self._since_ns = 0  # when the waiting for the next request began
        self._poller, self._own_poller, self._trio_poller = select.poll(), select.poll(), select.poll()
        self._own_poller.register(fd, select.POLLIN)
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
        self.latency.close()

    @property
    def sleeps_for_all(self) -> bool:
        """Whether it sleeps itself, and does not leave that to trio."""
        return self._trio_fd >= 0

    async def give_turn(self) -> None:
        """To the other tasks, if any can go on: a turn that nobody needs costs as much as three hits."""
        if self._trio_fd < 0 or self._runnable.tasks or self._trio_poller.poll(0) or seconds_to_next_deadline() <= 0:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    def expect(self) -> bool:
        """Waits for `fd` in plain code, where others need no turn; False: it has to be `wait`.

        Only while processors are ready. Other tasks wait as well then, but for READY_SECONDS at most.
        """
        if not self.latency.held or self._runnable.tasks:
            return False
        poll = self._own_poller.poll
        for i in LOOKS:
            if poll(0):
                self.at_once = not i
                return True
        self.at_once = False
        self._since_ns = time.perf_counter_ns()
        ready = self._sleep_lightly()
        self._since_ns = 0
        return self._is_request(ready)

    def found(self) -> None:
        """There is a request: the waiting for the next one has not begun."""
        self._since_ns = 0

    async def wait(self) -> bool:
        """Until `fd` may be readable, or other tasks have had a turn; whether they had."""
        self._since_ns = self._since_ns or time.perf_counter_ns()
        if self._runnable.tasks:
            if self.latency.held and time.perf_counter_ns() - self._since_ns >= READY_SECONDS * 1e9:
                self._give_up()
            await trio.lowlevel.checkpoint()
            return True
        if self._trio_fd < 0:
            ready = self._look() if self.patience.trust else []
            if not ready:
                await self._sleep_in_trio()
                return True
        elif self.patience.trust < (READY_TRUST if self.latency.usable else 1):
            ready = self._sleep_deeply()
        elif self.latency.usable:
            ready = self._sleep_lightly()
        else:
            ready = self._look() or self._sleep()
        if len(ready) == 1 and self._is_request(ready):
            return False
        await trio.lowlevel.checkpoint()
        return True

    def _look(self) -> list[tuple[int, int]]:
        poll, clock = self._poller.poll, time.perf_counter_ns
        ready, end = poll(0), clock() + LOOK_NS
        while not ready and clock() < end:
            ready = poll(0)
        if ready:
            self.patience.met()
        else:
            self.patience.in_vain()
        return ready

    def _sleep_lightly(self) -> list[tuple[int, int]]:
        """While idle processors are ready; not for long."""
        self.latency.hold()
        ready = self._sleep(READY_SECONDS)
        waited_ns = time.perf_counter_ns() - self._since_ns
        if not self._is_request(ready):
            if waited_ns >= READY_SECONDS * 1e9:
                self._give_up()
        elif waited_ns < READY_SOON_NS:
            self.patience.met()
        else:
            self.patience.in_vain()
        if self.patience.trust < READY_TRUST:
            self.latency.let_go()
        return ready

    def _give_up(self) -> None:
        self.patience.give_up()
        self.latency.let_go()

    def _sleep_deeply(self) -> list[tuple[int, int]]:
        ready = self._sleep()
        if self._is_request(ready):
            self.patience.slept(time.perf_counter_ns() - self._since_ns)
        return ready

    def _sleep(self, most_seconds: float = math.inf) -> list[tuple[int, int]]:
        """Every other task sleeps as well. So this one sleeps for all, on trio's descriptor too and until its next deadline.

        To go to the same sleep through trio's scheduler, and back, costs more than a hit.
        """
        seconds = min(most_seconds, seconds_to_next_deadline())
        ready = self._poller.poll(None if seconds == math.inf else max(0.0, seconds * 1000))
        if self.rouse is not None and self._is_request(ready):
            rouse, self.rouse = self.rouse, None
            rouse()
        return ready

    async def _sleep_in_trio(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self.fd)
        except trio.ClosedResourceError:
            return

    def _is_request(self, ready: list[tuple[int, int]]) -> bool:
        return any(fd == self.fd for fd, _ in ready)


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
