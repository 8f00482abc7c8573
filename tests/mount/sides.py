"""A mount and somebody who changes SOURCE beside it: what they need, and which copies of conflicts there are."""

from __future__ import annotations

import os
from typing import Any

from mounts import Mount

PAGE = 4096
RDWR_CREAT = os.O_RDWR | os.O_CREAT
LATER = ("--dirty-expire", "1h", "--write-through", "off")  # nothing is written back unless something asks for it
KEPT = "kept as"  # in the line of the log that tells of a conflict
MODES = ("off", "open", "keep")


def copies(mount: Mount) -> dict[str, bytes]:
    """{path in SOURCE: contents} of the copies of conflicts."""
    found = sorted(mount.source.rglob("*.conflict-*"))
    return {str(path.relative_to(mount.source)): path.read_bytes() for path in found}


def the_copy(mount: Mount) -> bytes:
    (contents,) = copies(mount).values()
    return contents


def conflicts_of(mount: Mount) -> Any:
    return mount.ask("status")["statistics"]["conflicts"]  # type: ignore[index]
