"""The comparison of a directory with what the record says must be in it.

At most one operation of a writer was under way when the mount died. It may have happened or not: wholly, but a write page
by page. The tree goes on from what was found.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from contents import explain_difference, stamp
from tree import File, Operation, Tree, grow

from cachefs.transport.negotiate import WRITE_MAX_BYTES

PAGE = 4096
REQUEST_BYTES_LEAST = WRITE_MAX_BYTES - PAGE  # of a request of the kernel that is not the last one of its write


@dataclass(slots=True)
class Seen:
    """One entry of the directory as it is found."""

    stat: os.stat_result
    path: Path

    def contents(self) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            return file.read()


def look(root: Path) -> dict[str, Seen]:
    """Everything below `root`, itself included: {path relative to it: what is there}."""
    found = {"": Seen(os.lstat(root), root)}
    pending = [("", root)]
    while pending:
        prefix, directory = pending.pop()
        for name in os.listdir(directory):
            path = os.path.join(prefix, name)
            found[path] = Seen(os.lstat(directory / name), directory / name)
            if stat.S_ISDIR(found[path].stat.st_mode):
                pending.append((path, directory / name))
    return found


def check(tree: Tree, pending: Operation | None, root: Path) -> tuple[list[str], Tree]:
    """Complaints about the directory `root`, and the tree to go on with: what `pending` has turned out to have done is in it."""
    found = look(root)
    if pending is None or pending[0] == "write":
        return differences(tree, found, pending), tree
    if len(pending) > 1 and isinstance(pending[1], int) and pending[1] not in tree.files:
        return differences(tree, found), tree  # of a file without a name: it changes nothing that is there
    complaints = differences(tree, found)
    if not complaints:
        return [], tree
    other = tree.after(pending)
    if not differences(other, found):
        return [], other
    return [*complaints, f"(and it is not so either that {pending} had happened)"], tree


def differences(tree: Tree, found: dict[str, Seen], pending: Operation | None = None) -> list[str]:
    """Each difference between `tree` and what was found, in words. A pending write is taken into the tree as far as it got."""
    writer = f"writer {tree.writer}: "
    expected = {*tree.names, *tree.directories}
    complaints = [f"{writer}{path!r} is missing" for path in sorted(expected - found.keys())]
    complaints += [f"{writer}{path!r} should not be there" for path in sorted(found.keys() - expected)]
    for path, mode in tree.directories.items():
        if path in found and found[path].stat.st_mode != stat.S_IFDIR | mode:
            complaints.append(f"{writer}directory {path!r} has mode {found[path].stat.st_mode:o} instead of {mode:o}")
    inodes: dict[int, File] = {}
    for path, file in tree.names.items():
        if path in found:
            first = inodes.setdefault(found[path].stat.st_ino, file)
            complaints += [writer + line for line in _file_differences(tree, path, file, found[path], pending)]
            if first is not file:
                complaints.append(f"{writer}{path!r} is the same file as another, and should not be")
    if len(inodes) != len({file.number for file in tree.names.values()}):
        complaints.append(f"{writer}there are {len(inodes)} files, not as many as names were linked to")
    return complaints


def _file_differences(tree: Tree, path: str, file: File, seen: Seen, pending: Operation | None) -> list[str]:
    status = seen.stat
    links = sum(file is other for other in tree.names.values())
    if not stat.S_ISREG(status.st_mode):
        return [f"{path!r} is no file"]
    complaints = [
        f"{path!r} (file {file.number}) has {name} {is_now} instead of {should_be}"
        for name, should_be, is_now in (
            ("mode", oct(file.mode), oct(stat.S_IMODE(status.st_mode))),
            ("owner", (file.uid, file.gid), (status.st_uid, status.st_gid)),
            ("link count", links, status.st_nlink),
        )
        if should_be != is_now
    ]
    under_way = pending is not None and pending[1] == file.number
    if under_way:
        file.mtime_ns = None  # also where the write leaves the bytes as they were
    elif file.mtime_ns is not None and status.st_mtime_ns != file.mtime_ns:
        complaints.append(f"{path!r} (file {file.number}) has mtime {status.st_mtime_ns} instead of {file.mtime_ns}")
    contents = seen.contents()
    if len(contents) != status.st_size:
        complaints.append(f"{path!r} says {status.st_size} bytes and gives {len(contents)}")
    if contents != file.data and not (pending is not None and under_way and _settle_write(tree, file, contents, pending)):
        meanwhile = f" ({pending} was under way)" if under_way else ""
        complaints.append(f"{path!r} (file {file.number}): {explain_difference(file.data, contents)}{meanwhile}")
    return complaints


def _settle_write(tree: Tree, file: File, contents: bytes, pending: Operation) -> bool:
    """Whether the contents are explained by a write that was done as far as some of its pages; if so, the tree gets them.

    The kernel cuts a long write into requests, wherever the pages of the program's buffer end: one page may be torn there.
    """
    _, number, offset, length, operation = pending
    end, old, torn_most = offset + length, file.data, length // REQUEST_BYTES_LEAST
    before, done = bytearray(old), bytearray(old)
    grow(before, len(contents))
    grow(done, max(offset, len(contents)))
    done[offset:end] = stamp(tree.writer, number, operation, offset, length)
    if not len(old) <= len(contents) <= max(len(old), end):
        return False
    torn = len(contents) not in (len(old), end) and (len(contents) % PAGE != 0 or len(contents) <= offset)
    for start in range(0, len(contents), PAGE):
        page = contents[start : min(start + PAGE, len(contents))]
        mine, theirs = done[start : start + len(page)], before[start : start + len(page)]
        inside = start + PAGE > offset and start < end
        if page != theirs and not (inside and page == mine):
            torn += 1
            if not inside or not any(page == mine[:at] + theirs[at:] for at in range(len(page))):
                return False
    if torn > torn_most:
        return False
    file.data = bytearray(contents)
    return True
