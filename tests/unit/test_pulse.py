"""The pulse: it beats while anything is asked for or left to be done, and not otherwise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from cachefs.pulse import PAUSE_MOST_SECONDS, Pulse


class Beating:
    """A pulse in simulated time, whose requests and work are ours to say."""

    def __init__(self, nursery: trio.Nursery, can_rouse: bool = True) -> None:
        self.asked, self.busy, self.roused, self.beats = 0, False, 0, 0
        self.rouse: Callable[[], None] | None = None
        self._can_rouse = can_rouse
        self.pulse = Pulse(lambda: self.asked, lambda: self.busy, self._when_asked, self._count_roused)
        nursery.start_soon(self.pulse.run)
        nursery.start_soon(self._count)

    def _when_asked(self, rouse: Callable[[], None]) -> bool:
        self.rouse = rouse
        return self._can_rouse

    def request(self) -> None:
        """As the lane has it: who sleeps is roused first."""
        rouse, self.rouse = self.rouse, None
        if rouse is not None:
            rouse()
        self.asked += 1

    def _count_roused(self) -> None:
        self.roused += 1

    async def _count(self) -> None:
        while True:
            await self.pulse.next()
            self.beats += 1

    async def beats_in(self, seconds: float) -> int:
        before = self.beats
        await trio.sleep(seconds)
        return self.beats - before

    async def come_to_rest(self) -> None:
        await trio.sleep(3.5)


def run(test: Callable[[Beating], Awaitable[None]], can_rouse: bool = True) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await test(Beating(nursery, can_rouse))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_it_beats_every_second_while_requests_come() -> None:
    async def test(it: Beating) -> None:
        for _ in range(40):
            it.request()
            await trio.sleep(0.5)
        assert 19 <= it.beats <= 20

    run(test)


def test_it_stops_when_nothing_was_asked_for_since_the_last_beat() -> None:
    async def test(it: Beating) -> None:
        it.asked = 7
        await it.come_to_rest()
        assert it.beats == 2, "one that follows the last request, and one that finds out"
        assert await it.beats_in(PAUSE_MOST_SECONDS / 2) == 0

    run(test)


def test_the_next_request_has_it_go_on_and_is_told_of_before_it_is_served() -> None:
    async def test(it: Beating) -> None:
        await it.come_to_rest()
        it.request()
        assert it.roused == 1
        assert await it.beats_in(1.5) == 1

    run(test)


def test_it_goes_on_while_there_is_work_that_no_request_tells_of() -> None:
    async def test(it: Beating) -> None:
        it.busy = True
        assert await it.beats_in(10.5) == 10
        it.busy = False
        await it.come_to_rest()
        assert await it.beats_in(10) == 0

    run(test)


def test_what_is_done_without_a_request_can_wake_it_for_a_beat() -> None:
    async def test(it: Beating) -> None:
        await it.come_to_rest()
        it.pulse.wake()
        assert await it.beats_in(10) == 1

    run(test)


def test_a_request_that_came_as_it_stopped_is_noticed_after_a_minute() -> None:
    async def test(it: Beating) -> None:
        await it.come_to_rest()
        it.asked += 1
        assert await it.beats_in(PAUSE_MOST_SECONDS + 5) >= 2

    run(test)


def test_where_the_next_request_cannot_be_told_of_it_never_stops() -> None:
    async def test(it: Beating) -> None:
        assert await it.beats_in(30.5) == 30

    run(test, can_rouse=False)
