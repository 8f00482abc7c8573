"""`cachefs top` in a terminal of 80x24, and `cachefs map`, on a real mount."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pyte
import pytest
from command import Command, wait_until
from PIL import Image

from cachefs.page.cells import COLOURS

pytestmark = pytest.mark.mount
P = 4096
FILES = {"small": 10, "middle": 50, "large": 200}  # pages


class Terminal:
    """A program in a pseudo-terminal, and what its screen shows."""

    def __init__(self, cachefs: Command, *arguments: object, columns: int = 80, lines: int = 24) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.received = b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process: subprocess.Popen[str] = cachefs.start(
            *cachefs.words(*arguments), env={"TERM": "xterm-256color"}, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True,
        )  # fmt: skip
        self.slave = slave

    def pump(self) -> None:
        while wait([self.master], 0):
            with contextlib.suppress(OSError):
                part = os.read(self.master, 1 << 16)
                self.received += part
                self._stream.feed(part)
                continue
            return

    def until(self, true: Callable[[str], object], what: str) -> str:
        """The screen, once it is as it should be."""

        def look() -> bool:
            self.pump()
            return bool(true(self.text))

        try:
            wait_until(look, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None
        return self.text

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    @property
    def selected(self) -> str:
        """The name in the line that is shown in reverse, after the headers."""
        for number, line in enumerate(self.screen.display):
            if self.screen.buffer[number][4].reverse and "hits" not in line and "pages hit" not in line:
                return line.split()[-1]
        return ""

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> None:
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def mounted(cachefs: Command) -> Iterator[Command]:
    for name, pages in FILES.items():
        (cachefs.source / name).write_bytes(os.urandom(pages * P))
    cachefs.mount("--dirty-expire", "1h", "--write-through", "off", "--policy", "lru")
    for name, times in (("small", 1), ("middle", 4), ("large", 2)):
        for _ in range(times):
            (cachefs.path / name).read_bytes()
    (cachefs.path / "written").write_bytes(b"x" * 3 * P)
    yield cachefs


@pytest.fixture
def terminal(mounted: Command) -> Iterator[Terminal]:
    found = Terminal(mounted, "top", mounted.path, "--interval", "200ms")
    try:
        yield found
    finally:
        found.close()


def order(text: str) -> list[str]:
    """Names of the files in the order of the screen, whose last line is for messages."""
    names = [line.split()[-1] for line in text.splitlines()[:-1] if line.strip()]
    return [name for name in names if name in (*FILES, "written")]


def test_a_frame_has_all_figures_in_80x24(mounted: Command) -> None:
    wait_until(lambda: len(json.loads(mounted.run("top", "--json").stdout)["samples"]) > 2, "samples")
    done = mounted.run("top", mounted.path, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 24 and max(map(len, lines)) <= 80
    for words in (f"mount      {mounted.path}, up ", "hit rate ", "pages/s", "evictions 0 pages/s", "12 KiB of ", "writeback 0 B",
                  "of prefetched pages used", "large", "middle", "small", "written", "s sort"):  # fmt: skip
        assert words in done.stdout, done.stdout
    assert re.search(r"^ +\d+ +\d+ +\d+ +200 KiB +0 B middle", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^ +[\d.-]+ % +\S+ \S+ +12 KiB python3?", done.stdout, re.MULTILINE), done.stdout


def test_keys_sort_select_drop_and_pin(mounted: Command, terminal: Terminal) -> None:
    terminal.until(lambda text: "s sort" in text and set(order(text)) == {*FILES, "written"}, "the first frame")
    terminal.press("s")
    terminal.until(lambda text: "*hits " in text and order(text)[0] == "large", "files by hits")
    terminal.press("sss")
    terminal.until(lambda text: "*dirty" in text and order(text)[0] == "written", "files by unwritten bytes")
    terminal.press("ss")
    terminal.until(lambda text: "*hits " in text, "files by hits again")
    assert terminal.selected == "large"
    terminal.press("\x1b[B")
    terminal.until(lambda _: terminal.selected == "middle", "the second file")
    terminal.press("d")
    terminal.until(lambda text: "dropped 200 KiB of middle" in text and "middle" not in order(text), "the drop")
    assert terminal.selected == "large", "the first one again"
    terminal.press("p")
    terminal.until(lambda text: "large (pinned)" in text and "pinned large" in text, "the pin")
    assert json.loads(mounted.run("pin", "--json").stdout)[0]["file"] == str(mounted.path / "large")
    terminal.press("u")
    terminal.until(lambda text: "unpinned large" in text and "(pinned)" not in text, "the unpin")
    terminal.press("u")
    terminal.until(lambda text: "large is not pinned" in text, "the refusal")
    terminal.press("\x1b[Akj?x\x1b[5~")
    terminal.press("q")
    terminal.until(lambda _: terminal.process.poll() is not None, "the end")
    assert terminal.process.returncode == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before, "the terminal is as it was"


def test_it_is_live(mounted: Command, terminal: Terminal) -> None:
    terminal.until(lambda text: "s sort" in text, "the first frame")
    (mounted.source / "new").write_bytes(os.urandom(30 * P))
    begin = time.monotonic()
    (mounted.path / "new").read_bytes()
    terminal.until(lambda text: "120 KiB" in text and re.search(r"B new *$", text, re.MULTILINE), "the new file")
    assert time.monotonic() - begin < 3.0
    terminal.until(lambda text: re.search(r"hit rate .*[▁▂▃▄▅▆▇█]", text), "a bar")


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (40, 10), (20, 5), (200, 60)])
def test_any_terminal_will_do(mounted: Command, columns: int, lines: int) -> None:
    terminal = Terminal(mounted, "top", columns=columns, lines=lines)
    try:
        terminal.until(lambda text: text.strip().startswith("mount"), "a frame")
        terminal.press("sjq")
        terminal.until(lambda _: terminal.process.poll() is not None, "the end")
        assert terminal.process.returncode == 0
        assert b"Traceback" not in terminal.received
    finally:
        terminal.close()


def test_a_daemon_that_goes_ends_it_with_a_line(mounted: Command, terminal: Terminal) -> None:
    terminal.until(lambda text: "s sort" in text, "the first frame")
    assert mounted.umount().returncode == 0
    terminal.until(lambda _: terminal.process.poll() is not None, "the end")
    assert terminal.process.returncode == 1
    last = terminal.received.decode().rstrip().splitlines()[-1]
    assert re.search(rf"cachefs: {mounted.path}: the daemon [a-z ]+", last), terminal.received[-300:]
    assert b"Traceback" not in terminal.received
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_without_a_mount_or_a_terminal_it_says_so(cachefs: Command) -> None:
    for arguments in (("top", "--once"), ("top", "--json"), ("map", "--png", "x.png")):
        done = cachefs.run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "cachefs: no cachefs is mounted\n")
        done = cachefs.run(*arguments, cachefs.path)
        assert done.returncode == 1 and done.stderr.startswith("cachefs: ") and done.stderr.count("\n") == 1
    assert cachefs.run("top").returncode == 2
    assert "is not a time" in cachefs.run("top", "--once", "--interval", "x").stderr
    assert cachefs.run("map").returncode == 2


def test_json_has_names_that_parse_whatever_bytes_they_hold(mounted: Command) -> None:
    Path(os.fsdecode(bytes(mounted.path) + b"/\xff\n\\")).write_bytes(b"x")

    def names() -> set[str]:
        return {file["file"] for file in json.loads(mounted.run("top", "--json").stdout)["files"]}

    wait_until(lambda: f"{mounted.path}/\\xff\n\\\\" in names(), "the file")
    assert len(mounted.run("top", "--once").stdout.splitlines()) == 24


def test_a_terminal_without_utf_8_will_do(mounted: Command) -> None:
    (mounted.path / "ümläut-…").write_bytes(b"x")
    mounted.environment["PYTHONIOENCODING"] = "ascii"
    done = mounted.run("top", "--once")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.isascii()


# --- map


def likest(pixel: tuple[int, int, int]) -> str:
    return min(COLOURS, key=lambda text: sum(abs(int(text[i : i + 2], 16) - pixel[i // 2]) for i in (1, 3, 5)))


def test_map_draws_the_same_cells(mounted: Command) -> None:
    mounted.run("drop", mounted.path / "small")
    with open(mounted.path / "small", "rb", buffering=0) as file:
        os.pread(file.fileno(), P, 8 * P)  # and nothing else: it is no sequence
    done = mounted.run("map", mounted.path, "--png", "picture.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(mounted.base.glob("picture.png.*"))
    with Image.open(mounted.base / "picture.png") as image:
        pixels = image.convert("RGB")
        rows = {name: 46 + at * 18 + 9 for at, name in enumerate(sorted((*FILES, "written")))}
        assert likest(pixels.getpixel((312 + 2, rows["middle"]))) == COLOURS[5]
        assert likest(pixels.getpixel((312 + 2, rows["written"]))) == COLOURS[0]
        track = pixels.getpixel((312 + 5 * 5 + 2, rows["small"]))
        assert track == (0x20, 0x25, 0x2D)
        assert likest(pixels.getpixel((312 + 8 * 5 + 2, rows["small"]))) == COLOURS[5]


def test_map_of_many_files_and_bad_targets(mounted: Command) -> None:
    for i in range(300):
        (mounted.path / f"many{i}").write_bytes(b"x")
    Path(os.fsdecode(bytes(mounted.path) + b"/\xff\n\\")).write_bytes(b"x")
    assert mounted.run("map", "--png", "many.png").returncode == 0
    with Image.open(mounted.base / "many.png") as image:
        assert image.width > 200 and image.height > 100
    for target in ("no/such/directory.png", ".", str(mounted.base)):
        done = mounted.run("map", "--png", target)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("cachefs: can't write ") and done.stderr.count("\n") == 1
    assert not list(mounted.base.glob("*.new-*"))
