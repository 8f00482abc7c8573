"""What is asked of the kernel about idle processors, on which machines, and that it is taken back."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cachefs.transport.cpulatency import LIGHT_SLEEP, NO_LIMIT, POLL, POLLING_MOST, CpuLatency, limit_microseconds


@pytest.mark.parametrize(
    ("driver", "processors", "limit"),
    [
        ("haltpoll", 2, POLL),
        ("haltpoll", POLLING_MOST, POLL),
        ("haltpoll", POLLING_MOST + 1, None),
        ("haltpoll", 1, None),
        ("intel_idle", 64, LIGHT_SLEEP),
        ("acpi_idle", 1, None),
        ("none", 2, None),
        (None, 2, None),
    ],
)
def test_what_is_asked_for_depends_on_the_machine(tmp_path: Path, driver: str | None, processors: int, limit: int | None) -> None:
    if driver is not None:
        (tmp_path / "driver").write_text(f"{driver}\n")
    assert limit_microseconds(str(tmp_path / "driver"), processors) == limit


@pytest.fixture
def latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CpuLatency:
    """On a machine of two processors, with a file in the device's place."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    (tmp_path / "driver").write_text("haltpoll\n")
    (tmp_path / "device").write_bytes(b"")
    return CpuLatency(True, str(tmp_path / "device"), str(tmp_path / "driver"))


def said(tmp_path: Path) -> list[int]:
    return [number for (number,) in struct.iter_unpack("=i", (tmp_path / "device").read_bytes())]


def test_it_is_asked_once_and_taken_back_once(tmp_path: Path, latency: CpuLatency) -> None:
    assert latency.usable and not latency.held
    latency.let_go()
    assert not said(tmp_path)
    for _ in range(3):
        latency.hold()
    assert latency.held and said(tmp_path) == [POLL]
    for _ in range(3):
        latency.let_go()
    assert not latency.held and said(tmp_path) == [POLL, NO_LIMIT]
    latency.close()
    assert not latency.usable


def test_the_seconds_are_those_of_holding(latency: CpuLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    latency.hold()
    now = 12.0
    assert latency.seconds == 2
    latency.let_go()
    now = 20.0
    assert latency.seconds == 2
    latency.hold()
    now = 21.0
    latency.close()
    assert latency.seconds == 3


def test_a_device_that_refuses_is_left_alone(tmp_path: Path, latency: CpuLatency, caplog: pytest.LogCaptureFixture) -> None:
    latency.close()
    (tmp_path / "driver").write_text("haltpoll\n")
    full = CpuLatency(True, "/dev/full", str(tmp_path / "driver"))
    assert full.usable
    full.hold()
    assert not full.held and not full.usable and "No space left" in caplog.text
    full.let_go()
    full.close()


@pytest.mark.parametrize("why", ["not wanted", "no device"])
def test_where_it_cannot_be_held_nothing_is_asked(tmp_path: Path, latency: CpuLatency, why: str) -> None:
    latency.close()
    device = tmp_path / ("device" if why == "not wanted" else "none")
    other = CpuLatency(why != "not wanted", str(device), str(tmp_path / "driver"))
    other.hold()
    assert not other.usable and not other.held and not said(tmp_path)
