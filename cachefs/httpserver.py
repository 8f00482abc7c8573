"""A small HTTP server for reading: a thread a request; many clients, slow ones or odd ones hold neither it nor the mount up."""

import contextlib
import io
import logging
import socket
import socketserver
import sys
import threading
import time
from http.client import LineTooLong
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

CLIENT_TIMEOUT_SECONDS = 10.0  # for a client to say all of its request; and again to take all of the answer
MOST_CLIENTS = 32  # at once
LARGEST_REQUEST_BYTES = 16 * 1024  # request line and headers together
_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\n\r\ncachefs: too many clients at once\n"
_FULL_HEADERS = 1 << 16  # of the library's own limit

log = logging.getLogger(__name__)


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread a request, so that one slow reader keeps nobody else waiting; `MOST_CLIENTS` at most, others are sent away."""

    daemon_threads = True
    request_queue_size = MOST_CLIENTS

    def __init__(self, *args: Any, **more: Any) -> None:
        self._room = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(*args, **more)

    def server_bind(self) -> None:
        # Not HTTPServer's: that one looks up the host's full name, which takes seconds where no DNS answers.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes it
        super().shutdown()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("http: a client went away: %s", sys.exc_info()[1])


class Handler(WSGIRequestHandler):
    """One request; what takes too long to arrive is cut off, what is too long refused."""

    timeout = CLIENT_TIMEOUT_SECONDS

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Bounded(self.connection))

    def handle(self) -> None:
        try:
            self.raw_requestline = self.rfile.readline(_FULL_HEADERS)
            if not self.parse_request():
                return
        except LineTooLong:
            self.requestline = self.request_version = self.command = ""
            self.send_error(431)
            return
        handler = _Answer(self.rfile, self.wfile, self.get_stderr(), self.get_environ())  # type: ignore[arg-type]  # read alone
        handler.request_handler = self  # type: ignore[attr-defined]  # as the library does
        handler.run(self.server.get_app())  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


class _Answer(ServerHandler):
    def log_exception(self, exc_info: object) -> None:
        log.debug("http: an answer was not taken", exc_info=exc_info)  # type: ignore[arg-type]


class _Bounded(io.RawIOBase):
    """What a client sends, up to `LARGEST_REQUEST_BYTES` and for `CLIENT_TIMEOUT_SECONDS` in all, however slowly it drips."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + CLIENT_TIMEOUT_SECONDS
        self._left_bytes = LARGEST_REQUEST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._left_bytes:
            raise LineTooLong("request")
        patience_seconds = self._deadline - time.monotonic()
        if patience_seconds <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(patience_seconds)
        received = self._connection.recv_into(memoryview(buffer)[: self._left_bytes])
        self._connection.settimeout(CLIENT_TIMEOUT_SECONDS)
        self._left_bytes -= received
        return received
