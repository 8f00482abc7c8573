"""The journal: slots, records, what is found again, and what damage leaves."""

import contextlib
import errno
import mmap
import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.cache.page import GROUP_PAGES, GROUP_SHIFT, IN_GROUP, PAGE_SIZE
from cachefs.journal.journal import DATA_FILE, INDEX_FILE, ROWS_FILE, SYNCED_FILE, Journal, JournalFile
from cachefs.journal.load import Found, load, read
from cachefs.journal.records import (
    PAGES_LIVE,
    PAGES_MARK,
    BadRecord,
    FileRecord,
    PagesRecord,
    checksum,
    records_in,
    unpack_file,
    unpack_pages,
)
from cachefs.journal.rows import ROW_BYTES, rows_in
from cachefs.journal.slots import JournalFull, SlotMap, first_run
from cachefs.journal.synced import Synced

P = PAGE_SIZE


def a_record(number: int = 7, path: bytes = b"some/file") -> FileRecord:
    return FileRecord(0, 0, 1, number, 3 * P, 123456789, (1, 2, 3), False, False, b"handle", (path, b"other \xff\n name"))


def page(byte: int, pages: int = 1) -> memoryview:
    return memoryview(bytes([byte]) * (P * pages))


def masks(pages: Iterable[int]) -> dict[int, int]:
    """Pages by group, as `Journal.remove` wants them."""
    found: dict[int, int] = {}
    for at in pages:
        found[at >> GROUP_SHIFT] = found.get(at >> GROUP_SHIFT, 0) | 1 << (at & IN_GROUP)
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path), 64 * P, {b"source": b"/somewhere"})


def left_by(journal: Journal) -> Found:
    """What the next process would find if this one were gone now."""
    journal.check()
    return left_by_now(journal)


def left_by_now(journal: Journal) -> Found:
    """The same in the middle of something."""
    found = read(journal.index.env)
    for row in rows_in(os.path.join(journal.directory, ROWS_FILE)):
        found.add(row)
    assert not found.doubtful
    return found.followed()


def shut(journal: Journal) -> None:
    """Ends it as a kill would."""
    journal.data.close()
    journal.rows.close()
    journal.index.close()


def bytes_of(journal: Journal, found: Found, file: int) -> dict[int, bytes]:
    """{page: its latest bytes}, as a successor reads them."""
    pages: dict[int, bytes] = {}
    with open(os.path.join(journal.directory, DATA_FILE), "rb") as data:
        for row in sorted(found.pages.get(file, []), key=lambda row: row.seq):
            data.seek(row.slot * P)
            whole = data.read(row.count * P)
            pages |= {at: whole[(at - row.page) * P : (at - row.page + 1) * P] for at in row.pages}
    return pages


# --- slots -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**256 - 1), st.integers(1, 256))
def test_first_run_finds_the_lowest_run_there_is(mask: int, count: int) -> None:
    bits = "".join("1" if mask >> i & 1 else "0" for i in range(256))
    assert first_run(mask, count) == bits.find("1" * count)


@settings(max_examples=200)
@given(st.integers(1, 700), st.lists(st.integers(-40, 256), max_size=60))
def test_slots_are_never_given_twice(count: int, steps: list[int]) -> None:
    """Positive: take so many. Negative: give back one of those taken."""
    slots, taken = SlotMap(count), []
    for step in steps:
        if step == 1 and slots.used < count:
            taken.append((slots.take_one(), 1))
        elif step > 0:
            used = sum(n for _, n in taken)
            try:
                runs = slots.take(step)
            except JournalFull:
                assert used + step > count
                continue
            assert sum(n for _, n in runs) == step
            taken += runs
        elif taken:
            run = taken.pop(step % len(taken))
            slots.give_one(run[0]) if run[1] == 1 and step % 2 else slots.give(run)
        slots.check()
        numbers = [slot for first, n in taken for slot in range(first, first + n)]
        assert len(numbers) == len(set(numbers)) == slots.used and max(numbers, default=0) < count
        assert slots.runs == len(taken)


def test_a_run_is_split_where_no_hole_is_large_enough() -> None:
    slots = SlotMap(8)
    runs = [slots.take(1)[0] for _ in range(8)]
    for run in runs[::2]:
        slots.give(run)
    assert sorted(slots.take(4)) == [(0, 1), (2, 1), (4, 1), (6, 1)]


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_are_read_as_they_were_written() -> None:
    record, pages = a_record(), PagesRecord(1, 2, 3, 4, 5, 6, 7, -8, 0b10101)
    assert unpack_file(record.pack() + b"what follows") == record
    assert unpack_pages(pages.pack() + b"what follows") == pages


@settings(max_examples=300)
@given(st.data())
def test_a_record_with_a_changed_byte_is_not_taken_for_one(data: st.DataObject) -> None:
    packed = bytearray(data.draw(st.sampled_from([a_record().pack(), PagesRecord(1, 2, 3, 4, 5, 6, 7, -8, 0b10101).pack()])))
    at = data.draw(st.integers(0, (PAGES_LIVE if packed[:4] == PAGES_MARK else len(packed)) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    for unpack in (unpack_file, unpack_pages):
        with pytest.raises(BadRecord):
            unpack(bytes(packed))


@given(st.binary(max_size=300))
def test_records_are_found_in_whatever_surrounds_them(noise: bytes) -> None:
    record, pages = a_record(), PagesRecord(1, 2, 3, 4, 5, 6, 7, -8, 0b10101)
    found = list(records_in(noise + record.pack() + noise + pages.pack()[:-1] + noise + pages.pack()))
    assert record in found and pages in found


# --- the journal ---------------------------------------------------------------------------------------------------------


def test_what_was_put_is_found_by_the_next_process(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 3, page(1, 4))
    journal.put(file, 4, page(2))
    found = left_by(journal)
    assert found.meta[b"source"] == b"/somewhere" and not found.doubtful
    assert found.files[1].paths == (b"some/file", b"other \xff\n name")
    assert {at: data[0] for at, data in bytes_of(journal, found, 1).items()} == {3: 1, 4: 2, 5: 1, 6: 1}


def test_what_was_removed_is_not_found_and_an_emptied_file_neither(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1, 4))
    seq = journal.seq
    journal.put(file, 2, page(9))
    journal.remove(file, masks(range(4)), seq)
    assert {at: data[0] for at, data in bytes_of(journal, left_by(journal), 1).items()} == {2: 9}
    assert list(file.cover) == [2]
    journal.remove(file, masks([2]), journal.seq)
    found = left_by(journal)
    assert not found.files and not found.pages and not journal.slots.used


def test_pages_written_to_again_while_they_are_written_back_stay(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1, 2))
    before = journal.seq
    journal.put(file, 1, page(2))
    journal.remove(file, masks([0, 1]), before)
    assert list(file.cover) == [1]


def test_a_page_that_was_removed_does_not_come_back_with_an_older_entry_that_lives_on(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1, 3))
    journal.put(file, 0, page(2))
    journal.remove(file, masks([0]), journal.seq)
    assert set(bytes_of(journal, left_by(journal), 1)) == {1, 2}
    journal.remove(file, masks([2]), journal.seq)
    assert set(bytes_of(journal, left_by(journal), 1)) == {1}


def test_a_full_journal_says_so_and_changes_nothing(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1, 60))
    with pytest.raises(JournalFull):
        journal.put(file, 10, page(2, 5))
    assert bytes_of(journal, left_by(journal), 1)[10][0] == 1
    journal.put(file, 10, page(3, 4))
    assert journal.slots.used == 64


def test_a_disk_that_takes_no_more_changes_nothing(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1))

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        patched.setattr(os, "pwrite", full)
        journal.data.reserved = 1
        for pages in (1, 2):
            with pytest.raises(OSError, match="No space"):
                journal.put(file, 0, page(2, pages))
    assert journal.slots.used == 1
    assert bytes_of(journal, left_by(journal), 1)[0][0] == 1


def test_regression_slots_that_are_made_ready_have_nothing_of_a_predecessor_in_them(tmp_path: Path) -> None:
    """Many are filled with zeros at once, and among them could be those that were found, and claimed."""
    journal = Journal(str(tmp_path), 256 * P, {})
    file, other = journal.add(a_record()), journal.add(a_record(8))
    for at in range(100):
        journal.put_one(file, at, page(at + 1))
    journal.put(other, 0, page(200, 20))
    journal.remove(file, masks(at for at in range(100) if at % 7), journal.seq)
    expected = [bytes_of(journal, left_by(journal), number) for number in (1, 2)]
    shut(journal)
    found = load(os.path.join(journal.directory, INDEX_FILE), os.path.join(journal.directory, ROWS_FILE))
    assert found is not None
    successor = Journal(journal.directory, 256 * P, {}, [(found.files[number], found.pages[number]) for number in (1, 2)])
    new = successor.add(a_record(9))
    for at in range(150):
        successor.put_one(new, at, page(at % 250 + 1))
        successor.check()
    found = left_by(successor)
    assert [bytes_of(successor, found, number) for number in (1, 2)] == expected
    assert {at: data[0] for at, data in bytes_of(successor, found, 3).items()} == {at: at % 250 + 1 for at in range(150)}
    shut(successor)


def test_regression_a_disk_with_no_room_for_rows_has_none_for_slots(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots counted as reserved and their rows were not: the second write ended the daemon, with SIGBUS."""
    file = journal.add(a_record())
    reserve, fallocate = journal.rows.reserve, os.posix_fallocate

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal.rows, "reserve", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            journal.put_one(file, 0, page(1))
        assert not journal.data.reserved and not journal.slots.used
    monkeypatch.setattr(journal.rows, "reserve", reserve)
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, *size: full() if fd == journal.data.fd else fallocate(fd, *size))
    with pytest.raises(OSError, match="No space"):
        journal.put_one(file, 0, page(1))
    monkeypatch.undo()
    journal.put_one(file, 0, page(1))
    assert bytes_of(journal, left_by(journal), 1) == {0: bytes(page(1))}
    shut(journal)


def test_regression_a_row_claims_no_more_pages_than_it_has() -> None:
    """The mask has no checksum. What it claimed beyond was read from the slots behind, which are other files'."""
    row = PagesRecord(1, 2, 30, 4, 3, 6, 7, 8, 0b101)
    packed = bytearray(row.pack())
    packed[PAGES_LIVE : PAGES_LIVE + 32] = (2**256 - 1 - 2).to_bytes(32, "little")
    assert unpack_pages(bytes(packed)) == row
    for first, count in ((0, 0), (0, 257), (200, 57), (256, 300)):
        with pytest.raises(BadRecord):
            unpack_pages(PagesRecord(1, 2, first, 4, count, 6, 7, 8, 1).pack())


def test_a_journal_with_nothing_in_it_leaves_no_files(journal: Journal, tmp_path: Path) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1))
    journal.remove(file, masks([0]), journal.seq)
    journal.close()
    assert os.listdir(tmp_path) == []


def test_a_successor_goes_on_with_what_was_found(journal: Journal) -> None:
    file = journal.add(a_record())
    for at in (0, 2, 4, 2):
        journal.put(file, at, page(at + 1, 3))
    expected = bytes_of(journal, left_by(journal), 1)
    shut(journal)
    for _ in range(3):
        found = load(os.path.join(journal.directory, INDEX_FILE), os.path.join(journal.directory, ROWS_FILE))
        assert found is not None
        journal = Journal(journal.directory, 64 * P, {}, [(found.files[1], found.pages[1])])
        assert bytes_of(journal, left_by(journal), 1) == expected
        journal.put(journal.files[1], 0, page(99))
        expected[0] = bytes(page(99))
        shut(journal)


def test_an_index_that_is_not_to_be_built_upon_is_replaced_by_a_whole_new_one(journal: Journal, tmp_path: Path) -> None:
    """A power cut may leave an LMDB file that can be read in part and not be written to."""
    kept = journal.add(a_record())
    journal.put(kept, 3, memoryview(page(1)))
    journal.index.close()
    index = tmp_path / "index.mdb"
    index.write_bytes(b"\xa5" * index.stat().st_size)
    with pytest.raises(OSError):
        Journal(os.fspath(tmp_path), 1 << 20, {})
    successor = Journal(os.fspath(tmp_path), 1 << 20, {}, [(kept.record, journal.rows_of(kept))], anew=True)
    assert set(successor.files[kept.record.file].cover) == {3}
    successor.index.close()
    found = load(os.fspath(index))
    assert found is not None and not found.doubtful and list(found.files) == [kept.record.file]


def test_rows_that_a_power_cut_took_are_written_again_from_the_durable_index(journal: Journal) -> None:
    """Else a kill before the replay is done would find nothing of them, and a later fsync no checksum."""
    file = journal.add(a_record())
    journal.put(file, 0, page(1, 3))
    journal.put_one(file, 9, page(2))
    left, expected = (file.record, journal.rows_of(file)), bytes_of(journal, left_by(journal), 1)
    shut(journal)
    Path(journal.directory, ROWS_FILE).unlink()
    successor = Journal(journal.directory, 64 * P, {}, [left])
    assert bytes_of(successor, left_by(successor), 1) == expected
    assert sorted(successor.rows_of(successor.files[1]), key=lambda row: row.seq) == sorted(left[1], key=lambda row: row.seq)
    shut(successor)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_random_puts_and_removes_leave_what_a_dict_has(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    journal = Journal(str(tmp_path_factory.mktemp("journal")), 400 * P, {})
    files = [journal.add(a_record(number)) for number in range(3)]
    model: dict[int, dict[int, int]] = {file.record.file: {} for file in files}
    for byte in range(1, rng.randrange(2, 200)):
        file = rng.choice(files)
        kept = model[file.record.file]
        if rng.random() < 0.7:
            at = rng.randrange(300)
            count = min(rng.choice((1, 1, 1, 2, 7, 60, 256)), GROUP_PAGES - at % GROUP_PAGES)
            try:
                if count == 1 and rng.random() < 0.8:
                    journal.put_one(file, at, page(byte))
                else:
                    journal.put(file, at, page(byte, count))
            except JournalFull:
                continue
            kept.update(dict.fromkeys(range(at, at + count), byte))
        elif rng.random() < 0.2:
            journal.unsync(file, list(file.synced))
            file.synced = journal.entries_of(file)
            for entry in file.synced:
                entry.synced = True
        else:
            going = rng.sample(sorted(kept), rng.randrange(len(kept) + 1))
            journal.remove(file, masks(going), journal.seq)
            for at in going:
                del kept[at]
        journal.check()
    found = left_by(journal)
    for number, kept in model.items():
        assert {at: data[0] for at, data in bytes_of(journal, found, number).items()} == kept
        assert (number in found.files) == bool(kept)
    shut(journal)


# --- damage ----------------------------------------------------------------------------------------------------------


def filled(journal: Journal) -> JournalFile:
    file = journal.add(a_record())
    for at in range(40):
        journal.put(file, at, page(at))
    shut(journal)
    return file


def test_an_empty_index_is_none(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).touch()
    assert load(str(tmp_path / INDEX_FILE)) is None
    assert load(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize("damage", ["cut", "zeros", "noise", "head"])
def test_of_a_damaged_index_all_whole_records_are_found(journal: Journal, damage: str) -> None:
    filled(journal)
    path = Path(journal.directory, INDEX_FILE)
    raw = bytearray(path.read_bytes()[: 1 << 20])
    match damage:
        case "cut":
            raw = raw[: 2 * 4096]
        case "zeros":
            raw[:8192] = bytes(8192)  # both meta pages
        case "noise":
            raw[:8192] = random.Random(1).randbytes(8192)
        case "head":
            raw[:8192] = b"\xff" * 8192
    path.write_bytes(raw)
    found = load(str(path), os.path.join(journal.directory, ROWS_FILE))
    assert found is not None and found.doubtful and found.problems
    assert len(found.pages[1]) == 40
    assert damage == "cut" or found.files[1].paths == (b"some/file", b"other \xff\n name")


def test_a_damaged_row_is_not_taken_for_one(journal: Journal) -> None:
    filled(journal)
    path = Path(journal.directory, ROWS_FILE)
    raw = bytearray(path.read_bytes())
    raw[3 * ROW_BYTES + 20] ^= 1
    path.write_bytes(raw)
    assert {row.slot for row in rows_in(str(path))} == set(range(40)) - {3}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30))
def test_a_damaged_index_never_ends_the_process_that_loads_it(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    directory = tmp_path_factory.mktemp("journal")
    filled(Journal(str(directory), 64 * P, {}))
    path = directory / INDEX_FILE
    raw = bytearray(path.read_bytes()[: 64 * 4096])
    for _ in range(rng.randrange(1, 400)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    path.write_bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(1, len(raw))))])
    found = load(str(path), str(directory / ROWS_FILE))
    assert found is None or isinstance(found, Found)


# --- the durable index ---------------------------------------------------------------------------------------------------


def test_the_durable_index_has_what_was_synced_last(journal: Journal, tmp_path: Path) -> None:
    path = str(tmp_path / "synced.mdb")
    synced, file = Synced(path, 64), journal.add(a_record())
    journal.put(file, 0, page(1, 3))
    synced.store(file.record, journal.rows_of(file))
    journal.put(file, 1, page(2))
    synced.store(file.record, journal.rows_of(file))
    synced.close()
    found = load(path)
    assert found is not None
    assert {at: data[0] for at, data in bytes_of(journal, found, 1).items()} == {0: 1, 1: 2, 2: 1}
    synced = Synced(path, 64)
    assert not len(synced)


@pytest.mark.parametrize("removed", range(4))
def test_regression_a_close_that_is_cut_off_leaves_no_durable_index_alone(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """Alone it is what a power cut leaves, and believed: it would put bytes of an earlier fsync over later ones."""
    file = journal.add(a_record())
    journal.put(file, 0, page(1))
    synced = Synced(str(tmp_path / SYNCED_FILE), 64)
    synced.store(file.record, journal.rows_of(file))
    synced.close()
    journal.remove(file, masks([0]), journal.seq)
    unlink, left = os.unlink, removed

    def cut_off(path: str) -> None:
        nonlocal left
        if not left:
            raise InterruptedError
        left -= 1
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", cut_off)
        with contextlib.suppress(InterruptedError):
            journal.close()
    assert len(os.listdir(tmp_path)) == 4 - removed
    assert INDEX_FILE in os.listdir(tmp_path) or SYNCED_FILE not in os.listdir(tmp_path)


def test_slots_that_the_durable_index_names_are_not_used_again(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1))
    (entry,) = journal.entries_of(file)
    entry.synced = True
    file.synced = {entry}
    journal.put(file, 0, page(2))
    journal.remove(file, masks([0]), journal.seq)
    assert journal.slots.used == 1
    assert journal.data.read((entry.slot, entry.count)) == bytes(page(1))
    journal.unsync(file, {entry})
    assert not journal.slots.used


def test_regression_a_file_that_could_not_be_deleted_and_came_back_is_not_deleted(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is used again where the durable index still names it; the deletion that was left came after the new record."""
    file = journal.add(a_record())
    journal.put(file, 0, page(1))

    def full(*rows: object, **keys: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(journal.index, "commit", full)
        with pytest.raises(OSError):
            journal.remove(file, masks([0]), journal.seq)
    journal.put(file, 0, page(2))
    assert bytes_of(journal, left_by(journal), 1)[0][0] == 2 and list(left_by(journal).files) == [1]
    journal.remove(file, masks([0]), journal.seq)
    assert not left_by(journal).files


# --- a page that is written to again ---------------------------------------------------------------------------------


def test_a_page_that_is_written_to_while_it_is_written_back_stays(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1))
    before = journal.seq
    journal.put(file, 0, page(2))
    journal.remove(file, masks([0]), before)
    assert bytes_of(journal, left_by(journal), 1) == {0: bytes(page(2))}
    shut(journal)


def test_the_entry_of_a_page_that_was_written_to_again_has_the_checksum_of_its_bytes(journal: Journal) -> None:
    file = journal.add(a_record())
    for byte in (1, 2):
        journal.put(file, 0, page(byte))
    (row,) = journal.rows_of(file)
    assert row.checksum == checksum(journal.data.read((row.slot, 1)))
    shut(journal)


def test_what_the_durable_index_names_is_not_written_over(journal: Journal) -> None:
    file = journal.add(a_record())
    journal.put(file, 0, page(1))
    (row,), file.synced = journal.rows_of(file), journal.entries_of(file)
    for entry in file.synced:
        entry.synced = True
    for at in range(3):
        journal.put(file, at, page(2 + at))
    assert journal.data.read((row.slot, 1)) == bytes(page(1))
    shut(journal)


def test_a_page_that_is_written_again_goes_where_another_was_and_no_third_is_touched(journal: Journal) -> None:
    file = journal.add(a_record())
    for at in range(4):
        journal.put_one(file, at, page(at + 1))
    for byte in range(10, 30):
        journal.put_one(file, byte % 4, page(byte))
        journal.check()
        assert bytes_of(journal, left_by(journal), 1)[byte % 4] == bytes(page(byte))
        assert journal.slots.used == 4
    assert {at: data[0] for at, data in bytes_of(journal, left_by(journal), 1).items()} == {0: 28, 1: 29, 2: 26, 3: 27}
    shut(journal)


def test_a_kill_between_any_two_stores_of_a_page_written_again_leaves_one_of_its_versions(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old row goes after the new one has come, and the old bytes are not touched."""
    file = journal.add(a_record())
    for byte in (1, 2):
        journal.put_one(file, 0, page(byte))
    versions = []

    class Looking:
        """Memory that is looked at after each store."""

        def __init__(self, memory: mmap.mmap) -> None:
            self.memory = memory

        def __setitem__(self, where: slice, data: bytes) -> None:
            self.memory[where] = data
            versions.append(bytes_of(journal, left_by_now(journal), 1)[0][0])

        def __getattr__(self, name: str) -> object:
            return getattr(self.memory, name)

    monkeypatch.setattr(journal.data, "map", Looking(journal.data.map))
    monkeypatch.setattr(journal.rows, "map", Looking(journal.rows.map))
    journal.put_one(file, 0, page(3))
    assert versions == [2, 3, 3]
    shut(journal)


@pytest.mark.parametrize("pages, scattered", [(2, False), (6, True)])
def test_regression_a_kill_between_two_rows_of_one_write_leaves_no_zeros(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, pages: int, scattered: bool
) -> None:
    """The first row said the whole new size: recovery made the file that long, with zeros where nothing was written down yet."""
    file = journal.add(a_record())
    file.record.size = P
    journal.put(file, 0, page(1))
    if scattered:  # so that they take a row each
        other = journal.add(a_record(8))
        for at in range(63):
            journal.put(other, at, page(3))
        journal.remove(other, masks(range(0, 63, 2)), journal.seq)
    before, file.record.size = file.record.size, (1 + pages) * P - 100
    sizes, set_row = [], journal.rows.set

    def looked_at(slot: int, row: bytes) -> None:
        set_row(slot, row)
        found = left_by_now(journal)
        have = [at for row in found.pages[file.record.file] for at in row.pages]
        sizes.append(found.files[file.record.file].size)
        assert sizes[-1] <= (max(have) + 1) * P

    monkeypatch.setattr(journal.rows, "set", looked_at)
    journal.put(file, 1, page(2, pages), before)
    assert len(sizes) > 1 and sizes == sorted(sizes) and sizes[-1] == file.record.size == (1 + pages) * P - 100
    shut(journal)
