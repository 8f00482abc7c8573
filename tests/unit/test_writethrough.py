"""Small writes to a local file go to SOURCE at once: which do, what is where afterwards, and what happens when it goes wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.cache.page import GROUP_SIZE, PAGE_SIZE
from cachefs.handle import Handle
from cachefs.journal.index import Key, Row
from cachefs.source import AT_ONCE_BYTES, PATIENCE_SECONDS, SLOW_SECONDS
from cachefs.writethrough import THROUGH_MOST
from world import Leftovers, World, copies, world_of

Test = Callable[[World], Awaitable[None]]
Place = tuple[int, bytes]  # of a write: offset, data
Why = Callable[[World, Handle, ExitStack], Awaitable[Place]]


def over(top: Path, test: Test, far: bool = False, **options: object) -> None:
    """Runs a test in a world with a journal, on a clock that jumps."""
    (top / "source").mkdir()
    (top / "state").mkdir()

    async def main() -> None:
        async with world_of(top / "source", far, journal=top / "state", through=True, **options) as world:
            await test(world)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def write(world: World, number: int, offset: int, data: bytes) -> None:
    """As the lane does it; a test that comes here knows that it need not wait."""
    assert world.files.write_now(number, offset, memoryview(data))
    world.check()


def in_source(world: World, name: str = "file") -> bytes:
    return (world.top / name).read_bytes()


def test_a_small_write_is_in_source_at_once_and_in_the_cache_and_in_no_journal(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await world.open("file")
        write(world, handle, 0, b"a" * 5000)
        assert in_source(world) == b"a" * 5000
        assert not inode.unwritten and inode.journaled is None and inode not in world.writeback.dirty
        world.backing.set_plan([{"op": "preadv", "errno": "EIO"}])
        assert await world.read(handle, 0, 9000) == b"a" * 5000
        assert world.files.through.written_bytes == world.cache.accounts.total("write_bytes") == 5000

    over(tmp_path, test)


def test_size_and_times_are_those_of_source(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await world.open("file")
        write(world, handle, 100, b"a")
        st, seen = os.stat(world.top / "file"), inode.attributes()
        assert (seen.size, seen.mtime_ns, seen.ctime_ns) == (101, st.st_mtime_ns, st.st_ctime_ns)
        await world.files.attributes.refresh(inode)
        assert world.changed == [] and inode.attributes() == seen

    over(tmp_path, test)


def test_who_writes_on_has_a_dirty_file_until_it_is_clean_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await world.open("file")
        for i in range(THROUGH_MOST):
            write(world, handle, 10 * i, b"through...")
            assert not inode.unwritten
        for i in range(3):
            write(world, handle, 10 * (THROUGH_MOST + i), b"dirty.....")
            assert inode.unwritten and inode.journaled is not None
        assert in_source(world) == b"through..." * THROUGH_MOST
        await world.files.fsync(handle, False)
        write(world, handle, 0, b"again.....")
        assert not inode.unwritten
        assert in_source(world) == b"again....." + b"through..." * (THROUGH_MOST - 1) + b"dirty....." * 3

    over(tmp_path, test)


async def is_larger(world: World, handle: Handle, held: ExitStack) -> Place:
    return 0, bytes(AT_ONCE_BYTES + 1)


async def comes_to_coarse_times(world: World, handle: Handle, held: ExitStack) -> Place:
    """What others answer at once would look like ours."""
    world.backing.has_fine_times = lambda: False  # type: ignore[method-assign]
    return 0, b"a"


async def is_to_a_file_without_a_name(world: World, handle: Handle, held: ExitStack) -> Place:
    await world.fs.unlink(world.table.root, b"file")
    return 0, b"a"


async def is_to_a_file_that_somebody_removed(world: World, handle: Handle, held: ExitStack) -> Place:
    os.unlink(world.top / "file")
    return 0, b"a"


async def is_to_a_file_that_somebody_has_open(world: World, handle: Handle, held: ExitStack) -> Place:
    held.enter_context((world.top / "file").open("rb"))
    return 0, b"a"


async def will_not_be_read_again(world: World, handle: Handle, held: ExitStack) -> Place:
    handle.readahead.transient = True
    return 0, b"a"


async def comes_after_a_slow_one(world: World, handle: Handle, held: ExitStack) -> Place:
    world.files.data.took(10.0)
    return 0, b"a"


async def comes_after_several_slow_ones(world: World, handle: Handle, held: ExitStack) -> Place:
    for seconds in (SLOW_SECONDS * 0.9,) * 20 + (PATIENCE_SECONDS * 0.6,):
        world.files.data.took(seconds)
        assert world.files.data.takes_at_once(1), "quick ones do not count, and one that is not may be chance"
    world.files.data.took(PATIENCE_SECONDS * 0.6)
    return 0, b"a"


async def finds_the_file_unwritten(world: World, handle: Handle, held: ExitStack) -> Place:
    world.files.through.wanted = False
    await world.files.write(1, 50, b"b")
    world.files.through.wanted = True
    return 0, b"a"


@pytest.mark.parametrize(
    "why",
    [
        is_larger, comes_to_coarse_times,
        is_to_a_file_without_a_name, is_to_a_file_that_somebody_removed, is_to_a_file_that_somebody_has_open,
        will_not_be_read_again, comes_after_a_slow_one, comes_after_several_slow_ones, finds_the_file_unwritten,
    ],
)  # fmt: skip
def test_a_write_waits_in_the_cache_that(tmp_path: Path, why: Why) -> None:
    async def test(world: World) -> None:
        inode, number = await world.open("file")
        with ExitStack() as held:
            offset, data = await why(world, world.files.handles[number], held)
            write(world, number, offset, data)
        assert inode.unwritten and not world.files.through.written_bytes
        assert await world.read(number, offset, len(data)) == data

    over(tmp_path, test, pages=256)


def test_one_that_crosses_groups_goes_the_long_way(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        number = (await world.open("file"))[1]
        assert not world.files.write_now(number, GROUP_SIZE - 1, memoryview(b"ab"))
        assert not world.files.through.written_bytes

    over(tmp_path, test)


def test_far_away_nothing_goes_through(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await world.open("file")
        write(world, handle, 0, b"a")
        assert inode.unwritten

    over(tmp_path, test, far=True)


def test_what_somebody_removed_is_kept_as_a_copy(tmp_path: Path) -> None:
    """Written through, it would be gone with the last descriptor."""

    async def test(world: World) -> None:
        handle = (await world.open("file"))[1]
        write(world, handle, 0, b"ours")
        os.unlink(world.top / "file")
        write(world, handle, 4, b" too")
        assert await world.writeback.flush_all() == []
        assert list(copies(world.top).values()) == [b"ours too"]

    over(tmp_path, test)


def test_what_somebody_wrote_before_is_seen_beside_ours(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"-" * 3 * PAGE_SIZE)
        inode, handle = await world.open("file")
        assert await world.read(handle, 0, 3 * PAGE_SIZE) == b"-" * 3 * PAGE_SIZE
        (world.top / "file").write_bytes(b"theirs" + b"." * PAGE_SIZE)
        write(world, handle, 10, b"ours")
        expected = b"theirs....ours" + b"." * (PAGE_SIZE - 8)
        assert in_source(world) == await world.read(handle, 0, 3 * PAGE_SIZE) == expected
        assert world.changed == [inode] and not copies(world.top)

    over(tmp_path, test)


def test_part_of_a_page_that_is_not_here_is_written_with_no_read(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"-" * 4 * PAGE_SIZE)
        inode, handle = await world.open("file")
        world.backing.set_plan([{"op": "preadv", "errno": "EIO"}])
        write(world, handle, PAGE_SIZE - 2, b"x" * (2 * PAGE_SIZE + 4))  # the end of one, two whole ones, the start of one
        write(world, handle, 10, b"y")
        assert inode.file is not None and inode.file.resident_pages == 2
        world.backing.set_plan([])
        expected = bytearray(b"-" * 4 * PAGE_SIZE)
        expected[PAGE_SIZE - 2 : 3 * PAGE_SIZE + 2] = b"x" * (2 * PAGE_SIZE + 4)
        expected[10:11] = b"y"
        assert await world.read(handle, 0, 4 * PAGE_SIZE) == in_source(world) == expected

    over(tmp_path, test)


def test_behind_the_end_there_are_zeros(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        handle = (await world.open("file"))[1]
        write(world, handle, 0, b"a" * 100)
        write(world, handle, 2 * PAGE_SIZE + 50, b"b")
        expected = b"a" * 100 + bytes(2 * PAGE_SIZE - 50) + b"b"
        assert await world.read(handle, 0, 4 * PAGE_SIZE) == in_source(world) == expected

    over(tmp_path, test)


def test_where_there_is_no_room_in_the_cache_it_is_in_source_alone(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.cache.dirty_limit_pages = world.writeback.limit_pages = world.writeback.background_pages = 64
        inode, handle = await world.open("file")
        write(world, handle, 0, b"a" * PAGE_SIZE)
        other = (await world.open("other"))[1]
        await world.files.write(other, 0, b"-" * 63 * PAGE_SIZE)
        assert world.files.through.write(world.files.handles[handle], 0, memoryview(b"b" * 2 * PAGE_SIZE))
        assert inode.file is not None and not inode.file.resident_pages, "the old page would be wrong"
        assert in_source(world) == b"b" * 2 * PAGE_SIZE
        assert await world.writeback.flush_all() == []
        assert await world.read(handle, 0, 3 * PAGE_SIZE) == b"b" * 2 * PAGE_SIZE

    over(tmp_path, test, pages=64)


@pytest.mark.parametrize("fault", [{"errno": "ENOSPC"}, {"errno": "EIO"}, {"short": 3}, {"short": 5000}])
def test_what_source_does_not_take_whole_waits_in_the_cache(tmp_path: Path, fault: dict[str, object]) -> None:
    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"-" * 3 * PAGE_SIZE)
        inode, handle = await world.open("file")
        await world.read(handle, 0, 3 * PAGE_SIZE)
        world.backing.set_plan([{"op": "pwritev", "count": 2, **fault}])  # it is tried once more at once
        data = b"x" * 2 * PAGE_SIZE
        if not world.files.write_now(handle, 10, memoryview(data)):
            await world.files.write(handle, 10, data)
        assert inode.unwritten and world.files.through.written_bytes == 0
        assert world.cache.accounts.total("write_bytes") == 2 * PAGE_SIZE
        expected = b"-" * 10 + b"x" * 2 * PAGE_SIZE + b"-" * (PAGE_SIZE - 10)
        assert await world.read(handle, 0, 3 * PAGE_SIZE) == expected
        assert await world.writeback.flush_all() == []
        assert in_source(world) == expected and not copies(world.top), "what we had written ourselves is no conflict"

    over(tmp_path, test)


def test_a_file_that_cannot_be_looked_at_afterwards_is_believed_in_nothing(tmp_path: Path) -> None:
    """It was written, maybe: what the cache has of it may be old."""

    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"-" * PAGE_SIZE)
        handle = (await world.open("file"))[1]
        await world.read(handle, 0, PAGE_SIZE)
        world.backing.set_plan([{"op": "fstat", "after": 1, "count": 1, "errno": "EIO"}])
        assert not world.files.through.write(world.files.handles[handle], 0, memoryview(b"new"))
        assert await world.read(handle, 0, 5) == b"new--"

    over(tmp_path, test)


def test_off_nothing_goes_through(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.files.through.wanted = False
        inode, handle = await world.open("file")
        write(world, handle, 0, b"a")
        assert inode.unwritten

    over(tmp_path, test)


async def written(world: World, handle: int, offset: int, data: bytes) -> None:
    """At once or not, as the lane does it."""
    if not world.files.write_now(handle, offset, memoryview(data)):
        await world.files.write(handle, offset, data)


def test_what_somebody_changes_after_a_refused_write_is_kept(tmp_path: Path) -> None:
    """Whatever was refused, what the file showed then is known: else writeback would not compare."""

    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"-" * 100)
        inode, handle = await world.open("file")
        world.backing.set_plan([{"op": "pwritev", "count": 2, "errno": "EDQUOT"}])
        await written(world, handle, 0, b"ours")
        assert inode.unwritten and not inode.unsure
        world.backing.set_plan([])
        (world.top / "file").write_bytes(b"theirs, which are long and dear to them" * 3)
        assert await world.writeback.flush_all() == []
        assert list(copies(world.top).values()) == [b"theirs, which are long and dear to them" * 3]

    over(tmp_path, test)


def test_regression_a_truncate_that_the_journal_could_not_forget_cuts_nothing_off(tmp_path: Path) -> None:
    """A kill would have had it completed: over what went through after it, of which the journal knows nothing."""

    async def test(world: World) -> None:
        journal, through = world.keeper.journal, world.files.through
        assert journal is not None
        inode, handle = await world.open("file")
        other = (await world.open("other"))[1]
        through.wanted = False
        for number, data in ((other, b"b"), (other, b"B"), (handle, b"a" * 100)):
            write(world, number, 0, data)
        commit = journal.index.commit

        def without_deletes(puts: Sequence[Row] = (), deletes: Sequence[Key] = ()) -> None:
            if deletes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            commit(puts, deletes)

        journal.index.commit = without_deletes  # type: ignore[method-assign]
        await world.truncate(inode, 0)
        journal.index.commit = commit  # type: ignore[method-assign]
        through.wanted = True
        assert journal.behind and not inode.unwritten and inode.journaled is None
        await written(world, other, 0, b"C")  # in place, with no commit
        await written(world, handle, 0, b"precious")
        assert Leftovers(journal).content(inode, inode.writer) == b"precious"

    over(tmp_path, test)


def test_a_file_that_was_read_first_is_written_through_as_well(tmp_path: Path) -> None:
    """Our own reader beside the writer would be in the way of the lease."""

    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"-" * 100)
        inode, reader = await world.open("file", os.O_RDONLY)
        assert await world.read(reader, 0, 10) == b"-" * 10
        handle = (await world.open("file"))[1]
        write(world, handle, 0, b"ours")
        assert not inode.unwritten and in_source(world)[:5] == b"ours-" == await world.read(reader, 0, 5)
        assert world.files.data.count == 1

    over(tmp_path, test)


def test_the_ctime_moves_with_a_write(tmp_path: Path) -> None:
    """Also where what was shown before is not what the backing had: the time of a write that was written back later."""

    async def test(world: World) -> None:
        inode, handle = await world.open("file")
        write(world, handle, 0, b"a")
        inode.ctime_shown = (inode.st.st_ctime_ns, inode.st.st_ctime_ns - 500_000_000)
        before = inode.st
        world.backing.fstat = lambda fd: before  # type: ignore[method-assign]  # within a tick of a coarse clock
        write(world, handle, 0, b"b")
        assert inode.attributes().ctime_ns == before.st_ctime_ns

    over(tmp_path, test)


def test_an_append_goes_behind_what_others_have_appended(tmp_path: Path) -> None:
    """The kernel takes the size that it knows for the end: what it sends there would be written over theirs."""

    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"start ")
        inode, handle = await world.open("file", os.O_WRONLY | os.O_APPEND)
        with (world.top / "file").open("ab") as theirs:
            theirs.write(b"theirs ")
        assert not world.files.write_now(handle, 6, memoryview(b"ours "))
        at = world.files.place(handle, 6)
        assert await world.files.write(handle, at, b"ours ") == 5
        assert in_source(world) == b"start theirs ours " and not inode.unwritten
        assert world.changed == [inode, inode], "the kernel is told, of the change and of the place"
        write(world, handle, at + 5, b"and ours")
        assert in_source(world) == b"start theirs ours and ours"

    over(tmp_path, test)


def test_the_bound_holds_where_the_page_is_not_here(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        (world.top / "file").write_bytes(b"-" * PAGE_SIZE)
        inode, handle = await world.open("file")
        for i in range(THROUGH_MOST + 5):
            await written(world, handle, 10 + i, b"x")
        assert inode.unwritten and world.files.through.written_bytes == THROUGH_MOST

    over(tmp_path, test)
