"""The journal of one mount: what programs have written and the backing has not, kept where a dead daemon does not take it along.

`Journal` knows files and pages, no inodes and no paths but those it is told to write down. For each file it keeps which
of its entries has the latest bytes of each page (`cover.py`). An entry is a run of pages that one write put into slots, with a
row that says so; it goes when none of its pages is the latest any more: each was written to again, written back, or cut
off. So the slots in use are bounded by what is unwritten, and a journal that is read anew gives exactly the unwritten pages.
"""

import contextlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cachefs.cache.page import FIRST, GROUP_SHIFT, IN_GROUP, PAGE_SHIFT, PAGE_SIZE, runs
from cachefs.journal.cover import Cover, Entry, Lost, Masks
from cachefs.journal.index import VERSION, Index, Key, Row
from cachefs.journal.records import PAGES_BYTES, FileRecord, PagesRecord, checksum, pack_file, pack_pages
from cachefs.journal.rows import NOTHING, ROW_BYTES, Rows, rows_in
from cachefs.journal.setaside import sync_directory
from cachefs.journal.slots import JournalFull, SlotFile, SlotMap

INDEX_FILE, ROWS_FILE, DATA_FILE, SYNCED_FILE = "index.mdb", "rows", "data", "synced.mdb"
ONE_LIVE = (1).to_bytes(32, "little")
key_of = struct.Struct(">Q").pack


class JournalFile:
    """One file with pages in the journal. Owned by `Journal`; callers read `record` and change it with `Journal.note`."""

    __slots__ = ("cover", "record", "stale", "synced", "tail")

    def __init__(self, record: FileRecord) -> None:
        self.record = record
        self.tail = record.tail()
        self.cover = Cover()
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
        known = {entry.slot for file in self.files.values() for entry in file.cover.entries()}
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

    def put(self, file: JournalFile, page: int, data: memoryview, size_before: int | None = None, more: bool = False) -> None:
        """Writes down whole pages of one group, from `page` on, with the file's size and time. They survive us from then on.

        `more` of the same write follow, which began when the file had `size_before` bytes (None: no fewer than now). Where that
        takes several rows, each but the last says no more than what is written down by then (`_grown`).
        """
        count, size = len(data) >> PAGE_SHIFT, file.record.size
        last = _grown(size, size_before, page + count) if more else size
        if count == 1:
            self._put_first(file, page, data, last)
        elif count == 2 and file.cover and self.slots.used + 2 <= self.slots.count:
            # As appends have it. A run of two would cost half as much again.
            self._put_first(file, page, data[:PAGE_SIZE], _grown(size, size_before, page + 1))
            self._put_first(file, page + 1, data[PAGE_SIZE:], last)
        else:
            self._put_runs(file, page, data, size_before, last)

    def _put_runs(self, file: JournalFile, page: int, data: memoryview, size_before: int | None, last: int) -> None:
        runs = self.slots.take(len(data) >> PAGE_SHIFT)
        try:
            last_slot, last_count = max(runs)
            self._reserve(last_slot + last_count)
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
            size = _grown(file.record.size, size_before, page + (stop >> PAGE_SHIFT)) if stop < len(data) else last
            self._written(file, page + (at >> PAGE_SHIFT), data[at:stop], slot, size)
            at = stop

    def _written(self, file: JournalFile, page: int, data: memoryview, slot: int, size: int) -> None:
        """The pages are in slots from `slot` on: says so."""
        self.seq = seq = self.seq + 1
        count, record = len(data) >> PAGE_SHIFT, file.record
        live = ONE_LIVE if count == 1 else FIRST[count].to_bytes(32, "little")
        row = pack_pages(seq, record.file, page, slot, count, checksum(data), size, record.mtime_ns, live)
        self.rows.set(slot, row)
        if count == 1:
            self._lost(file, file.cover.put_alone(page, slot))
        else:
            self._lost(file, file.cover.put(Entry(seq, page, slot, count), page, count))

    def put_one(self, file: JournalFile, page: int, data: memoryview) -> None:
        """`put` of one page, which is a whole write: most are.

        If it was written before, it goes into the slot that the last such write left, with few calls.
        """
        record, slots, alone, i = file.record, self.slots, file.cover.alone.get(page >> GROUP_SHIFT), page & IN_GROUP
        if alone is None or i >= len(alone) or (old := alone[i]) < 0 or not 0 <= (slot := slots.spare) < self.data.used:
            self._put_first(file, page, data, record.size)
            return
        start = slot << PAGE_SHIFT
        self.data.map[start : start + PAGE_SIZE] = data
        self.seq = seq = self.seq + 1
        row = pack_pages(seq, record.file, page, slot, 1, checksum(data), record.size, record.mtime_ns, ONE_LIVE)
        rows, start = self.rows.map, slot * ROW_BYTES
        rows[start : start + PAGES_BYTES] = row
        start = old * ROW_BYTES
        rows[start : start + len(NOTHING)] = NOTHING  # not before the new one is there
        slots.spare, alone[i] = old, slot

    def _put_first(self, file: JournalFile, page: int, data: memoryview, size: int) -> None:
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
        self._written(file, page, data, slot, size)

    def _begin(self, file: JournalFile) -> None:
        """The record, right before the first row: without pages it would be taken for a truncate that has to be completed."""
        self.seq += 1
        file.record.seq = self.seq
        self._commit(self._noted_row(file))  # it may have got another name while it had no pages
        self.files[file.record.file] = file

    def _reserve(self, slots: int) -> None:
        if slots > self.data.reserved:
            self.rows.reserve(self.data.steps(slots))  # first: `data.reserved` stands for both
            self.data.reserve(slots)

    def _file_row(self, file: JournalFile) -> list[Row]:
        return [(self.index.files, key_of(file.record.file), pack_file(file.record, file.tail))]

    def _lost(self, file: JournalFile, lost: Lost) -> None:
        """Pages that were held so are not any more.

        What holds them now says so by its number; before that goes, `remove` refreshes the rows of older entries.
        """
        entries, slots = lost
        for slot in slots:
            self.rows.clear(slot)
            self.slots.give_one(slot)
        for entry in entries:
            if entry.live:
                file.stale.add(entry)
                continue
            file.stale.discard(entry)
            self.rows.clear(entry.slot)
            if not entry.synced:
                self.slots.give((entry.slot, entry.count))

    def entries_of(self, file: JournalFile) -> set[Entry]:
        """All its pages as entries, for the durable index to name."""
        file.cover.join(self.rows.seq)
        return set(file.cover.entries())

    def rows_of(self, file: JournalFile) -> list[PagesRecord]:
        """What a successor would find of its pages now, with its size and time."""
        live = {entry.slot: entry.live for entry in file.cover.entries()}
        live |= dict.fromkeys(file.cover.slots_alone(), 1)
        size, mtime_ns = file.record.size, file.record.mtime_ns
        return [replace(self.rows.get(slot), size=size, mtime_ns=mtime_ns, live=live[slot]) for slot in live]

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

    @property
    def behind(self) -> bool:
        """Whether the index has records still that it was to lose."""
        return bool(self._undeleted)

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

    def remove(self, file: JournalFile, masks: Masks, last_seq: int, keep: bool = False) -> None:
        """The backing has these pages as they were when `last_seq` was the last record. With its last page the file goes.

        With `keep` its record stays until a `remove` without. The record is written first, or goes first: what it says of
        size and signature holds whether the rows are gone or not, and rows without a record count for nothing.
        """
        going = file.cover.no_later(masks, last_seq, self.rows.seq)
        gone = sum(map(int.bit_count, going.values())) == file.cover.pages and not keep
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
            for index, mask in going.items():
                self._lost(file, file.cover.take(index, mask))
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
        rows: dict[Entry, PagesRecord] = {}
        for found in sorted(pages, key=lambda found: found.seq):
            entry = Entry(found.seq, found.page, found.slot, found.count)
            entry.live, rows[entry] = found.live, found
            for first, count in runs(found.live):
                file.cover.put(entry, found.page + first, count)
            self.seq = max(self.seq, found.seq)
        for entry in file.cover.entries():
            self.slots.claim((entry.slot, entry.count))
            self.data.left = max(self.data.left, entry.slot + entry.count)
            if rows[entry].file == record.file and self.rows.has(rows[entry]):
                self.rows.set_live(entry.slot, entry.live)
            else:  # of another file that turned out to be this one, or not written to the disk before a power cut
                self.rows.reserve(entry.slot + 1)
                size, mtime_ns = record.size, record.mtime_ns
                row = replace(rows[entry], file=record.file, size=size, mtime_ns=mtime_ns, live=entry.live)
                self.rows.set(entry.slot, row.pack())
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
        taken = runs_taken = 0
        for file in self.files.values():
            file.cover.check()
            entries, alone = {*file.cover.entries(), *file.synced}, file.cover.slots_alone()
            taken += sum(entry.count for entry in entries) + len(alone)
            runs_taken += len(entries) + len(alone)
            for row in map(self.rows.get, alone):
                assert row.file == file.record.file and file.cover.slot(row.page) == row.slot, "another row"
        assert taken <= self.slots.used, "slots that nobody took"
        assert runs_taken <= self.slots.runs, "entries miscounted"


def _grown(size: int, size_before: int | None, end_page: int) -> int:
    """What a row says of a file that grows to `size`, while what comes behind `end_page` is not written down yet.

    Were we killed then, and it said `size`, the file would get zeros that nobody wrote.
    """
    return size if size_before is None else min(size, max(size_before, end_page << PAGE_SHIFT))


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


__all__ = ["Entry", "Journal", "JournalFile", "JournalFull"]
