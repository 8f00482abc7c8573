"""Entries of the ledger: neighbours made one, and names that every parser and terminal takes."""

import json
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.entries import escaped, merged, printable

NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name).map(os.fsdecode)


def entry(path: str | None, offset: int, length: int, age: float = 1.0, inode: int = 1, **more: object) -> dict[str, object]:
    return {
        "path": path, "offset": offset, "length": length, "error": None, "tries": 0, "age_seconds": age,
        "next_try_seconds": 5.0 - age, "inode": inode, **more,
    }  # fmt: skip


def test_neighbours_in_a_file_become_one_as_old_as_the_older() -> None:
    found = merged([entry("a", 8192, 100, age=3.0), entry("a", 0, 4096), entry("a", 4096, 4096, age=2.0)])
    assert found == [entry("a", 0, 8292, age=3.0)]


def test_other_files_and_gaps_stay_apart() -> None:
    apart = [entry("a", 0, 4096), entry("a", 8192, 4096), entry("b", 4096, 4096), entry("a", 12288, 1, inode=2)]
    assert sorted(map(str, merged(apart))) == sorted(map(str, apart))
    assert len(merged([entry(None, 0, 1, inode=7), entry(None, 1, 1, inode=8)])) == 2


def test_the_oldest_comes_first_then_by_name_and_offset() -> None:
    found = merged([entry("b", 0, 1), entry("a", 8192, 1), entry("z", 0, 1, age=9.0), entry("a", 0, 1)])
    assert [(e["path"], e["offset"]) for e in found] == [("z", 0), ("a", 0), ("a", 8192), ("b", 0)]


def test_entries_of_another_version_are_merged_too() -> None:
    assert merged([{"path": "a", "offset": 4, "length": 4}, {"path": "a", "offset": 0, "length": 4}]) == [
        {"path": "a", "offset": 0, "length": 8, "age_seconds": 0, "next_try_seconds": 0}
    ]


@given(NAMES)
def test_an_escaped_name_is_valid_and_printf_gives_the_name_back(name: str) -> None:
    text = escaped(name)
    assert json.loads(json.dumps(text).encode()) == text
    text.encode("utf-8")
    assert _unescaped(text) == os.fsencode(name) == _unescaped(printable(name))
    assert printable(name).isprintable()


def _unescaped(text: str) -> bytes:
    """What `printf %b` makes of it."""
    parts = text.encode().split(b"\\\\")
    pieces = []
    for part in parts:
        head, *rest = part.split(b"\\x")
        pieces.append(head + b"".join(bytes([int(piece[:2], 16)]) + piece[2:] for piece in rest))
    return b"\\".join(pieces)


ODD_NAMES = [b"plain", "\u00fcml\u00e4ut".encode(), b"new\nline", b"back\\slash\\x41", b"\xff\xfe41", b"\x1b[2J"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_printf_of_the_shell_agrees(name: bytes) -> None:
    for text in (escaped(os.fsdecode(name)), printable(os.fsdecode(name))):
        done = subprocess.run(["bash", "-c", 'printf %b "$1"', "-", text], capture_output=True, check=True, timeout=30)
        assert done.stdout == name


def test_ordinary_names_are_what_they_are() -> None:
    assert escaped("a/b c\u00fc") == printable("a/b c\u00fc") == "a/b c\u00fc"
