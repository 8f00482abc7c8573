"""Self-describing contents: every 16 bytes say which writer wrote them, into which file, by which operation, and where.

So bytes that are old, misplaced or another file's are recognised, and the complaint can name what they are.
"""

from __future__ import annotations

import numpy as np

CELL = np.dtype([("writer", "u1"), ("mark", "u1"), ("file", "<u2"), ("operation", "<u4"), ("offset", "<u8")])
CELL_BYTES = CELL.itemsize
MARK = 0xC5
PAGE = 4096


def stamp(writer: int, file: int, operation: int, offset: int, length: int) -> bytes:
    """What `operation` of `writer` puts into [offset, offset + length) of its file."""
    first = offset // CELL_BYTES
    cells = np.empty(-(-(offset + length) // CELL_BYTES) - first, CELL)
    cells["writer"], cells["mark"], cells["file"], cells["operation"] = writer, MARK, file, operation
    cells["offset"] = np.arange(first, first + len(cells), dtype=np.uint64) * CELL_BYTES
    start = offset - first * CELL_BYTES
    return cells.tobytes()[start : start + length]


def describe(data: bytes, offset: int) -> str:
    """In words, what the bytes at `offset` are: the first whole cell of up to a page decides."""
    skip = -offset % CELL_BYTES
    whole = data[skip : skip + (len(data) - skip) // CELL_BYTES * CELL_BYTES] if len(data) >= skip + CELL_BYTES else b""
    if not data:
        return "nothing"
    if not data.strip(b"\0"):
        return "zeros"
    if not whole:
        return data[:CELL_BYTES].hex()
    cell = np.frombuffer(whole, CELL, 1)[0]
    if cell["mark"] != MARK:
        return f"nothing that a writer wrote ({whole[:CELL_BYTES].hex()})"
    moved = int(cell["offset"]) - (offset + skip)
    where = f", meant for {moved:+d} bytes from here" if moved else ""
    return f"file {cell['file']} of writer {cell['writer']} by operation {cell['operation']}{where}"


def explain_difference(expected: bytes | bytearray, seen: bytes) -> str:
    """Where two contents differ, page by page, and what is there instead."""
    size = "" if len(seen) == len(expected) else f"{len(seen)} bytes long instead of {len(expected)}; "
    wrong = [at for at in range(0, len(seen), PAGE) if seen[at : at + PAGE] != expected[at : at + len(seen[at : at + PAGE])]]
    lines: list[str] = []
    for at in wrong:
        mine, theirs = expected[at : at + PAGE], seen[at : at + PAGE]
        first = next((i for i in range(min(len(mine), len(theirs))) if mine[i] != theirs[i]), len(mine))
        what = f"{describe(theirs[first:], at + first)}, instead of {describe(bytes(mine[first:]), at + first)}"
        if not lines or lines[-1].partition(": ")[2] != what:
            lines.append(f"from {at + first} on: {what}")
    more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
    return f"{size}{len(wrong)} pages differ: " + "; ".join(lines[:6]) + more
