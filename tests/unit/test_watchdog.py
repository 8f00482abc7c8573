"""The watchdog by a clock of our own: when a backing is silent or lost, who fails then, and what goes on."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from cachefs.watchdog import OVERDUE_MAX, SYNC_TIMES, Call, Unreachable, Watchdog

TIMEOUT = 4.0
STEP = 0.25


class Kennel:
    """A watchdog, its clock, and a backing that answers the probe unless `hangs`, with `error` if there is one."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.now = 100.0
        self.hangs = False
        self.error: OSError | None = None
        self.probes = 0
        self.back = 0
        self._entered, self._released = threading.Event(), threading.Event()
        self.watchdog = Watchdog(nursery, TIMEOUT, self._probe, lambda: self.now)
        self.watchdog.came_back = self._came_back
        self.limiter = trio.CapacityLimiter(2)

    def _came_back(self) -> None:
        self.back += 1

    def _probe(self) -> None:
        self.probes += 1
        if self.hangs:
            self._entered.set()
            self._released.wait()
        if self.error is not None:
            raise self.error

    async def step(self, seconds: float) -> None:
        """Time goes by, and the watchdog looks each quarter of a second."""
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(round(seconds / STEP)):
            self.now += STEP
            self.watchdog.look()
            while self.probing and not (self.hangs and self._entered.is_set()):
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked()

    @property
    def probing(self) -> bool:
        return self.watchdog._probing is not None

    async def begin(self, op: str = "stat") -> Call:
        return await self.watchdog.begin(op, self.limiter)

    async def release(self) -> None:
        self.hangs = False
        self._released.set()
        while self.probing:
            await trio.sleep(0.001)


def kennel(test: Callable[[Kennel], Awaitable[None]]) -> Callable[[], None]:
    """A test that gets a Kennel."""

    def run() -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                kennel = Kennel(nursery)
                try:
                    await test(kennel)
                finally:
                    kennel._released.set()
                    nursery.cancel_scope.cancel()

        trio.run(main)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def forever() -> None:
    await trio.sleep_forever()


async def outcome(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class Asked:
    """A question under way, and what came of it."""

    def __init__(self, nursery: trio.Nursery, watchdog: Watchdog, function: Callable[..., Awaitable[Any]], **how: Any) -> None:
        self.result: Any = None
        nursery.start_soon(self._run, watchdog, function, how)

    async def _run(self, watchdog: Watchdog, function: Callable[..., Awaitable[Any]], how: dict[str, Any]) -> None:
        self.result = await outcome(watchdog.ask(function, (), how.get("memory"), how.get("undo")))


@kennel
async def test_a_backing_that_answers_slowly_is_not_lost_and_nobody_fails(kennel: Kennel) -> None:
    dog = kennel.watchdog
    async with trio.open_nursery() as nursery:
        asked = Asked(nursery, dog, forever)
        for _ in range(40):
            call = await kennel.begin()
            await kennel.step(TIMEOUT * 0.75)
            assert not dog.silent and not dog.lost
            dog.end(call)
        assert asked.result is None and dog.timeouts == 0
        nursery.cancel_scope.cancel()


@kennel
async def test_silence_is_noticed_answered_from_memory_and_becomes_loss_in_time(kennel: Kennel) -> None:
    dog = kennel.watchdog
    kennel.hangs = True
    async with trio.open_nursery() as nursery:
        call = await kennel.begin()
        known = Asked(nursery, dog, forever, memory=lambda: "known")
        unknown = Asked(nursery, dog, forever, memory=lambda: None)
        await kennel.step(1.0)
        assert (kennel.probes, dog.silent, known.result) == (1, False, None)
        await kennel.step(1.0)
        assert (dog.silent, dog.lost, known.result, unknown.result) == (True, False, "known", None)
        assert await dog.ask(forever, (), lambda: "at once", None) == "at once"
        await kennel.step(TIMEOUT - 2.25)
        assert not dog.lost and unknown.result is None
        await kennel.step(0.25)
        assert dog.lost and unknown.result == "ETIMEDOUT"
        assert await outcome(dog.ask(forever, (), None, None)) == "ETIMEDOUT"
        assert await outcome(kennel.begin()) == "ETIMEDOUT", "no call is sent after those that hang"
        with pytest.raises(Unreachable), dog.patience():
            raise AssertionError("nobody waits for a lost backing")
        assert dog.timeouts == 4 and kennel.back == 0
        dog.end(call)
        await kennel.begin()  # at once, not with the next look
        assert (dog.lost, dog.silent, kennel.back) == (False, False, 1)


@kennel
async def test_one_call_that_hangs_does_not_make_a_backing_lost_that_answers_others(kennel: Kennel) -> None:
    dog = kennel.watchdog
    async with trio.open_nursery() as nursery:
        await kennel.begin()
        early = Asked(nursery, dog, forever)
        await kennel.step(TIMEOUT / 2)
        late = Asked(nursery, dog, forever)
        await kennel.step(TIMEOUT / 2)
        assert not dog.lost and kennel.probes >= TIMEOUT / 2
        assert (early.result, late.result) == ("ETIMEDOUT", None), "who has waited for so long, for what may hang on that call"
        await kennel.step(TIMEOUT / 2)
        assert late.result == "ETIMEDOUT"
        dog.end(await kennel.begin())  # new ones are sent


@kennel
async def test_a_backing_that_says_it_is_gone_is_lost_until_a_probe_says_otherwise(kennel: Kennel) -> None:
    dog = kennel.watchdog
    kennel.error = OSError(errno.ENOTCONN, "")
    dog.doubt()
    await kennel.step(STEP)
    assert dog.lost and await outcome(kennel.begin()) == "EIO"
    assert await dog.ask(forever, (), lambda: "known", None) == "known"
    await kennel.step(3.0)
    assert kennel.probes in (3, 4), "asked again and again, but not all the time"
    kennel.error = None
    await kennel.step(1.0)
    assert not dog.lost and kennel.back == 1


@kennel
async def test_a_lost_backing_whose_calls_end_because_it_is_gone_does_not_seem_back(kennel: Kennel) -> None:
    dog = kennel.watchdog
    kennel.hangs = True
    call = await kennel.begin()
    await kennel.step(TIMEOUT)
    assert dog.lost
    kennel.error = OSError(errno.ENOTCONN, "")
    dog.doubt()
    dog.end(call)
    assert await outcome(kennel.begin()) == "ETIMEDOUT"
    await kennel.release()
    assert await outcome(kennel.begin()) == "EIO" and kennel.back == 0


@kennel
async def test_one_error_that_the_probe_does_not_confirm_makes_nothing_lost(kennel: Kennel) -> None:
    kennel.watchdog.doubt()
    await kennel.step(1.0)
    assert kennel.probes == 1 and not kennel.watchdog.lost


@kennel
async def test_long_writes_and_syncs_get_more_time_while_others_are_answered(kennel: Kennel) -> None:
    write, sync = await kennel.begin("write"), await kennel.begin("fsync")
    dog = kennel.watchdog
    assert (dog.overdue("write"), dog.overdue("fsync")) == (0, 0)
    await kennel.step(TIMEOUT - STEP)
    write.get_on(1 << 20)  # the next MiB: 4 s more at 256 KiB a second
    await kennel.step(TIMEOUT + 4 - STEP)
    assert dog.overdue("write") == 0
    await kennel.step(STEP)
    assert (dog.overdue("write"), dog.overdue("fsync")) == (1, 0)
    await kennel.step(TIMEOUT * SYNC_TIMES)
    assert dog.overdue("fsync") == 1
    dog.end(write)
    dog.end(sync)


@kennel
async def test_a_write_that_gets_on_is_a_sign_of_life(kennel: Kennel) -> None:
    kennel.hangs = True
    call = await kennel.begin("write")
    for _ in range(20):
        await kennel.step(1.0)
        call.get_on(4096)
    assert not kennel.watchdog.lost
    await kennel.step(TIMEOUT)
    assert kennel.watchdog.lost


@kennel
async def test_calls_that_hang_give_their_places_to_others_but_not_without_end(kennel: Kennel) -> None:
    dog = kennel.watchdog
    calls = [await kennel.begin() for _ in range(2)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kennel.begin)
        await kennel.step(TIMEOUT - STEP)
        assert kennel.limiter.borrowed_tokens == 2 and kennel.limiter.statistics().tasks_waiting == 1
        await kennel.step(STEP)
        assert kennel.limiter.statistics().tasks_waiting == 0, "it has a place"
    for call in calls:
        dog.end(call)
    assert kennel.limiter.borrowed_tokens == 1
    for _ in range(OVERDUE_MAX // 2 + 2):
        for _ in range(2 - int(kennel.limiter.borrowed_tokens)):
            await kennel.begin()
        await kennel.step(TIMEOUT)
    assert kennel.limiter.borrowed_tokens == 2, "there is an end to threads that hang"


@kennel
async def test_a_question_given_up_begins_no_call_any_more(kennel: Kennel) -> None:
    dog, begun = kennel.watchdog, []
    turn = trio.Event()

    async def change() -> None:
        await turn.wait()
        call = await kennel.begin("unlink")
        begun.append(call)

    async with trio.open_nursery() as nursery:
        hung = await kennel.begin()
        asked = Asked(nursery, dog, change)
        await kennel.step(TIMEOUT)
        assert asked.result == "ETIMEDOUT"
        turn.set()
        dog.end(hung)
        await trio.testing.wait_all_tasks_blocked()
    assert not begun


@kennel
async def test_a_change_that_was_begun_is_seen_through_and_its_result_undone(kennel: Kennel) -> None:
    dog, undone, steps = kennel.watchdog, [], []
    answered = trio.Event()

    async def change() -> str:
        call = await kennel.begin("mkdir")
        await answered.wait()
        dog.end(call)
        steps.append(await outcome(kennel.begin("chown")))
        return "made"

    async def undo(result: str) -> None:
        undone.append(result)

    async with trio.open_nursery() as nursery:
        asked = Asked(nursery, dog, change, undo=undo)
        await trio.testing.wait_all_tasks_blocked()
        await kennel.step(TIMEOUT)
        assert asked.result == "ETIMEDOUT" and not undone
        answered.set()
        await trio.testing.wait_all_tasks_blocked()
    assert undone == ["made"] and isinstance(steps[0], Call)


@kennel
async def test_a_result_is_taken_or_undone_never_both(kennel: Kennel) -> None:
    undone: list[str] = []

    async def answer() -> str:
        return "answer"

    async def undo(result: str) -> None:
        undone.append(result)

    assert await kennel.watchdog.ask(answer, (), None, undo) == "answer"
    await trio.testing.wait_all_tasks_blocked()
    assert undone == []
    # The answer and the end of patience come in the same moment: memory has spoken already.
    async with trio.open_nursery() as nursery:
        kennel.hangs = True
        await kennel.begin()
        come = trio.Event()

        async def late() -> str:
            await come.wait()
            return "late"

        asked = Asked(nursery, kennel.watchdog, late, undo=undo, memory=lambda: "known")
        await kennel.step(2.0 - STEP)
        kennel.now += STEP
        come.set()
        kennel.watchdog.look()
        await trio.testing.wait_all_tasks_blocked()
        assert (asked.result, undone) == ("known", ["late"])


@kennel
async def test_errors_and_bugs_of_a_question_reach_who_asked(kennel: Kennel) -> None:
    async def refused() -> None:
        raise FileNotFoundError(errno.ENOENT, "")

    async def wrong() -> None:
        raise ZeroDivisionError

    assert await outcome(kennel.watchdog.ask(refused, (), lambda: "not asked", None)) == "ENOENT"
    with pytest.raises(ZeroDivisionError):
        await kennel.watchdog.ask(wrong, (), None, None)


@kennel
async def test_after_a_stall_of_our_own_answers_are_taken_before_anybody_is_judged(kennel: Kennel) -> None:
    async with trio.open_nursery() as nursery:
        call = await kennel.begin()
        asked = Asked(nursery, kennel.watchdog, forever)
        await trio.testing.wait_all_tasks_blocked()
        kennel.now += 10 * TIMEOUT
        kennel.watchdog.look()
        kennel.watchdog.end(call)
        await kennel.step(TIMEOUT)
        assert asked.result is None
        nursery.cancel_scope.cancel()


def test_nobody_watches_a_local_backing() -> None:
    async def main() -> None:
        watchdog = Watchdog(None, math.inf, lambda: None)
        with watchdog.patience():
            await trio.sleep(0)
        watchdog.check()
        assert not watchdog.watching

    trio.run(main)


@kennel
async def test_memory_does_not_answer_for_a_part_of_the_backing_that_is_gone_while_the_rest_is_there(kennel: Kennel) -> None:
    dog = kennel.watchdog

    async def gone() -> None:
        dog.doubt()
        raise Unreachable(errno.EIO, "")

    async with trio.open_nursery() as nursery:
        asked = Asked(nursery, dog, gone, memory=lambda: "known")
        await kennel.step(1.0)
        assert asked.result == "EIO"
        kennel.error = OSError(errno.ENOTCONN, "")
        asked = Asked(nursery, dog, gone, memory=lambda: "known")
        await kennel.step(2.0)
        assert asked.result == "known"
