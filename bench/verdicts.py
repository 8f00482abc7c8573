"""What cachefs promises of its speed, against what was measured: one line each, met or not. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from results import Ratio, Results

SLOW_READS = ("find", "grep -r", "random 4k", "stream")
SLOW_JOBS = ("write 64 MiB", "untar", "git", "make", "SQLite inserts", "SQLite reads")
FUSE_PEERS = ("bindfs", "mergerfs", "unionfs", "pyfuse3", "rclone")


@dataclass(frozen=True)
class Verdict:
    """`met` None: not measured."""

    asked: str
    measured: str
    met: bool | None

    def __str__(self) -> str:
        word = {True: "met", False: "NOT MET", None: "not measured"}[self.met]
        return f"{word:12s} {self.asked}: {self.measured}"


def verdicts(results: Results) -> list[Verdict]:
    """All of them, in the order of the promises."""
    return [*_hits(results), *_metadata(results), *_writes(results), *_jobs(results), *_slow(results), *_scale(results)]


def at_most(asked: str, ratios: dict[str, Ratio | None], bound: float) -> Verdict:
    """Met if all that were measured are; a peer that was not is no loss and no win."""
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    text = ", ".join(f"{name} {ratio}" for name, ratio in known.items()) or "-"
    return Verdict(f"{asked} <= {bound:g}", text, all(r.median <= bound for r in known.values()) if known else None)


def at_least(asked: str, ratios: dict[str, Ratio | None], bound: float) -> Verdict:
    """The same of throughputs, the inverse of times."""
    turned = {name: r and Ratio(1 / r.median, 1 / r.high, 1 / r.low, r.rounds) for name, r in ratios.items()}
    text = ", ".join(f"{name} {ratio}" for name, ratio in turned.items() if ratio) or "-"
    known = [r for r in turned.values() if r]
    return Verdict(f"{asked} >= {bound:g}", text, all(r.median >= bound for r in known) if known else None)


def against(results: Results, part: str, case: str, peers: Iterable[str], what: str = "wall_us") -> dict[str, Ratio | None]:
    return {peer: results.ratio(part, case, "cachefs", peer, what) for peer in peers}


def _hits(results: Results) -> list[Verdict]:
    direct = ("bindfs direct", "mergerfs direct")

    def line(case: str, what: str) -> dict[str, Ratio | None]:
        return against(results, "hits", case, direct, what)

    idle = results.values.get("idle CPU, per cent")
    return [
        at_most("4 KiB hit, 1 reader, wall", line("4k random", "wall_us"), 0.5),
        at_most("4 KiB hit, 1 reader, CPU a request", line("4k random", "cpu_us"), 1.0),
        at_most("4 KiB hit, 4 readers, wall", line("4k random x4", "wall_us"), 0.9),
        at_most("4 KiB hit, 4 readers, CPU a request", line("4k random x4", "cpu_us"), 0.9),
        Verdict("idle mount, per cent CPU < 0.1", "-" if idle is None else f"{idle:.3f}", None if idle is None else idle < 0.1),
        at_least("128 KiB hits, throughput", line("128k", "wall_us"), 2.5),
        at_least("1 MiB hits, throughput", line("1M", "wall_us"), 2.5),
        at_least("1 MiB hits, throughput, against the directory", against(results, "hits", "1M", ("bare",)), 0.9),
    ]


def _metadata(results: Results) -> list[Verdict]:
    cases = ("stat", "stat missing", "create+unlink", "readdir of 10,000")
    lines = [at_most(f"{case}, wall", against(results, "metadata", case, ("bindfs",)), 1.5) for case in cases]
    known = {us: results.ratio("metadata", "find known", us, "bare") for us in ("cachefs", "cachefs infinite")}
    return [*lines, *(at_most(f"find over a known tree, {us}, wall", {"bare": ratio}, 1.2) for us, ratio in known.items())]


def _writes(results: Results) -> list[Verdict]:
    return [
        at_least("4 KiB random writes, journal on, throughput", against(results, "writes", "4k random", ("bindfs direct",)), 0.8),
        at_least("4 KiB sequential writes, journal on, throughput", against(results, "writes", "4k", ("bindfs direct",)), 0.8),
        at_least("1 MiB writes, throughput", against(results, "writes", "1M", ("bindfs direct",)), 1.0),
    ]


def _jobs(results: Results) -> list[Verdict]:
    def line(us: str, peers: Iterable[str]) -> dict[str, Ratio | None]:
        return {peer: results.mean_ratio("jobs", us, peer) for peer in peers}

    keep = {name: ratio for name, ratio in line("cachefs keep", FUSE_PEERS).items() if ratio is not None}
    best = max(keep, key=lambda name: keep[name].median, default=None)
    return [
        at_most("local jobs, geometric mean of times", line("cachefs", ("bindfs",)), 1.3),
        at_most("local jobs, geometric mean of times", line("cachefs", ("mergerfs", "unionfs")), 1.0),
        at_most("local jobs, mode keep, against the best FUSE peer", {best or "": keep.get(best or "")}, 0.9),
    ]


def _slow(results: Results) -> list[Verdict]:
    part, cold = "slow", [f"{case} cold" for case in SLOW_READS]
    lines = [at_most(f"slow, {case}, against the best peer", best_peer(results, part, case), 0.8) for case in (*cold, *SLOW_JOBS)]
    for case in (f"{case} warm" for case in SLOW_READS):
        lines.append(at_least(f"slow, {case}, times faster than sshfs", against(results, part, case, ("sshfs",)), 10))
        lines.append(at_most(f"slow, {case}, against rclone", against(results, part, case, ("rclone",)), 1.0))
    for case in (f"{case} remounted" for case in SLOW_READS):
        lines.append(at_most(f"slow, {case}, against rclone", against(results, part, case, ("rclone",)), 1.0))
    lines.append(at_least("slow, stream cold, of the way's bandwidth", against(results, part, "stream cold", ("ssh cat",)), 0.9))
    return lines


def best_peer(results: Results, part: str, case: str) -> dict[str, Ratio | None]:
    """Against whoever was quickest."""
    medians = {peer: results.median(part, case, peer) for peer in ("sshfs", "rclone")}
    known: dict[str, float] = {peer: median for peer, median in medians.items() if median is not None}
    best: Callable[[str], float] = known.__getitem__
    name = min(known, key=best, default="")
    return {name: results.ratio(part, case, "cachefs", name) if name else None}


def _scale(results: Results) -> list[Verdict]:
    lines = []
    for part, thing in (("pages", "pages cached"), ("files", "files known")):
        counts = results.cases(part)
        if len(counts) > 1:
            rows = [results.median(part, count, "cachefs", "wall_us") for count in (counts[0], counts[-1])]
            assert rows[0] is not None and rows[1] is not None
            ratio = rows[1] / rows[0]
            lines.append(Verdict(f"hit, {counts[-1]} {thing} against {counts[0]} <= 1.2", f"{ratio:.2f}", ratio <= 1.2))
    for pages in (1, 16, 256):
        value = results.values.get(f"bookkeeping bytes a page, runs of {pages}")
        if value is not None:
            met = value <= 200 if pages > 1 else None
            lines.append(Verdict(f"bookkeeping bytes a page, runs of {pages}, <= 200 from 16 on", f"{value:.0f}", met))
    return lines
