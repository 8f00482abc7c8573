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
