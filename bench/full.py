"""`make bench-full`: cachefs beside Debian's own FUSE file systems, in turn, over the same data.

Prints each promise with what was measured, and leaves JSON and a chart in bench/results. Interrupted, it unmounts what it
mounted and ends what it started, and shows what it has. Compare ratios of one run, not single figures of two.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jobs
import micro
import report
import scale
import slow
from peers import ROOT, fetch_passthrough
from processes import Failed
from turns import Run
from verdicts import verdicts

PARTS: dict[str, Callable[[Run], None]] = {
    "hits": micro.hits, "writes": micro.writes, "metadata": micro.metadata, "cold": micro.cold, "jobs": jobs.local,
    "slow": slow.slow, "scale": scale.scale, "idle": scale.idle,
}  # fmt: skip
RESULTS = ROOT / "bench" / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of bench/results/full.json; its chart is beside it")
    parser.add_argument("--document", type=Path, metavar="FILE", help="put the tables into this file, too")
    parser.add_argument("--put-together", type=Path, nargs="+", metavar="FILE", help="show these runs as one")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to work (default: the temporary directory)")
    args = parser.parse_args()
    args.parts = args.only.split(",") if args.only else list(PARTS)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no such part: {unknown[0]}; there are {', '.join(PARTS)}")
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    return args


def main() -> int:
    args = arguments()
    if args.put_together:
        return put_together(args)
    work = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir=args.work))
    bench, status = Run(args.rounds, args.quick, work), 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        measure(bench, args.parts)
    except KeyboardInterrupt:
        bench.results.note("interrupted: these are the figures until then")
        status = 130
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(bench, args)
    return status


def put_together(args: argparse.Namespace) -> int:
    bench = Run(args.rounds, args.quick, Path())
    for path in args.put_together:
        bench.results.take(json.loads(path.read_text()))
    bench.results.note(f"the parts were measured in {len(args.put_together)} runs")
    show(bench, args)
    return 0


def interrupt(_number: int, _frame: object) -> None:
    """Once: what follows takes everything down, and is not to be interrupted itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def measure(bench: Run, parts: list[str]) -> None:
    if not bench.quick:
        try:
            fetch_passthrough()
        except Failed as error:
            bench.results.note(f"pyfuse3's example cannot be fetched: {error}")
    for part in parts:
        bench.say(f"{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}")
        try:
            PARTS[part](bench)
        except Failed as error:
            bench.results.note(f"{part} was not finished: {error}")


def show(bench: Run, args: argparse.Namespace) -> None:
    results = bench.results
    lines = verdicts(results)
    text = report.tables(results, lines, args.rounds)
    print(text)
    for line in lines:
        print(line)
    path = args.json or RESULTS / "full.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.as_json(results, lines, {"rounds": args.rounds, "quick": args.quick, "parts": args.parts}))
    missing = report.chart(results, path.with_suffix(".png"))
    if missing:
        print(missing, file=sys.stderr)
    if args.document:
        report.into_document(args.document, text)
    bench.say(f"figures are in {path}")


if __name__ == "__main__":
    sys.exit(main())
