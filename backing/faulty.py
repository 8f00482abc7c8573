"""A store that fails when told to: for tests, on its own or under a live mount.

A plan is a list of rules, as JSON::

    [{"op": "pwritev", "after": 2, "count": 1, "errno": "EIO"},
     {"op": "*", "delay_seconds": 0.2}]

A rule looks at the calls of one operation ("*": all of them), lets the first `after` pass (0) and then strikes the next
`count` (null: for ever). It strikes with one or several of: `delay_seconds`, `hang` (until released), `errno` (the call
fails without being made), `short` (preadv and pwritev move at most so many bytes). The first rule that strikes wins.
`close` and `redirect` are counted and never spoiled.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from backing.base import Backing
from backing.wrapper import Wrapper

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")
Plan = Sequence[Mapping[str, object]]

NEVER_SPOILED = frozenset({"close", "redirect"})  # they only change what numbers mean
OPERATIONS = frozenset(Backing.__abstractmethods__) - NEVER_SPOILED
DATA_OPERATIONS = frozenset({"preadv", "pwritev"})
HANG_POLL_SECONDS = 0.05


@dataclass(slots=True, kw_only=True)
class Rule:
    """One line of a plan, with the number of calls it has looked at."""

    op: str
    after: int = 0
    count: int | None = None
    errno: int | None = None
    short: int | None = None
    delay_seconds: float = 0.0
    hang: bool = False
    seen: int = field(default=0, init=False)

    def matches(self, operation: str) -> bool:
        return self.op in ("*", operation)

    def strikes(self) -> bool:
        """Whether the call that comes now, one of those the rule matches, is one to spoil."""
        self.seen += 1
        return self.seen > self.after and (self.count is None or self.seen <= self.after + self.count)


def _checked(name: str, value: object) -> Any:
    """The value of a rule's key as Rule wants it; ValueError says what is wrong with it."""
    if name == "op" and isinstance(value, str) and (value == "*" or value in OPERATIONS):
        return value
    if name == "errno" and isinstance(value, str) and type(getattr(errno, value, None)) is int:
        return getattr(errno, value)
    if name == "hang" and isinstance(value, bool):
        return value
    if name == "count" and value is None:
        return value
    if name in ("after", "count", "short") and type(value) is int and value >= 0:
        return value
    if name == "delay_seconds" and isinstance(value, int | float) and 0 <= value < math.inf:
        return value
    raise ValueError(f"{name}: {value!r} will not do")


def rules_of(plan: object) -> list[Rule]:
    """The rules of a decoded plan; ValueError names the first that is wrong."""
    if not isinstance(plan, Sequence) or isinstance(plan, str):
        raise ValueError("a plan is a list of rules")
    rules = []
    for number, raw in enumerate(plan, 1):
        try:
            if not isinstance(raw, Mapping) or "op" not in raw:
                raise ValueError('a rule is an object with an "op"')
            rules.append(Rule(**{name: _checked(name, value) for name, value in raw.items()}))
        except ValueError as error:
            raise ValueError(f"rule {number}: {error}") from None
    return rules


def load_rules(path: str) -> list[Rule]:
    """The rules in a plan file; OSError or ValueError if it has none."""
    with open(path, encoding="utf-8") as file:
        return rules_of(json.load(file))


class FaultyBacking(Wrapper):
    """A store that fails, stalls or falls short by plan, and counts the calls that reach it.

    `plan` is a list of rules, or the path of a file with one. A file that changes is read again, and takes effect with
    the next call; while it is missing there are no faults, and while it is not a plan the last one holds.
    """

    def __init__(self, inner: Backing, plan: Plan | str = (), *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.calls: Counter[str] = Counter()
        """How often each operation was asked for."""
        self._sleep = sleep
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._path = plan if isinstance(plan, str) else None
        self._version = self._file_version()
        self._rules = load_rules(plan) if isinstance(plan, str) else rules_of(plan)
        may_stall = self._path is not None or any(rule.hang or rule.delay_seconds for rule in self._rules)
        super().__init__(inner, blocking=inner.blocking or may_stall)

    def set_plan(self, plan: Plan) -> None:
        """Replaces the rules, their counts begin anew, and lets go of calls that hang."""
        rules = rules_of(plan)
        with self._lock:
            self._use(rules)

    def release(self) -> None:
        """Lets go of the calls that hang now; the rules stay."""
        with self._lock:
            self._use(self._rules)

    def around(self, operation: str, call: Callable[..., T], args: tuple[Any, ...]) -> T:
        rule, released = self._look_up(operation)
        if rule is None:
            return call(*args)
        if rule.delay_seconds:
            self._sleep(rule.delay_seconds)
        if rule.hang:
            self._hang(released)
        if rule.errno is not None:
            raise OSError(rule.errno, os.strerror(rule.errno))
        if rule.short is not None and operation in DATA_OPERATIONS:
            fd, buffers, offset = args
            return call(fd, shortened(buffers, rule.short), offset)
        return call(*args)

    def preadv_nowait(self, fd: int, buffers: Sequence[WriteableBuffer], offset: int, /) -> int:
        """Has nothing at hand while a rule is about `preadv`, so that the rule sees every read exactly once."""
        with self._lock:
            self._reload()
            about_reads = any(rule.matches("preadv") for rule in self._rules)
        if about_reads:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return super().preadv_nowait(fd, buffers, offset)

    def _look_up(self, operation: str) -> tuple[Rule | None, threading.Event]:
        """Counts a call and finds the rule that strikes it, with the event that would end its hanging."""
        with self._lock:
            self._reload()
            self.calls[operation] += 1
            if operation in NEVER_SPOILED:
                return None, self._released
            striking = [rule for rule in self._rules if rule.matches(operation) and rule.strikes()]
            return (striking[0] if striking else None), self._released

    def _hang(self, released: threading.Event) -> None:
        while not released.wait(HANG_POLL_SECONDS if self._path else None):
            with self._lock:
                self._reload()

    def _reload(self) -> None:
        """Reads the plan file again if it is not the one last seen."""
        if self._path is None or (version := self._file_version()) == self._version:
            return
        self._version = version
        try:
            self._use(load_rules(self._path) if version else [])
        except (OSError, ValueError):
            return  # half written: the rest changes the file once more

    def _use(self, rules: list[Rule]) -> None:
        self._rules = rules
        self._released.set()
        self._released = threading.Event()

    def _file_version(self) -> tuple[int, int, int] | None:
        """What tells one state of the plan file from the next; None if there is no file."""
        try:
            found = os.stat(self._path or "")
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


def shortened(buffers: Sequence[Any], nbytes: int) -> list[memoryview]:
    """The first `nbytes` of a list of buffers."""
    kept = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")[:nbytes]
        nbytes -= len(view)
        kept.append(view)
    return kept
