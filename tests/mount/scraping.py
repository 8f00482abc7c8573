"""Mounts that a real Prometheus scrapes with the configuration that is shipped, and the queries of the dashboards."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
DEADLINE_SECONDS = 60.0  # everything here takes a few seconds; this is for a machine that is busy with something else
POLL_SECONDS = 0.1
RATE_INTERVAL = "5s"  # what Grafana puts for $__rate_interval: at least four scrapes

T = TypeVar("T")


def wait_for(what: str, ask: Callable[[], T | None], detail: Callable[[], object] = lambda: "") -> T:
    """Asks again and again until there is an answer; fails the test when the time is over."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (answer := ask()) is None:
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: nothing within {DEADLINE_SECONDS:g} s\n{detail()}")
        time.sleep(POLL_SECONDS)
    return answer


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is asked to end at the end, and made to if it does not."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def must_run(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        pytest.fail(f"{process.args!r} ended with {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}")


class Mounted:
    """One mount in a directory of its own; `started` runs its daemon."""

    def __init__(self, base: Path, *options: str) -> None:
        self.base, self.source, self.path, self.log = base, base / "source", base / "mnt", base / "cachefs.log"
        self.environment = {"CACHEFS_RUNTIME_DIR": str(base / "run"), "PYTHONPATH": str(ROOT)}
        self.options = [*options, "--metrics", "127.0.0.1:0", "--foreground", "--state-dir", str(base / "state")]
        self.target = ""  # address of the metrics
        for directory in (base, self.source, self.path):
            directory.mkdir()

    def cachefs(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(*words), capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False,
            env={**os.environ, **self.environment},
        )  # fmt: skip

    def must(self, *words: object) -> None:
        done = self.cachefs(*words)
        assert done.returncode == 0, done

    def _command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "cachefs", *map(str, words)]

    def plan(self, *rules: dict[str, object]) -> Path:
        """Makes `rules` the faults of SOURCE, at once."""
        path = self.base / "plan.json"
        path.with_suffix(".new").write_text(json.dumps(rules))
        path.with_suffix(".new").rename(path)
        return path

    @contextmanager
    def started(self, dies: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """The daemon, from when its mountpoint answers. It must end well, unless it is one that `dies`."""

        def record() -> dict[str, Any] | None:
            must_run(process, self.log)
            found = [json.loads(path.read_text()) for path in (self.base / "run").glob("*.json")]
            return next((record for record in found if record["pid"] == process.pid and record["phase"] == "serving"), None)

        try:
            with running(self._command("mount", self.source, self.path, *self.options), self.log, **self.environment) as process:
                url = wait_for("the mount", record, lambda: self.log.read_text(errors="replace"))["metrics"]
                self.target = urllib.parse.urlsplit(url).netloc
                yield process
            assert dies or process.returncode == 0, self.log.read_text(errors="replace")
        finally:
            # Nothing is mounted any more, unless the daemon died.
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], capture_output=True, timeout=30, check=False)


class Prometheus:
    """The HTTP interface of a running Prometheus."""

    def __init__(self, address: str) -> None:
        self.url = f"http://{address}/api/v1"
        self._ready_url = f"http://{address}/-/ready"

    def ready(self) -> bool | None:
        """True, or None as long as it answers 503 to all that it is asked: it listens before it has its storage."""
        try:
            with urllib.request.urlopen(self._ready_url, timeout=DEADLINE_SECONDS):
                return True
        except urllib.error.HTTPError:
            return None

    def ask(self, path: str, **arguments: str) -> Any:
        parameters = urllib.parse.urlencode({name.replace("match", "match[]"): v for name, v in arguments.items()})
        try:
            with urllib.request.urlopen(f"{self.url}/{path}?{parameters}", timeout=DEADLINE_SECONDS) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{path} {arguments}: {error.read().decode()}")

    def figures(self, query: str) -> list[float]:
        """The values that the query has now, without those that are not a number (0/0: nothing happened)."""
        values = [float(series["value"][1]) for series in self.ask("query", query=query)["result"]]
        return [value for value in values if not math.isnan(value)]


@contextmanager
def prometheus_scraping(targets: list[str], directory: Path) -> Iterator[Prometheus]:
    """Debian's Prometheus with the configuration and rules we ship, but for the addresses and shorter intervals."""
    config, log = directory / "prometheus.yml", directory / "prometheus.log"
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for ours, theirs in (
        ('["127.0.0.1:9477"]', json.dumps(targets)),
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
        ("[cachefs-rules.yml]", json.dumps([str(DEPLOY / "prometheus" / "cachefs-rules.yml")])),
    ):
        assert text.count(ours) == 1
        text = text.replace(ours, theirs)
    config.write_text(text)
    storage = [f"--storage.tsdb.path={directory / 'tsdb'}", "--storage.tsdb.wal-segment-size=10MB"]
    command = ["prometheus", f"--config.file={config}", "--web.listen-address=127.0.0.1:0", *storage]
    with running(command, log) as process:

        def address() -> str | None:
            must_run(process, log)
            found = re.search(r'msg="Listening on".* address=(\S+)', log.read_text(errors="replace"))
            return found and found[1]

        prometheus = Prometheus(wait_for("prometheus", address, lambda: log.read_text(errors="replace")))
        wait_for("prometheus to be ready", prometheus.ready)
        yield prometheus


def queries(dashboard: Path) -> list[tuple[str, str]]:
    """(panel's title, query) of a dashboard as it is in the file."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


def panel(title: str, mount: Mounted) -> str:
    """The first query of the panel of that name, as Grafana sends it when that mount is chosen."""
    found = [query for dashboard in DASHBOARDS for name, query in queries(dashboard) if name == title]
    return substituted(found[0], mount)


def substituted(query: str, mount: Mounted) -> str:
    variables = {
        "__rate_interval": RATE_INTERVAL, "__range": "1m", "instance": _quoted(mount.target),
        "mountpoint": _quoted(str(mount.path)),
    }  # fmt: skip
    query = re.sub(r"\$(\w+)", lambda match: variables[match[1]], query)
    assert "$" not in query
    return query


def _quoted(value: str) -> str:
    """As Grafana puts the value of a variable between the quotes of a regular expression matcher."""
    return re.escape(value).replace("\\", "\\\\")
