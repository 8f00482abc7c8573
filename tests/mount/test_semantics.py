"""Statements of SEMANTICS.md that no other test proves: figures, durability, errors, changes underneath, what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from backing.directory import DirectoryBacking
from mounts import Factory, Mount, wait_until
from twin import NOBODY, as_user, opened, outcome

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away, makes devices and acts for others")

PAGE = 4096
RDWR_CREAT = os.O_RDWR | os.O_CREAT
LATER = ("--dirty-expire", "1h", "--write-through", "off")  # nothing is written back unless something asks for it
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
FICLONE, FS_IOC_GETFLAGS = 0x40049409, 0x80086601
_libc = ctypes.CDLL(None, use_errno=True)


def cache_of(mount: Mount) -> Mapping[str, Any]:
    """The figures of the cache now."""
    return mount.ask("status")["statistics"]["cache"]  # type: ignore[index, no-any-return]


def read_all(path: Path, size: int = 128 << 10) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return b"".join(iter(lambda: file.read(size), b""))


def put_plan(path: Path, *rules: Mapping[str, object]) -> Path:
    """Makes `rules` the faults of SOURCE; a mount with --fault-plan sees the change at once."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rules))
    new.rename(path)
    return path


# --- reading


def test_a_file_read_twice_misses_each_page_at_most_once_and_then_hits_each(mounted: Factory) -> None:
    mount = mounted()
    contents = random.Random(1).randbytes(8 << 20)
    (mount.source / "file").write_bytes(contents)
    assert read_all(mount.path / "file") == contents
    first = cache_of(mount)
    assert first["page_misses"] <= 2048
    assert read_all(mount.path / "file") == contents
    second = cache_of(mount)
    assert second["page_misses"] == first["page_misses"]
    assert second["page_hits"] - first["page_hits"] == 2048
    assert second["hit_bytes"] - first["hit_bytes"] == 8 << 20


def test_a_lone_random_read_fetches_no_more_than_four_pages(mounted: Factory) -> None:
    mount = mounted("--backing", "network")
    (mount.source / "file").write_bytes(bytes(4 << 20))
    with opened(os.fspath(mount.path / "file"), os.O_RDONLY) as fd:
        assert os.pread(fd, PAGE, 2 << 20) == bytes(PAGE)
    backing: Any = mount.ask("status")["statistics"]
    assert 0 < backing["backing"]["read_bytes"] <= 4 * PAGE


@pytest.mark.parametrize("policy", ["lru", "sieve", "s3fifo"])
def test_the_cache_never_holds_more_than_its_size(mounted: Factory, policy: str) -> None:
    mount = mounted("--cache-size", "1M", "--policy", policy)
    contents = random.Random(2).randbytes(3 << 20)
    (mount.source / "file").write_bytes(contents)
    for _ in range(2):
        assert read_all(mount.path / "file") == contents
        (mount.path / "written").write_bytes(contents)
        assert cache_of(mount)["resident_bytes"] <= 1 << 20
    assert read_all(mount.path / "written") == contents


# --- writing and durability


def test_a_write_is_seen_by_others_at_once_and_is_in_source_later(mounted: Factory) -> None:
    mount = mounted(*LATER)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.write(fd, b"acknowledged")
        assert (mount.path / "file").read_bytes() == b"acknowledged"
        assert (mount.source / "file").read_bytes() == b""
    assert (mount.source / "file").read_bytes() == b"", "close writes nothing to a local SOURCE"
    dirty: Any = mount.ask("status")["statistics"]
    assert dirty["writeback"]["dirty_bytes"] == PAGE
    mount.unmount()
    assert (mount.source / "file").read_bytes() == b"acknowledged"


@pytest.mark.parametrize(
    ("options", "at_once"), [((), True), (("--durability", "journal"), False), (("--backing", "network"), False)]
)
def test_small_writes_to_a_local_source_are_there_at_once(mounted: Factory, options: Sequence[str], at_once: bool) -> None:
    mount = mounted("--dirty-expire", "1h", *options)
    at_once = at_once and DirectoryBacking(mount.source).has_fine_times()
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        for i in range(3):
            os.pwrite(fd, b"acknowledged", 5000 * i)
            assert os.fstat(fd).st_size == 5000 * i + 12
        assert (mount.path / "file").read_bytes().count(b"acknowledged") == 3
        assert (mount.source / "file").read_bytes().count(b"acknowledged") == (3 if at_once else 0)
        status: Any = mount.ask("status")["statistics"]
    writeback = status["writeback"]
    assert (writeback["dirty_bytes"] == 0) == (writeback["through_bytes"] == 36) == at_once


@as_root
def test_all_but_file_data_is_in_source_at_once(mounted: Factory) -> None:
    mount = mounted(*LATER)
    ours, theirs = mount.path, mount.source
    (ours / "file").write_bytes(b"x" * 10_000)
    os.truncate(ours / "file", 5000)
    os.chmod(ours / "file", 0o604)
    os.chown(ours / "file", 12, 34)
    os.utime(ours / "file", ns=(10**18, 2 * 10**18))
    os.setxattr(ours / "file", "user.a", b"value")
    os.mkdir(ours / "dir")
    os.rename(ours / "file", ours / "dir" / "renamed")
    os.symlink("dir", ours / "link")
    there = os.stat(theirs / "dir" / "renamed")
    assert (there.st_size, there.st_mode & 0o7777, there.st_uid, there.st_gid) == (5000, 0o604, 12, 34)
    assert (there.st_atime_ns, there.st_mtime_ns) == (10**18, 2 * 10**18)
    assert os.getxattr(theirs / "dir" / "renamed", "user.a") == b"value"
    assert os.readlink(theirs / "link") == "dir"
    assert (theirs / "dir" / "renamed").read_bytes() == bytes(5000), "the data comes later"


def test_close_puts_data_into_a_source_that_is_far_away(mounted: Factory) -> None:
    mount = mounted(*LATER, "--backing", "network")
    (mount.path / "file").write_bytes(b"closed")
    assert (mount.source / "file").read_bytes() == b"closed"


def test_written_data_is_in_source_when_it_has_expired(mounted: Factory) -> None:
    mount = mounted("--dirty-expire", "50ms", "--writeback-interval", "20ms")
    (mount.path / "file").write_bytes(b"expired")
    wait_until(lambda: (mount.source / "file").read_bytes() == b"expired", "writeback")


def test_unwritten_data_never_exceeds_its_limit(mounted: Factory) -> None:
    mount = mounted(*LATER, "--cache-size", "4M", "--dirty-limit", "1M")
    data = random.Random(3).randbytes(1 << 20)
    with open(mount.path / "file", "wb", buffering=0) as file:
        for _ in range(8):
            file.write(data)
            unwritten: Any = mount.ask("status")["statistics"]
            assert unwritten["writeback"]["dirty_bytes"] <= 1 << 20


@pytest.mark.parametrize(
    ("durability", "afterwards"), [("backing", b"synced and not"), ("journal", b"synced and not"), ("none", b"synced")]
)
def test_a_killed_daemon_loses_nothing_with_a_journal_and_what_was_not_synced_without(
    mounted: Factory, durability: str, afterwards: bytes
) -> None:
    mount = mounted(*LATER, "--durability", durability)
    with contextlib.suppress(OSError), opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.write(fd, b"synced")
        os.fsync(fd)
        os.write(fd, b" and not")
        (mount.path / "other").write_bytes(b" and not")
        mount.process.send_signal(signal.SIGKILL)
        mount.process.wait(60)
        assert outcome(os.pread, fd, 9, 0) in ("ENOTCONN", "ECONNABORTED")
    mount.start()  # takes the dead mount away
    assert (mount.source / "file").read_bytes() == afterwards  # before anybody asks the mount
    assert (mount.path / "file").read_bytes() == afterwards
    assert (mount.path / "other").read_bytes() == afterwards.removeprefix(b"synced")


def test_sync_makes_everything_durable_but_syncfs_of_the_kernel_does_not_reach_us(mounted: Factory) -> None:
    mount = mounted(*LATER)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.write(fd, b"data")
        assert _libc.syncfs(fd) == 0
        assert (mount.source / "file").read_bytes() == b""
        assert mount.ask("sync") == {"done": True, "unwritten": []}
        assert (mount.source / "file").read_bytes() == b"data"


def test_a_file_removed_before_it_is_written_back_is_never_written(mounted: Factory) -> None:
    mount = mounted(*LATER)
    (mount.path / "file").write_bytes(bytes(1 << 20))
    os.unlink(mount.path / "file")
    mount.ask("sync")
    written: Any = mount.ask("status")["statistics"]
    assert written["writeback"]["written_bytes"] == written["writeback"]["dirty_bytes"] == 0


# --- errors


@pytest.fixture
def failing(mounted: Factory, tmp_path: Path) -> Iterator[tuple[Mount, Path]]:
    """A mount and the plan of its faults, empty at first and at the end."""
    plan = put_plan(tmp_path / "plan")
    mount = mounted(*LATER, "--cache-size", "4M", "--dirty-limit", "1M", "--fault-plan", str(plan))
    yield mount, plan
    put_plan(plan)


def test_a_writer_gets_the_error_when_nothing_can_be_written_and_memory_is_full(failing: tuple[Mount, Path]) -> None:
    mount, plan = failing
    mount.announce("cannot write to the backing: ENOSPC")
    put_plan(plan, {"op": "pwritev", "errno": "ENOSPC"})
    fd = os.open(mount.path / "file", RDWR_CREAT)
    block = b"x" * (64 << 10)
    written = 0
    while written < 8 << 20 and (answer := outcome(os.write, fd, block)) == len(block):
        written += len(block)
    assert answer == "ENOSPC"
    assert written <= 1 << 20
    assert os.pread(fd, 8 << 20, 0) == b"x" * written
    put_plan(plan)
    assert outcome(os.fsync, fd) in (None, "ENOSPC")
    os.close(fd)
    mount.ask("sync")
    assert (mount.source / "file").read_bytes()[:written] == b"x" * written


def test_what_is_cached_is_served_while_source_does_not_answer(failing: tuple[Mount, Path]) -> None:
    mount, plan = failing
    (mount.source / "file").write_bytes(b"contents")
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        assert os.pread(fd, 99, 0) == b"contents"
        put_plan(plan, {"op": "preadv", "hang": True}, {"op": "pwritev", "hang": True})
        assert os.pread(fd, 99, 0) == b"contents"
        assert os.pwrite(fd, b"CON", 0) == 3
        assert os.pread(fd, 99, 0) == b"CONtents"
        put_plan(plan)


# --- changes underneath


def test_names_and_attributes_changed_in_source_are_seen_after_the_ttl(mounted: Factory) -> None:
    mount = mounted("--metadata-ttl", "50ms")
    (mount.source / "old").write_bytes(b"1")
    assert os.stat(mount.path / "old").st_size == 1 and os.listdir(mount.path) == ["old"]
    (mount.source / "old").write_bytes(b"22")
    (mount.source / "new").write_bytes(b"")
    wait_until(lambda: os.stat(mount.path / "old").st_size == 2, "the new size")
    assert sorted(os.listdir(mount.path)) == ["new", "old"]
    os.unlink(mount.source / "old")
    wait_until(lambda: not (mount.path / "old").exists(), "the end of a name")


def test_an_open_file_changed_in_source_is_read_anew_once_its_attributes_are(mounted: Factory) -> None:
    mount = mounted("--metadata-ttl", "0s")
    (mount.source / "file").write_bytes(b"a" * 10_000)
    with opened(os.fspath(mount.path / "file"), os.O_RDONLY) as fd:
        assert os.pread(fd, 5, 0) == b"aaaaa"
        (mount.source / "file").write_bytes(b"b" * 20_000)
        assert os.fstat(fd).st_size == 20_000
        assert os.pread(fd, 5, 0) == b"bbbbb"
    assert cache_of(mount)["evictions"]["invalidated"] == 3


def test_regression_a_change_in_source_is_not_hidden_by_a_chmod_of_ours_behind_it(mounted: Factory) -> None:
    mount = mounted()
    (mount.source / "file").write_bytes(b"a" * 10_000)
    with opened(os.fspath(mount.path / "file"), os.O_RDONLY) as fd:
        assert os.pread(fd, 5, 0) == b"aaaaa"
        (mount.source / "file").write_bytes(b"b" * 10_000)
        os.fchmod(fd, 0o600)
        assert os.pread(fd, 5, 0) == b"bbbbb"


@pytest.mark.parametrize("ours", ["write", "utime", "truncate"])
def test_regression_a_change_in_source_is_not_hidden_by_a_change_of_ours_behind_it(mounted: Factory, ours: str) -> None:
    mount = mounted("--metadata-ttl", "0s")
    mount.announce('"file" was changed in SOURCE while data of ours was unwritten')  # by a write of ours that had not seen it
    (mount.source / "file").write_bytes(b"a" * 10_000)
    with opened(os.fspath(mount.path / "file"), os.O_RDWR) as fd:
        assert os.pread(fd, 20_000, 0) == b"a" * 10_000
        with opened(os.fspath(mount.source / "file"), os.O_RDWR) as theirs:
            os.pwrite(theirs, b"b" * 100, 9_000)
        if ours == "write":
            os.pwrite(fd, b"c", 0)
            os.fsync(fd)
        elif ours == "utime":
            os.utime(fd, (1, 1))
        else:
            os.ftruncate(fd, 9_500)
        assert os.pread(fd, 100, 9_000) == b"b" * 100


def test_regression_a_file_that_appeared_in_source_is_not_opened_past_its_mode(mounted: Factory) -> None:
    mount = mounted("--backing", "network", "--metadata-ttl", "30s")
    os.chmod(mount.base, 0o755)
    assert not (mount.path / "secret").exists()  # which the kernel now believes
    (mount.source / "secret").write_bytes(b"of root")
    (mount.source / "secret").chmod(0o600)
    child = os.fork()
    if not child:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.open(mount.path / "secret", os.O_RDWR | os.O_CREAT)
        except PermissionError:
            os._exit(0)
        except OSError:
            os._exit(2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_regression_an_open_hard_link_far_away_is_read_after_its_name_is_gone(mounted: Factory) -> None:
    mount = mounted("--backing", "network")
    (mount.source / "a").write_bytes(b"contents")
    os.link(mount.source / "a", mount.source / "b")
    with opened(os.fspath(mount.path / "a"), os.O_RDONLY) as fd:
        os.unlink(mount.path / "a")
        assert os.pread(fd, 99, 0) == b"contents"


def test_a_symlink_planted_in_source_leads_nobody_out_of_it(mounted: Factory) -> None:
    mount = mounted("--metadata-ttl", "0s")
    outside = mount.base / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"secret")
    (mount.source / "d").mkdir()
    (mount.source / "d" / "file").write_bytes(b"inside")
    fd = os.open(mount.path / "d", os.O_RDONLY)
    try:
        (mount.source / "d").rename(mount.source / "moved")
        (mount.source / "d").symlink_to(outside)
        assert outcome(lambda: os.listdir(fd)) in (["file"], "ESTALE")
        assert outcome(lambda: os.stat("file", dir_fd=fd).st_size) in ("ESTALE", "ENOENT", len(b"inside"))
        assert os.readlink(mount.path / "d") == str(outside)
    finally:
        os.close(fd)


def test_locks_on_the_mount_do_not_reach_source(mounted: Factory) -> None:
    mount = mounted()
    with (
        opened(os.fspath(mount.path / "file"), RDWR_CREAT) as ours,
        opened(os.fspath(mount.source / "file"), os.O_RDWR) as theirs,
    ):
        fcntl.flock(ours, fcntl.LOCK_EX)
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- the kernel's cache


@pytest.mark.parametrize(("mode", "seen"), [("off", 512), ("open", 256), ("keep", 0)])
def test_how_many_pages_of_four_reads_of_an_unchanged_file_reach_us(mounted: Factory, mode: str, seen: int) -> None:
    """`off`: both reads of both opens. `open`: the first of each open. `keep`: none, the kernel has all of it."""
    mount = mounted(kernel_cache=mode)
    (mount.source / "file").write_bytes(random.Random(4).randbytes(128 * PAGE))
    contents = read_all(mount.path / "file")
    before = cache_of(mount)
    for _ in range(2):
        with open(mount.path / "file", "rb", buffering=0) as file:
            for _ in range(2):
                file.seek(0)
                assert b"".join(iter(lambda: file.read(128 << 10), b"")) == contents
    after = cache_of(mount)
    assert after["page_hits"] - before["page_hits"] == seen
    assert after["page_misses"] == before["page_misses"]


@pytest.mark.parametrize("mode", ["open", "keep"])
def test_the_kernel_keeps_nothing_of_a_file_that_changed_in_source(mounted: Factory, mode: str) -> None:
    mount = mounted(kernel_cache=mode)
    for byte in b"abc":
        (mount.source / "file").write_bytes(bytes([byte]) * 50_000)
        assert read_all(mount.path / "file") == bytes([byte]) * 50_000


@pytest.mark.parametrize("mode", ["off", "open", "keep"])
def test_a_write_reaches_us_before_it_returns_in_every_mode(mounted: Factory, mode: str) -> None:
    mount = mounted(*LATER, kernel_cache=mode)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.write(fd, b"x" * 10_000)
        assert cache_of(mount)["write_bytes"] == 10_000


# --- who may do what


@as_root
def test_a_mount_without_allow_other_is_closed_to_others_even_to_files_that_are_open_to_all(mounted: Factory) -> None:
    mount = mounted("--no-allow-other")
    (mount.source / "file").write_bytes(b"x")
    (mount.source / "file").chmod(0o666)
    assert as_user(NOBODY, lambda: os.stat(mount.path / "file").st_size) == "EACCES"
    assert os.stat(mount.path / "file").st_size == 1


@as_root
def test_devices_and_set_id_programs_have_no_effect_unless_asked_for(mounted: Factory) -> None:
    mount = mounted()
    os.mknod(mount.path / "null", 0o20666, os.makedev(1, 3))
    assert outcome(os.open, mount.path / "null", os.O_RDONLY) == "EACCES"
    flags = os.statvfs(mount.path).f_flag
    assert flags & os.ST_NODEV and flags & os.ST_NOSUID


# --- times


def test_atime_is_that_of_source_and_a_read_from_memory_leaves_it(mounted: Factory) -> None:
    mount = mounted("--metadata-ttl", "0s")
    file = mount.path / "file"
    (mount.source / "file").write_bytes(b"x" * 10_000)
    read_all(file)
    os.utime(file, ns=(10**18, 2 * 10**18))
    assert read_all(file) == b"x" * 10_000
    assert os.stat(file).st_atime_ns == os.stat(mount.source / "file").st_atime_ns == 10**18


# --- what is not there


def fallocate(fd: int, mode: int) -> str:
    result = _libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(PAGE))
    return "done" if result == 0 else os.strerror(ctypes.get_errno())


def test_what_is_not_supported_is_refused_with_its_errno(mounted: Factory) -> None:
    mount = mounted()
    unsupported = os.strerror(errno.EOPNOTSUPP)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd, opened(os.fspath(mount.path / "copy"), RDWR_CREAT) as copy:
        os.write(fd, b"x" * 10_000)
        modes = (0, FALLOC_KEEP_SIZE, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE)
        assert [fallocate(fd, mode) for mode in modes] == [unsupported] * 4
        for call, number in (
            (lambda: os.open(mount.path, os.O_RDWR | os.O_TMPFILE), errno.EOPNOTSUPP),
            (lambda: fcntl.ioctl(copy, FICLONE, fd), errno.EOPNOTSUPP),
            (lambda: fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)), errno.ENOTTY),
        ):
            with pytest.raises(OSError) as refused:
                call()
            assert refused.value.errno == number
        os.truncate(copy, 1 << 20)
        assert os.lseek(copy, 0, os.SEEK_DATA) == 0 and os.lseek(copy, 0, os.SEEK_HOLE) == 1 << 20
        os.posix_fallocate(fd, 0, 20_000)  # the C library writes zeros instead
        assert os.fstat(fd).st_size == 20_000 and os.pread(fd, 20_000, 0) == b"x" * 10_000 + bytes(10_000)
    done = subprocess.run(["stat", "-c", "%W", mount.path / "file"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n", "time of birth"


@pytest.mark.parametrize("mode", ["off", "open", "keep"])
@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_a_write_through_o_sync_is_in_source_when_it_returns(mounted: Factory, mode: str, flag: int) -> None:
    mount = mounted(*LATER, kernel_cache=mode)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT | flag) as fd:
        os.write(fd, b"synchronous")
        assert (mount.source / "file").read_bytes() == b"synchronous"
    with opened(os.fspath(mount.path / "file"), os.O_WRONLY | flag) as fd:
        os.pwrite(fd, b"SYN", 0)
        assert (mount.source / "file").read_bytes() == b"SYNchronous"


@pytest.mark.parametrize(("mode", "there"), [("off", b""), ("open", b"data"), ("keep", b"data")])
def test_rwf_dsync_is_heeded_where_the_kernel_caches(mounted: Factory, mode: str, there: bytes) -> None:
    mount = mounted(*LATER, kernel_cache=mode)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.pwritev(fd, [b"data"], 0, os.RWF_DSYNC)
        assert (mount.source / "file").read_bytes() == there


def test_msync_puts_a_mapping_into_source(mounted: Factory) -> None:
    mount = mounted(*LATER)
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.ftruncate(fd, PAGE)
        with mmap.mmap(fd, PAGE) as memory:
            memory[:6] = b"stored"
            memory.flush()
            assert (mount.source / "file").read_bytes()[:6] == b"stored"
