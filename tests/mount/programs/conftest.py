"""A mount for programs to run on, in each mode of --kernel-cache."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import CACHE_BYTES, ProgramMount


@pytest.fixture(params=["off", "open", "keep"])
def program_mount(mounted: Callable[..., Any], request: pytest.FixtureRequest) -> Iterator[ProgramMount]:
    """An empty one; at the end the directory behind it must hold exactly what programs saw."""
    mount = ProgramMount(mounted("--cache-size", str(CACHE_BYTES), kernel_cache=request.param))
    yield mount
    mount.unmount()
