"""Names: what can be made, found, linked, renamed and removed, with the errno and the side effects that ext4 has."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from twin import EXCHANGE, NOREPLACE, Twin, inside, opened, outcome, read_file, rename, tree, write_file

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

LONG = b"n" * 255
ODD_NAMES = [LONG, b"\xff\xfe not utf-8 \x80", b"new\nline", b"\x01\x1b[31m", "größe 文件".encode(), b" ", b"-rf", b"a\\b"]


def make_one_of_each() -> None:
    """Something of every kind, for operations to meet."""
    write_file("file", b"contents")
    os.mkdir("empty")
    os.mkdir("full")
    write_file("full/inner", b"inner")
    os.symlink("file", "link")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    os.link("file", "hard")


def mode(look: Callable[[str], os.stat_result], path: str) -> object:
    st = outcome(look, path)
    return st if isinstance(st, str) else oct(st.st_mode)


KINDS = ["file", "hard", "empty", "full", "link", "dangling", "loop", "fifo", "missing", "missing/x", "file/x", "full/inner"]
RENAMED = ["file", "hard", "empty", "full", "link", "missing"]


def test_lookup_finds_what_is_there_and_names_what_is_wrong_with_the_rest(twin: Twin) -> None:
    def steps() -> object:
        make_one_of_each()
        paths = [*KINDS, "loop/x", "dangling/x", "full/../file", "full/.", "full/..", "file/.", "link/", "file/", "full/"]
        return [[mode(os.stat, path), mode(os.lstat, path)] for path in [*paths, "x" * 256, ""]]

    twin.same(steps)


def test_mkdir_rmdir_and_unlink_answer_as_ext4(twin: Twin) -> None:
    def steps() -> object:
        make_one_of_each()
        answers = [outcome(os.mkdir, path) for path in KINDS]
        answers += [outcome(os.rmdir, path) for path in [*KINDS, "full/.", "full/..", "."]]
        answers += [outcome(os.unlink, path) for path in [*KINDS, "full", "full/.", "hard"]]
        return answers, outcome(os.rmdir, "full"), sorted(os.listdir("."))

    twin.same(steps)


def open_and_close(path: str, flags: int) -> None:
    os.close(os.open(path, flags))


def test_open_create_mknod_symlink_and_link_answer_as_ext4(twin: Twin) -> None:
    def steps() -> object:
        make_one_of_each()
        flags = [os.O_RDONLY, os.O_WRONLY, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_RDWR | os.O_CREAT | os.O_EXCL]
        kinds = [path for path in KINDS if path != "fifo"]  # opening one waits for the other end
        answers = [outcome(open_and_close, path, how) for path in kinds for how in flags]
        answers += [outcome(os.symlink, "target", path) for path in KINDS]
        answers += [outcome(os.mknod, path, stat.S_IFREG | 0o600) for path in KINDS]
        answers += [outcome(os.link, "file", path) for path in KINDS]
        answers += [outcome(os.link, path, f"new {i}", follow_symlinks=False) for i, path in enumerate(KINDS)]
        answers += [outcome(os.readlink, path) for path in KINDS]
        return answers

    twin.same(steps)


@pytest.mark.parametrize("flags", [0, NOREPLACE, EXCHANGE], ids=["plain", "noreplace", "exchange"])
def test_rename_of_every_kind_over_every_kind_answers_as_ext4(twin: Twin, flags: int) -> None:
    def steps() -> object:
        answers = []
        for i, old in enumerate(RENAMED):
            for j, new in enumerate([*RENAMED, "missing/x", "file/x", "full/inner"]):
                name = f"{i}-{j}"
                os.mkdir(name)
                with inside(Path(name)):
                    make_one_of_each()
                    answers.append((old, new, outcome(rename, old, new, flags), tree()))
        return answers

    twin.same(steps)


def test_rename_of_a_directory_into_itself_is_refused(twin: Twin) -> None:
    def steps() -> object:
        os.makedirs("a/b/c")
        pairs = [("a", "a/b"), ("a", "a/b/c/d"), ("a/b", "a"), ("a/b/c", "a"), ("a", "a")]
        pairs += [("a/.", "x"), ("a/b/..", "x"), ("a", "a/b/.")]
        return [outcome(rename, old, new, flags) for old, new in pairs for flags in (0, EXCHANGE)]

    assert twin.same(steps)[0] == "EINVAL"


def test_a_directory_that_moved_takes_its_contents_and_its_dotdot_along(twin: Twin) -> None:
    def steps() -> object:
        os.makedirs("from/moved/deep")
        os.mkdir("to")
        write_file("from/moved/deep/file", b"1")
        with opened("from/moved/deep/file", os.O_RDWR) as fd, opened("from/moved/deep", os.O_RDONLY) as directory:
            rename("from/moved", "to/here")
            os.write(fd, b"22")
            write_file("to/here/deep/new", b"3")
            inodes = [os.stat(path).st_ino == os.stat("to").st_ino for path in ("to", "to/here/..", "from")]
            return inodes, sorted(os.listdir(directory)), read_file("to/here/deep/file"), outcome(os.stat, "from/moved")

    twin.same(steps)


def test_rename_over_an_open_file_leaves_the_open_one_alive(twin: Twin) -> None:
    def steps() -> object:
        write_file("old", b"old contents")
        write_file("new", b"new contents")
        with opened("old", os.O_RDWR) as old, opened("new", os.O_RDWR) as new:
            rename("new", "old")
            os.pwrite(old, b"OLD", 0)
            os.pwrite(new, b"NEW", 0)
            links = [os.fstat(fd).st_nlink for fd in (old, new)]
            return os.pread(old, 99, 0), read_file("old"), links, outcome(os.stat, "new")

    assert twin.same(steps)[:3] == (b"OLD contents", b"NEW contents", [0, 1])


def test_exchange_swaps_two_open_files_and_a_file_with_a_directory(twin: Twin) -> None:
    def steps() -> object:
        write_file("a", b"a")
        write_file("b", b"b")
        os.mkdir("d")
        write_file("d/inner", b"inner")
        with opened("a", os.O_RDWR) as a, opened("b", os.O_RDWR) as b:
            rename("a", "b", EXCHANGE)
            os.pwrite(a, b"A!", 0)
            os.pwrite(b, b"B!", 0)
            rename("a", "d", EXCHANGE)
        return read_file("b"), read_file("d"), read_file("a/inner")

    assert twin.same(steps) == (b"A!", b"B!", b"inner")


def test_hard_links_are_one_inode_with_one_content_and_a_right_count(twin: Twin) -> None:
    def steps() -> object:
        write_file("a", b"1")
        os.mkdir("d")
        counts = [os.stat("a").st_nlink]
        for name in ("b", "c", "d/e"):
            os.link("a", name)
            counts += [os.stat("a").st_nlink, os.stat(name).st_nlink]
        with opened("b", os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"2")
            seen = [read_file(name) for name in ("a", "b", "c", "d/e")]
            os.chmod("c", 0o600)
            for name in ("a", "d/e", "b"):
                os.unlink(name)
                counts += [os.fstat(fd).st_nlink, os.stat("c").st_nlink]
        return counts, seen, oct(os.stat("c").st_mode)

    twin.same(steps)


def test_directories_count_their_subdirectories_as_links(twin: Twin) -> None:
    def steps() -> object:
        os.makedirs("d/1")
        counts = [os.stat("d").st_nlink]
        os.mkdir("d/2")
        counts.append(os.stat("d").st_nlink)
        rename("d/1", "1")
        counts.append(os.stat("d").st_nlink)
        os.rmdir("d/2")
        return [*counts, os.stat("d").st_nlink]

    twin.same(steps)


def test_odd_names_are_bytes_and_stay_what_they_are(twin: Twin) -> None:
    def steps() -> object:
        for name in ODD_NAMES:
            write_file(name, name)
            os.symlink(name, b"s" + name[1:] if len(name) > 1 else b"ss")
        os.mkdir(b"d\xff")
        for name in ODD_NAMES:
            rename(name, b"d\xff/" + name)
        return sorted(os.listdir(b"d\xff")), [read_file(b"d\xff/" + name) for name in ODD_NAMES]

    assert twin.same(steps) == (sorted(ODD_NAMES), ODD_NAMES)


def test_names_of_256_bytes_are_too_long_for_every_operation(twin: Twin) -> None:
    def steps() -> object:
        write_file("a")
        os.mkdir("d")
        name = b"n" * 256
        calls = [os.stat, os.mkdir, os.mkfifo, os.unlink, os.rmdir, os.readlink, write_file]
        answers = [outcome(call, name) for call in calls]
        answers += [outcome(call, b"a", name) for call in (os.link, os.symlink, rename)]
        answers.append(outcome(rename, name, b"a"))
        return answers

    assert set(twin.same(steps)) == {"ENAMETOOLONG"}


def test_symlink_targets_of_any_length_that_linux_allows(twin: Twin) -> None:
    def steps() -> object:
        answers = []
        for length in (1, 59, 60, 61, 1000, 4094, 4095, 4096):
            answers += [outcome(os.symlink, b"t" * length, b"s%d" % length), outcome(os.readlink, b"s%d" % length)]
        answers += [outcome(os.symlink, b"", b"nothing"), outcome(os.symlink, b"\xff\n", b"odd"), os.readlink(b"odd")]
        return answers, os.lstat("s1000").st_size

    twin.same(steps)


def test_paths_deeper_than_path_max_are_reached_step_by_step(twin: Twin) -> None:
    def steps() -> object:
        start, name = os.open(".", os.O_RDONLY), "d" * 200
        at = os.dup(start)
        for _ in range(30):  # 6000 bytes
            os.mkdir(name, dir_fd=at)
            below = os.open(name, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        with open(os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=at), "wb") as file:
            file.write(b"deep")
        os.rename("file", "renamed", src_dir_fd=at, dst_dir_fd=at)
        seen = os.listdir(at), os.stat("renamed", dir_fd=at).st_size
        os.unlink("renamed", dir_fd=at)
        os.close(at)
        too_long = outcome(os.stat, "/".join([name] * 30))
        os.system(f"rm -r {name}")
        os.close(start)
        return seen, too_long

    assert twin.same(steps) == ((["renamed"], 4), "ENAMETOOLONG")


def test_fifos_sockets_and_devices_are_made_and_work(twin: Twin) -> None:
    def steps() -> object:
        os.mkfifo("fifo", 0o640)
        devices = [
            outcome(os.mknod, "null", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
            outcome(os.mknod, "block", stat.S_IFBLK | 0o600, os.makedev(7, 200)),
        ]
        os.mknod("made", stat.S_IFREG | 0o604)
        os.mknod("unbound", stat.S_IFSOCK | 0o600)
        with opened("fifo", os.O_RDWR) as fd:
            os.write(fd, b"through the pipe")
            piped = os.read(fd, 99)
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("socket")
            server.listen()
            client.connect("socket")
            server.accept()[0].close()
        return piped, devices, [oct(os.stat(name).st_mode) for name in sorted(os.listdir("."))]

    piped, devices, _ = twin.same(steps)
    assert piped == b"through the pipe"
    assert devices == ([None] * 2 if os.geteuid() == 0 else ["EPERM"] * 2)


def test_a_name_made_again_is_another_file(twin: Twin) -> None:
    def steps() -> object:
        seen = []
        for i in range(20):
            write_file("name", b"%d" % i * (i + 1))
            with opened("name", os.O_RDONLY) as fd:
                os.unlink("name")
                os.mkdir("name")
                seen += [outcome(read_file, "name"), os.fstat(fd).st_nlink, os.read(fd, 99)]
                os.rmdir("name")
        return seen

    twin.same(steps)
