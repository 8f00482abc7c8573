"""Files that others changed while we had written to them: whose version goes where, and what is never overwritten."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import cachefs.conflicts
from cachefs.cache.page import PAGE_SIZE
from world import World, copies, dirty, the_copy, world_of

P = PAGE_SIZE
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


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
