"""What a killed daemon leaves, and what the next mount makes of it: whole journals, damaged ones, foreign ones."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

from cachefs.journal.records import unpack_file
from mounts import PLAIN_ENVIRONMENT, ROOT, Factory, Mount, wait_until
from test_semantics import LATER, put_plan
from twin import opened

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")

P = 4096
RDWR_CREAT = os.O_RDWR | os.O_CREAT


def kill(mount: Mount) -> None:
    mount.process.send_signal(signal.SIGKILL)
    mount.process.wait(60)


def write_in_vain(path: Path, data: bytes) -> None:
    """Writes, each write being acknowledged; what SOURCE makes of it is told at the close."""
    fd = os.open(path, RDWR_CREAT)
    assert os.write(fd, data) == len(data)
    with contextlib.suppress(OSError):
        os.close(fd)


def journal_of(mount: Mount) -> Path:
    (state,) = (mount.base / "state").iterdir()
    return state / "journal"


def recovered_by(mount: Mount) -> list[Path]:
    """What was put aside."""
    return sorted((journal_of(mount).parent / "recovered").glob("*"))


def refusal(mount: Mount) -> str:
    """The line with which a mount that is refused ends; nothing is mounted then."""
    done = subprocess.run(
        mount.command, cwd=mount.base, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**PLAIN_ENVIRONMENT, "CACHEFS_RUNTIME_DIR": str(mount.base / "run"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert not os.path.ismount(mount.path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("cachefs: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def test_everything_acknowledged_is_in_source_before_the_mountpoint_answers(mounted: Factory) -> None:
    mount = mounted(*LATER)
    rng = random.Random(1)
    big = rng.randbytes(5 << 20)
    os.mkdir(mount.path / "directory")
    (mount.path / "directory" / "big").write_bytes(big)
    with opened(os.fspath(mount.path / "sparse"), RDWR_CREAT) as fd:
        os.pwrite(fd, b"far", 3 << 30)
        os.pwrite(fd, b"near", 5000)
    with open(mount.path / "appended", "ab", buffering=0) as file:
        for number in range(100):
            file.write(b"line %d\n" % number)
    kill(mount)
    mount.start()
    assert (mount.source / "directory" / "big").read_bytes() == big
    assert (mount.source / "appended").read_bytes() == b"".join(b"line %d\n" % number for number in range(100))
    with open(mount.source / "sparse", "rb") as sparse:
        assert os.pread(sparse.fileno(), 10, 3 << 30) == b"far"
        assert os.pread(sparse.fileno(), 6, 4999) == b"\0near\0"
    assert (mount.source / "sparse").stat().st_blocks * 512 < 1 << 20
    status = mount.ask("status")["statistics"]
    journal = status["journal"]  # type: ignore[index]
    assert journal["replayed_bytes"] >= len(big) and journal["replayed_files"] == 3 and journal["recovery_seconds"] > 0
    assert journal["set_aside_files"] == journal["lost_bytes"] == journal["entries"] == 0
    assert not status["writeback"]["dirty_bytes"]  # type: ignore[index]


def test_size_and_mtime_are_those_that_programs_saw(mounted: Factory) -> None:
    mount = mounted(*LATER)
    (mount.path / "file").write_bytes(b"x" * 5000)
    os.utime(mount.path / "file", ns=(1, 123_456_789_012_345_678))
    (mount.path / "cut").write_bytes(b"x" * 50000)
    os.truncate(mount.path / "cut", 5001)
    with open(mount.path / "cut", "r+b") as file:
        file.seek(9000)
        file.write(b"end")
    seen = (mount.path / "cut").stat()
    kill(mount)
    mount.start()
    assert (mount.source / "file").stat().st_mtime_ns == 123_456_789_012_345_678
    assert (mount.source / "cut").read_bytes() == b"x" * 5001 + bytes(3999) + b"end"
    assert (mount.source / "cut").stat().st_mtime_ns == seen.st_mtime_ns


@pytest.mark.parametrize("backing", ["local", "network"])  # far away, files are found by name and number alone
def test_files_are_found_under_their_last_names(mounted: Factory, backing: str) -> None:
    mount = mounted(*LATER, "--backing", backing)
    fds = []
    for name in ("plain", "linked", "deep/er/file", "exchanged"):
        (mount.path / name).parent.mkdir(parents=True, exist_ok=True)
        fds.append(os.open(mount.path / name, RDWR_CREAT))  # closing would write it
        os.write(fds[-1], name.encode())
    os.rename(mount.path / "plain", mount.path / "renamed")
    os.link(mount.path / "linked", mount.path / "second name")
    os.unlink(mount.path / "linked")
    os.rename(mount.path / "deep", mount.path / "moved")
    (mount.path / "over").write_bytes(b"gone")
    os.rename(mount.path / "exchanged", mount.path / "over")
    kill(mount)
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    mount.start()
    expected = {"renamed": b"plain", "second name": b"linked", "moved/er/file": b"deep/er/file", "over": b"exchanged"}
    assert {name: (mount.source / name).read_bytes() for name in expected} == expected
    assert not recovered_by(mount)


def test_a_removed_file_and_one_removed_while_open_leave_nothing(mounted: Factory) -> None:
    mount = mounted(*LATER)
    with contextlib.suppress(OSError), opened(os.fspath(mount.path / "open"), RDWR_CREAT) as fd:
        os.write(fd, b"before")
        os.unlink(mount.path / "open")
        os.write(fd, b"after")
        (mount.path / "closed").write_bytes(b"data")
        os.unlink(mount.path / "closed")
        kill(mount)
    mount.start()
    assert os.listdir(mount.source) == []
    assert not recovered_by(mount)


def test_what_has_no_place_any_more_is_put_aside_with_a_note(mounted: Factory) -> None:
    mount = mounted(*LATER)
    mount.announce("the file is gone, or another one has its place")
    mount.announce("replayed")
    (mount.path / "gone").write_bytes(b"a" * 5000)
    with opened(os.fspath(mount.path / "replaced"), RDWR_CREAT) as fd:
        os.pwrite(fd, b"ours", 10000)
    kill(mount)
    os.unlink(mount.source / "gone")
    (mount.source / "new").write_bytes(b"theirs")
    os.rename(mount.source / "new", mount.source / "replaced")
    mount.start()
    assert (mount.source / "replaced").read_bytes() == b"theirs"
    notes = {json.loads((place / "note.json").read_text())["path"]: place for place in recovered_by(mount)}
    assert set(notes) == {"gone", "replaced"}
    assert (notes["gone"] / "data").read_bytes() == b"a" * 5000
    journal = mount.ask("status")["statistics"]["journal"]  # type: ignore[index]
    assert journal["set_aside_files"] == 2 and journal["replayed_files"] == 0
    assert json.loads((notes["replaced"] / "note.json").read_text())["extents"] == [{"offset": 8192, "length": 1812}]
    assert (notes["replaced"] / "data").read_bytes()[10000:] == b"ours"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (*recovered_by(mount), notes["gone"] / "data"))


def test_a_kill_during_the_replay_harms_nothing(mounted: Factory, tmp_path: Path) -> None:
    plan = put_plan(tmp_path / "plan")
    mount = mounted(*LATER, "--fault-plan", str(plan))
    contents = {f"file{number}": random.Random(number).randbytes(30000 + number) for number in range(20)}
    put_plan(plan, {"op": "pwritev", "errno": "EIO"})  # or close would write it: what has faults is taken for far away
    mount.announce("cannot write to the backing")
    for name, data in contents.items():
        write_in_vain(mount.path / name, data)
    kill(mount)
    put_plan(plan, {"op": "pwritev", "delay_seconds": 0.05})
    for _ in range(3):
        process = subprocess.Popen(
            mount.command, cwd=mount.base, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**PLAIN_ENVIRONMENT, "CACHEFS_RUNTIME_DIR": str(mount.base / "run"), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        written = sum(path.stat().st_size > 0 for path in mount.source.iterdir())
        wait_until(lambda: sum(path.stat().st_size > 0 for path in mount.source.iterdir()) > written, "a file is replayed")  # noqa: B023
        process.kill()
        process.wait(60)
    put_plan(plan)
    mount.start()
    assert {path.name: path.read_bytes() for path in mount.source.iterdir()} == contents


def test_what_source_refuses_at_the_mount_stays_and_is_tried_again(mounted: Factory, tmp_path: Path) -> None:
    plan = put_plan(tmp_path / "plan")
    mount = mounted(*LATER, "--fault-plan", str(plan))
    mount.announce("cannot write to the backing|cannot be written now")
    put_plan(plan, {"op": "pwritev", "errno": "ENOSPC"})
    write_in_vain(mount.path / "refused", b"r" * 10000)
    kill(mount)
    mount.start()
    assert (mount.path / "refused").read_bytes() == b"r" * 10000
    assert (mount.source / "refused").read_bytes().strip(b"\0") == b""
    put_plan(plan)
    answer = mount.ask("sync")
    assert not answer.get("unwritten") and not answer.get("undurable")
    assert (mount.source / "refused").read_bytes() == b"r" * 10000


def test_what_cannot_be_written_at_the_end_is_written_by_the_next_mount(mounted: Factory, tmp_path: Path) -> None:
    plan = put_plan(tmp_path / "plan")
    mount = mounted(*LATER, "--fault-plan", str(plan))
    mount.announce("cannot write to the backing|not written")
    put_plan(plan, {"op": "pwritev", "errno": "EIO"})
    write_in_vain(mount.path / "file", b"kept" * 5000)
    mount.exit_status = 1
    mount.unmount()
    mount.exit_status = 0
    put_plan(plan)
    mount.start()
    assert (mount.source / "file").read_bytes() == b"kept" * 5000


# --- journals in a bad state -----------------------------------------------------------------------------------------


def test_of_a_damaged_journal_what_can_be_read_is_recovered_and_the_file_kept(mounted: Factory) -> None:
    mount = mounted(*LATER)
    mount.announce("the journal was damaged")
    for name in ("one", "two"):
        (mount.path / name).write_bytes(name.encode() * 3000)
    kill(mount)
    with open(journal_of(mount) / "index.mdb", "r+b") as index:
        index.write(b"\xa5" * 2 * P)  # both places where it begins to be understood
    mount.start()
    assert (mount.source / "one").read_bytes() == b"one" * 3000
    assert (mount.source / "two").read_bytes() == b"two" * 3000
    assert len(list(journal_of(mount).glob("index.mdb.damaged-*"))) == 1


def test_a_truncated_index_is_said_and_the_mount_goes_on(mounted: Factory) -> None:
    mount = mounted(*LATER)
    mount.announce("the journal was damaged")
    (mount.path / "file").write_bytes(b"x" * 3000)
    kill(mount)
    os.truncate(journal_of(mount) / "index.mdb", 3 * P)
    mount.start()
    assert "the journal was damaged" in mount.log_text()


def test_pages_whose_bytes_are_damaged_are_named_and_the_others_recovered(mounted: Factory) -> None:
    mount = mounted(*LATER)
    mount.announce("the journal is damaged: lost of file: bytes 4096 to 8192")
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        for page in range(3):
            os.pwrite(fd, bytes([page + 1]) * P, page * P)
    kill(mount)
    with open(journal_of(mount) / "data", "r+b") as data:
        at = data.read().find(b"\2" * P)
        data.seek(at + 100)
        data.write(b"damage")
    mount.start()
    assert (mount.source / "file").read_bytes() == b"\1" * P + bytes(P) + b"\3" * P
    assert "lost of file: bytes 4096 to 8192" in mount.log_text()
    assert mount.ask("status")["statistics"]["journal"]["lost_bytes"] == P  # type: ignore[index]


def test_pages_behind_the_end_that_a_truncate_had_no_time_to_remove_do_not_come_back(mounted: Factory) -> None:
    mount = mounted(*LATER)
    (mount.path / "file").write_bytes(b"x" * 4 * P)
    kill(mount)
    with lmdb.open(os.fspath(journal_of(mount) / "index.mdb"), subdir=False, lock=False, max_dbs=3, map_size=100 << 20) as env:
        files = env.open_db(b"files")
        with env.begin(write=True) as transaction:
            ((key, value),) = transaction.cursor(files)
            record = unpack_file(value)
            transaction.put(key, replace(record, seq=record.seq + 1000, size=P, cutting=True).pack(), db=files)
    mount.start()
    assert (mount.path / "file").read_bytes() == b"x" * P
    with opened(os.fspath(mount.path / "file"), os.O_RDWR) as fd:
        os.pwrite(fd, b"y", 6 * P)
    kill(mount)
    mount.start()
    assert (mount.path / "file").read_bytes() == b"x" * P + bytes(5 * P) + b"y"


def test_a_journal_of_a_newer_version_is_refused_and_left_alone(mounted: Factory) -> None:
    mount = mounted(*LATER)
    (mount.path / "file").write_bytes(b"data")
    kill(mount)
    path = journal_of(mount) / "index.mdb"
    with lmdb.open(os.fspath(path), subdir=False, lock=False, max_dbs=3, map_size=100 << 20) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True) as transaction:
            transaction.put(b"version", b"99", db=meta)
    before = path.read_bytes()[: 1 << 20]
    assert "newer cachefs (format 99" in refusal(mount)
    assert path.read_bytes()[: 1 << 20] == before
    assert (mount.source / "file").read_bytes() == b""


def test_the_journal_of_another_source_is_refused_and_left_alone(mounted: Factory) -> None:
    mount = mounted(*LATER)
    (mount.path / "file").write_bytes(b"data")
    kill(mount)
    os.rename(mount.source, mount.base / "elsewhere")
    mount.source.mkdir()  # as if what is mounted there were not
    assert "another SOURCE" in refusal(mount)
    assert os.listdir(mount.source) == []
    mount.source.rmdir()
    os.rename(mount.base / "elsewhere", mount.source)
    mount.start()
    assert (mount.source / "file").read_bytes() == b"data"


def test_a_journal_counts_whether_its_source_is_taken_for_far_away_or_not(mounted: Factory) -> None:
    """Regression: the same SOURCE with another --backing was refused as another one."""
    mount = mounted(*LATER, "--backing", "network")
    command = list(mount.command)
    for content, backing in ((b"far", "local"), (b"near", "network")):
        fd = os.open(mount.path / "file", RDWR_CREAT)  # closing would write it
        os.write(fd, content)
        kill(mount)
        with contextlib.suppress(OSError):
            os.close(fd)
        mount.command = [backing if word == "network" else word for word in command]
        mount.start()
        assert (mount.source / "file").read_bytes() == content


def test_after_the_machine_went_down_a_file_that_changed_since_is_not_written_over(
    mounted: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal on the disk may be an older one then: what it says of such a file is put aside."""
    monkeypatch.setitem(PLAIN_ENVIRONMENT, "CACHEFS_BOOT_ID", "before")
    mount = mounted(*LATER)
    mount.announce("was changed after this was written down")
    (mount.path / "same").write_bytes(b"same")
    (mount.path / "changed").write_bytes(b"an older state")
    kill(mount)
    (mount.source / "changed").write_bytes(b"fsynced since, as the journal does not know")
    monkeypatch.setitem(PLAIN_ENVIRONMENT, "CACHEFS_BOOT_ID", "after")
    mount.start()
    assert (mount.source / "same").read_bytes() == b"same"
    assert (mount.source / "changed").read_bytes() == b"fsynced since, as the journal does not know"
    (place,) = recovered_by(mount)
    assert (place / "data").read_bytes() == b"an older state"


@pytest.mark.parametrize("left", ["empty", "gone", "of another boot"])
def test_regression_what_was_synced_is_found_where_the_other_index_says_nothing(
    mounted: Factory, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """A power cut may leave of the index that nobody syncs a whole one with nothing in it, which was believed."""
    monkeypatch.setitem(PLAIN_ENVIRONMENT, "CACHEFS_BOOT_ID", "before")
    mount = mounted(*LATER, "--durability", "journal")
    empty = (journal_of(mount) / "index.mdb").read_bytes()
    with opened(os.fspath(mount.path / "file"), RDWR_CREAT) as fd:
        os.fsync(fd)
        os.write(fd, b"synced" * P)
        os.fsync(fd)
    kill(mount)
    assert (mount.source / "file").read_bytes() == b"", "only the journal has it"
    index = journal_of(mount) / "index.mdb"
    if left == "gone":
        index.unlink()
    elif left == "empty":
        without_files(index, empty)
    monkeypatch.setitem(PLAIN_ENVIRONMENT, "CACHEFS_BOOT_ID", "after")
    mount.start()
    assert (mount.path / "file").read_bytes() == b"synced" * P


def without_files(index: Path, empty: bytes) -> None:
    """Makes a whole index of it that knows nothing, of no boot either."""
    index.write_bytes(empty)
    opening = lmdb.open(os.fspath(index), subdir=False, lock=False, max_dbs=3)
    with contextlib.closing(opening) as env, env.begin(write=True) as transaction:
        for name in (b"meta", b"files"):
            transaction.drop(env.open_db(name, txn=transaction), delete=False)


# --- the disk of the state -------------------------------------------------------------------------------------------


@as_root
def test_with_a_full_state_disk_writes_go_through_and_nothing_is_lost(mounted: Factory, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "tmpfs", disk], check=True, timeout=60)
    try:
        mount = mounted(*LATER, "--state-dir", str(disk))
        mount.announce("the journal cannot take more")
        with open(disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(1 << 16)):
                pass
        data = random.Random(2).randbytes(12 << 20)
        (mount.path / "file").write_bytes(data)
        through = mount.ask("status")["statistics"]["journal"]["written_through"]  # type: ignore[index]
        assert through > 0
        kill(mount)
        os.unlink(disk / "ballast")
        mount.start()
        assert (mount.source / "file").read_bytes() == data
        mount.unmount()
    finally:
        subprocess.run(["umount", "-l", disk], check=True, timeout=60)


def test_a_small_journal_holds_writers_back_and_is_never_exceeded(mounted: Factory) -> None:
    mount = mounted(*LATER, "--cache-size", "64M", "--dirty-limit", "4M", "--journal-size", "8M")
    data = random.Random(3).randbytes(1 << 20)
    used = []
    with open(mount.path / "file", "wb", buffering=0) as file:
        for _ in range(64):
            file.write(data)
            journal = mount.ask("status")["statistics"]["journal"]  # type: ignore[index]
            used.append(journal["used_bytes"])
            assert not journal["written_through"]
    assert 0 < max(used) <= 8 << 20
    assert (journal_of(mount) / "data").stat().st_size <= 8 << 20


def test_a_clean_unmount_leaves_an_empty_journal_directory(mounted: Factory) -> None:
    mount = mounted(*LATER)
    (mount.path / "file").write_bytes(b"data")
    mount.unmount()
    assert os.listdir(journal_of(mount)) == []
