"""Rules: which programs' and which files' reads are to be treated in a special way. `--rule 'comm=restic advice=noreuse'`."""

import fnmatch
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cachefs.errors import UsageError

# As posix_fadvise(2) has them. What lasts can be said of a handle; the other two are things to do at once.
SEQUENTIAL, RANDOM, NOREUSE, WILLNEED, DONTNEED = "sequential", "random", "noreuse", "willneed", "dontneed"
LASTING = (SEQUENTIAL, RANDOM, NOREUSE)
OF_RULES = (*LASTING, WILLNEED)
SEPARATOR = ";"  # between rules in one text
_EXAMPLE = "write it like 'comm=restic advice=noreuse' or 'path=*.iso advice=sequential'"


@dataclass(frozen=True, slots=True)
class Rule:
    """Who opens which file gets which advice. Globs as the shell's, but * matches slashes too; None = any."""

    advice: str
    comm: str | None = None  # name of the program
    path: str | None = None  # below the mountpoint
    uid: int | None = None

    def matches(self, comm: str, uid: int, paths: Callable[[], Iterable[str]]) -> bool:
        return (
            (self.comm is None or fnmatch.fnmatchcase(comm, self.comm))
            and (self.uid is None or self.uid == uid)
            and (self.path is None or any(fnmatch.fnmatchcase(path, self.path) for path in paths()))
        )


def advice_of(rules: Sequence[Rule], comm: str, uid: int, paths: Callable[[], Iterable[str]]) -> str:
    """The advice of the first rule that matches, or "". `paths` is called only if a rule asks for it."""
    return next((rule.advice for rule in rules if rule.matches(comm, uid, paths)), "")


def parse_rules(text: str) -> tuple[Rule, ...]:
    """The rules in a text, with `;` between them; UsageError says what is wrong."""
    return tuple(_parse(rule) for rule in text.split(SEPARATOR) if rule.strip())


def _parse(text: str) -> Rule:
    given = f"--rule {text.strip()!r}"
    try:
        words = dict(word.split("=", 1) for word in shlex.split(text))
    except ValueError:
        raise UsageError(f"{given} is not a row of NAME=VALUE: {_EXAMPLE}") from None
    unknown = [name for name in words if name not in ("comm", "path", "uid", "advice")]
    if unknown:
        raise UsageError(f"{given} speaks of {unknown[0]!r}: it may name comm, path, uid and advice")
    if words.get("advice") not in OF_RULES:
        raise UsageError(f"{given} needs advice={'|'.join(OF_RULES)}: {_EXAMPLE}")
    if len(words) == 1:
        raise UsageError(f"{given} does not say whom it is for: {_EXAMPLE}")
    uid = words.get("uid")
    if uid is not None and not (uid.isascii() and uid.isdigit()):
        raise UsageError(f"{given} needs a user's number: uid=1000")
    return Rule(words["advice"], words.get("comm"), words.get("path"), None if uid is None else int(uid))
