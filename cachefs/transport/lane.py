"""The fast lane: requests read from the kernel's descriptor and answered in plain Python, without libfuse and pyfuse3.

Several workers, one of which leads: it alone reads requests, and handles each itself, at once. A hit never waits, so the
leader goes from hit to hit with no other task, no lock and no scheduler in between. Where a handler has to wait (a miss
that needs a thread, a writer held back), the leader hands the lead on just before it does so, and its own request goes on
where it is. So there is one way to handle a request, whether it waits or not, and hits are never behind somebody's miss.
"""

import contextlib
import errno
import functools
import logging
import mmap
import os
import types
from collections.abc import Callable, Coroutine, Generator
from os import writev
from time import perf_counter
from typing import Any

import trio
from pyfuse3 import FUSEError

from cachefs.fs import FileSystem
from cachefs.statistics import Histogram
from cachefs.transport import wire
from cachefs.transport.cpulatency import CpuLatency
from cachefs.transport.dispatch import Answer, Dispatch, WireOperations
from cachefs.transport.negotiate import REQUEST_MAX_BYTES
from cachefs.transport.quick import Quick
from cachefs.transport.waiting import Waiting
from cachefs.transport.wire import IN_HEADER, OUT_HEADER, READ, READ_BYTES, REQUEST, WRITE, WRITE_DATA, WRITTEN, Request

log = logging.getLogger(__name__)

TURN_SECONDS = 0.0005  # at most that long without a turn for other tasks, however many hits there are
WORKERS_MAX = 500  # requests under way at once: some hundred that wait for SOURCE must not keep hits from being answered
HUGE_WORKERS = 2  # who have a whole huge page each
IDLE_MAX = 8  # workers kept for the next requests that wait
HEADER_BYTES = IN_HEADER.size
OUT_HEADER_BYTES, pack_header = OUT_HEADER.size, OUT_HEADER.pack
GONE = (errno.ENOENT, errno.ENODEV, errno.EPERM, errno.ECONNABORTED)  # nobody waits for that answer any more


class Lane:
    """Serves one mount whose INIT has been answered, on `fd`, which it owns.

    `cpu_latency`: idle processors may be kept ready while requests come one after another.
    """

    def __init__(
        self,
        fd: int,
        fs: FileSystem,
        kernel_cache: str,
        ttl_seconds: float,
        begun: Callable[[], None] = lambda: None,
        cpu_latency: bool = True,
    ) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.begun = begun
        operations = WireOperations(fs, kernel_cache, ttl_seconds, functools.partial(self.invalidate, attributes_only=True))
        self.durations = operations.durations
        self._handlers = Dispatch(operations).handlers
        self._quick = Quick(operations).handlers
        self._files = operations.files
        self._read_durations: Histogram = operations.durations["read"]
        self._write_durations: Histogram = operations.durations["write"]
        self._waiting = Waiting(fd, CpuLatency(cpu_latency))
        self._turn_ends = 0.0  # when other tasks have theirs
        self._workers = 0
        self._idle: list[trio.lowlevel.Task] = []  # workers with nothing to do, the latest last
        self._led = False  # whether one of the workers leads
        self._over = False
        self._nursery: trio.Nursery | None = None
        self._forgetting = trio.CapacityLimiter(1)

    # --- as a session ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves until the file system is unmounted, or `terminate` was called; ends when the last request is answered."""
        await self._waiting.start()
        try:
            async with trio.open_nursery() as self._nursery:
                self._hand_on()
                self.begun()
        finally:
            self._waiting.stop()

    @property
    def ready_seconds(self) -> float:
        return self._waiting.latency.seconds

    def when_asked(self, rouse: Callable[[], None]) -> bool:
        self._waiting.rouse = rouse
        return self._waiting.sleeps_for_all

    def terminate(self) -> None:
        """Reads no more requests."""
        self._end()
        trio.lowlevel.notify_closing(self.fd)

    def close(self) -> None:
        os.close(self.fd)

    def invalidate(self, node: int, attributes_only: bool = False) -> None:
        """Makes the kernel forget what it has cached of an inode; OSError if it does not know it.

        Waits for requests of ours unless `attributes_only`: then not for the trio thread.
        """
        os.write(self.fd, wire.inval_inode(node, attributes_only))

    def forget_name(self, parent: int, name: bytes) -> None:
        """Makes the kernel look a name up again, soon."""
        if self._nursery is not None and not self._over:
            self._nursery.start_soon(self._forget_name, wire.inval_entry(parent, name))

    async def _forget_name(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it may not know the name, or be unmounted by now
            # In a thread, one at a time: it waits for requests of ours.
            await trio.to_thread.run_sync(os.write, self.fd, message, limiter=self._forgetting, abandon_on_cancel=True)

    # --- workers --------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """One worker, the leader at first. Its buffer is its own: a request that waits keeps what it has not used yet."""
        buffer = _buffer(self._workers)
        vector, body, unpack = [buffer], memoryview(buffer)[HEADER_BYTES:], REQUEST.unpack_from
        quick, fd, clock, readv = self._quick, self.fd, perf_counter, os.readv
        waiting, expect = self._waiting, self._waiting.expect
        empty = False  # whether there was none lately: then to ask whether there is one costs less than to try
        try:
            while True:
                try:
                    if clock() > self._turn_ends:
                        await self._give_turn()
                    if self._over:
                        break
                    if empty and expect():
                        empty = not waiting.at_once
                    length = readv(fd, vector)
                except OSError as error:  # mostly there is none
                    length = await self._receive(vector, error)
                    empty = True
                if not length:
                    self._end()
                    break
                said, opcode, unique, node, uid, gid, pid, _, handle, offset, size = unpack(buffer)
                if length != said or length < HEADER_BYTES:
                    self._refuse(length, opcode, unique)
                    continue
                if opcode == READ:
                    answered = length == READ_BYTES and self._answer_hit(unique, handle, offset, size)
                elif opcode == WRITE:
                    data = body[WRITE_DATA : length - HEADER_BYTES]
                    answered = self._answer_write(unique, handle, offset, size, data)
                else:
                    answered = False
                if not answered:
                    request = Request(unique, node, uid, gid, pid, body[: length - HEADER_BYTES])
                    if opcode in quick and (answer := quick[opcode](request)) is not None:
                        (self._answer_error if isinstance(answer, int) else self._answer)(unique, answer)
                    elif await until_it_waits(self._serve(opcode, request), self._hand_on) and not await self._wait_for_lead():
                        break
        finally:
            self._workers -= 1

    def _hand_on(self) -> None:
        """Makes another worker the leader; if there are too many, the next one that is done will be."""
        self._led = bool(self._idle) or self._workers < WORKERS_MAX
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop())
        elif self._led and self._nursery is not None:
            self._workers += 1
            self._nursery.start_soon(self._work)
        else:
            self._waiting.latency.let_go()

    async def _wait_for_lead(self) -> bool:
        """By a worker whose request had to wait; False if it is one too many."""
        if not self._led:
            self._led = True
            return True
        if self._over or len(self._idle) >= IDLE_MAX:
            return False
        task = trio.lowlevel.current_task()
        self._idle.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        return True

    def _end(self) -> None:
        self._over = True
        while self._idle:
            trio.lowlevel.reschedule(self._idle.pop())

    # --- requests -------------------------------------------------------------------------------------------------------

    async def _give_turn(self) -> None:
        """To other tasks that can go on."""
        await self._waiting.give_turn()
        self._turn_ends = perf_counter() + TURN_SECONDS

    async def _receive(self, vector: list[bytearray | mmap.mmap], problem: OSError) -> int:
        """The length of the next request, which is in `vector` then, after a look that ended in `problem`; 0: there is none."""
        error: OSError | None = problem
        while not self._over:
            if error is None:
                try:
                    length = os.readv(self.fd, vector)
                    self._waiting.found()
                    return length
                except OSError as another:
                    error = another
            if isinstance(error, BlockingIOError):
                if await self._waiting.wait():
                    self._turn_ends = perf_counter() + TURN_SECONDS
            elif error.errno in (errno.ENODEV, errno.ECONNABORTED):  # unmounted, or told to abort
                break
            elif error.errno != errno.ENOENT:  # else that one was taken back before we had it
                raise error
            error = None
        return 0

    def _answer_hit(self, unique: int, handle: int, offset: int, size: int) -> bool:
        """Answers a READ whose pages are all here; False, and nothing done, if they are not."""
        start, files = perf_counter(), self._files
        try:
            view = files.read_now(handle, offset, size)
        except KeyError:
            return False
        if view is None:
            return False
        self._answer(unique, view)
        self._read_durations.observe(perf_counter() - start)
        if files.ahead is not None:
            files.prefetch()  # after the reply: to make room could take the pages from under it
        return True

    def _answer_write(self, unique: int, handle: int, offset: int, size: int, data: memoryview) -> bool:
        """Answers a WRITE that has nothing to wait for; False, and it is to be done anew, if it has, or cannot be done."""
        start = perf_counter()
        try:
            if len(data) != size or not self._files.write_now(handle, offset, data):
                return False
        except Exception:  # the other way tells what went wrong
            return False
        self._answer(unique, WRITTEN.pack(size, 0))
        self._write_durations.observe(perf_counter() - start)
        return True

    async def _serve(self, opcode: int, request: Request) -> None:
        """Handles a request and answers it; whatever goes wrong is an errno for whoever asked, and no more."""
        handler = self._handlers.get(opcode)
        if handler is None:
            self._answer_error(request.unique, errno.ENOSYS)
            return
        try:
            answer = await handler(request)
        except FUSEError as error:
            self._answer_error(request.unique, error.errno)
        except Exception:
            log.exception("a request of kind %d failed", opcode)
            self._answer_error(request.unique, errno.EIO)
        else:
            if answer is not None:
                self._answer(request.unique, answer)

    def _refuse(self, length: int, opcode: int, unique: int) -> None:
        log.error("a request of kind %d cannot be understood: it has %d bytes", opcode, length)
        if length >= HEADER_BYTES:
            self._answer_error(unique, errno.EIO)

    # --- answers --------------------------------------------------------------------------------------------------------

    def _answer(self, unique: int, answer: Answer) -> None:
        try:
            writev(self.fd, (pack_header(OUT_HEADER_BYTES + len(answer), 0, unique), answer))
        except OSError as error:
            if error.errno not in GONE:
                log.error("the kernel refuses an answer of %d bytes: %s", len(answer), error.strerror)
                self._answer_error(unique, errno.EIO)

    def _answer_error(self, unique: int, number: int) -> None:
        try:
            os.write(self.fd, OUT_HEADER.pack(OUT_HEADER.size, -number, unique))
        except OSError as error:
            if error.errno not in GONE:
                log.error("the kernel refuses an errno: %s", error.strerror)


def _buffer(worker: int) -> bytearray | mmap.mmap:
    """Memory for a request. The first workers have a huge page, if the kernel has any: it copies there in a tenth less time."""
    if worker > HUGE_WORKERS:
        return bytearray(REQUEST_MAX_BYTES)
    memory = mmap.mmap(-1, -(-REQUEST_MAX_BYTES >> 21 << 21), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@types.coroutine
def until_it_waits(coroutine: Coroutine[Any, Any, None], hand_on: Callable[[], None]) -> Generator[Any, Any, bool]:
    """Runs `coroutine`, and calls `hand_on` just before it gives its turn away for the first time; whether it did."""
    try:
        trap = coroutine.send(None)
    except StopIteration:
        return False
    hand_on()
    try:
        while True:
            trap = coroutine.send((yield trap))
    except StopIteration:
        return True
    finally:
        coroutine.close()
