"""A backing that hangs under a whole stack: who is answered, who fails, and what is left of calls that come back late."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import trio

from backing.base import RENAME_EXCHANGE
from cachefs.cache.page import PAGE_SIZE
from cachefs.source import READS_MAX
from world import CALLER, World

TIMEOUT = 0.4
BOUND = TIMEOUT + 2.0  # for a machine that is busy
HANG: dict[str, object] = {"op": "*", "hang": True}
CREATE = os.O_RDWR | os.O_CREAT
Steps = Callable[[World], Awaitable[None]]


def lost(**options: Any) -> Callable[[Steps], Callable[[Path], None]]:
    """A test that gets a World over an empty far away directory, watched and with writeback running."""

    def make(test: Steps) -> Callable[[Path], None]:
        async def main(top: Path) -> None:
            async with trio.open_nursery() as nursery:
                world = World(nursery, top, **{"blocking": True, "timeout_seconds": TIMEOUT, "ttl_seconds": 0.0, **options})
                nursery.start_soon(world.io.watchdog.run)
                nursery.start_soon(world.writeback.run)
                try:
                    with trio.fail_after(60):
                        await test(world)
                        world.check()
                finally:
                    world.backing.set_plan([])
                    with trio.CancelScope(shield=True):
                        await until(lambda: not world.io.watchdog._calls)
                        await world.shut()
                    nursery.cancel_scope.cancel()

        @wraps(test)
        def run(tmp_path: Path) -> None:
            trio.run(main, tmp_path)

        del run.__wrapped__  # type: ignore[attr-defined]  # its parameters are not fixtures
        return run

    return make


async def until(true: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not true():
            await trio.sleep(0.005)


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """What is inside fails with one of these errnos, and in time."""
    start = time.monotonic()
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno in (numbers or (errno.ETIMEDOUT,))
    assert time.monotonic() - start < BOUND


async def lose(world: World, *rules: dict[str, object]) -> None:
    """The backing hangs, and that is known."""
    world.backing.set_plan(rules or [HANG])
    with refused():
        await world.io.ask(world.fs.lookup, world.table.root, b"no such name")
    assert world.io.watchdog.lost


def entry(path: Path, data: bytes = b"") -> Path:
    path.write_bytes(data)
    return path


@lost()
async def test_names_that_are_known_follow_every_change_of_ours(world: World) -> None:
    root, fs = world.table.root, world.fs
    named = world.table.named
    for name in (b"a", b"b", b"c"):
        inode, opened = await fs.creation.create(root, name, 0o100644, CREATE, CALLER)
        await world.release(opened.number)
        assert named(root, name) is inode
    directory = await fs.creation.mkdir(root, b"dir", 0o755, CALLER)
    a, b, c = (named(root, name) for name in (b"a", b"b", b"c"))
    await fs.rename(root, b"a", directory, b"x", 0)
    assert (named(root, b"a"), named(directory, b"x")) == (None, a)
    await fs.rename(root, b"b", directory, b"x", 0)  # over it
    assert (named(root, b"b"), named(directory, b"x")) == (None, b)
    await fs.rename(root, b"c", directory, b"x", RENAME_EXCHANGE)
    assert (named(root, b"c"), named(directory, b"x")) == (b, c)
    assert b is not None
    await fs.link(b, directory, b"link")
    assert named(directory, b"link") is b
    await fs.unlink(root, b"c")
    await fs.unlink(directory, b"link")
    await fs.unlink(directory, b"x")
    await fs.rmdir(root, b"dir")
    assert [named(root, name) for name in (b"a", b"b", b"c", b"dir")] == [None] * 4
    world.table.check()


@lost()
async def test_names_that_are_known_follow_what_others_did_once_it_is_seen(world: World) -> None:
    root = world.table.root
    entry(world.top / "a")
    a = await world.fs.lookup(root, b"a")
    (world.top / "a").rename(world.top / "b")
    assert world.table.named(root, b"a") is a, "nobody has looked"
    with refused(errno.ENOENT):
        await world.fs.lookup(root, b"a")
    assert world.table.named(root, b"a") is None
    entry(world.top / "a")
    new = await world.fs.lookup(root, b"a")
    assert await world.fs.lookup(root, b"b") is a is not new
    assert (world.table.named(root, b"a"), world.table.named(root, b"b")) == (new, a)
    world.fs.forget(a.node, 2)
    world.fs.forget(new.node, 1)
    assert (world.table.named(root, b"a"), world.table.named(root, b"b")) == (None, None), "dropped"


@lost()
async def test_what_is_cached_is_read_and_written_while_the_backing_is_lost_and_the_rest_fails(world: World) -> None:
    entry(world.top / "file", b"x" * 8 * PAGE_SIZE)
    inode, number = await world.open("file")
    await world.read(number, 0, PAGE_SIZE)
    await world.files.write(number, 7 * PAGE_SIZE, b"w" * PAGE_SIZE)
    await world.files.fsync(number, False)
    await lose(world)
    resident = world.cache.resident_pages
    for _ in range(100):  # nobody makes room for pages that cannot come
        assert await world.read(number, 0, PAGE_SIZE) == b"x" * PAGE_SIZE
        with refused():
            await world.read(number, 5 * PAGE_SIZE, PAGE_SIZE)
        with refused():
            await world.files.write(number, 5 * PAGE_SIZE, b"part of a page")
    assert world.cache.resident_pages == resident
    await world.files.write(number, 0, b"y" * PAGE_SIZE)
    assert await world.read(number, 0, PAGE_SIZE) == b"y" * PAGE_SIZE
    with refused():
        await world.io.ask(world.files.fsync, number, False)
    assert inode.unwritten and not inode.error_count, "nothing was tried that had to fail"
    world.backing.set_plan([])
    await until(lambda: not world.io.watchdog.lost)
    await world.files.fsync(number, False)
    assert (world.top / "file").read_bytes() == b"y" * PAGE_SIZE + b"x" * 6 * PAGE_SIZE + b"w" * PAGE_SIZE


@lost(expire_seconds=0.0, interval_seconds=0.05)
async def test_writeback_waits_for_a_lost_backing_and_goes_on_at_once_when_it_is_back(world: World) -> None:
    inode, number = await world.open("file")
    world.backing.set_plan([{"op": "pwritev", "errno": "EIO"}])
    await world.files.write(number, 0, b"data")
    await until(lambda: inode.retry_seconds >= 2.0)  # seconds of pause that it would have to wait out
    await lose(world)
    errors, dirty = inode.error_count, inode.unwritten
    await trio.sleep(0.3)
    assert dirty and inode.error_count == errors, "not tried while the backing is lost"
    start = time.monotonic()
    world.backing.set_plan([])
    await until(lambda: not inode.unwritten)
    assert time.monotonic() - start < 2.0
    assert (world.top / "file").read_bytes() == b"data"


@lost(limit_pages=8, background_pages=4)
async def test_a_writer_at_the_limit_fails_in_time_and_its_data_does_not_appear_later(world: World) -> None:
    inode, number = await world.open("file")
    await world.files.write(number, 0, b"a" * 4 * PAGE_SIZE)
    world.backing.set_plan([HANG])
    with refused():
        for i in range(4, 12):
            await world.files.write(number, i * PAGE_SIZE, b"b" * PAGE_SIZE)
    assert i >= 7, "there was room"
    written = i * PAGE_SIZE
    world.backing.set_plan([])
    await until(lambda: not world.io.watchdog.lost)
    await world.files.fsync(number, False)
    assert (world.top / "file").read_bytes() == b"a" * 4 * PAGE_SIZE + b"b" * (written - 4 * PAGE_SIZE)
    assert inode.file is not None and inode.file.size == written


@lost(limit_pages=32, background_pages=1, pages=128)
async def test_files_whose_writeback_hangs_do_not_hold_up_others(world: World) -> None:
    world.backing.set_plan([{"op": "pwritev", "hang": True, "count": 8}])
    inodes = []
    for i in range(12):
        inode, number = await world.open(f"file {i}")
        await world.files.write(number, 0, b"%d" % i)
        inodes.append(inode)
    world.writeback.write_soon()
    await until(lambda: sum(not inode.unwritten for inode in inodes) == 4)
    assert not world.io.watchdog.lost, "it answers others"
    world.backing.set_plan([])
    await until(lambda: not any(inode.unwritten for inode in inodes))
    assert sorted((world.top / f"file {i}").read_bytes() for i in range(12)) == sorted(b"%d" % i for i in range(12))


@lost()
async def test_calls_that_come_back_late_leave_nothing_behind(world: World) -> None:
    root, fs, ask = world.table.root, world.fs, world.io.ask
    entry(world.top / "there", b"data")
    for op, question in (
        ("stat", lambda: ask(fs.lookup, root, b"there", undo=fs.unlook)),
        ("open", lambda: ask(fs.creation.create, root, b"new", 0o100644, CREATE, CALLER, undo=fs.uncreate)),
    ):
        world.backing.set_plan([{"op": op, "hang": True}])
        with refused():
            await question()
        world.backing.set_plan([])
        await until(lambda: not world.io.watchdog._calls)
    assert (world.top / "new").exists(), "SOURCE had been asked: it is there, and no one has it open"
    await until(lambda: len(world.table) == 1 and not world.files.handles)
    inode = await fs.lookup(root, b"there")
    world.backing.set_plan([{"op": "*", "hang": True}])
    with refused():
        await ask(world.files.open, inode, os.O_RDWR, 0, undo=fs.unopen)
    world.backing.set_plan([])
    # Between two of its calls there is none under way, and no handle yet; the last of all is a close.
    await until(lambda: (inode.opens, inode.reader, inode.writer, world.files.data.count) == (0, -1, -1, 0))
    await until(lambda: not world.io.watchdog._calls and not world.files.handles)


@lost()
async def test_a_change_that_had_not_reached_the_backing_when_it_failed_is_not_made_later(world: World) -> None:
    entry(world.top / "file")
    world.backing.set_plan([{"op": "stat", "hang": True}])  # unlink looks first what is there
    with refused():
        await world.io.ask(world.fs.unlink, world.table.root, b"file")
    world.backing.set_plan([])
    await until(lambda: not world.io.watchdog._calls)
    await trio.sleep(0.05)
    assert (world.top / "file").exists()


@lost()
async def test_a_change_that_had_reached_the_backing_is_known_when_it_comes_back(world: World) -> None:
    inode, number = await world.open("file")
    await world.files.write(number, 0, b"data of a file that goes")
    world.backing.set_plan([{"op": "unlink", "hang": True}])
    with refused():
        await world.io.ask(world.fs.unlink, world.table.root, b"file")
    assert not inode.unlinked
    world.backing.set_plan([])
    await until(lambda: inode.unlinked)
    assert world.table.named(world.table.root, b"file") is None and not (world.top / "file").exists()
    await world.release(number)
    assert not world.writeback.unwritten_pages


@lost()
async def test_a_directory_that_hangs_has_no_lookups_left_over(world: World) -> None:
    for i in range(20):
        entry(world.top / str(i))
    number = world.fs.directories.open(world.table.root)
    names = [listed.name for listed in await world.fs.directories.listing(number, 0)]
    world.backing.set_plan([{"op": "stat", "hang": True, "after": 10}])
    with refused():
        await world.io.ask(world.fs.directories.entries, number, names, undo=world.fs.directories.unlook_all)
    world.backing.set_plan([])
    await until(lambda: not world.io.watchdog._calls and len(world.table) == 1)
    found = await world.fs.directories.entries(number, names)
    await lose(world)
    known = world.fs.directories.entries_known(number, names)
    assert known is not None and set(known) == set(found) and {inode.lookups for inode in found if inode} == {2}
    assert world.fs.directories.entries_known(number, [*names, b"never seen"]) is None
    await world.fs.directories.unlook_all(known)
    world.fs.directories.close(number)


@lost(readahead_pages=0)
async def test_descriptors_of_a_lost_connection_are_opened_anew(world: World) -> None:
    entry(world.top / "file", b"x" * 8 * PAGE_SIZE)
    _, number = await world.open("file")
    await world.read(number, 0, PAGE_SIZE)

    def opened() -> int:
        return world.backing.calls["open"] + world.backing.calls["reopen"]

    for i, error in enumerate(("EIO", "ENOTCONN")):
        for op in ("pwritev", "preadv", "fsync"):
            await world.files.write(number, 0, b"w" * PAGE_SIZE)
            world.backing.set_plan([{"op": op, "errno": error, "count": 1}])
            before = opened()
            for expected in (errno.EIO, 0):
                with refused(expected) if expected else nullcontext():
                    await (world.read(number, (4 + i) * PAGE_SIZE, 10) if op == "preadv" else world.files.fsync(number, False))
                await until(lambda: not world.io.watchdog.lost)
            assert opened() == before + 1
    closed = [{"op": op, "errno": "EIO"} for op in ("open", "reopen")]
    world.backing.set_plan([{"op": "preadv", "errno": "EIO", "count": 1}, *closed])
    with refused(errno.EIO):
        await world.read(number, 6 * PAGE_SIZE, PAGE_SIZE)
    assert await world.read(number, 6 * PAGE_SIZE, PAGE_SIZE) == b"x" * PAGE_SIZE, "where there are no others they stay"
    await world.release(number)
    await until(lambda: not world.io.watchdog._calls)
    assert world.files.data.count == 0


@lost()
async def test_a_write_is_one_when_the_backing_has_taken_it_not_when_it_is_on_its_way(world: World) -> None:
    inode, number = await world.open("file")
    await world.files.write(number, 0, b"data")
    world.backing.set_plan([{"op": "flush", "errno": "ENOSPC", "count": 1}])
    with refused(errno.ENOSPC):
        await world.files.flush(number)
    assert inode.unwritten and world.writeback.written_bytes == 0
    await world.files.flush(number)
    assert not inode.unwritten and world.backing.calls["flush"] == 2


@lost()
async def test_the_errnos_of_a_backing_that_is_gone_become_eio(world: World) -> None:
    entry(world.top / "file")
    for name in ("ENOTCONN", "ECONNABORTED", "ESHUTDOWN", "EHOSTDOWN"):
        world.backing.set_plan([{"op": "stat", "errno": name}])
        with refused(errno.EIO):
            await world.fs.lookup(world.table.root, b"file")
    world.backing.set_plan([])
    await until(lambda: not world.io.watchdog.lost)


@lost(readahead_pages=0)
async def test_a_page_whose_reading_hangs_can_not_be_written_until_it_is_back(world: World) -> None:
    entry(world.top / "file", b"x" * 4 * PAGE_SIZE)
    _, number = await world.open("file")
    world.backing.set_plan([HANG])
    with refused():
        await world.read(number, 0, PAGE_SIZE)
    with refused():
        await world.files.write(number, 0, b"w" * PAGE_SIZE)
    await world.files.write(number, PAGE_SIZE, b"w" * PAGE_SIZE)  # its neighbour can
    world.backing.set_plan([])
    await until(lambda: not world.io.watchdog.lost)
    await world.files.write(number, 0, b"w" * PAGE_SIZE)
    assert await world.read(number, 0, 2 * PAGE_SIZE) == b"w" * 2 * PAGE_SIZE


@lost(readahead_pages=0)
async def test_a_read_that_ends_before_the_file_does_is_an_error_and_no_zeros(world: World) -> None:
    entry(world.top / "file", b"x" * 4 * PAGE_SIZE)
    inode, number = await world.open("file")
    world.backing.set_plan([{"op": "preadv", "short": 0, "count": READS_MAX}])  # what sshfs does when it has lost its connection
    with refused(errno.EIO):
        await world.read(number, 0, PAGE_SIZE)
    assert await world.read(number, 0, PAGE_SIZE) == b"x" * PAGE_SIZE
    os.truncate(world.top / "file", 3 * PAGE_SIZE)  # somebody else, and this is the first that we see of it
    await world.read(number, 3 * PAGE_SIZE, PAGE_SIZE)
    await world.files.attributes.refresh(inode)
    assert await world.read(number, 0, 4 * PAGE_SIZE) == b"x" * 3 * PAGE_SIZE
    await world.files.write(number, 5 * PAGE_SIZE, b"y" * PAGE_SIZE)  # our end, unwritten, is behind SOURCE's
    assert await world.read(number, 3 * PAGE_SIZE, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    await world.files.fsync(number, False)


@lost()
async def test_a_write_that_was_refused_leaves_no_doubt_about_whose_changes_are_seen_later(world: World) -> None:
    inode, number = await world.open("file")
    await world.files.write(number, 0, b"data")
    await world.files.fsync(number, False)
    await world.files.write(number, 0, b"more")
    await lose(world)
    with refused():
        await world.writeback.flush(inode)
    assert not inode.unsure
    world.backing.set_plan([])
    await until(lambda: not world.io.watchdog.lost and not inode.unwritten)
