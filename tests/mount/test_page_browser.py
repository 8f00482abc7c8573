"""The page in a real browser, on a real mount: right cells, live, and nothing that clients do reaches the mount."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from cachefs.page.cells import COLOURS
from mounts import Factory, Mount, wait_until
from scripts.browser import Browser, browsing, program

pytestmark = pytest.mark.mount
P = 4096
LIVE_SECONDS = 2.0
NO_READAHEAD = ("--readahead-max", "0", "--metrics", "127.0.0.1:0")
BY_NAME = "[...cachefs.files.values()].find(file => file.path === {name!r})"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if program() is None:
        pytest.skip("no chromium here: scripts/setup.sh test installs it where Debian has it")
    with browsing() as found:
        yield found


def page_of(mount: Mount) -> str:
    return str(mount.ask("status")["page"])


def opened(browser: Browser, mount: Mount) -> Browser:
    browser.open("about:blank")
    browser.wait("location.href === 'about:blank'")
    browser.problems.clear()  # those of pages whose mounts have gone
    browser.size(1200, 700)
    browser.open(page_of(mount))
    browser.wait("window.cachefs && cachefs.draws > 0")
    return browser


def cells(browser: Browser, name: str) -> str:
    return str(browser.run(f"({BY_NAME.format(name=name)} || {{cells: ''}}).cells"))


def colour(browser: Browser, name: str, cell: int) -> str:
    """Which of COLOURS, or back, the middle of a cell has on the screen; the pale ones of old pages too."""
    pixel = browser.run(f"""(() => {{
        const m = measures(at("scroll").clientWidth), row = cachefs.shown.findIndex(file => file.path === {name!r});
        const x = m.left + (cell => cell * m.cell + 1)({cell}), y = row * m.row + m.row - 5 - at("scroll").scrollTop;
        return [...at("picture").getContext("2d").getImageData(x, y, 1, 1).data];
    }})()""")
    back = (0x20, 0x25, 0x2D)
    offsets = [pixel[i] - back[i] for i in range(3)]
    if max(map(abs, offsets)) < 8:
        return "back"

    def likeness(text: str) -> float:
        whole = [int(text[i : i + 2], 16) - back[i // 2] for i in (1, 3, 5)]
        size = (sum(w * w for w in whole) * sum(o * o for o in offsets)) ** 0.5
        return sum(w * o for w, o in zip(whole, offsets, strict=True)) / size

    return max(COLOURS, key=likeness)


def test_cells_are_those_of_a_known_state_and_change_within_two_seconds(browser: Browser, mounted: Factory) -> None:
    mount = mounted(*NO_READAHEAD, "--dirty-expire", "1h", "--write-through", "off")
    for name in ("known", "live"):
        (mount.source / name).write_bytes(os.urandom(100 * P))
    fd = os.open(mount.path / "known", os.O_RDWR)
    for page in (*range(16), 40, *range(60, 100)):
        os.pread(fd, P, page * P)
    os.pwrite(fd, b"x" * P, 41 * P)
    page = opened(browser, mount)
    browser.wait("cachefs.files.size === 1")
    clean, dirty = "X", "D"
    assert cells(page, "known") == clean * 16 + "." * 24 + clean + dirty + "." * 18 + clean * 40
    green, red = COLOURS[5], COLOURS[0]
    told = {cell: colour(page, "known", cell) for cell in (0, 15, 16, 39, 40, 41, 42, 60, 99)}
    assert told == {0: green, 15: green, 16: "back", 39: "back", 40: green, 41: red, 42: "back", 60: green, 99: green}

    def live(act: Callable[[], object], script: str) -> None:
        act()
        assert browser.wait(script, 30.0) < LIVE_SECONDS

    live_cells = f"({BY_NAME.format(name='live')} || {{cells: ''}}).cells"
    live(lambda: (mount.path / "live").read_bytes(), f"{live_cells} === '{clean * 100}'")
    live(lambda: os.fsync(fd), f"!{BY_NAME.format(name='known')}.cells.includes('{dirty}')")
    os.close(fd)
    live(lambda: os.unlink(mount.path / "live"), "cachefs.files.size === 1")
    assert browser.problems == []


def test_a_click_shows_the_extents_of_a_file(browser: Browser, mounted: Factory) -> None:
    mount = mounted(*NO_READAHEAD)
    (mount.source / "a\n<script>").write_bytes(os.urandom(50 * P))
    (mount.source / "b").write_bytes(os.urandom(50 * P))
    for name in ("a\n<script>", "b"):
        with open(mount.path / name, "rb", buffering=0) as file:
            for page in (*range(8), *range(20, 30)):
                os.pread(file.fileno(), P, page * P)
    page = opened(browser, mount)
    browser.wait("cachefs.files.size === 2")
    box = browser.run("(() => { const box = at('picture').getBoundingClientRect(); return [box.x, box.y]; })()")
    page.click(box[0] + 320, box[1] + 9)
    browser.wait("!at('details').hidden && at('name').textContent !== ''")
    assert browser.run("at('name').textContent") == "a\n<script>"
    rows = browser.run("[...at('extents').rows].map(row => [...row.cells].slice(0, 3).map(cell => cell.textContent))")
    assert rows == [["0", str(8 * P), "clean"], [str(20 * P), str(10 * P), "clean"]]
    assert browser.problems == []


def test_curves_are_drawn_and_the_daemon_s_end_is_said(browser: Browser, mounted: Factory) -> None:
    mount = mounted(*NO_READAHEAD, "--dirty-expire", "1h", "--write-through", "off")
    (mount.source / "f").write_bytes(os.urandom(50 * P))
    page = opened(browser, mount)
    (mount.path / "f").read_bytes()
    (mount.path / "g").write_bytes(b"x" * 10 * P)

    def drawn(canvas: str) -> str:
        return f"at('{canvas}').getContext('2d').getImageData(0, 0, at('{canvas}').width, 70).data.some(byte => byte)"

    browser.wait(f"{drawn('hits')} && {drawn('unwritten')} && at('rate').textContent.includes('%')")
    assert browser.run("at('dirty').textContent").startswith("40 KiB of at most ")
    mount.unmount()
    page.wait("!at('trouble').hidden")
    assert "no answer" in browser.run("at('trouble').textContent")


def test_ten_thousand_files_stay_smooth(browser: Browser, mounted: Factory) -> None:
    """A frame of 10,000 strips takes the page under 50 ms, of files and of all at once, and only the visible part is drawn."""
    mount = mounted("--metrics", "127.0.0.1:0")
    for directory in range(100):
        (mount.source / f"d{directory}").mkdir()
        for file in range(100):
            (mount.source / f"d{directory}" / f"f{file}").write_bytes(b"x" * (P if file else 200 * P))
    page = opened(browser, mount)
    for path in sorted(mount.path.glob("d*/f*")):
        path.read_bytes()
    browser.wait("cachefs.files.size === 10000", 60.0)
    longest = {}
    for view in ("files", "all"):
        page.run(f"at('view').value = '{view}', choose(), at('scroll').scrollTop = 2000")
        spent = page.run("(() => { const spent = []; for (let i = 0; i < 9; i++) { const begin = performance.now(); paint();"
                         " spent.push(performance.now() - begin); } return spent.sort((a, b) => a - b)[4]; })()")  # fmt: skip
        sorting = page.run("(() => { const begin = performance.now(); choose(); return performance.now() - begin; })()")
        longest[view] = (spent, sorting)
    print(longest)
    assert all(spent < 50 and sorting < 100 for spent, sorting in longest.values())
    assert browser.problems == []


def test_slow_odd_and_many_clients_leave_the_mount_alone(mounted: Factory) -> None:
    mount = mounted("--metrics", "127.0.0.1:0")
    (mount.source / "f").write_bytes(os.urandom(100 * P))
    (mount.path / "f").read_bytes()
    host, port = page_of(mount).removeprefix("http://").strip("/").split(":")
    odd = (
        b"", b"GET / HT", b"POST / HTTP/1.1\r\n\r\n", b"GET /../../etc/passwd HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"\0" * 20_000, b"GET / HTTP/1.0\r\nX: " + b"x" * 200_000, b"GET /picture.json HTTP/1.0\r\nHost: localhost\r\n\r\n",
    )  # fmt: skip
    clients: list[socket.socket] = []
    longest = 0.0
    try:
        for round_ in range(30):
            for request in odd:
                clients.append(socket.create_connection((host, int(port)), timeout=10.0))
                clients[-1].setblocking(False)
                try:
                    clients[-1].send(request)
                except OSError:
                    pass
            begin = time.monotonic()
            with open(mount.path / "f", "rb") as file:
                assert len(file.read()) == 100 * P
            (mount.path / f"new{round_}").write_bytes(b"x" * P)
            longest = max(longest, time.monotonic() - begin)
    finally:
        for client in clients:
            client.close()
    print(f"longest of 30 reads and writes beside {len(clients)} clients: {longest * 1e3:.0f} ms")
    assert longest < 1.0

    def answers() -> bool:
        with urllib.request.urlopen(page_of(mount) + "picture.json", timeout=10.0) as answer:
            return {strip[1] for strip in json.load(answer)["strips"]} >= {"f", "new0", "new29"}

    def answers_again() -> bool:
        try:
            return answers()
        except OSError:
            return False

    wait_until(answers_again, "an answer")
