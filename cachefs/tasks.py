"""Background tasks that must not take the mount down with them."""

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

log = logging.getLogger(__name__)

RESTART_SECONDS = 1.0


class Spawner(Protocol):
    """Whatever starts tasks as a nursery does."""

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: object) -> None: ...


class Guarded:
    """A nursery whose tasks may fail alone: the error is logged, and requests go on being served.

    An exception that left a task of the mount's own nursery would end the daemon before dirty pages are written.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        self.nursery.start_soon(self._run, function, args)

    def start_service(self, function: Callable[[], Awaitable[object]]) -> None:
        """Starts a task that is meant to run for ever, and starts it again when it fails."""
        self.nursery.start_soon(self._serve, function)

    async def _serve(self, function: Callable[[], Awaitable[object]]) -> None:
        while True:
            await self._run(function, ())
            await trio.sleep(RESTART_SECONDS)

    async def _run(self, function: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            await function(*args)
        except Exception:
            log.critical("%s failed", getattr(function, "__qualname__", function), exc_info=True)
