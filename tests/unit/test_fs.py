"""Names and attributes over a backing that fails after it has done what was asked, and in which others move things about."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from backing.base import RENAME_EXCHANGE
from cachefs.creation import Caller
from cachefs.inode import Inode, patched
from cachefs.journal.records import PATHS_MAX, unpack_file
from cachefs.setattr import Changes
from world import CALLER, World

BLIND: list[dict[str, object]] = [{"op": "fstat", "errno": "EIO"}]  # no look at an open inode's attributes works
both = pytest.mark.parametrize("blocking", [False, True])
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
Step = Callable[[World, Inode], Awaitable[object]]
SOMEBODY = Caller(4711, 4712, 0o022)


def over(top: Path, test: Callable[[World], Awaitable[None]], blocking: bool) -> None:
    """Runs a test in a world over `top`."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top, blocking=blocking)
            await test(world)
            world.check()
            world.backing.set_plan([])
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main)


def far_with_journal(top: Path, test: Callable[[World], Awaitable[None]]) -> None:
    """The same far away, with a journal, over the directory `source` in `top`."""
    for name in ("source", "state"):
        (top / name).mkdir(exist_ok=True)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, top / "source", blocking=True, journal=top / "state")
            try:
                await test(world)
            finally:
                world.backing.set_plan([])
            await world.shut()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_patched_attributes_differ_in_nothing_else(tmp_path: Path) -> None:
    st = os.stat(tmp_path)
    other = patched(st, st_nlink=77, st_mtime_ns=5)
    assert (other.st_nlink, other.st_mtime_ns) == (77, 5)
    names = [name for name in dir(st) if name.startswith("st_") and name not in ("st_nlink", "st_mtime", "st_mtime_ns")]
    assert {name: getattr(other, name) for name in names if name.endswith("_ns") or name[3] not in "amc"} == {
        name: getattr(st, name) for name in names if name.endswith("_ns") or name[3] not in "amc"
    }
    assert (other.st_mode, other.st_ctime_ns) == (st.st_mode, st.st_ctime_ns)


async def link(world: World, inode: Inode) -> None:
    await world.fs.link(inode, world.table.root, b"other")


async def rename(world: World, inode: Inode) -> None:
    await world.fs.rename(world.table.root, b"file", world.table.root, b"other", 0)


async def exchange(world: World, inode: Inode) -> None:
    await world.fs.rename(world.table.root, b"file", world.table.root, b"target", RENAME_EXCHANGE)


def setattr_of(**changes: int) -> Step:
    async def change(world: World, inode: Inode) -> None:
        await world.files.setter.setattr(inode, Changes(**changes), 0)

    return change


async def setxattr(world: World, inode: Inode) -> None:
    await world.fs.xattrs.setxattr(inode, b"user.a", b"1")


CHANGES: dict[str, Step] = {
    "link": link,
    "rename": rename,
    "exchange": exchange,
    "chmod": setattr_of(mode=0o100604),
    "chown": setattr_of(uid=4711, gid=4712),
    "setxattr": setxattr,
}


@both
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_the_backing_made_succeeds_whatever_becomes_of_the_look_at_it(
    tmp_path: Path, change: str, blocking: bool
) -> None:
    if change == "chown" and os.geteuid():
        pytest.skip("only root gives files away")

    async def main(world: World) -> None:
        (tmp_path / "file").write_bytes(b"contents")
        (tmp_path / "target").write_bytes(b"target")
        inode, handle = await world.open("file")
        await world.open("target")
        assert await world.read(handle, 0, 99) == b"contents"
        world.backing.set_plan(BLIND)
        await CHANGES[change](world, inode)
        theirs, seen = os.stat(f"/proc/self/fd/{inode.reader}"), inode.attributes().st
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size"):
            assert getattr(seen, name) == getattr(theirs, name), name
        assert not world.files.attributes.believed(inode), "the next look is due at once"
        world.backing.set_plan([])
        await world.fs.getattr(inode)
        assert inode.st == theirs
        assert await world.read(handle, 0, 99) == b"contents"

    over(tmp_path, main, blocking)


@both
def test_times_and_sizes_set_are_shown_whatever_becomes_of_the_look_at_them(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"unwritten")
        # On a local backing a look comes first, so that somebody else's change is not hidden.
        look: list[dict[str, object]] = [{"op": "fstat", "errno": "EIO", "after": 0 if blocking else 1}]
        world.backing.set_plan(look)
        await world.files.setter.setattr(inode, Changes(mtime_ns=5_000_000_007), 0)
        assert inode.attributes().mtime_ns == 5_000_000_007
        world.backing.set_plan(look)
        await world.files.setter.setattr(inode, Changes(size=4), 0)
        assert (inode.attributes().size, os.stat(tmp_path / "file").st_size) == (4, 4)
        assert inode.attributes().mtime_ns > 5_000_000_007
        world.backing.set_plan([])
        await world.files.fsync(handle, False)
        assert (tmp_path / "file").read_bytes() == b"unwr"

    over(tmp_path, main, blocking)


# --- what is made is given away by descriptor


def plant_file_of_another(top: Path, name: str) -> None:
    """What somebody who may write SOURCE can do: a file of root, that he may rename, takes the new one's name."""
    os.rename(top / "secret", top / name)


def plant_hard_link(top: Path, name: str) -> None:
    os.unlink(top / name)
    os.link(top / "secret", top / name)


def plant_directory(top: Path, name: str) -> None:
    os.rmdir(top / name)
    os.rename(top / "full", top / name)


def plant_symlink(top: Path, name: str) -> None:
    (os.rmdir if os.path.isdir(top / name) else os.unlink)(top / name)
    os.symlink("secret", top / name)


PLANTS = [
    ("mknod", plant_file_of_another),
    ("mknod", plant_hard_link),
    ("mknod", plant_symlink),
    ("fifo", plant_hard_link),
    ("mkdir", plant_directory),
    ("mkdir", plant_symlink),
    ("symlink", plant_hard_link),
]


@as_root
@both
@pytest.mark.parametrize(("kind", "plant"), PLANTS)
def test_what_somebody_put_in_the_place_of_a_new_node_is_not_given_away(
    tmp_path: Path, kind: str, plant: Callable[[Path, str], None], blocking: bool
) -> None:
    (tmp_path / "secret").write_bytes(b"of root")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"of root")

    async def main(world: World) -> None:
        method = {"fifo": "mknod"}.get(kind, kind)
        make = getattr(world.backing.inner, method)

        def make_and_plant(*args: object) -> None:
            make(*args)
            plant(tmp_path, "new")

        setattr(world.backing.inner, method, make_and_plant)
        root = world.table.root
        if kind == "mkdir":
            inode = await world.fs.creation.mkdir(root, b"new", 0o755, SOMEBODY)
        elif kind == "symlink":
            inode = await world.fs.creation.symlink(root, b"new", b"target", SOMEBODY)
        else:
            mode = stat.S_IFREG if kind == "mknod" else stat.S_IFIFO
            inode = await world.fs.creation.mknod(root, b"new", mode | 0o6755, 0, SOMEBODY)
        planted = os.lstat(tmp_path / "new")
        assert (planted.st_uid, planted.st_gid) == (0, 0)
        assert not planted.st_mode & 0o6000
        assert os.stat(tmp_path / "secret" if (tmp_path / "secret").exists() else tmp_path / "new").st_uid == 0
        assert (inode.st.st_uid, inode.key[1]) == (0, planted.st_ino)

    over(tmp_path, main, blocking)


@as_root
@both
def test_what_is_made_belongs_to_who_asked_for_it(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        root = world.table.root
        made = [
            await world.fs.creation.mkdir(root, b"dir", 0o755, SOMEBODY),
            await world.fs.creation.symlink(root, b"link", b"secret", SOMEBODY),
            await world.fs.creation.mknod(root, b"fifo", stat.S_IFIFO | 0o644, 0, SOMEBODY),
            await world.fs.creation.mknod(root, b"device", stat.S_IFCHR | 0o644, os.makedev(1, 3), SOMEBODY),
            await world.fs.creation.mknod(root, b"set-id", stat.S_IFREG | 0o6755, 0, SOMEBODY),
            await world.fs.creation.mknod(root, b"plain", 0o644, 0, SOMEBODY),
        ]
        for inode, name in zip(made, ("dir", "link", "fifo", "device", "set-id", "plain"), strict=True):
            st = os.lstat(tmp_path / name)
            assert (st.st_uid, st.st_gid) == (4711, 4712), name
            assert inode.st == st
        assert stat.S_IMODE(os.lstat(tmp_path / "set-id").st_mode) == 0o6755

    over(tmp_path, main, blocking)


def test_regression_a_write_that_waits_for_its_page_leaves_the_times_alone(tmp_path: Path) -> None:
    """Writeback of other pages gave the file the mtime of a write that had not happened; after a kill it never did."""
    (tmp_path / "file").write_bytes(bytes(4096))

    async def test(world: World) -> None:
        inode, number = await world.open("file")
        await world.files.write(number, 4096, bytes(4096))
        await world.files.setter.setattr(inode, Changes(mtime_ns=10**18), 0)
        world.backing.set_plan([{"op": "preadv", "hang": True}])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.files.write, number, 7, b"x")
            while not world.backing.calls["preadv"]:
                await trio.sleep(0.001)
            seen = [inode.attributes().mtime_ns]
            await world.writeback.flush(inode)
            seen.append(os.stat(tmp_path / "file").st_mtime_ns)
            world.backing.set_plan([])
        assert seen == [10**18] * 2
        assert inode.attributes().mtime_ns > 10**18

    over(tmp_path, test, False)


@pytest.mark.parametrize("flags", [0, RENAME_EXCHANGE])
def test_regression_while_a_rename_is_under_way_unwritten_files_are_known_by_both_names(tmp_path: Path, flags: int) -> None:
    """The other one of an exchange was known by its old name alone: far away, where there are no handles, it was not found."""

    async def main(world: World) -> None:
        root, inodes = world.table.root, []
        for name in ("a", "b"):
            inode, handle = await world.open(name)
            await world.files.write(handle, 0, name.encode())
            inodes.append(inode)
        seen: list[set[bytes]] = []

        def look(*arguments: object) -> None:
            seen.extend(set(paths_of(inode)) for inode in inodes if inode.journaled is not None)

        world.backing.rename = look  # type: ignore[method-assign,assignment]
        await world.fs.rename(root, b"a", root, b"b", flags)
        assert seen == [{b"a", b"b"}, {b"a", b"b"} if flags else {b"b"}]

    far_with_journal(tmp_path, main)


def paths_of(inode: Inode) -> tuple[bytes, ...]:
    """Where the journal says that a file with unwritten data is to be looked for."""
    assert inode.journaled is not None
    return unpack_file(inode.journaled.record.pack()).paths


@contextlib.asynccontextmanager
async def renames_that_hang(world: World, *renames: tuple[Inode, bytes, Inode, bytes]) -> AsyncIterator[None]:
    """They are under way inside, and go on behind."""
    world.backing.set_plan([{"op": "rename", "hang": True, "count": len(renames)}])
    done = world.backing.calls["rename"]
    async with trio.open_nursery() as nursery:
        try:
            for number, rename in enumerate(renames, 1):
                nursery.start_soon(world.fs.rename, *rename, 0)
                while world.backing.calls["rename"] < done + number:
                    await trio.lowlevel.checkpoint()
            yield
        finally:
            world.backing.set_plan([])


def test_regression_a_rename_under_way_is_not_forgotten_when_another_ends_or_the_file_is_written_anew(tmp_path: Path) -> None:
    """A directory's rename had every unwritten file's paths written down as they were known: without where others were going."""
    (tmp_path / "source" / "dir" / "below").mkdir(parents=True)

    async def main(world: World) -> None:
        root, fs = world.table.root, world.fs
        inode, handle = await world.open("a")
        await world.files.write(handle, 0, b"unwritten")
        directory = await fs.lookup(root, b"dir")
        below, opened = await fs.creation.create(directory, b"b", 0o100644, os.O_RDWR | os.O_CREAT, CALLER)
        async with renames_that_hang(world, (root, b"a", root, b"z"), (root, b"dir", root, b"other")):
            await world.writeback.flush(inode)
            assert inode.journaled is None
            await world.files.write(handle, 0, b"again")
            await world.files.write(opened.number, 0, b"new")
            await fs.rename(directory, b"below", directory, b"above", 0)
            assert set(paths_of(inode)) == {b"a", b"z"} and set(paths_of(below)) == {b"dir/b", b"other/b"}
        assert (paths_of(inode), paths_of(below)) == ((b"z",), (b"other/b",))

    far_with_journal(tmp_path, main)


def test_a_rename_under_way_goes_along_with_the_directory_that_is_renamed_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "source" / "dir").mkdir(parents=True)

    async def main(world: World) -> None:
        root, fs = world.table.root, world.fs
        directory = await fs.lookup(root, b"dir")
        inode, opened = await fs.creation.create(directory, b"b", 0o100644, os.O_RDWR | os.O_CREAT, CALLER)
        await world.files.write(opened.number, 0, b"unwritten")
        async with renames_that_hang(world, (directory, b"b", directory, b"c")):
            await fs.rename(root, b"dir", root, b"other", 0)
            assert set(paths_of(inode)) == {b"other/b", b"other/c"}
        assert paths_of(inode) == (b"other/c",)

    far_with_journal(tmp_path, main)


def test_of_many_names_those_that_a_rename_under_way_gives_are_written_down_first(tmp_path: Path) -> None:
    (tmp_path / "source" / "dir").mkdir(parents=True)

    async def main(world: World) -> None:
        root, fs = world.table.root, world.fs
        directory = await fs.lookup(root, b"dir")
        inode, opened = await fs.creation.create(directory, b"0", 0o100644, os.O_RDWR | os.O_CREAT, CALLER)
        for number in range(1, PATHS_MAX):
            await fs.link(inode, directory, b"%d" % number)
        await world.files.write(opened.number, 0, b"unwritten")
        async with renames_that_hang(world, (root, b"dir", root, b"other")):
            assert paths_of(inode) == tuple(b"other/%d" % number for number in range(PATHS_MAX))

    far_with_journal(tmp_path, main)


# what is made far away costs no more than it has to

def test_times_set_beside_unwritten_data_go_there_with_it(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"unwritten")
        ctime_ns = inode.attributes().ctime_ns
        before = world.backing.calls.copy()
        await world.files.setter.setattr(inode, Changes(atime_ns=3_000_000_007, mtime_ns=5_000_000_007), 0)
        assert world.backing.calls == before
        seen = inode.attributes()
        assert (seen.st.st_atime_ns, seen.mtime_ns) == (3_000_000_007, 5_000_000_007)
        assert seen.ctime_ns >= ctime_ns
        await world.files.flush(handle)
        assert world.backing.calls["utime"] == before["utime"] + 1
        theirs, seen = os.stat(tmp_path / "file"), inode.attributes()
        assert (theirs.st_atime_ns, theirs.st_mtime_ns) == (3_000_000_007, 5_000_000_007)
        assert (seen.st.st_atime_ns, seen.mtime_ns) == (3_000_000_007, 5_000_000_007)
        await world.files.write(handle, 0, b"more")
        await world.files.flush(handle)
        assert os.stat(tmp_path / "file").st_atime_ns == 3_000_000_007
        assert os.stat(tmp_path / "file").st_mtime_ns > 5_000_000_007
        assert not world.changed

    over(tmp_path, main, True)


def test_times_set_beside_data_that_is_cut_away_are_not_lost(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"unwritten")
        await world.files.setter.setattr(inode, Changes(atime_ns=3_000_000_007, mtime_ns=5_000_000_007), 0)
        await world.files.setter.setattr(inode, Changes(size=0), 0)
        await world.files.flush(handle)
        assert os.stat(tmp_path / "file").st_atime_ns == inode.attributes().st.st_atime_ns == 3_000_000_007

    over(tmp_path, main, True)


@both
def test_times_set_where_nothing_is_unwritten_go_there_at_once(tmp_path: Path, blocking: bool) -> None:
    async def main(world: World) -> None:
        inode, _ = await world.open("file")
        await world.files.setter.setattr(inode, Changes(atime_ns=3_000_000_007, mtime_ns=5_000_000_007), 0)
        assert os.stat(tmp_path / "file").st_mtime_ns == 5_000_000_007

    over(tmp_path, main, blocking)


def test_times_of_a_file_that_was_not_made_here_go_there_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"unwritten")
        world.backing.set_plan([{"op": "utime", "errno": "EPERM"}])
        with pytest.raises(PermissionError):
            await world.files.setter.setattr(inode, Changes(mtime_ns=5_000_000_007), 0)

    over(tmp_path, main, True)


def test_a_file_given_to_who_has_it_is_not_given_again(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.write(handle, 0, b"unwritten")
        st, ctime_ns = inode.st, inode.attributes().ctime_ns
        await world.files.setter.setattr(inode, Changes(uid=st.st_uid, gid=st.st_gid), 0)
        assert not world.backing.calls["chown"]
        assert inode.attributes().ctime_ns >= ctime_ns
        await world.files.setter.setattr(inode, Changes(), 0)  # chown(-1, -1)
        assert world.backing.calls["chown"] == 1
        await world.files.flush(handle)
        # Nothing is unwritten: who knows what else it takes away.
        await world.files.setter.setattr(inode, Changes(uid=st.st_uid), 0)
        assert world.backing.calls["chown"] == 2

    over(tmp_path, main, True)


@pytest.mark.parametrize("before", [None, Changes(mode=0o100600), Changes(uid=os.geteuid() + 7)])
def test_a_file_just_made_is_not_given_to_who_has_it_unless_something_was_done_with_it(
    tmp_path: Path, before: Changes | None
) -> None:
    if before is not None and before.uid and os.geteuid():
        pytest.skip("only root gives files away")

    async def main(world: World) -> None:
        inode, _ = await world.open("file")
        if before is not None:
            await world.files.setter.setattr(inode, before, 0)
        done, ctime_ns, st = world.backing.calls["chown"], inode.attributes().ctime_ns, inode.st
        await world.files.setter.setattr(inode, Changes(uid=st.st_uid, gid=st.st_gid), 0)
        assert world.backing.calls["chown"] - done == (before is not None)
        assert inode.attributes().ctime_ns >= ctime_ns
        await world.files.setter.setattr(inode, Changes(uid=st.st_uid), 0)
        if before is None:
            assert world.backing.calls["chown"] == 0
        assert os.stat(tmp_path / "file").st_uid == st.st_uid

    over(tmp_path, main, True)


def test_set_id_bits_go_with_a_chown_to_who_has_the_file(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("file")
        await world.files.setter.setattr(inode, Changes(mode=0o104755), 0)
        await world.files.write(handle, 0, b"unwritten")
        await world.files.setter.setattr(inode, Changes(uid=inode.st.st_uid), 0)
        assert world.backing.calls["chown"] == 1

    over(tmp_path, main, True)


def test_a_directory_is_looked_at_again_before_anybody_asks(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        await world.fs.creation.mkdir(world.table.root, b"d", 0o40755, Caller(os.geteuid(), os.getegid(), 0o022))
        await trio.testing.wait_all_tasks_blocked(0.05)
        while not world.files.attributes.believed(world.table.root):
            await trio.sleep(0.01)
        before = world.backing.calls.copy()
        await world.fs.getattr(world.table.root)
        assert world.backing.calls == before
        assert world.table.root.st.st_nlink == os.stat(tmp_path).st_nlink
        assert world.table.root.st.st_mtime_ns == os.stat(tmp_path).st_mtime_ns

    over(tmp_path, main, True)


def test_a_file_that_is_called_otherwise_by_another_name_is_one_inode(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        inode, handle = await world.open("a")
        (tmp_path / "b").touch()  # as the backing shows the other name
        st = os.stat(tmp_path / "b")
        world.table.alias(inode, st)
        assert world.fs.found(world.table.root, b"b", st) is inode
        assert inode.attributes().st.st_nlink == 2
        world.table.rebind(inode, inode.st)
        assert inode.aliases == {(st.st_dev, st.st_ino)} and world.table.known(st) is inode, "it is as it was"
        world.table.rebind(inode, st)
        assert inode.key == (st.st_dev, st.st_ino) and not inode.aliases and world.table.known(st) is inode
        await world.release(handle)

    over(tmp_path, main, True)
