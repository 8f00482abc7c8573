"""The daemon's life: readiness, signals, the end with files open, faults at the end, a backing that goes away."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
from command import Command, is_mounted, one_line, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts something that is not FUSE")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_everything_and_unmounts(cachefs: Command, signal_number: int) -> None:
    process = cachefs.foreground("--dirty-expire", "1h", "--write-through", "off")
    (cachefs.path / "file").write_bytes(b"x" * 100_000)
    process.send_signal(signal_number)
    assert process.wait(60) == 0, cachefs.log_text()
    assert (cachefs.source / "file").read_bytes() == b"x" * 100_000
    cachefs.nothing_left()


def test_umount_8_ends_the_daemon(cachefs: Command) -> None:
    process = cachefs.foreground("--dirty-expire", "1h", "--write-through", "off")
    (cachefs.path / "file").write_bytes(b"x" * 100_000)
    subprocess.run(["umount", str(cachefs.path)], check=True, timeout=60)
    assert process.wait(60) == 0, cachefs.log_text()
    assert (cachefs.source / "file").read_bytes() == b"x" * 100_000
    cachefs.nothing_left()


def append_until_error(descriptor: int, acknowledged: list[int]) -> None:
    """Appends its number to a file, 8 bytes a time, and keeps what was acknowledged."""
    number = 0
    with contextlib.suppress(OSError):
        while True:
            assert os.write(descriptor, number.to_bytes(8)) == 8
            acknowledged[0] = number = number + 1
            time.sleep(0.001)


@needs_root
def test_sigterm_with_a_file_open_loses_nothing_and_spares_what_is_mounted_in_its_place(cachefs: Command) -> None:
    """A program that writes on and on has some seconds to close; every write that succeeded is on SOURCE."""
    process = cachefs.foreground("--dirty-expire", "1h", "--write-through", "off")
    descriptor = os.open(cachefs.path / "file", os.O_WRONLY | os.O_CREAT)
    acknowledged = [0]
    writer = threading.Thread(target=append_until_error, args=(descriptor, acknowledged))
    writer.start()
    try:
        wait_until(lambda: acknowledged[0] > 100, "writes")
        process.terminate()
        wait_until(lambda: not is_mounted(cachefs.path), "the lazy unmount")
        subprocess.run(["mount", "-t", "tmpfs", "none", str(cachefs.path)], check=True, timeout=60)
        assert process.wait(60) == 0, cachefs.log_text()
    finally:
        process.kill()
        writer.join(60)
        with contextlib.suppress(OSError):  # the daemon is gone
            os.close(descriptor)
    assert f"{cachefs.path} is in use (Device or resource busy): taken away under its users" in cachefs.log_text()
    numbers = (cachefs.source / "file").read_bytes()
    assert numbers == b"".join(number.to_bytes(8) for number in range(len(numbers) // 8))
    assert len(numbers) // 8 >= acknowledged[0] > 1000
    assert is_mounted(cachefs.path)
    subprocess.run(["umount", str(cachefs.path)], check=True, timeout=60)
    cachefs.nothing_left()


def test_sigterm_ends_with_status_1_when_something_could_not_be_written(cachefs: Command) -> None:
    process = cachefs.foreground("--dirty-expire", "1h", "--write-through", "off", "--fault-plan", cachefs.plan())
    cachefs.plan({"op": "pwritev", "errno": "EIO"})
    with pytest.raises(OSError, match="Input/output error"), (cachefs.path / "file").open("wb") as file:
        file.write(b"x" * 4097)
    begin = time.monotonic()
    process.terminate()
    assert process.wait(60) == 1
    assert time.monotonic() - begin < 20
    assert 'not written: {"path": "file", "offset": 0, "length": 4097, "error": "EIO"}' in cachefs.log_text()
    cachefs.nothing_left()


@needs_root
def test_an_aborted_connection_writes_everything_and_leaves_no_dead_mount(cachefs: Command) -> None:
    process = cachefs.foreground("--dirty-expire", "1h", "--write-through", "off")
    (cachefs.path / "file").write_bytes(b"x" * 100_000)
    number = os.minor(cachefs.path.stat().st_dev)
    connections = cachefs.directory("connections")  # /sys/fs/fuse/connections is empty where nobody has mounted it
    subprocess.run(["mount", "-t", "fusectl", "none", str(connections)], check=True, timeout=60)
    (connections / str(number) / "abort").write_text("1")
    process.wait(60)
    assert (cachefs.source / "file").read_bytes() == b"x" * 100_000
    cachefs.nothing_left()


# --- systemd


class Notified:
    """What a service manager would hear."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(60)

    def next(self) -> str:
        return self._socket.recv(4096).decode()

    def nothing(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


def test_systemd_is_told_when_the_mountpoint_answers_and_when_it_ends(cachefs: Command) -> None:
    (cachefs.source / "file").write_text("text")
    address = str(cachefs.base / "notify")
    plan = cachefs.plan({"op": "open_root", "delay_seconds": 0.5}, {"op": "fstat", "delay_seconds": 0.2, "count": 1})
    with contextlib.closing(Notified(address)) as systemd:
        words = cachefs.words("mount", cachefs.source, cachefs.path, "-f", *cachefs.options, "--fault-plan", plan)
        process = cachefs.start(*words, env={"NOTIFY_SOCKET": address}, stderr=subprocess.DEVNULL)
        assert systemd.next() == f"READY=1\nSTATUS=serving {cachefs.source} on {cachefs.path}"
        assert (cachefs.path / "file").read_text() == "text"
        assert systemd.nothing()
        process.terminate()
        assert process.wait(60) == 0
        assert systemd.next() == "STOPPING=1\nSTATUS=writing out"
        assert systemd.nothing()


def test_systemd_is_not_told_of_a_mount_that_failed(cachefs: Command) -> None:
    address = "@" + str(cachefs.base / "notify")
    with contextlib.closing(Notified("\0" + address[1:])) as systemd, socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = ("--metrics", f"127.0.0.1:{taken.getsockname()[1]}")
        words = ("mount", cachefs.source, cachefs.path, "-f", "--state-dir", cachefs.base / "state", *metrics)
        done = cachefs.run(*words, env={**cachefs.environment, "NOTIFY_SOCKET": address})
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("cachefs: ")
        assert systemd.nothing()
    cachefs.nothing_left()


# --- starting


def test_a_signal_while_it_starts_leaves_no_mount(cachefs: Command) -> None:
    """SIGTERM before the mountpoint answers is obeyed as soon as it does."""
    address = str(cachefs.base / "notify")
    plan = cachefs.plan({"op": "fstat", "delay_seconds": 1, "count": 1})
    with contextlib.closing(Notified(address)):
        words = cachefs.words("mount", cachefs.source, cachefs.path, "-f", *cachefs.options, "--fault-plan", plan)
        process = cachefs.start(*words, env={"NOTIFY_SOCKET": address}, stderr=subprocess.DEVNULL)
        wait_until(lambda: cachefs.phase() == "starting", "the start")
        process.terminate()
        process.wait(60)
    assert not is_mounted(cachefs.path)
    assert cachefs.run("status").stdout == "no cachefs is mounted\n"


def test_two_mounts_at_once_end_with_one(cachefs: Command) -> None:
    """Neither of two that race for one SOURCE spoils the other; the loser says who has it."""
    other = cachefs.directory("other")
    starts = [cachefs.start(*cachefs.words("mount", cachefs.source, path, *cachefs.options)) for path in (cachefs.path, other)]
    outcomes = [(process.wait(60), process.communicate()[1]) for process in starts]
    assert sorted(status for status, _ in outcomes) == [0, 1], outcomes
    (line,) = [said for status, said in outcomes if status]
    assert "is already mounted on" in line
    assert is_mounted(cachefs.path) != is_mounted(other)


# --- the backing


def test_a_backing_directory_removed_under_a_live_mount(cachefs: Command) -> None:
    """What is open and cached goes on; the rest fails with an errno and at once; the daemon lives and unmounts."""
    (cachefs.source / "cached").write_bytes(b"c" * 50_000)
    (cachefs.source / "directory").mkdir()
    cachefs.mount("--metadata-ttl", "0s", "--dirty-expire", "1h", "--write-through", "off")
    with (cachefs.path / "cached").open("rb") as cached, (cachefs.path / "open").open("wb", buffering=0) as written:
        assert cached.read() == b"c" * 50_000
        shutil.rmtree(cachefs.source)
        cached.seek(0)
        assert cached.read() == b"c" * 50_000
        assert written.write(b"x" * 5000) == 5000
        os.fsync(written.fileno())
        for call in (
            lambda: os.stat(cachefs.path / "cached"),
            lambda: os.listdir(cachefs.path / "directory"),
            lambda: os.mkdir(cachefs.path / "new"),
            lambda: (cachefs.path / "new").write_text("text"),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
        assert os.listdir(cachefs.path) == []  # as of any directory that was removed while it is in use
    assert cachefs.status()["source"] == str(cachefs.source)
    cachefs.umount_well()
    line = one_line(cachefs.run("mount", cachefs.source, cachefs.path, *cachefs.options), 1)
    assert "does not exist" in line


def test_a_backing_directory_that_is_renamed_stays_mounted(cachefs: Command) -> None:
    cachefs.mount()
    moved = cachefs.source.with_name("moved")
    cachefs.source.rename(moved)
    (cachefs.path / "file").write_text("text")
    cachefs.umount_well()
    assert (moved / "file").read_text() == "text"


# --- kernels without what we ask for

WITHOUT_DIRECT_MMAP = """
from cachefs.transport import negotiate
negotiate.WANTED &= ~negotiate.DIRECT_IO_ALLOW_MMAP
from cachefs.cli import main
main()
"""


def test_a_kernel_without_direct_mmap_gets_kernel_cache_open(cachefs: Command) -> None:
    """What such a kernel answers is what one does that is not asked for the flag."""
    (cachefs.source / "file").write_bytes(b"x" * 8192)
    done = cachefs.run("mount", cachefs.source, cachefs.path, *cachefs.options, program=WITHOUT_DIRECT_MMAP)
    assert (done.returncode, done.stderr) == (0, "")
    assert cachefs.status()["statistics"]["kernel_cache"] == "open"
    warnings = [line for line in cachefs.log_text().splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "using --kernel-cache open" in warnings[0]
    script = "import mmap; f = open('file', 'r+b'); m = mmap.mmap(f.fileno(), 0); m[0] = 65; m.flush()"
    assert cachefs.call("python3", "-c", script, cwd=cachefs.path).stderr == ""
    assert (cachefs.path / "file").read_bytes()[:2] == b"Ax"
    cachefs.umount_well()
    assert (cachefs.source / "file").read_bytes()[:2] == b"Ax"
