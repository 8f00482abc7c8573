"""The bench's own arithmetic: ratios by round, peers that are not there, promises met or not."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import jobs
import peers
import report
import slow
import turns
from results import Figure, Results
from verdicts import SLOW_JOBS, SLOW_READS, at_least, at_most, verdicts


def results(*rows: tuple[str, str, list[float]], part: str = "hits") -> Results:
    """(case, subject, time of each round)"""
    found = Results()
    for case, subject, times in rows:
        for number, time in enumerate(times):
            found.add(Figure(part, case, subject, number, time, time))
    return found


def test_a_ratio_is_of_rounds_and_not_of_medians() -> None:
    found = results(("c", "a", [1, 20, 300]), ("c", "b", [2, 10, 100]))
    ratio = found.ratio("hits", "c", "a", "b")
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (2, 0.5, 3, 3)


def test_rounds_that_one_of_two_did_not_do_are_left_out() -> None:
    ratio = results(("c", "a", [1, 1, 1]), ("c", "b", [2])).ratio("hits", "c", "a", "b")
    assert ratio is not None and ratio.rounds == 1


def test_the_mean_of_jobs_is_geometric_and_over_those_that_both_did() -> None:
    found = results(("x", "a", [4]), ("x", "b", [1]), ("y", "a", [1]), ("y", "b", [1]), ("z", "a", [9]))
    ratio = found.mean_ratio("hits", "a", "b")
    assert ratio is not None and ratio.median == pytest.approx(2)


def test_a_peer_that_is_not_installed_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = replace(peers.PEERS["bindfs"], program="no-such-program")
    monkeypatch.setitem(peers.PEERS, "bindfs", absent)
    bench = turns.Run(1, True, tmp_path)
    assert [peer.name for peer in bench.peers(("bare", "bindfs"))] == ["bare"]
    assert bench.results.notes == ["bindfs: skipped, no-such-program is not installed (Debian: bindfs)"]
    verdict = at_most("jobs", {"bindfs": None}, 1.0)
    assert verdict.met is None and "not measured" in str(verdict)


def test_one_peer_that_lost_does_not_hide_behind_one_that_was_not_measured() -> None:
    found = results(("c", "a", [3]), ("c", "b", [1]))
    ratios = {"b": found.ratio("hits", "c", "a", "b"), "none": None}
    assert at_most("x", ratios, 2.9).met is False
    assert at_most("x", ratios, 3).met is True
    assert at_least("x", ratios, 0.3).met is True
    assert at_least("x", ratios, 0.4).met is False


def test_each_promise_has_a_line_even_if_nothing_was_measured() -> None:
    assert {line.met for line in verdicts(Results())} == {None}
    assert len(verdicts(Results())) > 15


def test_a_slow_job_is_held_against_whoever_was_quickest() -> None:
    figures = results(("untar", "cachefs", [6.0]), ("untar", "sshfs", [8.0]), ("untar", "rclone", [0.5]), part="slow")
    line = next(line for line in verdicts(figures) if line.asked.startswith("slow, untar"))
    assert (line.met, line.measured) == (False, "rclone 12.00 (12.00-12.00, 1 rounds)")


def test_every_slow_case_that_is_measured_has_a_line() -> None:
    cases = [*(f"{case} {state}" for case in SLOW_READS for state in ("cold", "warm", "remounted")), *SLOW_JOBS]
    asked = "\n".join(line.asked for line in verdicts(Results()))
    assert not [case for case in cases if f"slow, {case}," not in asked]
    there = {f"{case} {state}" for case in slow.reading(Path()) for state in ("cold", "warm", "remounted")}
    assert set(cases) - there == {"write 64 MiB", *jobs.work_on(Path(), Path(), slow.SMALL)} - {"find", "grep -r"}


def test_what_others_did_meanwhile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(turns, "others_busy", lambda: 1.5)
    bench = turns.Run(1, True, tmp_path)
    assert len(list(bench.turns("hits", [peers.PEERS["bare"]]))) == 1
    assert bench.results.notes == ["others kept 1.5 processors busy in round 1 of hits"]
    bench.results.add(Figure("hits", "c", "a", 0, 1.0, load=bench.load))
    assert "others kept 1.5 to 1.5 processors busy" in report.tables(bench.results, [], 1)


def test_what_fails_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    bench, done = turns.Run(1, True, tmp_path), []

    def turn(_number: int, peer: peers.Peer) -> None:
        if peer.name == "bare":
            raise OSError("no")
        done.append(peer.name)

    bench.each("hits", [peers.PEERS["bare"], peers.PEERS["cachefs"]], turn)
    assert done == ["cachefs"] and "bare: hits, round 1: no" in bench.results.notes


def test_runs_of_parts_can_be_put_together() -> None:
    one, both = results(("c", "a", [1.0])), Results()
    one.values["x"] = 2.0
    both.take(one.as_json())
    both.take(results(("d", "a", [3.0]), part="jobs").as_json())
    assert both.figures[0] == one.figures[0] and both.subjects("jobs") == ["a"] and both.values == {"x": 2.0}


def test_the_tables_replace_the_last_ones_in_a_document(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nbehind\n")
    for text in ("one", "two"):
        report.into_document(document, text)
    assert document.read_text() == f"before\n{report.BEGIN}\n\ntwo\n{report.END}\nbehind\n"
