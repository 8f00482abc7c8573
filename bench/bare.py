"""cachefs without its own accounting: the command line, with a hit that counts nothing, times nothing and remembers nothing.

What `bench/run.py see` compares with. The lines that count are taken out of the source of the functions that a hit runs through;
should one of them not be there any more, this fails, so that the comparison cannot become one of equals unnoticed.
"""

import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cachefs.cache.pagecache import PageCache
from cachefs.cache.refault import Refaults
from cachefs.cli import main
from cachefs.transport.lane import Lane

COUNTING = {
    PageCache: {
        "lookup": (
            "group.used = account.stamp", "account.page_hits += count", "account.hit_bytes += end - offset",
            "file.page_hits += count", "self.reads_hit += 1",
        ),
    },
    Lane: {"_answer_hit": ("start = time.perf_counter()", "self._read_durations.observe(time.perf_counter() - start)")},
}  # fmt: skip


def strip(owner: type, name: str, lines: tuple[str, ...]) -> None:
    """Puts a method without these lines in the place of the one with them."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    for line in lines:
        assert source.count(f" {line}\n") == 1, f"{name} has no line {line!r} any more"
        source = "\n".join(kept for kept in source.split("\n") if kept.strip() != line)
    defined: dict[str, Any] = {}
    exec(compile(source, f"{name} without counting", "exec"), vars(sys.modules[owner.__module__]), defined)
    setattr(owner, name, defined[name])


if __name__ == "__main__":
    for owner, methods in COUNTING.items():
        for name, lines in methods.items():
            strip(owner, name, lines)
    Refaults.left = Refaults.came_back = lambda *_: None  # type: ignore[assignment,method-assign]
    main()
