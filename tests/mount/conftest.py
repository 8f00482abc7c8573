"""Fixtures: real mounts, alone or shared by the tests of a module, and a plain directory to compare with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("twin", "mounts", "sides")

from mounts import Factory, Mount, mounting, wait_until  # noqa: E402, F401  # wait_until for tests
from twin import Twin, inside, tree  # noqa: E402

KERNEL_CACHE_MODES = ("off", "open", "keep")


@pytest.fixture
def mounted() -> Iterator[Factory]:
    """`mounted(*options, kernel_cache="off", user=None)` gives a `Mount`, which is unmounted when the test ends."""
    with mounting() as make:
        yield make


@pytest.fixture(scope="module", params=KERNEL_CACHE_MODES)
def mount(request: pytest.FixtureRequest) -> Iterator[Mount]:
    """A mount that the tests of one module share, once for each mode of --kernel-cache.

    What the tests left there must be in SOURCE after the unmount.
    """
    with mounting() as make:
        mount = make(kernel_cache=request.param)
        yield mount
        with inside(mount.path):
            left = tree()
        mount.unmount()
        with inside(mount.source):
            assert tree() == left, "SOURCE (left) has something else after the unmount than the mount had before"


@pytest.fixture
def twin(mount: Mount, request: pytest.FixtureRequest) -> Iterator[Twin]:
    """Two empty directories, one on the mount, one on what is behind it; for the same to be done in both."""
    name = re.sub(r"\W", "_", request.node.name)
    plain = mount.base / "plain"
    plain.mkdir(exist_ok=True)
    twin = Twin(plain / name, mount.path / name, mount.source / name)
    yield twin
    mount.check_log()


@pytest.fixture
def place(mount: Mount, twin: Twin) -> Iterator[Path]:
    """An empty directory on the mount, and the current one; where there is nothing to compare with."""
    before = os.getcwd()
    os.chdir(twin.mounted)
    try:
        yield twin.mounted
    finally:
        os.chdir(before)
