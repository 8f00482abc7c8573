"""FUSE's wire format, against the sizes and places that include/uapi/linux/fuse.h gives."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backing.base import Entry
from cachefs.inode import Attributes
from cachefs.setattr import Changes
from cachefs.transport import wire
from cachefs.transport.wire import Request

SECOND_NS = 1_000_000_000


def attributes(**changes: Any) -> Attributes:
    values = {
        "st_mode": stat.S_IFREG | 0o640, "st_nlink": 3, "st_uid": 1000, "st_gid": 2000, "st_rdev": 0, "st_blksize": 4096,
        "st_atime_ns": 1, "size": 12345, "mtime_ns": 2 * SECOND_NS + 7, "ctime_ns": 3 * SECOND_NS + 8, **changes,
    }  # fmt: skip
    st: Any = SimpleNamespace(**values)
    return Attributes(st, values["size"], values["mtime_ns"], values["ctime_ns"])


def request(body: bytes) -> Request:
    return Request(2, 1, 0, 0, 0, memoryview(body))


def test_answers_have_the_sizes_that_the_kernel_checks() -> None:
    attr = wire.attributes(5, attributes(), 24)
    entry = wire.entry(5, 1.0, 0.5, attr)
    assert (len(attr), len(entry), len(wire.attr_out(0.5, attr))) == (88, 128, 104)
    assert len(wire.OPENED.pack(1, 0, 0)) == 16 and len(wire.WRITTEN.pack(1, 0)) == 8
    assert len(wire.statfs_out(os.statvfs("/"))) == 80
    assert len(wire.inval_inode(5, False)) == 16 + 24
    assert wire.IN_HEADER.size == 40 and wire.OUT_HEADER.size == 16


def test_an_entry_says_how_long_name_and_attributes_are_good_for() -> None:
    attr = wire.attributes(5, attributes(), 24)
    assert struct.unpack_from("=QQQQII", wire.entry(5, 1.5, 0.25, attr)) == (5, 0, 1, 0, 500_000_000, 250_000_000)
    assert struct.unpack_from("=QII", wire.attr_out(0.25, attr)) == (0, 250_000_000, 0)


@given(st.integers(-(2**33) * SECOND_NS, 2**34 * SECOND_NS))
def test_times_are_whole_seconds_and_nanoseconds_before_1970_too(time_ns: int) -> None:
    attr = wire.attributes(5, attributes(st_atime_ns=time_ns, mtime_ns=time_ns, ctime_ns=time_ns), 0)
    seconds, nanoseconds = struct.unpack_from("=qqq", attr, 24), struct.unpack_from("=III", attr, 48)
    for s, ns in zip(seconds, nanoseconds, strict=True):
        assert ns < SECOND_NS and s * SECOND_NS + ns == time_ns


def test_attributes_are_in_their_places() -> None:
    device = os.makedev(0x123, 0x45678)
    attr = wire.attributes(5, attributes(st_mode=stat.S_IFBLK | 0o600, st_rdev=device), 24)
    assert struct.unpack_from("=QQQ", attr) == (5, 12345, 24)
    mode, nlink, uid, gid, rdev, blksize, flags = struct.unpack_from("=IIIIIII", attr, 60)
    assert (mode, nlink, uid, gid, blksize, flags) == (stat.S_IFBLK | 0o600, 3, 1000, 2000, 4096, 0)
    assert ((rdev & 0xFFF00) >> 8, rdev & 0xFF | rdev >> 12 & 0xFFF00) == (0x123, 0x45678)  # as the kernel reads it


@pytest.mark.parametrize("length", [1, 7, 8, 9, 255])
def test_names_of_a_directory_are_padded_to_eight_bytes(length: int) -> None:
    entry = wire.entry(5, 1.0, 1.0, wire.attributes(5, attributes(st_mode=stat.S_IFDIR | 0o755), 0))
    name = b"n" * length
    dirent = wire.direntplus(name, entry, 17)
    assert len(dirent) % 8 == 0 and dirent[:128] == entry
    assert struct.unpack_from("=QQII", dirent, 128) == (5, 17, length, stat.S_IFDIR >> 12)
    assert dirent[152:].rstrip(b"\0") == name


def test_requests_are_taken_apart() -> None:
    made = request(struct.pack("=IIII", 0o100644, 7, 0o022, 0) + b"name\0")
    assert (wire.mknod_in(made), made.umask) == ((b"name", 0o100644, 7), 0o022)
    made = request(struct.pack("=II", 0o755, 0o027) + b"dir\0")
    assert (wire.mkdir_in(made), made.umask) == ((b"dir", 0o755), 0o027)
    made = request(struct.pack("=IIII", os.O_RDWR, 0o644, 0o077, 0) + b"f\0")
    assert (wire.create_in(made), made.umask) == ((b"f", 0o644, os.O_RDWR), 0o077)
    assert wire.rename_in(request(struct.pack("=Q", 9) + b"a\0b\0")) == (9, b"a", b"b")
    assert wire.rename2_in(request(struct.pack("=QII", 9, 2, 0) + b"a\0b\0")) == (9, b"a", b"b", 2)
    assert wire.link_in(request(struct.pack("=Q", 9) + b"a\0")) == (9, b"a")
    assert wire.symlink_in(request(b"a\0../b/c\0")) == (b"a", b"../b/c")
    assert wire.setxattr_in(request(struct.pack("=II", 3, 1) + b"user.x\0v\0w")) == (b"user.x", b"v\0w", 1)
    assert wire.getxattr_in(request(struct.pack("=II", 100, 0) + b"user.x\0")) == (100, b"user.x")
    assert wire.fsync_in(memoryview(struct.pack("=QII", 8, 1, 0))) == (8, True)
    assert wire.batch_forget_in(request(struct.pack("=IIQQQQ", 2, 0, 3, 1, 4, 2))) == [(3, 1), (4, 2)]


@pytest.mark.parametrize(
    ("of_write", "of_file", "append"),
    [(0, os.O_WRONLY | os.O_APPEND, True), (1, os.O_WRONLY | os.O_APPEND, False), (0, os.O_RDWR, False)],
)
def test_a_write_says_whether_it_appends(of_write: int, of_file: int, append: bool) -> None:
    body = struct.pack("=QQIIQII", 3, 100, 5, of_write, 0, of_file, 0)
    assert len(body) == wire.WRITE_DATA and wire.is_append(memoryview(body + b"hello")) == append


def test_setattr_says_what_to_change() -> None:
    valid = wire.SET_MODE | wire.SET_MTIME
    body = struct.pack("=IIQQQqqqIIIIIIII", valid, 0, 0, 99, 0, 5, -6, 7, 50, 60, 70, 0o600, 0, 11, 12, 0)
    changes = wire.setattr_in(memoryview(body))
    assert changes == Changes(mode=0o600, mtime_ns=-6 * SECOND_NS + 60)
    nothing = wire.setattr_in(memoryview(bytes(4) + body[4:]))
    assert nothing == Changes()


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/"])
def test_names_that_are_paths_or_nothing_are_none(name: bytes) -> None:
    with pytest.raises(ValueError, match="none"):
        request(name + b"\0").name()


@pytest.mark.parametrize(("offset", "size"), [(0, (1 << 20) + 1), ((1 << 63) - 1, 1), ((1 << 64) - 1, 0)])
def test_transfers_of_what_cannot_be_are_refused(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="agreed"):
        wire.transfer_in(memoryview(struct.pack("=QQI", 1, offset, size)))


kinds = st.sampled_from((stat.S_IFREG, stat.S_IFDIR))
names = st.lists(st.builds(Entry, st.binary(min_size=1, max_size=20), st.integers(1, 99), kinds), max_size=30)


@given(names, st.integers(2, 32), st.integers(0, 3000))
def test_names_alone_are_those_from_an_offset_on_that_there_is_room_for(listing: list[Entry], start: int, room: int) -> None:
    parts, count = wire.names_alone(listing, start, room)
    entries = []
    for offset, entry in list(enumerate(listing, 2))[start - 2 :]:
        head = struct.pack("=QQII", entry.number, offset + 1, len(entry.name), entry.kind >> 12)
        entries.append(bytes(128) + head + entry.name + bytes(-len(entry.name) % 8))
    assert b"".join(parts) == b"".join(entries[:count]) and len(b"".join(parts)) <= room
    assert count == len(entries) or len(b"".join(entries[: count + 1])) > room


def test_names_alone_of_a_long_listing_cost_no_more_at_its_end() -> None:
    class Counting(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Entry]:
            raise AssertionError("all of it was walked through")

    listing = Counting(Entry(b"name", 1, 0o100000) for _ in range(5000))
    assert wire.names_alone(listing, 4902, 1 << 20)[1] == 100
