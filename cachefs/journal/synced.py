"""The durable index of `--durability journal`: which slots have what was fsynced, so that it survives a power cut too.

The journal's own index does not: the kernel writes its pages to the disk in any order. This one is written with LMDB's own
syncs. A file's rows are replaced as a whole by each fsync, so what a row names is what was fsynced last, or newer.
"""

from collections.abc import Iterable, Sequence

from cachefs.journal.index import Index, Key, Row
from cachefs.journal.journal import key_of
from cachefs.journal.records import FileRecord, PagesRecord


class Synced:
    """Rows by file. Calls take as long as the disk does, and one is made at a time."""

    def __init__(self, path: str, slots: int) -> None:
        self.index = Index(path, slots, durable=True)
        self._seqs: dict[int, list[int]] = {}  # {file: the rows that the index has of it}

    def store(self, record: FileRecord, pages: Sequence[PagesRecord]) -> None:
        """Replaces what is known of a file, durably."""
        rows: list[Row] = [(self.index.pages, key_of(row.seq), row.pack()) for row in pages]
        rows.append((self.index.files, key_of(record.file), record.pack()))
        new = [row.seq for row in pages]
        self.index.commit(rows, deletes=self._rows(record.file, set(new)))
        self._seqs[record.file] = new

    def drop(self, files: Iterable[int]) -> None:
        """Forgets files, durably: the backing has them durably, or nobody wants them."""
        known = [file for file in files if file in self._seqs]
        deletes = [key for file in known for key in [*self._rows(file, set()), (self.index.files, key_of(file))]]
        if deletes:
            self.index.commit(deletes=deletes)
        for file in known:
            del self._seqs[file]

    def _rows(self, file: int, but: set[int]) -> list[Key]:
        return [(self.index.pages, key_of(seq)) for seq in self._seqs.get(file, []) if seq not in but]

    def __len__(self) -> int:
        return len(self._seqs)

    def close(self) -> None:
        self.index.close()
