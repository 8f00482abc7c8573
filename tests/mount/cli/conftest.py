"""A place for the real command, and its end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Command


@pytest.fixture
def cachefs() -> Iterator[Command]:
    """The command with a SOURCE and a MOUNTPOINT of this test's own."""
    if not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        pytest.skip("no FUSE here: /dev/fuse or fusermount3 is missing")
    base = Path(tempfile.mkdtemp(prefix="cachefs-cli-"))  # not pytest's tmp_path: other users may go in here
    base.chmod(0o755)
    command = Command(base)
    try:
        yield command
        log = command.log_text()
        assert "Traceback" not in log, log
    finally:
        command.remove()
        shutil.rmtree(base)
