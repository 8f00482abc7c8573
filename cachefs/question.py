"""What a request asks of a backing far away, in a task of its own that goes on when the request has waited long enough."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import trio

from cachefs.tasks import Spawner

log = logging.getLogger(__name__)
T = TypeVar("T")
# Calls that change the backing, by the names that `BackingIO` is given.
CHANGES = frozenset((
    "write", "truncate", "chmod", "chown", "utime", "create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename",
    "setxattr", "removexattr",
))  # fmt: skip


class Question(Generic[T]):
    """`function(*args)` for somebody who may give up waiting.

    Given up, it stops wherever it waits for its turn, and begins no call any more: what a program was told has failed is not
    done later. But once it has changed something in the backing, it is seen through to its end, and `undo` gets what it returns.
    """

    def __init__(
        self,
        function: Callable[..., Awaitable[T]],
        args: tuple[object, ...],
        undo: Callable[[T], Awaitable[object]] | None,
        tasks: Spawner,
    ) -> None:
        self.done = trio.Event()
        self.changing = False  # a call that changes something was begun
        self._function = function
        self._args = args
        self._undo = undo
        self._tasks = tasks
        self._scope = trio.CancelScope()
        self._result: T
        self._error: Exception | None = None
        self._taken = self._given_up = False

    async def run(self) -> None:
        QUESTION.set(self)
        with self._scope:
            try:
                self._result = await self._function(*self._args)
            except Exception as error:
                self._error = error
            self.done.set()
        if self._given_up:
            self._clear_up()

    @property
    def given_up(self) -> bool:
        return self._given_up

    def take(self) -> T:
        """The result, or the error; only when it is done."""
        self._taken = True
        if self._error is not None:
            raise self._error
        return self._result

    def give_up(self) -> None:
        """Nobody will take the result any more, unless that is done already."""
        if self._taken:
            return
        self._given_up = True
        if self.done.is_set():
            self._clear_up()
        elif not self.changing:
            self._scope.cancel()

    def _clear_up(self) -> None:
        if isinstance(self._error, OSError) or not self.done.is_set():
            return
        if self._error is not None:
            log.error("a request that nobody waits for any more failed", exc_info=self._error)
        elif self._undo is not None:
            self._tasks.start_soon(self._undo, self._result)


QUESTION: ContextVar[Question[Any] | None] = ContextVar("question", default=None)


def is_given_up() -> bool:
    """Whether who asked for what is being done waits no longer: something else may have been asked for since."""
    question = QUESTION.get()
    return question is not None and question.given_up


@contextmanager
def unasked() -> Iterator[None]:
    """For changes that are only preparations: whoever gives up meanwhile has asked for nothing yet."""
    token = QUESTION.set(None)
    try:
        yield
    finally:
        QUESTION.reset(token)
