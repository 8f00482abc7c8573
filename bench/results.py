"""Figures of a run, medians and ratios of them, and what the machine was doing meanwhile. Pure but for `others_busy`."""

import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

LOADED = 0.5  # of a processor's time, used by others: figures of such a round say so


@dataclass(frozen=True)
class Figure:
    """One measurement: microseconds a request, or of a whole job."""

    part: str
    case: str
    subject: str
    round: int
    wall_us: float
    cpu_us: float | None = None  # of the daemon, a request
    p50_us: float | None = None
    p99_us: float | None = None
    load: float = 0.0  # processors that others kept busy when the round began


@dataclass(frozen=True)
class Ratio:
    """Median, and the quartiles (or extremes, of few), of the ratios of the rounds that both took part in."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f}, {self.rounds} rounds)"


@dataclass
class Results:
    """All figures of a run; `values` are others, by name; `notes` what people have to know of it."""

    figures: list[Figure] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def cases(self, part: str) -> list[str]:
        return list(dict.fromkeys(figure.case for figure in self.figures if figure.part == part))

    def subjects(self, part: str) -> list[str]:
        return list(dict.fromkeys(figure.subject for figure in self.figures if figure.part == part))

    def rows(self, part: str, case: str, subject: str, what: str = "wall_us") -> dict[int, float]:
        """{round: value}"""
        return {
            f.round: value
            for f in self.figures
            if (f.part, f.case, f.subject) == (part, case, subject) and (value := getattr(f, what)) is not None
        }

    def median(self, part: str, case: str, subject: str, what: str = "wall_us") -> float | None:
        rows = self.rows(part, case, subject, what)
        return statistics.median(rows.values()) if rows else None

    def ratio(self, part: str, case: str, ours: str, theirs: str, what: str = "wall_us") -> Ratio | None:
        """Ours through theirs, round by round; None where one was not measured."""
        a, b = self.rows(part, case, ours, what), self.rows(part, case, theirs, what)
        return spread(a[i] / b[i] for i in a if b.get(i))

    def mean_ratio(self, part: str, ours: str, theirs: str) -> Ratio | None:
        """The geometric mean of the ratios of all cases that both did, round by round."""
        per_round: dict[int, list[float]] = {}
        for case in self.cases(part):
            a, b = self.rows(part, case, ours), self.rows(part, case, theirs)
            for i in a.keys() & b.keys():
                per_round.setdefault(i, []).append(a[i] / b[i])
        most = max(map(len, per_round.values()), default=0)
        return spread(statistics.geometric_mean(ratios) for ratios in per_round.values() if len(ratios) == most)

    def loads(self) -> list[float]:
        return sorted({figure.load for figure in self.figures})

    def take(self, other: "dict[str, Any]") -> None:
        """Adds what `as_json` gave of another run, of other parts."""
        self.figures += [Figure(**figure) for figure in other["figures"]]
        self.values |= other["values"]
        for note in other["notes"]:
            self.note(note)

    def as_json(self) -> dict[str, Any]:
        return {"figures": [asdict(figure) for figure in self.figures], "values": self.values, "notes": self.notes}


def spread(ratios: Iterable[float]) -> Ratio | None:
    ordered = sorted(ratios)
    if not ordered:
        return None
    if len(ordered) < 4:
        low, high = ordered[0], ordered[-1]
    else:
        low, _, high = statistics.quantiles(ordered, n=4)
    return Ratio(statistics.median(ordered), low, high, len(ordered))


def others_busy(seconds: float = 0.2) -> float:
    """How many processors are kept busy while this process sleeps, which it does for that long."""
    busy, total = _processor_time()
    time.sleep(seconds)
    now_busy, now_total = _processor_time()
    return round((now_busy - busy) / max(1.0, now_total - total) * (os.cpu_count() or 1), 2)


def _processor_time() -> tuple[float, float]:
    """(busy, all) of the machine, in ticks."""
    with open("/proc/stat") as file:
        fields = [int(word) for word in file.readline().split()[1:9]]
    return float(sum(fields) - fields[3] - fields[4]), float(sum(fields))
