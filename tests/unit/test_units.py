"""Sizes, times and bandwidths, as written and as shown."""

import pytest

from cachefs.errors import CachefsError, UsageError
from cachefs.units import format_duration, format_size, parse_bandwidth, parse_duration, parse_size

MEBI = 1 << 20


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0), ("4096", 4096), ("64K", 65536), ("512M", 512 * MEBI), ("512m", 512 * MEBI), ("2G", 2 << 30),
        ("1.5G", 3 << 29), (".5M", MEBI // 2), ("1T", 1 << 40), ("512MiB", 512 * MEBI), ("1MB", 1_000_000),
        (" 16M ", 16 * MEBI), ("16 M", 16 * MEBI), ("7B", 7),
    ],
)  # fmt: skip
def test_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(("text", "size_bytes"), [("10%", 100), ("12.5%", 125), ("0%", 0), ("100%", 1000)])
def test_size_as_a_percentage(text: str, size_bytes: int) -> None:
    assert parse_size(text, percent_of_bytes=1000) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "12X", "M", "-1M", "+1M", "1e9", "nan", "inf", "1,5G", "0x10", "1M2", "10%", "٣M", "1_000", "9" * 400,
     "99999999T"],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_size(text)
    assert "write it like" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_more_than_a_hundred_percent_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 100%"):
        parse_size("101%", percent_of_bytes=1000)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("5min", 300), ("10ms", 0.01), ("250us", 0.00025), ("2h", 7200), ("1d", 86400),
     ("1.5", 1.5), ("0", 0)],
)  # fmt: skip
def test_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5x", "-1s", "s", "5M", "inf", "10%", "99999d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it like 10ms"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "bandwidth"), [("200M", 200 * MEBI), ("200M/s", 200 * MEBI), ("100MB/s", 1e8)])
def test_bandwidth(text: str, bandwidth: float) -> None:
    assert parse_bandwidth(text) == bandwidth


def test_what_is_no_bandwidth_is_refused() -> None:
    with pytest.raises(CachefsError, match="not a bandwidth"):
        parse_bandwidth("fast")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (65536, "64 KiB"), (1536, "1.5 KiB"), (1000 * 1024, "1.0 MiB"), (3 << 29, "1.5 GiB"),
     (5 << 50, "5120 TiB")],
)  # fmt: skip
def test_size_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 us"), (0.00025, "250 us"), (0.0042, "4.2 ms"), (0.25, "250 ms"), (1.25, "1.2 s"), (12, "12 s"),
     (200, "3 m 20 s"), (7500, "2 h 5 m"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_duration_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
