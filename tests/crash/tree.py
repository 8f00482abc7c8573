"""What a writer's directory must hold: a model of names, files and attributes to which acknowledged operations are applied.

An operation is a tuple: its kind, then what it was called with. Files have numbers, so that an operation through a handle
needs no name. Paths are relative to the writer's directory, which is the path "".
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from contents import stamp

Operation = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class File:
    """One file, under however many names."""

    number: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    uid: int = 0
    gid: int = 0
    mtime_ns: int | None = None  # None: nobody has looked since it last changed


class Tree:
    """The directory of one writer as its acknowledged operations left it."""

    def __init__(self, writer: int) -> None:
        self.writer = writer
        self.names: dict[str, File] = {}
        self.directories: dict[str, int] = {"": 0o755}  # path -> mode
        self.files: dict[int, File] = {}  # also those that live on in a handle
        self.applied = 0  # operations

    def apply(self, operation: Operation, result: int | None = None) -> None:
        """Does to the model what an operation that returned `result` did; None if it is not known to have returned."""
        kind, *arguments = operation
        self.applied += 1
        getattr(self, "_" + kind)(*arguments, result)

    def after(self, operation: Operation) -> Tree:
        """A copy to which one more operation was applied; this tree stays as it is."""
        other = copy.deepcopy(self)
        other.apply(operation)
        return other

    def forget_closed(self) -> None:
        """Files without a name are gone: all handles are closed."""
        self.files = {file.number: file for file in self.names.values()}

    # --- operations ----------------------------------------------------------------------------------------------------

    def _create(self, path: str, number: int, mode: int, _: int | None) -> None:
        self.names[path] = self.files[number] = File(number, mode)

    def _write(self, number: int, offset: int, length: int, operation: int, result: int | None) -> None:
        file = self.files[number]
        length = length if result is None else result
        grow(file.data, offset)
        file.data[offset : offset + length] = stamp(self.writer, number, operation, offset, length)
        file.mtime_ns = None

    def _truncate(self, number: int, size: int, _: int | None) -> None:
        file = self.files[number]
        del file.data[size:]
        grow(file.data, size)
        file.mtime_ns = None

    def _rename(self, old: str, new: str, _: int | None) -> None:
        if old in self.names:
            if self.names.get(new) is not self.names[old]:  # two names of one file: nothing happens
                self.names[new] = self.names.pop(old)
            return
        for table in (self.names, self.directories):
            for path in [path for path in table if path == old or path.startswith(old + "/")]:
                table[new + path[len(old) :]] = table.pop(path)

    def _unlink(self, path: str, _: int | None) -> None:
        del self.names[path]

    def _link(self, old: str, new: str, _: int | None) -> None:
        self.names[new] = self.names[old]

    def _mkdir(self, path: str, mode: int, _: int | None) -> None:
        self.directories[path] = mode

    def _rmdir(self, path: str, _: int | None) -> None:
        del self.directories[path]

    def _chmod(self, number: int, mode: int, _: int | None) -> None:
        self.files[number].mode = mode

    def _chown(self, number: int, uid: int, gid: int, _: int | None) -> None:
        self.files[number].uid, self.files[number].gid = uid, gid

    def _utime(self, number: int, mtime_ns: int, _: int | None) -> None:
        self.files[number].mtime_ns = mtime_ns

    def _stat(self, number: int, result: int | None) -> None:
        self.files[number].mtime_ns = result

    def _fsync(self, number: int, _: int | None) -> None:
        """Changes nothing here; what it promises is about power cuts."""

    def _fsyncdir(self, _: int | None) -> None:
        """The same, for names."""


def grow(data: bytearray, size: int) -> None:
    """Zeros up to `size`, where there is less."""
    if len(data) < size:
        data.extend(bytes(size - len(data)))
