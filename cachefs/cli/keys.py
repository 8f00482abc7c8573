"""Keys of a terminal, one at a time, as they are pressed."""

import contextlib
import os
import re
import select
import sys
import termios
import tty
from collections.abc import Iterator

_NAMES = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x1bOA": "up", b"\x1bOB": "down"}
_KEY = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)  # what one key sends


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
        found = _KEY.match(self._typed)
        assert found is not None, "any byte is a key"
        self._typed = self._typed[found.end() :]
        return _NAMES.get(found[0]) or chr(found[0][0])


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
