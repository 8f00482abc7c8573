"""Runs one campaign from the command line and prints what it did; for looking into a failure, or for a night of kills.

    python tests/crash/hunt.py --kernel-cache keep --seed 7 --kills 200 [--faults] [-- cachefs mount options]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from scenes import campaign  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel-cache", default="off")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=50, help="with --kills 0: each ends by an unmount")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--no-sqlite", action="store_true")
    parser.add_argument("--synchronous", action="store_true", help="every write through O_DSYNC")
    parser.add_argument("--keep", action="store_true", help="keep the directory when something was found")
    parser.add_argument("options", nargs="*")
    asked = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="cachefs-crash-"))
    begun = time.monotonic()
    options = ["--kernel-cache", asked.kernel_cache, *asked.options]
    settings = {"faults": asked.faults, "sqlite": not asked.no_sqlite, "synchronous": asked.synchronous, "keep": asked.keep}
    with campaign(base, asked.seed, options, **settings) as found:
        found.run(asked.kills) if asked.kills else found.run_without_kills(asked.rounds)
        print(found.summary())
    print(f"{time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
