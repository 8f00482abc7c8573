"""What a run leaves: JSON, a chart, and the table between two marks of docs/performance.md."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import PEERS, version
from results import Results
from verdicts import Verdict

BEGIN, END = "<!-- bench-full: from here to the end mark it is written by the program -->", "<!-- bench-full: end -->"
UNITS = dict.fromkeys(("hits", "writes", "cold", "metadata", "pages", "files"), "us a request")  # of others: seconds


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that says whose machine it is."""
    model = ""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "processor": model,
        "processors": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "load_average": os.getloadavg()[0],
        "versions": {peer.package: version(peer) for peer in PEERS.values() if peer.package},
    }


def as_json(results: Results, lines: Sequence[Verdict], arguments: dict[str, Any]) -> str:
    verdicts = [{"asked": line.asked, "measured": line.measured, "met": line.met} for line in lines]
    everything = {"machine": machine(), "arguments": arguments, "verdicts": verdicts, **results.as_json()}
    return json.dumps(everything, indent=1) + "\n"


def tables(results: Results, lines: Sequence[Verdict], rounds: int) -> str:
    """Markdown."""
    here = machine()
    versions = ", ".join(f"{name} {text}" for name, text in here["versions"].items())
    loads = results.loads() or [0.0]
    words = {True: "met", False: "**not met**", None: "-"}
    text = [
        f"{here['date']}: {here['processors']} processors ({here['processor']}), {here['memory_gib']} GiB, "
        f"Linux {here['kernel']}, Python {here['python']}. {versions}. {rounds} rounds; "
        f"others kept {loads[0]:g} to {loads[-1]:g} processors busy when a round began.",
        "", "| asked | measured: median (quartiles, rounds) | |", "|---|---|---|",
        *(f"| {line.asked} | {line.measured} | {words[line.met]} |" for line in lines), "",
    ]  # fmt: skip
    for part in dict.fromkeys(figure.part for figure in results.figures):
        text += part_table(results, part)
    if results.values:
        text += ["| other figures | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in results.values.items()), ""]
    text += [f"- {note}" for note in results.notes]
    return "\n".join(text).rstrip() + "\n"


def part_table(results: Results, part: str) -> list[str]:
    """Medians of one part: wall time, and the daemon's CPU where there is one."""
    subjects, unit = results.subjects(part), UNITS.get(part, "seconds")
    title = f"**{part}**, {unit}: wall / CPU of the daemon"
    head = [title, "", f"| | {' | '.join(subjects)} |", "|---|" + "---|" * len(subjects)]
    rows = []
    for case in results.cases(part):
        rows.append(f"| {case} | {' | '.join(_cell(results, part, case, subject, unit) for subject in subjects)} |")
    return [*head, *rows, ""]


def _cell(results: Results, part: str, case: str, subject: str, unit: str) -> str:
    wall, cpu = (results.median(part, case, subject, what) for what in ("wall_us", "cpu_us"))
    if wall is None:
        return ""
    scale, form = (1.0, ".1f") if unit.startswith("us") or part in ("pages", "files") else (1e6, ".3f")
    return f"{wall / scale:{form}}" + (f" / {cpu / scale:{form}}" if cpu else "")


def into_document(path: Path, text: str) -> None:
    """Puts the tables where the last ones were."""
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")


def chart(results: Results, path: Path) -> str | None:
    """Draws times by part and subject, the bare directory or bindfs as 1; what is missing to do so, else None."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: matplotlib is missing (make bench-full installs it)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [part for part in ("hits", "writes", "metadata", "jobs", "slow") if results.cases(part)]
    if not parts:
        return "no chart: nothing to draw"
    figure, axes = plt.subplots(len(parts), 1, figsize=(11, 3.2 * len(parts)), squeeze=False, layout="constrained")
    for axis, part in zip(axes[:, 0], parts, strict=True):
        _bars(axis, results, part)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return None


def _bars(axis: Any, results: Results, part: str) -> None:
    cases, subjects = results.cases(part), results.subjects(part)
    width = 0.8 / len(subjects)
    unit, scale = (UNITS[part], 1.0) if part in UNITS else ("seconds", 1e6)
    for i, subject in enumerate(subjects):
        heights = [(results.median(part, case, subject) or 0.0) / scale for case in cases]
        axis.bar([x + i * width for x in range(len(cases))], heights, width, label=subject)
    axis.set_yscale("log")
    axis.set_ylabel(unit)
    axis.set_title(f"{part}: wall time, lower is better")
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(cases))], cases, rotation=20, ha="right", fontsize=8)
    axis.legend(fontsize=7, ncols=4)
