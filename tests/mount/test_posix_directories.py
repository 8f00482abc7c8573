"""Reading directories: complete and without repetition whatever happens in them meanwhile, rewound, at telldir positions."""

import ctypes
import os
from collections.abc import Iterator

import pytest

from twin import Twin, inside, opened, outcome, tick, write_file

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = ctypes.c_void_p
for function in (libc.readdir, libc.telldir, libc.rewinddir, libc.closedir, libc.dirfd):
    function.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
NAME_OFFSET = 19  # of d_name in struct dirent, 64 bit


class Stream:
    """opendir(3) and what goes with it."""

    def __init__(self, path: str) -> None:
        self.stream = libc.opendir(os.fsencode(path))
        assert self.stream

    def next(self) -> str | None:
        entry = libc.readdir(self.stream)
        return os.fsdecode(ctypes.string_at(entry + NAME_OFFSET)) if entry else None

    def rest(self) -> list[str]:
        return list(iter(self.next, None))

    def take(self, count: int) -> list[str]:
        return [name for _ in range(count) if (name := self.next()) is not None]

    def tell(self) -> int:
        return int(libc.telldir(self.stream))

    def seek(self, place: int) -> None:
        libc.seekdir(self.stream, place)

    def rewind(self) -> None:
        libc.rewinddir(self.stream)

    def close(self) -> None:
        libc.closedir(self.stream)


@pytest.fixture
def many(twin: Twin) -> Iterator[list[str]]:
    """A thousand files in the current directory, which is on the mount."""
    names = [f"file {i:04}" for i in range(1000)]
    with inside(twin.mounted):
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
        yield names


def test_a_directory_lists_itself_its_parent_and_every_name_once(many: list[str]) -> None:
    stream = Stream(".")
    found = stream.rest()
    stream.close()
    assert found[:2] == [".", ".."] and sorted(found[2:]) == many
    with os.scandir(".") as entries:
        assert all(entry.is_file(follow_symlinks=False) and entry.inode() == entry.stat().st_ino for entry in entries)


def test_names_that_stay_are_seen_once_while_others_come_and_go(many: list[str]) -> None:
    stream = Stream(".")
    found = stream.take(300)
    staying = set(many[::2])
    for name in many[1::2]:
        os.unlink(name)
        os.close(os.open(f"new {name}", os.O_CREAT | os.O_WRONLY))
    found += stream.rest()
    stream.close()
    assert len(found) == len(set(found)), "a name came twice"
    assert staying <= set(found), "a name that was there all the time is missing"


def test_removing_while_reading_removes_everything(many: list[str]) -> None:
    stream = Stream(".")
    while name := stream.next():
        if name not in (".", ".."):
            os.unlink(name)
    stream.close()
    assert os.listdir(".") == []


def test_rewinddir_sees_what_is_new_and_not_what_is_gone(many: list[str]) -> None:
    stream = Stream(".")
    stream.take(500)
    os.unlink(many[0])
    os.mkdir("new")
    stream.rewind()
    found = stream.rest()
    stream.close()
    assert sorted(found) == sorted([".", "..", "new", *many[1:]])


def test_seekdir_goes_back_to_where_telldir_was(many: list[str]) -> None:
    stream = Stream(".")
    stream.take(333)
    place = stream.tell()
    after = stream.rest()
    stream.seek(place)
    assert stream.rest() == after
    stream.seek(place)
    assert stream.take(5) == after[:5]
    stream.close()


def test_two_readers_of_one_directory_do_not_disturb_each_other(many: list[str]) -> None:
    one, two = Stream("."), Stream(".")
    found_one, found_two = one.take(400), two.take(700)
    found_one, found_two = found_one + one.rest(), found_two + two.rest()
    one.close(), two.close()
    assert sorted(found_one) == sorted(found_two) == sorted([".", "..", *many])


def test_a_removed_directory_that_is_open_reads_as_empty_and_takes_nothing_new(twin: Twin) -> None:
    def steps() -> object:
        os.mkdir("gone")
        with opened("gone", os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.rmdir("gone")
            answers = [outcome(os.listdir, fd), os.fstat(fd).st_nlink, outcome(os.mkdir, "x", dir_fd=fd)]
            return [*answers, outcome(os.open, "f", os.O_CREAT | os.O_WRONLY, dir_fd=fd), outcome(os.stat, "x", dir_fd=fd)]

    twin.same(steps)


def test_directories_can_be_synced_and_not_read_or_written(twin: Twin) -> None:
    def steps() -> object:
        os.mkdir("d")
        write_file("d/file")
        with opened("d", os.O_RDONLY) as fd:
            answers = [outcome(os.fsync, fd), outcome(os.fdatasync, fd), outcome(os.read, fd, 1), outcome(os.ftruncate, fd, 0)]
        return [*answers, *(outcome(os.open, "d", flags) for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT))]

    twin.same(steps)


def test_what_was_made_and_removed_in_source_is_listed_at_the_next_reading(twin: Twin) -> None:
    assert os.listdir(twin.mounted) == []
    write_file(os.fspath(twin.source / "made underneath"), b"1")
    assert os.listdir(twin.mounted) == ["made underneath"]
    assert (twin.mounted / "made underneath").read_bytes() == b"1"
    os.rename(twin.source / "made underneath", twin.source / "renamed")
    assert os.listdir(twin.mounted) == ["renamed"]
    tick()
    assert (twin.mounted / "renamed").read_bytes() == b"1"


@pytest.mark.parametrize("entries", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_large_directory_is_made_listed_and_removed(mounted, entries: int) -> None:  # type: ignore[no-untyped-def]
    mount = mounted()
    for i in range(entries):  # in SOURCE, which is quick; every eighth by way of the mount
        directory = mount.path if i % 8 == 0 else mount.source
        os.close(os.open(directory / str(i), os.O_CREAT | os.O_WRONLY))
    names = {str(i) for i in range(entries)}
    assert set(os.listdir(mount.path)) == names
    with os.scandir(mount.path) as found:
        assert sum(entry.stat().st_nlink for entry in found) == entries
    for i, name in enumerate(os.listdir(mount.path)):
        os.unlink((mount.path if i % 8 == 0 else mount.source) / name)
    assert os.listdir(mount.path) == [] == os.listdir(mount.source)
    descriptors = len(os.listdir(f"/proc/{mount.process.pid}/fd"))
    assert descriptors < 10_000
