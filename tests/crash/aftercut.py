"""What a directory may look like after a power cut: all that was synced before it, and more or less of what came later."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from checking import Seen, look
from contents import explain_difference
from record import DONE, INTENT, Entry
from tree import Operation, Tree

CONTENT = ("create", "write", "truncate")
NAMING = ("create", "rename", "unlink", "link", "mkdir", "rmdir")
Names = tuple[dict[str, int], frozenset[str]]  # files: {path: number}; directories


@dataclass(slots=True)
class Versions:
    """The contents that a file has had since it was last synced; the first is what that sync made durable."""

    synced: bool = False
    contents: list[bytes] = field(default_factory=lambda: [b""])

    def explain(self, seen: bytes) -> str | None:
        """What is wrong with these contents, or None: each byte is from one of the versions, or a zero behind the first."""
        sizes = [len(version) for version in self.contents]
        if not min(sizes) <= len(seen) <= max(sizes):
            return f"{len(seen)} bytes long, not between {min(sizes)} and {max(sizes)}"
        found = np.frombuffer(seen, "u1")
        good = np.zeros(len(seen), bool)
        if len(self.contents) > 1:
            good[min(sizes) :] = found[min(sizes) :] == 0
        for version in self.contents:
            length = min(len(version), len(seen))
            good[:length] |= found[:length] == np.frombuffer(version, "u1", length)
        if good.all():
            return None
        nearest = min(self.contents, key=lambda version: abs(len(version) - len(seen)))
        first = int(np.flatnonzero(~good)[0])
        what = f"{(~good).sum()} bytes from {first} on are from none of {len(self.contents)} versions"
        return f"{what} with {sizes} bytes: {explain_difference(nearest, seen)}"


class Past:
    """What one writer had asked for at the moment of the cut, from its record.

    `names_follow` says whether the sync of a new file makes its name durable and all that was done to names before, as on ext4;
    else only the sync of their directories does.
    """

    def __init__(self, writer: int, entries: Iterable[Entry], moment_ns: int, names_follow: bool) -> None:
        self.writer = writer
        self.names_follow = names_follow
        self.tree = Tree(writer)
        self.versions: dict[int, Versions] = {}
        self.names: list[Names] = [({}, frozenset({""}))]
        pending: Operation | None = None
        for what, time_ns, detail in entries:
            if time_ns >= moment_ns:
                break
            if what == INTENT:
                pending = detail
            elif what == DONE and pending is not None:
                self._happened(pending, detail)
                pending = None
        if pending is not None and pending[0] not in ("fsync", "fsyncdir"):
            self._happened(pending, None)  # or not: then it is the state before

    def _happened(self, operation: Operation, result: int | None) -> None:
        kind, *arguments = operation
        self.tree.apply(operation, result)
        if kind in CONTENT:
            number = arguments[1] if kind == "create" else arguments[0]
            if kind == "create":
                self.versions[number] = Versions()
            self.versions[number].contents.append(bytes(self.tree.files[number].data))
        if kind in NAMING:
            self.names.append(self._names_now())
        if kind == "fsync":
            file = self.tree.files[arguments[0]]
            self.versions[file.number] = Versions(True, [bytes(file.data)])
            if self.names_follow:
                self._forget_states_before(file.number)
        if kind == "fsyncdir":
            self.names = [self._names_now()]

    def _forget_states_before(self, number: int) -> None:
        """The disk cannot go back behind the making of this file any more."""
        since = next((i for i, (files, _) in enumerate(self.names) if number in files.values()), 0)
        del self.names[:since]

    def _names_now(self) -> Names:
        return {path: file.number for path, file in self.tree.names.items()}, frozenset(self.tree.directories)

    # --- comparing -----------------------------------------------------------------------------------------------------

    def check(self, root: Path, recovered: Sequence[bytes]) -> list[str]:
        """Complaints about what is in `root`; `recovered` are contents that were kept elsewhere."""
        found = look(root)
        tries = [self._compare(found, names, recovered) for names in reversed(self.names)]
        best = min(tries, key=len)
        return [f"writer {self.writer}: {line}" for line in best]

    def _compare(self, found: dict[str, Seen], names: Names, recovered: Sequence[bytes]) -> list[str]:
        files, directories = names
        complaints = [f"{path!r} is missing" for path in (files.keys() | directories) - found.keys()]
        complaints += [f"{path!r} should not be there" for path in found.keys() - (files.keys() | directories)]
        for path, number in files.items():
            if path in found and not stat.S_ISREG(found[path].stat.st_mode):
                complaints.append(f"{path!r} is no file")
            elif path in found:
                wrong = self.versions[number].explain(found[path].contents())
                complaints += [f"{path!r} (file {number}): {wrong}"] if wrong else []
        for number, versions in self.versions.items():
            missing = versions.synced and self._named_throughout(number) and number not in files.values()
            if missing and all(versions.explain(contents) for contents in recovered):
                complaints.append(f"file {number}, which was synced, is nowhere")
        return complaints

    def _named_throughout(self, number: int) -> bool:
        """Whether the file has a name in all states since it got one, up to the last: then it may not be gone."""
        named = [number in files.values() for files, _ in self.names]
        return named[-1] and all(named[named.index(True) :])
