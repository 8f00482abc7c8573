"""When the backing fails: the right errno, reported once to each handle, nothing lost, nothing hanging, nothing made up."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mounts import mounting
from twin import forked, inside, opened, outcome, read_file, write_file

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]

RDWR_CREAT = os.O_RDWR | os.O_CREAT
DATA = bytes(range(256)) * 256
Plan = Callable[..., None]


@pytest.fixture(scope="module")
def faulty() -> Iterator[Any]:
    """A mount whose backing does what a plan says, without readahead or writeback of its own accord."""
    with mounting() as make, tempfile.NamedTemporaryFile("w", suffix=".json") as plan:
        plan.write("[]")
        plan.flush()
        later = ["--dirty-expire", "1h", "--write-through", "off"]
        mount = make("--fault-plan", plan.name, "--readahead-max", "0", "--metadata-ttl", "0s", *later)
        mount.plan_path = plan.name  # type: ignore[attr-defined]
        mount.announce("cannot write to the backing")
        yield mount


@pytest.fixture
def plan(faulty: Any, request: pytest.FixtureRequest) -> Iterator[Plan]:
    """`plan(rule, ...)` says what the backing does from now on. The test runs in a directory of its own on the mount."""

    def set_plan(*rules: dict[str, object]) -> None:
        with open(faulty.plan_path + ".new", "w") as file:
            json.dump(rules, file)
        os.rename(faulty.plan_path + ".new", faulty.plan_path)

    directory = faulty.path / request.node.name
    directory.mkdir()
    with inside(directory):
        yield set_plan
        set_plan()
    assert faulty.ask("sync")["unwritten"] == []
    faulty.check_log()


@pytest.mark.parametrize("number", ["ENOSPC", "EIO", "EDQUOT"])
def test_an_error_of_writeback_reaches_every_handle_once_and_the_data_is_kept(faulty: Any, plan: Plan, number: str) -> None:
    with opened("file", RDWR_CREAT) as one, opened("file", os.O_RDWR) as two:
        os.write(one, DATA)
        plan({"op": "pwritev", "errno": number, "count": 1})
        assert outcome(os.fsync, one) == number
        assert outcome(os.fsync, two) == number, "each handle is told"
        assert outcome(os.fsync, one) is None, "once"
        assert outcome(os.fsync, two) is None
        with opened("file", os.O_RDWR) as later:
            assert outcome(os.fsync, later) is None, "what was before a handle was opened is not its business"
        assert os.pread(two, len(DATA), 0) == DATA
    assert read_file(faulty.source / os.path.basename(os.getcwd()) / "file") == DATA


def test_close_reports_what_could_not_be_written_and_the_data_stays_readable(faulty: Any, plan: Plan) -> None:
    fd = os.open("file", RDWR_CREAT)
    os.write(fd, DATA)
    plan({"op": "pwritev", "errno": "ENOSPC"})
    assert outcome(os.close, fd) == "ENOSPC"
    assert read_file("file") == DATA
    assert faulty.ask("status")["statistics"]["writeback"]["dirty_bytes"] >= len(DATA)
    plan()
    with opened("file", os.O_RDWR) as fd:
        os.fsync(fd)
    assert read_file(faulty.source / os.path.basename(os.getcwd()) / "file") == DATA


def test_close_of_who_only_reads_reports_no_error_of_writing(faulty: Any, plan: Plan) -> None:
    """Regression: `cat` failed at close with ENOSPC when a try to write had failed meanwhile."""
    with opened("file", RDWR_CREAT) as writer:
        os.write(writer, DATA)
        reader, plain = os.open("file", os.O_RDONLY), os.open("file", os.O_RDONLY)
        plan({"op": "pwritev", "errno": "ENOSPC", "count": 1})
        assert outcome(os.fsync, writer) == "ENOSPC"
        assert outcome(os.close, plain) is None
        assert outcome(os.fsync, reader) == "ENOSPC", "fsync asks for it"
        os.close(reader)


def test_a_failing_sync_of_the_backing_is_reported(plan: Plan) -> None:
    with opened("file", RDWR_CREAT) as fd:
        os.write(fd, DATA)
        plan({"op": "fsync", "errno": "EIO", "count": 1})
        assert [outcome(os.fsync, fd), outcome(os.fsync, fd)] == ["EIO", None]


def test_a_read_that_fails_says_so_and_the_next_one_works(faulty: Any, plan: Plan) -> None:
    write_file(faulty.source / os.path.basename(os.getcwd()) / "file", DATA)
    with opened("file", os.O_RDONLY) as fd:
        plan({"op": "preadv", "errno": "EIO", "count": 1})
        assert outcome(os.pread, fd, 4096, 0) == "EIO"
        assert os.pread(fd, 4096, 0) == DATA[:4096]
        plan({"op": "preadv", "errno": "EIO"})
        assert os.pread(fd, 4096, 0) == DATA[:4096], "what is cached is still served"
        assert outcome(os.pread, fd, 4096, 8192) == "EIO"


def test_a_write_into_a_page_that_cannot_be_read_fails_and_changes_nothing(faulty: Any, plan: Plan) -> None:
    write_file(faulty.source / os.path.basename(os.getcwd()) / "file", DATA)
    with opened("file", os.O_RDWR) as fd:
        plan({"op": "preadv", "errno": "EIO"})
        assert outcome(os.pwrite, fd, b"part", 5000) == "EIO"
        assert outcome(os.pwrite, fd, b"w" * 4096, 8192) == 4096, "a whole page needs no reading"
        plan()
        os.fsync(fd)
        assert os.pread(fd, len(DATA), 0) == DATA[:8192] + b"w" * 4096 + DATA[12288:]


def test_short_reads_and_writes_of_the_backing_are_continued(faulty: Any, plan: Plan) -> None:
    plan({"op": "pwritev", "short": 1000}, {"op": "preadv", "short": 777})
    write_file(faulty.source / os.path.basename(os.getcwd()) / "there", DATA)
    write_file("new", DATA)
    assert read_file("there") == DATA
    assert read_file(faulty.source / os.path.basename(os.getcwd()) / "new") == DATA


OPERATIONS: dict[str, Callable[[], object]] = {
    "stat": lambda: os.stat("there"),
    "listdir": lambda: os.listdir("."),
    "mkdir": lambda: os.mkdir("x"),
    "unlink": lambda: os.unlink("there"),
    "rmdir": lambda: os.rmdir("dir"),
    "rename": lambda: os.rename("there", "x"),
    "link": lambda: os.link("there", "x"),
    "symlink": lambda: os.symlink("there", "x"),
    "mknod": lambda: os.mkfifo("x"),
    "chmod": lambda: os.chmod("there", 0o600),
    "chown": lambda: os.chown("there", os.geteuid(), os.getegid()),
    "utime": lambda: os.utime("there", (1, 1)),
    "truncate": lambda: os.truncate("there", 1),
    "setxattr": lambda: os.setxattr("there", "user.a", b"1"),
    "statvfs": lambda: os.statvfs("."),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_the_backing_refuses_fails_with_its_errno(plan: Plan, operation: str) -> None:
    write_file("there", DATA)
    os.mkdir("dir")
    for number in ("EIO", "EROFS", "ETIMEDOUT"):
        plan({"op": operation, "errno": number})
        assert outcome(OPERATIONS[operation]) == number
    plan()
    assert not isinstance(outcome(OPERATIONS[operation]), str)


def test_a_directory_whose_entries_cannot_be_looked_at_does_not_look_empty(plan: Plan) -> None:
    write_file("there", DATA)
    plan({"op": "stat", "errno": "EIO"})
    assert outcome(os.listdir, ".") == "EIO"


def test_a_hanging_call_keeps_others_from_nothing(plan: Plan) -> None:
    write_file("cached", DATA)
    write_file("hanging", DATA)
    assert read_file("cached") == DATA
    with opened("cached", os.O_RDONLY) as cached, opened("hanging", os.O_RDWR) as fd:
        os.write(fd, b"changed")
        plan({"op": "pwritev", "hang": True})
        waiting = forked(lambda: os.fsync(fd))
        assert os.pread(cached, len(DATA), 0) == DATA
        os.mkdir("meanwhile")
        assert os.pread(fd, 7, 0) == b"changed"
        plan()
        assert waiting() is None


def test_source_removed_under_a_live_mount_gives_errors_and_no_hang(mounted: Any) -> None:
    mount = mounted("--metadata-ttl", "0s")
    mount.announce("cannot write to the backing")
    with inside(mount.path):
        os.mkdir("dir")
        write_file("dir/file", DATA)
    with opened(mount.path / "dir" / "file", os.O_RDWR) as fd:
        shutil.rmtree(mount.source)
        missing = {"ENOENT", "ESTALE"}
        assert outcome(os.stat, mount.path / "dir") in missing
        assert outcome(os.mkdir, mount.path / "new") in missing
        assert outcome(os.open, mount.path / "new", RDWR_CREAT) in missing
        assert outcome(os.rename, mount.path / "dir", mount.path / "x") in missing
        assert os.pread(fd, len(DATA), 0) == DATA, "an open file lives"
        os.pwrite(fd, b"still", 0)
        assert outcome(os.fsync, fd) is None and os.pread(fd, 5, 0) == b"still"
        assert isinstance(os.statvfs(mount.path).f_namemax, int)
    assert os.listdir(mount.path) == []
    mount.unmount()


def test_a_killed_daemon_leaves_a_mountpoint_that_the_next_mount_takes_over(mounted: Any) -> None:
    mount = mounted()
    (mount.path / "file").write_bytes(DATA)
    assert mount.ask("sync")["unwritten"] == []
    mount.process.kill()
    mount.process.wait()
    assert outcome(os.stat, mount.path) == "ENOTCONN"
    mount.start()
    assert (mount.path / "file").read_bytes() == DATA


def test_sigterm_writes_out_and_unmounts(mounted: Any) -> None:
    mount = mounted("--dirty-expire", "1h", "--write-through", "off")
    (mount.path / "file").write_bytes(DATA)
    mount.process.terminate()
    assert mount.process.wait(30) == 0
    assert not os.path.ismount(mount.path)
    assert (mount.source / "file").read_bytes() == DATA
    mount.check_log()


def test_what_cannot_be_written_at_the_end_is_named_and_makes_the_exit_status_1(mounted: Any, tmp_path: Any) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"op": "pwritev", "errno": "ENOSPC"}]))
    mount = mounted("--fault-plan", str(plan))
    mount.announce("cannot write to the backing|not written")
    with inside(mount.path):
        os.mkdir("dir")
        fd = os.open("dir/file", RDWR_CREAT)
        os.write(fd, DATA)
        assert outcome(os.close, fd) == "ENOSPC"
    mount.exit_status = 1
    mount.unmount()
    assert '"path": "dir/file", "offset": 0, "length": 65536, "error": "ENOSPC"' in mount.log_text()


def test_a_read_only_mount_refuses_every_change(mounted: Any) -> None:
    mount = mounted("--read-only")
    (mount.source / "file").write_bytes(DATA)
    with inside(mount.path):
        assert read_file("file") == DATA
        changes = [lambda: os.mkdir("x"), lambda: os.unlink("file"), lambda: os.truncate("file", 0), lambda: os.chmod("file", 0)]
        assert {outcome(change) for change in [*changes, lambda: os.open("file", os.O_RDWR)]} == {"EROFS"}
