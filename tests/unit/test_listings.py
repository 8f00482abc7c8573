"""Listings of directories far away: believed for a while, unless we change them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from backing.base import RENAME_EXCHANGE, RENAME_NOREPLACE, Entry
from cachefs.fs import FileSystem
from cachefs.inode import Inode
from cachefs.listings import NAMES_MAX, KnownAbsent, Listings
from cachefs.question import Question
from world import CALLER, World

TTL_SECONDS = 5.0
Change = Callable[[FileSystem, Inode], Awaitable[object]]


def over(top: Path, test: Callable[[World, trio.testing.MockClock], Awaitable[None]], blocking: bool = True) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            clock = trio.lowlevel.current_clock()
            assert isinstance(clock, trio.testing.MockClock)
            world = World(nursery, top, blocking=blocking, seed=1, ttl_seconds=TTL_SECONDS)
            await test(world, clock)
            world.check()
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock())


async def listed(world: World, directory: Inode | None = None) -> dict[bytes, Inode | None]:
    """What a program finds in a directory, by default at the top."""
    number = world.fs.directories.open(directory or world.table.root)
    names = await world.names(number)
    found = await world.fs.directories.entries(number, names)
    seconds = [world.fs.directories.name_seconds(number, name) for name in names]
    assert all(0 <= left <= TTL_SECONDS for left in seconds)
    world.fs.directories.close(number)
    return dict(zip(names, found, strict=True))


def calls(world: World) -> int:
    return sum(world.backing.calls.values())


def test_a_directory_read_a_short_time_ago_costs_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()

    async def test(world: World, clock: trio.testing.MockClock) -> None:
        first = await listed(world)
        assert await listed(world, first[b"empty"]) == {}
        await world.fs.getattr(world.table.root)
        before = calls(world)
        clock.jump(TTL_SECONDS - 1)
        assert await listed(world) == first
        assert await listed(world, first[b"empty"]) == {}
        await world.fs.getattr(world.table.root)
        assert calls(world) == before
        assert [inode.lookups for inode in first.values() if inode] == [2, 2, 2]

    over(tmp_path, test)


def test_what_others_changed_is_seen_after_the_ttl(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()

    async def test(world: World, clock: trio.testing.MockClock) -> None:
        first = await listed(world)
        (tmp_path / "a").unlink()
        (tmp_path / "new").touch()
        (tmp_path / "c").rename(tmp_path / "b")
        clock.jump(TTL_SECONDS + 0.1)
        now = await listed(world)
        assert sorted(now) == [b"b", b"new"]
        assert now[b"b"] is first[b"c"]

    over(tmp_path, test)


def test_no_name_is_believed_for_longer_than_that(tmp_path: Path) -> None:
    (tmp_path / "a").touch()

    async def test(world: World, clock: trio.testing.MockClock) -> None:
        first = await listed(world)
        number = world.fs.directories.open(world.table.root)
        assert world.fs.directories.name_seconds(number, b"a") == TTL_SECONDS
        clock.jump(3)
        assert await listed(world) == first  # from memory: that makes nothing newer
        assert world.fs.directories.name_seconds(number, b"a") == pytest.approx(TTL_SECONDS - 3)
        clock.jump(TTL_SECONDS)
        assert world.fs.directories.name_seconds(number, b"a") == 0
        await listed(world)
        assert world.fs.directories.name_seconds(number, b"a") == TTL_SECONDS
        world.fs.directories.close(number)

    over(tmp_path, test)


def test_a_local_directory_is_read_each_time(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        assert await listed(world) == {}
        (tmp_path / "new").touch()
        assert list(await listed(world)) == [b"new"]

    over(tmp_path, test, blocking=False)


CHANGES: dict[str, Change] = {
    "create": lambda fs, top: fs.creation.create(top, b"new", 0o100644, os.O_RDWR, CALLER),
    "mknod": lambda fs, top: fs.creation.mknod(top, b"new", 0o100644, 0, CALLER),
    "mkdir": lambda fs, top: fs.creation.mkdir(top, b"new", 0o40755, CALLER),
    "symlink": lambda fs, top: fs.creation.symlink(top, b"new", b"target", CALLER),
    "unlink": lambda fs, top: fs.unlink(top, b"file"),
    "rmdir": lambda fs, top: fs.rmdir(top, b"directory"),
    "rename": lambda fs, top: fs.rename(top, b"file", top, b"new", 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_our_own_changes_are_seen_at_once(tmp_path: Path, change: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()

    async def test(world: World, clock: trio.testing.MockClock) -> None:
        await listed(world)
        await CHANGES[change](world.fs, world.table.root)
        assert sorted(await listed(world)) == sorted(map(os.fsencode, os.listdir(tmp_path)))
        await world.fs.getattr(world.table.root)
        assert world.table.root.st.st_mtime_ns == tmp_path.stat().st_mtime_ns

    over(tmp_path, test)


def test_a_rename_and_a_link_change_both_directories(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()

    async def test(world: World, clock: trio.testing.MockClock) -> None:
        found = await listed(world)
        directory, file = found[b"directory"], found[b"file"]
        assert directory is not None and file is not None
        assert await listed(world, directory) == {}
        await world.fs.link(file, directory, b"link")
        assert await listed(world, directory) == {b"link": file}
        await world.fs.rename(directory, b"link", world.table.root, b"moved", 0)
        assert await listed(world, directory) == {}
        assert sorted(await listed(world)) == [b"directory", b"file", b"moved"]

    over(tmp_path, test)


def test_a_listing_that_a_change_of_ours_may_have_overtaken_is_not_kept(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        for number in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listed, world)
                nursery.start_soon(world.fs.creation.mkdir, world.table.root, b"%d" % number, 0o40755, CALLER)
            assert len(await listed(world)) == number + 1

    over(tmp_path, test)


def test_remembers_so_many_names_and_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        listings, st = Listings(60), tmp_path.stat()
        first, second = Inode(5, st), Inode(6, st)
        for directory in (first, second):
            listings.read(directory, [Entry(b"x", 2, 0)] * (NAMES_MAX // 2 + 1), listings.begin())
        assert listings.entries(first) is None
        assert listings.entries(second) is not None
        listings.forget(second)
        listings.read(first, [Entry(b"x", 2, 0)] * NAMES_MAX, listings.begin())
        assert listings.entries(first) is not None

    trio.run(test)


# --- names that are not there


async def is_there(world: World, name: bytes, parent: Inode | None = None) -> bool:
    try:
        inode = await world.fs.lookup(parent or world.table.root, name)
    except FileNotFoundError:
        return False
    world.fs.forget(inode.node, 1)
    return True


def test_regression_what_a_listing_does_not_have_may_be_there(tmp_path: Path) -> None:
    """sshfs keeps listings for 20 s, and finds a name that is looked up."""

    async def test(world: World, clock: trio.testing.MockClock) -> None:
        await listed(world)
        (tmp_path / "new").touch()  # by somebody else
        assert await is_there(world, b"new")

    over(tmp_path, test)


def test_a_directory_that_was_made_here_is_known_to_be_empty(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await world.fs.creation.mkdir(world.table.root, b"made", 0o40755, CALLER)
        before = world.backing.calls["stat"]
        for name in (b"a", b"b"):
            assert not await is_there(world, name, made)
            await world.fs.creation.symlink(made, name, b"target", CALLER)
        assert not await is_there(world, b"c", made)
        assert world.backing.calls["stat"] == before + 2, "of what was made"
        assert await is_there(world, b"a", made)
        await world.fs.unlink(made, b"a")
        assert not await is_there(world, b"a", made)
        clock.jump(TTL_SECONDS)
        (tmp_path / "made" / "c").touch()
        assert await is_there(world, b"c", made)

    over(tmp_path, test)


async def made_here(world: World) -> Inode:
    return await world.fs.creation.mkdir(world.table.root, b"made", 0o40755, CALLER)


def test_after_a_change_that_failed_names_are_asked_for_again(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await made_here(world)
        (tmp_path / "made" / "theirs").touch()
        assert not await is_there(world, b"theirs", made)
        with pytest.raises(FileExistsError):
            await world.fs.creation.mkdir(made, b"theirs", 0o40755, CALLER)
        assert await is_there(world, b"theirs", made)

    over(tmp_path, test)


def test_who_is_told_that_there_is_nothing_hears_for_how_long(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await made_here(world)
        clock.jump(TTL_SECONDS - 0.5)
        with pytest.raises(KnownAbsent) as absent:
            await world.fs.lookup(made, b"nothing")
        assert absent.value.seconds == pytest.approx(0.5) and absent.value.errno == errno.ENOENT
        clock.jump(1)
        with pytest.raises(FileNotFoundError) as asked:
            await world.fs.lookup(made, b"nothing")
        assert not isinstance(asked.value, KnownAbsent)

    over(tmp_path, test)


@pytest.mark.parametrize(
    ("given", "asked", "same"),
    [("README", "readme", True), ("caf\u00e9", "cafe\u0301", True), ("Stra\u00dfe", "STRASSE", True), ("a", "b", False)],
)
def test_regression_a_name_may_be_there_in_another_spelling(tmp_path: Path, given: str, asked: str, same: bool) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await made_here(world)
        await world.fs.creation.symlink(made, given.encode(), b"target", CALLER)
        assert (world.fs.listings.seconds_absent(made, asked.encode()) == 0) == same
        assert world.fs.listings.seconds_absent(made, b"\xff\xfe") > 0, "no name that is no text breaks it"

    over(tmp_path, test)


def test_regression_of_two_names_that_differ_in_case_one_may_go(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await made_here(world)
        for name in (b"xt_MARK.h", b"xt_mark.h"):
            await world.fs.creation.symlink(made, name, b"target", CALLER)
        await world.fs.unlink(made, b"xt_mark.h")
        assert not world.fs.listings.seconds_absent(made, b"xt_MARK.h")
        await world.fs.unlink(made, b"xt_MARK.h")
        assert world.fs.listings.seconds_absent(made, b"xt_MARK.h")

    over(tmp_path, test)


def test_a_name_that_is_too_long_is_left_to_the_store(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        with pytest.raises(OSError) as error:
            await world.fs.lookup(await made_here(world), b"x" * 256)
        assert error.value.errno == errno.ENAMETOOLONG

    over(tmp_path, test)


@pytest.mark.parametrize("name", [b".snapshot", b"~snapshot", b".zfs"])
def test_regression_a_name_that_stores_have_and_do_not_list_is_asked_for(tmp_path: Path, name: bytes) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await made_here(world)
        (tmp_path / "made" / os.fsdecode(name)).mkdir()
        assert await is_there(world, name, made)

    over(tmp_path, test)


def test_regression_a_removal_that_nobody_waits_for_any_more_hides_nothing_made_since(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        fs, made = world.fs, await made_here(world)
        await fs.creation.symlink(made, b"x", b"target", CALLER)
        question = Question(fs.unlink, (made, b"x"), None, world.io.watchdog.tasks)  # type: ignore[arg-type]
        unlink = world.backing.unlink

        def unlink_late(dirfd: int, name: bytes) -> None:
            unlink(dirfd, name)
            trio.from_thread.run_sync(question.give_up)

        world.backing.unlink = unlink_late  # type: ignore[method-assign]
        await question.run()
        assert not fs.listings.seconds_absent(made, b"x")

    over(tmp_path, test)


def test_the_old_name_stays_where_both_are_one_file(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await made_here(world)
        inode = await world.fs.creation.mknod(made, b"one", 0o100644, 0, CALLER)
        await world.fs.link(inode, made, b"two")
        await world.fs.rename(made, b"one", made, b"two", 0)
        assert await is_there(world, b"one", made) and await is_there(world, b"two", made)

    over(tmp_path, test)


def test_a_rename_that_leaves_something_in_its_place_makes_nothing_known(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        made = await made_here(world)
        await world.fs.creation.mknod(made, b"one", 0o100644, 0, CALLER)
        with contextlib.suppress(OSError):
            await world.fs.rename(made, b"one", made, b"two", 4)  # RENAME_WHITEOUT
        assert await is_there(world, b"one", made) == os.path.lexists(tmp_path / "made" / "one")

    over(tmp_path, test)


def test_of_directories_made_here_what_is_believed_no_more_is_not_remembered(tmp_path: Path) -> None:
    async def test(world: World, clock: trio.testing.MockClock) -> None:
        listings = world.fs.listings
        for number in range(50):
            await world.fs.creation.mkdir(world.table.root, b"%d" % number, 0o40755, CALLER)
            clock.jump(TTL_SECONDS / 4)
        assert len(listings._made) < 10
        *_, older, directory = listings._made
        for number in range(NAMES_MAX + 1):
            listings.changed(directory, b"%d" % number, True)
        assert older not in listings._made and not listings._made_names

    over(tmp_path, test)


@pytest.mark.parametrize("seed", range(12))
def test_while_nobody_else_changes_anything_names_are_there_or_not_as_in_the_directory(tmp_path: Path, seed: int) -> None:
    rng, names = random.Random(seed), (b"a", b"b", b"c", b"d")

    async def change(world: World, parents: list[Inode]) -> None:
        fs, parent, other = world.fs, rng.choice(parents), rng.choice(parents)
        name, new = rng.choice(names), rng.choice(names)
        kind = rng.choice(("create", "mkdir", "symlink", "unlink", "rmdir", "rename", "exchange", "noreplace", "link", "list"))
        flags = {"exchange": RENAME_EXCHANGE, "noreplace": RENAME_NOREPLACE}.get(kind, 0)
        if kind == "create":
            inode, opened = await fs.creation.create(parent, name, 0o100644, os.O_RDWR, CALLER)
            await fs.files.release(opened.number)
            fs.forget(inode.node, 1)
        elif kind in ("mkdir", "symlink"):
            making = fs.creation.mkdir if kind == "mkdir" else fs.creation.symlink
            inode = await making(parent, name, 0o40755 if kind == "mkdir" else b"target", CALLER)  # type: ignore[operator]
            fs.forget(inode.node, 1)
        elif kind in ("unlink", "rmdir"):
            await (fs.unlink if kind == "unlink" else fs.rmdir)(parent, name)
        elif kind == "link":
            inode = await fs.lookup(parent, name)
            try:
                await fs.link(inode, other, new)
                fs.forget(inode.node, 1)
            finally:
                fs.forget(inode.node, 1)
        elif kind == "list":
            for found in (await listed(world, parent)).values():
                if found is not None:
                    fs.forget(found.node, 1)
        else:
            await fs.rename(parent, name, other, new, flags)

    async def test(world: World, clock: trio.testing.MockClock) -> None:
        known = 0
        for number in range(15):
            paths = [f"made-{number}", f"other-{number}"]
            parents = [await world.fs.creation.mkdir(world.table.root, path.encode(), 0o40755, CALLER) for path in paths]
            for _ in range(8):
                with contextlib.suppress(OSError):
                    await change(world, parents)
                for parent, path in zip(parents, paths, strict=True):
                    for name in names:
                        there = os.path.lexists(tmp_path / path / os.fsdecode(name))
                        known += world.fs.listings.seconds_absent(parent, name) > 0
                        assert await is_there(world, name, parent) == there, (path, name)
            for parent in parents:
                world.fs.forget(parent.node, 1)
        assert known > 100

    over(tmp_path, test)
