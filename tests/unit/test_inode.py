"""The table of inodes: numbers that come back, and references that keep an inode."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.inode import Inode, InodeTable


def found(table: InodeTable, path: Path) -> Inode:
    """The inode of `path`, as a lookup in the root finds it."""
    inode = table.add(path.lstat())
    table.name(inode, table.root, os.fsencode(path.name))
    inode.lookups += 1
    return inode


@pytest.fixture
def table(tmp_path: Path) -> Iterator[InodeTable]:
    table = InodeTable(tmp_path.stat())
    yield table
    table.check()


def test_dropping_twice_leaves_the_file_alone_that_has_the_number_by_now(table: InodeTable, tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    old = found(table, tmp_path / "old")
    table.unname(old, table.root, b"old")
    table.renumbered(old)
    old.lookups = 0
    assert table.drop(old) == [old]
    (tmp_path / "old").rename(tmp_path / "new")  # as good as another file that the store gave the same number
    new = found(table, tmp_path / "new")
    assert new is not old and new.node == old.node
    assert table.drop(old) == []
    assert table.get(new.node) is new


def test_a_number_in_use_is_given_to_no_other_inode(table: InodeTable, tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    old = found(table, tmp_path / "old")
    table.unname(old, table.root, b"old")
    table.renumbered(old)
    new = found(table, tmp_path / "old")
    assert new.node != old.node
    assert table.get(old.node) is old and table.get(new.node) is new


def test_a_name_leads_to_who_was_last_seen_there_and_to_nobody_who_lost_it(table: InodeTable, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    a, b = found(table, tmp_path / "a"), found(table, tmp_path / "b")
    root = table.root
    assert (table.named(root, b"a"), table.named(root, b"b"), table.named(root, b"c")) == (a, b, None)
    table.name(b, root, b"a")  # moved over it
    table.unname(b, root, b"b")
    table.check()
    assert (table.named(root, b"a"), table.named(root, b"b")) == (b, None)
    table.unname(a, root, b"a")
    assert table.named(root, b"a") is b, "what the one before loses is not what this one has"
    table.nothing_at(root, b"a")
    table.check()
    assert table.named(root, b"a") is None
    table.name(b, root, b"a")
    assert table.named(root, b"a") is b
    b.lookups = 0
    table.drop(b)
    assert table.named(root, b"a") is None
