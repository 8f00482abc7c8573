"""Rules: who is meant by them, and what is refused."""

from __future__ import annotations

import pytest

from cachefs.config import make_config
from cachefs.errors import UsageError
from cachefs.rules import Rule, advice_of, parse_rules


def no_paths() -> list[str]:
    raise AssertionError("paths cost something, and no rule asks for them")


def test_the_first_rule_that_matches_counts() -> None:
    rules = parse_rules("comm=tar advice=noreuse; comm=t* uid=1000 advice=random;path='*.b c' advice=sequential ;")
    assert rules[1] == Rule("random", comm="t*", uid=1000)
    assert advice_of(rules, "tar", 0, no_paths) == "noreuse"
    assert advice_of(rules, "tail", 1000, no_paths) == "random"
    assert advice_of(rules, "tail", 0, lambda: ["x", "d/a.b c"]) == "sequential"
    assert advice_of(rules, "cat", 1000, lambda: ["d/a.b"]) == ""
    assert advice_of((), "cat", 0, no_paths) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("comm", "is not a row of NAME=VALUE"),
        ("comm='x advice=noreuse", "is not a row of NAME=VALUE"),
        ("comm=x", "needs advice="),
        ("comm=x advice=dontneed", "needs advice="),
        ("advice=noreuse", "does not say whom it is for"),
        ("komm=x advice=noreuse", "speaks of 'komm'"),
        ("uid=root advice=noreuse", "needs a user's number"),
        ("comm=x advice=random; path=y", "'path=y' needs advice="),
    ],
)
def test_a_rule_that_makes_no_sense_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        make_config("/srv", "/mnt", {"rule": text})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--rule ")


def test_rules_of_a_mount_are_kept_as_they_were_written() -> None:
    assert make_config("/srv", "/mnt", {"rule": "comm=x advice=random"}).rule == "comm=x advice=random"
    assert make_config("/srv", "/mnt").rule == ""
