"""The lane with a socket in the kernel's place: who leads, what waits, what is answered and what is refused."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cache import wishes
from cachefs.cache.page import PAGE_SIZE
from cachefs.transport import lane as lane_module
from cachefs.transport import wire
from cachefs.transport.lane import IDLE_MAX, Lane, until_it_waits
from fake_kernel import NODE_OF_ROOT, Kernel, transfer
from world import World

DATA = os.urandom(3 * PAGE_SIZE)
UNANSWERED = (wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT)


class Stage:
    """A lane that serves a directory with the file `f`."""

    def __init__(self, world: World, kernel: Kernel, lane: Lane) -> None:
        self.world, self.kernel, self.lane = world, kernel, lane
        self.gate = trio.Event()  # what `hold` waits for

    def hold(self, op: str) -> None:
        """Every call of this handler waits until the gate is opened."""
        self.lane._quick.pop(getattr(wire, op.upper()), None)
        handler = self.lane._handlers[getattr(wire, op.upper())]

        async def held(request: wire.Request) -> object:
            await self.gate.wait()
            return await handler(request)

        self.lane._handlers[getattr(wire, op.upper())] = held

    def count(self, op: str) -> int:
        return sum(self.lane.durations[op].counts)


@asynccontextmanager
async def staged(top: Path, **options: object) -> AsyncIterator[Stage]:
    (top / "f").write_bytes(DATA)
    kernel = Kernel()
    async with trio.open_nursery() as nursery:
        world = World(nursery, top, **options)  # type: ignore[arg-type]
        lane = Lane(kernel.lane_fd, world.fs, "off", 1.0)
        ended = trio.Event()

        async def serve() -> None:
            await lane.run()
            ended.set()

        nursery.start_soon(serve)
        with trio.fail_after(30):
            await kernel.must(wire.STATFS)
            yield Stage(world, kernel, lane)
            kernel.close()
            await ended.wait()
        assert lane._workers == 0 and not lane._idle
        lane.close()
        world.check()
        await world.shut()
        nursery.cancel_scope.cancel()


def test_a_file_is_found_read_written_and_let_go_of(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel, before = stage.kernel, len(stage.world.table)
            node, handle = await kernel.open(b"f")
            for _ in range(2):  # a miss, then a hit
                assert (await kernel.must(wire.READ, node, transfer(handle, 10, len(DATA)))).data == DATA[10:]
            written = await kernel.must(wire.WRITE, node, transfer(handle, 1, 5, b"world"))
            assert wire.WRITTEN.unpack(written.data) == (5, 0)
            assert (await kernel.must(wire.READ, node, transfer(handle, 0, 8))).data == DATA[:1] + b"world" + DATA[6:8]
            assert stage.count("read") == 3 and stage.count("write") == 1 and stage.count("lookup") == 1
            await kernel.must(wire.FSYNC, node, handle.to_bytes(16, "little"))
            await kernel.must(wire.RELEASE, node, handle.to_bytes(24, "little"))
            wishes.drop(stage.world.cache, stage.world.table.get(node).file)  # type: ignore[arg-type]  # it was open
            kernel.send(wire.FORGET, node, (1).to_bytes(8, "little"))
            await kernel.must(wire.STATFS)  # requests are handled in their order
            assert len(stage.world.table) == before
            assert (tmp_path / "f").read_bytes() == DATA[:1] + b"world" + DATA[6:]

    trio.run(main)


def test_a_write_of_whole_pages_waits_for_nobody_and_is_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel = stage.kernel
            stage.hold("write")
            node, handle = await kernel.open(b"f")
            written = await kernel.must(wire.WRITE, node, transfer(handle, PAGE_SIZE, PAGE_SIZE, b"w" * PAGE_SIZE))
            assert wire.WRITTEN.unpack(written.data) == (PAGE_SIZE, 0) and stage.count("write") == 1
            waits = kernel.send(wire.WRITE, node, transfer(handle, 1, 2, b"--"))  # the rest of its page is read first
            await kernel.must(wire.STATFS)
            assert stage.count("write") == 1
            stage.gate.set()
            assert wire.WRITTEN.unpack((await kernel.reply(waits)).data) == (2, 0) and stage.count("write") == 2
            assert (await kernel.must(wire.READ, node, transfer(handle, 0, 4))).data == DATA[:1] + b"--" + DATA[3:4]

    trio.run(main)


def test_after_the_end_no_request_is_read_though_others_had_their_turn_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel, lane = stage.kernel, stage.lane
            node, handle = await kernel.open(b"f")
            give_turn, answer_hit = lane._give_turn, lane._answer_hit

            def slow_hit(*request: int) -> bool:
                lane._turn_ends = 0.0
                return answer_hit(*request)

            async def end() -> None:
                await give_turn()
                lane.terminate()
                kernel.send(wire.WRITE, node, transfer(handle, 0, PAGE_SIZE, b"w" * PAGE_SIZE))

            lane._give_turn, lane._answer_hit = end, slow_hit  # type: ignore[method-assign]
            kernel.send(wire.READ, node, transfer(handle, 0, 16))
            with trio.fail_after(10):
                while lane._workers:
                    await trio.lowlevel.checkpoint()
            assert stage.world.cache.dirty_pages == 0

    trio.run(main)


def test_lookups_are_taken_back_together_and_one_by_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel = stage.kernel
            for name in (b"a", b"b"):
                (tmp_path / os.fsdecode(name)).touch()
            first = [(await kernel.must(wire.LOOKUP, body=b"a\0")).entry for _ in range(3)]
            second = (await kernel.must(wire.LOOKUP, body=b"b\0")).entry
            assert len(set(first)) == 1
            kernel.send(wire.FORGET, first[0], (2).to_bytes(8, "little"))
            await kernel.must(wire.STATFS)
            assert stage.world.table.get(first[0]).lookups == 1
            pairs = ((first[0], 1), (second, 1), (999999, 1))
            body = len(pairs).to_bytes(8, "little") + b"".join(n.to_bytes(8, "little") for pair in pairs for n in pair)
            kernel.send(wire.BATCH_FORGET, 0, body)
            await kernel.must(wire.STATFS)
            for node in (first[0], second):
                with pytest.raises(KeyError):
                    stage.world.table.get(node)

    trio.run(main)


def test_hits_are_answered_while_others_wait(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel = stage.kernel
            node, handle = await kernel.open(b"f")
            await kernel.must(wire.READ, node, transfer(handle, 0, 4096))
            stage.hold("getattr")
            waiting = [kernel.send(wire.GETATTR, node, bytes(16)) for _ in range(3 * IDLE_MAX)]
            for i in range(50):
                assert (await kernel.must(wire.READ, node, transfer(handle, i, 100))).data == DATA[i : i + 100]
            assert not set(waiting) & set(kernel.replies())
            assert stage.lane._workers == len(waiting) + 1
            stage.gate.set()
            for unique in waiting:
                assert not (await kernel.reply(unique)).errno
            await kernel.must(wire.STATFS)
            assert stage.lane._workers <= IDLE_MAX + 1

    trio.run(main)


def test_with_too_many_waiting_the_first_that_is_done_leads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "WORKERS_MAX", 3)

    async def main() -> None:
        async with staged(tmp_path) as stage:
            stage.hold("getattr")
            waiting = [stage.kernel.send(wire.GETATTR, NODE_OF_ROOT, bytes(16)) for _ in range(5)]
            while stage.lane._led:
                await trio.sleep(0)
            assert stage.lane._workers == 3
            stage.gate.set()
            for unique in waiting:
                assert not (await stage.kernel.reply(unique)).errno

    trio.run(main)


def test_a_request_that_waits_keeps_its_own_data(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel = stage.kernel
            node, handle = await kernel.open(b"f")
            stage.hold("write")
            sent = [kernel.send(wire.WRITE, node, transfer(handle, 10 * i, 4, b"%04d" % i)) for i in range(20)]
            assert (await kernel.ask(wire.STATFS)).errno == 0
            stage.gate.set()
            for unique in sent:
                assert not (await kernel.reply(unique)).errno
            got = (await kernel.must(wire.READ, node, transfer(handle, 0, 200))).data
            assert [got[10 * i : 10 * i + 4] for i in range(20)] == [b"%04d" % i for i in range(20)]

    trio.run(main)


def test_readahead_starts_after_the_reply_to_a_hit(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "long").write_bytes(os.urandom(64 * PAGE_SIZE))
        async with staged(tmp_path, pages=64, readahead_pages=16) as stage:
            kernel = stage.kernel
            node, handle = await kernel.open(b"long", os.O_RDONLY)
            for page in range(64):
                await kernel.must(wire.READ, node, transfer(handle, page * PAGE_SIZE, PAGE_SIZE))
            assert stage.world.cache.readahead_used > 40
            assert stage.world.cache.reads_hit > stage.world.cache.reads_miss

    trio.run(main)


def test_an_interrupt_has_no_answer_and_what_it_interrupts_has_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            stage.hold("getattr")
            waiting = stage.kernel.send(wire.GETATTR, NODE_OF_ROOT, bytes(16))
            interrupt = stage.kernel.send(wire.INTERRUPT, 0, waiting.to_bytes(8, "little"))
            await stage.kernel.must(wire.STATFS)
            stage.gate.set()
            assert not (await stage.kernel.reply(waiting)).errno
            assert interrupt not in stage.kernel.replies()

    trio.run(main)


@pytest.mark.parametrize(
    ("opcode", "body", "expected"),
    [
        (4711, b"", errno.ENOSYS),  # no such operation
        (46, bytes(24), errno.ENOSYS),  # LSEEK: the kernel goes on without
        (wire.LOOKUP, b"none\0", 0),  # a negative entry or ENOENT, see below
        (wire.LOOKUP, b"f", errno.EIO),  # a name without an end
        (wire.LOOKUP, b"../f\0", errno.EIO),
        (wire.UNLINK, b"..\0", errno.EIO),
        (wire.RENAME, bytes(8) + b"f\0../g\0", errno.EIO),
        (wire.READ, b"", errno.EIO),
        (wire.READ, transfer(1, 0, 1 << 31), errno.EIO),
        (wire.READ, transfer(4711, 0, 4096), errno.EIO),  # no such handle
        (wire.WRITE, transfer(1, 0, 100, b"short"), errno.EIO),
        (wire.SETXATTR, (100).to_bytes(8, "little") + b"user.x\0short", errno.EIO),
        (wire.GETATTR, b"", 0),
    ],
)
def test_what_cannot_be_understood_gets_an_errno(
    tmp_path: Path, opcode: int, body: bytes, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            reply = await stage.kernel.ask(opcode, NODE_OF_ROOT, body)
            assert reply.errno in ((0, errno.ENOENT) if body == b"none\0" else (expected,))
            assert (await stage.kernel.must(wire.LOOKUP, body=b"f\0")).entry > 1

    trio.run(main)
    assert (tmp_path / "f").exists()


def test_a_message_that_lies_about_its_length_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            kernel = stage.kernel
            kernel.send_raw(b"x")
            kernel.send_raw(bytes(39))
            for length in (0, 39, 1 << 31):
                assert (await kernel.reply(kernel.send(wire.STATFS, length=length))).errno == errno.EIO
            await kernel.must(wire.STATFS)
            assert len(kernel.replies()) == 5

    trio.run(main)
    assert "cannot be understood: it has 1 bytes" in caplog.text


def test_a_handler_that_breaks_is_eio_and_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:

            async def broken(request: wire.Request) -> object:
                raise RuntimeError("broken")

            stage.lane._handlers[wire.GETATTR] = broken
            stage.lane._quick[wire.GETATTR] = lambda request: None
            assert (await stage.kernel.ask(wire.GETATTR, NODE_OF_ROOT, bytes(16))).errno == errno.EIO
            await stage.kernel.must(wire.STATFS)

    with caplog.at_level(logging.ERROR):
        trio.run(main)
    assert "RuntimeError: broken" in caplog.text


@given(opcode=st.integers(0, 60), node=st.integers(0, 3) | st.integers(0, 2**64 - 1), body=st.binary(max_size=160))
def test_no_message_whatever_is_in_it_ends_the_session(
    tmp_path_factory: pytest.TempPathFactory, opcode: int, node: int, body: bytes
) -> None:
    async def main() -> None:
        async with staged(tmp_path_factory.mktemp("top")) as stage:
            unique = stage.kernel.send(opcode, node, body)
            if opcode not in UNANSWERED:
                await stage.kernel.reply(unique)
            assert (await stage.kernel.must(wire.LOOKUP, body=b"f\0")).entry > 1

    logging.disable(logging.CRITICAL)
    try:
        trio.run(main)
    finally:
        logging.disable(logging.NOTSET)


def test_after_terminate_no_request_is_read_and_those_under_way_are_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(tmp_path) as stage:
            stage.hold("getattr")
            waiting = stage.kernel.send(wire.GETATTR, NODE_OF_ROOT, bytes(16))
            await stage.kernel.must(wire.STATFS)
            stage.lane.terminate()
            late = stage.kernel.send(wire.STATFS)
            stage.gate.set()
            assert not (await stage.kernel.reply(waiting)).errno
            while stage.lane._workers:
                await trio.sleep(0)
            assert late not in stage.kernel.replies()

    trio.run(main)


@pytest.mark.parametrize(("number", "words"), [(errno.EINVAL, "the kernel refuses"), (errno.ENOENT, ""), (errno.ENODEV, "")])
def test_an_answer_that_the_kernel_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, words: str
) -> None:
    def refuse(fd: int, parts: object) -> int:
        raise OSError(number, os.strerror(number))

    async def main() -> None:
        async with staged(tmp_path) as stage:
            before = stage.count("statfs")
            monkeypatch.setattr(lane_module, "writev", refuse)
            unique = stage.kernel.send(wire.STATFS)
            if words:
                assert (await stage.kernel.reply(unique)).errno == errno.EIO
            while stage.count("statfs") == before:
                await trio.sleep(0)
            monkeypatch.undo()
            await stage.kernel.must(wire.STATFS)

    trio.run(main)
    assert words in caplog.text and bool(caplog.text) == bool(words)


# --- until_it_waits


def driven(coroutine: Callable[[], Awaitable[None]]) -> tuple[bool, list[str]]:
    said: list[str] = []

    async def main() -> bool:
        return await until_it_waits(coroutine(), lambda: said.append("waits"))  # type: ignore[arg-type]

    return trio.run(main), said


def test_a_coroutine_that_never_waits_hands_nothing_on() -> None:
    async def quick() -> None:
        return

    assert driven(quick) == (False, [])


def test_a_coroutine_that_waits_several_times_hands_on_once_and_gets_its_results() -> None:
    async def slow() -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        assert await trio.to_thread.run_sync(lambda: 7) == 7

    assert driven(slow) == (True, ["waits"])


def test_errors_and_cancelling_pass_through() -> None:
    async def failing() -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        driven(failing)

    async def main() -> None:
        with trio.move_on_after(0.01) as scope:
            await until_it_waits(trio.sleep_forever(), lambda: None)  # type: ignore[arg-type]
        assert scope.cancelled_caught

    trio.run(main)


def test_a_write_that_the_journal_cannot_take_is_on_the_backing_when_it_returns_and_counted_once(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "state").mkdir()

    async def main() -> None:
        async with staged(tmp_path / "source", journal=tmp_path / "state") as stage:
            kernel, world = stage.kernel, stage.world
            node, handle = await kernel.open(b"f")
            journal = world.keeper.journal
            assert journal is not None
            put_one = journal.put_one

            def refuse(*arguments: object) -> None:
                raise OSError(errno.ENOSPC, "no room")

            for number in (1, 2):  # the first, and one when that is known
                journal.put_one = refuse  # type: ignore[method-assign,assignment]
                await kernel.must(wire.WRITE, node, transfer(handle, 0, PAGE_SIZE, bytes([number]) * PAGE_SIZE))
                assert (tmp_path / "source" / "f").read_bytes()[:PAGE_SIZE] == bytes([number]) * PAGE_SIZE
                assert world.keeper.written_through == number
                assert world.cache.accounts.total("write_bytes") == number * PAGE_SIZE and stage.count("write") == number
            journal.put_one = put_one  # type: ignore[method-assign]
            await kernel.must(wire.WRITE, node, transfer(handle, 0, PAGE_SIZE, b"3" * PAGE_SIZE))
            assert world.keeper.written_through == 2 and not world.keeper.failing and world.cache.dirty_pages == 1

    trio.run(main)
