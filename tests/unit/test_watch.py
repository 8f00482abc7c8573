"""What inotify tells, and what it must not be taken for; with the kernel's events and with made-up ones."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import inotify_simple
import pytest
import trio
import trio.testing
from inotify_simple import Event

import cachefs.watch
from cachefs.cache import wishes
from cachefs.cache.figures import statistics_of
from cachefs.inode import Inode
from cachefs.setattr import Changes
from cachefs.watch import IGNORED, MODIFY, OVERFLOW, Watch, Watcher
from world import CALLER, World


class Watched(World):
    """A `World` with a watcher whose tasks do not run: tests take the steps themselves."""

    watcher: Watcher

    async def tend(self) -> None:
        """What the watcher does a short time after files were opened."""
        opened, self.watcher._opened = self.watcher._opened, {}
        for inode in opened:
            if cachefs.watch.is_needed(inode):
                await self.watcher._watch_for(inode)

    async def tell(self) -> int:
        """Takes the events that the kernel has; their number."""
        events = self.watcher._events()
        await self.watcher._take(events)
        return len(events)

    async def cached(self, name: str) -> tuple[Inode, int]:
        """A file that is open, cached and watched."""
        inode, handle = await self.open(name)
        await self.read(handle, 0, 1 << 16)
        await self.tend()
        await self.tell()
        self.changed.clear()
        return inode, handle


def play(tmp_path: Path, test: Callable[[Watched], Awaitable[None]]) -> None:
    async def main() -> None:
        async with watched(tmp_path) as world:
            await test(world)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@asynccontextmanager
async def watched(top: Path) -> AsyncIterator[Watched]:
    async with trio.open_nursery() as nursery:
        world = Watched(nursery, top)
        world.watcher = Watcher(world.descriptors, world.files, lambda *place: world.gone.append(place))
        world.watcher._inotify = inotify_simple.INotify(nonblocking=True)
        yield world
        world.check()
        world.watcher._inotify.close()
        await world.shut()
        nursery.cancel_scope.cancel()


# --- what others do


def test_contents_that_others_write_are_told_at_once(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        (tmp_path / "file").write_bytes(b"old")
        inode, handle = await world.cached("file")
        (tmp_path / "file").write_bytes(b"newer")
        await world.tell()
        assert world.changed == [inode]
        assert await world.read(handle, 0, 99) == b"newer"

    play(tmp_path, test)


@pytest.mark.parametrize("how", ["unlink", "rename away", "rename over", "unlink and make anew"])
def test_names_that_go_or_mean_another_file_are_told_at_once(tmp_path: Path, how: str) -> None:
    async def test(world: Watched) -> None:
        (tmp_path / "file").write_bytes(b"old")
        (tmp_path / "kept").write_bytes(b"old")
        await world.cached("kept")
        await world.cached("file")
        match how:
            case "unlink":
                (tmp_path / "file").unlink()
            case "rename away":
                (tmp_path / "file").rename(tmp_path / "other")
            case "rename over":
                (tmp_path / "new").write_bytes(b"new")
                (tmp_path / "new").rename(tmp_path / "file")
            case _:
                os.link(tmp_path / "file", tmp_path / "still there")
                (tmp_path / "file").unlink()
                (tmp_path / "file").write_bytes(b"new")
        await world.tell()
        assert world.gone == [(world.table.root, b"file")]

    play(tmp_path, test)


def test_a_change_before_the_watch_was_there_is_found(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        (tmp_path / "file").write_bytes(b"old")
        (tmp_path / "gone").write_bytes(b"old")
        os.mkdir(tmp_path / "d")
        (tmp_path / "d" / "gone").write_bytes(b"old")
        inode, handle = await world.open("file")
        await world.read(handle, 0, 99)
        (tmp_path / "file").write_bytes(b"newer")
        await world.tend()
        assert world.changed == [inode] and await world.read(handle, 0, 99) == b"newer"

    play(tmp_path, test)


def test_the_directory_of_a_watched_file_may_go(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        directory = await world.fs.creation.mkdir(world.table.root, b"d", 0o755, CALLER)
        await world.fs.creation.create(directory, b"file", 0o100644, os.O_RDWR, CALLER)
        await world.tend()
        assert list(world.watcher.watches) == [directory]
        (tmp_path / "d" / "file").unlink()
        (tmp_path / "d").rmdir()
        await world.tell()
        assert world.gone == [(directory, b"file")]
        ((number, _),) = world.watcher._directories.items()
        await world.watcher._take([Event(number, IGNORED, 0, "")])  # comes when nobody has the directory open any more
        assert not world.watcher.watches and not world.watcher._directories

    play(tmp_path, test)


# --- what we do


def test_changes_of_ours_are_not_told_as_somebody_else_s(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        root = world.table.root
        inode, handle = await world.cached("kept")
        total = 0
        for i in range(5):
            other, other_handle = await world.open("other")
            await world.files.write(handle, 0, b"x" * 5000)
            await world.files.write(other_handle, 0, b"y" * 5000)
            await world.files.fsync(handle, False)
            await world.writeback.flush_all()
            await world.truncate(inode, 4000 + i)
            await world.files.setter.setattr(inode, Changes(mode=0o600, mtime_ns=10**18 + i), 0)
            await world.fs.rename(root, b"other", root, b"moved", 0)
            await world.fs.link(other, root, b"linked")
            await world.fs.unlink(root, b"linked")
            await world.release(other_handle)
            await world.fs.unlink(root, b"moved")
            total += await world.tell()
            assert await world.read(handle, 0, 9999) == b"x" * (4000 + i)
        assert total >= 20, "there were events"
        assert not world.changed and not world.gone and not world.files.conflicts.total
        assert not statistics_of(world.cache).evictions.get("invalidated")

    play(tmp_path, test)


def test_a_file_that_we_are_changing_is_looked_at_afterwards(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        (tmp_path / "file").write_bytes(b"old")
        inode, _ = await world.cached("file")
        async with inode.lock:
            (tmp_path / "file").write_bytes(b"newer")
            await world.tell()
            assert not world.changed
        await world.watcher._take([])
        assert world.changed == [inode]

    play(tmp_path, test)


def test_unwritten_data_beside_their_change_is_noticed_and_stays(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        (tmp_path / "file").write_bytes(b"o" * 10_000)
        inode, handle = await world.cached("file")
        await world.files.write(handle, 0, b"ours")
        (tmp_path / "file").write_bytes(b"t" * 10_000)
        await world.tell()
        assert world.changed == [inode] and inode.unwritten
        assert await world.read(handle, 0, 4) == b"ours" and await world.read(handle, 9000, 5) == b"ttttt"

    play(tmp_path, test)


# --- limits


def test_lost_events_make_it_look_at_everything_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cachefs.watch, "STEP_INODES", 7)

    async def test(world: Watched) -> None:
        (tmp_path / "d").mkdir()
        directory = await world.fs.lookup(world.table.root, b"d")
        files = []
        for i in range(40):
            (tmp_path / "d" / f"file{i}").write_bytes(b"old")
            inode = await world.fs.lookup(directory, b"file%d" % i)
            handle = (await world.files.open(inode, os.O_RDONLY, 0)).number
            await world.read(handle, 0, 99)
            files.append((inode, handle))
        for i in range(0, 40, 2):
            (tmp_path / "d" / f"file{i}").write_bytes(b"newer")
        (tmp_path / "d" / "file1").unlink()
        start = trio.current_time()
        await world.watcher._take([Event(-1, OVERFLOW, 0, "")])
        assert trio.current_time() - start >= 40 // 7 * cachefs.watch.STEP_PAUSE_SECONDS, "others had their turns"
        assert world.changed == [inode for inode, _ in files[::2]] and world.gone == [(directory, b"file1")]

    play(tmp_path, test)


def test_watches_are_bounded_and_the_latest_stay(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        world.watcher.most = 3
        directories = []
        for i in range(6):
            directories.append(await world.fs.creation.mkdir(world.table.root, b"d%d" % i, 0o755, CALLER))
            await world.fs.creation.create(directories[i], b"file", 0o100644, os.O_RDWR, CALLER)
            if i == 4:
                world.watcher.opened(await world.fs.lookup(directories[2], b"file"))
            await world.tend()
        assert set(world.watcher.watches) == {directories[2], directories[4], directories[5]}
        assert len(world.watcher._directories) == 3

    play(tmp_path, test)


def test_a_watch_goes_with_the_last_file_that_needs_it(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        (tmp_path / "file").write_bytes(b"contents")
        inode, handle = await world.cached("file")
        await world.release(handle)
        world.watcher._drop_one()
        assert world.watcher.watches, "its pages are cached"
        assert inode.file is not None
        wishes.drop(world.cache, inode.file)
        world.watcher._drop_one()
        assert not world.watcher.watches and not world.watcher._directories
        (tmp_path / "file").write_bytes(b"changed")
        assert await world.tell() == 1, "the end of the watch"

    play(tmp_path, test)


def test_what_a_watch_remembers_is_bounded_by_what_is_needed(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        watch = Watch(1)
        kept, _ = await world.cached("kept")
        watch.add(kept)
        for i in range(1000):
            (tmp_path / "passing").write_bytes(b"")
            watch.add(Inode(i + 10, os.stat(tmp_path / "passing")))
            assert len(watch.files) <= 67
        assert kept in watch.files

    play(tmp_path, test)


def test_when_no_watches_are_left_it_goes_on_with_those_it_has_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(world: Watched) -> None:
        inotify: Any = world.watcher._inotify
        real = inotify.add_watch

        def add_watch(path: str, mask: int) -> int:
            if len(world.watcher.watches) >= 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(real(path, mask))

        inotify.add_watch = add_watch
        for i in range(6):
            directory = await world.fs.creation.mkdir(world.table.root, b"d%d" % i, 0o755, CALLER)
            await world.fs.creation.create(directory, b"file", 0o100644, os.O_RDWR, CALLER)
            await world.tend()
        assert len(world.watcher.watches) == world.watcher.most == 2
        assert list(world.watcher.watches)[-1] is directory, "the latest"
        assert caplog.text.count("no inotify watches left (No space left on device)") == 1

    play(tmp_path, test)


def test_regression_the_first_open_after_a_change_tells_the_kernel_of_the_size_whoever_noticed_it(tmp_path: Path) -> None:
    """Programs were given the new contents up to the old size, when inotify had been faster than their open."""

    async def test(world: Watched) -> None:
        inode, _ = await world.cached("file")
        (world.top / "file").write_bytes(b"longer than before")
        await world.tell()
        assert inode.st.st_size == 18
        opened = [await world.files.open(inode, os.O_RDONLY, 0) for _ in range(2)]
        assert [each.attributes_changed for each in opened] == [True, False]
        assert [each.unchanged for each in opened] == [False, True]

    play(tmp_path, test)


def test_without_inotify_it_says_so_once_and_nothing_else_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(**options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def test(world: Watched) -> None:
        monkeypatch.setattr(inotify_simple, "INotify", none)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.watcher.run)
            while "no inotify" not in caplog.text:  # a thread has to find out, which knows nothing of the clock of this test
                await trio.lowlevel.checkpoint()
            await world.open("file")
            assert not world.watcher._opened, "nobody waits for a watch"
            nursery.cancel_scope.cancel()
        assert caplog.text.count("no inotify (Too many open files): changes that others make in SOURCE are noticed after") == 1

    play(tmp_path, test)


def test_a_directory_that_may_not_be_watched_is_let_be(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        inotify: Any = world.watcher._inotify

        def add_watch(path: str, mask: int) -> int:
            raise OSError(errno.EACCES, "Permission denied")

        inotify.add_watch = add_watch
        await world.open("file")
        await world.tend()
        assert not world.watcher.watches

    play(tmp_path, test)


def test_events_of_unknown_watches_and_names_are_let_be(tmp_path: Path) -> None:
    async def test(world: Watched) -> None:
        await world.cached("file")
        ((number, _),) = world.watcher._directories.items()
        for event in ((99, MODIFY, 0, "file"), (99, IGNORED, 0, ""), (number, MODIFY, 0, "unknown"), (number, MODIFY, 0, "")):
            await world.watcher._take([Event(*event)])
        assert not world.changed and not world.gone

    play(tmp_path, test)


def test_a_store_that_is_far_away_is_not_watched(tmp_path: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, tmp_path, blocking=True)
            assert world.backing.watch_path(world.table.root.fd) is None
            await world.shut()

    trio.run(main)
