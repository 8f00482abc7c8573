"""The demonstration behind `make demo`: real programs on a slow store, cold and then warm, and what the cache says of it.

SOURCE is a part of Python's own standard library with a git repository and an SQLite database, made in a temporary
directory. Each program gets a fresh mount of it, runs twice, and its figures are read in two ways, which must agree.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LATENCY, BANDWIDTH, METADATA_TTL = "5ms", "100M", "60s"
LIBRARY_FILES, LIBRARY_FILE_BYTES_MIN = 360, 3 << 10
SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
REPOSITORY_PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging", "unittest")
COMMITS = 12
PATIENCE_SECONDS = 120.0
NEEDED = ("grep", "tar", "sha256sum", "sqlite3", "git", "fusermount3")

# By the index, one line in the middle of each file.
QUERY = "SELECT sum(length(text)) FROM file JOIN line ON line.path = file.path AND line.number = file.lines / 2"
PROGRAMS = {
    "grep -r": "grep -rc 'import' library >/dev/null",
    "tar": "tar -cf - library | cat >/dev/null",  # tar itself reads nothing where it sees /dev/null
    "sha256sum": "find library -type f -print0 | xargs -0 sha256sum >/dev/null",
    "sqlite3": f'sqlite3 -readonly lines.db "{QUERY}"',
    "git status": "git -C repository status --short",
    "git log": "git -C repository log --stat >/dev/null",
    "git fsck": "git -C repository fsck --strict --full --no-progress",
}
GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "GIT_AUTHOR_NAME": "demo",
    "GIT_AUTHOR_EMAIL": "demo@example.org", "GIT_COMMITTER_NAME": "demo", "GIT_COMMITTER_EMAIL": "demo@example.org",
    "GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*",
    "GIT_CONFIG_KEY_1": "init.defaultBranch", "GIT_CONFIG_VALUE_1": "main",
}  # fmt: skip


class DemoError(Exception):
    """Something is not as it should be; the message is for the user."""


@dataclass(frozen=True)
class Counts:
    """What a mount has counted."""

    hits: int
    misses: int
    calls: int  # to the store

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(self.hits - other.hits, self.misses - other.misses, self.calls - other.calls)

    @property
    def hit_rate(self) -> str:
        pages = self.hits + self.misses
        return f"{100 * self.hits / pages:.0f} %" if pages else "-"


@dataclass(frozen=True)
class Run:
    seconds: float
    counts: Counts


# --- what is read ------------------------------------------------------------------------------------------------------


def execute(command: str | list[str], cwd: Path, own_session: bool = False) -> str:
    """The standard output of a command that must succeed. Ctrl-C does not reach one in a session of its own."""
    done = subprocess.run(
        command if isinstance(command, list) else ["bash", "-o", "pipefail", "-c", command],
        cwd=cwd,
        env={**os.environ, **GIT_ENVIRONMENT, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        start_new_session=own_session,
        check=False,
    )
    if done.returncode:
        raise DemoError(f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


@contextlib.contextmanager
def holding_interrupts() -> Iterator[None]:
    """Ctrl-C counts when this is over: no mount is left half made."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def copy_library(target: Path) -> None:
    """So many modules of the standard library, in the order of their paths."""
    stdlib, count = Path(sysconfig.get_path("stdlib")), 0
    for directory, directories, files in os.walk(stdlib):
        directories[:] = sorted(name for name in directories if name not in SKIPPED and not name.startswith("config-"))
        for path in (Path(directory, name) for name in sorted(files) if name.endswith(".py")):
            if count < LIBRARY_FILES and path.stat().st_size >= LIBRARY_FILE_BYTES_MIN:
                copy = target / path.relative_to(stdlib)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                count += 1


def make_repository(library: Path, repository: Path) -> None:
    """A git repository with some history, made of a few packages; its objects are partly packed, partly loose."""
    repository.mkdir()
    execute(["git", "init", "--quiet"], repository)
    packages = [library / name for name in REPOSITORY_PACKAGES if (library / name).is_dir()]
    for number in range(COMMITS):
        if number < len(packages):
            shutil.copytree(packages[number], repository / packages[number].name)
        (repository / "NEWS").open("a").write(f"change {number}\n")
        execute("git add --all && git commit --quiet -m 'change'", repository)
        if number == COMMITS // 2:
            execute("git repack -a -d --quiet", repository)


def make_database(library: Path, database: Path) -> None:
    """Every line of half the library, with an index."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE file (path TEXT, lines INTEGER)")
        connection.execute("CREATE TABLE line (path TEXT, number INTEGER, text TEXT)")
        for path in sorted(library.rglob("*.py"))[::2]:
            lines, name = path.read_text(errors="replace").splitlines(), str(path.relative_to(library))
            connection.execute("INSERT INTO file VALUES (?, ?)", (name, len(lines)))
            connection.executemany("INSERT INTO line VALUES (?, ?, ?)", ((name, i, text) for i, text in enumerate(lines, 1)))
        connection.execute("CREATE INDEX by_place ON line (path, number)")


def make_source(source: Path) -> str:
    """Fills SOURCE; says what is in it."""
    copy_library(source / "library")
    make_repository(source / "library", source / "repository")
    make_database(source / "library", source / "lines.db")
    files = [path for path in source.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / (1 << 20):.1f} MiB"


# --- the mount ---------------------------------------------------------------------------------------------------------


class Demo:
    """The directories of one demonstration."""

    def __init__(self, base: Path) -> None:
        self.source, self.mountpoint, self.state = base / "source", base / "mountpoint", base / "state"
        for directory in (self.source, self.mountpoint):
            directory.mkdir()
        os.environ["CACHEFS_RUNTIME_DIR"] = str(base / "run")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

    def cachefs(self, *words: str | Path) -> str:
        return execute([sys.executable, "-m", "cachefs", *map(str, words)], ROOT, own_session=True)

    def mount_words(self) -> list[str]:
        simulate = ["--simulate-latency", LATENCY, "--simulate-bandwidth", BANDWIDTH, "--metadata-ttl", METADATA_TTL]
        return ["mount", str(self.source), str(self.mountpoint), *simulate, "--metrics", "127.0.0.1:0"]

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """A fresh mount with nothing cached; unmounted at the end, with its log looked at."""
        try:
            with holding_interrupts():
                self.cachefs(*self.mount_words(), "--state-dir", self.state)
            yield
            with holding_interrupts():
                self.cachefs("umount", self.mountpoint)
        except BaseException:
            self.abandon()
            raise
        for log in self.state.glob("*/cachefs.log"):
            bad = [line for line in log.read_text().splitlines() if re.search("WARNING|ERROR|CRITICAL|Traceback", line)]
            if bad:
                raise DemoError("the log of the mount has trouble:\n" + "\n".join(bad))
        if os.path.ismount(self.mountpoint):
            raise DemoError(f"{self.mountpoint} is still mounted")

    def abandon(self) -> None:
        """Unmounts whatever is there, after something went wrong."""
        if os.path.ismount(self.mountpoint):
            with contextlib.suppress(DemoError, subprocess.TimeoutExpired):
                self.cachefs("umount", "--timeout", "10s", self.mountpoint)
        if os.path.ismount(self.mountpoint):
            done = subprocess.run(["fusermount3", "-u", "-z", str(self.mountpoint)], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"demo: {self.mountpoint} is left mounted: {done.stderr.strip()}", file=sys.stderr)

    def status(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(self.cachefs("status", "--json", self.mountpoint))
        return found

    def run_twice(self, command: str) -> tuple[Run, Run]:
        before, runs = counts_of(self.status()), []
        outputs = []
        for _ in range(2):
            start = time.monotonic()
            outputs.append(execute(command, self.mountpoint))
            seconds = time.monotonic() - start
            after = counts_of(self.status())
            runs.append(Run(seconds, after - before))
            before = after
        if outputs[0] != outputs[1]:
            raise DemoError(f"{command}: says different things cold and warm")
        self.compare_with_metrics()
        return runs[0], runs[1]

    def compare_with_metrics(self) -> None:
        """/metrics must say what `cachefs status` says."""
        status = self.status()
        with urllib.request.urlopen(status["metrics"], timeout=30) as answer:
            found = counts_of_metrics(answer.read().decode())
        if found != counts_of(status):
            raise DemoError(f"/metrics says {found}, cachefs status {counts_of(status)}")


def counts_of(status: Mapping[str, Any]) -> Counts:
    statistics = status["statistics"]
    calls = sum(sum(histogram["counts"]) for histogram in statistics["backing"]["durations"].values())
    return Counts(statistics["cache"]["page_hits"], statistics["cache"]["page_misses"], calls)


def counts_of_metrics(text: str) -> Counts:
    def total(name: str) -> int:
        return int(sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))

    names = ("cachefs_page_hits_total", "cachefs_page_misses_total", "cachefs_backing_request_duration_seconds_count")
    return Counts(*map(total, names))


# --- telling -----------------------------------------------------------------------------------------------------------


def line(program: str, cold: Run, warm: Run) -> str:
    figures = f"{cold.seconds:7.2f} s {warm.seconds:8.2f} s {cold.seconds / warm.seconds:8.1f} x"
    rates = f"{cold.counts.hit_rate:>7} {warm.counts.hit_rate:>7}"
    return f"  {program:<12}{figures}   {rates}   {cold.counts.calls:6} {warm.counts.calls:6}"


def demonstrate(base: Path) -> None:
    demo = Demo(base)
    print(f"Making SOURCE of Python's standard library: {make_source(demo.source)}, a git repository and a database in it.")
    print(f"It is put behind a simulated slow store: {LATENCY} a call, {BANDWIDTH}B/s. The mount of each program:")
    words = " ".join(demo.mount_words()).replace(str(demo.source), "SOURCE").replace(str(demo.mountpoint), "MOUNTPOINT")
    print(f"  cachefs {words}\n")
    print("              ---------- time -----------   -- page hits --   calls to store")
    print("  program          cold       warm  speed-up      cold    warm     cold   warm")
    total = [0.0, 0.0]
    for program, command in PROGRAMS.items():
        with demo.mounted():
            cold, warm = demo.run_twice(command)
        print(line(program, cold, warm), flush=True)
        total = [total[0] + cold.seconds, total[1] + warm.seconds]
        if warm.counts.misses:
            raise DemoError(f"{program}: {warm.counts.misses} pages were read from the store a second time")
    print(f"  {'all':<12}{total[0]:7.2f} s {total[1]:8.2f} s {total[0] / total[1]:8.1f} x")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        print(f"demo: missing programs: {' '.join(missing)}; `make demo` installs them", file=sys.stderr)
        return 1
    start = time.monotonic()
    try:
        # What can't be removed must not hide why.
        with tempfile.TemporaryDirectory(prefix="cachefs-demo-", ignore_cleanup_errors=True) as base:
            demonstrate(Path(base))
    except KeyboardInterrupt:
        print("\ndemo: stopped; nothing is left behind", file=sys.stderr)
        return 130
    except (DemoError, OSError, subprocess.TimeoutExpired) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    print(f"\nEvery figure was the same in `cachefs status --json` and on /metrics. All unmounted, after {seconds:.0f} s.")
    print("Next: .venv/bin/cachefs mount SOURCE MOUNTPOINT on a directory of yours, cachefs status, and the README.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
