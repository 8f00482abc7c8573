"""Files, cache, fills and writeback against plain bytearrays, with faults, evictions, truncates and random interleavings.

An example is a list of operations, run one after the other or several at once. Operands are numbers taken modulo what
exists, so that shortened examples stay valid. After every step each page of each file is looked at where it lies, in
memory or on the backing, and compared with the model; a clean page has to be equal to the backing's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.cache import wishes
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.policy import POLICIES, make
from cachefs.inode import Inode
from world import Leftovers, World, content

EXAMPLES = 4000 if os.environ.get("CACHEFS_LONG") else 350
SIZES = (40 * 4096 + 100, 5 * 4096, 0)  # of the files at the start; the first is larger than most of the caches
FILES = len(SIZES)
MOST_PAGES = 60
EDGES = (-1, 0, 0, 1, 7, 100, 2048, 4095)
LENGTHS = (1, 100, 4095, 4096, 4097, 4097, 8192, 8192, 3 * 4096 + 5, 8 * 4096, 20 * 4096 + 1, 45 * 4096)
FAULTS: Sequence[list[dict[str, object]]] = (
    [],
    [{"op": "preadv", "errno": "EIO", "count": 2}],
    [{"op": "preadv", "errno": "EIO", "after": 1, "count": 3}],
    [{"op": "preadv", "short": 1000}],
    [{"op": "preadv", "short": 4097}],
    [{"op": "pwritev", "errno": "EIO", "count": 1}],
    [{"op": "pwritev", "errno": "ENOSPC", "after": 1, "count": 5}],
    [{"op": "pwritev", "errno": "ENOSPC"}],
    [{"op": "pwritev", "short": 3000}],
    [{"op": "pwritev", "short": 5000, "count": 1}, {"op": "pwritev", "errno": "EIO", "after": 1, "count": 1}],
    [{"op": "truncate", "errno": "EIO", "count": 1}],
    [{"op": "fstat", "errno": "EIO", "count": 1}],
    [{"op": "utime", "errno": "EIO", "count": 1}],
    [{"op": "fsync", "errno": "EIO", "count": 1}],
)

numbers = st.integers(0, 1 << 16)
files = st.sampled_from((0, 0, 1, 1, 2))
pages = st.one_of(st.integers(0, 12), st.integers(0, MOST_PAGES))
ranges = st.tuples(pages, st.sampled_from(EDGES), st.sampled_from(LENGTHS))
reads = st.tuples(st.just("read"), files, ranges, numbers)
writes = st.tuples(st.just("write"), files, ranges, numbers)
truncates = st.tuples(st.just("truncate"), files, ranges, numbers)
looks = st.tuples(
    st.sampled_from(("fsync", "fsync", "close", "getattr", "lookup", "lookup", "flush_all")),
    files, st.just((0, 0, 0)), numbers,
)  # fmt: skip
alone = st.tuples(
    st.sampled_from((
        "unlink", "reopen", "change", "drop", "discard", "pressure", "pause", "fault", "fault", "stream",
        "pin", "advise", "policy",
    )),
    files, st.just((0, 0, 0)), numbers,
)  # fmt: skip
together = st.tuples(st.just("together"), st.lists(st.one_of(reads, writes, looks, truncates), min_size=2, max_size=8))
steps = st.lists(st.one_of(reads, writes, writes, truncates, looks, alone, together, together), min_size=3, max_size=40)


@dataclass
class Setting:
    policy: str
    pages: int
    blocking: bool
    running: bool  # the writeback task
    readahead: bool
    seed: int
    journal: bool = False
    through: bool = False


settings_of_worlds = st.builds(
    Setting, st.sampled_from(sorted(POLICIES)), st.sampled_from((16, 17, 24, 64)), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 99), st.booleans(), st.booleans(),
)  # fmt: skip


@dataclass
class Tracked:
    """A file, its model, and a descriptor of our own on the backing's side of it."""

    name: str
    inode: Inode
    handle: int
    fd: int
    model: bytearray


class Harness:
    """Runs operations on a world and its model side by side."""

    def __init__(self, world: World, setting: Setting) -> None:
        self.world = world
        self.setting = setting
        self.tracked: list[Tracked] = []
        self.made = 0
        self.faulty = False
        self.replies: list[tuple[Tracked, bytes, int, int, bytes]] = []  # file, its model then, offset, length, bytes
        self.cut: set[Inode] = set()  # truncated while these were read

    async def make(self, size: int) -> Tracked:
        self.made += 1
        name = f"file{self.made}"
        model = bytearray(i // 9 % 255 + 1 for i in range(size))
        if size:
            (self.world.top / name).write_bytes(model)
        inode, handle = await self.world.open(name)
        return Tracked(name, inode, handle, os.open(self.world.top / name, os.O_RDWR), model)

    async def start(self) -> None:
        self.tracked = [await self.make(size) for size in SIZES]
        self.world.cache.pin_limit_pages = self.setting.pages // 4

    @property
    def excused(self) -> bool:
        """Whether an operation may fail: the backing does, or did when writeback last tried and nothing else can be."""
        return self.faulty or any(inode.retry_seconds for inode in self.world.writeback.dirty)

    # --- single operations ---------------------------------------------------------------------------------------------

    def place(self, where: tuple[int, int, int]) -> tuple[int, int]:
        page, edge, length = where
        return max(0, page * PAGE_SIZE + edge), length

    async def make_sure_of_room(self, length: int) -> bool:
        """Without a writeback task nobody would make room for a write: whether it fits."""
        world = self.world
        if self.setting.running or world.writeback.unwritten_pages + length // PAGE_SIZE + 2 <= world.writeback.limit_pages:
            return True
        await world.writeback.flush_all()
        return world.writeback.unwritten_pages + length // PAGE_SIZE + 2 <= world.writeback.limit_pages

    async def read(self, tracked: Tracked, offset: int, length: int) -> None:
        try:
            before = bytes(tracked.model)
            got = await self.world.read(tracked.handle, offset, length)
            self.replies.append((tracked, before, offset, length, got))
        except OSError:
            assert self.excused

    def check_replies(self) -> None:
        """A reply is what there was before or after what went on at the same time; no write did in its range."""
        for tracked, before, offset, length, got in self.replies:
            old, new = before[offset : offset + length], tracked.model[offset : offset + length]
            assert len(got) >= min(len(old), len(new))
            if tracked.inode in self.cut:  # zeros, too: the backing's file may have been cut before ours
                assert all(byte in (*old[i : i + 1], *new[i : i + 1], 0) for i, byte in enumerate(got))
            else:
                assert got in (old[: len(got)], new[: len(got)]), "a reply that never was true"
        self.replies.clear()
        self.cut.clear()

    async def write(self, tracked: Tracked, offset: int, length: int, seed: int) -> None:
        model = tracked.model
        data = bytes((seed + i // 7) % 255 + 1 for i in range(length))
        try:
            if seed % 2 or not self.world.files.write_now(tracked.handle, offset, memoryview(data)):
                assert await self.world.files.write(tracked.handle, offset, data) == length
        except OSError:
            assert self.excused
            self.adopt_some(tracked, offset, data)
            return
        model[len(model) :] = bytes(max(0, offset - len(model)))
        model[offset : offset + length] = data

    def adopt_some(self, tracked: Tracked, offset: int, data: bytes) -> None:
        """A write that failed may have written some of its pieces."""
        now, model = self.content(tracked), tracked.model
        written = 0
        while written < len(data) and now[offset : offset + written + 1] == data[: written + 1]:
            written += 1
        if len(now) > len(model) or written:
            model[len(model) :] = bytes(max(0, offset - len(model))) if written else b""
            model[offset : offset + written] = data[:written]

    async def truncate(self, tracked: Tracked, size: int) -> None:
        model = tracked.model
        try:
            await self.world.truncate(tracked.inode, size)
        except OSError:
            assert self.faulty
            assert tracked.inode.file is not None
            if tracked.inode.file.size != size:  # the look at the attributes may have failed after the truncate itself
                return
        model[size:] = b""
        model[len(model) :] = bytes(size - len(model))

    async def look(self, what: str, tracked: Tracked) -> None:
        world = self.world
        try:
            match what:
                case "fsync":
                    await world.files.fsync(tracked.handle, False)
                case "close":
                    await world.files.flush(tracked.handle)
                case "getattr":
                    await world.files.attributes.refresh(tracked.inode)
                case "lookup":
                    await world.fs.lookup(world.table.root, tracked.name.encode())
                case "flush_all":
                    failed = await world.writeback.flush_all()
                    assert not failed or self.faulty
        except FileNotFoundError:
            assert what == "lookup" and tracked.inode.unlinked
        except OSError:
            assert self.faulty or tracked.inode.error_count

    async def alone(self, what: str, tracked: Tracked, number: int) -> None:
        world = self.world
        match what:
            case "fault":
                plan = FAULTS[number % len(FAULTS)]
                self.faulty = bool(plan)
                world.backing.set_plan(plan)
            case "pause":
                await trio.sleep((0.01, 1, 6, 40)[number % 4])
            case "drop":
                assert tracked.inode.file is not None
                wishes.drop(world.cache, tracked.inode.file)
            case "pin":
                assert tracked.inode.file is not None
                wishes.pin(world.cache, tracked.inode.file, not tracked.inode.file.pinned)
            case "advise":
                readahead = world.files.handles[tracked.handle].readahead
                readahead.transient = not readahead.transient
                readahead.most_pages = (0, 2, 1000)[number % 3]
            case "policy":
                wishes.use_policy(world.cache, make(sorted(POLICIES)[number % len(POLICIES)], self.setting.pages))
            case "discard":
                file = tracked.inode.file
                if await world.files.durability.discard_unwritten(tracked.inode) and file is not None:
                    # The backing could not be looked at if the size is another one.
                    tracked.model[:] = os.pread(tracked.fd, file.size, 0).ljust(file.size, b"\0")
            case "pressure":
                for other in self.tracked:
                    await self.read(other, number % 8 * PAGE_SIZE, 64 * PAGE_SIZE)
            case "stream":
                for offset in range(0, min(len(tracked.model), 40 * PAGE_SIZE), 2 * PAGE_SIZE):
                    await self.read(tracked, offset, 2 * PAGE_SIZE)
            case "change":
                await self.change(tracked, number)
            case "unlink":
                await self.unlink(tracked)
            case "reopen":
                await self.reopen(tracked, number)

    async def change(self, tracked: Tracked, number: int) -> None:
        """Somebody else writes to the file on the backing, while we have nothing unwritten of it."""
        if tracked.inode.unwritten or self.faulty:
            return
        size = number % (20 * PAGE_SIZE)
        tracked.model[:] = bytes((number + i // 5) % 251 for i in range(size))
        os.ftruncate(tracked.fd, size)
        os.pwrite(tracked.fd, tracked.model, 0)
        os.utime(tracked.fd, ns=(0, number * 1_000_000_007 + self.made))
        if number % 3:
            await self.world.files.attributes.refresh(tracked.inode)
        else:  # a fill may be under way at the same time
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.world.read, tracked.handle, 0, size + 1)
                nursery.start_soon(self.world.files.attributes.refresh, tracked.inode)

    async def unlink(self, tracked: Tracked) -> None:
        """The file loses its name but stays open; the next time it is closed and another takes its place."""
        if self.faulty:
            return
        if not tracked.inode.unlinked:
            await self.world.fs.unlink(self.world.table.root, tracked.name.encode())
            assert tracked.inode.unlinked
            return
        await self.world.release(tracked.handle)
        await trio.testing.wait_all_tasks_blocked()
        assert not tracked.inode.unwritten
        os.close(tracked.fd)
        self.tracked[self.tracked.index(tracked)] = await self.make(0)

    async def reopen(self, tracked: Tracked, number: int) -> None:
        if tracked.inode.unlinked or self.faulty:
            return
        await self.world.release(tracked.handle)
        if number % 2:
            await trio.sleep(2)
        flags = os.O_RDWR | (os.O_TRUNC if number % 5 == 0 else 0)
        tracked.inode, tracked.handle = await self.world.open(tracked.name, flags)
        if flags & os.O_TRUNC:
            tracked.model[:] = b""

    # --- steps -----------------------------------------------------------------------------------------------------------

    async def step(self, step: tuple) -> None:  # type: ignore[type-arg]
        if step[0] == "together":
            await self.together(step[1])
            return
        what, file, where, number = step
        tracked = self.tracked[file]
        offset, length = self.place(where)
        match what:
            case "read":
                await self.read(tracked, offset, length)
            case "write":
                if await self.make_sure_of_room(length):
                    await self.write(tracked, offset, length, number)
            case "truncate":
                await self.truncate(tracked, offset)
            case "fsync" | "close" | "getattr" | "lookup" | "flush_all":
                await self.look(what, tracked)
            case _:
                await self.alone(what, tracked, number)

    async def together(self, several: list[tuple]) -> None:  # type: ignore[type-arg]
        """Starts operations at once that cannot see each other: written ranges overlap no other range."""
        taken: list[tuple[int, int, int, bool]] = []
        room = self.world.writeback.limit_pages - self.world.writeback.unwritten_pages
        async with trio.open_nursery() as nursery:
            for what, file, where, number in several:
                offset, length = self.place(where)
                tracked = self.tracked[file]
                if what in ("read", "write"):
                    writes = what == "write"
                    if writes and tracked.inode in self.cut:
                        continue
                    if any(f == file and (w or writes) and offset < e and s < offset + length for f, s, e, w in taken):
                        continue
                    room -= length // PAGE_SIZE + 2 if writes else 0
                    if writes and room < 0 and not self.setting.running:
                        continue
                    taken.append((file, offset, offset + length, writes))
                    if writes:
                        nursery.start_soon(self.write, tracked, offset, length, number)
                    else:
                        nursery.start_soon(self.read, tracked, offset, length)
                elif what == "truncate":
                    # No write at the same time: which came first could not be told.
                    if tracked.inode in self.cut or any(f == file and w for f, _, _, w in taken):
                        continue
                    self.cut.add(tracked.inode)
                    nursery.start_soon(self.truncate, tracked, offset)
                else:
                    nursery.start_soon(self.look, what, tracked)

    # --- comparing -------------------------------------------------------------------------------------------------------

    def content(self, tracked: Tracked) -> bytes:
        assert tracked.inode.file is not None
        return content(self.world.cache, tracked.inode.file, tracked.fd)

    def check(self) -> None:
        self.world.check()
        self.check_replies()
        journal = self.world.keeper.journal
        leftovers = Leftovers(journal) if journal is not None else None
        for tracked in self.tracked:
            self.compare(tracked, "", self.content(tracked))
            if leftovers is not None and not tracked.inode.unlinked:
                self.compare(tracked, "after a kill, ", leftovers.content(tracked.inode, tracked.fd))

    def compare(self, tracked: Tracked, when: str, now: bytes) -> None:
        if now != tracked.model:
            at = next((i for i, (a, b) in enumerate(zip(now, tracked.model, strict=False)) if a != b), -1)
            raise AssertionError(f"{when}{tracked.name}: {len(now)} bytes, model {len(tracked.model)}, differ at {at}")

    async def finish(self) -> None:
        """Once the backing works again everything can be written, and is what the model says."""
        self.world.backing.set_plan([])
        self.faulty = False
        await trio.sleep(100)
        assert await self.world.writeback.flush_all() == []
        self.check()
        assert not self.world.writeback.unwritten_pages
        assert not self.world.files.conflicts.total, "others changed files only while nothing of ours was unwritten"
        for tracked in self.tracked:
            size = os.fstat(tracked.fd).st_size
            assert os.pread(tracked.fd, size + 1, 0) == tracked.model
            await self.world.files.attributes.refresh(tracked.inode)
            assert tracked.inode.attributes().size == tracked.inode.st.st_size == size
            os.close(tracked.fd)


async def run(setting: Setting, steps: Sequence[tuple]) -> None:  # type: ignore[type-arg]
    with tempfile.TemporaryDirectory() as top, tempfile.TemporaryDirectory() as journal:
        async with trio.open_nursery() as nursery:
            world = World(
                nursery, Path(top), pages=setting.pages, policy=setting.policy, blocking=setting.blocking,
                readahead_pages=64 if setting.readahead else 0, seed=setting.seed, ttl_seconds=0.0,
                journal=Path(journal) if setting.journal else None, through=setting.through,
            )  # fmt: skip
            if setting.through:  # our own descriptors on the backing's side are in the way of real leases
                world.backing.lease = lambda fd, patience_seconds=0.0: True  # type: ignore[method-assign]
                world.backing.unlease = lambda fd: None  # type: ignore[method-assign]
            if setting.running:
                nursery.start_soon(world.writeback.run)
            harness = Harness(world, setting)
            await harness.start()
            for step in steps:
                with trio.fail_after(1000):
                    await harness.step(step)
                harness.check()
            await harness.finish()
            await world.shut()
            nursery.cancel_scope.cancel()


def play(setting: Setting, steps: Sequence[tuple]) -> None:  # type: ignore[type-arg]
    trio.run(run, setting, steps, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.timeout(1800 if os.environ.get("CACHEFS_LONG") else 180)
@settings(max_examples=EXAMPLES)
@given(settings_of_worlds, steps)
def test_everything_is_what_the_model_says(setting: Setting, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    play(setting, steps)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize(("blocking", "through"), [(False, False), (False, True), (True, False)])
def test_every_kind_of_step_once(policy: str, blocking: bool, through: bool, journal: bool) -> None:
    """So that no kind goes untested should the generator change."""
    steps: list[tuple] = [  # type: ignore[type-arg]
        ("write", 0, (0, 0, 20 * 4096 + 1), 1),
        ("write", 1, (3, 100, 4097), 2),
        ("fsync", 0, (0, 0, 0), 0),
        ("truncate", 0, (5, 7, 1), 0),
        ("truncate", 0, (30, 1, 1), 0),
        ("read", 0, (0, 100, 45 * 4096), 0),
        ("stream", 0, (0, 0, 0), 0),
        ("flush_all", 0, (0, 0, 0), 0),
        ("change", 1, (0, 0, 0), 50001),
        ("change", 0, (0, 0, 0), 60002),
        ("pressure", 0, (0, 0, 0), 0),
        ("write", 2, (0, 0, 8 * 4096), 9),
        ("unlink", 2, (0, 0, 0), 0),
        ("write", 2, (10, 1, 4097), 10),
        ("read", 2, (0, 0, 45 * 4096), 0),
        ("unlink", 2, (0, 0, 0), 0),
        ("fault", 0, (0, 0, 0), 7),
        ("write", 1, (0, 1, 4096), 3),
        ("fsync", 1, (0, 0, 0), 0),
        ("pause", 0, (0, 0, 0), 3),
        ("fault", 0, (0, 0, 0), 0),
        ("reopen", 1, (0, 0, 0), 1),
        ("drop", 1, (0, 0, 0), 0),
        ("together", [("read", 1, (0, 0, 8192), 0), ("write", 1, (4, 1, 4096), 5), ("getattr", 1, (0, 0, 0), 0)]),
    ]
    play(Setting(policy, 16, blocking, True, True, 1, journal, through), steps)


def test_what_a_truncate_cut_off_does_not_come_back_after_a_kill() -> None:
    """The journal's entry of the whole write lived on for its first pages, and gave the others back with it."""
    steps: list[tuple] = [  # type: ignore[type-arg]
        ("write", 2, (0, 0, 8 * 4096), 1),
        ("truncate", 2, (2, 100, 1), 0),
        ("write", 2, (6, 0, 4096), 2),
        ("truncate", 2, (3, 0, 1), 0),
        ("write", 2, (7, 1, 100), 3),
    ]
    play(Setting("lru", 64, False, False, False, 1, True), steps)


def test_a_read_far_away_that_meets_our_own_writeback_is_no_error() -> None:
    """It came back short, and when the size was looked at, writeback had made the file longer: EIO, for nothing."""
    reads = [("read", 0, (0, -1, 1), 0)] * 3 + [("read", 0, (1, 1, 8192), 0)] + [("read", 0, (0, -1, 1), 0)] * 2
    steps: list[tuple] = [  # type: ignore[type-arg]
        ("truncate", 1, (0, -1, 1), 0),
        ("fsync", 0, (0, 0, 0), 0),
        ("write", 1, (2, -1, 12293), 0),
        ("together", [*reads, ("write", 1, (0, -1, 1), 0)]),
    ]
    play(Setting("lru", 16, True, True, False, 0, False), steps)
