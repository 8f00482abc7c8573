"""A real Prometheus scrapes a real mount under load, and every query of every dashboard returns figures."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytestmark = pytest.mark.mount

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
DEADLINE_SECONDS = 60.0  # everything here takes a few seconds; this is for a machine that is busy with something else
POLL_SECONDS = 0.2

# Three times the cache is read once, a part of it often; as much as the dirty limit is written and flushed.
LOAD = """
import contextlib, os, sys
os.chdir(sys.argv[1])
block = os.urandom(1 << 20)
while True:
    for name in ("large", "small", "small", "small", "small"):
        with open(name, "rb", buffering=0) as file:
            while file.read(1 << 17):
                pass
    with open("written", "wb", buffering=0) as file:
        for _ in range(4):
            file.write(block)
        os.fsync(file.fileno())
    with contextlib.suppress(FileNotFoundError):
        os.stat("missing")
    os.listdir(".")
"""

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
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is asked to end at the end, and made to if it does not."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
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


def cachefs(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cachefs", *arguments]


@contextmanager
def mounted(directory: Path) -> Iterator[tuple[Path, str]]:
    """A mount of a directory with data in it; gives the mountpoint and the address of its metrics."""
    source, mountpoint, log = directory / "source", directory / "mountpoint", directory / "cachefs.log"
    source.mkdir()
    mountpoint.mkdir()
    (source / "large").write_bytes(os.urandom(24 << 20))
    (source / "small").write_bytes(os.urandom(1 << 20))
    options = ["--cache-size", "8M", "--dirty-limit", "2M", "--metrics", "127.0.0.1:0", "--foreground"]
    command = cachefs("mount", str(source), str(mountpoint), *options, "--state-dir", str(directory / "state"))

    def status() -> dict[str, Any] | None:
        must_run(process, log)
        done = subprocess.run(
            cachefs("status", str(mountpoint), "--json"), capture_output=True, timeout=DEADLINE_SECONDS, check=False
        )
        return json.loads(done.stdout) if done.returncode == 0 else None

    try:
        with running(command, log) as process:
            metrics = wait_for("cachefs status", status, lambda: log.read_text(errors="replace"))["metrics"]
            assert isinstance(metrics, str)
            yield mountpoint, metrics
        assert process.returncode == 0, log.read_text(errors="replace")
    finally:
        # Nothing is mounted any more, unless the daemon died.
        subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], capture_output=True, timeout=30, check=False)


class Prometheus:
    """The HTTP interface of a running Prometheus."""

    def __init__(self, address: str) -> None:
        self.url = f"http://{address}/api/v1"

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
def prometheus_scraping(metrics_url: str, directory: Path) -> Iterator[Prometheus]:
    """Debian's Prometheus with the configuration we ship, but for the address and a shorter interval."""
    config, log = directory / "prometheus.yml", directory / "prometheus.log"
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for ours, theirs in (
        ('"127.0.0.1:9477"', f'"{urllib.parse.urlsplit(metrics_url).netloc}"'),
        ("scrape_interval: 15s", "scrape_interval: 1s"),
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

        yield Prometheus(wait_for("prometheus", address, lambda: log.read_text(errors="replace")))


def quoted(value: str) -> str:
    """As Grafana puts the value of a variable between the quotes of a regular expression matcher."""
    return re.escape(value).replace("\\", "\\\\")


def queries(dashboard: Path) -> list[tuple[str, str]]:
    """(panel's title, query) of a dashboard as it is in the file."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


def substituted(query: str, instance: str, mountpoint: str) -> str:
    variables = {"__rate_interval": "10s", "__range": "1m", "instance": instance, "mountpoint": mountpoint}
    query = re.sub(r"\$(\w+)", lambda match: variables[match[1]], query)
    assert "$" not in query
    return query


def assert_every_panel_has_data(prometheus: Prometheus, metrics_url: str, mountpoint: str) -> None:
    instance = urllib.parse.urlsplit(metrics_url).netloc
    wanted = {
        (dashboard.name, title, substituted(query, quoted(instance), quoted(mountpoint)))
        for dashboard in DASHBOARDS
        for title, query in queries(dashboard)
    }
    assert wanted

    def all_answered() -> bool | None:
        wanted.difference_update([entry for entry in wanted if prometheus.figures(entry[2])])
        return not wanted or None

    wait_for("panels without data", all_answered, lambda: "\n".join(map(repr, sorted(wanted))))


def assert_variables_offer_the_mount(prometheus: Prometheus, metrics_url: str, mountpoint: str) -> None:
    instance = urllib.parse.urlsplit(metrics_url).netloc
    expected = {"instance": [instance], "mountpoint": [mountpoint]}
    for dashboard in DASHBOARDS:
        offered = {}
        for variable in json.loads(dashboard.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert match
                selector = substituted(match[1], quoted(instance), quoted(mountpoint))
                offered[variable["name"]] = prometheus.ask(f"label/{match[2]}/values", match=selector)
        assert offered == expected


def test_every_panel_shows_data_of_a_mount_under_load(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("the program prometheus is not installed (Debian package prometheus)")
    with ExitStack() as stack:
        mountpoint, metrics_url = stack.enter_context(mounted(tmp_path))
        prometheus = stack.enter_context(prometheus_scraping(metrics_url, tmp_path))
        load_log = tmp_path / "load.log"
        load = stack.enter_context(running([sys.executable, "-c", LOAD, str(mountpoint)], load_log))
        assert_every_panel_has_data(prometheus, metrics_url, str(mountpoint))
        assert_variables_offer_the_mount(prometheus, metrics_url, str(mountpoint))
        must_run(load, load_log)
        assert prometheus.figures("min_over_time(up[1m])") == [1.0]
