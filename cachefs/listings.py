"""What directories far away contain, as it was last read: believed for a while, as attributes are, unless we change it."""

from collections.abc import Sequence

import trio

from backing.base import Entry
from cachefs.inode import Inode

NAMES_MAX = 200_000  # remembered, of all directories


class Listing:
    """What is in a directory, in its own order, and when each name was last looked up since that was read."""

    __slots__ = ("entries", "read_at", "seen_at")

    def __init__(self, entries: Sequence[Entry], read_at: float) -> None:
        self.entries = entries
        self.read_at = read_at
        self.seen_at: dict[bytes, float] = {}


class Listings:
    """Owns them. With `ttl_seconds` 0 nothing is believed, but the last listing can still be asked for (`last`).

    `begin` and `read` go around the reading: what a change of ours may have overtaken is not kept.
    """

    def __init__(self, ttl_seconds: float) -> None:
        self.ttl_seconds = ttl_seconds
        self._changes = 0
        self._known: dict[Inode, Listing] = {}  # {directory: its listing}, the one read longest ago first
        self._names = 0

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
        self._names += len(entries)
        while self._names > NAMES_MAX:
            self.forget(next(iter(self._known)))

    def changed(self, directory: Inode) -> None:
        """We have changed names in it, or tried to."""
        self._changes += 1
        self.forget(directory)

    def forget(self, directory: Inode) -> None:
        listing = self._known.pop(directory, None)
        if listing is not None:
            self._names -= len(listing.entries)

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

    def _left(self, since: float) -> float:
        return max(0.0, since + self.ttl_seconds - trio.current_time())
