"""How the lane waits: looks only where that pays, sleeps for trio too, and keeps no other task from its turn."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from cachefs.transport import waiting as waiting_module
from cachefs.transport.cpulatency import CpuLatency
from cachefs.transport.waiting import LOOK_NS, LOSS, READY_TRUST, SOON_NS, TRUST_MAX, Patience, Waiting, trio_descriptor


def test_looking_begins_after_a_short_sleep_and_ends_after_looks_in_vain() -> None:
    patience = Patience(2)
    assert not patience.trust
    patience.slept(SOON_NS)
    assert not patience.trust
    patience.slept(SOON_NS - 1)
    assert patience.trust
    for _ in range(100):
        patience.met()
    assert patience.trust == TRUST_MAX
    looks = 0
    while patience.trust:
        patience.in_vain()
        looks += 1
    assert looks == -(-TRUST_MAX // LOSS)


def test_requests_that_always_come_too_late_cost_a_look_every_other_time_at_most() -> None:
    patience, looks = Patience(2), 0
    for _ in range(1000):
        if patience.trust:
            looks += 1
            patience.in_vain()
        else:
            patience.slept(LOOK_NS + 1)
    assert looks <= 500


def test_on_one_processor_nobody_looks() -> None:
    patience = Patience(1)
    patience.slept(0)
    patience.met()
    assert not patience.trust


@asynccontextmanager
async def waiter() -> AsyncIterator[tuple[Waiting, int]]:
    """A Waiting on a pipe, and the pipe's other end."""
    ours, theirs = os.pipe()
    waiting = Waiting(ours, CpuLatency(False))
    await waiting.start()
    try:
        with trio.fail_after(20):
            yield waiting, theirs
    finally:
        waiting.stop()
        os.close(ours)
        os.close(theirs)


@pytest.fixture(params=["trio's descriptor", "no descriptor"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is no part of trio's interface, and without."""
    if request.param == "no descriptor":
        monkeypatch.setattr(waiting_module, "trio_descriptor", lambda: -1)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("why", ["runnable", "from a thread", "a deadline"])
def test_others_get_their_turn_when_they_can_go_on(why: str) -> None:
    async def main() -> None:
        async with waiter() as (waiting, _), trio.open_nursery() as nursery:
            done = False

            async def other() -> None:
                nonlocal done
                if why == "runnable":
                    await trio.lowlevel.checkpoint()
                elif why == "from a thread":
                    await trio.to_thread.run_sync(lambda: None)
                else:
                    await trio.sleep(0.05)
                done = True

            nursery.start_soon(other)
            while not done:
                await waiting.give_turn()

    trio.run(main)


@pytest.mark.usefixtures("either")
def test_who_is_cancelled_does_not_go_on_because_nobody_else_can() -> None:
    async def main() -> None:
        async with waiter() as (waiting, _):
            with trio.CancelScope() as scope:
                scope.cancel()
                for _ in range(3):
                    await waiting.give_turn()
            assert scope.cancelled_caught

    trio.run(main)


def test_a_turn_that_nobody_needs_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0

    async def counted() -> None:
        nonlocal turns
        turns += 1

    async def main() -> None:
        async with waiter() as (waiting, _), trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 3600)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            monkeypatch.setattr(trio.lowlevel, "checkpoint", counted)
            for _ in range(5):
                await waiting.give_turn()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not turns


def test_this_trio_has_a_descriptor() -> None:
    async def main() -> int:
        return trio_descriptor()

    assert trio.run(main) >= 0


def written_later(fd: int, seconds: float) -> threading.Thread:
    def write() -> None:
        time.sleep(seconds)
        os.write(fd, b"x")

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def take(waiting: Waiting) -> None:
    """The request that was waited for, as the lane does."""
    os.read(waiting.fd, 1)
    waiting.found()


@pytest.mark.usefixtures("either")
def test_it_wakes_when_there_is_something_to_read() -> None:
    async def main() -> None:
        async with waiter() as (waiting, fd):
            thread = written_later(fd, 0.05)
            while not waiting._poller.poll(0):
                await waiting.wait()
            thread.join()

    trio.run(main)


async def forever(waiting: Waiting) -> None:
    """As the lane does when there is no request."""
    while True:
        await waiting.wait()


@pytest.mark.parametrize("task", ["thread", "timer", "chain"])
@pytest.mark.usefixtures("either")
def test_other_tasks_go_on_while_it_sleeps(task: str) -> None:
    """None of them waits for another one's deadline: that would be two seconds away, or five."""

    async def thread() -> None:
        for _ in range(20):
            await trio.to_thread.run_sync(time.sleep, 0.001)

    async def timer() -> None:
        for _ in range(20):
            await trio.sleep(0.001)

    async def chain() -> None:
        events = [trio.Event() for _ in range(20)]

        async def link(i: int) -> None:
            await events[i - 1].wait()
            await trio.to_thread.run_sync(os.getpid)
            events[i].set()

        async with trio.open_nursery() as nursery:
            for i in range(1, 20):
                nursery.start_soon(link, i)
            events[0].set()

    work: Callable[[], Awaitable[None]] = {"thread": thread, "timer": timer, "chain": chain}[task]

    async def main() -> float:
        async with waiter() as (waiting, _), trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 5)
            nursery.start_soon(forever, waiting)
            start = time.perf_counter()
            await work()
            nursery.cancel_scope.cancel()
            return time.perf_counter() - start

    assert trio.run(main) < 2


def test_it_looks_while_requests_come_at_once_and_stops_when_they_do_not() -> None:
    async def main() -> None:
        async with waiter() as (waiting, fd):
            waiting.patience = Patience(2)
            waiting.patience.trust = 1
            for _ in range(20):
                os.write(fd, b"x")
                assert not await waiting.wait()
                take(waiting)
            assert waiting.patience.trust == TRUST_MAX
            for _ in range(10):
                thread = written_later(fd, 0.01)
                while not waiting._poller.poll(0):
                    await waiting.wait()
                thread.join()
                take(waiting)
            assert not waiting.patience.trust

    trio.run(main)


def test_cancelling_ends_it() -> None:
    async def main() -> None:
        async with waiter() as (waiting, _):
            with trio.move_on_after(0.05) as scope:
                await forever(waiting)
            assert scope.cancelled_caught

    trio.run(main)


class Ready(CpuLatency):
    """With no device; what was asked of it."""

    def __init__(self) -> None:
        super().__init__(False)
        self.said: list[str] = []

    @property
    def usable(self) -> bool:
        return True

    def hold(self) -> None:
        if not self.held:
            self.said.append("hold")
        self.held = True

    def let_go(self) -> None:
        if self.held:
            self.said.append("let go")
        self.held = False

    def close(self) -> None:
        self.let_go()


@asynccontextmanager
async def ready_waiter() -> AsyncIterator[tuple[Waiting, int, list[str]]]:
    async with waiter() as (waiting, fd):
        waiting.latency = Ready()
        waiting.patience = Patience(2)
        yield waiting, fd, waiting.latency.said


def test_processors_are_kept_ready_while_requests_come_one_after_another_and_no_longer() -> None:
    async def main() -> None:
        async with ready_waiter() as (waiting, fd, said):
            for i in range(READY_TRUST + 2):  # the first ones are met by deep sleeps, which are short
                assert said == ["hold"][: i > READY_TRUST]
                os.write(fd, b"x")
                assert not await waiting.wait()
                take(waiting)
            assert said == ["hold"]
            for _ in range(5):
                os.write(fd, b"x")
                assert waiting.expect() and waiting.at_once
                os.read(waiting.fd, 1)
            assert not waiting.expect()
            while waiting.latency.held:
                await waiting.wait()
            assert said == ["hold", "let go"] and not waiting.patience.trust
            assert not waiting.expect()

    trio.run(main)


def test_requests_that_come_late_let_processors_sleep() -> None:
    async def main() -> None:
        async with ready_waiter() as (waiting, fd, said):
            waiting.patience.trust = TRUST_MAX
            waiting._since_ns = 1  # a long time ago
            for i in range(-(-(TRUST_MAX - READY_TRUST + 1) // LOSS)):
                assert said == ["hold"][:i]
                os.write(fd, b"x")
                assert not await waiting.wait()
                take(waiting)
                waiting._since_ns = 1
            assert said == ["hold", "let go"]

    trio.run(main)


def test_nobody_is_expected_while_another_task_can_go_on() -> None:
    async def main() -> None:
        async with ready_waiter() as (waiting, fd, _), trio.open_nursery() as nursery:
            waiting.latency.hold()
            nursery.start_soon(trio.lowlevel.checkpoint)
            os.write(fd, b"x")
            assert not waiting.expect()
            assert await waiting.wait()
            while not waiting.expect():
                await waiting.wait()

    trio.run(main)


def test_a_deadline_ends_a_light_sleep() -> None:
    async def main() -> None:
        async with ready_waiter() as (waiting, _, said), trio.open_nursery() as nursery:
            waiting.patience.trust = TRUST_MAX
            waiting.latency.hold()
            nursery.start_soon(trio.sleep, 0.0005)
            await trio.lowlevel.checkpoint()
            while waiting.latency.held:
                await waiting.wait()
            assert said == ["hold", "let go"]

    trio.run(main)


def test_regression_the_waiting_for_a_request_begins_when_the_one_before_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a look after another task's turn, it left the clock running, and the next one counted as late."""
    monkeypatch.setattr(waiting_module, "READY_SECONDS", 10.0)
    monkeypatch.setattr(waiting_module, "READY_SOON_NS", 1_000_000_000)

    async def main() -> None:
        async with ready_waiter() as (waiting, fd, said), trio.open_nursery() as nursery:
            waiting.patience.trust = TRUST_MAX
            nursery.start_soon(trio.sleep, 0.001)
            await trio.lowlevel.checkpoint()
            while not await waiting.wait():  # until others have had their turn
                pass
            waiting._since_ns -= 2_000_000_000  # they took long
            os.write(fd, b"x")
            take(waiting)
            os.write(fd, b"x")
            while await waiting.wait():  # the other task may have its end to come to
                pass
            take(waiting)
            assert said == ["hold"] and waiting.patience.trust == TRUST_MAX

    trio.run(main)
