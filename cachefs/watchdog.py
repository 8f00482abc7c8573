"""Whether a backing far away answers, and how long anybody waits for it.

A call that was begun is never given up: its thread has memory and descriptors of ours, and holds them until it is back. So
it is the waiting that is bounded. The watchdog knows every call under way and everybody who waits, and looks at them ten
times a second:

    the backing is   when                                                   then
    silent           a call has had no answer for about a second, and       what is known is answered from memory
                     neither has a probe that was sent after it
    lost             it has been silent for `timeout_seconds`, or says      what needs it fails at once
                     that it is not there (`GONE`)

Who has waited for `timeout_seconds` while any call is overdue fails as well: what it waits for, a lock or a page, may hang
on that call. As long as calls come back, however slowly, nobody fails. Any call that comes back ends the silence.
"""

import contextlib
import errno
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar

import trio

from cachefs.question import CHANGES, QUESTION, Question, T
from cachefs.tasks import Spawner

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
STALL_SECONDS = 1.0  # looks that far apart: it was us who slept, and answers may lie there unread
SUSPECT_SECONDS = 1.0  # a call without an answer for so long makes us ask whether there is anybody
SYNCS = frozenset(("fsync", "syncfs"))
SYNC_TIMES = 10  # how much longer these may take while others are answered: nobody knows how much there is to write
SLOWEST_BYTES_PER_SECOND = 256 << 10  # what a link may need for a long write before that counts as no answer
OVERDUE_MAX = 256  # overdue calls whose places others may take: so many more threads than there are places
GONE = frozenset((
    errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNRESET, errno.ECONNREFUSED, errno.ESHUTDOWN, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
))  # fmt: skip
GONE_SAYS_PROBE = GONE | {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


class Unreachable(OSError):
    """The backing does not answer, or says that it is not there."""


class Call:
    """A call to the backing under way; overdue when it has not got on for its time, more than others have for what is long."""

    __slots__ = ("allowed_seconds", "clock", "got_on_at", "limiter", "op", "scope", "since", "timeout_seconds")

    def __init__(self, op: str, timeout_seconds: float, limiter: trio.CapacityLimiter, clock: Callable[[], float]) -> None:
        self.op = op
        self.timeout_seconds = timeout_seconds
        self.allowed_seconds = timeout_seconds * SYNC_TIMES if op in SYNCS else timeout_seconds
        self.clock = clock
        self.since = clock()  # when it began, or last got on
        self.got_on_at = -math.inf
        self.limiter: trio.CapacityLimiter | None = limiter  # where it has a place; None = it has lost it to another one
        self.scope = trio.CancelScope(shield=True)  # for the end of the mount alone, see `Watchdog.abandon`

    def overdue(self, now: float) -> bool:
        return now - self.since >= self.allowed_seconds

    def get_on(self, nbytes: int) -> None:
        """Its thread did a part, and begins another one of `nbytes`."""
        self.got_on_at = self.since = self.clock()
        self.allowed_seconds = self.timeout_seconds + nbytes / SLOWEST_BYTES_PER_SECOND


_call: ContextVar[Call | None] = ContextVar("call", default=None)  # threads have the context of who started them


def getting_on(nbytes: int) -> None:
    """To be called by a thread before each part of a long write."""
    call = _call.get()
    if call is not None:
        call.get_on(nbytes)


class Wait:
    """Somebody who waits. `memory` gives the answer, or None where only the backing has it."""

    __slots__ = ("known", "memory", "scope", "since")

    def __init__(self, since: float, memory: Callable[[], object | None] | None) -> None:
        self.since = since
        self.memory = memory
        self.known: object | None = None  # what `memory` gave
        self.scope = trio.CancelScope()


class Watchdog:
    """Watches the calls to one backing. `probe` is a small call; `tasks` runs what goes on when nobody waits for it any more.

    Without `tasks` it lets everybody wait: a local backing is not watched.
    """

    def __init__(
        self,
        tasks: Spawner | None,
        timeout_seconds: float,
        probe: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tasks = tasks
        self.timeout_seconds = timeout_seconds
        self.silent = self.lost = False
        self.silent_seconds = 0.0  # since anything was heard of a backing that owes us an answer
        self.timeouts = 0  # requests and calls that failed because of it
        self.came_back: Callable[[], None] = lambda: None  # told when a lost backing answers again
        self._probe = probe
        self._clock = clock
        self._suspect_seconds = min(SUSPECT_SECONDS, timeout_seconds / 4)
        self._calls: dict[Call, None] = {}
        self._waits: dict[Wait, None] = {}
        self._places_lost = 0
        self._heard_at = self._looked_at = clock()
        self._gone = False  # what the last probe said
        self._doubted = False  # a call said that the backing is gone: a probe is to tell
        self._verdict = trio.lowlevel.ParkingLot()  # who waits for the next probe to end
        self._probed_at = -math.inf
        self._probing: trio.CancelScope | None = None
        self._lost_at = 0.0
        self._ended = False
        self._wake = trio.Event()

    @property
    def watching(self) -> bool:
        return self.tasks is not None

    # --- who waits -----------------------------------------------------------------------------------------------------

    async def ask(
        self,
        function: Callable[..., Awaitable[T]],
        args: tuple[object, ...],
        memory: Callable[[], T | None] | None,
        undo: Callable[[T], Awaitable[object]] | None,
    ) -> T:
        """`function(*args)`, or what `memory` knows if the backing is silent; Unreachable when that has taken too long.

        `function` goes on then, as far as `Question` says, and `undo` gets what it returns.
        """
        assert self.tasks is not None
        if memory is not None and self.silent and (known := memory()) is not None:
            return known
        question = Question(function, args, undo, self.tasks)
        try:
            with self.patience(memory) as wait:
                self.tasks.start_soon(question.run)
                await question.done.wait()
            return question.take() if wait.known is None else wait.known  # type: ignore[return-value]  # it is memory's T
        except Unreachable:
            if memory is not None and await self._is_confirmed() and (known := memory()) is not None:
                return known
            raise
        finally:
            question.give_up()

    async def _is_confirmed(self) -> bool:
        """Whether the backing is lost, once a probe has told: one file or one file system inside may be what is not there."""
        with trio.move_on_after(2 * self._suspect_seconds):
            while self._doubted and not self.silent:
                await self._verdict.park()
        return self.silent

    @contextlib.contextmanager
    def patience(self, memory: Callable[[], object | None] | None = None) -> Iterator[Wait]:
        """Bounds what is awaited inside, which has to bear being cancelled; raises Unreachable when it has taken too long."""
        wait = Wait(self._clock(), memory)
        if self.tasks is None:
            yield wait
            return
        self.check()
        self._waits[wait] = None
        self._wake.set()
        try:
            with wait.scope:
                yield wait
        finally:
            del self._waits[wait]
        if wait.scope.cancelled_caught and wait.known is None:
            raise self.refusal()

    def check(self) -> None:
        """Raises Unreachable if the backing is lost."""
        if self.lost:
            self._judge(self._clock())
        if self.lost or self._ended:
            raise self.refusal()

    def refusal(self) -> Unreachable:
        """What to raise for want of an answer."""
        self.timeouts += 1
        return Unreachable(self.errno, os.strerror(self.errno))

    @property
    def errno(self) -> int:
        """What is wrong with the backing, as programs are told."""
        return errno.EIO if self._gone else errno.ETIMEDOUT

    # --- calls ---------------------------------------------------------------------------------------------------------

    async def begin(self, op: str, limiter: trio.CapacityLimiter) -> Call:
        """A place for a call, which must end with `end`. Raises Unreachable rather than send one more after those that hang."""
        await trio.lowlevel.checkpoint_if_cancelled()
        must = op == "close"  # a descriptor is never lost, however long it takes to be rid of it
        if not must or self._ended:
            self.check()
        call = Call(op, self.timeout_seconds, limiter, self._clock)
        try:
            limiter.acquire_on_behalf_of_nowait(call)
        except trio.WouldBlock:
            with contextlib.nullcontext() if must else self.patience():
                await limiter.acquire_on_behalf_of(call)
        call.since = self._clock()
        self._calls[call] = None
        self._wake.set()
        _call.set(call)
        question = QUESTION.get()
        if question is not None and op in CHANGES:
            question.changing = True
        return call

    def end(self, call: Call) -> None:
        del self._calls[call]
        if call.limiter is not None:
            call.limiter.release_on_behalf_of(call)
        else:
            self._places_lost -= 1
        self._heard_at = self._clock()  # and whether that changes anything is judged when somebody needs to know

    def doubt(self) -> None:
        """Somebody was told that the backing is not there: is it?"""
        self._doubted = True
        self._wake.set()

    def overdue(self, op: str) -> int:
        """How many calls of this kind are overdue."""
        now = self._clock()
        return sum(call.op == op and call.overdue(now) for call in self._calls)

    def abandon(self) -> None:
        """The mount ends, and nothing of ours is used for anything else again: nobody waits for threads any more.

        Who waits for them should have been cancelled before.
        """
        self._ended = True
        for call in self._calls:
            call.scope.cancel()
        if self._probing is not None:
            self._probing.cancel()

    # --- looking at them -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            if not (self._calls or self._waits or self._gone or self._doubted):
                self._wake = trio.Event()
                await self._wake.wait()
            await trio.sleep(min(TICK_SECONDS, self.timeout_seconds / 10))
            self.look()

    def look(self) -> None:
        now, before = self._clock(), self._looked_at
        self._looked_at = now
        if now - before > STALL_SECONDS:
            return
        self._judge(now)
        if self._wants_probe(now):
            self._probed_at = now
            self._probing = trio.CancelScope(shield=True)
            assert self.tasks is not None
            self.tasks.start_soon(self._ask_whether_there, self._probing)
        overdue = [call for call in self._calls if call.overdue(now)]
        self._let_others_in(overdue)
        for wait in [wait for wait in self._waits if not wait.scope.cancel_called]:
            if self.silent and wait.memory is not None:
                wait.known = wait.memory()
            if wait.known is not None or self.lost or (overdue and now - wait.since >= self.timeout_seconds):
                wait.scope.cancel()

    def _judge(self, now: float) -> None:
        """Decides whether the backing is silent or lost."""
        heard_at = max([self._heard_at, *(call.got_on_at for call in self._calls)])
        oldest = min((call.since for call in self._calls), default=now)
        self.silent_seconds = now - max(heard_at, oldest)
        # A probe may have been sent before something else was heard: what counts is that it has had its time by now.
        unanswered = self._probing is not None and min(self.silent_seconds / 2, now - self._probed_at) >= self._suspect_seconds
        lost = self._gone or (self.lost and self._doubted) or (unanswered and self.silent_seconds >= self.timeout_seconds)
        self.silent = unanswered or lost
        if lost != self.lost and not self._ended:
            self.lost = lost
            self._tell(now)

    def _tell(self, now: float) -> None:
        if self.lost:
            self._lost_at = now - self.silent_seconds
            what = "says that it is not there" if self._gone else f"has not answered for {self.silent_seconds:.1f} s"
            log.error("SOURCE %s: what is cached is still served, all else fails until it answers", what)
        else:
            log.warning("SOURCE answers again, after %.1f s", now - self._lost_at)
            self.came_back()

    def _wants_probe(self, now: float) -> bool:
        if self._probing is not None or now - self._probed_at < self._suspect_seconds:
            return False
        return self._doubted or self._gone or self.silent_seconds >= self._suspect_seconds

    async def _ask_whether_there(self, scope: trio.CancelScope) -> None:
        gone = False
        try:
            with scope:
                await trio.to_thread.run_sync(self._probe, abandon_on_cancel=True)
        except OSError as error:
            gone = error.errno in GONE_SAYS_PROBE
        finally:
            self._probing = None
        self._gone, self._doubted = gone, False
        self._heard_at = self._clock()
        self._judge(self._heard_at)
        self._verdict.unpark_all()

    def _let_others_in(self, overdue: list[Call]) -> None:
        """Calls that hang keep no others from being made: not for ever."""
        for call in overdue:
            if call.limiter is not None and self._places_lost < OVERDUE_MAX:
                call.limiter.release_on_behalf_of(call)
                call.limiter = None
                self._places_lost += 1
