"""The journal of one mount: what programs have written and the backing has not, kept where a dead daemon does not take it along.

`Journal` knows files and pages, no inodes and no paths but those it is told to write down. For each file it keeps which
of its entries has the latest bytes of each page (`cover`). An entry is a run of pages that one write put into slots, with a
row that says so; it goes when none of its pages is the latest any more: each was written to again, written back, or cut
off. So the slots in use are bounded by what is unwritten, and a journal that is read anew gives exactly the unwritten pages.
"""

import contextlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence

from cachefs.cache.page import FIRST, PAGE_SHIFT, PAGE_SIZE
from cachefs.journal.index import VERSION, Index, Key, Row
from cachefs.journal.records import FileRecord, PagesRecord, checksum, pack_file, pack_pages
from cachefs.journal.rows import Rows, rows_in
from cachefs.journal.setaside import sync_directory
from cachefs.journal.slots import JournalFull, SlotFile, SlotMap

INDEX_FILE, ROWS_FILE, DATA_FILE, SYNCED_FILE = "index.mdb", "rows", "data", "synced.mdb"
ONE_LIVE = (1).to_bytes(32, "little")
key_of = struct.Struct(">Q").pack


class Entry:
    """Pages in slots. `live` is a mask of those of which it has the latest bytes; `synced`: the durable index names it too."""

    __slots__ = ("checksum", "count", "live", "page", "seq", "slot", "synced")

    def __init__(self, seq: int, page: int, slot: int, count: int, data_checksum: int) -> None:
        self.seq = seq
        self.page = page
        self.slot = slot
        self.count = count
        self.live = FIRST[count]
        self.checksum = data_checksum
        self.synced = False


class JournalFile:
    """One file with pages in the journal. Owned by `Journal`; callers read `record` and change it with `Journal.note`."""

    __slots__ = ("cover", "record", "stale", "synced", "tail")

    def __init__(self, record: FileRecord) -> None:
        self.record = record
        self.tail = record.tail()
        self.cover: dict[int, Entry] = {}  # {page: the entry with its latest bytes}
        self.stale: set[Entry] = set()  # live, but of fewer pages than their rows say
        self.synced: set[Entry] = set()  # what the durable index names


class Journal:
    """Slots, rows, index and what is known of them. `directory` is this mount's alone.

    Raises JournalFull where pages have to be written back first, and nothing has changed. OSError where the disk refuses: some of
    the pages may have been written down.
    """

    def __init__(
        self,
        directory: str,
        size_bytes: int,
        meta: Mapping[bytes, bytes],
        left: Iterable[tuple[FileRecord, Sequence[PagesRecord]]] = (),
        anew: bool = False,
    ) -> None:
        """`left`: what a predecessor left, with which `files` begins; whatever else there is, is forgotten.

        `anew`: its index is not to be built upon. It stays as it is until a whole new one takes its name.
        """
        self.directory = directory
        self.slots = SlotMap(size_bytes // PAGE_SIZE)
        self.data = SlotFile(os.path.join(directory, DATA_FILE), self.slots.count)
        self.rows = Rows(os.path.join(directory, ROWS_FILE), self.slots.count)
        self.files: dict[int, JournalFile] = {}
        self.seq = 0  # of the last record
        self._last_file = 0
        self._undeleted: list[Key] = []  # rows that the index was to lose when it could not be written
        self._unnoted: dict[JournalFile, None] = {}  # with records that go along with the next ones
        path = os.path.join(directory, INDEX_FILE)
        being_made = path + ".new" if anew else path
        if anew:
            _remove(being_made)
        self.index = Index(being_made, self.slots.count)
        for record, pages in left:
            self._adopt(record, pages)
        known = {entry.slot for file in self.files.values() for entry in file.cover.values()}
        for row in rows_in(os.path.join(directory, ROWS_FILE)):
            if row.slot not in known:
                self.rows.clear(row.slot)
            self.seq = max(self.seq, row.seq)
        puts = [row for file in self.files.values() for row in self._file_row(file)]
        puts += [(self.index.meta, key, value) for key, value in {b"version": str(VERSION).encode(), **meta}.items()]
        self.index.commit(puts, self.index.keys_but(self.files))
        os.rename(being_made, path)

    # --- writing down ------------------------------------------------------------------------------------------------

    def add(self, record: FileRecord) -> JournalFile:
        """A file that has no pages here yet; `record.file` is given by us. Nothing is written down before its first page is."""
        self._last_file += 1
        record.file = self._last_file
        return JournalFile(record)

    def put(
        self, file: JournalFile, page: int, data: memoryview, size_before: int | None = None, more: bool = False
    ) -> None:
        """Writes down whole pages from `page` on, 256 at most, with the file's size and time. They survive us from then on.

        `more` of the same write follow, which began when the file had `size_before` bytes (None: no fewer than now). Where that
        takes several rows, each but the last says no more than what is written down by then (`_grown`).
        """
        count, size = len(data) >> PAGE_SHIFT, file.record.size
        last = _grown(size, size_before, page + count) if more else size
        if count == 1:
            self._put_one(file, page, data, last)
        elif count == 2 and file.cover and self.slots.used + 2 <= self.slots.count:
            # As appends have it. A run of two would cost half as much again.
            self._put_one(file, page, data[:PAGE_SIZE], _grown(size, size_before, page + 1))
            self._put_one(file, page + 1, data[PAGE_SIZE:], last)
        else:
            self._put_runs(file, page, data, size_before, last)

    def _put_runs(self, file: JournalFile, page: int, data: memoryview, size_before: int | None, last: int) -> None:
        runs = self.slots.take(len(data) >> PAGE_SHIFT)
        try:
            self._reserve(max(slot + count for slot, count in runs))
            self.data.write(runs, data)
            if not file.cover:
                self._begin(file)
        except BaseException:
            for slot, count in runs:
                self.slots.give((slot, count))
            raise
        at = 0
        for slot, count in runs:
            stop = at + (count << PAGE_SHIFT)
            self.seq += 1
            entry = Entry(self.seq, page + (at >> PAGE_SHIFT), slot, count, checksum(data[at:stop]))
            size = _grown(file.record.size, size_before, entry.page + count) if stop < len(data) else last
            self.rows.set(slot, self._row(file, entry, size))
            self._supersede(file, entry)
            at = stop

    def _put_one(self, file: JournalFile, page: int, data: memoryview, size: int) -> None:
        """`put` of one page: most writes, so through a mapping, and with no call that can be spared."""
        slot = self.slots.take_one()
        try:
            if slot >= self.data.reserved:
                self._reserve(slot + 1)
            self.data.write_one(slot, data)
            if not file.cover:
                self._begin(file)
        except BaseException:
            self.slots.give_one(slot)
            raise
        self.seq = seq = self.seq + 1
        digest, record, cover = checksum(data), file.record, file.cover
        self.rows.set(
            slot, pack_pages(seq, record.file, page, slot, 1, digest, size, record.mtime_ns, ONE_LIVE)
        )
        old = cover.get(page)
        if old is not None and old.count == 1 and not old.synced:
            self.rows.clear(old.slot)
            self.slots.give_one(old.slot)
            old.seq, old.slot, old.checksum = seq, slot, digest
            return
        cover[page] = Entry(seq, page, slot, 1, digest)
        if old is not None:
            self._lose(file, old, page)

    def _begin(self, file: JournalFile) -> None:
        """The record, right before the first row: without pages it would be taken for a truncate that has to be completed."""
        self.seq += 1
        file.record.seq = self.seq
        self._commit(self._noted_row(file))  # it may have got another name while it had no pages
        self.files[file.record.file] = file

    def _reserve(self, slots: int) -> None:
        if slots > self.data.reserved:
            self.rows.reserve(self.data.reserve(slots))

    def _row(self, file: JournalFile, entry: Entry, size: int) -> bytes:
        record, live = file.record, entry.live.to_bytes(32, "little")
        return pack_pages(
            entry.seq, record.file, entry.page, entry.slot, entry.count, entry.checksum, size, record.mtime_ns, live
        )

    def _file_row(self, file: JournalFile) -> list[Row]:
        return [(self.index.files, key_of(file.record.file), pack_file(file.record, file.tail))]

    def _supersede(self, file: JournalFile, entry: Entry) -> None:
        """`entry` has the latest bytes of its pages from now on."""
        cover = file.cover
        for page in range(entry.page, entry.page + entry.count):
            old = cover.get(page)
            cover[page] = entry
            if old is not None:
                self._lose(file, old, page)

    def _lose(self, file: JournalFile, entry: Entry, page: int) -> None:
        """The entry does not have the latest bytes of this page any more.

        A newer entry has, and says so by its number; before that one goes, `remove` refreshes the rows of older ones.
        """
        if entry.count > 1:
            entry.live &= ~(1 << (page - entry.page))
            if entry.live:
                file.stale.add(entry)
                return
            file.stale.discard(entry)
        entry.live = 0
        self.rows.clear(entry.slot)
        if entry.synced:
            return
        if entry.count == 1:
            self.slots.give_one(entry.slot)
        else:
            self.slots.give((entry.slot, entry.count))

    def note(self, file: JournalFile) -> None:
        """Writes down the file's record, which the caller has changed; nothing for a file without pages here."""
        self.note_later(file)
        self.settle()

    def note_later(self, file: JournalFile) -> None:
        """The same of a change that the file is safe without: it goes along with the next record of any file, or `settle`."""
        if file.cover:
            self.seq += 1
            file.record.seq = self.seq
            self._unnoted[file] = None

    def settle(self) -> None:
        """Writes down what was noted and is not written yet."""
        if self._unnoted:
            self._commit()

    def _commit(self, puts: Sequence[Row] = (), deletes: Sequence[Key] = ()) -> None:
        """Changes the index, with what was to go along; what cannot be written now goes along with the next."""
        rows = [*(row for file in self._unnoted for row in self._noted_row(file)), *puts]
        back = {key for _, key, _ in rows}  # a file whose record could not be deleted may have come back
        deletes = [*self._undeleted, *deletes]
        try:
            self.index.commit(rows, [key for key in deletes if key[1] not in back])
        except BaseException:
            self._undeleted = deletes
            raise
        self._undeleted = []
        self._unnoted.clear()

    def _noted_row(self, file: JournalFile) -> list[Row]:
        file.tail = file.record.tail()
        return self._file_row(file)

    # --- letting go --------------------------------------------------------------------------------------------------

    def remove(self, file: JournalFile, pages: Iterable[int], last_seq: int, keep: bool = False) -> None:
        """The backing has these pages as they were when `last_seq` was the last record. With its last page the file goes.

        With `keep` its record stays until a `remove` without. The record is written first, or goes first: what it says of
        size and signature holds whether the rows are gone or not, and rows without a record count for nothing.
        """
        cover = file.cover
        going = {page for page in pages if (entry := cover.get(page)) is not None and entry.seq <= last_seq}
        gone = len(going) == len(cover) and not keep
        self.seq += 1
        file.record.seq = self.seq
        self._unnoted.pop(file, None)
        try:
            if gone:
                self.files.pop(file.record.file, None)
                self._commit(deletes=[(self.index.files, key_of(file.record.file))])
            else:
                self._commit(self._noted_row(file))
        finally:  # a record that could not be written costs a comparison with an old signature, no more
            self._refresh(file)
            for page in going:
                self._lose(file, cover.pop(page), page)
            self._refresh(file)

    def _refresh(self, file: JournalFile) -> None:
        """Has the rows of older entries say what is left of them."""
        for entry in file.stale:
            self.rows.set_live(entry.slot, entry.live)
        file.stale.clear()

    def unsync(self, file: JournalFile, entries: Iterable[Entry]) -> None:
        """The durable index does not name these any more."""
        for entry in entries:
            entry.synced = False
            file.synced.discard(entry)
            if not entry.live:
                self.slots.give((entry.slot, entry.count))

    # --- what a predecessor left ---------------------------------------------------------------------------------------

    def _adopt(self, record: FileRecord, pages: Iterable[PagesRecord]) -> None:
        """Takes in what was found of a file: of two rows for a page the later counts."""
        file = JournalFile(record)
        owners: dict[int, int] = {}  # {slot: the file that its row names}
        for found in sorted(pages, key=lambda found: found.seq):
            entry = Entry(found.seq, found.page, found.slot, found.count, found.checksum)
            entry.live = 0
            owners[found.slot] = found.file
            file.cover.update(dict.fromkeys(found.pages, entry))
            self.seq = max(self.seq, found.seq)
        for page, entry in file.cover.items():
            entry.live |= 1 << (page - entry.page)
        for entry in set(file.cover.values()):
            self.slots.claim((entry.slot, entry.count))
            if owners[entry.slot] == record.file:
                self.rows.set_live(entry.slot, entry.live)
            else:
                self.rows.set(entry.slot, self._row(file, entry, record.size))
        self.seq = max(self.seq, record.seq)
        self._last_file = max(self._last_file, record.file)
        self.files[record.file] = file

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        return self.slots.used * PAGE_SIZE

    def close(self, needed: bool = False) -> None:
        """Closes the files, and removes them where nothing is in them that is not on the backing, unless they are `needed`."""
        empty = not self.files and not needed
        if not empty:
            with contextlib.suppress(OSError, JournalFull):
                self.settle()
        self.index.close()
        self.rows.close()
        self.data.close()
        if empty:
            for name in (SYNCED_FILE, INDEX_FILE, ROWS_FILE, DATA_FILE):  # the durable index alone would be believed
                _remove(os.path.join(self.directory, name))
            sync_directory(self.directory)  # an index that came back after a power cut would be taken for the last one

    def check(self) -> None:
        """Asserts that covers, masks and slots agree."""
        self.slots.check()
        taken = runs = 0
        for file in self.files.values():
            entries = set(file.cover.values())
            for entry in entries:
                live = [page for page in range(entry.page, entry.page + entry.count) if file.cover.get(page) is entry]
                assert entry.live == sum(1 << (page - entry.page) for page in live), "live pages miscounted"
            taken += sum(entry.count for entry in entries | file.synced)
            runs += len(entries | file.synced)
        assert taken <= self.slots.used, "slots that nobody took"
        assert runs <= self.slots.runs, "entries miscounted"


def _grown(size: int, size_before: int | None, end_page: int) -> int:
    """What a row says of a file that grows to `size`, while what comes behind `end_page` is not written down yet.

    Were we killed then, and it said `size`, the file would get zeros that nobody wrote.
    """
    return size if size_before is None else min(size, max(size_before, end_page << PAGE_SHIFT))


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


__all__ = ["Entry", "Journal", "JournalFile", "JournalFull"]
