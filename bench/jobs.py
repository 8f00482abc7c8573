"""What people do in a directory all day: git, tar, grep, make, SQLite, find. Each job is timed as a whole."""

import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from micro import fresh_mount, timed
from peers import Peer
from processes import run
from turns import Run

PEERS_HERE = ("bare", "cachefs", "cachefs keep", "bindfs", "mergerfs", "unionfs", "pyfuse3", "rclone")
GIT_ENV = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
IDENTITY = ["-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "init.defaultBranch=main"]
DATABASE = """
import random, sqlite3, sys
path, inserts, transactions, reads = sys.argv[1], *map(int, sys.argv[2:])
base = sqlite3.connect(path, isolation_level=None)
base.execute("create table if not exists t (key integer primary key, value text)")
for i in range(0, inserts, max(1, inserts // max(1, transactions))):
    base.execute("begin")
    for key in range(i, min(inserts, i + inserts // transactions)):
        base.execute("insert or replace into t values (?, ?)", (key, str(key) * 20))
    base.execute("commit")
rng, rows = random.Random(1), base.execute("select count(*) from t").fetchone()[0]
for i in range(reads):
    if i % 10 == 0:
        base.execute("begin")
    base.execute("select value from t where key = ?", (rng.randrange(rows),)).fetchone()
    if i % 10 == 9:
        base.execute("commit")
"""


@dataclass(frozen=True)
class Amount:
    """How much of everything; `reads` of the database are point reads, ten to a transaction."""

    files: int  # in the archive
    git_files: int
    c_files: int
    inserts: int
    transactions: int
    reads: int


FULL, QUICK = Amount(5000, 500, 30, 10_000, 100, 100_000), Amount(300, 60, 5, 500, 10, 5000)


def materials(where: Path, amount: Amount) -> Path:
    """An archive of small files, a repository to clone and a C project, made beside what is measured."""
    rng = random.Random(7)
    tree = where / "tree"
    for i in range(amount.files):
        path = tree / f"d{i % max(1, amount.files // 50)}" / f"file-{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"line {rng.random()}\n" * (1 + int(rng.expovariate(1 / 100))))
    run(["tar", "cf", str(where / "tree.tar"), "-C", str(where), "tree"])  # which stays, see `local`
    _repository(where / "origin", amount, rng)
    _project(where / "project", amount.c_files)
    return where


def _repository(origin: Path, amount: Amount, rng: random.Random) -> None:
    origin.mkdir()
    git = ["git", "-C", str(origin), *IDENTITY]
    run([*git, "init", "-q"], env=GIT_ENV)
    for change in range(3):
        for i in range(amount.git_files):
            if change == 0 or i % 5 == change:
                path = origin / f"m{i % 20}" / f"{i}.py"
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(f"value_{j} = {rng.random()}\n" for j in range(5 + i % 150)))
        run([*git, "add", "-A"], env=GIT_ENV)
        run([*git, "commit", "-qm", f"change {change}"], env=GIT_ENV)
        run([*git, "tag", f"v{change}"], env=GIT_ENV)


def _project(where: Path, files: int) -> None:
    where.mkdir()
    for i in range(files):
        body = "".join(f"static int f{j}(int x) {{ return x * {j} + {i}; }}\n" for j in range(20))
        text = f'#include <stdio.h>\n#include "all.h"\n{body}int part{i}(int x) {{ return f1(x) + f2(x); }}\n'
        (where / f"part{i}.c").write_text(text)
    (where / "all.h").write_text("".join(f"int part{i}(int x);\n" for i in range(files)))
    calls = " + ".join(f"part{i}(1)" for i in range(files))
    (where / "main.c").write_text(f'#include "all.h"\nint main(void) {{ return ({calls}) == 0; }}\n')
    objects = " ".join(f"part{i}.o" for i in range(files))
    (where / "Makefile").write_text(f"program: main.o {objects}\n\tcc -o $@ $^\n%.o: %.c all.h\n\tcc -c -o $@ $<\n")


def work_on(root: Path, made: Path, amount: Amount) -> dict[str, Callable[[], int]]:
    """{name: job}, to be done in this order below `root`."""

    def once(*command: str, allowed: tuple[int, ...] = (0,)) -> Callable[[], int]:
        def job() -> int:
            run(command, cwd=root, env=GIT_ENV, allowed=allowed)
            return 1

        return job

    def git() -> int:
        run(["git", "clone", "-q", "--no-local", str(made / "origin"), "clone"], cwd=root, env=GIT_ENV)
        run(["git", "-C", "clone", "status", "--short"], cwd=root, env=GIT_ENV)
        run(["git", "-C", "clone", "checkout", "-q", "v1"], cwd=root, env=GIT_ENV)
        return 1

    def build() -> int:
        shutil.copytree(made / "project", root / "project")
        run(["make", "-j2", "-C", "project"], cwd=root)
        return 1

    inserts, reads = str(amount.inserts), str(amount.reads)
    return {
        "untar": once("tar", "xf", str(made / "tree.tar")),
        "find": once("find", "tree", "-type", "f"),
        "grep -r": once("grep", "-rc", "no such text", "tree", allowed=(1,)),
        "git": git,
        "make": build,
        "SQLite inserts": once(sys.executable, "-c", DATABASE, "data.db", inserts, str(amount.transactions), "0"),
        "SQLite reads": once(sys.executable, "-c", DATABASE, "data.db", "0", "1", reads),
    }


def local(bench: Run) -> None:
    """Jobs on a local backing: untar, find, grep -r, git clone + status + checkout, make, SQLite."""
    amount = QUICK if bench.quick else FULL
    made = materials(bench.directory("jobs/materials"), amount)

    def turn(number: int, peer: Peer) -> None:
        # A directory of its own, which stays until the end: ext4 looks for a minute and more at the number of each file that was
        # deleted lately before it makes a new one (`recently_deleted`), which took 0.7 ms a file of whoever unpacked next.
        source = bench.directory(f"jobs/source-{number}-{peer.name.replace(' ', '-')}")
        with fresh_mount(bench, "jobs", peer, source) as mount:
            for case, job in work_on(mount.path, made, amount).items():
                timed(bench, "jobs", case, number, peer.name, mount, job)

    bench.each("jobs", bench.peers(PEERS_HERE), turn)
