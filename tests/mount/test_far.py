"""What a far away SOURCE is asked for, and how: a real sshfs, and a line that is only slow."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from far import FarMount, far_mount

pytestmark = pytest.mark.mount

MIB = 1 << 20


def flags_of(mount: FarMount, name: str) -> list[int]:
    """The flags of the daemon's descriptors of a file of SOURCE."""
    path, found = str(mount.sshfs.near / name), []
    for link in Path(f"/proc/{mount.process.pid}/fd").iterdir():
        if os.readlink(link) == path:
            found.append(int((link.parent.parent / "fdinfo" / link.name).read_text().split("flags:")[1].split()[0], 8))
    return [flags for flags in found if not flags & os.O_PATH]


def test_sshfs_is_read_past_the_kernels_cache_and_written_through_it() -> None:
    data = random.Random(1).randbytes(5 * MIB + 4321)
    with far_mount() as mount:
        mount.there("file").write_bytes(data)
        with open(mount.at("file"), "rb", buffering=0) as file:
            assert file.read(100) == data[:100]
            assert [bool(flags & os.O_DIRECT) for flags in flags_of(mount, "file")] == [True]
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            assert file.readall() == data
        with open(mount.at("file"), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"ours", MIB + 17)
            os.fsync(file.fileno())
            assert not any(flags & os.O_DIRECT for flags in flags_of(mount, "file") if flags & os.O_ACCMODE)
        assert mount.there("file").read_bytes() == data[: MIB + 17] + b"ours" + data[MIB + 21 :]
        assert mount.at("file").read_bytes() == mount.there("file").read_bytes()
