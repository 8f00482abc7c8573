"""Shared by the unit tests, which share processes."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cachefs.cache.policy import POLICIES
from checked import Checked
from world import World, world_of

LEFT_MAX = 40  # a file of tests may leave that many; some stand for a daemon that was killed


@pytest.fixture(scope="module", autouse=True)
def descriptors_are_given_back() -> Iterator[None]:
    """Leaks add up over the files that one process runs, and programs beside them fail at 1,024 in select(2)."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) - before < LEFT_MAX


@pytest.fixture(params=sorted(POLICIES))
def make_cache(request: pytest.FixtureRequest) -> Callable[[int], Checked]:
    return lambda pages: Checked(request.param, pages)


@pytest.fixture(params=[False, True], ids=["local", "far"])
def far(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def play(tmp_path: Path, far: bool) -> Callable[..., None]:
    """Runs a coroutine function with a `World` over `tmp_path`, under a clock that jumps."""

    def run(test: Callable[[World], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            async with world_of(tmp_path, far, **options) as world:
                await test(world)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    return run
