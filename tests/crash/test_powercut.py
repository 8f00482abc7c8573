"""Power cuts: the disk under SOURCE and the state directory loses what no flush covered; what fsync returned for is there."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aftercut import Past
from daemons import Place, Spawner
from database import SqliteWriter
from powercut import Disk, mounted, run, why_not
from record import Entry, Record
from scenes import durability, seed_of
from workload import WEIGHTS_POWER
from writers import FileWriter, StopFlag

pytestmark = [pytest.mark.mount, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

WRITERS = 3
WORK_SECONDS = 1.5
WORKS = 6  # different ones in `make crash`: what one of them shows is true of one seed
# What no fsync covered may have lost its file, or have a newer one by now: it is put aside. What was synced is looked for.
# And the index that nobody syncs may be torn, as all that it says may be older than the other's.
UNPLACED = re.compile("; what was not written is in |the journal was damaged .* the old one is ")


class Laptop:
    """SOURCE and state on one recorded disk, worked on until the power goes."""

    def __init__(self, base: Path, spawner: Spawner, options: list[str]) -> None:
        self.base, self.spawner, self.options = base, spawner, options
        self.disk = Disk(base / "recorded")
        (base / "records").mkdir()
        self.files = [FileWriter(number, base / "records", WEIGHTS_POWER) for number in range(1, WRITERS + 1)]
        self.database = SqliteWriter(100, base / "records", "wal", "FULL")
        self.entries: dict[str, list[Entry]] = {}

    def place(self, name: str) -> Place:
        """The mount before the cut or after one: another boot each time."""
        base = self.base / name
        place = Place(base, self.spawner, source=self.disk.path / "source", state=self.disk.path / "state")
        place.environment["CACHEFS_BOOT_ID"] = name
        place.options = self.options
        return place

    def work(self, seed: int) -> tuple[int, int]:
        """Records the work of all writers; the time (ns) when it began and when it ended."""
        writers = [*self.files, self.database]
        with self.disk.recording():
            place, stop = self.place("before"), StopFlag()
            try:
                for writer in writers:
                    writer.prepare(place.source)
                run("sync", "--file-system", str(place.source))  # what was prepared is not what is tested
                place.start()
                begun = time.monotonic_ns()
                for number, writer in enumerate(writers):
                    writer.start(place.path, seed + number, stop)
                assert not place.ended(WORK_SECONDS), place.log_text()
                ended = time.monotonic_ns()
                stop.set(True)
                assert [line for writer in writers for line in writer.join()] == []
            finally:
                for writer in writers:
                    writer.kill()
                place.remove()
        for writer in writers:
            record = Record(self.base / "records" / writer.name)
            self.entries[writer.name] = list(record.news())
            record.close()
        return begun, ended

    def check(self, moment_ns: int, image: Path, number: int) -> list[str]:
        """Mounts what a cut left; complaints about it on the mount, and behind it after the unmount."""
        with mounted(image, self.disk.path):
            place = self.place(f"after{number}")
            try:
                place.start()
                complaints = self._look(place, place.path, moment_ns)
                complaints += [f"the log says: {line}" for line in place.bad_lines(UNPLACED)]
                complaints += self.database.check_after_cut(place.path, moment_ns, self.entries[self.database.name])
                place.unmount()
                complaints += self._look(place, place.source, moment_ns)
                return [*complaints, place.log_text()] if complaints else []
            finally:
                place.remove()

    def _look(self, place: Place, root: Path, moment_ns: int) -> list[str]:
        recovered = [aside.data for aside in place.recovered()]
        complaints = []
        for writer in self.files:
            past = Past(writer.tree.writer, self.entries[writer.name], moment_ns, names_follow="journal" not in self.options)
            complaints += past.check(root / writer.name, recovered)
        return complaints

    def close(self) -> None:
        for writer in (*self.files, self.database):
            writer.close()


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    spawner = Spawner()
    yield spawner
    spawner.close()


@pytest.mark.parametrize("mode", ["backing", "journal"])
@pytest.mark.parametrize("cuts, work", [(4, 1), *(pytest.param(40, i, marks=pytest.mark.crash) for i in range(1, WORKS + 1))])
def test_what_fsync_returned_for_survives_a_power_cut(
    tmp_path: Path, spawner: Spawner, mode: str, cuts: int, work: int
) -> None:
    seed = seed_of(f"power {mode} {cuts} {work}")
    source = random.Random(seed)
    tuning = ["--cache-size", "16M", "--dirty-expire", source.choice(["50ms", "1s"]), "--writeback-interval", "20ms"]
    tuning += ["--write-through", source.choice(["auto", "off"])]
    laptop = Laptop(tmp_path, spawner, [*tuning, *durability(mode)])
    try:
        begun, ended = laptop.work(seed)
        moments = sorted(source.randrange(begun, ended) for _ in range(cuts))
        for number, (moment, image) in enumerate(laptop.disk.cuts(moments, source)):
            complaints = laptop.check(moment, image, number)
            assert complaints == [], f"seed {seed}, cut {number} of {cuts}: " + "\n".join(complaints)
    finally:
        laptop.close()


def test_a_disk_that_is_older_than_the_last_fsync_is_found_out(tmp_path: Path, spawner: Spawner) -> None:
    """The check of the test above can fail: here the power goes earlier than the record is told."""
    laptop = Laptop(tmp_path, spawner, ["--cache-size", "16M"])
    try:
        begun, ended = laptop.work(1)
        cuts = laptop.disk.cuts([begun + (ended - begun) // 3], random.Random(1))
        _, image = next(cuts)
        complaints = laptop.check(ended, image, 0)
        for writer in (*laptop.files, laptop.database):
            name = f"{writer.tree.writer}" if isinstance(writer, FileWriter) else writer.name
            assert any(name in line for line in complaints), (name, complaints)
    finally:
        laptop.close()
