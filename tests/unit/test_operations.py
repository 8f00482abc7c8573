"""What the daemon's log takes from pyfuse3."""

import logging

import pytest

from cachefs.transport.operations import wanted


@pytest.mark.parametrize(
    ("reason", "expected"), [("No such file or directory", False), ("Invalid argument", True), ("No such device", True)]
)
def test_an_answer_that_nobody_waits_for_is_no_trouble(reason: str, expected: bool) -> None:
    message = ("pyfuse3", logging.ERROR, __file__, 1, "fuse_release(): fuse_reply_* failed with %s", (reason,), None)
    assert wanted(logging.LogRecord(*message)) is expected
