"""One suite for every store: what `backing.base` promises, each operation with its errnos."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backing.base import RENAME_EXCHANGE, RENAME_NOREPLACE, Backing

SECOND_NS = 1_000_000_000
AS_ROOT = os.geteuid() == 0


def has_largest_size(fd: int) -> bool:
    """Whether the file system sets a limit below what an offset can say: ext4 does, tmpfs does not."""
    try:
        os.ftruncate(fd, (1 << 63) - 1)
    except OSError:
        return True
    os.ftruncate(fd, 0)
    return False


def can_lease(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def refused(number: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*args)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


class Store:
    """A store on an empty directory, with the descriptors that a test opened."""

    def __init__(self, backing: Backing, path: Path) -> None:
        self.backing = backing
        self.path = path
        self.opened: list[int] = []
        self.root = self.keep(backing.open_root())

    def keep(self, fd: int) -> int:
        self.opened.append(fd)
        return fd

    def file(self, name: bytes = b"file", data: bytes = b"", flags: int = os.O_RDWR) -> int:
        """A descriptor of a new file with some data."""
        fd = self.keep(self.backing.open(self.root, name, flags | os.O_CREAT | os.O_EXCL, 0o644))
        assert not data or self.backing.pwritev(fd, [data], 0) == len(data)
        return fd

    def opath(self, name: bytes) -> int:
        return self.keep(self.backing.open(self.root, name, os.O_PATH))

    def symlink(self, name: bytes = b"link", target: bytes = b"file") -> int:
        """An O_PATH descriptor of a new symbolic link."""
        self.backing.symlink(self.root, name, target)
        return self.opath(name)

    def directory(self, name: bytes = b"dir") -> int:
        self.backing.mkdir(self.root, name, 0o755)
        return self.opath(name)

    def names(self) -> list[bytes]:
        return [entry.name for entry in self.backing.listdir(self.root)]

    def read(self, fd: int, size: int = 1 << 16, offset: int = 0) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.backing.preadv(fd, [buffer], offset)])

    def finish(self) -> None:
        for fd in self.opened:
            self.backing.close(fd)
        self.backing.shutdown()


@pytest.mark.usefixtures("no_umask")
class BackingContract:
    """The suite. A subclass says how to make its store."""

    def make(self, path: Path) -> Backing:
        raise NotImplementedError

    @pytest.fixture
    def s(self, tmp_path: Path) -> Iterator[Store]:
        store = Store(self.make(tmp_path), tmp_path)
        yield store
        store.finish()

    # open, reopen, close

    def test_root_is_an_o_path_descriptor_of_the_directory(self, s: Store) -> None:
        assert s.backing.fstat(s.root).st_ino == s.path.stat().st_ino
        refused(errno.EBADF, os.fsync, s.root)

    def test_open_creates_with_the_mode_asked_for(self, s: Store) -> None:
        fd = s.keep(s.backing.open(s.root, b"new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o4751))
        assert stat.S_IMODE(s.backing.fstat(fd).st_mode) == 0o4751
        refused(errno.EEXIST, s.backing.open, s.root, b"new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)

    def test_redirect_makes_a_descriptor_lead_elsewhere_at_once(self, s: Store) -> None:
        fd, other = s.file(data=b"old"), s.file(b"other", b"new")
        by_path = s.opath(b"file")
        for descriptor in (fd, by_path):
            s.backing.redirect(descriptor, other)
            assert s.backing.fstat(descriptor).st_ino == (s.path / "other").stat().st_ino
            assert not os.get_inheritable(descriptor)
        assert s.read(fd) == s.read(other) == b"new"
        refused(errno.EBADF, s.backing.redirect, fd, 99_999)
        assert s.read(fd) == b"new"

    def test_a_lease_lets_nobody_else_open_the_file(self, s: Store) -> None:
        fd = s.file(data=b"data")
        if not s.backing.lease(fd):
            assert s.backing.blocking or not can_lease(fd)
            return
        refused(errno.EWOULDBLOCK, os.open, s.path / "file", os.O_WRONLY | os.O_NONBLOCK)
        assert s.backing.pwritev(fd, [b"DATA"], 0) == 4
        s.backing.unlease(fd)
        other = os.open(s.path / "file", os.O_RDONLY)
        assert os.read(other, 9) == b"DATA"
        assert not s.backing.lease(fd), "somebody has it open"
        assert not s.backing.lease(fd, 0.01)
        closing = threading.Thread(target=os.close, args=(os.dup(other),))
        os.close(other)
        closing.start()
        assert s.backing.lease(fd, 10.0), "and soon has not"
        closing.join()
        s.backing.unlease(fd)

    def test_open_says_what_is_wrong_with_a_name(self, s: Store) -> None:
        s.file()
        refused(errno.ENOENT, s.backing.open, s.root, b"none", os.O_RDONLY)
        refused(errno.ENAMETOOLONG, s.backing.open, s.root, b"n" * 256, os.O_RDWR | os.O_CREAT, 0o600)
        refused(errno.ENOTDIR, s.backing.open, s.root, b"file", os.O_RDONLY | os.O_DIRECTORY)
        refused(errno.EISDIR, s.backing.open, s.root, b".", os.O_RDWR)
        refused(errno.EBADF, s.backing.open, 99_999, b"file", os.O_RDONLY)

    def test_names_are_bytes_of_any_encoding(self, s: Store) -> None:
        s.file(b"\xff\xfe \n")
        assert s.names() == [b"\xff\xfe \n"]
        assert s.backing.stat(s.root, b"\xff\xfe \n").st_size == 0

    def test_open_never_follows_a_symbolic_link(self, s: Store) -> None:
        s.file()
        link = s.symlink()
        assert stat.S_ISLNK(s.backing.fstat(link).st_mode)
        refused(errno.ELOOP, s.backing.open, s.root, b"link", os.O_RDONLY)
        refused(errno.ELOOP, s.backing.reopen, link, os.O_RDONLY)

    def test_open_ignores_o_direct_and_o_append(self, s: Store) -> None:
        fd = s.file(data=b"0123456789", flags=os.O_RDWR | os.O_DIRECT | os.O_APPEND)
        assert s.backing.pwritev(fd, [b"ab"], 3) == 2
        assert s.read(fd, 7, 1) == b"12ab567"

    def test_descriptors_do_not_leak_into_children(self, s: Store) -> None:
        handle = s.keep(s.backing.reopen(s.file(), os.O_RDONLY))
        assert not any(os.get_inheritable(fd) for fd in (s.root, handle, s.opath(b"file")))

    def test_opening_a_fifo_does_not_wait(self, s: Store) -> None:
        s.backing.mknod(s.root, b"fifo", stat.S_IFIFO | 0o600, 0)
        s.keep(s.backing.open(s.root, b"fifo", os.O_RDONLY))

    def test_reopen_gives_an_o_path_descriptor_access(self, s: Store) -> None:
        s.file(data=b"data")
        fd = s.keep(s.backing.reopen(s.opath(b"file"), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND))
        s.backing.pwritev(fd, [b"DA"], 0)
        assert s.read(fd) == b"DAta"
        s.keep(s.backing.reopen(fd, os.O_WRONLY | os.O_TRUNC))
        assert s.backing.fstat(fd).st_size == 0

    def test_reopen_finds_a_file_without_a_name(self, s: Store) -> None:
        s.file(data=b"data")
        fd = s.opath(b"file")
        s.backing.unlink(s.root, b"file")
        assert s.read(s.keep(s.backing.reopen(fd, os.O_RDONLY))) == b"data"
        assert s.backing.fstat(fd).st_nlink == 0

    def test_close_gives_the_descriptor_back(self, s: Store) -> None:
        fd = s.backing.open(s.root, b"file", os.O_CREAT | os.O_RDWR, 0o600)
        s.backing.close(fd)
        refused(errno.EBADF, s.backing.fstat, fd)
        refused(errno.EBADF, s.backing.close, fd)

    # stat, listdir, readlink, statvfs

    def test_stat_is_about_the_link_itself(self, s: Store) -> None:
        fd = s.file(data=b"12345")
        link = s.symlink()
        assert s.backing.stat(s.root, b"file") == s.backing.fstat(fd)
        assert s.backing.stat(s.root, b"link").st_ino == s.backing.fstat(link).st_ino
        refused(errno.ENOENT, s.backing.stat, s.root, b"none")
        refused(errno.ENOTDIR, s.backing.stat, fd, b"none")

    def test_listdir_gives_every_name_once(self, s: Store) -> None:
        names = [b"%04d" % i for i in range(2000)]
        for name in names:
            s.backing.mknod(s.root, name, stat.S_IFREG | 0o600, 0)
        assert sorted(s.names()) == names
        refused(errno.ENOTDIR, s.backing.listdir, s.opath(b"0000"))

    def test_listdir_tells_numbers_and_kinds(self, s: Store) -> None:
        s.file()
        s.symlink()
        s.directory()
        s.backing.mknod(s.root, b"fifo", stat.S_IFIFO | 0o600, 0)
        kinds = {b"file": stat.S_IFREG, b"link": stat.S_IFLNK, b"dir": stat.S_IFDIR, b"fifo": 0}
        assert {entry.name: entry.kind for entry in s.backing.listdir(s.root)} == kinds
        for entry in s.backing.listdir(s.root):
            assert entry.number == s.backing.stat(s.root, entry.name).st_ino

    def test_listdir_has_no_position_that_threads_could_share(self, s: Store) -> None:
        for i in range(500):
            s.backing.mknod(s.root, b"%03d" % i, stat.S_IFREG | 0o600, 0)
        fd = s.keep(s.backing.reopen(s.root, os.O_RDONLY | os.O_DIRECTORY))
        counts: list[int] = []
        threads = [
            threading.Thread(target=lambda: counts.extend(len(s.backing.listdir(fd)) for _ in range(20)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == [500] * 80

    def test_listdir_of_a_removed_directory_is_empty_or_refused(self, s: Store) -> None:
        fd = s.directory()
        s.backing.rmdir(s.root, b"dir")
        try:
            assert s.backing.listdir(fd) == []
        except OSError as error:
            assert error.errno == errno.ENOENT

    def test_readlink_gives_the_target_bytes(self, s: Store) -> None:
        target = b"../\xff/" + b"x" * 4000
        assert s.backing.readlink(s.symlink(target=target)) == target
        refused(errno.ENAMETOOLONG, s.backing.symlink, s.root, b"long", b"x" * 4096)
        refused(errno.EEXIST, s.backing.symlink, s.root, b"link", b"x")

    def test_statvfs_knows_the_longest_name(self, s: Store) -> None:
        found = s.backing.statvfs(s.root)
        assert found.f_namemax == 255
        assert found.f_blocks >= found.f_bfree

    # preadv, pwritev, truncate, fsync, syncfs

    def test_data_scatters_and_gathers(self, s: Store) -> None:
        fd = s.file()
        assert s.backing.pwritev(fd, [b"abc", memoryview(b"defg")[1:], bytearray(b"h")], 10) == 7
        first, second = bytearray(12), bytearray(100)
        assert s.backing.preadv(fd, [first, memoryview(second)[5:]], 0) == 17
        assert bytes(first) == bytes(10) + b"ab"
        assert second[5:10] == b"cefgh"

    def test_reading_ends_at_the_end(self, s: Store) -> None:
        fd = s.file(data=b"data")
        assert s.read(fd, 10, 4) == b""
        assert s.read(fd, 10, 1 << 40) == b""
        assert s.read(fd, 10, 2) == b"ta"

    def test_data_calls_say_what_is_wrong(self, s: Store) -> None:
        fd = s.file(data=b"data")
        reader = s.keep(s.backing.reopen(fd, os.O_RDONLY))
        writer = s.keep(s.backing.reopen(fd, os.O_WRONLY))
        directory = s.keep(s.backing.reopen(s.root, os.O_RDONLY))
        refused(errno.EBADF, s.backing.preadv, writer, [bytearray(1)], 0)
        refused(errno.EBADF, s.backing.pwritev, reader, [b"x"], 0)
        refused(errno.EBADF, s.backing.preadv, s.opath(b"file"), [bytearray(1)], 0)
        refused(errno.EISDIR, s.backing.preadv, directory, [bytearray(1)], 0)
        if has_largest_size(fd):
            refused(errno.EFBIG, s.backing.pwritev, fd, [b"x"], (1 << 63) - 4097)

    def test_nowait_gives_the_right_bytes_or_refuses(self, s: Store) -> None:
        fd = s.file(data=b"data" * 1000)
        buffer = bytearray(4000)
        try:
            count = s.backing.preadv_nowait(fd, [buffer], 0)
        except BlockingIOError as error:
            assert error.errno == errno.EAGAIN
        else:
            assert buffer[:count] == (b"data" * 1000)[:count]

    def test_holes_read_as_zeros(self, s: Store) -> None:
        fd = s.file()
        s.backing.pwritev(fd, [b"end"], 5 << 30)
        assert s.backing.fstat(fd).st_size == (5 << 30) + 3
        assert s.read(fd, 4096, 1 << 30) == bytes(4096)

    def test_truncate_works_on_every_kind_of_descriptor(self, s: Store) -> None:
        fd = s.file(data=b"0123456789")
        s.backing.truncate(fd, 8)
        s.backing.truncate(s.opath(b"file"), 6)
        s.backing.truncate(s.keep(s.backing.reopen(fd, os.O_RDONLY)), 4)
        assert s.read(fd) == b"0123"
        s.backing.truncate(fd, 6)
        assert s.read(fd) == b"0123\0\0"

    def test_truncate_says_what_is_wrong(self, s: Store) -> None:
        fd = s.file()
        refused(errno.EINVAL, s.backing.truncate, fd, -1)
        if has_largest_size(fd):
            refused(errno.EFBIG, s.backing.truncate, fd, (1 << 63) - 1)
        refused(errno.EISDIR, s.backing.truncate, s.directory(), 0)

    def test_truncate_works_on_a_file_opened_for_writing_that_turned_read_only(self, s: Store) -> None:
        fd = s.keep(s.backing.open(s.root, b"file", os.O_CREAT | os.O_RDWR, 0o400))
        s.backing.truncate(fd, 5)
        assert s.backing.fstat(fd).st_size == 5

    def test_size_is_that_of_the_file_now(self, s: Store) -> None:
        fd = s.keep(s.backing.open(s.root, b"sized", os.O_RDWR | os.O_CREAT, 0o600))
        for size in (0, 5, (5 << 32) + 1):
            s.backing.truncate(fd, size)
            assert s.backing.size(fd) == size
        refused(errno.EBADF, s.backing.size, -1)

    def test_flush_takes_files_and_leaves_them_open(self, s: Store) -> None:
        fd = s.keep(s.backing.open(s.root, b"flushed", os.O_RDWR | os.O_CREAT, 0o600))
        s.backing.pwritev(fd, [b"data"], 0)
        s.backing.flush(fd)
        s.backing.flush(fd)
        assert s.backing.fstat(fd).st_size == 4
        s.backing.pwritev(fd, [b"more"], 4)

    def test_fsync_takes_files_and_directories(self, s: Store) -> None:
        fd = s.file(data=b"data")
        s.backing.fsync(fd, True)
        s.backing.fsync(fd, datasync=False)
        s.backing.fsync(s.keep(s.backing.reopen(s.root, os.O_RDONLY)), False)
        refused(errno.EBADF, s.backing.fsync, s.opath(b"file"), False)

    def test_syncfs_takes_every_kind_of_descriptor(self, s: Store) -> None:
        s.backing.syncfs(s.file())
        s.backing.syncfs(s.root)
        s.backing.syncfs(s.symlink())
        refused(errno.EBADF, s.backing.syncfs, 99_999)

    # mknod, mkdir, link, unlink, rmdir, rename

    def test_mknod_makes_every_kind(self, s: Store) -> None:
        kinds = {b"f": stat.S_IFREG, b"p": stat.S_IFIFO, b"s": stat.S_IFSOCK}
        for name, kind in kinds.items():
            s.backing.mknod(s.root, name, kind | 0o640, 0)
            assert s.backing.stat(s.root, name).st_mode == kind | 0o640
        refused(errno.EEXIST, s.backing.mknod, s.root, b"f", stat.S_IFREG | 0o600, 0)

    @pytest.mark.skipif(not AS_ROOT, reason="devices are root's to make")
    def test_mknod_makes_devices(self, s: Store) -> None:
        s.backing.mknod(s.root, b"null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        assert s.backing.stat(s.root, b"null").st_rdev == os.makedev(1, 3)

    def test_mkdir_and_rmdir(self, s: Store) -> None:
        fd = s.directory()
        refused(errno.EEXIST, s.backing.mkdir, s.root, b"dir", 0o700)
        s.backing.mkdir(fd, b"inner", 0o1777)
        assert s.backing.stat(fd, b"inner").st_mode == stat.S_IFDIR | 0o1777
        refused(errno.ENOTEMPTY, s.backing.rmdir, s.root, b"dir")
        s.backing.rmdir(fd, b"inner")
        s.backing.rmdir(s.root, b"dir")
        refused(errno.ENOENT, s.backing.rmdir, s.root, b"dir")
        refused(errno.ENOENT, s.backing.mkdir, fd, b"inner", 0o700)

    def test_link_gives_one_more_name(self, s: Store) -> None:
        fd = s.file(data=b"data")
        s.backing.link(fd, s.root, b"second")
        s.backing.link(s.opath(b"file"), s.directory(), b"third")
        assert s.backing.fstat(fd).st_nlink == 3
        refused(errno.EEXIST, s.backing.link, fd, s.root, b"second")
        refused(errno.EPERM, s.backing.link, s.opath(b"dir"), s.root, b"dir2")

    def test_link_of_a_symbolic_link_is_the_link(self, s: Store) -> None:
        s.file()
        s.backing.link(s.symlink(), s.root, b"second")
        assert s.backing.readlink(s.opath(b"second")) == b"file"

    def test_unlink(self, s: Store) -> None:
        s.file()
        s.directory()
        s.backing.unlink(s.root, b"file")
        refused(errno.ENOENT, s.backing.unlink, s.root, b"file")
        refused(errno.EISDIR, s.backing.unlink, s.root, b"dir")
        s.file()
        refused(errno.ENOTDIR, s.backing.rmdir, s.root, b"file")

    def test_rename_replaces(self, s: Store) -> None:
        s.file(b"a", b"A")
        s.file(b"b", b"B")
        s.backing.rename(s.root, b"a", s.root, b"b")
        assert s.names() == [b"b"]
        s.backing.rename(s.root, b"b", s.directory(), b"c", 0)
        assert s.names() == [b"dir"]
        refused(errno.ENOENT, s.backing.rename, s.root, b"b", s.root, b"c", 0)

    def test_rename_flags(self, s: Store) -> None:
        a, b = s.file(b"a", b"A"), s.file(b"b", b"B")
        refused(errno.EEXIST, s.backing.rename, s.root, b"a", s.root, b"b", RENAME_NOREPLACE)
        s.backing.rename(s.root, b"a", s.root, b"b", RENAME_EXCHANGE)
        assert s.backing.stat(s.root, b"a").st_ino == s.backing.fstat(b).st_ino
        assert s.backing.stat(s.root, b"b").st_ino == s.backing.fstat(a).st_ino
        refused(errno.ENOENT, s.backing.rename, s.root, b"a", s.root, b"none", RENAME_EXCHANGE)
        refused(errno.EINVAL, s.backing.rename, s.root, b"a", s.root, b"b", RENAME_NOREPLACE | RENAME_EXCHANGE)

    def test_rename_refuses_a_loop(self, s: Store) -> None:
        fd = s.directory()
        refused(errno.EINVAL, s.backing.rename, s.root, b"dir", fd, b"inner", 0)
        s.file()
        refused(errno.EISDIR, s.backing.rename, s.root, b"file", s.root, b"dir", 0)
        refused(errno.ENOTDIR, s.backing.rename, s.root, b"dir", s.root, b"file", 0)

    # chmod, chown, utime

    def test_chmod_works_on_every_kind_of_descriptor(self, s: Store) -> None:
        fd = s.file()
        for target, mode in ((fd, 0o600), (s.opath(b"file"), 0o4755)):
            s.backing.chmod(target, mode)
            assert stat.S_IMODE(s.backing.fstat(fd).st_mode) == mode

    def test_chmod_leaves_symbolic_links_and_their_targets_alone(self, s: Store) -> None:
        fd = s.file()
        before = s.backing.fstat(fd).st_mode
        refused(errno.EOPNOTSUPP, s.backing.chmod, s.symlink(), 0o600)
        assert s.backing.fstat(fd).st_mode == before

    @pytest.mark.skipif(not AS_ROOT, reason="owners are root's to change")
    def test_chown_is_about_the_inode_itself(self, s: Store) -> None:
        fd, link = s.file(), s.symlink()
        s.backing.chown(fd, 1, 2)
        s.backing.chown(s.opath(b"file"), -1, 3)
        s.backing.chown(link, 4, 5)
        found, of_link = s.backing.fstat(fd), s.backing.fstat(link)
        assert (found.st_uid, found.st_gid, of_link.st_uid, of_link.st_gid) == (1, 3, 4, 5)

    @pytest.mark.parametrize("kind", ["descriptor", "O_PATH", "symlink"])
    def test_utime_sets_what_it_is_given(self, s: Store, kind: str) -> None:
        fd = s.file()
        target = {"descriptor": lambda: fd, "O_PATH": lambda: s.opath(b"file"), "symlink": s.symlink}[kind]()
        s.backing.utime(target, 5 * SECOND_NS + 1, 6 * SECOND_NS + 2)
        s.backing.utime(target, None, 7 * SECOND_NS + 3)
        assert s.backing.fstat(target).st_atime_ns == 5 * SECOND_NS + 1
        assert s.backing.fstat(target).st_mtime_ns == 7 * SECOND_NS + 3
        s.backing.utime(target, atime_ns=-SECOND_NS - 1, mtime_ns=None)
        assert s.backing.fstat(target).st_atime_ns == -SECOND_NS - 1
        assert s.backing.fstat(target).st_mtime_ns == 7 * SECOND_NS + 3

    # extended attributes

    def test_xattrs_work_on_every_kind_of_descriptor(self, s: Store) -> None:
        fd = s.file()
        for target in (fd, s.opath(b"file"), s.directory()):
            s.backing.setxattr(target, b"user.\xffa", b"\0value")
            assert s.backing.getxattr(target, b"user.\xffa") == b"\0value"
            assert s.backing.listxattr(target) == [b"user.\xffa"]
            s.backing.removexattr(target, b"user.\xffa")
            assert s.backing.listxattr(target) == []

    def test_xattr_errnos(self, s: Store) -> None:
        fd = s.file()
        refused(errno.ENODATA, s.backing.getxattr, fd, b"user.none")
        refused(errno.ENODATA, s.backing.removexattr, fd, b"user.none")
        refused(errno.ENODATA, s.backing.setxattr, fd, b"user.a", b"1", os.XATTR_REPLACE)
        s.backing.setxattr(fd, b"user.a", b"1", os.XATTR_CREATE)
        refused(errno.EEXIST, s.backing.setxattr, fd, b"user.a", b"2", os.XATTR_CREATE)
        refused(errno.EOPNOTSUPP, s.backing.setxattr, fd, b"nonsense", b"1")
        refused(errno.ERANGE, s.backing.setxattr, fd, b"user." + b"n" * 251, b"1")

    def test_xattrs_of_a_symbolic_link_are_its_own(self, s: Store) -> None:
        fd, link = s.file(), s.symlink()
        s.backing.setxattr(fd, b"user.a", b"1")
        refused(errno.ENODATA, s.backing.getxattr, link, b"user.a")
        refused(errno.EPERM, s.backing.setxattr, link, b"user.a", b"1")
        assert s.backing.listxattr(link) == []

    # file handles

    def test_a_handle_outlives_descriptors_and_renames(self, s: Store) -> None:
        handle = self.handle_or_skip(s, s.file(data=b"data"))
        s.backing.rename(s.root, b"file", s.directory(), b"moved")
        assert s.read(s.keep(s.backing.open_handle(handle, os.O_RDONLY))) == b"data"
        opath = s.keep(s.backing.open_handle(handle, os.O_PATH))
        assert s.backing.file_handle(opath) == handle
        s.backing.chmod(opath, 0o640)

    def test_a_symbolic_link_has_a_handle(self, s: Store) -> None:
        handle = self.handle_or_skip(s, s.symlink())
        assert s.backing.readlink(s.keep(s.backing.open_handle(handle, os.O_PATH))) == b"file"

    def test_a_handle_of_nothing_is_refused(self, s: Store) -> None:
        fd = s.file()
        handle = self.handle_or_skip(s, fd)
        s.backing.unlink(s.root, b"file")
        s.opened.remove(fd)
        s.backing.close(fd)
        refused(errno.ESTALE, s.backing.open_handle, handle, os.O_RDONLY)
        refused(errno.EINVAL, s.backing.open_handle, b"", os.O_RDONLY)
        refused(errno.EINVAL, s.backing.open_handle, b"x" * 200, os.O_RDONLY)

    def handle_or_skip(self, s: Store, fd: int) -> bytes:
        """A handle that can be opened here, which takes a file system that has handles, and the right to use them."""
        try:
            handle = s.backing.file_handle(fd)
            s.backing.close(s.backing.open_handle(handle, os.O_PATH))
        except OSError as error:
            assert error.errno in (errno.EOPNOTSUPP, errno.EPERM)
            pytest.skip(f"no file handles here: {error.strerror}")
        return handle
