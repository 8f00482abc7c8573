"""`make screenshot`: the page of a mount that works, as docs/page.png, taken by a headless Chromium."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cachefs import control  # noqa: E402
from cachefs.state import find_daemon  # noqa: E402
from scripts.browser import browsing  # noqa: E402

P, MIB = 4096, 1 << 20
TARGET = ROOT / "docs" / "page.png"
SECONDS = 25.0  # of work, for the curves
FILES = {
    "photos/2024-06-spain.tar": 24 * MIB, "src/kernel.git/pack-91c2.pack": 40 * MIB, "db/orders.sqlite": 6 * MIB,
    "mail/inbox.mbox": 9 * MIB, "models/words.bin": 60 * MIB, "notes.txt": 7000, "db/orders.sqlite-wal": MIB // 2,
}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-screenshot-") as name:
        base = Path(name)
        source, path = base / "nas", base / "projects"
        for file, size in FILES.items():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes(os.urandom(size))
        for i in range(12):
            (source / f"src/module{i}.c").write_bytes(os.urandom(3000 + 7000 * i))
        path.mkdir()
        os.environ["CACHEFS_RUNTIME_DIR"] = str(base / "run")
        cachefs = [sys.executable, "-m", "cachefs"]
        options = ["--state-dir", str(base / "state"), "--metrics", "127.0.0.1:0", "--cache-size", "96M", "--dirty-expire", "3s"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*cachefs, "mount", str(source), str(path), *options], check=True, env=environment, cwd="/")
        try:
            record = find_daemon(str(path))
            assert record is not None
            *_, status = control.request(record.socket, {"command": "status"})
            with browsing() as browser:
                browser.size(1200, 640)
                browser.open(str(status["page"]))
                browser.wait("window.cachefs && cachefs.draws > 0")
                subprocess.run([*cachefs, "pin", str(path / "db/orders.sqlite")], check=True, env=environment)
                work(path)
                browser.wait("cachefs.shown.length > 15")
                row = browser.run("cachefs.shown.findIndex(file => file.path === 'photos/2024-06-spain.tar')")
                box = browser.run("(() => { const b = at('picture').getBoundingClientRect(); return [b.x, b.y]; })()")
                browser.click(box[0] + 320, box[1] + 18 * int(row) + 9)
                browser.wait("!at('details').hidden && at('extents').rows.length > 0")
                (path / "db/orders.sqlite-wal").write_bytes(os.urandom(MIB // 4))
                time.sleep(1.5)  # until the page has drawn that, too
                TARGET.write_bytes(browser.screenshot())
                assert not browser.problems, browser.problems
        finally:
            subprocess.run([*cachefs, "umount", str(path)], check=False, env=environment)
    print(TARGET.relative_to(ROOT))


def work(path: Path) -> None:
    """Reads and writes of several kinds, for as long as the curves need."""
    end = time.monotonic() + SECONDS
    turn = 0
    while time.monotonic() < end:
        for i in range(12):
            (path / f"src/module{i}.c").read_bytes()
        with open(path / "models/words.bin", "rb", buffering=0) as file:
            for i in range(150):
                os.pread(file.fileno(), P, (turn * 7919 + i * 104729) % (60 * 256) * P)
        with open(path / "photos/2024-06-spain.tar", "rb", buffering=0) as file:
            for start in range(3):
                os.pread(file.fileno(), MIB // 2, (turn * 3 + start) % 40 * 3 * MIB // 5)
        with open(path / "src/kernel.git/pack-91c2.pack", "rb", buffering=0) as file:
            os.pread(file.fileno(), 2 * MIB, turn % 20 * 2 * MIB)
        with open(path / "mail/inbox.mbox", "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), os.urandom(64 * P), turn % 30 * 70 * P)
        (path / "notes.txt").read_bytes()
        turn += 1
        time.sleep(0.3)


if __name__ == "__main__":
    main()
