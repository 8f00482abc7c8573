"""Contents of files: open flags, sparse and large files, truncate, O_DIRECT, files without a name, locks, what reaches SOURCE."""

import errno
import fcntl
import mmap
import os
import random
from functools import partial
from pathlib import Path

import pytest

from twin import Twin, forked, inside, opened, outcome, read_file, write_file

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

RDWR_CREAT = os.O_RDWR | os.O_CREAT
GIB = 1 << 30


def has_largest_size(probe: Path) -> bool:
    """Whether the file system sets a limit below what an offset can say: ext4 does, tmpfs does not."""
    probe.touch()
    try:
        return outcome(os.truncate, probe, (1 << 63) - 1) == "EFBIG"
    finally:
        probe.unlink()


def test_open_flags_do_what_they_say(twin: Twin) -> None:
    def steps() -> object:
        answers = []
        write_file("file", b"contents")
        with opened("file", os.O_WRONLY | os.O_TRUNC) as fd:
            answers += [os.fstat(fd).st_size, outcome(os.read, fd, 1), os.write(fd, b"new")]
        with opened("file", os.O_RDONLY) as fd:
            answers += [outcome(os.write, fd, b"x"), outcome(os.ftruncate, fd, 0), os.read(fd, 99)]
        with opened("file", os.O_RDONLY | os.O_TRUNC) as fd:  # unspecified by POSIX; Linux truncates
            answers.append(os.fstat(fd).st_size)
        with opened("file", os.O_RDWR | os.O_APPEND) as fd:
            answers += [os.write(fd, b"one"), os.lseek(fd, 0, os.SEEK_CUR), os.pwrite(fd, b"two", 0), os.pread(fd, 99, 0)]
        os.symlink("made through a link", "link")
        answers += [outcome(os.open, "link", RDWR_CREAT | os.O_EXCL), outcome(os.open, "link", RDWR_CREAT | os.O_NOFOLLOW)]
        with opened("link", RDWR_CREAT) as fd:
            os.write(fd, b"through the link")
        with opened("file", os.O_PATH) as fd:
            answers += [outcome(os.read, fd, 1), outcome(os.fchmod, fd, 0o600), os.fstat(fd).st_size]
        return answers, read_file("made through a link")

    twin.same(steps)


def test_a_file_made_without_write_permission_can_be_written_by_its_maker(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o444) as fd:
            os.write(fd, b"data")
            os.fsync(fd)
            os.write(fd, b" and more")
            return os.pread(fd, 99, 0), oct(os.fstat(fd).st_mode)

    twin.same(steps)


def test_two_writers_that_append_never_overwrite_each_other(twin: Twin) -> None:
    def append(letter: bytes) -> None:
        with opened("log", os.O_WRONLY | os.O_APPEND) as fd:
            for i in range(100):
                os.write(fd, letter * (1 + i % 50) + b"\n")

    def steps() -> object:
        write_file("log")
        writers = [forked(partial(append, letter)) for letter in (b"a", b"b")]
        answers = [wait() for wait in writers]
        lines = sorted(read_file("log").split(b"\n"))
        os.unlink("log")  # the order is not the same each time
        return answers, lines

    twin.same(steps)


def test_holes_read_as_zeros_and_take_no_room(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            os.pwrite(fd, b"end", 10_000_000)
            os.pwrite(fd, b"middle", 5_000_001)
            seen = [os.pread(fd, 8, offset) for offset in (0, 4_999_997, 9_999_995, 10_000_001, 10_000_003, 99_000_000)]
            os.ftruncate(fd, 20_000_000)
            seen += [os.pread(fd, 8, offset) for offset in (10_000_001, 19_999_996)]
            os.fsync(fd)
            seen.append(os.fstat(fd).st_blocks < 1000)
            os.ftruncate(fd, 5_000_004)
        return seen, read_file("file")[-10:]

    twin.same(steps)


def test_a_file_beyond_4_gib_keeps_every_byte_in_its_place(twin: Twin) -> None:
    places = [0, 2 * GIB - 2, 4 * GIB - 3, 4 * GIB + 4095, 7 * GIB + 12345]

    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            for place in places:
                os.pwrite(fd, b"at %d" % place, place)
            os.fsync(fd)
            os.lseek(fd, -5, os.SEEK_END)
            seen = [os.read(fd, 9), os.fstat(fd).st_size, [os.pread(fd, 12, place) for place in places]]
            os.ftruncate(fd, 4 * GIB + 4097)
            seen += [os.pread(fd, 99, 4 * GIB + 4090), os.stat("file").st_size]
            os.ftruncate(fd, 3)
        return seen

    twin.same(steps)


def test_impossible_offsets_and_sizes_are_refused(twin: Twin) -> None:
    if not has_largest_size(twin.plain / "probe"):
        pytest.skip("the file system below takes files of any size: tmpfs, say")

    def steps() -> object:
        top = (1 << 63) - 1
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"data")
            answers = [outcome(os.pread, fd, 10, offset) for offset in (-1, top - 20, 4, 5)]
            answers += [outcome(os.pwrite, fd, b"x", offset) for offset in (-1, top, top - 4096, 1 << 45)]
            answers += [outcome(os.ftruncate, fd, size) for size in (-1, top, 1 << 45)]
            answers += [outcome(os.truncate, "file", size) for size in (-1, top)]
            seeks = (-1, os.SEEK_SET), (-5, os.SEEK_END), (0, 99), (7, os.SEEK_END)
            answers += [outcome(os.lseek, fd, *where) for where in seeks]
            answers += [outcome(os.write, fd, b"x"), os.pread(fd, 99, 0)]
        return answers, outcome(os.truncate, ".", 0), outcome(os.truncate, "missing", 0)

    twin.same(steps)


@pytest.mark.parametrize("fsync", [False, True], ids=["cached", "written"])
def test_truncate_in_the_middle_of_a_page_leaves_zeros_behind_the_new_end(twin: Twin, fsync: bool) -> None:
    def steps() -> object:
        seen = []
        with opened("file", RDWR_CREAT) as fd:
            for size in (5000, 4097, 4096, 4095, 1, 0, 8191, 300_000):
                os.pwrite(fd, b"x" * 400_000, 0)
                if fsync:
                    os.fsync(fd)
                os.pread(fd, 9000, 0)
                os.ftruncate(fd, size)
                seen.append(os.fstat(fd).st_size)
                os.ftruncate(fd, size + 5000)
                seen.append(os.pread(fd, 400_000, 0) == b"x" * size + bytes(5000))
                os.pwrite(fd, b"y", size + 6000)
                seen.append(os.pread(fd, 99_000, size) == bytes(6000) + b"y")
        return seen

    twin.same(steps)


def test_random_writes_reads_and_truncates_equal_those_on_ext4(twin: Twin) -> None:
    def steps() -> object:
        rng = random.Random(7)
        seen = []
        with opened("file", RDWR_CREAT) as fd, opened("file", os.O_RDONLY) as other:
            for _ in range(400):
                offset, length = rng.randrange(300_000), rng.choice((1, 100, 4096, 5000, 70_000))
                what = rng.randrange(6)
                if what < 2:
                    os.pwrite(fd, rng.randbytes(length), offset)
                elif what < 4:
                    seen.append(hash(os.pread(rng.choice((fd, other)), length, offset)))
                elif what == 4:
                    os.ftruncate(fd, offset)
                elif rng.random() < 0.2:
                    os.fsync(fd)
                seen.append(os.fstat(other).st_size)
        return seen

    twin.same(steps)


def aligned(data: bytes) -> mmap.mmap:
    """Memory that O_DIRECT takes."""
    memory = mmap.mmap(-1, max(len(data), 4096))
    memory[: len(data)] = data
    return memory


def test_o_direct_reads_and_writes_agree_with_the_others(twin: Twin) -> None:
    def steps() -> object:
        seen = []
        data = random.Random(1).randbytes(1 << 20)
        with opened("file", RDWR_CREAT) as fd, aligned(data) as memory:
            direct = os.open("file", os.O_RDWR | os.O_DIRECT)
            os.pwrite(direct, memory, 0)
            seen.append(os.pread(fd, 1 << 20, 0) == data)
            os.pwrite(fd, b"buffered", 4096 + 10)
            seen.append(os.preadv(direct, [memory], 0))
            seen.append(memory[4100:4130])
            os.pwrite(direct, memory[:4096] and memory, 1 << 20)
            seen.append(os.pread(fd, 30, (1 << 20) + 4100))
            os.ftruncate(fd, 5000)
            seen.append(os.preadv(direct, [memory], 4096))
            seen.append(os.preadv(direct, [memory], 8192))
            os.close(direct)
        return seen

    twin.same(steps)


def test_a_file_without_a_name_lives_until_its_last_close(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"before" * 10_000)
            other = os.open("file", os.O_RDWR)
            os.unlink("file")
            os.pwrite(fd, b"after", 100_000)
            os.fsync(fd)
            os.pwrite(other, b"other", 3)
            os.ftruncate(fd, 99_000)
            st = os.fstat(fd)
            seen = [os.pread(fd, 20, 0), os.pread(other, 9, 59_995), st.st_nlink, st.st_size, os.listdir(".")]
            again = outcome(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY)
            seen.append(os.read(again, 12) if isinstance(again, int) else again)
            os.close(other)
            seen.append(os.read(again, 4))
            os.close(again)
        return seen

    twin.same(steps)


def test_what_fsync_returned_for_is_in_source(twin: Twin) -> None:
    data = random.Random(2).randbytes(700_001)
    with opened(twin.mounted / "file", RDWR_CREAT) as fd:  # type: ignore[arg-type]
        os.write(fd, data)
        os.fsync(fd)
        assert (twin.source / "file").read_bytes() == data
        os.pwrite(fd, b"changed", 5000)
        os.fdatasync(fd)
        assert (twin.source / "file").read_bytes() == data[:5000] + b"changed" + data[5007:]


def test_what_changed_in_source_is_seen_at_open(twin: Twin) -> None:
    for size in (3, 100_000, 50_000, 100_000) * 20:
        contents = os.urandom(size)
        (twin.source / "file").write_bytes(contents)
        assert (twin.mounted / "file").read_bytes() == contents
    st = os.stat(twin.source / "file")
    with opened(twin.source / "file", os.O_WRONLY) as fd:  # type: ignore[arg-type]
        os.pwrite(fd, b"same size, same mtime", 0)
    os.utime(twin.source / "file", ns=(st.st_atime_ns, st.st_mtime_ns))
    assert (twin.mounted / "file").read_bytes()[:21] == b"same size, same mtime"


def test_locks_of_flock_and_fcntl_exclude_other_processes(twin: Twin) -> None:
    def second(lock: str) -> None:
        with opened("file", os.O_RDWR) as fd:
            if lock == "flock":
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)

    def in_child(lock: str) -> object:
        return forked(partial(second, lock))()

    def steps() -> object:
        write_file("file", b"x" * 100)
        answers = []
        with opened("file", os.O_RDWR) as fd:
            for lock, take in (("flock", lambda how: fcntl.flock(fd, how)), ("fcntl", lambda how: fcntl.lockf(fd, how, 20))):
                answers.append(in_child(lock))
                take(fcntl.LOCK_EX)
                answers.append(in_child(lock))
                take(fcntl.LOCK_UN)
                answers.append(in_child(lock))
        return answers

    assert twin.same(steps) == [None, "EAGAIN", None] * 2


def test_seek_fallocate_and_copy_file_range_work_or_say_so(twin: Twin) -> None:
    """What pyfuse3 has no handler for: SEEK_DATA sees no holes, fallocate is emulated or refused, copies go through the cache."""
    path = twin.mounted / "file"
    with inside(twin.mounted), opened("file", RDWR_CREAT) as fd, opened("copy", RDWR_CREAT) as copy:
        os.write(fd, b"x" * 10_000)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0 and os.lseek(fd, 0, os.SEEK_HOLE) == 10_000
        assert os.copy_file_range(fd, copy, 10_000, 0, 0) == 10_000
        assert outcome(os.posix_fallocate, fd, 0, 20_000) in (None, "EOPNOTSUPP")
        assert Path("copy").read_bytes() == b"x" * 10_000 == path.read_bytes()[:10_000]
        with pytest.raises(OSError) as refused:
            fcntl.ioctl(fd, 0x80086601, bytes(8))  # FS_IOC_GETFLAGS
        assert refused.value.errno in (errno.ENOTTY, errno.ENOSYS)
