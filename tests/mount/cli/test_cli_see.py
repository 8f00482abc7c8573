"""`cachefs ls` and `stat` on real mounts: what is shown, of which files, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command import Command, ended, one_line, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]
P = 4096
KEEP_DIRTY = ("--dirty-expire", "1h", "--write-through", "off")
NO_READAHEAD = ("--readahead-max", "0")


def rows(cachefs: Command, *arguments: object) -> list[dict[str, Any]]:
    done = cachefs.run("ls", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def extents(cachefs: Command, *arguments: object) -> list[tuple[str, int, int, str]]:
    top = str(cachefs.path) + "/"
    return [(r["file"].removeprefix(top), r["offset"], r["length"], r["state"]) for r in rows(cachefs, *arguments)]


def read_pages(path: Path, *spans: tuple[int, int]) -> None:
    """Reads pages [first, last] of a file."""
    fd = os.open(path, os.O_RDONLY)
    for first, last in spans:
        assert os.pread(fd, (last - first + 1) * P, first * P)
    os.close(fd)


def test_ls_shows_exactly_the_pages_that_were_read_and_the_one_that_was_written(cachefs: Command) -> None:
    (cachefs.source / "file").write_bytes(os.urandom(300 * P))
    cachefs.mount(*NO_READAHEAD, *KEEP_DIRTY)
    read_pages(cachefs.path / "file", (0, 15), (40, 40), (100, 199))
    read = [("file", 0, 16 * P, "clean"), ("file", 40 * P, P, "clean"), ("file", 100 * P, 100 * P, "clean")]
    assert extents(cachefs) == extents(cachefs, cachefs.path / "file") == read

    with (cachefs.path / "file").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * P, 41 * P)
    assert extents(cachefs) == [*read[:2], ("file", 41 * P, P, "dirty"), read[2]]
    assert extents(cachefs, "--state", "dirty") == [("file", 41 * P, P, "dirty")]

    lines = cachefs.run("ls", cachefs.path).stdout.splitlines()
    assert lines[0].split() == ["OFFSET", "LENGTH", "STATE", "AGE", "LAST", "READER", "FILE"]
    shown = [(int(fields[0]), int(fields[1]), fields[2], fields[-1]) for fields in map(str.split, lines[1:])]
    assert shown == [(offset, length, state, str(cachefs.path / name)) for name, offset, length, state in extents(cachefs)]
    assert rows(cachefs)[0]["last_reader"] == Path("/proc/self/comm").read_text().strip()

    assert cachefs.run("sync", cachefs.path).returncode == 0
    assert extents(cachefs) == [read[0], ("file", 40 * P, 2 * P, "clean"), read[2]]
    cachefs.umount_well()


def test_summary_sort_and_top(cachefs: Command) -> None:
    for name, pages in (("a", 10), ("b", 20), ("c", 5)):
        (cachefs.source / name).write_bytes(os.urandom(20 * P))
        (cachefs.source / name).chmod(0o644)
        assert pages <= 20
    cachefs.mount(*NO_READAHEAD)
    for name, pages in (("a", 10), ("b", 20), ("c", 5)):
        read_pages(cachefs.path / name, (0, pages - 1))
    read_pages(cachefs.path / "a", (0, 9))
    summary = rows(cachefs, "--summary", "--sort", "size")
    assert [(Path(r["file"]).name, r["cached_bytes"], r["share"]) for r in summary] == [
        ("b", 20 * P, 1.0), ("a", 10 * P, 0.5), ("c", 5 * P, 0.25),
    ]  # fmt: skip
    assert [(r["page_hits"], r["page_misses"]) for r in rows(cachefs, "--summary", "--sort", "hits", "--top", 1)] == [(10, 10)]
    assert [name for name, *_ in extents(cachefs, "--sort", "size", "--top", "2")] == ["b", "a"]
    lines = cachefs.run("ls", "--summary").stdout.splitlines()
    assert lines[1].split()[:5] == [str(10 * P), "50.0", "%", "10", "10"] and len(lines) == 4
    assert one_line(cachefs.run("ls", "--sort", "hits"), 2) == "cachefs: --sort hits needs --summary\n"


def test_files_renamed_linked_and_removed_are_shown_as_they_are_now(cachefs: Command) -> None:
    (cachefs.source / "d").mkdir()
    (cachefs.source / "d" / "file").write_bytes(b"x" * P)
    cachefs.mount()
    ours = cachefs.path
    held = os.open(ours / "d" / "file", os.O_RDONLY)
    os.read(held, P)
    assert extents(cachefs) == [("d/file", 0, P, "clean")]
    os.rename(ours / "d", ours / "e")
    os.link(ours / "e" / "file", ours / "second")
    assert extents(cachefs, ours / "e") == [("e/file", 0, P, "clean")]
    assert extents(cachefs, ours / "second") == [("second", 0, P, "clean")]
    assert len(extents(cachefs)) == 1, "a file with two names is one file"
    os.unlink(ours / "e" / "file")
    os.unlink(ours / "second")
    (gone,) = rows(cachefs)
    assert gone["file"] is None and gone["length"] == P
    assert "(removed, inode" in cachefs.run("ls").stdout
    os.close(held)
    wait_until(lambda: rows(cachefs) == [], "the end of the removed file")


def test_names_of_any_bytes_are_one_line_and_json_that_parses(cachefs: Command) -> None:
    names = [b"line\nbreak", b"\xff\xfe", "ü".encode(), b'quo"te\\', b"tab\t\x1b[31m"]
    cachefs.mount()
    for name in names:
        Path(os.fsdecode(bytes(cachefs.path) + b"/" + name)).write_bytes(b"x")
    found = rows(cachefs)
    told = {name.replace(b"\\", b"\\\\").replace(b"\xff\xfe", b"\\xff\\xfe").decode() for name in names}
    assert {row["file"] for row in found} == {f"{cachefs.path}/{name}" for name in told}
    assert len(cachefs.run("ls").stdout.splitlines()) == 1 + len(names)
    assert all(json.loads(cachefs.run("stat", "--json", os.fsencode(cachefs.path).decode() + "/" + os.fsdecode(name)).stdout)
               for name in names)  # fmt: skip


def test_stat_shows_one_file_with_who_has_it_open(cachefs: Command) -> None:
    (cachefs.source / "file").write_bytes(os.urandom(64 * P))
    (cachefs.source / "cold").write_bytes(b"four")
    cachefs.mount()
    with (cachefs.path / "file").open("rb", buffering=0) as file:
        for _ in range(2):
            file.read(P)
        found = json.loads(cachefs.run("stat", cachefs.path / "file", "--json").stdout)
        text = cachefs.run("stat", cachefs.path / "file").stdout
    me = Path("/proc/self/comm").read_text().strip()
    (handle,) = found["handles"]
    assert (handle["program"], handle["uid"], handle["writable"]) == (me, os.geteuid(), False)
    assert handle["streams"][0]["position"] == 2 <= handle["streams"][0]["stop"]
    assert found["page_hits"] + found["page_misses"] == 2
    assert found["extents"][0]["offset"] == 0 and found["cached_bytes"] == sum(e["length"] for e in found["extents"])
    assert f"{me}, user {os.geteuid()}, reading: at page 2" in text
    assert json.loads(cachefs.run("stat", cachefs.path / "cold", "--json").stdout)["extents"] == []
    assert "cached     nothing" in cachefs.run("stat", cachefs.path / "cold").stdout


def test_what_cannot_be_shown_is_one_line(cachefs: Command) -> None:
    assert cachefs.run("ls").stdout == "" and cachefs.run("ls", "--json").stdout == "[]\n"
    pid = cachefs.mount()
    outside = cachefs.base / "outside"
    outside.touch()
    (cachefs.path / "link").symlink_to(outside)
    for command in ("ls", "stat"):
        assert "is not on a cachefs mount" in one_line(cachefs.run(command, outside), 1)
        assert "is not on a cachefs mount" in one_line(cachefs.run(command, cachefs.path / "link"), 1)
        assert "is in the SOURCE of a mount: give its path below" in one_line(cachefs.run(command, cachefs.source), 1)
        assert "does not exist" in one_line(cachefs.run(command, cachefs.path / "none"), 1)
        assert "does not exist" in one_line(cachefs.run(command, cachefs.path / ".." / "mnt" / "a\nb"), 1)
    assert "nothing matches" in one_line(cachefs.run("ls", cachefs.path / "*.none"), 1)
    assert "is not a regular file" in one_line(cachefs.run("stat", cachefs.path), 1)
    assert "is not one of" in one_line(cachefs.run("ls", "--state", "wet"), 2)
    assert "--top" in one_line(cachefs.run("ls", "--top", "0"), 2)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid), "the end of the daemon")
    assert "has no daemon any more" in one_line(cachefs.run("ls", cachefs.path / "link"), 1)
    assert cachefs.run("umount", cachefs.path).returncode == 0


def test_patterns_are_expanded_where_the_shell_has_not(cachefs: Command) -> None:
    cachefs.mount()
    for name in ("a.bin", "b.bin", "c.txt"):
        (cachefs.path / name).write_bytes(b"x")
    assert [name for name, *_ in extents(cachefs, cachefs.path / "*.bin")] == ["a.bin", "b.bin"]
    (cachefs.path / "[x]").write_bytes(b"x")
    assert [name for name, *_ in extents(cachefs, cachefs.path / "[x]")] == ["[x]"]
