"""The page over HTTP: static files, the picture and one file's extents as JSON. It reads, and changes nothing.

It shows names of files. So it is served where only this machine can ask (`Config.page`), and answers only those who call it by
an address or by a name of this machine: a web site whose name was made to mean 127.0.0.1 gets nothing (DNS rebinding).
"""

import ipaddress
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import CancelledError, Future
from importlib import resources
from itertools import islice
from typing import TypeVar
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIEnvironment

import trio

from cachefs.cache.residency import STATES, extents
from cachefs.entries import escaped
from cachefs.history import Sample
from cachefs.page.cells import AGE_STEPS, AGES, CELLS, COLOURS
from cachefs.page.picture import Frame, NotCached, Picture
from cachefs.tasks import Spawner

T = TypeVar("T")

PATIENCE_SECONDS = 5.0  # for the mount to give an answer
MOST_EXTENTS = 2000  # of a file that is clicked on; the rest is for `cachefs ls`
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
HEADERS = [
    ("Allow", "GET, HEAD"),
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
]
LOOK = {
    "states": STATES, "colours": COLOURS, "ages": AGES, "age_steps": AGE_STEPS, "most_cells": CELLS, "fields": Sample._fields,
}  # fmt: skip

log = logging.getLogger(__name__)


class FromThread:
    """Has an async function run in the trio thread for another one, which waits for `PATIENCE_SECONDS` and no thread more."""

    def __init__(self, tasks: Spawner, token: trio.lowlevel.TrioToken) -> None:
        self._tasks, self._token = tasks, token

    def __call__(self, function: Callable[[], Awaitable[T]]) -> T:
        answer: Future[T] = Future()

        async def run() -> None:
            try:
                answer.set_result(await function())
            except Exception as error:
                answer.set_exception(error)
            finally:
                answer.cancel()  # if there is none: the mount is ending

        def start() -> None:
            try:
                self._tasks.start_soon(run)
            except RuntimeError:  # no more tasks: the mount has just ended
                answer.cancel()

        self._token.run_sync_soon(start)
        return answer.result(PATIENCE_SECONDS)


class Page:
    """The WSGI application of `paths`; `host` is the address that it is served on, as the user gave it."""

    paths = frozenset((*STATIC, "/picture.json", "/file.json"))

    def __init__(self, picture: Picture, ask: FromThread, host: str) -> None:
        self._picture, self._ask = picture, ask
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}
        files = resources.files("cachefs.page") / "static"
        self._static = {path: ((files / name).read_bytes(), kind) for path, (name, kind) in STATIC.items()}

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        status, kind, body = self._answer(environ)
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *HEADERS])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: WSGIEnvironment) -> tuple[str, str, bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refusal("405 Method Not Allowed", "only GET and HEAD are answered")
        if not self._is_ours(environ.get("HTTP_HOST", "")):
            return _refusal("421 Misdirected Request", "call this page by an address or by the name of this machine")
        if path in self._static:
            body, kind = self._static[path]
            return "200 OK", kind, body
        try:
            query = parse_qs(environ.get("QUERY_STRING", ""), max_num_fields=10)
            wanted = {name: values[0] for name, values in query.items()}
            after_seconds, node = float(wanted.get("time", -1)), int(wanted.get("inode", -1))
        except ValueError:
            return _refusal("404 Not Found", "there is no such request")
        try:
            if path == "/picture.json":
                return "200 OK", "application/json", self._picture_json(wanted.get("since", ""), after_seconds)
            return "200 OK", "application/json", self._file(node)
        except NotCached:
            return _refusal("404 Not Found", "there is no such file in the cache")
        except (TimeoutError, CancelledError, trio.RunFinishedError):
            return _refusal("503 Service Unavailable", "the mount does not answer, or has ended")
        except Exception as error:  # a failed request must not cost the server
            log.warning("page: %s failed: %r", path, error)
            return _refusal("500 Internal Server Error", "see the log")

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header has an address, or a name of this machine; a port may follow."""
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _picture_json(self, known: str, after_seconds: float) -> bytes:
        """What is new since `known`, EPOCH-VERSION (all, if that means nothing), and samples since so many seconds."""
        frame = self._ask(self._picture.look)
        since = _version(known, frame)
        head = {
            "version": f"{frame.epoch}-{frame.version}",
            "all": since < 0,
            "time": frame.time_seconds,
            "gone": [node for version, node in frame.gone if version > since >= 0],
            "samples": [sample for sample in frame.samples if sample.time_seconds > after_seconds],
            **frame.facts,
            **(LOOK if since < 0 else {}),
        }
        strips = ",".join([text for version, text in frame.strips if version > since])
        return f'{json.dumps(head)[:-1]}, "strips": [{strips}]}}'.encode("ascii")

    def _file(self, node: int) -> bytes:
        path, size, groups = self._ask(lambda: self._picture.file(node))
        found = list(islice(extents(sorted(groups), size), MOST_EXTENTS + 1))
        answer = {
            "path": None if path is None else escaped(path),
            "size": size,
            "more": len(found) > MOST_EXTENTS,
            "extents": [(*extent[:4], escaped(extent.last_reader)) for extent in found[:MOST_EXTENTS]],
        }
        return json.dumps(answer).encode("ascii")


def _version(text: str, frame: Frame) -> int:
    """What a client has, as it says; -1 = nothing that helps."""
    epoch, _, version = text.partition("-")
    known = int(version) if epoch == frame.epoch and version.isascii() and version.isdigit() else -1
    return known if frame.oldest_gone <= known <= frame.version else -1


def _refusal(status: str, why: str) -> tuple[str, str, bytes]:
    return status, "text/plain; charset=utf-8", f"cachefs: {why}\n".encode()
