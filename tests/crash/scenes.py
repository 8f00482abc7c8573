"""Campaigns with their usual cast: four writers of files and one for each way that SQLite keeps a journal."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from campaign import Campaign, Faults
from daemons import Place, Spawner
from database import SqliteWriter
from writers import FileWriter, Writer

FILE_WRITERS = 4
SQLITE = (("wal", "FULL"), ("wal", "NORMAL"), ("delete", "FULL"))


@contextlib.contextmanager
def campaign(
    base: Path,
    seed: int,
    options: Sequence[str] = (),
    *,
    faults: bool = False,
    sqlite: bool = True,
    synchronous: bool = False,
    keep: bool = False,
) -> Iterator[Campaign]:
    """A campaign in the directory `base`, which is removed at the end, unless it is to be kept when something was found."""
    records = base / "records"
    records.mkdir(parents=True)
    writers: list[Writer] = [FileWriter(number, records, synchronous=synchronous, patient=faults) for number in range(1, FILE_WRITERS + 1)]
    writers += [SqliteWriter(100 + i, records, *how) for i, how in enumerate(SQLITE)] if sqlite else []
    spawner = Spawner()
    place = Place(base, spawner)
    found = False
    try:
        yield Campaign(place, writers, seed, options=options, faults=Faults(base / "faults") if faults else None)
    except BaseException:
        found = True
        raise
    finally:
        for writer in writers:
            writer.kill()
        place.remove()
        for writer in writers:
            writer.close()
        spawner.close()
        if not (found and keep):
            shutil.rmtree(base)
