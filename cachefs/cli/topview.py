"""One frame of `cachefs top`, made of what the daemon says; nothing here asks, and only the order of files is decided."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cachefs.entries import printable
from cachefs.units import format_duration, format_size

Figures = Mapping[str, Any]
ORDERS = {
    "hits/s": "hits_per_second", "hits": "page_hits", "misses": "page_misses", "cached": "cached_bytes", "dirty": "dirty_bytes",
}  # fmt: skip
KEYS = "s sort   up/down select   p pin   u unpin   d drop   q quit"
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"  # the latter where the terminal has no UTF-8
RATE_SECONDS = 3.0  # rates are those of so long
PROGRAMS = 4
PINNED = " (pinned)"
LABEL_WIDTH, COLUMN_WIDTH = 11, 8
FIGURES_WIDTH = 5 * (COLUMN_WIDTH + 1)  # before the name of a file
MOST_SPARKS = 40


@dataclass
class View:
    """What the user has chosen: the order of files, which one is selected, and the last message."""

    order: str = "hits/s"
    chosen: str | None = None  # path; None: whichever leads
    message: str = ""

    def files(self, news: Figures) -> list[Figures]:
        """The files that have names, the leading ones first."""
        key = ORDERS[self.order]
        named = [file for file in news["files"] if file["path"] is not None]
        return sorted(named, key=lambda file: (-file[key], -file["page_hits"], file["path"]))

    def next_order(self) -> None:
        orders = list(ORDERS)
        self.order = orders[(orders.index(self.order) + 1) % len(orders)]
        self.chosen = None

    def selected(self, files: Sequence[Figures]) -> int:
        """Where the chosen file stands now; the first one if it is there no more."""
        return next((at for at, file in enumerate(files) if file["path"] == self.chosen), 0)

    def move(self, rows: int, files: Sequence[Figures]) -> None:
        if files:
            self.chosen = files[max(0, min(self.selected(files) + rows, len(files) - 1))]["path"]


def frame(news: Figures, view: View, width: int, height: int, bars: str = BARS) -> RenderableType:
    """The frame of a terminal of `width` x `height` characters, at most so many lines."""
    lines = [_label(label, text, width) for label, text in _figures(news, width, bars)]
    programs = sorted(_programs(news), key=lambda row: -row[0])[:PROGRAMS]
    room = max(1, height - len(lines) - len(programs) - 3)  # two headers and the foot
    foot = view.message or KEYS
    return Group(
        *lines, _file_table(view, view.files(news), room, width), _program_table(programs),
        _one_line(foot, width, "bold yellow" if view.message else "dim"),
    )  # fmt: skip


def _one_line(text: str, width: int, style: str = "") -> Text:
    line = Text(text, style, no_wrap=True, overflow="ellipsis")
    line.truncate(width, overflow="ellipsis")
    return line


def _label(label: str, text: str, width: int) -> Text:
    line = Text.assemble((label.ljust(LABEL_WIDTH), "bold cyan"), text, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def _figures(news: Figures, width: int, bars: str) -> Iterator[tuple[str, str]]:
    statistics = news["statistics"]
    cache, writeback = statistics["cache"], statistics["writeback"]
    rate = Rates(news)
    yield "mount", f"{printable(statistics['mountpoint'])}, up {format_duration(statistics['uptime_seconds'])}"
    pinned = f", {format_size(4096 * cache['pinned_pages'])} pinned" if cache["pinned_pages"] else ""
    full = _percent(cache["resident_bytes"], cache["capacity_bytes"])
    in_use = f"{format_size(cache['resident_bytes'])} of {format_size(cache['capacity_bytes'])} ({full})"
    evicted = f"evictions {rate.of('evicted_pages'):.0f} pages/s"
    yield "cache", f"{in_use}, {statistics['policy']}{pinned}, {evicted}"
    hits, misses = rate.of("page_hits"), rate.of("page_misses")
    sparks = sparkline(rate.hit_rates(), min(MOST_SPARKS, max(1, width - LABEL_WIDTH - 28)), bars)
    yield "hit rate", f"{sparks} {_percent(hits, hits + misses)} of {hits + misses:.0f} pages/s"
    read = format_size(rate.of("hit_bytes") + rate.of("miss_bytes"))
    saved = format_duration(statistics["filesystem"]["saved_seconds"])
    yield "rates", f"{read}/s read, {format_size(rate.of('write_bytes'))}/s written, {saved} saved since the mount"
    oldest = f", oldest {format_duration(writeback['oldest_dirty_seconds'])}" if writeback["dirty_bytes"] else ""
    going = f"writeback {format_size(rate.last('writeback_bytes'))}, to SOURCE {format_size(rate.of('written_bytes'))}/s"
    yield "dirty", f"{format_size(writeback['dirty_bytes'])} of {format_size(writeback['dirty_limit_bytes'])}{oldest}, {going}"
    used, unused = cache["readahead_used_pages"], cache["readahead_unused_pages"]
    accuracy = f"{_percent(used, used + unused)} of prefetched pages used"
    yield "readahead", f"{accuracy} ({used} used, {unused} unused, {cache['readahead_late_pages']} late)"


def _programs(news: Figures) -> Iterator[tuple[int, str, Figures]]:
    for name, use in news["statistics"]["cache"]["programs"].items():
        if total := use["hit_bytes"] + use["miss_bytes"] + use["write_bytes"]:
            yield total, printable(name), use


def _table(*columns: str, left: int) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, padding=(0, 1, 0, 0), header_style="bold reverse")
    for at, column in enumerate(columns):
        if at == left:
            table.add_column(column, ratio=1, no_wrap=True, overflow="ellipsis")
        else:
            table.add_column(column, justify="right", min_width=COLUMN_WIDTH, no_wrap=True)
    return table


def _file_table(view: View, files: Sequence[Figures], room: int, width: int) -> Table:
    """The selected file is always among those that are shown."""
    heads = [f"*{name}" if name == view.order else name for name in ("hits/s", "hits", "misses", "cached", "dirty")]
    table = _table(*heads, "file", left=len(heads))
    selected = view.selected(files)
    first = max(0, selected - room + 1)
    for at, file in list(enumerate(files))[first : first + room]:
        name = _tail(printable(file["path"]), width - FIGURES_WIDTH - len(PINNED)) + (PINNED if file["pinned"] else "")
        table.add_row(
            f"{file['hits_per_second']:.0f}", str(file["page_hits"]), str(file["page_misses"]),
            format_size(file["cached_bytes"]), format_size(file["dirty_bytes"]), Text(name),
            style="reverse" if at == selected else "",
        )  # fmt: skip
    for _ in range(room - len(files)):
        table.add_row()
    return table


def _program_table(programs: Sequence[tuple[int, str, Figures]]) -> Table:
    table = _table("pages hit", "read", "written", "program", left=3)
    for _, name, use in programs:
        hit = _percent(use["page_hits"], use["page_hits"] + use["page_misses"])
        read, written = format_size(use["hit_bytes"] + use["miss_bytes"]), format_size(use["write_bytes"])
        table.add_row(hit, read, written, Text(name))
    return table


def _tail(name: str, width: int) -> str:
    """The end of a path tells more than its beginning."""
    return name if len(name) <= max(8, width) else "…" + name[1 - max(8, width) :]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "- %"


class Rates:
    """Differences of the last samples, a second."""

    def __init__(self, news: Figures) -> None:
        self._at = {name: at for at, name in enumerate(news["fields"])}
        self._samples: Sequence[Sequence[float]] = news["samples"]

    def of(self, name: str) -> float:
        if len(self._samples) < 2:
            return 0.0
        last = self._samples[-1]
        before = reversed(self._samples[:-1])
        first = next((sample for sample in before if last[0] - sample[0] >= RATE_SECONDS), self._samples[0])
        return (last[self._at[name]] - first[self._at[name]]) / max(0.1, last[0] - first[0])

    def last(self, name: str) -> float:
        return self._samples[-1][self._at[name]] if self._samples else 0.0

    def hit_rates(self) -> list[float | None]:
        """Hit rate from each sample to the next; None where nothing was read."""
        hits, misses = self._at["page_hits"], self._at["page_misses"]
        steps = [(b[hits] - a[hits], b[misses] - a[misses]) for a, b in pairwise(self._samples)]
        return [hit / (hit + miss) if hit + miss else None for hit, miss in steps]


def sparkline(values: Sequence[float | None], width: int, bars: str = BARS) -> str:
    """The last `width` values, from 0 to 1, as bars; a space where there is none."""
    sparks = (" " if value is None else bars[min(len(bars) - 1, int(value * len(bars)))] for value in values[-width:])
    return "".join(sparks).rjust(width)
