"""mount, status, sync and umount on real mounts: what each waits for, prints, and leaves."""

import errno
import hashlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from command import Command, ended, is_mounted, one_line, output_of_terminal, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
MIB = 1 << 20
# Nothing is written back before somebody asks.
LATER = ("--dirty-expire", "1h", "--write-through", "off")
KEEP_DIRTY = ("--dirty-limit", "128M", "--dirty-background", "128M", *LATER, "--cache-size", "256M")


def write_dirty(cachefs: Command, name: str, mebibytes: int) -> str:
    """Writes a file of random bytes that is not on SOURCE when it is closed; its checksum.

    On a store that is far away close(2) writes it: only an error there keeps it dirty.
    """
    cachefs.plan({"op": "pwritev", "errno": "EIO"})
    checksum = hashlib.sha256()
    descriptor = os.open(cachefs.path / name, os.O_WRONLY | os.O_CREAT)
    for _ in range(mebibytes):
        block = os.urandom(1024) * 1024
        checksum.update(block)
        assert os.write(descriptor, block) == MIB
    with pytest.raises(OSError, match="Input/output error"):
        os.close(descriptor)
    cachefs.plan()
    assert cachefs.status()["statistics"]["writeback"]["dirty_bytes"] == mebibytes * MIB
    return checksum.hexdigest()


def checksum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_mount_status_sync_umount(cachefs: Command) -> None:
    (cachefs.source / "old").write_text("there")
    pid = cachefs.mount()
    assert (cachefs.path / "old").read_text() == "there"
    assert os.getsid(pid) == pid
    assert not ended(pid)
    (cachefs.path / "new").write_text("written")

    status = cachefs.status()
    assert (status["source"], status["mountpoint"]) == (str(cachefs.source), str(cachefs.path))
    assert status["statistics"]["cache"]["write_bytes"] == len("written")
    scraped = urllib.request.urlopen(status["metrics"], timeout=10).read()
    assert b"cachefs_page_misses_total" in scraped

    everything = cachefs.run("status", "--json")
    assert [answer["pid"] for answer in json.loads(everything.stdout)] == [pid]
    for arguments in ((), (cachefs.path,), (cachefs.source,)):
        shown = cachefs.run("status", *arguments)
        assert shown.returncode == 0
        assert shown.stdout.startswith(f"{cachefs.path} <- {cachefs.source}  (serving, pid {pid}, up ")
        assert "hit rate" in shown.stdout

    assert cachefs.run("sync", cachefs.path).returncode == 0
    assert (cachefs.source / "new").read_text() == "written"

    (cachefs.path / "last").write_text("at the end")
    cachefs.umount_well()
    assert ended(pid)
    assert list(cachefs.path.iterdir()) == []
    assert (cachefs.source / "last").read_text() == "at the end"
    assert cachefs.run("status").stdout == "no cachefs is mounted\n"


def test_names_with_spaces_newlines_and_raw_bytes(cachefs: Command) -> None:
    cachefs.source = cachefs.directory("so urce\n\\")
    cachefs.path = cachefs.directory("m nt,\udcff#")
    (cachefs.source / "file").write_text("text")
    cachefs.mount()
    assert (cachefs.path / "file").read_text() == "text"
    assert "serving" in cachefs.run("status", cachefs.path).stdout
    cachefs.umount_well()


def test_paths_may_be_relative_and_go_through_symbolic_links(cachefs: Command) -> None:
    (cachefs.base / "link").symlink_to("mnt")
    assert cachefs.run("mount", "source", "./link/", *cachefs.options).returncode == 0
    assert is_mounted(cachefs.path)
    assert cachefs.run("status", "link").returncode == 0
    assert cachefs.run("umount", "link", cwd=cachefs.base).returncode == 0
    cachefs.nothing_left()


def test_umount_writes_everything_and_shows_it_on_a_terminal(cachefs: Command) -> None:
    """200 MiB that nothing has written yet, on a store of 150 MB/s."""
    big = ("--dirty-limit", "256M", "--dirty-background", "256M", *LATER, "--cache-size", "512M")
    pid = cachefs.mount(*big, "--fault-plan", cachefs.plan(), "--simulate-bandwidth", "150M")
    expected = write_dirty(cachefs, "file", 200)
    master, terminal = pty.openpty()
    process = cachefs.start(*cachefs.words("umount", cachefs.path), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = output_of_terminal(master, process)
    os.close(master)
    assert process.wait(60) == 0, shown
    assert ended(pid)
    left = [float(number) for number in re.findall(r"\r\x1b\[K([\d.]+) MiB left to write", shown)]
    assert len(left) > 3
    assert left == sorted(left, reverse=True)
    assert left[0] > 100
    assert shown.endswith("\r\x1b[K")
    assert checksum_of(cachefs.source / "file") == expected
    cachefs.nothing_left()


def test_umount_gives_up_waiting_after_its_timeout_and_the_work_goes_on(cachefs: Command) -> None:
    pid = cachefs.mount(*KEEP_DIRTY, "--fault-plan", cachefs.plan())
    expected = write_dirty(cachefs, "file", 1)
    cachefs.plan({"op": "pwritev", "hang": True})
    begin = time.monotonic()
    done = cachefs.umount("--timeout", "300ms")
    assert time.monotonic() - begin < 5
    listed, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert listed == "cachefs: not written yet: file: bytes 0 to 1048576: EIO"
    assert "not done after 0.3 seconds (1 MiB left to write): it goes on in the background, what is left is kept in" in line
    assert not ended(pid)
    cachefs.plan()
    wait_until(lambda: ended(pid), "the daemon's end")
    assert checksum_of(cachefs.source / "file") == expected
    cachefs.nothing_left()


def test_mount_right_after_umount_8_waits_for_the_predecessor_and_sees_everything(cachefs: Command) -> None:
    first = cachefs.mount(*KEEP_DIRTY, "--fault-plan", cachefs.plan())
    expected = write_dirty(cachefs, "file", 8)
    cachefs.plan({"op": "pwritev", "delay_seconds": 2})
    subprocess.run(["umount", str(cachefs.path)], check=True, timeout=60)
    done = cachefs.run("mount", cachefs.source, cachefs.path, *cachefs.options)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"cachefs: waiting for pid {first} to finish writing out\n"
    assert ended(first)
    assert checksum_of(cachefs.path / "file") == expected
    cachefs.umount_well()


def test_umount_of_a_daemon_that_is_ending_waits_for_it(cachefs: Command) -> None:
    first = cachefs.mount(*KEEP_DIRTY, "--fault-plan", cachefs.plan())
    expected = write_dirty(cachefs, "file", 1)
    cachefs.plan({"op": "pwritev", "delay_seconds": 1})
    subprocess.run(["umount", str(cachefs.path)], check=True, timeout=60)
    cachefs.umount_well()
    assert ended(first)
    assert checksum_of(cachefs.source / "file") == expected


def test_a_second_daemon_on_the_same_state_is_refused(cachefs: Command) -> None:
    pid = cachefs.mount()
    other = cachefs.directory("other")
    line = one_line(cachefs.run("mount", cachefs.source, other, *cachefs.options), 1)
    assert f"is already mounted on {cachefs.path} by process {pid}" in line
    assert not is_mounted(other)
    assert not ended(pid)
    cachefs.umount_well()


def test_a_killed_daemon_is_mounted_over(cachefs: Command) -> None:
    (cachefs.source / "file").write_text("text")
    pid = cachefs.mount()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid), "the daemon's end")
    with pytest.raises(OSError) as caught:
        os.listdir(cachefs.path)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert "has no daemon any more" in one_line(cachefs.run("status", cachefs.path), 1)
    assert cachefs.run("status").stdout == "no cachefs is mounted\n"
    cachefs.mount()
    assert (cachefs.path / "file").read_text() == "text"
    cachefs.umount_well()


def test_a_killed_daemon_s_mountpoint_is_unmounted(cachefs: Command) -> None:
    pid = cachefs.mount()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid), "the daemon's end")
    done = cachefs.umount()
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"cachefs: {cachefs.path} had no daemon any more: unmounted\n"
    cachefs.nothing_left()


def test_umount_of_a_mountpoint_in_use_is_refused_and_the_mount_stays(cachefs: Command) -> None:
    pid = cachefs.mount()
    with (cachefs.path / "file").open("w") as file:
        line = one_line(cachefs.umount(), 1)
        assert f"{cachefs.path}: Device or resource busy; close what is open there" in line
        file.write("still writable")
    assert (cachefs.path / "file").read_text() == "still writable"
    assert not ended(pid)
    cachefs.umount_well()
    assert (cachefs.source / "file").read_text() == "still writable"


def test_sync_tells_what_it_could_not_write_and_writes_it_later(cachefs: Command) -> None:
    plan = cachefs.plan()
    cachefs.mount(*KEEP_DIRTY, "--fault-plan", plan)
    with (cachefs.path / "file").open("wb") as file:
        file.write(b"x" * 8192)
        file.flush()
        cachefs.plan({"op": "pwritev", "errno": "EIO"})
        done = cachefs.run("sync", cachefs.path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "cachefs: not written: file: bytes 0 to 8192: EIO\n"
        cachefs.plan({"op": "syncfs", "errno": "EIO"})
        assert "can't be made durable: Input/output error" in one_line(cachefs.run("sync", cachefs.path), 1)
        cachefs.plan()
        assert cachefs.run("sync", cachefs.path).returncode == 0
        assert (cachefs.source / "file").read_bytes() == b"x" * 8192
    cachefs.umount_well()


def test_umount_lists_what_could_not_be_written(cachefs: Command) -> None:
    plan = cachefs.plan()
    pid = cachefs.mount(*KEEP_DIRTY, "--fault-plan", plan)
    (cachefs.source / "a").mkdir()  # of one made on the mount, what others put there is believed to be missing for a while
    (cachefs.source / "a" / "before").write_bytes(b"o" * 5 * 4096)
    descriptor = os.open(cachefs.path / "a" / "before", os.O_RDWR)
    os.pwrite(descriptor, b"n" * 4096, 4096)
    os.pwrite(descriptor, b"n" * 10, 4 * 4096)
    cachefs.plan({"op": "pwritev", "errno": "ENOSPC"})
    with pytest.raises(OSError, match="No space left on device"):
        os.close(descriptor)  # reports it to the writer
    begin = time.monotonic()
    done = cachefs.umount()
    assert time.monotonic() - begin < 20
    assert (done.returncode, done.stdout) == (1, "")
    *listed, fate = done.stderr.splitlines()
    pieces = ((4096, 8192), (16384, 20480))
    assert listed == [f"cachefs: not written: a/before: bytes {first} to {last}: ENOSPC" for first, last in pieces]
    assert fate.startswith("cachefs: 8 KiB of one file could not be written and is kept in the journal ")
    assert ended(pid)
    assert 'not written: {"path": "a/before", "offset": 4096, "length": 4096, "error": "ENOSPC"}' in cachefs.log_text()
    assert (cachefs.source / "a" / "before").read_bytes() == b"o" * 5 * 4096
    cachefs.nothing_left()


def test_the_second_mount_takes_the_next_free_metrics_port(cachefs: Command) -> None:
    """Both are asked for nothing, so that the default port is theirs if nobody has it."""
    state = ("--state-dir", cachefs.base / "state")
    paths, ports = [], []
    for name in ("a", "b"):
        source, path = cachefs.directory(f"{name}-source"), cachefs.directory(name)
        assert cachefs.run("mount", source, path, *state).returncode == 0
        paths.append(path)
        ports.append(int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/metrics", cachefs.status(path)["metrics"])[1]))  # type: ignore[index]
    assert 9477 <= ports[0] < ports[1]
    for path in paths:
        assert cachefs.run("umount", path).returncode == 0


def test_metrics_off(cachefs: Command) -> None:
    pid = cachefs.mount("--metrics", "off")
    assert cachefs.status()["metrics"] is None
    assert re.search(r"^  metrics +off$", cachefs.run("status").stdout, re.MULTILINE)
    sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if "socket" in os.readlink(link)}
    listening = Path("/proc/net/tcp").read_text()
    inodes = [line.split()[9] for line in listening.splitlines()[1:] if line.split()[3] == "0A"]
    assert not sockets & {f"socket:[{inode}]" for inode in inodes}
    cachefs.umount_well()


def test_a_taken_metrics_port_leaves_no_mount(cachefs: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = (cachefs.source, cachefs.path, "--state-dir", cachefs.base / "state", "--metrics", address)
        line = one_line(cachefs.run("mount", *words), 1)
    assert address in line
    cachefs.nothing_left()
