"""The daemon's side of the control channel, in its trio thread: it serves its own user and root, and outlives what clients do."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping

import trio

from cachefs.control import encode, peer_uid, short_name
from cachefs.errors import CachefsError

Send = Callable[[Mapping[str, object]], Awaitable[object]]  # False: the client has gone away
Handler = Callable[[Mapping[str, object], Send], Awaitable[None]]

LARGEST_REQUEST_BYTES = 64 * 1024
MOST_CLIENTS = 32
IDLE_SECONDS = 30.0  # for a client to say or take its next bytes
_log = logging.getLogger(__name__)


async def serve(
    path: str,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers requests on a socket at `path` until cancelled; `nursery.start(serve, ...)` returns when it listens.

    A handler sends its progress and its last message through `send`; a last message is added where it sends none.
    """
    listening = _listen(path)
    room = trio.CapacityLimiter(MOST_CLIENTS)
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                client = await _accept(listening)
                nursery.start_soon(_serve_client, client, handlers, room)
    finally:
        listening.close()
        with contextlib.suppress(OSError):
            os.unlink(path)


def _listen(path: str) -> trio.socket.SocketType:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.fchmod(listening.fileno(), 0o600)  # bind() gives the new name this mode, so that it is never open to others
        with short_name(path) as name:
            listening.bind(name)
        listening.listen(MOST_CLIENTS)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise CachefsError(f"can't make the control socket {path}: {error.strerror or error}") from None
    return trio.socket.from_stdlib_socket(listening)


async def _accept(listening: trio.socket.SocketType) -> trio.socket.SocketType:
    while True:
        try:
            client, _ = await listening.accept()
            return client
        except OSError as error:  # the client is gone again, or we are out of descriptors
            _log.warning("control socket: %s", error.strerror)
            await trio.sleep(0.1)


async def _serve_client(client: trio.socket.SocketType, handlers: Mapping[str, Handler], room: trio.CapacityLimiter) -> None:
    connection = _Connection(client)
    with client:
        try:
            room.acquire_nowait()
        except trio.WouldBlock:
            await connection.send({"error": "too many clients at once: try again", "done": True})
            return
        try:
            if peer_uid(client) in (0, os.geteuid()):
                await _serve_requests(connection, handlers)
        except Exception:
            _log.exception("control socket: a client's request failed")
        finally:
            room.release()


async def _serve_requests(connection: "_Connection", handlers: Mapping[str, Handler]) -> None:
    while (line := await connection.receive_line()) is not None:
        try:
            request = _parse_request(line)
            handler = handlers.get(str(request.get("command")))
            if handler is None:
                raise CachefsError(f"no such command: {request.get('command')}")
            await handler(request, connection.send)
        except CachefsError as error:
            await connection.send({"error": str(error), "done": True})
        except Exception as error:
            _log.exception("control socket: %.200r failed", line)
            await connection.send({"error": f"internal error: {error!r} (see the log)", "done": True})
        if not connection.answered:
            await connection.send({"done": True})


def _parse_request(line: bytes) -> Mapping[str, object]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise CachefsError("a request is one line of JSON") from None
    if not isinstance(request, dict):
        raise CachefsError("a request is a JSON object")
    return request


class _Connection:
    """One client's stream of requests and answers; what is sent to a client that has gone away is dropped."""

    def __init__(self, client: trio.socket.SocketType) -> None:
        self._client = client
        self._buffer = bytearray()
        self._broken = False
        self._sending = trio.Lock()
        self.answered = True  # the last message of the current request has been sent

    async def receive_line(self) -> bytes | None:
        """The next request, or None after the last one, too long a one, or too long a wait."""
        with trio.move_on_after(IDLE_SECONDS):
            while (end := self._buffer.find(b"\n")) < 0:
                if self._broken or not await self._receive_more():
                    return None
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self.answered = False
            return line
        return None

    async def _receive_more(self) -> bool:
        if len(self._buffer) > LARGEST_REQUEST_BYTES:
            await self.send({"error": f"a request has at most {LARGEST_REQUEST_BYTES} bytes", "done": True})
            return False
        try:
            received = await self._client.recv(LARGEST_REQUEST_BYTES)
        except OSError:
            return False
        self._buffer += received
        return bool(received)

    async def send(self, message: Mapping[str, object]) -> bool:
        """Whether there is still somebody to send to."""
        self.answered = self.answered or bool(message.get("done"))
        line = memoryview(encode(message))
        async with self._sending:  # a handler may report progress from one task and answer from another
            remaining = line
            try:
                with trio.move_on_after(IDLE_SECONDS) as patience:
                    while remaining and not self._broken:
                        remaining = remaining[await self._client.send(remaining) :]
                self._broken |= patience.cancelled_caught
            except OSError:
                self._broken = True
            finally:
                self._broken |= 0 < len(remaining) < len(line)  # half a line can't be mended
        return not self._broken
