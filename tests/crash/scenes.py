"""Campaigns with their usual cast: four writers of files and one for each way that SQLite keeps a journal."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from campaign import ORDINARY, Campaign, Faults
from daemons import Place, Spawner
from database import SqliteWriter
from writers import FileWriter, Writer

from cachefs.config import OPTIONS

FILE_WRITERS = 4
FAULTS_SAY = re.compile(rf"{ORDINARY.pattern}|cannot write to the backing: (EIO|ENOSPC|EDQUOT) |cannot be written now \(")
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
    writers: list[Writer] = [
        FileWriter(number, records, synchronous=synchronous, patient=faults) for number in range(1, FILE_WRITERS + 1)
    ]
    writers += [SqliteWriter(100 + i, records, *how) for i, how in enumerate(SQLITE)] if sqlite else []
    spawner = Spawner()
    place = Place(base, spawner)
    found = False
    try:
        plan, ordinary = (Faults(base / "faults"), FAULTS_SAY) if faults else (None, ORDINARY)
        yield Campaign(place, writers, seed, options=options, ordinary=ordinary, faults=plan)
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


def seed_of(what: str) -> int:
    """The seed of a test: CACHEFS_CRASH_SEED if it is set, else one that is the same in each run. Printed, to be found again."""
    asked = os.environ.get("CACHEFS_CRASH_SEED")
    seed = int(asked) if asked else zlib.crc32(what.encode())
    print(f"seed {seed} (CACHEFS_CRASH_SEED={seed} for the same choices again)")
    return seed


def durability(mode: str) -> list[str]:
    """The option that asks for it, where there is one."""
    return ["--durability", mode] if any(option.name == "durability" for option in OPTIONS) else []
