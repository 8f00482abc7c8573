"""Sizes, durations and bandwidths as people write them (`512M`, `10%`, `30s`, `200M`) and read them."""

import math
import re

from cachefs.errors import UsageError

# As in dd(1) and head(1): K and KiB are 1024, KB is 1000.
_SIZE_BYTES = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _SIZE_BYTES |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}
_DURATION_SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)")
_LARGEST_SIZE_BYTES = 2**62
_LARGEST_DURATION_SECONDS = 10 * 365 * 86400.0


def parse_size(text: str, percent_of_bytes: int | None = None) -> int:
    """Bytes in `text`; a percentage is one of `percent_of_bytes` and is refused where that is None."""
    examples = "512M or 2G" if percent_of_bytes is None else "512M, 2G or 10%"
    refusal = UsageError(f"{text!r} is not a size: write it like {examples}")
    number, unit = _split(text, refusal)
    if unit == "%":
        if percent_of_bytes is None:
            raise refusal
        if number > 100:
            raise UsageError(f"{text!r} is more than there is: write at most 100%")
        return int(percent_of_bytes * number / 100)
    if unit.upper() not in _SIZE_BYTES:
        raise refusal
    size_bytes = number * _SIZE_BYTES[unit.upper()]
    if size_bytes > _LARGEST_SIZE_BYTES:
        raise UsageError(f"{text!r} is larger than any file or memory: write it like {examples}")
    return int(size_bytes)


def parse_duration(text: str) -> float:
    """Seconds in `text`."""
    refusal = UsageError(f"{text!r} is not a time: write it like 10ms, 30s or 5m")
    number, unit = _split(text, refusal)
    if unit not in _DURATION_SECONDS:
        raise refusal
    seconds = number * _DURATION_SECONDS[unit]
    if seconds > _LARGEST_DURATION_SECONDS:
        raise UsageError(f"{text!r} is more than ten years: write it like 10ms, 30s or 5m")
    return seconds


def parse_bandwidth(text: str) -> float:
    """Bytes per second in `text` (`200M` or `200M/s`)."""
    try:
        return float(parse_size(text.strip().removesuffix("/s")))
    except UsageError:
        raise UsageError(f"{text!r} is not a bandwidth: write it like 200M (bytes a second)") from None


def _split(text: str, refusal: UsageError) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text.strip())
    number = float(match[1]) if match and match[1].isascii() else math.inf
    if match is None or not math.isfinite(number):
        raise refusal
    return number, match[2]


def format_size(size_bytes: float) -> str:
    """A size for people, three digits or so: `64 KiB`, `1.5 GiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 or size == int(size) else f"{size:.1f} {unit}"


def format_duration(seconds: float) -> str:
    """A time for people: `250 us`, `4.2 ms`, `12 s`, `3 m 20 s`, `2 h 5 m`, `3 d 4 h`."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = int(seconds)
    for unit_seconds, unit, part_seconds, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit_seconds:
            return f"{whole // unit_seconds} {unit} {whole % unit_seconds // part_seconds} {part}"
    raise AssertionError("unreachable: a minute or more")
