"""What a predecessor left in the journal is written to the backing before the mountpoint answers.

Each file is looked for by its handle and by its paths, and taken only if it is the same one. Its pages become dirty pages
of the cache, as if they had just been written, and go the way of all dirty pages; so replaying twice is harmless, and what
the backing refuses now stays in the cache and in the journal and is tried again. What has no place any more is put aside.

A journal is *trusted* if it is whole and the machine has not been started anew since: then it holds exactly what was not
written back. Of any other one (a power cut may have left an older state of it, damage anything) a file's pages count only
while the backing's file is as it was when they were written down; where it is not, they are put aside as well.
"""

import contextlib
import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from backing.base import Backing
from cachefs.cache import leaving
from cachefs.cache.page import PAGE_SHIFT, PAGE_SIZE
from cachefs.cache.waits import NoRoom
from cachefs.config import Config
from cachefs.errors import CachefsError
from cachefs.inode import Inode, signature_of
from cachefs.journal.index import VERSION
from cachefs.journal.journal import DATA_FILE, INDEX_FILE, ROWS_FILE, SYNCED_FILE, Journal, JournalFile, JournalFull
from cachefs.journal.load import Found, load
from cachefs.journal.records import FileRecord, PagesRecord, checksum
from cachefs.journal.setaside import set_aside, sync_directory
from cachefs.journal.synced import Synced
from cachefs.stack import Stack
from cachefs.state import make_private
from cachefs.units import format_size

log = logging.getLogger(__name__)

BOOT_ID = "/proc/sys/kernel/random/boot_id"
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP)

Report = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(slots=True)
class Left:
    """What a predecessor left for one file."""

    record: FileRecord
    pages: list[PagesRecord]
    inode: Inode | None = None
    durable: bool = False  # fsynced with --durability journal: counts whatever happened to the machine


class Predecessor:
    """The journal directory as it was found. Made before there are threads."""

    def __init__(self, config: Config, directory: str) -> None:
        self.config = config
        self.directory = os.path.join(directory, "journal")
        self.aside = os.path.join(directory, "recovered")
        self.boot = boot_id()
        make_private(self.directory)
        self.index_path = os.path.join(self.directory, INDEX_FILE)
        self.found = load(self.index_path, os.path.join(self.directory, ROWS_FILE)) or Found()
        self.synced = load(os.path.join(self.directory, SYNCED_FILE)) or Found()
        if self.found.version > VERSION:
            raise CachefsError(
                f"the journal {self.directory} was written by a newer cachefs (format {self.found.version}, this one knows "
                f"{VERSION}): mount with that one, or move the directory away"
            )

    @functools.cached_property
    def rebooted(self) -> bool:
        """Whether the machine went down since. An index with no mark of a boot is what a power cut left of one."""
        mark = self.found.meta.get(b"boot")
        if mark is None and self.found.doubtful:  # of a damaged one only the raw bytes tell
            return not self._mentions_this_boot()
        return mark != self.boot

    def _mentions_this_boot(self) -> bool:
        with open(self.index_path, "rb") as file:
            return bool(self.boot) and self.boot in file.read()

    @property
    def trusted(self) -> bool:
        return not self.found.doubtful and not self.rebooted

    @property
    def left(self) -> list[Left]:
        """The files with something in the journal, those first that were changed first."""
        left = [Left(record, self.found.pages.get(record.file, [])) for record in self.found.files.values()]
        if not self.trusted:
            synced = self.synced.files
            for file in left:  # the durable index has all there was up to its record
                if file.record.file in synced:
                    file.pages = [pages for pages in file.pages if pages.seq > synced[file.record.file].seq]
            left += [Left(record, self.synced.pages.get(record.file, []), durable=True) for record in synced.values()]
        return sorted(left, key=lambda file: file.record.seq)

    def keep_damaged(self) -> str:
        """Gives the index another name; it keeps its own one too until a new index takes that."""
        kept = f"{self.index_path}.damaged-{time.strftime('%Y-%m-%dT%H-%M-%S')}"
        with contextlib.suppress(FileExistsError):
            os.link(self.index_path, kept)
        return kept

    def check_source(self, meta: dict[bytes, bytes]) -> None:
        """Refuses a journal with something in it that belongs to another SOURCE."""
        if not self.found.files and not self.synced.files:
            return
        for key in (b"source", b"root", b"handle"):
            theirs = self.found.meta.get(key, b"")
            if theirs and meta[key] and theirs != meta[key]:
                was = os.fsdecode(self.found.meta.get(b"source", b"another directory"))
                raise CachefsError(
                    f"the journal {self.directory} holds unwritten data of another SOURCE (it was {was}; is that mounted?): "
                    "mount that one, or move the journal away"
                )


def boot_id() -> bytes:
    """What changes with each start of the machine; CACHEFS_BOOT_ID says otherwise in tests."""
    named = os.environ.get("CACHEFS_BOOT_ID")
    if named:
        return named.encode()
    try:
        with open(BOOT_ID, "rb") as file:
            return file.read().strip()
    except OSError:
        return b""


def source_meta(config: Config, backing: Backing, root: Inode) -> dict[bytes, bytes]:
    """What tells this SOURCE from others; the handle is empty where there are none."""
    try:
        handle = b"" if backing.blocking else backing.file_handle(root.fd)
    except OSError:
        handle = b""
    return {b"source": os.fsencode(config.source), b"root": str(root.key[1]).encode(), b"handle": handle}


class Recovery:
    """Brings back what `predecessor` left, into `stack`; afterwards the stack's keeper has a journal."""

    def __init__(self, stack: Stack, predecessor: Predecessor, report: Report) -> None:
        self.stack = stack
        self.predecessor = predecessor
        self.report = report
        self.meta = source_meta(stack.config, stack.io.backing, stack.table.root)
        self.notes: list[str] = []  # for the user
        self.done_bytes = self.all_bytes = 0
        self._data_fd = -1

    async def run(self) -> None:
        predecessor, keeper, start = self.predecessor, self.stack.keeper, time.monotonic()
        predecessor.check_source(self.meta)
        left = predecessor.left
        self.all_bytes = sum(pages.count << PAGE_SHIFT for file in left for pages in file.pages)
        placed = await self._place(left)
        keeper.journal = journal = self._open(placed)
        for file in placed:
            await self._replay(journal, file)
        await self._settle_synced(journal)
        if left:
            keeper.replayed_files, keeper.recovery_seconds = len(placed), time.monotonic() - start
            log.info("replayed %s in %d files from the journal", format_size(keeper.replayed_bytes), len(placed))
        for note in self.notes:
            log.warning("%s", note)

    async def _place(self, left: list[Left]) -> list[Left]:
        """Those whose files are found; the others are put aside."""
        if not left:
            return []
        placed: dict[Inode, Left] = {}
        how = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC  # one that is gone is one without data: what was in it is named
        self._data_fd = os.open(os.path.join(self.predecessor.directory, DATA_FILE), how, 0o600)
        try:
            for file in left:
                if await self._placed(file):
                    assert file.inode is not None
                    if file.inode in placed:  # what was found of the file before is older
                        file.pages = [*placed[file.inode].pages, *file.pages]
                    placed[file.inode] = file
        finally:
            os.close(self._data_fd)
        return list(placed.values())

    def _open(self, placed: list[Left]) -> Journal:
        """The journal to go on with: of what was found, that which has a place. From now on it is to be trusted."""
        predecessor = self.predecessor
        slots = max((pages.slot + pages.count for file in placed for pages in file.pages), default=0)
        size_bytes = max(self.stack.config.journal_size_bytes, slots << PAGE_SHIFT)
        if predecessor.found.doubtful:
            kept = predecessor.keep_damaged()
            problems = "; ".join(sorted(set(predecessor.found.problems)))[:500]
            self.notes.append(f"the journal was damaged ({problems}): {len(placed)} files could be read; the old one is {kept}")
        try:
            left = [(file.record, file.pages) for file in placed]
            meta, anew = {**self.meta, b"boot": predecessor.boot}, not predecessor.trusted
            return Journal(predecessor.directory, size_bytes, meta, left, anew)
        except (OSError, JournalFull) as error:
            raise CachefsError(f"can't make a journal in {predecessor.directory}: {error or 'no room'}") from None

    async def _settle_synced(self, journal: Journal) -> None:
        """What the durable index had is durable on the backing, or in a new one, before the old one goes."""
        keeper, predecessor = self.stack.keeper, self.predecessor
        path = os.path.join(predecessor.directory, SYNCED_FILE)
        if predecessor.synced.files:
            found = [await self._find(record) for record in predecessor.synced.files.values()]
            try:
                await keeper.make_durable([inode for inode in found if inode is not None])
            except OSError as error:
                raise CachefsError(f"SOURCE cannot be made durable ({error.strerror}): {self._all_kept()}") from None
        durable = self.stack.config.durability == "journal"
        if durable:
            _remove(path + ".new")
            keeper.synced = Synced(path + ".new", journal.slots.count)
            for inode in list(self.stack.writeback.dirty):
                await keeper.sync(inode)
            os.rename(path + ".new", path)
        else:
            _remove(path)
        sync_directory(predecessor.directory)

    # --- finding files -----------------------------------------------------------------------------------------------------

    async def _placed(self, left: Left) -> bool:
        """Finds the file that the pages belong to, or puts them aside."""
        left.pages = [pages for pages in left.pages if self._readable(left, pages)]
        inode = await self._find(left.record)
        if inode is None:
            return self._set_aside(left, "the file is gone, or another one has its place")
        if not (self.predecessor.trusted or left.durable) and left.record.signature != signature_of(inode.st):
            return self._set_aside(left, "the file was changed after this was written down, and the machine went down meanwhile")
        left.inode = inode
        return True

    def _readable(self, left: Left, pages: PagesRecord) -> bool:
        data = os.pread(self._data_fd, pages.count << PAGE_SHIFT, pages.slot << PAGE_SHIFT)
        if len(data) == pages.count << PAGE_SHIFT and checksum(data) == pages.checksum:
            return True
        first, last = pages.page << PAGE_SHIFT, (pages.page + pages.count) << PAGE_SHIFT
        if self.predecessor.rebooted and not left.durable:
            log.info("not synced when the machine went down: %s: bytes %d to %d", _name(left.record), first, last)
        elif not self._superseded(left.record, pages):
            self.stack.keeper.lost_bytes += last - first
            self.notes.append(f"the journal is damaged: lost of {_name(left.record)}: bytes {first} to {last}")
        return False

    def _superseded(self, record: FileRecord, pages: PagesRecord) -> bool:
        """Whether later records have all of these pages, so that the slots may have been given to others."""
        rest = set(pages.pages)
        for other in self.predecessor.found.pages.get(record.file, []):
            if other.seq > pages.seq:
                rest.difference_update(other.pages)
        return not rest

    def _set_aside(self, left: Left, reason: str) -> bool:
        if left.pages:
            self.stack.keeper.set_aside_files += 1
            where = set_aside(self.predecessor.aside, self._data_fd, left.record, left.pages, reason)
            self.notes.append(f"{_name(left.record)}: {reason}; what was not written is in {where}")
        return False

    async def _find(self, record: FileRecord) -> Inode | None:
        """The very file of the record, if it is still there."""
        try:
            for path in record.paths:
                inode = await self._at(path)
                if inode is not None and inode.is_regular and await self._same(record, inode):
                    return inode
            return await self._by_handle(record)
        except OSError as error:
            raise CachefsError(f"SOURCE cannot be read ({error.strerror}): {self._all_kept()}") from None

    async def _at(self, path: bytes) -> Inode | None:
        """What is there now under a path, found one name at a time."""
        stack, inode = self.stack, self.stack.table.root
        try:
            for name in path.split(b"/"):
                inode = await stack.fs.find(inode, name)
        except OSError as error:
            if error.errno in NOT_THERE:
                return None
            raise
        return inode

    async def _same(self, record: FileRecord, inode: Inode) -> bool:
        """By its handle where there are any: numbers are given to other files when theirs are gone."""
        backing = self.stack.io.backing
        if record.handle and not backing.blocking:
            with contextlib.suppress(OSError):
                return await self.stack.descriptors.at("handle", inode, backing.file_handle) == record.handle
        return inode.key[1] == record.number or signature_of(inode.st)[:2] == record.signature[:2]

    async def _by_handle(self, record: FileRecord) -> Inode | None:
        backing = self.stack.io.backing
        if not record.handle or backing.blocking:
            return None
        try:
            fd = backing.open_handle(record.handle, os.O_PATH)
        except OSError:
            return None
        try:
            st = backing.fstat(fd)
        finally:
            backing.close(fd)
        if not st.st_nlink:
            return None
        inode = self.stack.table.add(st)
        inode.handle = record.handle
        return inode

    # --- replaying ---------------------------------------------------------------------------------------------------------

    async def _replay(self, journal: Journal, left: Left) -> None:
        inode, record = left.inode, left.record
        assert inode is not None
        file = self.stack.files.ensure_file(inode)
        ours_may_go_there = await self._keep_theirs(inode, left)
        kept = journal.files[record.file]
        inode.journaled = kept
        inode.mtime_ns = record.mtime_ns
        if kept.cover or record.cutting:  # else its first write was under way
            if ours_may_go_there and inode.st.st_size != record.size:
                self.stack.keeper.touching(inode)
                await self._resize(inode, record.size)
            leaving.truncate(self.stack.cache, file, record.size)
            self.stack.keeper.trim(inode, record.size)
        await self._load(journal, inode, kept)
        if inode.unwritten:
            await self._flush(inode)
        else:  # a truncate alone
            self.stack.keeper.forget(inode)
        self.stack.fs.drop(inode)

    async def _keep_theirs(self, inode: Inode, left: Left) -> bool:
        """Somebody else may have changed the file since: then both versions are kept. False if that could not be done.

        Where a writeback or truncate of ours was under way, their change cannot be told from it. Nor on a disk that went down
        with us: what the file has there is most likely of our own writeback after the fsync.
        """
        record, shown = left.record, signature_of(inode.st)[:2]
        if left.durable and not self.predecessor.trusted and not self.stack.io.backing.blocking:
            return True
        if record.writing or record.cutting or shown in (record.signature[:2], (record.mtime_ns, record.size)):
            return True
        async with inode.lock:
            try:
                await self.stack.files.conflicts.keep_theirs(inode)
            except OSError:
                inode.signature = record.signature  # so that writeback meets the conflict, and tells what is wrong
                return False
        return True

    async def _resize(self, inode: Inode, size: int) -> None:
        """A truncate may have been under way; for what was only written, this is done by writing as well."""
        backing = self.stack.io.backing
        try:
            await self.stack.descriptors.at("truncate", inode, backing.truncate, size)
            await self.stack.files.attributes.refresh(inode)
            inode.signature = signature_of(inode.st)
        except OSError as error:
            name = _name_of(self.stack, inode)
            raise CachefsError(f"SOURCE refuses to set the size of {name} ({error.strerror}): {self._all_kept()}") from None

    async def _load(self, journal: Journal, inode: Inode, kept: JournalFile) -> None:
        """Makes dirty pages of what the journal has. Where they have no room, some are written back first."""
        for page in list(kept.cover):
            offset, file = page << PAGE_SHIFT, inode.file
            assert file is not None
            data = journal.data.read((kept.cover.slot(page), 1))[: max(0, file.size - offset)]
            while data:
                try:
                    self.stack.cache.write(file, offset, data)
                    break
                except NoRoom:
                    await self._make_room(inode)
            self.stack.writeback.note(inode)
            self.done_bytes += PAGE_SIZE
            self.stack.keeper.replayed_bytes += len(data)
        self.report(min(self.done_bytes, self.all_bytes), self.all_bytes)

    async def _make_room(self, inode: Inode) -> None:
        try:
            await self.stack.writeback.flush(inode)
        except OSError as error:
            raise CachefsError(
                f"SOURCE refuses unwritten data ({error.strerror}), and there is more of it than --dirty-limit: "
                f"{self._all_kept()}, with a larger --dirty-limit or when SOURCE takes it"
            ) from None

    async def _flush(self, inode: Inode) -> None:
        try:
            await self.stack.writeback.flush(inode)
        except OSError as error:
            name = _name_of(self.stack, inode)
            self.notes.append(f"{name} cannot be written now ({error.strerror}): it is kept and tried again")

    def _all_kept(self) -> str:
        return f"nothing is lost, the journal keeps {format_size(self.all_bytes)}; mount again"


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _name(record: FileRecord) -> str:
    return os.fsdecode(record.paths[0]) if record.paths else f"a file without a name (inode {record.number})"


def _name_of(stack: Stack, inode: Inode) -> str:
    return stack.path(inode) or f"inode {inode.node}"
