"""The control channel: answers arrive in order, and no client can hurt the daemon."""

import contextlib
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs import control, controlserver
from cachefs.control import ConnectionLost, NoAnswer
from cachefs.controlserver import Handler, Send
from cachefs.errors import CachefsError

Reply = dict[str, object]


async def echo(request: Mapping[str, object], send: Send) -> None:
    await send({"done": True, "echo": request.get("text")})


async def count(request: Mapping[str, object], send: Send) -> None:
    for dirty_bytes in (3, 2, 1):
        await send({"dirty_bytes": dirty_bytes})
    await send({"done": True, "unwritten": []})


async def refuse(request: Mapping[str, object], send: Send) -> None:
    raise CachefsError("no room")


async def fail(request: Mapping[str, object], send: Send) -> None:
    raise ZeroDivisionError


async def say_nothing(request: Mapping[str, object], send: Send) -> None:
    pass


async def answer_while_reporting(request: Mapping[str, object], send: Send) -> None:
    """Sends its last message when another task, which is cancelled, is about to send, sends or has just sent."""
    due = trio.Event()

    async def report() -> None:
        await due.wait()
        await send({"dirty_bytes": 1})

    steps = request["steps"]
    assert isinstance(steps, int)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        await trio.testing.wait_all_tasks_blocked()
        due.set()
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        if request["cancel"]:
            nursery.cancel_scope.cancel()
        else:
            await send({"done": True, "unwritten": []})
            nursery.cancel_scope.cancel()
    if request["cancel"]:
        await send({"done": True, "unwritten": []})


HANDLERS: dict[str, Handler] = {
    "answer_while_reporting": answer_while_reporting,
    "echo": echo,
    "count": count,
    "refuse": refuse,
    "fail": fail,
    "say_nothing": say_nothing,
}


def with_server(path: Path, client: Callable[[], Awaitable[object]], handlers: Mapping[str, Handler] = HANDLERS) -> None:
    """Runs `client` beside a server, and requires that the server still answers afterwards."""

    async def main() -> None:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(controlserver.serve, str(path), handlers)
                await client()
                if "echo" in handlers:
                    assert await ask(path, {"command": "echo", "text": "alive"}) == [{"done": True, "echo": "alive"}]
                nursery.cancel_scope.cancel()

    trio.run(main)


async def ask(path: Path, message: Reply, silence_seconds: float | None = 10.0) -> list[Reply]:
    return await trio.to_thread.run_sync(lambda: list(control.request(str(path), message, silence_seconds)))


async def talk(path: Path, sent: bytes) -> list[Reply]:
    """Sends raw bytes and gives everything that comes back until the server closes."""

    def run() -> list[Reply]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
            with contextlib.suppress(OSError):  # the server may have closed already
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: client.recv(65536), b""))
        return [json.loads(line) for line in received.splitlines()]

    return await trio.to_thread.run_sync(run)


def test_answers_arrive_in_order_up_to_the_last(tmp_path: Path) -> None:
    async def client() -> None:
        assert await ask(tmp_path / "s", {"command": "count"}) == [
            {"dirty_bytes": 3}, {"dirty_bytes": 2}, {"dirty_bytes": 1}, {"done": True, "unwritten": []},
        ]  # fmt: skip

    with_server(tmp_path / "s", client)


@pytest.mark.parametrize(
    ("command", "words"), [("refuse", "no room"), ("nonsense", "no such command: nonsense"), ("fail", "internal error")]
)
def test_an_error_reaches_the_client_as_one(tmp_path: Path, command: str, words: str) -> None:
    async def client() -> None:
        with pytest.raises(CachefsError, match=words):
            await ask(tmp_path / "s", {"command": command})

    with_server(tmp_path / "s", client)


@pytest.mark.parametrize("cancel", [True, False])
def test_the_last_message_is_never_lost_to_progress_of_another_task(tmp_path: Path, cancel: bool) -> None:
    async def client() -> None:
        for steps in (0, 1, 2, 3) * 8:  # trio lets tasks that are due at once run in random order
            message = {"command": "answer_while_reporting", "steps": steps, "cancel": cancel}
            replies = await ask(tmp_path / "s", message)
            assert replies[-1] == {"done": True, "unwritten": []}
            assert all(reply == {"dirty_bytes": 1} for reply in replies[:-1])

    with_server(tmp_path / "s", client)


def test_a_last_message_is_added_where_the_handler_sends_none(tmp_path: Path) -> None:
    async def client() -> None:
        assert await ask(tmp_path / "s", {"command": "say_nothing"}) == [{"done": True}]

    with_server(tmp_path / "s", client)


def test_several_requests_share_a_connection(tmp_path: Path) -> None:
    async def client() -> None:
        lines = b"".join(control.encode({"command": "echo", "text": number}) for number in range(3))
        assert [reply["echo"] for reply in await talk(tmp_path / "s", lines)] == [0, 1, 2]

    with_server(tmp_path / "s", client)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"status\n", "one line of JSON"), (b"\xff\xfe\n", "one line of JSON"), (b"[1]\n", "a JSON object"),
        (b"[" * 50_000 + b"\n", "one line of JSON"), (b'{"command": ["echo"]}\n', "no such command"),
        (b"x" * 200_000, "at most 65536 bytes"),
    ],
)  # fmt: skip
def test_a_bad_request_gets_an_error(tmp_path: Path, sent: bytes, words: str) -> None:
    async def client() -> None:
        try:
            (reply,) = await talk(tmp_path / "s", sent)
        except ConnectionError:  # the server may close while we are still sending too much
            assert len(sent) > controlserver.LARGEST_REQUEST_BYTES
            return
        assert words in str(reply["error"])
        assert reply["done"]

    with_server(tmp_path / "s", client)


def test_half_a_request_is_no_request(tmp_path: Path) -> None:
    async def client() -> None:
        assert await talk(tmp_path / "s", b'{"command": "echo"}') == []
        assert await talk(tmp_path / "s", b"") == []

    with_server(tmp_path / "s", client)


def test_the_work_goes_on_when_the_client_goes_away(tmp_path: Path) -> None:
    gone, finished = trio.Event(), trio.Event()

    async def umount(request: Mapping[str, object], send: Send) -> None:
        await send({"dirty_bytes": 2})
        await gone.wait()
        for _ in range(3):
            await send({"dirty_bytes": 1, "padding": "x" * 1_000_000})
        finished.set()

    async def client() -> None:
        stream = await trio.open_unix_socket(str(tmp_path / "s"))
        await stream.send_all(control.encode({"command": "umount"}))
        await stream.receive_some()
        await stream.aclose()
        gone.set()
        await finished.wait()

    with_server(tmp_path / "s", client, HANDLERS | {"umount": umount})


def test_a_client_that_does_not_read_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controlserver, "IDLE_SECONDS", 0.05)
    finished = trio.Event()

    async def flood(request: Mapping[str, object], send: Send) -> None:
        for _ in range(10):
            await send({"padding": "x" * 1_000_000})
        finished.set()

    async def client() -> None:
        async with await trio.open_unix_socket(str(tmp_path / "s")) as stream:
            await stream.send_all(control.encode({"command": "flood"}))
            await finished.wait()

    with_server(tmp_path / "s", client, {"flood": flood})


def test_clients_beyond_the_limit_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controlserver, "MOST_CLIENTS", 1)

    async def client() -> None:
        async with await trio.open_unix_socket(str(tmp_path / "s")) as first:
            await first.send_all(control.encode({"command": "say_nothing"}))
            await first.receive_some()
            assert await talk(tmp_path / "s", b"") == [{"error": "too many clients at once: try again", "done": True}]

    with_server(tmp_path / "s", client, {"say_nothing": say_nothing})


def test_another_user_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controlserver, "peer_uid", lambda client: 4711)
    monkeypatch.setattr(os, "geteuid", lambda: 4712)

    async def client() -> None:
        assert await talk(tmp_path / "s", b"") == []
        with pytest.raises(ConnectionLost):
            await ask(tmp_path / "s", {"command": "say_nothing"})

    with_server(tmp_path / "s", client, {"say_nothing": say_nothing})


def test_the_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def client() -> None:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

    with_server(path, client)
    with_server(path, client)
    assert not path.exists()


def test_a_long_path_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 150)
    directory.mkdir()

    async def client() -> None:
        assert len(await ask(directory / "socket", {"command": "count"})) == 4

    with_server(directory / "socket", client)


def test_a_silent_daemon_is_no_answer(tmp_path: Path) -> None:
    async def sleep(request: Mapping[str, object], send: Send) -> None:
        await trio.sleep_forever()

    async def client() -> None:
        with pytest.raises(NoAnswer):
            await ask(tmp_path / "s", {"command": "sleep"}, silence_seconds=0.01)
        with pytest.raises(NoAnswer):
            await trio.to_thread.run_sync(
                lambda: list(control.request(str(tmp_path / "s"), {"command": "sleep"}, None, total_seconds=0.01))
            )

    with_server(tmp_path / "s", client, {"sleep": sleep})


def test_no_daemon_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match="not running"):
        list(control.request(str(tmp_path / "absent"), {"command": "status"}))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with pytest.raises(ConnectionLost, match="refused"):
        list(control.request(str(tmp_path / "stale"), {"command": "status"}))


def test_messages_are_strict_json() -> None:
    message = {"rate": float("nan"), "most": float("inf"), "nested": {"t": (1, 2.5)}, "path": "/\udcff", "set": {3}}
    assert json.loads(control.encode(message)) == {
        "rate": None, "most": None, "nested": {"t": [1, 2.5]}, "path": "/\udcff", "set": [3],
    }  # fmt: skip
