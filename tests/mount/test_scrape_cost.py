"""What a scrape of a real mount costs: CPU time of the thread that serves requests, and of the daemon as a whole."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from scraping import Mounted

pytestmark = [pytest.mark.mount, pytest.mark.timeout(600)]
SCRAPES, SCRAPE_SECONDS, PAGES_OF_EACH = 50, 0.02, 100


def cpu_seconds(pid: int, thread: int) -> float:
    return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9


def process_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("files", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_scrape_costs_the_mount_under_20_ms(tmp_path: Path, files: int) -> None:
    base = tmp_path / "cost"
    mount = Mounted(base, "--cache-size", "5G" if files > 1000 else "512M", "--metadata-ttl", "1h")
    for number in range(files):
        with (mount.source / str(number)).open("wb") as file:
            file.truncate(PAGES_OF_EACH * 4096)
    with mount.started() as process:
        subprocess.run(["sh", "-c", 'cat "$0"/* | wc -c', mount.path], check=True, stdout=subprocess.DEVNULL, timeout=300)
        url = f"http://{mount.target}/metrics"
        served, all_threads = cpu_seconds(process.pid, process.pid), process_seconds(process.pid)
        took = []
        for _ in range(SCRAPES):
            start = time.monotonic()
            with urllib.request.urlopen(url, timeout=60) as answer:
                text = answer.read().decode()
            took.append(time.monotonic() - start)
        served = (cpu_seconds(process.pid, process.pid) - served) / SCRAPES
        all_threads = (process_seconds(process.pid) - all_threads) / SCRAPES
        cache = json.loads(mount.cachefs("status", mount.path, "--json").stdout)["statistics"]["cache"]
    assert cache["clean_pages"] == files * PAGES_OF_EACH
    assert f"cachefs_cache_resident_bytes{{mountpoint=\"{mount.path}\"}}" in text
    amounts = f"{served * 1e3:.2f} ms of the serving thread, {all_threads * 1e3:.1f} ms of the daemon"
    print(f"{cache['clean_pages']} pages of {files} files: {amounts}, {statistics.median(took) * 1e3:.1f} ms until answered")
    assert 0 < served < SCRAPE_SECONDS
