"""What directories far away contain, as it was last read: believed for a while, as attributes are.

A listing, which has an order, is good until we change something there. Which names there are not, we go on knowing: our own
changes are known as well, and a directory that was made here began with none.
"""

from collections.abc import Sequence

import trio

from backing.base import Entry
from cachefs.inode import Inode

NAMES_MAX = 400_000  # remembered, of all directories: in their listings, and as what there is


class Listing:
    """What is in a directory, in its own order, and when each name was last looked up since that was read."""

    __slots__ = ("entries", "read_at", "seen_at")

    def __init__(self, entries: Sequence[Entry], read_at: float) -> None:
        self.entries = entries
        self.read_at = read_at
        self.seen_at: dict[bytes, float] = {}


class Names:
    """All names in a directory, as of a time."""

    __slots__ = ("as_of", "there")

    def __init__(self, there: set[bytes], as_of: float) -> None:
        self.there = there
        self.as_of = as_of


class Listings:
    """Owns them. With `ttl_seconds` 0 nothing is believed, but the last listing can still be asked for (`last`).

    `begin` and `read` go around the reading: what a change of ours may have overtaken is not kept.
    """

    def __init__(self, ttl_seconds: float) -> None:
        self.ttl_seconds = ttl_seconds
        self._changes = 0
        self._known: dict[Inode, Listing] = {}  # {directory: its listing}, the one read longest ago first
        self._all_names: dict[Inode, Names] = {}  # the same for what names there are, whatever has become of the listing
        self._count = 0  # names in both

    def begin(self) -> tuple[int, float]:
        """To be called before a directory is read, for `read`."""
        return self._changes, trio.current_time()

    def read(self, directory: Inode, entries: Sequence[Entry], begun: tuple[int, float]) -> None:
        """These were in the directory; keeps them unless a name was changed by us since it `begun`."""
        changes, read_at = begun
        self.forget(directory)
        if changes != self._changes:
            return
        self._known[directory] = Listing(entries, read_at)
        names = self._all_names[directory] = Names({entry.name for entry in entries}, read_at)
        self._count += len(entries) + len(names.there)
        while self._count > NAMES_MAX:
            self.forget(next(iter(self._known), None) or next(iter(self._all_names)))

    def made(self, directory: Inode, begun: tuple[int, float]) -> None:
        """It was made by us since it `begun`, so there is nothing in it."""
        self.forget(directory)
        self._all_names[directory] = Names(set(), begun[1])

    def changed(self, directory: Inode, name: bytes | None = None, there: bool = False) -> None:
        """We have changed names in it, or tried to: now `name` is there, or is not. None: nobody knows what has become of it."""
        self._changes += 1
        names = self._all_names.get(directory)
        self._forget_listing(directory)
        if names is None:
            return
        if name is None:
            self.forget(directory)
        elif there != (name in names.there):
            self._count += 1 if there else -1
            (names.there.add if there else names.there.remove)(name)

    def forget(self, directory: Inode) -> None:
        self._forget_listing(directory)
        names = self._all_names.pop(directory, None)
        if names is not None:
            self._count -= len(names.there)

    def _forget_listing(self, directory: Inode) -> None:
        listing = self._known.pop(directory, None)
        if listing is not None:
            self._count -= len(listing.entries)

    def last(self, directory: Inode) -> Sequence[Entry] | None:
        """What was read last, however long ago; None if that is not known any more."""
        listing = self._known.get(directory)
        return None if listing is None else listing.entries

    def read_at(self, directory: Inode) -> float | None:
        """When what was read last was asked for; None if that is not known any more."""
        listing = self._known.get(directory)
        return None if listing is None else listing.read_at

    def entries(self, directory: Inode) -> Sequence[Entry] | None:
        """What may be believed to be in the directory; None where it has to be read."""
        listing = self._known.get(directory)
        return listing.entries if listing is not None and self._left(listing.read_at) > 0 else None

    def saw(self, directory: Inode, name: bytes, at: float) -> None:
        """The name was looked up; `at` is when that began."""
        listing = self._known.get(directory)
        if listing is not None:
            listing.seen_at[name] = at

    def seconds_left(self, directory: Inode, name: bytes) -> float:
        """How long it may still be believed that the name means what was last seen there; 0 where it has to be looked up."""
        listing = self._known.get(directory)
        at = None if listing is None else listing.seen_at.get(name)
        return 0.0 if at is None else self._left(at)

    def seconds_absent(self, directory: Inode, name: bytes) -> float:
        """How long it may still be believed that there is no such name; 0 where there may be one."""
        names = self._all_names.get(directory)
        return 0.0 if names is None or name in names.there else self._left(names.as_of)

    def _left(self, since: float) -> float:
        return max(0.0, since + self.ttl_seconds - trio.current_time())
