"""Mappings: what is stored through one is seen by read() and reaches SOURCE, what write() wrote is seen through one."""

import mmap
import os
from pathlib import Path

import pytest

from twin import Twin, forked, opened, outcome, write_file

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

PAGE = 4096
SIZE = 100 * PAGE
RDWR_CREAT = os.O_RDWR | os.O_CREAT


def test_stores_through_a_shared_mapping_are_seen_by_read_at_once(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"a" * SIZE)
            with mmap.mmap(fd, SIZE) as memory:
                memory[10:15] = b"store"
                memory[SIZE - 3 :] = b"end"
                seen = [os.pread(fd, 8, 9), os.pread(fd, 9, SIZE - 5)]
                with opened("file", os.O_RDONLY) as other:
                    seen.append(os.pread(other, 8, 9))
        return seen, os.stat("file").st_size

    assert twin.same(steps)[0] == [b"astoreaa", b"aaend", b"astoreaa"]


def test_what_write_wrote_is_seen_through_a_mapping_at_once(twin: Twin) -> None:
    def steps() -> object:
        seen = []
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"a" * SIZE)
            with mmap.mmap(fd, SIZE) as shared, mmap.mmap(fd, SIZE, access=mmap.ACCESS_READ) as reading:
                seen += [shared[:3], reading[:3], shared[5 * PAGE]]
                os.pwrite(fd, b"bcd", 0)
                os.pwrite(fd, b"across" * 2000, 5 * PAGE - 7)
                seen += [shared[:4], reading[:4], shared[5 * PAGE - 8 : 5 * PAGE + 8], reading[7 * PAGE - 2 : 7 * PAGE + 2]]
        return seen

    twin.same(steps)


def test_msync_and_fsync_put_stores_into_source(twin: Twin) -> None:
    with opened(twin.mounted / "file", RDWR_CREAT) as fd:  # type: ignore[arg-type]
        os.ftruncate(fd, SIZE)
        with mmap.mmap(fd, SIZE) as memory:
            for i in range(100):
                memory[i * PAGE : i * PAGE + 4] = b"%4d" % i
            memory.flush()
            os.fsync(fd)
            there = (twin.source / "file").read_bytes()
    assert [there[i * PAGE : i * PAGE + 5] for i in range(100)] == [b"%4d\0" % i for i in range(100)]


def test_stores_survive_unmapping_and_closing(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            os.ftruncate(fd, SIZE)
            with mmap.mmap(fd, SIZE) as memory:
                memory[:] = bytes(range(256)) * (SIZE // 256)
        return Path("file").read_bytes()

    assert twin.same(steps) == bytes(range(256)) * (SIZE // 256)


def test_a_mapping_outlives_the_descriptor_and_the_name(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"a" * SIZE)
            memory = mmap.mmap(fd, SIZE)
        os.unlink("file")
        memory[PAGE : PAGE + 4] = b"late"
        memory.flush()
        seen = memory[PAGE - 1 : PAGE + 5]
        memory.close()
        return seen

    assert twin.same(steps) == b"alatea"


def test_stores_into_a_private_mapping_stay_private(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"a" * SIZE)
            with mmap.mmap(fd, SIZE, access=mmap.ACCESS_COPY) as memory:
                memory[:4] = b"mine"
                return memory[:5], os.pread(fd, 5, 0)

    assert twin.same(steps) == (b"minea", b"aaaaa")


def test_mapped_pages_show_zeros_behind_an_end_that_moved(twin: Twin) -> None:
    def steps() -> object:
        seen = []
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"a" * SIZE)
            with mmap.mmap(fd, SIZE) as memory:
                memory[:4] = b"page"
                os.ftruncate(fd, 10)
                seen.append(memory[:20])
                os.ftruncate(fd, SIZE)
                seen += [memory[:20], memory[PAGE * 50 : PAGE * 50 + 4], os.pread(fd, 20, 0)]
                memory[15:17] = b"zz"
                seen.append(os.pread(fd, 20, 0))
        return seen

    twin.same(steps)


def test_two_processes_share_a_mapping(twin: Twin) -> None:
    def steps() -> object:
        def child() -> None:
            with opened("file", os.O_RDWR) as mine, mmap.mmap(mine, SIZE) as theirs:
                theirs[77:82] = b"child"

        write_file("file", bytes(SIZE))
        with opened("file", os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as memory:
            forked(child)()
            return memory[76:83], os.pread(fd, 7, 76)

    assert twin.same(steps) == (b"\0child\0",) * 2


def test_mapping_needs_the_access_that_the_descriptor_has(twin: Twin) -> None:
    def steps() -> object:
        write_file("file", b"a" * SIZE)
        answers = []
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND):
            with opened("file", flags) as fd:
                for access in (mmap.ACCESS_READ, mmap.ACCESS_WRITE, mmap.ACCESS_COPY):
                    answer = outcome(mmap.mmap, fd, SIZE, access=access)
                    answers.append(answer if isinstance(answer, str) else "mapped")
        return answers

    twin.same(steps)


def test_a_mapping_made_writable_on_a_file_written_by_write_mixes_both(twin: Twin) -> None:
    def steps() -> object:
        with opened("file", RDWR_CREAT) as fd:
            os.write(fd, b"." * SIZE)
            with mmap.mmap(fd, SIZE) as memory:
                for i in range(0, SIZE, 1000):
                    if i % 2000:
                        memory[i : i + 6] = b"mapped"
                    else:
                        os.pwrite(fd, b"writes", i)
                    if i % 7000 == 0:
                        memory.flush()
                    if i % 9000 == 0:
                        os.fsync(fd)
                return memory[:] == os.pread(fd, SIZE, 0), os.pread(fd, SIZE, 0)

    assert twin.same(steps)[0]
