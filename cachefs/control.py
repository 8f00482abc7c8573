"""Control channel: JSON lines over a unix socket between a daemon and the command line, one line a message.

A request is one object with a "command"; the answer is any number of objects, the last one with "done": true. An
error is {"error": text, "done": true}. Here are the messages and the client; `controlserver` is the daemon's side.
"""

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from cachefs.errors import CachefsError

LARGEST_REPLY_BYTES = 16 * 1024 * 1024
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Connection(Protocol):
    """As much of a socket, ours or trio's, as `peer_uid` needs."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def encode(message: Mapping[str, object]) -> bytes:
    """One line of strict JSON: what JSON has no number for becomes null."""
    return json.dumps(_strict(message), allow_nan=False).encode("ascii") + b"\n"


def _strict(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_strict(item) for item in value]
    return value


@contextlib.contextmanager
def short_name(path: str) -> Iterator[str]:
    """A name for `path` that a socket address has room for (107 bytes)."""
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def peer_uid(connection: Connection) -> int:
    """The user at the other end: of a client, who connected; of a server, who began to listen."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(packed)
    return int(uid)


class ConnectionLost(CachefsError):
    """The daemon went away before its last message."""


class NoAnswer(CachefsError):
    """The daemon is there but did not answer in time."""


def request(
    path: str, message: Mapping[str, object], silence_seconds: float | None = 30.0, total_seconds: float | None = None
) -> Iterator[dict[str, object]]:
    """Sends one request and yields the answers up to the last; CachefsError for an error among them, or no answer."""
    deadline = None if total_seconds is None else time.monotonic() + total_seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(_patience(silence_seconds, deadline))
            with short_name(path) as name:
                connection.connect(name)
            if os.geteuid() and peer_uid(connection) not in (0, os.geteuid()):
                raise CachefsError("the control socket belongs to another user: it is none of your daemons")
            connection.sendall(encode(message))
            for line in _lines(connection, silence_seconds, deadline):
                yield line
                if line.get("done"):
                    return
        except TimeoutError:
            raise NoAnswer("the daemon does not answer: it may be waiting for SOURCE") from None
        except FileNotFoundError:
            raise ConnectionLost("the daemon has no control socket: it is not running") from None
        except PermissionError:
            raise CachefsError("the daemon belongs to another user: ask as that user or as root") from None
        except OSError as error:
            raise ConnectionLost(f"the daemon does not answer: {error.strerror or error}") from None
    raise ConnectionLost("the daemon ended before it answered")


def _patience(silence_seconds: float | None, deadline: float | None) -> float | None:
    """How long the next system call may take; None = for ever."""
    if deadline is None:
        return silence_seconds
    remaining_seconds = deadline - time.monotonic()
    if remaining_seconds <= 0:
        raise TimeoutError
    return remaining_seconds if silence_seconds is None else min(silence_seconds, remaining_seconds)


def _lines(connection: socket.socket, silence_seconds: float | None, deadline: float | None) -> Iterator[dict[str, object]]:
    buffer = bytearray()
    while True:
        connection.settimeout(_patience(silence_seconds, deadline))
        received = connection.recv(1 << 16)
        if not received:
            return
        buffer += received
        *complete, rest = buffer.split(b"\n")
        if len(rest) > LARGEST_REPLY_BYTES:
            raise CachefsError("the daemon's answer is too long")
        buffer = bytearray(rest)
        yield from map(_parse_reply, complete)


def _parse_reply(line: bytes | bytearray) -> dict[str, object]:
    try:
        reply = json.loads(line)
    except ValueError:
        raise CachefsError("the daemon's answer is not JSON: is it another version of cachefs?") from None
    if not isinstance(reply, dict):
        raise CachefsError("the daemon's answer is not an object: is it another version of cachefs?")
    if "error" in reply:
        raise CachefsError(str(reply["error"]))
    return reply
