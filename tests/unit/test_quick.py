"""Requests answered in plain code: as they are answered the long way, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from struct import Struct

import pytest
import trio
from pyfuse3 import FUSEError

from cachefs.inode import Inode
from cachefs.transport import wire
from cachefs.transport.operations import blocks_of
from cachefs.transport.wire import Request
from fake_kernel import NODE_OF_ROOT
from test_lane import Stage, staged

OPEN_IN = Struct("=II")


def on(tmp_path: Path, main: Callable[[Stage], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        async with staged(tmp_path, **options) as stage:
            await main(stage)

    trio.run(run)


def request(node: int, body: bytes) -> Request:
    return Request(2, node, os.getuid(), os.getgid(), os.getpid(), memoryview(body))


def quick(stage: Stage, opcode: int, node: int, body: bytes) -> bytes | None:
    answer = stage.lane._quick[opcode](request(node, body))
    return None if answer is None else bytes(answer)


async def slow(stage: Stage, opcode: int, node: int, body: bytes) -> bytes:
    answer = await stage.lane._handlers[opcode](request(node, body))
    assert answer is not None
    return bytes(answer)


def known(inode: Inode) -> bytes:
    """Its attributes, as an answer has them."""
    seen = inode.attributes()
    return wire.attributes(inode.node, seen, blocks_of(seen))


def test_both_ways_give_the_same_answers_and_leave_the_same_behind(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("f")

    async def main(stage: Stage) -> None:
        table = stage.world.table
        for name in (b"f", b"directory", b"link"):
            answers = [quick(stage, wire.LOOKUP, NODE_OF_ROOT, name + b"\0"), await slow(stage, wire.LOOKUP, 1, name + b"\0")]
            inode = table.named(table.root, name)
            assert inode is not None and inode.lookups == 2
            assert all(answer is not None and answer[wire.ENTRY.size :] == known(inode) for answer in answers)
            await stage.world.descriptors.at("stat", inode, stage.world.backing.fstat)  # it has a descriptor now
            answers = [quick(stage, wire.GETATTR, inode.node, bytes(16)), await slow(stage, wire.GETATTR, inode.node, bytes(16))]
            assert all(answer is not None and answer[wire.ATTR_VALID.size :] == known(inode) for answer in answers)
        assert quick(stage, wire.LOOKUP, 1, b"none\0") == await slow(stage, wire.LOOKUP, 1, b"none\0")
        assert (stage.count("lookup"), stage.count("getattr")) == (8, 6)

    on(tmp_path, main)


def test_a_file_is_opened_to_read_and_let_go_of(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node = (await stage.kernel.must(wire.LOOKUP, body=b"f\0")).entry
        inode, body = stage.world.table.get(node), OPEN_IN.pack(os.O_RDONLY, 0)
        answers = [quick(stage, wire.OPEN, node, body), await slow(stage, wire.OPEN, node, body)]
        assert answers[0] is not None
        first, second = (wire.OPENED.unpack(answer) for answer in answers if answer is not None)
        assert second[0] == first[0] + 1 and second[1:] == first[1:]
        assert inode.opens == 2 and inode.reader >= 0 and stage.world.files.data.count == 1
        for number in (first[0], second[0]):
            assert quick(stage, wire.FLUSH, node, number.to_bytes(24, "little")) == b""
            assert quick(stage, wire.RELEASE, node, number.to_bytes(24, "little")) == b""
        assert inode.opens == 0 and inode.reader == -1 and not stage.world.files.handles

    on(tmp_path, main)


def test_what_was_changed_in_source_is_noticed(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node, _ = await stage.kernel.open(b"f")
        inode = stage.world.table.get(node)
        for _ in range(2):
            (tmp_path / "f").write_bytes(os.urandom(100 + inode.changes))
            before = inode.changes
            quick(stage, wire.OPEN, node, OPEN_IN.pack(os.O_RDONLY, 0))
            assert inode.changes == before + 1 and inode.st.st_size == 100 + before
        (tmp_path / "f").write_bytes(b"1")
        found = quick(stage, wire.GETATTR, node, bytes(16))
        assert found is not None and wire.ATTR.unpack_from(found, wire.ATTR_VALID.size)[1] == 1
        with contextlib.suppress(BlockingIOError):  # that it is to forget attributes
            while stage.kernel.ours.recv(1 << 16):
                pass

    on(tmp_path, main)


def test_a_directory_is_opened_as_the_long_way_does_it(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()

    async def main(stage: Stage) -> None:
        directories = stage.world.fs.directories
        node = (await stage.kernel.must(wire.LOOKUP, body=b"d\0")).entry
        inode = stage.world.table.get(node)
        alone, beside = quick(stage, wire.OPENDIR, node, bytes(8)), quick(stage, wire.OPENDIR, node, bytes(8))
        assert alone is not None and beside is not None
        assert wire.OPENED.unpack(alone)[1] == wire.OPEN_CACHE_DIR, "the kernel keeps what it is sent, and has nothing yet"
        assert wire.OPENED.unpack(beside)[1] == wire.OPEN_KEEP_CACHE, "what it is sent at the same time is not kept"
        for answer in (beside, alone):
            assert quick(stage, wire.RELEASEDIR, node, wire.OPENED.unpack(answer)[0].to_bytes(24, "little")) == b""
        assert (inode.opens, directories.handles) == (0, {})
        os.utime(tmp_path / "d", (1, 1))
        await trio.sleep(0.03)  # until a change would be seen by the time it makes
        number = wire.OPENED.unpack(await slow(stage, wire.OPENDIR, node, bytes(8)))[0]
        await directories.listing(number, 0)
        directories.ended(number)
        directories.close(number)
        for changed, flags in ((False, wire.OPEN_CACHE_DIR | wire.OPEN_KEEP_CACHE), (True, wire.OPEN_CACHE_DIR)):
            if changed:
                (tmp_path / "d" / "new").touch()
            answer = quick(stage, wire.OPENDIR, node, bytes(8))
            assert answer is not None and wire.OPENED.unpack(answer)[1] == flags
            directories.close(wire.OPENED.unpack(answer)[0])

    on(tmp_path, main)


def test_an_attribute_of_an_open_file_or_that_there_is_none(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node, _ = await stage.kernel.open(b"f")
        inode = stage.world.table.get(node)
        assert inode.fd < 0 and inode.writer >= 0
        ask = Struct("=II").pack(0, 0) + b"user.colour\0"
        assert stage.lane._quick[wire.GETXATTR](request(node, ask)) == errno.ENODATA
        os.setxattr(tmp_path / "f", "user.colour", b"red")
        assert quick(stage, wire.GETXATTR, node, ask) == await slow(stage, wire.GETXATTR, node, ask) == wire.XATTR_SIZE.pack(3, 0)
        ask = Struct("=II").pack(2, 0) + b"user.colour\0"
        assert quick(stage, wire.GETXATTR, node, ask) is None, "too little room: told the long way"
        assert (await stage.kernel.ask(wire.GETXATTR, node, ask)).errno == errno.ERANGE
        none = Struct("=II").pack(0, 0) + b"user.none\0"
        assert (await stage.kernel.ask(wire.GETXATTR, node, none)).errno == errno.ENODATA
        assert quick(stage, wire.GETXATTR, NODE_OF_ROOT, b"") is None

    on(tmp_path, main)


@pytest.mark.parametrize("how", [os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC])
def test_opening_to_change_a_file_goes_the_long_way(tmp_path: Path, how: int) -> None:
    async def main(stage: Stage) -> None:
        node = (await stage.kernel.must(wire.LOOKUP, body=b"f\0")).entry
        assert quick(stage, wire.OPEN, node, OPEN_IN.pack(how, 0)) is None
        assert stage.world.table.get(node).opens == 0

    on(tmp_path, main)


def test_what_goes_wrong_is_left_to_the_long_way_and_leaves_nothing(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        world = stage.world
        node = (await stage.kernel.must(wire.LOOKUP, body=b"f\0")).entry
        inode, handles = world.table.get(node), dict(world.files.handles)
        world.backing.set_plan([{"op": "stat", "errno": "EIO"}, {"op": "open", "errno": "EACCES"}])
        assert quick(stage, wire.LOOKUP, NODE_OF_ROOT, b"f\0") is None
        assert quick(stage, wire.OPEN, node, OPEN_IN.pack(os.O_RDONLY, 0)) is None
        world.backing.set_plan([])
        for opcode, at, body in (
            (wire.LOOKUP, 4711, b"f\0"), (wire.LOOKUP, 1, b"../f\0"), (wire.LOOKUP, 1, b"no end"),
            (wire.GETATTR, 4711, bytes(16)), (wire.OPEN, 4711, OPEN_IN.pack(0, 0)), (wire.OPEN, node, b""),
            (wire.RELEASE, node, bytes(24)), (wire.FLUSH, node, bytes(24)),
        ):  # fmt: skip
            assert quick(stage, opcode, at, body) is None
        assert (inode.lookups, inode.opens, world.files.handles) == (1, 0, handles)

    on(tmp_path, main)


def test_an_error_of_writeback_is_told_the_long_way(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        inode, number = await stage.world.open("f")
        inode.error_count += 1
        assert quick(stage, wire.FLUSH, inode.node, number.to_bytes(24, "little")) is None

    on(tmp_path, main)


def test_another_file_in_the_place_of_the_one_that_is_opened_is_not_opened(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node = (await stage.kernel.must(wire.LOOKUP, body=b"f\0")).entry
        os.rename(tmp_path / "f", tmp_path / "away")
        (tmp_path / "f").symlink_to("away")
        assert quick(stage, wire.OPEN, node, OPEN_IN.pack(os.O_RDONLY, 0)) is None
        (tmp_path / "f").unlink()
        (tmp_path / "f").write_bytes(b"another")
        assert quick(stage, wire.OPEN, node, OPEN_IN.pack(os.O_RDONLY, 0)) is None
        inode = stage.world.table.get(node)
        assert inode.reader == -1 and stage.world.files.data.count == 0

    on(tmp_path, main)


def test_far_away_every_request_may_have_to_wait(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        assert stage.lane._quick == {}

    on(tmp_path, main, blocking=True)


def setattr_body(**values: int) -> bytes:
    """Of fuse_setattr_in, with the bits of what is given."""
    bits = {"mode": wire.SET_MODE, "uid": wire.SET_UID, "gid": wire.SET_GID, "size": wire.SET_SIZE, "atime": wire.SET_ATIME}
    bits["mtime"] = wire.SET_MTIME
    valid = sum(bits[name] for name in values)
    given = [values.get(name, 0) for name in ("size", "atime", "mtime", "mode", "uid", "gid")]
    size, atime, mtime, mode, uid, gid = given
    return wire._SETATTR.pack(valid, 0, 0, size, 0, atime, mtime, 0, 0, 0, 0, mode, 0, uid, gid, 0)


SETTINGS = {
    "mode": {"mode": 0o100640}, "owner": {"uid": os.getuid(), "gid": os.getgid()}, "group": {"gid": os.getgid()},
    "times": {"atime": 1000, "mtime": 2000}, "atime": {"atime": 3000}, "mtime": {"mtime": 4000},
}  # fmt: skip


@pytest.mark.parametrize("unwritten", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_attributes_are_set_as_the_long_way_sets_them(tmp_path: Path, kind: str, unwritten: bool) -> None:
    async def main(stage: Stage) -> None:
        seen = []
        for way in ("quick", "slow"):
            node, handle = await stage.kernel.open(b"f")
            inode = stage.world.table.get(node)
            if unwritten:
                await stage.world.files.write(handle, 0, b"ours")
            body = setattr_body(**SETTINGS[kind])
            answer = quick(stage, wire.SETATTR, node, body) if way == "quick" else await slow(stage, wire.SETATTR, node, body)
            assert answer is not None and answer[wire.ATTR_VALID.size :] == known(inode)
            shown, st = inode.attributes(), (tmp_path / "f").stat()
            assert inode.st == st and inode.unwritten == unwritten and not inode.locked
            own_clock = unwritten and kind not in ("times", "mtime")  # the mtime is that of the write
            seen.append((st.st_mode, st.st_uid, st.st_atime_ns, shown.size, None if own_clock else shown.mtime_ns))
            assert inode.signature == (st.st_mtime_ns, st.st_size, st.st_ctime_ns)
            assert not stage.world.changed, "by others"
            stage.world.check()
        assert seen[0] == seen[1]
        await stage.world.files.fsync(handle, False)
        assert not unwritten or (tmp_path / "f").read_bytes()[:4] == b"ours"
        st = (tmp_path / "f").stat()
        assert kind not in ("times", "mtime") or st.st_mtime == SETTINGS[kind]["mtime"]

    on(tmp_path, main)


def test_attributes_that_may_have_to_wait_go_the_long_way(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node, handle = await stage.kernel.open(b"f")
        inode, before = stage.world.table.get(node), (tmp_path / "f").stat()
        for values in ({"size": 10}, {"mode": 0o100600, "uid": os.getuid()}, {"mode": 0o100600, "mtime": 5}, {}):
            assert quick(stage, wire.SETATTR, node, setattr_body(**values)) is None
        await inode.lock.__aenter__()
        assert quick(stage, wire.SETATTR, node, setattr_body(mode=0o100600)) is None
        await inode.lock.__aexit__()
        await stage.world.files.write(handle, 0, b"ours")
        assert quick(stage, wire.SETATTR, node, setattr_body(mode=0o104755)) is None, "what is written later takes the bit away"
        assert (tmp_path / "f").stat() == before
        (tmp_path / "f").write_bytes(b"theirs")
        assert quick(stage, wire.SETATTR, node, setattr_body(mtime=5)) is None, "a version is to be kept first"
        assert (tmp_path / "f").stat().st_mtime != 5
        await slow(stage, wire.SETATTR, node, setattr_body(mtime=5))
        assert (tmp_path / "f").stat().st_mtime == 5 and len(list(tmp_path.glob("f.conflict-*"))) == 1
        await stage.world.files.fsync(handle, False)

    on(tmp_path, main)


def test_attributes_that_cannot_be_set_leave_no_trace(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        node, handle = await stage.kernel.open(b"f")
        inode = stage.world.table.get(node)
        await stage.world.files.write(handle, 0, b"ours")
        shown = inode.attributes()
        for op, values in (("utime", {"mtime": 5}), ("chmod", {"mode": 0o100600}), ("chown", {"gid": os.getgid()})):
            stage.world.backing.set_plan([{"op": op, "errno": "EROFS"}])
            assert quick(stage, wire.SETATTR, node, setattr_body(**values)) is None
            assert (await stage.kernel.reply(stage.kernel.send(wire.SETATTR, node, setattr_body(**values)))).errno == errno.EROFS
        stage.world.backing.set_plan([])
        assert inode.attributes() == shown

    on(tmp_path, main)


def create_body(name: bytes, umask: int = 0o022) -> bytes:
    return wire._CREATE.pack(os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o100666, umask, 0) + name + b"\0"


def test_a_file_is_made_as_the_long_way_makes_it(tmp_path: Path) -> None:
    """Under both of the names that lead to another answer, too: one that is taken, and one of a directory with a default ACL."""
    (tmp_path / "d").mkdir()
    subprocess.run(["setfacl", "-d", "-m", "u::rw,g::rw,o::r", str(tmp_path / "d")], check=True)

    async def main(stage: Stage) -> None:
        directory = (await stage.kernel.must(wire.LOOKUP, body=b"d\0")).entry
        assert quick(stage, wire.CREATE, directory, create_body(b"never")) is None, "it is not open"
        await stage.world.descriptors.at("stat", stage.world.table.get(directory), stage.world.backing.fstat)
        for node, mode in ((NODE_OF_ROOT, 0o644), (directory, 0o664)):
            made = []
            for name, way in ((b"quick", quick(stage, wire.CREATE, node, create_body(b"quick"))), (b"slow", None)):
                answer = way or await slow(stage, wire.CREATE, node, create_body(name))
                inode = stage.world.table.named(stage.world.table.get(node), name)
                assert inode is not None and answer[wire.ENTRY.size : -wire.OPENED.size] == known(inode)
                handle = stage.world.files.handles[wire.OPENED.unpack(answer[-wire.OPENED.size :])[0]]
                assert handle.inode is inode and handle.writable and inode.writer >= 0 and inode.made
                made.append((inode.lookups, inode.opens, stat.S_IMODE(inode.st.st_mode)))
            assert made == [(1, 1, mode)] * 2
        assert quick(stage, wire.CREATE, NODE_OF_ROOT, create_body(b"slow")) is None
        with pytest.raises(FUSEError) as refused:
            await slow(stage, wire.CREATE, NODE_OF_ROOT, create_body(b"slow"))
        assert refused.value.errno == errno.EEXIST

    on(tmp_path, main)


def test_another_users_file_is_made_the_long_way(tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        asked = Request(2, NODE_OF_ROOT, os.getuid() + 1, os.getgid(), os.getpid(), memoryview(create_body(b"theirs")))
        assert stage.lane._quick[wire.CREATE](asked) is None and not (tmp_path / "theirs").exists()

    on(tmp_path, main)
