"""FUSE's wire format: requests of the kernel as numbers and names, answers as bytes. Pure: no I/O, no state.

Layouts and values: include/uapi/linux/fuse.h, protocol 7. Everything is in the machine's own byte order. What cannot be
understood raises struct.error or ValueError.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from backing.base import Entry
from cachefs.inode import Attributes
from cachefs.setattr import Changes

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK = 1, 2, 3, 4, 5, 6, 8, 9, 10
RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 11, 12, 13, 14, 15, 16, 17, 18, 20
SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT, OPENDIR = 21, 22, 23, 24, 25, 26, 27
RELEASEDIR, FSYNCDIR, ACCESS, CREATE, INTERRUPT, DESTROY, BATCH_FORGET = 29, 30, 34, 35, 36, 38, 42
READDIRPLUS, RENAME2 = 44, 45

IN_HEADER: Final = Struct("=IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, extensions
# The header, and the first three fields of what READ and WRITE (and READDIRPLUS) have behind it: handle, offset, size.
REQUEST: Final = Struct("=IIQQIIIIQQI")
READ_BYTES: Final = 80  # a whole READ
WRITE_FLAGS, WRITE_CACHE, WRITE_OF_FILE = 20, 1, 32  # flags of the request and their bit, and of the open file (open(2))
WRITE_DATA: Final = 40  # where the data of a WRITE begins in its body
OUT_HEADER: Final = Struct("=IiQ")  # length, -errno, unique
ENTRY: Final = Struct("=QQQQII")  # node, generation, seconds and nanoseconds that the name and the attributes are good for
ATTR: Final = Struct("=QQQqqqIIIIIIIIII")
MODE_AT: Final = 60  # in ATTR
ATTR_VALID: Final = Struct("=QII")
OPENED: Final = Struct("=QIi")
WRITTEN: Final = Struct("=II")
XATTR_SIZE: Final = Struct("=II")
STATFS_OUT: Final = Struct("=QQQQQIIII24x")
DIRENT: Final = Struct("=QQII")
PADDING: Final = [bytes(-length % 8) for length in range(8)]  # by the length of a name, DIRENT being 24 bytes long

_MKNOD, _MKDIR, _CREATE, _RENAME2, _OPEN = Struct("=IIII"), Struct("=II"), Struct("=IIII"), Struct("=QII"), Struct("=II")
_SETATTR = Struct("=IIQQQqqqIIIIIIII")
_U64, _U32, _TWO_U64, _TWO_U32 = Struct("=Q"), Struct("=I"), Struct("=QQ"), Struct("=II")
_FSYNC, _TRANSFER = Struct("=QI"), Struct("=QQI")

OPEN_DIRECT_IO, OPEN_KEEP_CACHE, OPEN_CACHE_DIR, OPEN_NOFLUSH = 1, 2, 8, 32
FSYNC_DATASYNC = 1
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME = (1 << bit for bit in range(6))
NOTIFY_INVAL_INODE, NOTIFY_INVAL_ENTRY = 2, 3
_INVAL_INODE, _INVAL_ENTRY = Struct("=QqQ"), Struct("=QII")
NO_NAMES: Final = (b"", b".", b"..")
TRANSFER_MAX: Final = 1 << 20  # most bytes of one READ or WRITE, as INIT has it
OFFSET_MAX: Final = (1 << 63) - 1
MASK32: Final = 0xFFFFFFFF
SECOND_NS = 1_000_000_000


@dataclass(slots=True)
class Request:
    """One request but for its contents: `body` is what follows the header, good until the next request is read."""

    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: memoryview
    umask: int = 0

    def texts(self, at: int, count: int) -> list[bytes]:
        """The `count` texts, each ended by a NUL, that begin at `body[at]`."""
        texts = bytes(self.body[at:]).split(b"\0", count)
        if len(texts) <= count:
            raise ValueError("a name is missing or has no end")
        return texts[:count]

    def names(self, at: int, count: int) -> list[bytes]:
        """The same, of names in a directory: one that is a path would lead out of SOURCE."""
        names = self.texts(at, count)
        for name in names:
            if b"/" in name or name in NO_NAMES:
                raise ValueError("a name is none")
        return names

    def name(self, at: int = 0) -> bytes:
        return self.names(at, 1)[0]

    def handle(self) -> int:
        """The open file or directory: the first field wherever there is one."""
        number: int = _U64.unpack_from(self.body)[0]
        return number


# --- requests


def setattr_in(body: memoryview) -> Changes:
    valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = _SETATTR.unpack_from(body)
    return Changes(
        mode if valid & SET_MODE else None,
        uid if valid & SET_UID else None,
        gid if valid & SET_GID else None,
        size if valid & SET_SIZE else None,
        atime * SECOND_NS + atime_ns if valid & SET_ATIME else None,
        mtime * SECOND_NS + mtime_ns if valid & SET_MTIME else None,
    )


def mknod_in(request: Request) -> tuple[bytes, int, int]:
    """Name, mode and device; the umask goes into the request."""
    mode, rdev, request.umask, _ = _MKNOD.unpack_from(request.body)
    return request.name(_MKNOD.size), mode, rdev


def mkdir_in(request: Request) -> tuple[bytes, int]:
    mode, request.umask = _MKDIR.unpack_from(request.body)
    return request.name(_MKDIR.size), mode


def create_in(request: Request) -> tuple[bytes, int, int]:
    """Name, mode and flags of open; the umask goes into the request."""
    flags, mode, request.umask, _ = _CREATE.unpack_from(request.body)
    return request.name(_CREATE.size), mode, flags


def link_in(request: Request) -> tuple[int, bytes]:
    """The inode that gets a name, and the name."""
    return _U64.unpack_from(request.body)[0], request.name(_U64.size)


def rename_in(request: Request) -> tuple[int, bytes, bytes]:
    """The directory to go to, the old name and the new one."""
    old, new = request.names(_U64.size, 2)
    return _U64.unpack_from(request.body)[0], old, new


def rename2_in(request: Request) -> tuple[int, bytes, bytes, int]:
    """The same, and the flags of renameat2."""
    new_parent, flags, _ = _RENAME2.unpack_from(request.body)
    old, new = request.names(_RENAME2.size, 2)
    return new_parent, old, new, flags


def open_in(body: memoryview) -> int:
    flags: int = _OPEN.unpack_from(body)[0]
    return flags


def transfer_in(body: memoryview) -> tuple[int, int, int]:
    """Handle, offset and size of READ, WRITE and READDIRPLUS."""
    handle, offset, size = _TRANSFER.unpack_from(body)
    if size > TRANSFER_MAX or offset > OFFSET_MAX - size:
        raise ValueError("more bytes than were agreed on, or none that can be")
    return handle, offset, size


def is_append(body: memoryview) -> bool:
    """Whether a WRITE is of a write(2) through O_APPEND; not one of what the kernel kept of a mapping, by whatever handle."""
    of_file, of_write = _U32.unpack_from(body, WRITE_OF_FILE)[0], _U32.unpack_from(body, WRITE_FLAGS)[0]
    return bool(of_file & os.O_APPEND and not of_write & WRITE_CACHE)


def fsync_in(body: memoryview) -> tuple[int, bool]:
    """The handle, and whether data alone matters."""
    handle, flags = _FSYNC.unpack_from(body)
    return handle, bool(flags & FSYNC_DATASYNC)


def symlink_in(request: Request) -> tuple[bytes, bytes]:
    """The name, and what it is to point to."""
    name = request.name()
    return name, request.texts(len(name) + 1, 1)[0]


def xattr_in(request: Request, at: int = 0) -> bytes:
    """The name of an extended attribute."""
    return request.texts(at, 1)[0]


def setxattr_in(request: Request) -> tuple[bytes, bytes, int]:
    """Name, value and flags."""
    size, flags = _TWO_U32.unpack_from(request.body)
    name = xattr_in(request, _TWO_U32.size)
    start = _TWO_U32.size + len(name) + 1
    value = bytes(request.body[start : start + size])
    if len(value) != size:
        raise ValueError("a value is shorter than it says")
    return name, value, flags


def getxattr_in(request: Request) -> tuple[int, bytes]:
    """How much room there is for the value (0: only its size is asked for), and the name."""
    return _TWO_U32.unpack_from(request.body)[0], xattr_in(request, _TWO_U32.size)


def listxattr_in(body: memoryview) -> int:
    size: int = _TWO_U32.unpack_from(body)[0]
    return size


def forget_in(request: Request) -> list[tuple[int, int]]:
    """The inode and how many lookups the kernel takes back."""
    return [(request.node, _U64.unpack_from(request.body)[0])]


def batch_forget_in(request: Request) -> list[tuple[int, int]]:
    count: int = _U32.unpack_from(request.body)[0]
    start = _TWO_U32.size
    return list(_TWO_U64.iter_unpack(request.body[start : start + count * _TWO_U64.size]))


# --- answers


def attributes(node: int, seen: Attributes, blocks: int) -> bytes:
    """struct fuse_attr."""
    st = seen.st
    atime, atime_ns = divmod(st.st_atime_ns, SECOND_NS)
    mtime, mtime_ns = divmod(seen.mtime_ns, SECOND_NS)
    ctime, ctime_ns = divmod(seen.ctime_ns, SECOND_NS)
    return ATTR.pack(
        node, seen.size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev & MASK32, st.st_blksize, 0,
    )  # fmt: skip


def valid_for(seconds: float) -> tuple[int, int]:
    """Seconds and nanoseconds."""
    whole = int(seconds)
    return whole, int((seconds - whole) * SECOND_NS)


def entry(node: int, name_seconds: float, attr_seconds: float, attr: bytes) -> bytes:
    """struct fuse_entry_out; node 0 says that there is no such name."""
    name_s, name_ns = valid_for(name_seconds)
    attr_s, attr_ns = valid_for(attr_seconds)
    return ENTRY.pack(node, 0, name_s, attr_s, name_ns, attr_ns) + attr


NO_ATTRIBUTES: Final = bytes(ATTR.size)


def attr_out(seconds: float, attr: bytes) -> bytes:
    """struct fuse_attr_out: for how long the attributes may be believed, and what they are."""
    return ATTR_VALID.pack(*valid_for(seconds), 0) + attr


def mode_of(found: bytes) -> int:
    """The mode in an `entry`, 0 where there is no such name."""
    mode: int = _U32.unpack_from(found, ENTRY.size + MODE_AT)[0]
    return mode


def direntplus(name: bytes, found: bytes, next_offset: int) -> bytes:
    """One name of a directory with its `entry`; reading goes on at `next_offset` behind it."""
    node, kind = _U64.unpack_from(found, ENTRY.size)[0], mode_of(found) >> 12
    return found + DIRENT.pack(node, next_offset, len(name), kind) + name + PADDING[len(name) % 8]


NO_ENTRY: Final = bytes(ENTRY.size + ATTR.size)  # node 0: no attributes are told, and no lookup is counted


def names_alone(listing: Sequence[Entry], start: int, room: int) -> tuple[list[bytes], int]:
    """Names of a directory from the one at the offset `start` on with their kinds alone, as many as `room` bytes have room for.

    Parts to be joined, and how many names they are.
    """
    parts: list[bytes] = []
    offset, pack, before = start, DIRENT.pack, len(NO_ENTRY) + DIRENT.size
    for name, number, kind in listing[start - 2 : start - 1 + room // before]:  # no more than may have room: it may be a million
        length = len(name)
        padding = PADDING[length % 8]
        room -= before + length + len(padding)
        if room < 0:
            break
        offset += 1
        parts += (NO_ENTRY, pack(number, offset, length, kind >> 12), name, padding)
    return parts, offset - start


def statfs_out(st: os.statvfs_result) -> bytes:
    return STATFS_OUT.pack(
        st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize, st.f_namemax, st.f_frsize, 0
    )


def inval_inode(node: int, attributes_only: bool) -> bytes:
    """The message that makes the kernel forget attributes, and unless `attributes_only` pages as well."""
    body = _INVAL_INODE.pack(node, -1 if attributes_only else 0, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_INODE, 0) + body


def inval_entry(parent: int, name: bytes) -> bytes:
    """The message that makes the kernel forget what had this name."""
    body = _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_ENTRY, 0) + body
