"""Copies of files beside them: how they are named, and how they become like the file; plain calls to the backing.

The functions that take a `Backing` may run in a thread. All names are made relative to a descriptor of their directory,
never through a symbolic link, and never in the place of another file.
"""

import contextlib
import errno
import itertools
import os
import stat
import time

from backing.base import Backing
from cachefs.backingio import write_fully
from cachefs.inode import Signature, signature_of
from cachefs.watchdog import getting_on

NUMBER_MAX = 100_000  # copies of one name and second
CHUNK_BYTES = 1 << 20  # for each read of a copy
ACL = b"system.posix_acl_access"
NOT_GIVEN_AWAY = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP)  # not root, or a store without owners


def conflict_name(name: bytes, when: float, number: int, longest: int) -> bytes:
    """`NAME.conflict-20261122-153000`, and `-2`, `-3` ... for further ones; the base is cut to stay within `longest` bytes."""
    ending = time.strftime(".conflict-%Y%m%d-%H%M%S", time.localtime(when)).encode()
    if number > 1:
        ending += b"-%d" % number
    return cut(name, longest - len(ending)) + ending


def cut(name: bytes, nbytes: int) -> bytes:
    """At most `nbytes` bytes of a name, and no half character at the end if it is UTF-8."""
    if len(name) <= nbytes:
        return name
    start = nbytes
    while start > max(0, nbytes - 3) and name[start] & 0xC0 == 0x80:
        start -= 1
    return name[:start] if name[start] & 0xC0 == 0xC0 else name[:nbytes]


def create_free(dirfd: int, backing: Backing, name: bytes, when: float) -> tuple[bytes, int]:
    """Makes a file under the first name for a copy that is free; (name, descriptor)."""
    longest = min(255, backing.statvfs(dirfd).f_namemax or 255)
    for number in itertools.count(1):
        candidate = conflict_name(name, when, number, longest)
        try:
            return candidate, backing.open(dirfd, candidate, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if number >= NUMBER_MAX:
                raise
    raise AssertionError("unreachable: count() has no end")


def remove(backing: Backing, dirfd: int, name: bytes, fd: int) -> None:
    """Removes a copy that was not finished, unless another file has its name."""
    there, ours = backing.stat(dirfd, name), backing.fstat(fd)
    if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
        backing.unlink(dirfd, name)


def copy_piece(backing: Backing, fd: int, to_fd: int, offset: int, end: int) -> None:
    """Copies bytes [offset, end), as far as there are any; leaves holes for zeros."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    zeros = bytes(CHUNK_BYTES)
    while offset < end:
        getting_on(2 * CHUNK_BYTES)
        nbytes = backing.preadv(fd, [buffer[: end - offset]], offset)
        if not nbytes:
            break
        if buffer[:nbytes] != zeros[:nbytes]:
            write_fully(backing, to_fd, [buffer[:nbytes]], offset)
        offset += nbytes


def dress(backing: Backing, fd: int, to_fd: int, st: os.stat_result) -> None:
    """Gives a copy the owner, permissions, attributes and times of what it is a copy of; never set-id bits.

    Whoever could not read the original cannot read the copy: where the owner cannot be kept, only the daemon's user can.
    """
    mode = stat.S_IMODE(st.st_mode) & 0o777
    try:
        backing.chown(to_fd, st.st_uid, st.st_gid)
    except OSError as error:
        if error.errno not in NOT_GIVEN_AWAY:
            raise
        mode &= 0o700
    copy_attributes(backing, fd, to_fd)
    backing.chmod(to_fd, mode)
    backing.utime(to_fd, st.st_atime_ns, st.st_mtime_ns)


def copy_attributes(backing: Backing, fd: int, to_fd: int) -> None:
    """Extended attributes of users, as far as they can be had, and the ACL: if that cannot be kept, no copy."""
    try:
        names = backing.listxattr(fd)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return
    if ACL in names:
        backing.setxattr(to_fd, ACL, backing.getxattr(fd, ACL))
    elif ACL in backing.listxattr(to_fd):  # what the directory gives to new files
        backing.removexattr(to_fd, ACL)
    for name in names:
        if name.startswith(b"user."):
            with contextlib.suppress(OSError):
                backing.setxattr(to_fd, name, backing.getxattr(fd, name))


def sync(backing: Backing, fd: int, dirfd: int) -> None:
    """Makes a copy and its name durable; the name where the directory may be read."""
    backing.fsync(fd, False)
    try:
        directory = backing.reopen(dirfd, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        backing.fsync(directory, False)
    finally:
        backing.close(directory)


def resize(backing: Backing, fd: int, theirs: Signature, size: int) -> os.stat_result | None:
    """Sets the size of a file that has this signature; None, and nothing done, if it has another one by now."""
    leased = backing.lease(fd)
    try:
        if signature_of(backing.fstat(fd))[:2] != theirs[:2]:
            return None
        backing.truncate(fd, size)
        return backing.fstat(fd)
    finally:
        if leased:
            backing.unlease(fd)
