"""The record of what was asked for and what was acknowledged, kept outside the mount: one append-only file a writer.

A writer appends an intent before each call and how it ended after it. What was appended stays, whatever becomes of the
writer and of the mount; the clock is CLOCK_MONOTONIC, the same for all processes.
"""

from __future__ import annotations

import itertools
import marshal
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

INTENT, DONE, FAILED, WRONG = "intent", "done", "failed", "wrong"
LAST_ENTRIES = 2000  # kept for a failure's report
_LENGTH = struct.Struct("<I")


class Entry(NamedTuple):
    """One line of the record."""

    what: str  # INTENT: detail is the operation; DONE: its result; FAILED: the errno; WRONG: a complaint
    time_ns: int
    detail: Any


class Record:
    """The record of one writer: appended to by its process, read by the checker's."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._read_until = 0
        self._last: deque[Entry] = deque(maxlen=LAST_ENTRIES)

    def append(self, what: str, detail: object) -> None:
        body = marshal.dumps((what, time.monotonic_ns(), detail))
        os.write(self.fd, _LENGTH.pack(len(body)) + body)

    def news(self) -> Iterator[Entry]:
        """What was appended since the last time."""
        data = os.pread(self.fd, self.size() - self._read_until, self._read_until)
        self._read_until += len(data)
        at = 0
        while at < len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            entry = Entry(*marshal.loads(data[at : at + length]))
            self._last.append(entry)
            yield entry
            at += length

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def last(self, words: set[int | str]) -> list[str]:
        """For people: the last operations on these files or paths, and the last one of all, with the time in seconds."""
        lines = []
        for intent, end in itertools.pairwise(self._last):
            if intent.what == INTENT and (words.intersection(intent.detail) or end is self._last[-1]):
                lines.append(f"{intent.time_ns / 1e9:.6f} {intent.detail} -> {end.what} {end.detail} {end.time_ns / 1e9:.6f}")
        return lines[-40:]

    def close(self) -> None:
        os.close(self.fd)
