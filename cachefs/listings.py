"""What directories far away contain, as it was last read: believed for a while, as attributes are, unless we change it.

Of a directory that was made here it is also known for a while which names there are not: but for ours, none. A listing does not
tell that: it may come from somebody's cache (sshfs keeps listings for 20 s), where a name that is looked up does not.
"""

import errno
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence

import trio

from backing.base import Entry
from cachefs.inode import Inode

NAMES_MAX = 200_000  # remembered, of all directories
NAME_BYTES_MAX = 255  # a longer one is an error
NEVER_ABSENT = (b".", b"~")  # how names begin that some stores have in each directory and list in none (.snapshot, ~snapshot)


class KnownAbsent(FileNotFoundError):
    """There is no such name, as it may still be believed for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(errno.ENOENT, os.strerror(errno.ENOENT))
        self.seconds = seconds


class Listing:
    """What is in a directory, in its own order, and when each name was last looked up since that was read."""

    __slots__ = ("entries", "read_at", "seen_at")

    def __init__(self, entries: Sequence[Entry], read_at: float) -> None:
        self.entries = entries
        self.read_at = read_at
        self.seen_at: dict[bytes, float] = {}


class Made:
    """The names in a directory that was made here, as of a time: those that we have given and not taken."""

    __slots__ = ("as_of", "names")

    def __init__(self, as_of: float) -> None:
        self.as_of = as_of
        self.names: Counter[str] = Counter()  # {folded: how many of them at most}


class Listings:
    """Owns them. With `ttl_seconds` 0 nothing is believed, but the last listing can still be asked for (`last`).

    `begin` and `read` go around the reading: what a change of ours may have overtaken is not kept.
    """

    def __init__(self, ttl_seconds: float) -> None:
        self.ttl_seconds = ttl_seconds
        self._changes = 0
        self._known: dict[Inode, Listing] = {}  # {directory: its listing}, the one read longest ago first
        self._made: dict[Inode, Made] = {}  # the same of those that were made here, the one made longest ago first
        self._names = self._made_names = 0

    def begin(self) -> tuple[int, float]:
        """To be called before a directory is read, for `read`."""
        return self._changes, trio.current_time()

    def read(self, directory: Inode, entries: Sequence[Entry], begun: tuple[int, float]) -> None:
        """These were in the directory; keeps them unless a name was changed by us since it `begun`."""
        changes, read_at = begun
        self._forget_listing(directory)
        if changes != self._changes:
            return
        self._known[directory] = Listing(entries, read_at)
        self._names += len(entries)
        while self._names > NAMES_MAX:
            self._forget_listing(next(iter(self._known)))

    def made(self, directory: Inode, begun: tuple[int, float]) -> None:
        """It was made by us since it `begun`, and nobody has been told of it: there is nothing in it."""
        while self._made and not self._left(next(iter(self._made.values())).as_of):
            self._forget_made(next(iter(self._made)))
        self._forget_made(directory)
        if self._left(begun[1]):
            self._made[directory] = Made(begun[1])

    def changed(self, directory: Inode, name: bytes | None = None, there: bool = False) -> None:
        """We have changed names in it, or tried to: now `name` is there, or is not. None: nobody knows what has become of it."""
        self._changes += 1
        self._forget_listing(directory)
        made = self._made.get(directory)
        if made is None:
            return
        if name is None or not self._left(made.as_of):
            self._forget_made(directory)
        elif there:
            made.names[folded(name)] += 1
            self._made_names += 1
            while self._made_names > NAMES_MAX:
                self._forget_made(next(iter(self._made)))
        elif made.names[folded(name)] > 0:
            made.names[folded(name)] -= 1
            self._made_names -= 1

    def forget(self, directory: Inode) -> None:
        self._forget_listing(directory)
        self._forget_made(directory)

    def _forget_made(self, directory: Inode) -> None:
        made = self._made.pop(directory, None)
        if made is not None:
            self._made_names -= made.names.total()

    def _forget_listing(self, directory: Inode) -> None:
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

    def seconds_absent(self, directory: Inode, name: bytes) -> float:
        """How long it may still be believed that there is no such name; 0 where there may be one, in whatever spelling."""
        made = self._made.get(directory)
        if made is None or name.startswith(NEVER_ABSENT) or len(name) > NAME_BYTES_MAX or made.names[folded(name)]:
            return 0.0
        return self._left(made.as_of)

    def _left(self, since: float) -> float:
        return max(0.0, since + self.ttl_seconds - trio.current_time())


def folded(name: bytes) -> str:
    """The same for names that some store may take for one: in other cases, or composed of other characters."""
    text = unicodedata.normalize("NFKD", os.fsdecode(name))
    return unicodedata.normalize("NFKD", text.casefold())
