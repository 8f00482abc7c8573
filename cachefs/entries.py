"""Entries of the ledger, as the daemon sends them and the command line shows them: an extent that is not yet on the backing.

An entry has `path` (relative to SOURCE; None if no name is known), `offset` and `length` in bytes, `error` (the errno's name of
the last try, None if nothing failed), `tries` that failed, `age_seconds` of the oldest page of that MiB, `next_try_seconds` at
the latest, and `inode`. Pure: no daemon, no terminal.
"""

from collections.abc import Iterable, Mapping
from typing import Any

Entry = Mapping[str, Any]


def merged(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The entries with neighbours in a file made one, as old as the older; the oldest first, then by name and offset."""
    found: list[dict[str, Any]] = []
    for entry in sorted(entries, key=lambda entry: (_name(entry), entry.get("inode", 0), entry["offset"])):
        last = found[-1] if found else None
        if last is not None and _follows(last, entry):
            last["length"] += entry["length"]
            last["age_seconds"] = max(last.get("age_seconds", 0), entry.get("age_seconds", 0))
            last["next_try_seconds"] = min(last.get("next_try_seconds", 0), entry.get("next_try_seconds", 0))
        else:
            found.append(dict(entry))
    found.sort(key=lambda entry: -entry.get("age_seconds", 0))
    return found


def _follows(last: Entry, entry: Entry) -> bool:
    same = all(last.get(key) == entry.get(key) for key in ("mountpoint", "path", "inode"))
    return same and last["offset"] + last["length"] == entry["offset"]


def _name(entry: Entry) -> str:
    return f"{entry.get('mountpoint', '')}\0{entry.get('path') or ''}"


def escaped(name: str) -> str:
    """A file's name as text that is always valid: a byte that is no UTF-8 becomes \\xHH, and a backslash two.

    `printf %b` makes the name of it again. Names come as Python has them, such a byte as a lone surrogate.
    """
    text = name.replace("\\", "\\\\")
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)


def printable(name: str) -> str:
    """The same for a line of a terminal: what would break the line or steer the terminal is \\xHH as well."""
    shown = escaped(name)
    return "".join(c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in c.encode()) for c in shown)
