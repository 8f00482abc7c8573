"""The journal of one mount: what programs have written and the backing has not, kept where a dead daemon does not take it along.

`Journal` knows files and pages, no inodes and no paths but those it is told to write down. For each file it keeps which
of its entries has the latest bytes of each page (`cover`). An entry is a run of pages that one write put into slots; it
goes when none of its pages is the latest any more: each was written to again, written back, or cut off. So the slots in
use are bounded by what is unwritten, and a journal that is read anew gives exactly the unwritten pages.
"""

import contextlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence

from cachefs.cache.page import FIRST, PAGE_SHIFT, PAGE_SIZE
from cachefs.journal.index import VERSION, Index, Key, Row
from cachefs.journal.records import FileRecord, PagesRecord, checksum, pack_file, pack_pages
from cachefs.journal.slots import JournalFull, Run, SlotFile, SlotMap

INDEX_FILE, DATA_FILE, SYNCED_FILE = "index.mdb", "data", "synced.mdb"
DEAD_MOST = 64  # entries of a file that the index may name although they are superseded: to delete many at a time is cheap
key_of = struct.Struct(">Q").pack


class Entry:
    """Pages in slots. `live` is a mask of those of which it has the latest bytes; `synced`: the durable index names it too."""

    __slots__ = ("checksum", "live", "page", "run", "seq", "synced")

    def __init__(self, seq: int, page: int, run: Run, data_checksum: int) -> None:
        self.seq = seq
        self.page = page
        self.run = run
        self.live = FIRST[run[1]]
        self.checksum = data_checksum
        self.synced = False


class JournalFile:
    """One file with pages in the journal. Owned by `Journal`; callers read `record` and change it with `Journal.note`."""

    __slots__ = ("cover", "dead", "record", "stale", "synced", "tail")

    def __init__(self, record: FileRecord) -> None:
        self.record = record
        self.tail = record.tail()
        self.cover: dict[int, Entry] = {}  # {page: the entry with its latest bytes}
        self.dead: list[Entry] = []  # superseded, and named by the index still
        self.stale: set[Entry] = set()  # live, but of fewer pages than the index says
        self.synced: set[Entry] = set()  # what the durable index names


class Journal:
    """Slots, index and what is known of both. `directory` is this mount's alone.

    Raises JournalFull where pages have to be written back first, OSError where the disk refuses; then nothing has changed.
    """

    def __init__(
        self,
        directory: str,
        size_bytes: int,
        meta: Mapping[bytes, bytes],
        left: Iterable[tuple[FileRecord, Sequence[PagesRecord]]] = (),
    ) -> None:
        """`left`: what a predecessor left, with which `files` begins. The old index is replaced by a new one, or stays."""
        self.directory = directory
        self.slots = SlotMap(size_bytes // PAGE_SIZE)
        self.data = SlotFile(os.path.join(directory, DATA_FILE))
        self.files: dict[int, JournalFile] = {}
        self.seq = 0  # of the last record
        self._last_file = 0
        self._undeleted: list[Key] = []  # rows that the index was to lose when it could not be written
        path = os.path.join(directory, INDEX_FILE)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".new")
        self.index = Index(path + ".new", self.slots.count)
        self.index.commit([(self.index.meta, b"version", str(VERSION).encode())])
        self.index.commit([(self.index.meta, key, value) for key, value in meta.items()])
        for record, pages in left:
            self.index.commit(self._adopt(record, pages))
        os.rename(path + ".new", path)

    # --- writing down ------------------------------------------------------------------------------------------------

    def add(self, record: FileRecord) -> JournalFile:
        """A file that has no pages here yet; `record.file` is given by us. Nothing is written down before its first page is."""
        self._last_file += 1
        record.file = self._last_file
        return JournalFile(record)

    def put(self, file: JournalFile, page: int, data: memoryview) -> None:
        """Writes down pages from `page` on, whole ones, 256 at most, and the file's record. They survive us from then on."""
        if len(file.dead) >= DEAD_MOST:
            self._delete(self._dead_rows(file))
            file.dead.clear()
        runs = self.slots.take(len(data) >> PAGE_SHIFT)
        try:
            self.data.write(runs, data)
            entries = self._entries(page, runs, data)
            file.record.seq = self.seq
            self.index.commit(self._file_row(file), [self._row(file, entry) for entry in entries])
        except BaseException:
            for run in runs:
                self.slots.give(run)
            raise
        for entry in entries:
            self._supersede(file, entry)
        self.files[file.record.file] = file

    def _entries(self, page: int, runs: list[Run], data: memoryview) -> list[Entry]:
        entries = []
        at = 0
        for run in runs:
            self.seq += 1
            stop = at + (run[1] << PAGE_SHIFT)
            entries.append(Entry(self.seq, page + (at >> PAGE_SHIFT), run, checksum(data[at:stop])))
            at = stop
        return entries

    def _file_row(self, file: JournalFile) -> list[Row]:
        return [(self.index.files, key_of(file.record.file), pack_file(file.record, file.tail))]

    def _supersede(self, file: JournalFile, entry: Entry) -> None:
        """`entry` has the latest bytes of its pages from now on."""
        cover = file.cover
        for page in range(entry.page, entry.page + entry.run[1]):
            old = cover.get(page)
            cover[page] = entry
            if old is not None:
                self._lose(file, old, page)

    def unsync(self, file: JournalFile, entries: Iterable[Entry]) -> None:
        """The durable index does not name these any more."""
        for entry in entries:
            entry.synced = False
            file.synced.discard(entry)
            if not entry.live:
                self.slots.give(entry.run)

    def _lose(self, file: JournalFile, entry: Entry, page: int) -> None:
        """The entry does not have the latest bytes of this page any more.

        A newer entry has, and says so by its number; once that one goes, `remove` has to bring the rows of older ones up to date.
        """
        entry.live &= ~(1 << (page - entry.page))
        if entry.live:
            file.stale.add(entry)
            return
        file.stale.discard(entry)
        file.dead.append(entry)
        if not entry.synced:
            self.slots.give(entry.run)

    def _delete(self, rows: list[Key], puts: Iterable[Row] = ()) -> None:
        """Removes rows from the index, those first that could not be removed the last time."""
        rows = self._undeleted + rows
        try:
            self.index.commit(puts, deletes=rows)
            self._undeleted = []
        except BaseException:
            self._undeleted = rows
            raise

    def _dead_rows(self, file: JournalFile) -> list[Key]:
        return [(self.index.pages, key_of(entry.seq)) for entry in file.dead]

    def note(self, file: JournalFile) -> None:
        """Writes down the file's record, which the caller has changed; nothing for a file without pages here."""
        if file.cover:
            self.seq += 1
            file.record.seq = self.seq
            file.tail = file.record.tail()
            self.index.commit(self._file_row(file))

    # --- letting go --------------------------------------------------------------------------------------------------

    def remove(self, file: JournalFile, pages: Iterable[int], last_seq: int, keep: bool = False) -> None:
        """The backing has these pages as they were when `last_seq` was the last record. With its last page the file goes.

        With `keep` its record stays until a `remove` without.
        """
        cover = file.cover
        gone = [page for page in pages if (entry := cover.get(page)) is not None and entry.seq <= last_seq]
        for page in gone:
            self._lose(file, cover.pop(page), page)
        rows = self._dead_rows(file)
        file.dead.clear()
        if cover or keep:
            self.seq += 1
            file.record.seq = self.seq
            self._delete(rows, [*self._file_row(file), *(self._row(file, entry) for entry in file.stale)])
            file.stale.clear()
        else:
            self.files.pop(file.record.file, None)
            self._delete([*rows, (self.index.files, key_of(file.record.file))])

    # --- what a predecessor left ---------------------------------------------------------------------------------------

    def _adopt(self, record: FileRecord, pages: Iterable[PagesRecord]) -> list[Row]:
        """Takes in what was found of a file: of two entries for a page the later counts. Returns the rows of those that do."""
        file = JournalFile(record)
        self._last_file += 1
        record.file = self._last_file
        for found in sorted(pages, key=lambda found: found.seq):
            self.seq += 1
            entry = Entry(self.seq, found.page, (found.slot, found.count), found.checksum)
            entry.live = 0
            file.cover.update(dict.fromkeys(found.pages, entry))
        live = sorted(set(file.cover.values()), key=lambda entry: entry.seq)
        for page, entry in file.cover.items():
            entry.live |= 1 << (page - entry.page)
        for entry in live:
            self.slots.claim(entry.run)
        record.seq = self.seq
        self.files[record.file] = file
        return [*(self._row(file, entry) for entry in live), *self._file_row(file)]

    def _row(self, file: JournalFile, entry: Entry) -> Row:
        slot, count = entry.run
        packed = pack_pages(entry.seq, file.record.file, entry.page, slot, count, entry.checksum, entry.live)
        return self.index.pages, key_of(entry.seq), packed

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        return self.slots.used * PAGE_SIZE

    def close(self, needed: bool = False) -> None:
        """Closes the files, and removes them where nothing is in them that is not on the backing, unless they are `needed`."""
        empty = not self.files and not needed
        self.index.close()
        self.data.close()
        if empty:
            for name in (INDEX_FILE, DATA_FILE, SYNCED_FILE):
                path = os.path.join(self.directory, name)
                if os.path.exists(path):
                    os.unlink(path)

    def check(self) -> None:
        """Asserts that covers, counts and slots agree."""
        self.slots.check()
        taken = 0
        for file in self.files.values():
            entries = set(file.cover.values())
            for entry in entries:
                live = [page for page in range(entry.page, entry.page + entry.run[1]) if file.cover.get(page) is entry]
                assert entry.live == sum(1 << (page - entry.page) for page in live), "live pages miscounted"
            taken += sum(entry.run[1] for entry in entries | file.synced)
        assert taken <= self.slots.used, "slots that nobody took"


__all__ = ["Entry", "Journal", "JournalFile", "JournalFull"]
