"""`make bench-full` with little of everything, to its end and interrupted midway."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mounts import ROOT, wait_until

BENCH = [sys.executable, str(ROOT / "bench" / "full.py"), "--quick", "--rounds", "1"]
pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(shutil.which("fio") is None or not os.path.exists("/dev/fuse"), reason="fio or /dev/fuse is missing"),
]


def processes_in(work: Path) -> set[int]:
    """Those whose command line names something below `work`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(work) in words:
                found.add(int(entry.name))
    return found


def mounts_in(work: Path) -> list[str]:
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [place for place in places if place.startswith(str(work))]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_midway_it_leaves_no_mount_and_no_process(tmp_path: Path, signal_number: int) -> None:
    out = tmp_path / "figures.json"
    work = tmp_path / "work"
    work.mkdir()
    command = [*BENCH, "--only", "metadata,hits", "--json", str(out), "--work", str(work)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: mounts_in(work) or process.poll() is not None, "a mount")
        assert process.poll() is None
        process.send_signal(signal_number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert not mounts_in(work)
        assert not processes_in(work)
        assert not list(work.iterdir())
        assert "interrupted" in " ".join(json.loads(out.read_text())["notes"])
    finally:
        process.kill()
        process.wait()
        for mountpoint in mounts_in(work):
            subprocess.run(["fusermount3", "-uz", mountpoint], check=False)


def test_a_run_without_a_peer_says_so_and_prints_each_promise(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("fusermount3", "find"):  # and no bindfs, mergerfs or unionfs
        (programs / name).symlink_to(shutil.which(name) or "")
    out = tmp_path / "figures.json"
    command = [*BENCH, "--only", "metadata", "--json", str(out), "--work", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PATH": str(programs)}, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert any(note.startswith("bindfs: skipped") for note in figures["notes"])
    assert {figure["subject"] for figure in figures["figures"]} >= {"bare", "cachefs"}
    assert all(verdict["met"] is None for verdict in figures["verdicts"] if "stat" in verdict["asked"])
    assert "not measured" in done.stdout and "4 KiB hit, 1 reader, wall" in done.stdout
    assert not mounts_in(tmp_path)
