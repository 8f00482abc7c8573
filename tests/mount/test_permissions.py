"""Who may do what: other users, set-id bits, sticky and setgid directories, umask, ACLs; and mounts by users who are not root."""

import ctypes
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

from mounts import Mount, mounting
from twin import NOBODY, Twin, as_user, forked, inside, opened, outcome, rename, write_file

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for other users")
pytestmark = [pytest.mark.mount, pytest.mark.timeout(60), root]

OTHER = 1234
GROUP = 4321
CLONE_NEWNS = 0x20000
libc = ctypes.CDLL(None, use_errno=True)


def modes(*names: str) -> list[tuple[str, int, int]]:
    return [(oct(os.lstat(name).st_mode), os.lstat(name).st_uid, os.lstat(name).st_gid) for name in names]


def test_new_files_belong_to_who_made_them_less_the_umask(twin: Twin) -> None:
    def make() -> list[tuple[str, int, int]]:
        write = os.open("file", os.O_CREAT | os.O_WRONLY, 0o666)
        os.write(write, b"mine")
        os.close(write)
        os.mkdir("dir", 0o777)
        os.symlink("x", "link")
        os.mkfifo("fifo", 0o666)
        os.mknod("node", stat.S_IFREG | 0o6777)
        os.close(os.open("set-id", os.O_CREAT | os.O_WRONLY, 0o6777))
        return modes("file", "dir", "link", "fifo", "node", "set-id")

    def steps() -> object:
        seen = as_user(OTHER, make, gid=GROUP, umask=0o027)
        for name in ("file", "link", "fifo", "node", "set-id"):
            os.unlink(name)
        os.rmdir("dir")
        return seen, as_user(OTHER, make, umask=0)

    seen = twin.same(steps)
    assert seen[0][0] == ("0o100640", OTHER, GROUP)


def test_a_setgid_directory_gives_its_group_and_its_bit_on(twin: Twin) -> None:
    def make() -> object:
        os.close(os.open("d/file", os.O_CREAT | os.O_WRONLY, 0o2775))
        os.mkdir("d/sub")
        os.mkdir("d/sub/sub")
        os.mkfifo("d/fifo")
        os.symlink("x", "d/link")
        return modes("d/file", "d/sub", "d/sub/sub", "d/fifo", "d/link")

    def steps() -> object:
        os.mkdir("d")
        os.chown("d", 0, GROUP)
        os.chmod("d", 0o2777)
        seen = make(), modes("d")
        shutil.rmtree("d/sub")
        for name in ("file", "fifo", "link"):
            os.unlink(f"d/{name}")
        return seen, as_user(OTHER, make)

    twin.same(steps)


def test_only_owners_remove_from_a_sticky_directory(twin: Twin) -> None:
    def steps() -> object:
        os.mkdir("d")
        os.chmod("d", 0o1777)
        for owner in (0, OTHER, NOBODY):
            for name in ("unlinked", "renamed", "target"):
                write_file(f"d/{name} {owner}")
                os.chown(f"d/{name} {owner}", owner, owner)
        answers = []
        for owner in (0, OTHER, NOBODY):
            answers.append(as_user(OTHER, os.unlink, f"d/unlinked {owner}"))
            answers.append(as_user(OTHER, rename, f"d/renamed {owner}", f"d/moved {owner}"))
            answers.append(as_user(OTHER, rename, f"d/moved {OTHER}", f"d/target {owner}"))
        return answers, sorted(os.listdir("d"))

    twin.same(steps)


@pytest.mark.parametrize("mode", [0o6777, 0o6767, 0o4777, 0o2777, 0o2767])
@pytest.mark.parametrize("user", [0, OTHER], ids=["root", "other"])
@pytest.mark.parametrize("group", [0, OTHER], ids=["in-no-group-of-its-writer", "in-its-writers-group"])
def test_set_id_bits_go_when_others_than_root_write_or_truncate(twin: Twin, mode: int, user: int, group: int) -> None:
    def write(how: int = 0) -> None:
        with opened("file", os.O_WRONLY | how) as fd:
            os.write(fd, b"x")

    def ftruncate() -> None:
        with opened("file", os.O_WRONLY) as fd:
            os.ftruncate(fd, 1)

    def steps() -> object:
        seen: list[object] = []
        changes: list[Callable[[], Any]] = [write, lambda: write(os.O_TRUNC), lambda: write(os.O_APPEND), ftruncate]
        for change in [*changes, lambda: os.truncate("file", 2), lambda: os.stat("file")]:
            write_file("file", b"contents", mode)
            os.chown("file", 0, group)
            os.chmod("file", mode)
            answer = as_user(user, change) if user else outcome(change)
            seen += [answer if isinstance(answer, str) else None, oct(os.stat("file").st_mode)]
        return seen

    twin.same(steps)


def test_owners_who_are_not_root_change_their_files_and_no_others(twin: Twin) -> None:
    def steps() -> object:
        answers = []
        for name, owner, mode in (("mine", OTHER, 0o644), ("theirs", NOBODY, 0o666), ("roots", 0, 0o600)):
            write_file(name, b"contents", mode)
            os.chown(name, owner, GROUP if name == "mine" else owner)
            os.chmod(name, mode)
            answers += [
                as_user(OTHER, os.chmod, name, 0o6755),
                oct(os.stat(name).st_mode),  # no setgid: he is not in the group
                as_user(OTHER, os.chown, name, OTHER, -1),
                as_user(OTHER, os.chown, name, -1, OTHER),
                as_user(OTHER, os.chown, name, -1, NOBODY),
                as_user(OTHER, os.chown, name, NOBODY, -1),
                as_user(OTHER, os.utime, name, (1, 1)),
                as_user(OTHER, os.utime, name),
                as_user(OTHER, os.truncate, name, 3),
                as_user(OTHER, os.setxattr, name, "user.a", b"1"),
                as_user(OTHER, os.setxattr, name, "trusted.a", b"1"),
                as_user(OTHER, os.listxattr, name),
                modes(name),
            ]
        return answers

    twin.same(steps)


def try_all() -> list[object]:
    """What the current user may do with a file in a directory."""
    calls: list[tuple[Any, ...]] = [(os.open, "d/file", os.O_RDONLY), (os.open, "d/file", os.O_WRONLY), (os.listdir, "d")]
    calls += [(os.stat, "d/file"), (os.mkdir, "d/new"), (os.link, "d/file", "d/hard")]
    calls += [(os.access, "d/file", want) for want in (os.R_OK, os.W_OK, os.X_OK, os.F_OK)]
    return [outcome_kind(outcome(*call)) for call in [*calls, (os.unlink, "d/file"), (os.rename, "d", "e")]]


def test_permissions_of_files_and_directories_bind_other_users(twin: Twin) -> None:
    def steps() -> object:
        answers = []
        for mode in (0o777, 0o755, 0o711, 0o744, 0o733, 0o700, 0o070, 0o007):
            os.mkdir("d", 0o777)
            write_file("d/file", b"contents", mode & 0o666)
            os.chmod("d", mode)
            for user, group in ((OTHER, OTHER), (OTHER, 0)):
                answers.append(as_user(user, try_all, gid=group))
            shutil.rmtree("d", ignore_errors=True)
            shutil.rmtree("e", ignore_errors=True)
        return answers

    twin.same(steps)


def outcome_kind(answer: object) -> object:
    return answer if isinstance(answer, str | bool) else "allowed"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_acls_are_kept_inherited_and_obeyed(twin: Twin) -> None:
    if shutil.which("setfacl") is None:
        pytest.skip("the program setfacl is not installed (Debian package acl)")

    def make() -> None:
        os.close(os.open("d/made", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir("d/sub", 0o777)

    def steps() -> object:
        os.mkdir("d")
        write_file("d/file", b"contents", 0o600)
        run("setfacl", "-m", f"u:{OTHER}:rw", "d/file")
        run("setfacl", "-m", f"u:{OTHER}:rwx", "d")
        run("setfacl", "-d", "-m", f"u:{NOBODY}:rwx,g::rx,o::-", "d")
        answers = [outcome_kind(as_user(user, os.open, "d/file", os.O_RDWR)) for user in (OTHER, NOBODY)]
        answers.append(as_user(OTHER, make, umask=0o077))
        os.chmod("d/file", 0o640)
        listing = run("getfacl", "-n", "d", "d/file", "d/made", "d/sub")
        answers.append(outcome_kind(as_user(OTHER, os.open, "d/file", os.O_RDWR)))
        run("setfacl", "-b", "d/file")
        return answers, listing, outcome_kind(as_user(OTHER, os.open, "d/file", os.O_RDONLY))

    twin.same(steps)


def test_programs_run_from_the_mount_and_only_with_permission(twin: Twin) -> None:
    def steps() -> object:
        write_file("script", b"#!/bin/sh\necho ran\n", 0o755)
        write_file("plain", b"#!/bin/sh\necho ran\n", 0o644)
        return run("./script"), outcome(subprocess.run, ["./plain"]), as_user(OTHER, run, "./script")

    assert twin.same(steps) == ("ran\n", "EACCES", "ran\n")


def with_fuse_for_everybody(test: Callable[[], Any]) -> Any:
    """Runs `test` in a process of its own that sees a /dev/fuse which users may open, as on a desktop."""

    def private() -> Any:
        assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        run("mount", "--make-rprivate", "/")
        with tempfile.TemporaryDirectory() as directory:
            device = os.path.join(directory, "fuse")
            os.mknod(device, stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
            os.chmod(device, 0o666)
            run("mount", "--bind", device, "/dev/fuse")
            try:
                return test()
            finally:
                run("umount", "/dev/fuse")

    return forked(private)()


def test_a_user_who_is_not_root_mounts_works_and_unmounts() -> None:
    helper = shutil.which("fusermount3")
    if helper is None or not os.stat(helper).st_mode & stat.S_ISUID or not os.path.exists("/dev/fuse"):
        pytest.skip("fusermount3 is missing or not set-user-id root: users cannot mount here")

    def work(mount: Mount) -> object:
        with inside(mount.path):
            write_file("file", b"contents", 0o640)
            os.mkdir("dir")
            os.link("file", "dir/hard")
            rename("file", "dir/renamed")
            os.setxattr("dir/hard", "user.a", b"1")
            os.symlink("dir/hard", "link")
            with opened("link", os.O_RDWR) as fd:
                os.write(fd, b"CON")
                os.fsync(fd)
                return os.pread(fd, 99, 0), modes("dir/hard", "dir"), os.fstat(fd).st_nlink, os.chown("dir", NOBODY, -1)

    def test() -> object:
        with mounting() as make:
            mount = make(user=NOBODY)
            done = as_user(NOBODY, work, mount)
            others = as_user(OTHER, os.listdir, mount.path), as_user(NOBODY, os.chown, mount.path / "dir", 0, -1)
            unmounted = as_user(NOBODY, run, "fusermount3", "-u", os.fspath(mount.path))
            mount.wait_for_end()
            return done, others, unmounted, (mount.source / "dir" / "hard").read_bytes()

    mine = NOBODY, NOBODY
    assert with_fuse_for_everybody(test) == (
        (b"CONtents", [("0o100640", *mine), ("0o40755", *mine)], 2, None),
        ("EACCES", "EPERM"),
        "",
        b"CONtents",
    )
