"""The lock of an inode: one at a time, in turn, and no turn given away where it is free."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from cachefs.lock import Lock


def run(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def in_trio() -> None:
        async def main() -> None:
            with trio.fail_after(10):
                await test()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    in_trio.__name__ = test.__name__
    return in_trio


@run
async def test_a_free_lock_is_taken_and_given_back_with_no_turn_for_others() -> None:
    lock, others = Lock(), []

    async def other() -> None:
        others.append(lock.locked())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        async with lock:
            assert lock.locked() and others == []
        assert not lock.locked() and others == []
    assert others == [False]


@run
async def test_those_who_wait_get_it_one_at_a_time_in_the_order_in_which_they_came() -> None:
    lock, seen = Lock(), []

    async def worker(number: int) -> None:
        async with lock:
            seen.append((number, "in"))
            await trio.sleep(1)
            seen.append((number, "out"))

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(worker, number)
            await trio.testing.wait_all_tasks_blocked()
    assert seen == [(number, what) for number in range(4) for what in ("in", "out")]
    assert not lock.locked()


@run
async def test_who_comes_between_the_end_of_one_and_the_begin_of_the_next_has_to_wait() -> None:
    lock, order = Lock(), []

    async def waiter(name: str) -> None:
        async with lock:
            order.append(name)

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(waiter, "first")
            await trio.testing.wait_all_tasks_blocked()
        assert lock.locked(), "it is the first one's, though that has not gone on yet"
        async with lock:
            order.append("second")
    assert order == ["first", "second"]


@run
async def test_who_is_cancelled_while_waiting_leaves_no_trace() -> None:
    lock = Lock()
    async with trio.open_nursery() as nursery:
        async with lock:
            with trio.move_on_after(1) as scope:
                async with lock:
                    pytest.fail("it was taken twice")
            assert scope.cancelled_caught and lock.locked()
        assert not lock.locked()
        nursery.start_soon(lock.__aenter__)
    assert lock.locked()


@run
async def test_an_error_inside_gives_it_back() -> None:
    lock = Lock()
    with pytest.raises(ValueError):
        async with lock:
            raise ValueError
    assert not lock.locked()
