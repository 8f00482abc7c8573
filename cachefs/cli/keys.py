"""Keys of a terminal, one at a time, as they are pressed."""

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator

_NAMES = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x1bOA": "up", b"\x1bOB": "down"}


class Keys:
    """What is typed into a terminal: characters, "up" and "down"; "" when the terminal has gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._typed = b""

    def next(self, seconds: float) -> str | None:
        """The next key within so long, or None."""
        if not self._typed:
            if not select.select([self._descriptor], [], [], max(0.0, seconds))[0]:
                return None
            try:
                self._typed = os.read(self._descriptor, 64)
            except OSError:
                return ""
            if not self._typed:
                return ""
        for sequence, name in _NAMES.items():
            if self._typed.startswith(sequence):
                self._typed = self._typed[len(sequence) :]
                return name
        key, self._typed = chr(self._typed[0]), self._typed[1:]
        if key == "\x1b":  # another key's sequence: none that is asked for
            self._typed = b""
        return key


@contextlib.contextmanager
def keys() -> Iterator[Keys]:
    """The keys of stdin, which echoes none of them meanwhile; afterwards the terminal is as it was."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield Keys(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
