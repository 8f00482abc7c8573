"""The picture: right while files come, change and go; no burden to the mount, however much is cached and however many look."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from backing.directory import DirectoryBacking
from cachefs.cache import wishes
from cachefs.cache.page import GROUP_PAGES, PAGE_SIZE
from cachefs.config import make_config
from cachefs.history import SAMPLES, History
from cachefs.inode import Inode
from cachefs.page import picture as picture_module
from cachefs.page.picture import MOST_GONE, Frame, Picture
from cachefs.picturecommands import PictureCommands
from cachefs.stack import Stack
from stalls import STALL_SECONDS, assert_short_turns
from world import close_descriptors

P = PAGE_SIZE


class Scene:
    """A stack over a directory, its clock in the test's hand, and the picture of it."""

    def __init__(self, source: Path, nursery: trio.Nursery) -> None:
        options = {"cache_size": "8G", "readahead_max": "0", "write_through": "off"}
        config = make_config(str(source), str(source.parent / "mnt"), options, memory_bytes=64 << 30)
        self.source = source
        self.stack = Stack(config, DirectoryBacking(source), nursery, lambda inode: None, lambda parent, name: None)
        self.later_seconds = 0.0
        self.stack.cache.clock = lambda: time.monotonic() + self.later_seconds
        self.picture = Picture(self.stack, History(self.stack))

    async def open(self, name: str) -> tuple[Inode, int]:
        inode = await self.stack.fs.lookup(self.stack.table.root, os.fsencode(name))
        return inode, (await self.stack.files.open(inode, os.O_RDWR, 0)).number

    async def frame(self) -> Frame:
        self.later_seconds += 1.0
        return await self.picture.look()

    async def strips(self) -> dict[str | None, list[Any]]:
        return {strip[1]: strip for strip in (json.loads(text) for _, text in (await self.frame()).strips)}

    def close(self) -> None:
        """Lets go of every descriptor."""
        close_descriptors(self.stack.table, self.stack.io.backing)

    def fill(self, inode: Inode, page: int, count: int) -> None:
        """Makes pages clean without touching their memory."""
        assert inode.file is not None
        self.stack.cache.finish_fill(self.stack.cache.start_fill(inode.file, page, count, count), count * P)


def in_scene(tmp_path: Path, test: Callable[[Scene], Awaitable[None]]) -> None:
    source = tmp_path / "source"
    source.mkdir()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            scene = Scene(source, nursery)
            await test(scene)
            scene.close()
            nursery.cancel_scope.cancel()

    trio.run(run)


def test_strips_follow_reads_writes_pins_renames_and_removals(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        (scene.source / "f").write_bytes(os.urandom(10 * P))
        (scene.source / "g").write_bytes(b"g")
        stack = scene.stack
        inode, number = await scene.open("f")
        await stack.files.read(number, 2 * P, 3 * P)
        assert (await scene.strips())["f"][8::2] == ["..XXX.....", 1]
        await stack.files.write(number, 3 * P, b"x")
        node, path, size, cached, dirty, *_ = (await scene.strips())["f"]
        assert (node, path, size, cached, dirty) == (inode.node, "f", 10 * P, 3 * P, P)
        assert (await scene.strips())["f"][8] == "..XDX....."
        assert inode.file is not None
        wishes.pin(stack.cache, inode.file, True)
        assert (await scene.strips())["f"][8] == "..PDP....."
        await scene.open("g")
        assert "g" not in await scene.strips(), "nothing of it is cached"
        await stack.fs.rename(stack.table.root, b"f", stack.table.root, b"new", 0)
        assert list(await scene.strips()) == ["new"]
        await stack.fs.unlink(stack.table.root, b"new")
        assert list(await scene.strips()) == [None]
        wishes.pin(stack.cache, inode.file, False)
        await stack.files.release(number)
        stack.fs.drop(inode)

    in_scene(tmp_path, test)


def test_only_what_has_changed_is_new_and_what_went_is_told(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        for name in "abc":
            (scene.source / name).write_bytes(os.urandom(4 * P))
        opened = {name: await scene.open(name) for name in "abc"}
        for _, number in opened.values():
            await scene.stack.files.read(number, 0, P)
        first = await scene.frame()
        assert len(first.strips) == 3 and not first.gone
        await scene.stack.files.read(opened["a"][1], 0, 2 * P)
        file = opened["b"][0].file
        assert file is not None
        wishes.drop(scene.stack.cache, file, list(file.groups))
        second = await scene.frame()
        new = [json.loads(text)[1] for version, text in second.strips if version > first.version]
        assert "a" in new and len(new) <= 2, "c may have had its turn"
        assert second.gone == ((second.version, opened["b"][0].node),)
        assert second.epoch == first.epoch

    in_scene(tmp_path, test)


def test_a_strip_whose_mark_tells_nothing_is_made_anew_in_a_while(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        (scene.source / "d").mkdir()
        (scene.source / "d" / "f").write_bytes(b"f")
        d = await scene.stack.fs.lookup(scene.stack.table.root, b"d")
        inode = await scene.stack.fs.lookup(d, b"f")
        number = (await scene.stack.files.open(inode, os.O_RDONLY, 0)).number
        await scene.stack.files.read(number, 0, 1)
        assert list(await scene.strips()) == ["d/f"]
        await scene.stack.fs.rename(scene.stack.table.root, b"d", scene.stack.table.root, b"e", 0)
        looks = [list(await scene.strips()) for _ in range(picture_module.ANEW_EVERY)]
        assert looks[-1] == ["e/f"]

    in_scene(tmp_path, test)


def test_hits_a_second_are_those_since_the_last_look(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        (scene.source / "f").write_bytes(b"f")
        _, number = await scene.open("f")
        await scene.stack.files.read(number, 0, 1)
        assert (await scene.strips())["f"][7] == 0.0
        scene.later_seconds += 1000.0
        await scene.strips()
        for _ in range(50):
            scene.stack.files.read_now(number, 0, 1)
        assert (await scene.strips())["f"][7] == pytest.approx(50.0, rel=0.1)
        assert (await scene.strips())["f"][7] == 0.0

    in_scene(tmp_path, test)


def test_many_who_look_at_once_get_one_look(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        (scene.source / "f").write_bytes(b"f")
        scene.later_seconds += 1.0
        frames: list[Frame] = []

        async def look() -> None:
            frames.append(await scene.picture.look())

        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(look)
        assert len({id(frame) for frame in frames}) == 1 and len(frames) == 300

    in_scene(tmp_path, test)


def test_what_went_long_ago_is_forgotten_and_said_to_be(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        scene.picture._gone.extend((1, node) for node in range(MOST_GONE + 5))
        frame = await scene.frame()
        assert len(frame.gone) == MOST_GONE and frame.oldest_gone == 1

    in_scene(tmp_path, test)


def test_the_history_is_bounded_and_its_samples_are_counters(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        (scene.source / "f").write_bytes(os.urandom(4 * P))
        _, number = await scene.open("f")
        history = scene.picture.history
        await scene.stack.files.read(number, 0, 4 * P)
        await scene.stack.files.write(number, 0, b"x" * P)
        history.take()
        before, after = list(history.samples)[-2:]
        assert (after.page_misses - before.page_misses, after.dirty_bytes, after.write_bytes - before.write_bytes) == (4, P, P)
        for _ in range(2 * SAMPLES):
            history.take()
        assert len(history.samples) == SAMPLES

    in_scene(tmp_path, test)


FILES, PAGES_OF_EACH = 10_000, 105  # 4 GiB


def test_a_million_pages_of_ten_thousand_files_stall_nobody_for_twenty_milliseconds(tmp_path: Path) -> None:
    """First look, looks with nothing new, and looks while a hundred files change. Times of the processor, between two pauses."""

    async def test(scene: Scene) -> None:
        inodes = []
        for i in range(FILES):
            path = scene.source / f"file{i}"
            path.touch()
            os.truncate(path, PAGES_OF_EACH * P)
            inode, number = await scene.open(path.name)
            scene.fill(inode, 0, PAGES_OF_EACH)
            await scene.stack.files.release(number)
            inodes.append(inode)
        assert scene.stack.cache.resident_pages > 1 << 20
        gc.collect()
        stalls: list[float] = []
        work: list[float] = []

        async def measured(function: Callable[[], Awaitable[object]]) -> None:
            """Every turn of the task, by an instrument: its time is what others wait for."""
            meter = Meter(trio.lowlevel.current_task())
            trio.lowlevel.add_instrument(meter)
            try:
                await trio.lowlevel.checkpoint()
                await function()
            finally:
                trio.lowlevel.remove_instrument(meter)
            stalls.extend(meter.turns)
            work.append(sum(meter.turns))

        await measured(scene.frame)
        assert len(scene.picture.shown) == FILES
        for _ in range(3):
            await measured(scene.frame)
        for inode in inodes[::100]:
            file = inode.file
            assert file is not None
            wishes.drop(scene.stack.cache, file, list(file.groups))
        await measured(scene.frame)
        assert len(scene.picture.shown) == FILES - 100

        async def top() -> None:
            sent: list[Mapping[str, Any]] = []

            async def send(message: Mapping[str, object]) -> None:
                sent.append(message)

            commands = PictureCommands(scene.picture, lambda: scene.stack.statistics("off", {}, 0.0))
            await commands.handlers()["top"]({}, send)
            await commands.handlers()["picture"]({}, send)
            assert sum(len(json.loads(message.get("strips", "[]"))) for message in sent) == FILES - 100

        await measured(top)
        steps = ", ".join(f"{seconds * 1e3:.0f}" for seconds in work)
        what = "first look, three with nothing new, one with 100 changes, top and map"
        print(f"{what}: {steps} ms; longest turn {max(stalls) * 1e3:.1f} ms")
        longest.append(max(stalls))

    def longest_turn(directory: Path) -> float:
        in_scene(directory, test)
        return longest[-1]

    longest: list[float] = []
    assert_short_turns(tmp_path, longest_turn)


def test_a_file_of_4_gib_is_looked_at_in_pieces(tmp_path: Path) -> None:
    async def test(scene: Scene) -> None:
        path = scene.source / "large"
        path.touch()
        os.truncate(path, 4 << 30)
        inode, _ = await scene.open("large")
        for start in range(0, 1 << 20, GROUP_PAGES):
            scene.fill(inode, start, GROUP_PAGES)
        gc.collect()  # what earlier tests left
        meter = Meter(trio.lowlevel.current_task())
        trio.lowlevel.add_instrument(meter)
        await scene.frame()
        await scene.picture.file(inode.node)
        trio.lowlevel.remove_instrument(meter)
        print(f"{sum(meter.turns) * 1e3:.0f} ms, longest turn {max(meter.turns) * 1e3:.1f} ms")
        assert len(meter.turns) > 3 and max(meter.turns) < STALL_SECONDS

    in_scene(tmp_path, test)


class Meter(trio.abc.Instrument):
    """Processor time of each turn of one task."""

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self._task = task
        self._began = time.thread_time()  # the turn under way counts from here
        self.turns: list[float] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.turns.append(time.thread_time() - self._began)
