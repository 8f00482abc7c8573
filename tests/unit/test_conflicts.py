"""Files that two sides changed: whose version goes where, what is never overwritten, and what is no conflict."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

import cachefs.conflicts
from cachefs.cache.page import PAGE_SIZE
from cachefs.copies import conflict_name, cut
from cachefs.inode import Inode
from cachefs.setattr import Changes
from world import CALLER, World

P = PAGE_SIZE
WHEN = 1_795_000_000.0
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(params=[False, True], ids=["local", "far"])
def far(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def play(tmp_path: Path, far: bool) -> Callable[..., None]:
    """Runs a coroutine function with a `World` over `tmp_path`, under a clock that jumps."""

    def run(test: Callable[[World], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            async with world_of(tmp_path, far, **options) as world:
                await test(world)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    return run


@asynccontextmanager
async def world_of(top: Path, far: bool, **options: Any) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(nursery, top, **{"blocking": far, "seed": 1 if far else None, "ttl_seconds": 0.0, **options})
        yield world
        world.check()
        await world.shut()
        nursery.cancel_scope.cancel()


def copies(top: Path) -> dict[str, bytes]:
    """{name: contents} of the copies there are."""
    return {path.name: path.read_bytes() for path in sorted(top.rglob("*.conflict-*"))}


def the_copy(top: Path) -> bytes:
    (contents,) = copies(top).values()
    return contents


async def dirty(world: World, name: str, data: bytes, offset: int = 0) -> tuple[Inode, int]:
    """Opens a file and writes to it, which is not written back."""
    inode, handle = await world.open(name)
    await world.files.write(handle, offset, data)
    assert inode.unwritten
    return inode, handle


# --- theirs


@pytest.mark.parametrize("size", [0, 100, 5 * P, 8 * P + 17, 40 * P])
def test_their_version_is_copied_and_ours_goes_into_the_file(play: Callable[..., None], tmp_path: Path, size: int) -> None:
    theirs = os.urandom(size)

    async def test(world: World) -> None:
        (tmp_path / "file").write_bytes(b"o" * 5 * P)
        inode, handle = await world.open("file")
        assert await world.read(handle, 0, 5 * P) == b"o" * 5 * P
        await world.files.write(handle, P, b"ours" * 1024)
        (tmp_path / "file").write_bytes(theirs)
        await world.files.fsync(handle, False)
        expected = bytearray(theirs[: 5 * P].ljust(5 * P, b"\0"))
        expected[P : 2 * P] = b"ours" * 1024
        assert (tmp_path / "file").read_bytes() == expected
        assert the_copy(tmp_path) == theirs
        assert await world.read(handle, 0, 6 * P) == expected, "the old contents are gone from the cache too"
        assert inode.attributes().size == inode.st.st_size == 5 * P

    play(test)


def test_it_is_counted_told_and_listed(play: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        inode, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"theirs")
        world.changed.clear()
        await world.files.fsync(handle, False)
        statistics = world.files.conflicts.statistics()
        (conflict,) = statistics.recent
        assert statistics.total == 1
        assert (conflict.path, conflict.kept) == ("file", "theirs") and (tmp_path / conflict.copy).read_bytes() == b"theirs"
        assert '"file" was changed in SOURCE while data of ours was unwritten' in caplog.text
        assert f'that version is kept as "{conflict.copy}"' in caplog.text
        assert inode in world.changed, "the kernel is told"

    play(test)


def test_the_list_of_recent_ones_is_bounded(play: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cachefs.conflicts, "RECENT_MAX", 10)

    async def test(world: World) -> None:
        _, handle = await world.open("file")
        for i in range(13):
            await world.files.write(handle, 0, b"ours %d" % i)
            (tmp_path / "file").write_bytes(b"theirs %d" % i)
            await world.files.fsync(handle, False)
        statistics = world.files.conflicts.statistics()
        assert statistics.total == 13 and len(statistics.recent) == 10
        assert sorted(copies(tmp_path).values()) == sorted(b"theirs %d" % i for i in range(13))

    play(test)


def test_nobody_opens_the_file_while_we_write_to_it(tmp_path: Path) -> None:
    """What is written then could not be told from ours; who has it open already is another matter."""
    answers: list[str] = []

    async def main() -> None:
        async with world_of(tmp_path, far=False) as world:
            _, handle = await dirty(world, "file", b"ours")
            backing: Any = world.backing.inner
            real = backing.pwritev

            def pwritev(*args: Any) -> int:
                try:
                    os.close(os.open(tmp_path / "file", os.O_WRONLY | os.O_NONBLOCK))
                    answers.append("opened")
                except BlockingIOError:
                    answers.append("refused")
                nbytes: int = real(*args)
                return nbytes

            backing.pwritev = pwritev
            await world.files.fsync(handle, False)
            await world.files.write(handle, 0, b"OURS")
            theirs = os.open(tmp_path / "file", os.O_RDONLY)
            await world.files.fsync(handle, False)
            os.close(theirs)

    with open(tmp_path / "probe", "wb") as probe:
        try:
            fcntl.fcntl(probe, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            pytest.skip("no leases here")
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert answers == ["refused", "opened"]


def test_a_change_that_is_half_as_old_as_the_clock_s_tick_is_told_apart(play: Callable[..., None], tmp_path: Path) -> None:
    """Same size, and an mtime of the same tick: the times of the backing alone have to do."""

    async def test(world: World) -> None:
        for i in range(50):
            _, handle = await dirty(world, f"file{i}", b"ours!!")
            await world.files.fsync(handle, False)
            await world.files.write(handle, 0, b"OURS!!")
            (tmp_path / f"file{i}").write_bytes(b"theirs")
            await world.files.fsync(handle, False)
        assert list(copies(tmp_path).values()) == [b"theirs"] * 50

    play(test)


def test_their_change_while_the_copy_is_made_is_in_the_copy(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"first version" * P)
        changes = [b"second version", b"third version"]
        after_reads(world, lambda: changes and (tmp_path / "file").write_bytes(changes.pop(0)))
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"third version"
        assert (tmp_path / "file").read_bytes()[:4] == b"ours"

    play(test)


def test_what_never_rests_is_not_overwritten(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"theirs 0")
        count = iter(range(1, 1000))
        stop = after_reads(world, lambda: (tmp_path / "file").write_bytes(b"theirs %d" % next(count)))
        with pytest.raises(OSError) as refused:
            await world.files.fsync(handle, False)
        assert refused.value.errno == errno.EBUSY and inode.unwritten
        assert not copies(tmp_path) and (tmp_path / "file").read_bytes().startswith(b"theirs ")
        stop()
        last = (tmp_path / "file").read_bytes()
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == last and (tmp_path / "file").read_bytes() == b"ours"

    play(test)


def after_reads(world: World, act: Callable[[], object]) -> Callable[[], None]:
    """Does something after each read from the backing, until what is returned is called."""
    backing: Any = world.backing.inner
    real = backing.preadv

    def preadv(fd: int, buffers: Sequence[Any], offset: int) -> int:
        nbytes: int = real(fd, buffers, offset)
        act()
        return nbytes

    backing.preadv = preadv
    return lambda: delattr(backing, "preadv")


@as_root
def test_a_copy_has_owner_mode_times_and_attributes_but_no_set_id_bits(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        file = tmp_path / "file"
        file.write_bytes(b"theirs")
        os.chown(file, 12, 34)
        os.chmod(file, 0o6751)
        os.setxattr(file, "user.note", b"value")
        os.utime(file, ns=(10**18, 2 * 10**18))
        await world.files.fsync(handle, False)
        (name,) = copies(tmp_path)
        found = os.stat(tmp_path / name)
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12, 34, 0o751)
        assert found.st_mtime_ns == 2 * 10**18
        assert os.getxattr(tmp_path / name, "user.note") == b"value"

    play(test)


ACL_HEAD = b"\x02\x00\x00\x00"


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL as the kernel takes it: entries of tag, permissions, id (linux/posix_acl_xattr.h)."""
    return ACL_HEAD + b"".join(
        tag.to_bytes(2, "little") + permissions.to_bytes(2, "little") + (number & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, permissions, number in entries
    )


@as_root
def test_a_copy_is_open_to_nobody_but_those_who_may_read_the_file(play: Callable[..., None], tmp_path: Path) -> None:
    owner, user, group, mask, other = 1, 2, 4, 16, 32
    with_entry = acl((owner, 6, -1), (user, 4, 1234), (group, 0, -1), (mask, 4, -1), (other, 0, -1))

    async def test(world: World) -> None:
        try:
            os.setxattr(tmp_path, "system.posix_acl_default", with_entry)
        except OSError:
            pytest.skip("no ACLs here")
        for name in ("plain", "shared"):
            _, handle = await dirty(world, name, b"ours")
            (tmp_path / name).write_bytes(b"theirs")
            if name == "plain":
                os.removexattr(tmp_path / name, "system.posix_acl_access")
            os.chmod(tmp_path / name, 0o640)
            await world.files.fsync(handle, False)
        plain, shared = sorted(copies(tmp_path))
        assert "system.posix_acl_access" not in os.listxattr(tmp_path / plain), "the directory's default does not count"
        assert os.getxattr(tmp_path / shared, "system.posix_acl_access") == with_entry

    play(test)


def test_a_copy_whose_owner_cannot_be_kept_is_the_daemon_s_alone(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"theirs")
        os.chmod(tmp_path / "file", 0o664)
        world.backing.set_plan([{"op": "chown", "errno": "EPERM"}])
        await world.files.fsync(handle, False)
        (name,) = copies(tmp_path)
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o600

    play(test)


# --- when no copy can be made


FAILURES = ("open ENOSPC", "open EROFS", "open EACCES", "pwritev ENOSPC", "fsync EIO", "preadv EIO", "chmod EIO", "truncate EIO")


@pytest.mark.parametrize("failure", FAILURES)
def test_without_a_copy_nothing_is_overwritten_and_ours_stays(play: Callable[..., None], tmp_path: Path, failure: str) -> None:
    operation, number = failure.split()

    async def test(world: World) -> None:
        inode, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"theirs")
        world.backing.set_plan([{"op": operation, "errno": number}])
        with pytest.raises(OSError) as refused:
            await world.files.fsync(handle, False)
        assert refused.value.errno == getattr(errno, number) and inode.unwritten
        assert (tmp_path / "file").read_bytes() == b"theirs" and not copies(tmp_path), "half a copy is no copy"
        assert await world.read(handle, 0, 9) == b"ours"
        assert not world.files.conflicts.total
        world.backing.set_plan([])
        await world.files.fsync(handle, False)
        assert (tmp_path / "file").read_bytes() == b"ours" and the_copy(tmp_path) == b"theirs"
        assert world.files.conflicts.total == 1

    play(test)


def test_a_size_that_cannot_be_set_costs_neither_side_anything(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"theirs, longer")
        world.backing.set_plan([{"op": "truncate", "after": 2, "errno": "EIO"}])  # 2: those of the copy
        with pytest.raises(OSError):
            await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == (tmp_path / "file").read_bytes() == b"theirs, longer"
        world.backing.set_plan([])
        await world.files.fsync(handle, False)
        assert b"theirs, longer" in copies(tmp_path).values()
        assert await world.read(handle, 0, 99) == b"ours"

    play(test)


# --- removed or replaced


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_lost_its_name_to_others_lives_on_under_another(
    play: Callable[..., None], tmp_path: Path, replaced: bool
) -> None:
    async def test(world: World) -> None:
        (tmp_path / "file").write_bytes(b"o" * 3 * P)
        inode, handle = await world.open("file")
        await world.files.write(handle, P, b"ours" * 1024)
        if replaced:
            (tmp_path / "new").write_bytes(b"theirs")
            (tmp_path / "new").rename(tmp_path / "file")
        else:
            (tmp_path / "file").unlink()
        await world.files.fsync(handle, False)
        ours = b"o" * P + b"ours" * 1024 + b"o" * P
        assert the_copy(tmp_path) == ours == await world.read(handle, 0, 4 * P)
        assert not replaced or (tmp_path / "file").read_bytes() == b"theirs"
        await world.files.write(handle, 0, b"and more")
        await world.truncate(inode, 2 * P)
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"and more" + ours[8 : 2 * P], "there is one copy, and it is what programs have open"
        assert world.files.conflicts.statistics().recent[0].kept == "ours"
        (name,) = copies(tmp_path)
        assert await world.fs.lookup(world.table.root, name.encode()) is inode
        assert (world.table.root, b"file") in world.gone
        await world.release(handle)
        assert (await world.open(name))[0] is inode

    play(test)


def test_what_was_removed_while_it_was_written_is_not_lost(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        backing: Any = world.backing.inner
        real = backing.pwritev

        def pwritev(*args: Any) -> int:
            (tmp_path / "file").unlink(missing_ok=True)
            nbytes: int = real(*args)
            return nbytes

        backing.pwritev = pwritev
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"ours"

    play(test)


def test_a_file_that_we_removed_is_gone(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        for number, remove in enumerate((world.fs.unlink, None)):
            _, handle = await dirty(world, f"file{number}", b"ours")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.writeback.flush_all)
                if remove is not None:
                    nursery.start_soon(remove, world.table.root, b"file0")
                else:
                    await dirty(world, "other", b"other")
                    nursery.start_soon(world.fs.rename, world.table.root, b"other", world.table.root, b"file1", 0)
            await world.files.write(handle, 0, b"more")
            await world.files.fsync(handle, False)
            await world.release(handle)
        await world.writeback.flush_all()
        assert not copies(tmp_path) and not world.files.conflicts.total
        assert [path.name for path in tmp_path.iterdir()] == ["file1"] and (tmp_path / "file1").read_bytes() == b"other"

    for seed in range(30):  # the name may be gone before we have heard that our unlink is done
        play(test, seed=seed)
        (tmp_path / "file1").unlink()


def test_a_hard_link_that_is_left_gets_ours(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        os.link(tmp_path / "file", tmp_path / "link")
        (tmp_path / "file").unlink()
        await world.files.fsync(handle, False)
        assert not copies(tmp_path) and (tmp_path / "link").read_bytes() == b"ours"

    play(test)


def test_a_copy_lies_beside_a_name_that_the_file_has(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await dirty(world, "first", b"ours")
        await world.fs.link(inode, world.table.root, b"second")
        (tmp_path / "first").unlink()
        (tmp_path / "first").write_bytes(b"another file")
        (tmp_path / "second").write_bytes(b"theirs")
        await world.files.fsync(handle, False)
        ((name, contents),) = copies(tmp_path).items()
        assert name.startswith("second.conflict-") and contents == b"theirs"

    play(test)


@pytest.mark.parametrize("depth", [1, 3])
def test_where_the_directory_is_gone_the_copy_lies_above(play: Callable[..., None], tmp_path: Path, depth: int) -> None:
    async def test(world: World) -> None:
        parent, path = world.table.root, tmp_path
        for level in range(3):
            parent = await world.fs.creation.mkdir(parent, b"d%d" % level, 0o755, CALLER)
            path = path / f"d{level}"
        inode, opened = await world.fs.creation.create(parent, b"file", 0o100644, os.O_RDWR, CALLER)
        await world.files.write(opened.number, 0, b"ours")
        path.joinpath("file").unlink()
        for _ in range(depth):
            path.rmdir()
            path = path.parent
        await world.files.fsync(opened.number, False)
        ((copy, contents),) = ((path, path.read_bytes()) for path in tmp_path.rglob("*.conflict-*"))
        assert contents == b"ours" and copy.parent == path
        assert list(inode.names) == [next(iter(inode.names))] and world.table.path_in(*next(iter(inode.names))) == os.fsencode(
            copy.relative_to(tmp_path)
        )

    play(test)


def test_a_file_without_a_name_for_which_there_is_no_room_stays_dirty(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        inode, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").unlink()
        world.backing.set_plan([{"op": "open", "errno": "ENOSPC"}])
        with pytest.raises(OSError):
            await world.files.fsync(handle, False)
        assert inode.unwritten and await world.read(handle, 0, 9) == b"ours"
        world.backing.set_plan([])
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"ours"

    play(test)


def test_a_store_that_counts_no_links_has_no_conflicts_for_it(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        backing: Any = world.backing.inner
        real_fstat, real_stat = backing.fstat, backing.stat

        def without_links(found: os.stat_result) -> os.stat_result:
            names = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks")
            return os.stat_result((*found[:3], 0, *found[4:]), {name: getattr(found, name) for name in names})

        backing.fstat = lambda fd: without_links(real_fstat(fd))
        backing.stat = lambda dirfd, name: without_links(real_stat(dirfd, name))
        _, handle = await dirty(world, "file", b"ours")
        await world.files.fsync(handle, False)
        assert not copies(tmp_path)
        await world.files.write(handle, 0, b"OURS")
        (tmp_path / "file").write_bytes(b"theirs")
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"theirs" and (tmp_path / "file").read_bytes() == b"OURS"

    play(test)


# --- other changes of ours that would hide theirs


@pytest.mark.parametrize("ours", ["utime", "truncate", "O_TRUNC", "chmod", "rename", "link", "setxattr"])
def test_no_change_of_ours_hides_theirs(play: Callable[..., None], tmp_path: Path, ours: str) -> None:
    async def test(world: World) -> None:
        root = world.table.root
        inode, handle = await dirty(world, "file", b"ours")
        (tmp_path / "file").write_bytes(b"theirs")
        match ours:
            case "utime":
                await world.files.setter.setattr(inode, Changes(mtime_ns=10**18), 0)
            case "truncate":
                await world.truncate(inode, 2)
            case "O_TRUNC":
                await world.files.open(inode, os.O_WRONLY | os.O_TRUNC, 0)
            case "chmod":
                await world.files.setter.setattr(inode, Changes(mode=0o600), 0)
            case "rename":
                await world.fs.rename(root, b"file", root, b"renamed", 0)
            case "link":
                await world.fs.link(inode, root, b"linked")
            case "setxattr":
                await world.fs.xattrs.setxattr(inode, b"user.a", b"value")
        await world.files.fsync(handle, False)
        assert the_copy(tmp_path) == b"theirs"
        left = {"truncate": b"ou", "O_TRUNC": b""}.get(ours, b"ours")
        assert await world.read(handle, 0, 99) == left
        assert (tmp_path / ("renamed" if ours == "rename" else "file")).read_bytes() == left

    play(test)


def test_a_change_is_noticed_at_the_next_look_and_the_clean_pages_leave_once(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        (tmp_path / "file").write_bytes(b"o" * 4 * P)
        inode, handle = await world.open("file")
        assert await world.read(handle, 0, 4 * P) == b"o" * 4 * P
        await world.files.write(handle, 0, b"ours" * 1024)
        (tmp_path / "file").write_bytes(b"t" * 4 * P)
        await world.files.attributes.refresh(inode)
        assert inode.file is not None and inode.file.resident_pages == 1
        assert await world.read(handle, 0, 4 * P) == b"ours" * 1024 + b"t" * 3 * P
        await world.files.attributes.refresh(inode)
        assert inode.file.resident_pages == 4, "seen already"
        assert world.changed == [inode]
        assert not copies(tmp_path), "a copy is made when there is something to overwrite"

    play(test)


# --- what is no conflict


def test_changes_of_ours_are_never_taken_for_theirs(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        root = world.table.root
        inode, handle = await dirty(world, "file", b"ours")
        async with trio.open_nursery() as nursery:  # side by side with writeback
            for i in range(20):
                nursery.start_soon(world.files.write, handle, i * P, b"x" * 100)
                nursery.start_soon(world.writeback.flush, inode)
                nursery.start_soon(world.files.setter.setattr, inode, Changes(mtime_ns=10**18 + i), 0)
                nursery.start_soon(world.files.setter.setattr, inode, Changes(mode=0o600 + i), 0)
                nursery.start_soon(world.files.attributes.refresh, inode)
                nursery.start_soon(world.truncate, inode, 10 * P + i)
                nursery.start_soon(world.fs.xattrs.setxattr, inode, b"user.a", b"%d" % i)
                nursery.start_soon(world.fs.lookup, root, b"file")
        for i in range(5):
            await world.files.write(handle, 0, b"y" * 100)
            await world.fs.rename(root, b"file", root, b"moved", 0)
            await world.fs.link(inode, root, b"file")
            await world.fs.unlink(root, b"moved")
            await world.files.fsync(handle, bool(i % 2))
        assert not copies(tmp_path) and not world.files.conflicts.total

    play(test)


@pytest.mark.parametrize("operation", ["fstat", "utime", "pwritev", "truncate", "stat"])
@pytest.mark.parametrize("after", range(4))
def test_a_failure_of_the_backing_is_not_taken_for_a_change_of_theirs(
    play: Callable[..., None], tmp_path: Path, operation: str, after: int
) -> None:
    async def test(world: World) -> None:
        inode, handle = await dirty(world, "file", b"ours" * P)
        await world.files.fsync(handle, False)
        await world.files.write(handle, 0, b"OURS")
        world.backing.set_plan([{"op": operation, "errno": "EIO", "after": after, "count": 2}])
        for attempt in range(6):
            for change in (
                lambda: world.files.fsync(handle, False),
                lambda: world.truncate(inode, 3 * P),
                lambda: world.files.setter.setattr(inode, Changes(mtime_ns=10**18), 0),
                lambda: world.files.attributes.refresh(inode),
            ):
                try:
                    await change()
                except OSError as error:
                    assert error.errno == errno.EIO
                await world.files.write(handle, 0, b"%d" % attempt)
        world.backing.set_plan([])
        await world.writeback.flush_all()
        assert not copies(tmp_path) and not world.files.conflicts.total

    play(test)


def test_a_change_of_a_clean_file_is_no_conflict(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        _, handle = await dirty(world, "file", b"ours")
        await world.files.fsync(handle, False)
        (tmp_path / "file").write_bytes(b"theirs")
        await world.release(handle)
        _, handle = await world.open("file")
        await world.files.write(handle, 6, b" and ours")
        await world.files.fsync(handle, False)
        assert (tmp_path / "file").read_bytes() == b"theirs and ours" and not copies(tmp_path)

    play(test)


def test_what_leaves_size_and_mtime_alone_is_not_noticed_beside_unwritten_data(play: Callable[..., None], tmp_path: Path) -> None:
    """Without unwritten data ctime tells; beside it every chmod and rename would make a copy if it did."""

    async def test(world: World) -> None:
        (tmp_path / "file").write_bytes(b"old...")
        before = os.stat(tmp_path / "file")
        _, handle = await dirty(world, "file", b"ours", offset=2 * P)
        (tmp_path / "file").write_bytes(b"theirs")
        os.utime(tmp_path / "file", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.chmod(tmp_path / "file", 0o600)
        await world.files.fsync(handle, False)
        assert not copies(tmp_path)
        assert (tmp_path / "file").read_bytes() == b"theirs".ljust(2 * P, b"\0") + b"ours"

    play(test)


# --- names


def test_a_copy_is_named_after_the_file_and_the_time() -> None:
    name = conflict_name(b"report.txt", WHEN, 1, 255)
    assert name.startswith(b"report.txt.conflict-2026") and len(name) == len(b"report.txt.conflict-20261122-153000")
    assert conflict_name(b"report.txt", WHEN, 7, 255) == name + b"-7"


@given(st.binary(min_size=1, max_size=255), st.integers(1, 99_999), st.integers(60, 255))
def test_a_name_is_never_too_long(name: bytes, number: int, longest: int) -> None:
    assert len(conflict_name(name, WHEN, number, longest)) <= longest


@given(st.text(min_size=1, max_size=255), st.integers(4, 255))
def test_cutting_leaves_whole_characters(text: str, nbytes: int) -> None:
    name = text.encode("utf-8", "surrogatepass")[:255]
    if name.decode("utf-8", "ignore").encode() == name:
        kept = cut(name, nbytes).decode()
        assert kept == text or (text.startswith(kept) and len(kept.encode()) > nbytes - 4)


def test_long_names_and_taken_ones(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        long = "ä" * 127
        for round in range(3):
            for name in (long, long[:-1] + "xy"):
                _, handle = await world.open(name)
                await world.files.write(handle, 0, b"ours")
                (tmp_path / name).write_bytes(b"theirs %d" % round)
                await world.files.fsync(handle, False)
        assert sorted(copies(tmp_path).values()) == sorted(b"theirs %d" % round for round in range(3) for _ in "ab")
        assert all(len(os.fsencode(name)) <= 255 for name in copies(tmp_path))

    play(test)


def test_descriptors_are_given_back(play: Callable[..., None], tmp_path: Path) -> None:
    async def test(world: World) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for i in range(10):
            _, handle = await dirty(world, "file", b"ours")
            if i % 2:
                (tmp_path / "file").unlink()
            else:
                (tmp_path / "file").write_bytes(b"theirs")
            await world.files.fsync(handle, False)
            await world.release(handle)
        assert len(os.listdir("/proc/self/fd")) - before <= 1 + len(world.descriptors)
        assert world.files.data.count == 0

    play(test)
