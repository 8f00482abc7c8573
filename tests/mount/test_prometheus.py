"""A real Prometheus scrapes real mounts under load, and every query of every dashboard returns figures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cachefs.transport.cpulatency import DEVICE, DRIVER, limit_microseconds
from scraping import (
    DASHBOARDS,
    DEADLINE_SECONDS,
    Mounted,
    Prometheus,
    must_run,
    panel,
    prometheus_scraping,
    queries,
    running,
    substituted,
    wait_for,
)

pytestmark = pytest.mark.mount
MIB = 1 << 20
SMALL_CACHE = ("--cache-size", "8M", "--policy", "lru", "--readahead-max", "1M")
# What does not happen to these mounts: panels about it show 0.
NOT_HERE = {"cachefs_journal_write_through_total", "cachefs_recovery_lost_bytes"}
if not os.access(DEVICE, os.W_OK) or limit_microseconds(DRIVER, len(os.sched_getaffinity(0))) is None:  # nor on this machine
    NOT_HERE.add("cachefs_processors_ready_seconds_total")

# Three times the cache is read once, a part of it often; more than the dirty limit is written and flushed. Errors, of which
# there are some, are borne.
LOAD = """
import contextlib, os, sys
os.chdir(sys.argv[1])
block = os.urandom(1 << 20)
while True:
    for name in ("large", "small", "small", "small", "small"):
        with contextlib.suppress(OSError), open(name, "rb", buffering=0) as file:
            while file.read(1 << 17):
                pass
    with contextlib.suppress(OSError), open("written", "wb", buffering=0) as file:
        for _ in range(4):
            file.write(block)
        os.fsync(file.fileno())
    with contextlib.suppress(OSError):
        os.stat("missing")
    with contextlib.suppress(OSError):
        os.listdir(".")
"""
READER = """
import sys
open("/proc/self/comm", "w").write(sys.argv[1])
with open(sys.argv[2], "rb", buffering=0) as file:
    while file.read(1 << 17):
        pass
"""


@dataclass
class Scene:
    """Three mounts and who watches them: one under load, and two that differ in a rule."""

    prometheus: Prometheus
    loaded: Mounted
    ruled: Mounted
    free: Mounted


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if shutil.which("prometheus") is None:
        pytest.skip("the program prometheus is not installed (Debian package prometheus)")
    base = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        loaded = Mounted(base / "loaded", "--cache-size", "8M", "--dirty-limit", "2M", "--backing-timeout", "2s",
                         "--rule", "comm=once advice=noreuse", "--fault-plan", str(base / "loaded" / "plan.json"))  # fmt: skip
        (loaded.source / "large").write_bytes(os.urandom(24 * MIB))
        (loaded.source / "small").write_bytes(os.urandom(MIB))
        loaded.plan()
        leave_something(loaded)
        ruled = Mounted(base / "ruled", *SMALL_CACHE, "--rule", "comm=tar advice=noreuse")
        free = Mounted(base / "free", *SMALL_CACHE)
        for mount in (ruled, free):
            (mount.source / "hot").write_bytes(os.urandom(4 * MIB))
            (mount.source / "cold").mkdir()
            for number in range(8):
                with (mount.source / "cold" / str(number)).open("wb") as file:
                    file.truncate(10 * MIB)
        mounts = (loaded, ruled, free)
        for mount in mounts:
            stack.enter_context(mount.started())
        prometheus = stack.enter_context(prometheus_scraping([mount.target for mount in mounts], base))
        wait_for("all scrapes", lambda: prometheus.figures("sum(up)") == [3.0] or None)
        yield Scene(prometheus, loaded, ruled, free)


def leave_something(mount: Mounted) -> None:
    """A daemon that is killed leaves unwritten data of two files, and one of these is gone before the next mount."""
    with mount.started(dies=True) as process:
        files = [os.open(mount.path / name, os.O_WRONLY | os.O_CREAT) for name in ("left", "gone")]
        for fd in files:
            os.write(fd, b"x" * 100_000)
        process.kill()
        process.wait()
        for fd in files:
            with contextlib.suppress(OSError):
                os.close(fd)
    (mount.source / "gone").unlink()


def read_as(program: str, path: Path) -> None:
    subprocess.run([sys.executable, "-c", READER, program, path], check=True, timeout=DEADLINE_SECONDS)


def make_everything_happen(scene: Scene) -> None:
    """What the load does not do: pins, drops, a conflict, errors, a backing that is lost for a while."""
    mount, prometheus = scene.loaded, scene.prometheus
    mount.must("pin", mount.path / "small")
    read_as("once", mount.path / "large")
    mount.must("drop", mount.path / "large")
    fd = os.open(mount.path / "shared", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"ours")
    (mount.source / "shared").write_bytes(b"of somebody else")
    os.fsync(fd)
    os.close(fd)
    mount.plan({"op": "pwritev", "errno": "EIO"})
    query = panel("Files that fail", mount)
    wait_for("files that fail", lambda: any(prometheus.figures(query)) or None)
    mount.plan({"op": "*", "hang": True})
    query = panel("Backing lost", mount)
    wait_for("a backing that is lost", lambda: any(prometheus.figures(query)) or None)
    mount.plan()


def test_every_panel_shows_data_of_a_mount_under_load(scene: Scene) -> None:
    """And something other than 0, at some moment, where that can be brought about."""
    mount, prometheus = scene.loaded, scene.prometheus
    wanted = {(path.name, title, substituted(query, mount)) for path in DASHBOARDS for title, query in queries(path)}
    assert len(wanted) > 80

    def has_data(query: str) -> bool:
        if NOT_HERE & set(re.findall(r"cachefs_\w+", query)):
            return bool(prometheus.figures(query))
        return any(prometheus.figures(f"max_over_time(({query})[2m:1s])"))

    def all_answered() -> bool | None:
        wanted.difference_update([entry for entry in wanted if has_data(entry[2])])
        return not wanted or None

    log = mount.base / "load.log"
    with running([sys.executable, "-c", LOAD, str(mount.path)], log) as load:
        wait_for("hits and misses", lambda: all(prometheus.figures(panel("Hit rate, pages", mount))) or None)
        make_everything_happen(scene)
        wait_for("panels without data", all_answered, lambda: "\n".join(map(repr, sorted(wanted))))
        must_run(load, log)
    assert prometheus.figures("min_over_time(up[1m])") == [1.0, 1.0, 1.0], "no scrape failed, whatever happened"


def test_variables_offer_the_mounts(scene: Scene) -> None:
    mounts = (scene.loaded, scene.ruled, scene.free)
    for dashboard in DASHBOARDS:
        asked = {}
        for variable in json.loads(dashboard.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert match
                asked[variable["name"]] = (match[1], match[2])
        everything = asked["instance"]
        assert "$" not in everything[0]
        offered = scene.prometheus.ask(f"label/{everything[1]}/values", match=everything[0])
        assert sorted(offered) == sorted(mount.target for mount in mounts)
        for mount in mounts:  # of the instance that is chosen
            selector = substituted(asked["mountpoint"][0], mount)
            assert scene.prometheus.ask(f"label/{asked['mountpoint'][1]}/values", match=selector) == [str(mount.path)]


def test_rules_are_evaluated_and_say_what_a_killed_daemon_left_without_a_place(scene: Scene) -> None:
    def firing() -> set[tuple[str, str]] | None:
        found = [alert["labels"] for alert in scene.prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"]
        return {(labels["alertname"], labels["mountpoint"]) for labels in found} or None

    assert ("CachefsRecoveryIncomplete", str(scene.loaded.path)) in wait_for("alerts", firing)
    rules = [rule for group in scene.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    evaluated = [rule for rule in rules if rule["health"] != "unknown"]  # one is recorded once a minute
    assert len(evaluated) >= len(rules) - 1 and all(rule["health"] == "ok" for rule in evaluated), rules


def test_a_tar_of_ten_times_the_cache_shows_as_refaults_unless_a_rule_says_noreuse(scene: Scene) -> None:
    """The panel Refaults of the two mounts, which differ in the rule alone; both had the hot set in memory before."""
    prometheus = scene.prometheus
    for mount in (scene.ruled, scene.free):
        for _ in range(3):
            read_as("hot", mount.path / "hot")
        tar = ["tar", "-C", mount.path, "-cf", mount.base / "archive.tar", "cold"]
        subprocess.run(tar, check=True, timeout=DEADLINE_SECONDS)
        read_as("hot", mount.path / "hot")
    ruled, free = (f"max_over_time(({panel('Refaults', mount)})[2m:1s])" for mount in (scene.ruled, scene.free))
    wait_for("refaults", lambda: any(prometheus.figures(free)) or None)
    assert prometheus.figures(ruled) == [0.0]
    for mount, none in ((scene.ruled, True), (scene.free, False)):
        evicted = prometheus.figures(f'cachefs_evictions_total{{mountpoint="{mount.path}", reason="capacity"}}')
        assert (evicted == [0.0]) is none, evicted
    (hot,) = json.loads(scene.ruled.cachefs("ls", "--summary", "--json", scene.ruled.path / "hot").stdout)
    assert hot["cached_bytes"] == 4 * MIB
