"""Shared by the unit tests, which share processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

LEFT_MAX = 40  # a file of tests may leave that many; some stand for a daemon that was killed


@pytest.fixture(scope="module", autouse=True)
def descriptors_are_given_back() -> Iterator[None]:
    """Leaks add up over the files that one process runs, and programs beside them fail at 1,024 in select(2)."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) - before < LEFT_MAX
