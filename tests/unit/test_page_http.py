"""The page over HTTP: what it answers, whom it answers, and that odd, slow or many clients are refused or cut off."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry

from cachefs import httpserver
from cachefs.cache.page import PAGE_SIZE
from cachefs.cache.residency import STATES
from cachefs.config import make_config
from cachefs.metrics import MetricsServer
from cachefs.page import web
from cachefs.page.cells import COLOURS
from cachefs.page.picture import Picture
from cachefs.page.web import FromThread, Page
from cachefs.tasks import Guarded
from test_picture import Scene

P = PAGE_SIZE
ROOT = Path(__file__).parents[2]
NAMES = (b"plain", b"\xff\xfe", b"<b>&amp;", b'quo"te\\', b"line\nbreak")
DEADLINE_SECONDS = 30.0


class Served:
    """A scene with five files of which something is cached, in a thread of its own, and its page."""

    def __init__(self, source: Path) -> None:
        self.url = ""
        self.failing: Exception | None = None  # what a look ends with
        self._ready = threading.Event()
        self._source = source
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)
        self._thread.start()
        assert self._ready.wait(DEADLINE_SECONDS)

    async def _run(self) -> None:
        self._token, self._done = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as nursery:
            self.scene = Scene(self._source, nursery)
            for name in NAMES:
                _, number = await self.scene.open(os.fsdecode(name))
                for _ in range(2):
                    await self.scene.stack.files.read(number, 0, 2 * P)
            served = self

            class Failing(Picture):
                async def look(self) -> Any:
                    if served.failing is not None:
                        raise served.failing
                    return await super().look()

            self.picture = Failing(self.scene.stack, self.scene.picture.history)
            page = Page(self.picture, FromThread(Guarded(nursery), self._token), "127.0.0.1")
            server = MetricsServer("127.0.0.1", 0, True, CollectorRegistry(), page)
            self.url = server.url.removesuffix("metrics")
            self._ready.set()
            await self._done.wait()
            await trio.to_thread.run_sync(server.close)
            self.scene.close()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        self._token.run_sync_soon(self._done.set)
        self._thread.join(DEADLINE_SECONDS)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").strip("/").split(":")
        return host, int(port)

    def get(self, path: str = "", method: str = "GET", **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def raw(self, data: bytes, seconds: float = DEADLINE_SECONDS) -> bytes:
        """What comes back for these bytes until the server closes."""
        with socket.create_connection(self.address, timeout=seconds) as connection:
            answer = b""
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(data)
                while part := connection.recv(1 << 16):
                    answer += part
            return answer

    def picture_json(self, **query: object) -> dict[str, Any]:
        status, body = self.get("picture.json?" + "&".join(f"{key}={value}" for key, value in query.items()))
        assert status == 200, body
        return dict(json.loads(body))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    source = tmp_path / "source"
    source.mkdir()
    for name in NAMES:
        Path(os.fsdecode(bytes(source) + b"/" + name)).write_bytes(os.urandom(4 * P))
    found = Served(source)
    try:
        yield found
    finally:
        found.stop()


def test_the_page_and_its_files_are_served_and_name_no_other_address(served: Served) -> None:
    for path, (name, kind) in web.STATIC.items():
        with urllib.request.urlopen(served.url + path[1:], timeout=DEADLINE_SECONDS) as answer:
            assert answer.headers["Content-Type"] == kind
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            body = answer.read()
        assert body == (ROOT / "cachefs" / "page" / "static" / name).read_bytes()
        assert not re.search(rb"https?://|//[a-z0-9.-]+\.[a-z]+/", body), "an address outside the machine"
    assert served.get("metrics")[0] == 200


def test_the_picture_parses_whatever_bytes_names_hold(served: Served) -> None:
    picture = served.picture_json()
    assert {strip[1] for strip in picture["strips"]} == {"plain", "\\xff\\xfe", "<b>&amp;", 'quo"te\\\\', "line\nbreak"}
    assert {strip[8] for strip in picture["strips"]} == {"XX.."}
    assert picture["all"] and picture["states"] == list(STATES) and picture["colours"] == list(COLOURS)
    assert picture["page_misses"] == 2 * len(NAMES)


def test_a_client_gets_what_is_new_since_its_last_question(served: Served) -> None:
    first = served.picture_json()
    again = served.picture_json(since=first["version"], time=first["samples"][-1][0])
    assert not again["all"] and again["strips"] == [] and again["samples"] == [] and "colours" not in again
    for odd in ("", "x", "0-0", f"{first['version']}0", "-", "%00", "a" * 1000, first["version"].split("-")[0] + "--1"):
        assert served.picture_json(since=odd)["all"], odd


def test_one_file_is_told_by_extents(served: Served) -> None:
    for strip in served.picture_json()["strips"]:
        status, body = served.get(f"file.json?inode={strip[0]}")
        facts = json.loads(body)
        assert (status, facts["path"], facts["size"], facts["more"]) == (200, strip[1], 4 * P, False)
        (extent,) = facts["extents"]
        assert extent[:3] == [0, 2 * P, "clean"] and extent[4] == "unknown"


@pytest.mark.parametrize(
    "path",
    [
        "file.json", "file.json?inode=", "file.json?inode=x", "file.json?inode=99999999", "file.json?inode=1", "x", "page.js/",
        "picture.json?time=x", "file.json?" + "&".join(f"a{i}=1" for i in range(100)), "static/index.html", "..",
        "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd",
        "page.js/../../../../etc/passwd", "//etc/passwd", ".%00", "static/..%2f..%2f__init__.py",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found(served: Served, path: str) -> None:
    request = f"GET /{path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
    answer = served.raw(request)
    assert answer.startswith(b"HTTP/1.0 404 "), answer[:200]
    assert b"root:" not in answer and b"import" not in answer


def test_only_get_and_head_are_answered(served: Served) -> None:
    for path in ("", "page.js", "picture.json", "file.json?inode=5"):
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"):
            assert served.get(path, method)[0] == 405
    assert served.get("", "HEAD") == (200, b"")
    assert served.raw(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello").startswith(b"HTTP/1.0 405 ")


def test_only_addresses_and_names_of_this_machine_are_answered(served: Served) -> None:
    port = served.address[1]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", "[::1]", socket.gethostname(), "LOCALHOST"):
        assert served.get("", Host=host)[0] == 200, host
    evil = ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "[evil]", "x@127.0.0.1")
    for host in evil:
        for path in ("", "picture.json", "file.json?inode=5"):
            assert served.get(path, Host=host)[0] == 421, host
    assert served.raw(b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 421 ")
    assert served.get("metrics", Host="evil.example")[0] == 200, "names no files; scrapers may call it by any name"


def test_no_more_than_this_machine_gets_it_unless_that_was_asked_for() -> None:
    def page(**options: str) -> bool:
        return make_config("/s", "/m", options, memory_bytes=1 << 34).page

    for loopback in ("127.0.0.1:1", "127.3.4.5:1", "localhost:1", "[::1]:1"):
        assert page(metrics=loopback) and page(metrics=loopback, page="on") and not page(metrics=loopback, page="off")
    for address in ("0.0.0.0:1", "[::]:1", "192.0.2.7:1", "host.example:1", "localhost.example:1"):
        assert not page(metrics=address) and page(metrics=address, page="on")
    assert not page(metrics="off", page="on")


def test_a_page_that_is_off_is_not_there() -> None:
    server = MetricsServer("127.0.0.1", 0, True, CollectorRegistry())
    try:
        for path in ("picture.json", "file.json", "page.js"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(server.url.replace("metrics", path), timeout=DEADLINE_SECONDS)
    finally:
        server.close()


def test_a_look_that_fails_costs_one_answer(served: Served) -> None:
    served.failing = RuntimeError("bug")
    assert served.get("picture.json")[0] == 500
    served.failing = None
    assert served.get("picture.json")[0] == 200


def test_a_mount_that_does_not_answer_is_told_in_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PATIENCE_SECONDS", 0.2)
    release = threading.Event()
    served._token.run_sync_soon(release.wait)  # the trio thread is stuck
    try:
        assert served.get("picture.json")[0] == 503
        assert served.get("file.json?inode=5")[0] == 503
        assert served.get("")[0] == 200
    finally:
        release.set()
    assert served.get("picture.json")[0] == 200


# --- odd, slow and many clients


def test_huge_headers_and_request_lines_are_refused(served: Served) -> None:
    for request in (
        b"GET / HTTP/1.0\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.0\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(5000)) + b"\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.0\r\n\r\n",
        b"\0" * 100_000,
        b"GET / HTTP/1.0\r\nHost: localhost\r\n" + b"X: y\r\n" * 90 + b"Y: " + b"y" * 20_000 + b"\r\n\r\n",
    ):
        answer = served.raw(request)
        assert answer == b"" or re.match(rb"HTTP/1\.[01] 4\d\d |.*<!DOCTYPE", answer, re.DOTALL), answer[:100]
        assert b"200 OK" not in answer
    assert served.get("")[0] == 200


def test_what_is_no_http_is_refused(served: Served) -> None:
    for line in (b"", b"hello", b"GET", b"GET / HTTP/9.9", b"GET / FTP/1.0", b"\xff\xfe"):
        assert b"200 OK" not in served.raw(line + b"\r\n\r\n")
    assert served.get("")[0] == 200


def test_a_client_that_drips_is_cut_off_however_lively_it_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpserver, "CLIENT_TIMEOUT_SECONDS", 0.5)
    begin = time.monotonic()
    with socket.create_connection(served.address, timeout=DEADLINE_SECONDS) as connection:
        connection.settimeout(0.05)
        cut = False
        while not cut and time.monotonic() - begin < DEADLINE_SECONDS:
            try:
                connection.send(b"X")
                cut = connection.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                cut = True
    assert cut and time.monotonic() - begin < DEADLINE_SECONDS / 2


def test_a_client_that_does_not_take_its_answer_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpserver.Handler, "timeout", 0.5)
    monkeypatch.setattr(httpserver, "CLIENT_TIMEOUT_SECONDS", 0.5)
    assert served.picture_json()
    large = next(iter(served.picture.shown.values()))
    large.text = json.dumps("x" * (64 << 20))  # more than sockets hold
    served.scene.later_seconds += 10.0
    frame_bytes = 0
    with socket.create_connection(served.address, timeout=DEADLINE_SECONDS) as connection:
        connection.sendall(b"GET /picture.json HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1) == b"H"
        deadline = time.monotonic() + DEADLINE_SECONDS
        while answering() and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(OSError):
            while part := connection.recv(1 << 20):
                frame_bytes += len(part)
    assert frame_bytes < 64 << 20
    assert served.get("")[0] == 200


def answering() -> int:
    """Requests that have a thread now."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_too_many_clients_are_sent_away_and_others_served_again_afterwards(served: Served) -> None:
    idle = [socket.create_connection(served.address, timeout=DEADLINE_SECONDS) for _ in range(3 * httpserver.MOST_CLIENTS)]
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        told = b""
        while b"503" not in told and time.monotonic() < deadline:
            told = served.raw(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", 5.0)
        assert b"too many clients" in told
        assert answering() <= httpserver.MOST_CLIENTS
    finally:
        for connection in idle:
            connection.close()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while b"200 OK" not in served.raw(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"):
        assert time.monotonic() < deadline
