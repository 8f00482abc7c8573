"""What every test runs under: hypothesis gives the same examples in every run, asserts in shared suites explain."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("backing_contract")
settings.register_profile(
    "cachefs",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("cachefs")


@pytest.fixture
def no_umask() -> Iterator[None]:
    """The umask of the daemon: modes arrive as they were asked for."""
    before = os.umask(0)
    yield
    os.umask(before)
