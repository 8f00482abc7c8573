"""Inodes: what is known of the backing's files, by identity (device and inode number), and how each is reached.

Names are remembered as (parent inode, name) and used one component at a time from the parent's descriptor, never as a
path; what is found is checked against the identity, so that a rename or a symlink planted underneath leads to ESTALE and
not to another file. See `cachefs.descriptors` for the descriptors.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from cachefs.cache.file import CachedFile
from cachefs.journal.journal import JournalFile
from cachefs.lock import Lock

ROOT_NODE = 1
PATHS_MOST = 8  # of the names of a file with many hard links
FIRST_MADE_UP_NODE = 1 << 62  # node ids of files whose own number is taken: other devices, numbers 0 and 1

_NUMBERED_FIELDS = ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size")
_NAMED_FIELDS = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks", "st_rdev")

Signature = tuple[int, int, int]
Name = tuple["Inode", bytes]  # directory, name in it
NO_XATTRS: Mapping[bytes, bytes | int] = {}


def signature_of(st: os.stat_result) -> Signature:
    """What changes whenever somebody changes a file's contents: mtime, size, ctime."""
    return st.st_mtime_ns, st.st_size, st.st_ctime_ns


def patched(st: os.stat_result, **fields: int) -> os.stat_result:
    """`st` with other values in some of st_mode, st_nlink, st_uid, st_gid, st_size, st_atime_ns and st_mtime_ns."""
    values, named = list(st), {name: getattr(st, name) for name in _NAMED_FIELDS}
    for name, value in fields.items():
        if name in named:
            named[name] = value
        else:
            values[_NUMBERED_FIELDS.index(name)] = value
    return os.stat_result(values, named)


Key = tuple[int, int]  # st_dev and st_ino: who a file is


class Inode:
    """One file, directory or whatever else of the backing.

    `lookups` counts the kernel's references, `opens` open handles, `children` inodes that are named relative to this one;
    while any is above zero, or pages are cached, the inode stays in the table.
    """

    __slots__ = (
        "_lock", "advice", "aliases", "atime_ns", "busy", "changes", "changes_told", "checked_at", "children", "counted",
        "ctime_shown", "done", "doubtful", "durable", "epoch", "error_count", "error_errno", "fd", "fd_busy", "file", "handle",
        "journaled", "kept", "key", "listed", "lookups", "losing", "made", "mtime_ns", "names", "node", "noticed", "opens",
        "reader", "retry_at", "retry_seconds", "signature", "st", "target", "through", "tries", "unlinked", "unsure", "writer",
        "xattrs",
    )  # fmt: skip

    def __init__(self, node: int, st: os.stat_result) -> None:
        self.node = node  # what the kernel calls it
        self.key = (st.st_dev, st.st_ino)
        self.aliases: frozenset[Key] = frozenset()  # what the backing calls it by names that we gave it, see `links.py`
        self.counted = False  # by us are its names: the backing shows each as a file of its own
        self.names: dict[tuple[Inode, bytes], None] = {}  # {(parent, name)}, oldest first; the root has none
        self.lookups = self.opens = self.children = 0
        self.kept = 0  # reasons to keep it known although nobody uses it: pins, an advice
        self.advice = ""  # what programs said of its use, see `rules.py`
        self.fd = -1  # O_PATH descriptor, -1 = none now
        self.fd_busy = 0  # calls under way that use `fd`
        self.handle: bytes | None = None  # name for open_by_handle_at, made when `fd` is closed
        self.reader = self.writer = -1  # descriptors for data; may be the same
        self.doubtful = False  # something went wrong with them that may have been theirs alone
        self.busy = 0  # fills and writebacks under way that use them
        self.file: CachedFile | None = None
        self.st = st  # the backing's attributes when last seen
        self.signature = signature_of(st)  # of the contents that the cached pages are of
        self.unsure = False  # a change of ours may have made the backing's signature another one, which was not seen yet
        self.noticed: tuple[int, int] | None = None  # mtime and size of the last version of others seen beside unwritten data
        self.checked_at = 0.0
        self.changes = self.changes_told = 0  # made by others: noticed so far, and when the kernel last opened it
        self.epoch = 0  # grows with every change we make, so that attributes read meanwhile are known to be stale
        self.mtime_ns = 0  # of our own last write; meaningful while file.unwritten
        self.atime_ns: int | None = None  # to be set in the backing with the unwritten data; None = nothing to set
        self.ctime_shown = (0, 0)  # (backing's ctime, the one to show instead): writeback must not be seen as a change
        self.error_count = 0  # failures of writeback; a handle that has seen fewer reports `error_errno`
        self.error_errno = 0
        self.journaled: JournalFile | None = None  # its unwritten pages in the journal
        self.retry_at = self.retry_seconds = 0.0  # writeback back-off
        self.tries = 0  # failures of writeback since it last succeeded
        self.through = 0  # writes that went to the backing at once, see `writethrough.py`
        self._lock: Lock | None = None
        self.made = False  # by us, as a regular file of one name: so its owner in the backing is who we are there
        self.unlinked = False  # its last name is gone, by our doing
        self.losing = 0  # unlinks and renames of ours under way that may take its last name
        self.done, self.durable = 1, 0  # changes of ours that the backing has, and how many of them are durable there
        self.listed: Listed | None = None  # of a directory, while the kernel may have its listing
        self.target: bytes | None = None  # of a symbolic link, once asked for; it never changes
        self.xattrs = NO_XATTRS  # what checking a path needs: values, or the errno that says why there is none

    @property
    def lock(self) -> Lock:
        """Held by truncate, writeback and whatever sets times or mode: one at a time. Most inodes never need one."""
        if self._lock is None:
            self._lock = Lock()
        return self._lock

    @property
    def locked(self) -> bool:
        return self._lock is not None and self._lock.locked()

    def is_called(self, st: os.stat_result) -> bool:
        """Whether the backing calls it so, by one of its names."""
        key = (st.st_dev, st.st_ino)
        return key == self.key or key in self.aliases

    @property
    def unsynced(self) -> bool:
        """Whether the backing may have something of it that is not durable there."""
        return self.durable < self.done

    @property
    def unwritten(self) -> bool:
        return self.file is not None and self.file.unwritten

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.st.st_mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.st.st_mode)

    @property
    def in_use(self) -> bool:
        kept = self.kept and not self.unlinked
        return bool(self.lookups or self.opens or self.children or self.busy or self.fd_busy or kept)

    def attributes(self) -> "Attributes":
        """What programs are to see: the backing's attributes, but for what they wrote and we have not."""
        st, file = self.st, self.file
        if self.counted and st.st_nlink < len(self.names):
            st = patched(st, st_nlink=len(self.names))
        if file is None:
            return Attributes(st, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
        theirs, shown = self.ctime_shown
        if file.unwritten:
            ctime_ns = shown if theirs == st.st_ctime_ns else max(shown, st.st_ctime_ns)
            if self.atime_ns is not None:
                st = patched(st, st_atime_ns=self.atime_ns)
            return Attributes(st, file.size, self.mtime_ns, ctime_ns)
        return Attributes(st, file.size, st.st_mtime_ns, shown if theirs == st.st_ctime_ns else st.st_ctime_ns)


@dataclass(slots=True)
class Listed:
    """A listing that the kernel was let keep: of which state of the directory, and when it was read, with attributes or not.

    `stamp` is mtime and ctime (ns); far away, where they are not asked for, the time of the reading.
    """

    stamp: object
    read_at: float
    with_attributes: bool = False


class Attributes(NamedTuple):
    """Attributes as programs see them; `st` has those that are always the backing's."""

    st: os.stat_result
    size: int
    mtime_ns: int
    ctime_ns: int


class InodeTable:
    """Every inode that is known, by what the kernel calls it and by identity."""

    def __init__(self, root_st: os.stat_result) -> None:
        self.root = Inode(ROOT_NODE, root_st)
        self.root.lookups = 1
        self._device = root_st.st_dev
        self._by_node = {ROOT_NODE: self.root}
        self._by_key = {self.root.key: self.root}
        self._by_name: dict[tuple[Inode, bytes], Inode] = {}  # of all that had a name (`Inode.names`) who was seen there last
        self._next_node = FIRST_MADE_UP_NODE

    def __len__(self) -> int:
        return len(self._by_node)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._by_node.values())

    def get(self, node: int) -> Inode:
        """The inode that the kernel calls `node`; KeyError if it should not know any such."""
        return self._by_node[node]

    def known(self, st: os.stat_result) -> Inode | None:
        return self._by_key.get((st.st_dev, st.st_ino))

    def add(self, st: os.stat_result) -> Inode:
        """The inode of these attributes, new if its identity is."""
        inode = self._by_key.get((st.st_dev, st.st_ino))
        if inode is None:
            inode = Inode(self._node_for(st), st)
            self._by_node[inode.node] = self._by_key[inode.key] = inode
        return inode

    def _node_for(self, st: os.stat_result) -> int:
        if st.st_dev == self._device and st.st_ino > ROOT_NODE and st.st_ino not in self._by_node:
            return st.st_ino
        self._next_node += 1
        return self._next_node

    def named(self, parent: Inode, name: bytes) -> Inode | None:
        """The inode that was last seen as `name` in `parent`, if it is known and nothing has been seen in its place."""
        return self._by_name.get((parent, name))

    def name(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Notes that `inode` was found as `name` in `parent`."""
        key = (parent, name)
        if key not in inode.names:
            inode.names[key] = None
            parent.children += 1
        self._by_name[key] = inode

    def unname(self, inode: Inode, parent: Inode, name: bytes) -> None:
        key = (parent, name)
        if key in inode.names:
            del inode.names[key]
            parent.children -= 1
            if self._by_name.get(key) is inode:
                del self._by_name[key]

    def nothing_at(self, parent: Inode, name: bytes) -> None:
        """Notes that there is nothing of that name. An inode that had it may still be tried there, should this be wrong."""
        self._by_name.pop((parent, name), None)

    def paths(self, inode: Inode) -> tuple[bytes, ...]:
        """Its names as paths relative to the root, oldest first, a few of them at most."""
        return tuple(self.path_in(parent, name) for parent, name in islice(inode.names, PATHS_MOST))

    def path_in(self, parent: Inode, name: bytes) -> bytes:
        """The path of `name` in `parent` relative to the root."""
        parts = [name]
        while parent is not self.root and parent.names:
            parent, name = next(iter(parent.names))
            parts.append(name)
        return b"/".join(reversed(parts))

    def drop(self, inode: Inode) -> list[Inode]:
        """Forgets an inode that nobody uses, and parents that were kept for it alone; returns those, for their descriptors.

        Does nothing while it is in use or has cached pages.
        """
        dropped = []
        while inode is not self.root and not inode.in_use and not (inode.file and inode.file.resident_pages):
            if self._by_node.get(inode.node) is not inode:  # dropped before; the number may be another file's by now
                break
            del self._by_node[inode.node]
            self._forget_keys(inode)
            dropped.append(inode)
            parents = [parent for parent, _ in inode.names]
            for parent, name in list(inode.names):
                self.unname(inode, parent, name)
            if not parents:
                break
            for parent in parents[1:]:
                dropped += self.drop(parent)
            inode = parents[0]
        return dropped

    def renumbered(self, inode: Inode) -> None:
        """The file is gone and its number may come back as another file's: that one will get an inode of its own."""
        self._forget_keys(inode)
        inode.aliases = frozenset()

    def _forget_keys(self, inode: Inode) -> None:
        for key in (inode.key, *inode.aliases):
            if self._by_key.get(key) is inode:
                del self._by_key[key]

    def alias(self, inode: Inode, st: os.stat_result) -> None:
        """The backing shows another name of the inode as a file of its own, with these attributes."""
        key = (st.st_dev, st.st_ino)
        if key != inode.key and self._by_key.setdefault(key, inode) is inode:
            inode.aliases |= {key}
            inode.counted = True

    def unalias(self, inode: Inode, st: os.stat_result) -> None:
        """What the backing calls so is another file by now."""
        key = (st.st_dev, st.st_ino)
        if key in inode.aliases:
            inode.aliases -= {key}
            if self._by_key.get(key) is inode:
                del self._by_key[key]

    def rebind(self, inode: Inode, st: os.stat_result) -> None:
        """The inode is another file of the backing from now on; for the kernel, and whoever has it open, it is the same."""
        same, aliases = inode.is_called(st), inode.aliases
        self.renumbered(inode)
        inode.key = (st.st_dev, st.st_ino)
        if same:  # it was this one all the time
            inode.aliases = aliases - {inode.key}
            self._by_key |= dict.fromkeys(inode.aliases, inode)
        self._by_key[inode.key] = inode  # one that was found there meanwhile is an inode of its own, as if it were gone

    def check(self) -> None:
        children: dict[Inode, int] = {}
        for inode in self:
            assert self._by_node[inode.node] is inode
            for parent, _ in inode.names:
                children[parent] = children.get(parent, 0) + 1
        for key, inode in self._by_name.items():
            assert key in inode.names and self._by_node.get(inode.node) is inode, "a name of an inode that is not known by it"
        for inode in self:
            assert inode.children == children.get(inode, 0), "children miscounted"
            assert inode.lookups >= 0 and inode.opens >= 0 and inode.busy >= 0 and inode.fd_busy >= 0
