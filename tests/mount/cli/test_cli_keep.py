"""`cachefs warm`, `pin`, `unpin`, `drop` and `set`, attributes and rules on real mounts."""

from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Command, one_line, output_of_terminal, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]
P, MIB = 4096, 1 << 20
READER = """
import os, sys
open("/proc/self/comm", "w").write(sys.argv[1])
for name in sys.argv[2:]:
    with open(name, "rb", buffering=0) as file:
        while file.read(1 << 17):
            pass
"""


def make(cachefs: Command, **sizes: int) -> None:
    """Files in SOURCE of so many bytes; __ in a name stands for a slash."""
    for name, nbytes in sizes.items():
        path = cachefs.source / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(nbytes))


def read_as(program: str, *paths: Path) -> None:
    """Reads files from beginning to end in a process of that name."""
    subprocess.run([sys.executable, "-c", READER, program, *map(str, paths)], check=True, timeout=60)


def cached(cachefs: Command) -> dict[str, int]:
    """{name: bytes in the cache}."""
    found = json.loads(cachefs.run("ls", "--summary", "--json").stdout)
    return {os.path.relpath(row["file"], cachefs.path): row["cached_bytes"] for row in found}


def figures(cachefs: Command) -> dict[str, Any]:
    cache: dict[str, Any] = cachefs.status()["statistics"]["cache"]
    return cache


# --- warm and drop


@pytest.mark.parametrize("far", [(), ("--simulate-latency", "1ms")])
def test_warm_brings_files_trees_and_ranges(cachefs: Command, far: tuple[str, ...]) -> None:
    make(cachefs, a=3 * MIB + 5, d__b=2 * MIB, d__e__c=100, other=P)
    (cachefs.source / "d" / "link").symlink_to("/etc/passwd")
    os.mkfifo(cachefs.source / "d" / "fifo")
    cachefs.mount(*far)
    done = cachefs.run("warm", cachefs.path / "d")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert cached(cachefs) == {"d/b": 2 * MIB, "d/e/c": 100}
    assert cachefs.run("warm", cachefs.path / "a", "--range", "1M-2M").returncode == 0
    assert cached(cachefs)["a"] == MIB
    assert cachefs.run("warm", cachefs.path / "a", "--range", "3M-").returncode == 0
    assert cached(cachefs)["a"] == MIB + 5
    done = cachefs.run("warm", cachefs.path)
    assert done.stdout == "5.0 MiB of 5.0 MiB in memory, 4 files\n"
    before = figures(cachefs)
    read_as("reader", cachefs.path / "a", cachefs.path / "d" / "b")
    after = figures(cachefs)
    assert after["page_misses"] == before["page_misses"] == 0 and after["readahead_used_pages"] == 0

    done = cachefs.run("drop", cachefs.path / "d")
    assert done.stdout == "dropped 2.0 MiB of 2 files\n"
    assert cached(cachefs) == {"a": 3 * MIB + 5, "other": P}
    cachefs.umount_well()


def test_warm_stops_where_the_cache_is_full(cachefs: Command) -> None:
    make(cachefs, a=3 * MIB, b=3 * MIB)
    cachefs.mount("--cache-size", "4M")
    done = cachefs.run("warm", cachefs.path / "*")
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr == "cachefs: the cache has no more room: 3 MiB of 6 MiB are in memory\n"
    assert figures(cachefs)["evictions"]["capacity"] == 0


def test_warm_names_what_cannot_be_read(cachefs: Command) -> None:
    make(cachefs, a=P, b=P)
    cachefs.mount("--fault-plan", cachefs.plan())
    cachefs.plan({"op": "preadv", "errno": "EIO"})
    done = cachefs.run("warm", cachefs.path)
    assert done.returncode == 1
    assert set(done.stderr.splitlines()) == {f"cachefs: {cachefs.path}/{name}: Input/output error" for name in "ab"}
    cachefs.plan()
    assert cachefs.run("warm", cachefs.path).returncode == 0
    assert cached(cachefs) == {"a": P, "b": P}


def test_warm_shows_a_bar_on_a_terminal_and_ends_with_its_command(cachefs: Command) -> None:
    make(cachefs, a=64 * MIB)
    cachefs.mount("--simulate-latency", "10ms", "--simulate-bandwidth", "4M", "--cache-size", "128M")
    master, terminal = pty.openpty()
    process = cachefs.start(*cachefs.words("warm", cachefs.path), stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    wait_until(lambda: figures(cachefs)["resident_bytes"] > 2 * MIB, "the first megabytes")
    process.terminate()
    process.wait(30)
    assert "warming" in output_of_terminal(master, process)
    os.close(master)
    seen = [-1, figures(cachefs)["resident_bytes"]]

    def stands_still() -> bool:
        if figures(cachefs)["filling_pages"]:
            return False
        seen.append(figures(cachefs)["resident_bytes"])
        return seen[-1] == seen[-2] == seen[-3]

    wait_until(stands_still, "the end of the work that nobody waits for")
    assert seen[-1] < 60 * MIB


def test_drop_says_what_stayed(cachefs: Command) -> None:
    make(cachefs, clean=10 * P, pinned=20 * P)
    cachefs.mount("--dirty-expire", "1h", "--write-through", "off")
    read_as("reader", cachefs.path / "clean")
    assert cachefs.run("pin", cachefs.path / "pinned").returncode == 0
    (cachefs.path / "dirty").write_bytes(b"x" * 3 * P)
    done = cachefs.run("drop", cachefs.path)
    assert (done.returncode, done.stdout) == (0, "dropped 40 KiB of 3 files; stayed: 80 KiB pinned, 12 KiB unwritten\n")
    assert cached(cachefs) == {"pinned": 20 * P, "dirty": 3 * P}
    assert (cachefs.path / "dirty").read_bytes() == b"x" * 3 * P


def test_drop_reaches_the_kernels_cache_too(cachefs: Command) -> None:
    make(cachefs, a=10 * P)
    cachefs.mount("--kernel-cache", "keep")
    for _ in range(2):
        read_as("reader", cachefs.path / "a")
    assert figures(cachefs)["page_hits"] + figures(cachefs)["page_misses"] == 10
    assert cachefs.run("drop", cachefs.path / "a").returncode == 0

    def is_read_anew() -> bool:  # the kernel is told a moment after the command has its answer
        read_as("reader", cachefs.path / "a")
        return int(figures(cachefs)["page_misses"]) > 10

    wait_until(is_read_anew, "reads that reach us")


# --- pins


def test_pins_stay_over_eviction_changes_and_remounts(cachefs: Command) -> None:
    make(cachefs, d__a=MIB, d__b=5, big=12 * MIB)
    cachefs.mount("--cache-size", "4M")
    pinned = {"d/a": MIB, "d/b": 5}
    assert cachefs.run("pin", cachefs.path / "d").returncode == 0
    listed = json.loads(cachefs.run("pin", "--json").stdout)
    assert [(row["size"], row["cached_bytes"], row["problem"]) for row in listed] == [(MIB, MIB, None), (5, 5, None)]
    read_as("reader", cachefs.path / "big")
    assert pinned.items() <= cached(cachefs).items()
    assert {e["state"] for e in json.loads(cachefs.run("ls", "--json", cachefs.path / "d").stdout)} == {"pinned"}

    (cachefs.path / "new").write_bytes(b"n" * 2 * P)
    os.replace(cachefs.path / "new", cachefs.path / "d" / "b")
    wait_until(lambda: json.loads(cachefs.run("pin", "--json").stdout)[1]["cached_bytes"] == 2 * P, "the new file")
    cachefs.umount_well()

    cachefs.mount("--cache-size", "4M")
    wait_until(lambda: cached(cachefs) == {"d/a": MIB, "d/b": 2 * P}, "the pins of the mount before")
    misses = figures(cachefs)["page_misses"]
    read_as("reader", cachefs.path / "d" / "a", cachefs.path / "d" / "b")
    assert figures(cachefs)["page_misses"] == misses == 0
    os.unlink(cachefs.path / "d" / "a")
    assert cachefs.run("unpin", cachefs.path / "d" / "a").returncode == 0, "although it is not there any more"
    assert cachefs.run("unpin", cachefs.path).returncode == 0
    assert cachefs.run("pin", "--json").stdout == "[]\n"
    cachefs.umount_well()


def test_pins_of_a_killed_daemon_are_there_again(cachefs: Command) -> None:
    make(cachefs, a=MIB)
    pid = cachefs.mount()
    assert cachefs.run("pin", cachefs.path / "a").returncode == 0
    os.kill(pid, 9)
    cachefs.mount()
    wait_until(lambda: cached(cachefs) == {"a": MIB}, "the pin")


def test_what_cannot_be_pinned_is_one_line(cachefs: Command) -> None:
    make(cachefs, a=MIB, b=2 * MIB)
    cachefs.mount("--cache-size", "4M", "--pin-limit", "1M", "--fault-plan", cachefs.plan())
    line = one_line(cachefs.run("pin", cachefs.path), 1)
    assert line == "cachefs: pins would take 3 MiB, more than --pin-limit 1 MiB: nothing was pinned\n"
    assert cachefs.run("pin").stdout == ""
    assert "is not pinned: cachefs pin lists what is" in one_line(cachefs.run("unpin", cachefs.path / "a"), 1)
    cachefs.plan({"op": "preadv", "errno": "EIO"})
    assert one_line(cachefs.run("pin", cachefs.path / "a"), 1) == f"cachefs: {cachefs.path}/a: Input/output error\n"
    assert "(Input/output error)" in cachefs.run("pin").stdout
    cachefs.plan()
    assert cachefs.run("pin", cachefs.path / "a").returncode == 0


# --- attributes


def test_attributes_are_of_the_mount_and_never_of_source(cachefs: Command) -> None:
    make(cachefs, a=MIB, d__x=P)
    cachefs.mount()
    ours = cachefs.path / "a"
    assert os.getxattr(ours, "user.cachefs.resident") == b"0"
    os.setxattr(ours, "user.cachefs.pin", b"1")
    os.setxattr(ours, "user.cachefs.advice", b"random")
    wait_until(lambda: os.getxattr(ours, "user.cachefs.resident") == b"%d" % MIB, "the pinned file")
    assert (os.getxattr(ours, "user.cachefs.pin"), os.getxattr(ours, "user.cachefs.advice")) == (b"1", b"random")
    assert os.listxattr(ours) == os.listxattr(cachefs.source / "a") == []
    copied = cachefs.call("cp", "-a", ours, cachefs.path / "copy")
    assert (copied.returncode, copied.stderr) == (0, "")
    for name, value, flags, number in (
        ("user.cachefs.resident", b"1", 0, errno.EPERM), ("user.cachefs.pin", b"maybe", 0, errno.EINVAL),
        ("user.cachefs.advice", b"maybe", 0, errno.EINVAL), ("user.cachefs.none", b"", 0, errno.EPERM),
        ("user.cachefs.pin", b"1", os.XATTR_CREATE, errno.EEXIST),
    ):  # fmt: skip
        with pytest.raises(OSError) as caught:
            os.setxattr(ours, name, value, flags)
        assert caught.value.errno == number, name
    with pytest.raises(OSError) as caught:
        os.setxattr(cachefs.path / "d", "user.cachefs.pin", b"1")
    assert caught.value.errno == errno.EPERM
    os.removexattr(ours, "user.cachefs.pin")
    os.removexattr(ours, "user.cachefs.advice")
    with pytest.raises(OSError) as caught:
        os.getxattr(ours, "user.cachefs.pin")
    assert caught.value.errno == errno.ENODATA
    os.setxattr(ours, "user.cachefs.advice", b"dontneed")
    assert os.getxattr(ours, "user.cachefs.resident") == b"0"
    os.setxattr(ours, "user.cachefs.advice", b"willneed")
    wait_until(lambda: os.getxattr(ours, "user.cachefs.resident") == b"%d" % MIB, "the file that is needed")


# --- rules


def test_a_tar_of_ten_times_the_cache_under_a_noreuse_rule_evicts_none_of_a_hot_set(cachefs: Command) -> None:
    make(cachefs, hot=4 * MIB, **{f"cold__{i}": 10 * MIB for i in range(8)})
    options = ("--cache-size", "8M", "--policy", "lru", "--readahead-max", "1M")
    cachefs.mount(*options, "--rule", "comm=tar advice=noreuse", "--rule", "comm=scan* advice=noreuse")
    tar = ("tar", "-C", cachefs.path, "-cf", cachefs.base / "archive.tar", "cold")

    def after_tar() -> tuple[int, int]:
        """Bytes of the hot set that have left, and refaults as it is read again."""
        for _ in range(3):
            read_as("hot", cachefs.path / "hot")
        assert cached(cachefs)["hot"] == 4 * MIB
        before = figures(cachefs)
        assert cachefs.call(*tar).returncode == 0
        gone_bytes = 4 * MIB - cached(cachefs).get("hot", 0)
        read_as("hot", cachefs.path / "hot")
        after = figures(cachefs)
        return gone_bytes, int(after["refaults"] - before["refaults"])

    assert after_tar() == (0, 0)
    assert figures(cachefs)["evictions"]["capacity"] == 0 and cached(cachefs)["hot"] == 4 * MIB
    assert figures(cachefs)["evictions"]["noreuse"] >= 80 * MIB // P
    cachefs.umount_well()
    cachefs.mount(*options)
    gone_bytes, refaults = after_tar()
    assert gone_bytes == 4 * MIB
    assert refaults, "of the first pages; readahead brings the others before they are missed"


# --- set


def test_set_changes_a_live_mount(cachefs: Command) -> None:
    make(cachefs, a=6 * MIB)
    cachefs.mount("--cache-size", "8M")
    read_as("reader", cachefs.path / "a")
    done = cachefs.run("set", "cache-size=4M", "policy=sieve")
    assert (done.returncode, done.stdout) == (0, "cache-size 4 MiB, policy sieve, pin-limit 2 MiB\n"), done
    status = cachefs.status()["statistics"]
    assert (status["policy"], status["cache"]["capacity_bytes"]) == ("sieve", 4 * MIB)
    assert status["cache"]["resident_bytes"] <= 4 * MIB and status["writeback"]["dirty_limit_bytes"] == MIB
    assert cachefs.run("set", cachefs.path, "cache_size=16M", "pin-limit=25%").returncode == 0
    read_as("reader", cachefs.path / "a")
    assert cached(cachefs)["a"] == 6 * MIB
    assert cachefs.record()["config"]["cache_size_bytes"] == 16 * MIB
    cachefs.umount_well()


def test_a_smaller_cache_waits_for_unwritten_data(cachefs: Command) -> None:
    limits = ("--cache-size", "8M", "--dirty-limit", "4M", "--dirty-background", "4M")
    cachefs.mount(*limits, "--dirty-expire", "1h", "--write-through", "off")
    data = os.urandom(3 * MIB)
    (cachefs.path / "a").write_bytes(data)
    assert cachefs.run("set", "cache-size=1M").returncode == 0
    assert figures(cachefs)["resident_bytes"] <= MIB
    assert (cachefs.path / "a").read_bytes() == data
    cachefs.umount_well()
    assert (cachefs.source / "a").read_bytes() == data


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["policy=lru", "cache-size"], 2, "'cache-size' is not NAME=VALUE"),
        (["{mnt}"], 2, "nothing to set"),
        (["cache-sise=1G"], 1, "cache-sise cannot be set while mounted, only cache-size, policy, pin-limit; did you mean"),
        (["cache-size=much"], 1, "--cache-size 'much' is not a size"),
        (["cache-size=1K"], 1, "below 16 pages"),
        (["policy=fifo"], 1, "not one of lru, sieve, s3fifo"),
        (["pin-limit=99%"], 1, "leaves too little of the cache"),
        (["{mnt}/sub", "policy=lru"], 1, "is not a mountpoint: its mount is"),
        (["/", "policy=lru"], 1, "is not on a cachefs mount"),
    ],
)
def test_what_cannot_be_set_is_one_line(cachefs: Command, words: list[str], status: int, says: str) -> None:
    (cachefs.source / "sub").mkdir()
    cachefs.mount("--cache-size", "8M")
    assert says in one_line(cachefs.run("set", *(word.format(mnt=cachefs.path) for word in words)), status)
    assert figures(cachefs)["capacity_bytes"] == 8 * MIB


def test_commands_without_a_mount_are_one_line(cachefs: Command) -> None:
    assert "no cachefs is mounted" in one_line(cachefs.run("set", "policy=lru"), 1)
    for command in ("warm", "pin", "unpin", "drop"):
        assert "is not on a cachefs mount" in one_line(cachefs.run(command, cachefs.base), 1)
        assert "Missing argument" in one_line(cachefs.run(command), 2) if command != "pin" else True
    for span in ("", "x", "5", "2M-1M", "-", "1X-"):
        assert "is not START-END" in one_line(cachefs.run("warm", cachefs.base, "--range", span), 2)
