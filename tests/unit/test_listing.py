"""Listings as the kernel gets them: names alone or with attributes, and what it may keep of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from types import SimpleNamespace

import pytest
import trio

from cachefs.transport import wire
from cachefs.transport.lookers import LOOKS
from fake_kernel import NODE_OF_ROOT, Kernel, transfer
from test_lane import Stage, staged

OPEN_IN = Struct("=II")
KEPT, NEW = wire.OPEN_CACHE_DIR | wire.OPEN_KEEP_CACHE, wire.OPEN_CACHE_DIR


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every change in SOURCE were some time ago."""
    monkeypatch.setattr("cachefs.directories.CLOCK_AHEAD_NS", -(10**15))


def on(tmp_path: Path, main: Callable[[Stage], object], **options: object) -> None:
    async def run() -> None:
        async with staged(tmp_path, **options) as stage:
            await main(stage)  # type: ignore[misc]

    trio.run(run)


async def opendir(kernel: Kernel, node: int = NODE_OF_ROOT) -> tuple[int, int]:
    """The handle, and the flags that came with it."""
    handle, flags, _ = wire.OPENED.unpack((await kernel.must(wire.OPENDIR, node, OPEN_IN.pack(os.O_RDONLY, 0))).data)
    return handle, flags


async def releasedir(kernel: Kernel, handle: int, node: int = NODE_OF_ROOT) -> None:
    await kernel.must(wire.RELEASEDIR, node, handle.to_bytes(24, "little"))


async def listing(kernel: Kernel, handle: int, node: int = NODE_OF_ROOT, room: int = 4096) -> dict[bytes, tuple[int, int, int]]:
    """{name: (node of the attributes, number, kind)} of all that is told, but "." and ".."."""
    found: dict[bytes, tuple[int, int, int]] = {}
    offset = 0
    while data := (await kernel.must(wire.READDIRPLUS, node, transfer(handle, offset, room))).data:
        at = 0
        while at < len(data):
            told = wire.ENTRY.unpack_from(data, at)[0]
            number, offset, length, kind = wire.DIRENT.unpack_from(data, at + 128)
            name = bytes(data[at + 152 : at + 152 + length])
            if name not in (b".", b".."):
                assert name not in found
                found[name] = (told, number, kind)
            at += 152 + length + -length % 8
    return found


async def listed_once(kernel: Kernel, node: int = NODE_OF_ROOT) -> tuple[int, dict[bytes, tuple[int, int, int]]]:
    handle, flags = await opendir(kernel, node)
    found = await listing(kernel, handle, node)
    await releasedir(kernel, handle, node)
    return flags, found


def test_names_come_with_their_kinds_and_numbers_and_no_inode_is_made(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "fifo")

    async def main(stage: Stage) -> None:
        inodes = len(stage.world.table)
        _, found = await listed_once(stage.kernel)
        kinds = {b"f": stat.S_IFREG, b"directory": stat.S_IFDIR, b"link": stat.S_IFLNK, b"fifo": 0}
        assert {name: kind << 12 for name, (_, _, kind) in found.items()} == kinds
        for name, (told, number, _) in found.items():
            assert told == 0 and number == os.lstat(tmp_path / os.fsdecode(name)).st_ino
        assert len(stage.world.table) == inodes

    on(tmp_path, main)


@pytest.mark.parametrize("room", [200, 400, 4096, 1 << 16])
def test_every_name_comes_once_however_little_room_there_is(tmp_path: Path, room: int) -> None:
    names = {b"n" * (1 + i % 40) + b"%d" % i for i in range(300)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()

    async def main(stage: Stage) -> None:
        handle, _ = await opendir(stage.kernel)
        assert set(await listing(stage.kernel, handle, room=room)) == names | {b"f"}
        await releasedir(stage.kernel, handle)

    on(tmp_path, main)


def test_who_looks_at_what_it_lists_is_sent_attributes_and_the_lookups_are_counted(tmp_path: Path) -> None:
    for i in range(3 * LOOKS):
        (tmp_path / str(i)).touch()

    async def main(stage: Stage) -> None:
        _, found = await listed_once(stage.kernel)
        for name in sorted(found)[:LOOKS]:
            assert found[name][0] == 0
            await stage.kernel.must(wire.LOOKUP, body=name + b"\0")
        _, found = await listed_once(stage.kernel)
        for name, (told, number, _) in found.items():
            inode = stage.world.table.named(stage.world.table.root, name)
            assert inode is not None and told == inode.node == number
            assert inode.lookups == 1 + (name in sorted(found)[:LOOKS])

    on(tmp_path, main)


def test_names_that_are_missing_and_directories_are_not_looked_at_for_their_attributes(tmp_path: Path) -> None:
    for i in range(2 * LOOKS):
        (tmp_path / f"d{i}").mkdir()

    async def main(stage: Stage) -> None:
        await listed_once(stage.kernel)
        for i in range(2 * LOOKS):
            await stage.kernel.must(wire.LOOKUP, body=b"d%d\0" % i)
            await stage.kernel.ask(wire.LOOKUP, body=b"missing%d\0" % i)
        _, found = await listed_once(stage.kernel)
        assert all(told == 0 for told, _, _ in found.values())

    on(tmp_path, main)


def test_a_source_far_away_always_sends_attributes(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        _, found = await listed_once(stage.kernel)
        assert found[b"f"][0] != 0

    on(tmp_path, main, blocking=True)


@pytest.mark.usefixtures("settled")
def test_the_kernel_keeps_a_listing_until_the_directory_changes(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        assert (await listed_once(stage.kernel))[0] == NEW
        for _ in range(3):
            handle, flags = await opendir(stage.kernel)
            assert flags == KEPT
            await releasedir(stage.kernel, handle)
        (tmp_path / "new").touch()
        handle, flags = await opendir(stage.kernel)
        assert flags == NEW
        await releasedir(stage.kernel, handle)
        assert (await listed_once(stage.kernel))[0] == NEW, "it has not been read since"
        assert (await opendir(stage.kernel))[1] == KEPT

    on(tmp_path, main)


def test_a_directory_that_changed_just_now_is_read_anew(tmp_path: Path) -> None:
    """One more change in the same tick of the clock would leave its times as they are."""

    async def main(stage: Stage) -> None:
        for i in range(3):
            (tmp_path / str(i)).touch()
            assert (await listed_once(stage.kernel))[0] == NEW

    on(tmp_path, main)


@pytest.mark.usefixtures("settled")
def test_of_two_handles_one_makes_the_listing_that_is_kept(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        kernel = stage.kernel
        first, flags = await opendir(kernel)
        assert flags == NEW
        second, flags = await opendir(kernel)
        assert flags == wire.OPEN_KEEP_CACHE, "neither is what it reads kept, nor does it take away what the first one reads"
        await listing(kernel, first)
        (tmp_path / "new").touch()
        assert b"new" in await listing(kernel, second)
        for handle in (first, second):
            await releasedir(kernel, handle)
        assert (await opendir(kernel))[1] == NEW, "it is that of the first one, which is not as the directory is now"

    on(tmp_path, main)


@pytest.mark.usefixtures("settled")
def test_who_wants_attributes_gets_no_listing_without_them(tmp_path: Path) -> None:
    for i in range(2 * LOOKS):
        (tmp_path / str(i)).touch()

    async def main(stage: Stage) -> None:
        await listed_once(stage.kernel)
        assert (await opendir(stage.kernel))[1] == KEPT
        for number in list(stage.world.fs.directories.handles):
            await releasedir(stage.kernel, number)
        for i in range(LOOKS):
            await stage.kernel.must(wire.LOOKUP, body=b"%d\0" % i)
        assert (await listed_once(stage.kernel))[0] == NEW
        assert (await opendir(stage.kernel))[1] == KEPT, "now it has them"

    on(tmp_path, main)


@pytest.mark.usefixtures("settled")
def test_far_away_a_listing_is_believed_for_the_ttl(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        await listed_once(stage.kernel)
        handle, flags = await opendir(stage.kernel)
        assert flags == KEPT
        await releasedir(stage.kernel, handle)
        assert stage.world.table.root.listed is not None
        stage.world.table.root.listed.read_at -= 1.1
        assert (await opendir(stage.kernel))[1] == NEW

    on(tmp_path, main, blocking=True, ttl_seconds=1.0)


def test_a_name_that_is_not_there_is_believed_for_the_ttl(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node, _, name_s, *_ = wire.ENTRY.unpack_from((await stage.kernel.must(wire.LOOKUP, body=b"nothing\0")).data)
        assert (node, name_s) == (0, 1)

    on(tmp_path, main)


def test_closing_what_was_only_read_needs_no_request(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node = (await stage.kernel.must(wire.LOOKUP, body=b"f\0")).entry
        for how, expected in ((os.O_RDONLY, wire.OPEN_NOFLUSH), (os.O_WRONLY, 0), (os.O_RDWR, 0)):
            flags = wire.OPENED.unpack((await stage.kernel.must(wire.OPEN, node, OPEN_IN.pack(how, 0))).data)[1]
            assert flags == wire.OPEN_DIRECT_IO | expected

    on(tmp_path, main)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("blocking", [False, True])
def test_regression_a_listing_that_was_not_read_to_its_end_is_not_gone_on_with(tmp_path: Path, blocking: bool) -> None:
    """The kernel appends what the next handle reads to what it has: the directory of before and that of after made one."""
    for i in range(100):
        (tmp_path / str(i)).touch()

    async def main(stage: Stage) -> None:
        handle, _ = await opendir(stage.kernel)
        assert (await stage.kernel.must(wire.READDIRPLUS, NODE_OF_ROOT, transfer(handle, 0, 4096))).data
        await releasedir(stage.kernel, handle)
        assert (await opendir(stage.kernel))[1] == NEW

    on(tmp_path, main, blocking=blocking)


@pytest.mark.usefixtures("settled")
def test_regression_of_a_handle_that_goes_back_to_another_state_nothing_is_believed(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / str(i)).touch()

    async def main(stage: Stage) -> None:
        handle, _ = await opendir(stage.kernel)
        assert (await stage.kernel.must(wire.READDIRPLUS, NODE_OF_ROOT, transfer(handle, 0, 4096))).data
        (tmp_path / "new").touch()
        await listing(stage.kernel, handle)
        await releasedir(stage.kernel, handle)
        assert (await listed_once(stage.kernel))[0] == NEW
        assert (await opendir(stage.kernel))[1] == KEPT

    on(tmp_path, main)


@pytest.mark.parametrize("age_ns, ctime_ns, believed", [
    (10**9, 1_700_000_000_000_000_000, False), (3 * 10**9, 1_700_000_000_000_000_000, True),
    (10**9, 1_700_000_000_123_456_789, True), (10**7, 1_700_000_000_123_456_789, False),
])  # fmt: skip
def test_regression_where_times_go_in_whole_seconds_a_directory_has_to_be_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_ns: int, ctime_ns: int, believed: bool
) -> None:
    async def main(stage: Stage) -> None:
        state = SimpleNamespace(st_mtime_ns=ctime_ns, st_ctime_ns=ctime_ns)
        monkeypatch.setattr(stage.world.backing, "fstat", lambda fd: state)
        monkeypatch.setattr("cachefs.directories.time", SimpleNamespace(time_ns=lambda: ctime_ns + age_ns))
        _, kept = await stage.world.fs.directories._near_listing(stage.world.table.root)
        monkeypatch.undo()
        assert (kept is not None) == believed

    on(tmp_path, main)
