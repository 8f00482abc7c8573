"""Frames of `cachefs top`: figures of a made-up daemon, any size of terminal, any name of a file."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from cachefs.cli.keys import Keys
from cachefs.cli.topview import BARS, PLAIN_BARS, View, frame, sparkline
from cachefs.history import Sample
from test_cli import a_status

NAMES = ("a/file", "b", "line\nbreak", "\udcff\udcfe", "ü" * 100, "\x1b[31mred", "漢字" * 30, "x" * 300, "[bold]markup[/bold]")


def sample(seconds: float, hits: int, misses: int, **more: int) -> Sample:
    zeros = dict.fromkeys(Sample._fields, 0)
    return Sample(**{**zeros, "time_seconds": seconds, "page_hits": hits, "page_misses": misses, **more})  # type: ignore[arg-type]


def news(*samples: Sample, names: tuple[str | None, ...] = NAMES) -> dict[str, Any]:
    files = [
        {"path": name, "inode": i, "size": 4096 * i, "cached_bytes": 4096 * i, "dirty_bytes": 0, "page_hits": 100 - i,
         "page_misses": i, "hits_per_second": 0.0, "pinned": i == 2}
        for i, name in enumerate(names)
    ]  # fmt: skip
    statistics: Any = a_status()["statistics"]
    return {"fields": Sample._fields, "samples": samples, "statistics": statistics, "files": files, "time_seconds": 100.0}


def printed(told: dict[str, Any], width: int = 80, height: int = 24, view: View | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None, legacy_windows=False)
    console.print(frame(told, view or View(), width, height))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (10, 3), (1, 1), (300, 100)])
def test_a_frame_fits(width: int, height: int) -> None:
    lines = printed(news(sample(0, 0, 0), sample(1, 5, 5)), width, height)
    assert max(map(cell_len, lines)) <= width
    if width >= 80:
        assert len(lines) <= height


def test_names_are_one_line_each_and_steer_no_terminal() -> None:
    lines = printed(news())
    assert len(lines) == 24
    text = "\n".join(lines)
    for shown in ("line\\x0abreak", "\\xff\\xfe", "\\x1b[31mred", "[bold]markup[/bold]", "(pinned)"):
        assert shown in text
    assert "\x1b" not in text
    assert "…" in text, "the end of a long name"


def test_rates_are_those_of_the_last_seconds() -> None:
    samples = [sample(t, 1000 * t, 0, evicted_pages=10 * t, hit_bytes=4096 * t) for t in range(10)]
    latest = {"evicted_pages": 100, "hit_bytes": 4096 * 10, "written_bytes": 3 << 20, "writeback_bytes": 8192}
    samples.append(sample(10, 9000 + 3000, 1000, **latest))
    text = "\n".join(printed(news(*samples)))
    assert "83.3 % of 2000 pages/s" in text  # 5,000 hits and 1,000 misses in 3 s
    assert "evictions 10 pages/s" in text and "4 KiB/s read" in text and "writeback 8 KiB, to SOURCE 1 MiB/s" in text
    assert "75.0 % of prefetched pages used (3 used, 1 unused, 0 late)" in text


def test_sparks_are_hit_rates_and_gaps_where_nothing_was_read() -> None:
    assert sparkline([0.0, None, 0.5, 1.0], 6) == f"  {BARS[0]} {BARS[4]}{BARS[7]}"
    assert sparkline([0.0, 1.0, 0.99], 2, PLAIN_BARS) == "##"
    assert sparkline([], 3) == "   "
    text = "\n".join(printed(news(sample(0, 0, 0), sample(1, 5, 5), sample(2, 5, 5), sample(3, 15, 5))))
    assert f"{BARS[4]} {BARS[7]} " in text


def test_files_are_sorted_and_the_selection_stays_with_its_file() -> None:
    told, view = news(names=("a", "b", None, "c")), View()
    assert [file["path"] for file in view.files(told)] == ["a", "b", "c"], "all without hits lately: by hits"
    view.move(5, view.files(told))
    assert view.chosen == "c"
    told["files"][3]["hits_per_second"] = 5.0
    assert [file["path"] for file in view.files(told)] == ["c", "a", "b"]
    assert view.selected(view.files(told)) == 0
    view.move(-3, view.files(told))
    assert view.chosen == "c"
    view.next_order()
    assert (view.order, view.chosen) == ("hits", None)
    for _ in range(5):
        view.next_order()
    assert view.order == "hits"
    view.chosen = "gone"
    assert view.selected(view.files(told)) == 0
    view.move(1, [])


def test_the_selected_file_is_on_the_screen() -> None:
    told, view = news(names=tuple(f"file{i:03}" for i in range(90))), View()
    view.move(80, view.files(told))
    assert any("file080" in line for line in printed(told, view=view))


def test_a_fresh_mount_has_a_frame() -> None:
    told = news(sample(0, 0, 0), names=())
    cache = told["statistics"]["cache"]
    nothing = {"programs": {}, "readahead_used_pages": 0, "readahead_unused_pages": 0}
    told["statistics"] = {**told["statistics"], "cache": {**cache, **nothing}}
    assert "- % of 0 pages/s" in "\n".join(printed(told))


def test_keys_are_read_one_at_a_time() -> None:
    reader, writer = os.pipe()
    keys = Keys(reader)
    assert keys.next(0.0) is None
    os.write(writer, b"s\x1b[A\x1bOB\x1b[5~q\x1b")
    assert [keys.next(1.0) for _ in range(6)] == ["s", "up", "down", "\x1b", "q", "\x1b"]
    assert keys.next(0.0) is None
    os.write(writer, "ü".encode())
    assert len(str(keys.next(1.0))) == 1
    os.close(writer)
    keys.next(0.0)
    assert keys.next(1.0) == ""
    os.close(reader)
