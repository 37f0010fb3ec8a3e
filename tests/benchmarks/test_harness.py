"""The harness runs sides in turn, measures processes, and writes what the page is drawn from."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import commits, harness, p1_time_to_score
from benchmarks.harness import Row, WrongResultError, expect, fresh, interleaved, spawn, write


def row(what: str = "a case", **more: Any) -> Row:
    figures = {"ours": 1.0, "peer": 2.0, "unit": "s", "ratio": 0.5, "target": "at most 1", "reached": True, **more}
    return Row(goal="P2", what=what, **figures)


def test_interleaved_alternates_sides_and_skips_warmup() -> None:
    order: list[str] = []
    timed = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=3,
        warmup=2,
        before=lambda: order.append("-"),
    )
    assert order == ["-", "a", "-", "b"] * 5
    assert [len(side.times) for side in timed.values()] == [3, 3]
    assert timed["a"].best <= timed["a"].median <= timed["a"].worst


def test_spawn_measures_memory_of_child_alone() -> None:
    held = bytearray(300 << 20)
    held[::4096] = b"x" * len(held[::4096])
    end = spawn([sys.executable, "-c", "import os; print(os.environ['ASKED']); print('[1]')"], {"ASKED": "yes"})
    assert end.stdout.split() == ["yes", "[1]"]
    assert end.result() == [1]
    assert 1 << 20 < end.peak_rss < 100 << 20, "this process's own memory was counted"
    large = spawn([sys.executable, "-c", "held = bytearray(200 << 20); held[::4096] = b'x' * len(held[::4096])"])
    assert large.peak_rss > 200 << 20


def test_fresh_runs_every_side_and_failure_raises() -> None:
    seen: list[str] = []
    timed = fresh(
        {"a": [sys.executable, "-c", "1"], "b": [sys.executable, "-c", "1"]},
        repeats=2,
        warmup=1,
        check=lambda name, end: seen.append(name),
    )
    assert seen == ["a", "b"] * 3
    assert len(timed["b"].times) == len(timed["b"].peak_rss) == 2
    with pytest.raises(WrongResultError, match=r"ended with 3: .*no luck"):
        spawn([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])


def test_write_stores_machine_and_skips_quick_results(tmp_path: Path) -> None:
    write("P2", [row()], quick=True, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    write("P2", [row("one"), row("two")], folder=tmp_path)
    result = json.loads((tmp_path / "P2.json").read_text())
    assert [each["what"] for each in result["rows"]] == ["one", "two"]
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["torch"]
    assert result["rows"][0]["date"]
    write("P2", [row("two", ours=3.0), row("three")], keep=True, folder=tmp_path)
    again = json.loads((tmp_path / "P2.json").read_text())
    assert [(each["what"], each["ours"]) for each in again["rows"]] == [("one", 1.0), ("two", 3.0), ("three", 1.0)]
    changed = {**again, "machine": {**again["machine"], "torch": "0.1"}}
    (tmp_path / "P2.json").write_text(json.dumps(changed))
    write("P2", [row("four")], keep=True, folder=tmp_path)
    assert [each["what"] for each in json.loads((tmp_path / "P2.json").read_text())["rows"]] == ["four"]


@pytest.mark.parametrize(("right", "code", "said"), [(True, 0, "P2 a case: ours 1 s"), (False, 1, "gradients differ")])
def test_main_quick_fails_on_wrong_results_only(
    right: bool,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["p2", "--quick", "--json", str(tmp_path / "rows.json")])
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")

    def measure(options: harness.Options) -> list[Row]:
        assert (options.quick, options.repeats) == (True, 1)
        expect(right, "gradients differ")
        return [row(reached=False)]

    assert harness.main("P2", measure) == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert (tmp_path / "rows.json").exists() is right
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "expected"), [([], (False, 5)), (["--quick"], (True, 1)), (["--quick", "--repeats", "3"], (True, 3))]
)
def test_main_without_repeats_runs_five_or_one_when_quick(
    words: list[str], expected: tuple[bool, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["p2", *words])
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    asked: list[tuple[bool, int]] = []
    harness.main("P2", lambda options: asked.append((options.quick, options.repeats)) or [row()])
    assert asked == [expected]
    assert (tmp_path / "results" / "P2.json").exists() is ("--quick" not in words)


def test_p1_arguments_default_to_those_of_its_results() -> None:
    parser = argparse.ArgumentParser()
    p1_time_to_score.arguments(parser)
    given = vars(parser.parse_args([]))
    assert given == {
        "sets": "movies,glosses,imdb", "seeds": None, "sides": "ours,lengths,launched,usual", "budgets": None,
        "usual_steps": 40, "glosses": None, "compute_type": "float32", "ours": {},
        "rows_only": False,
    }  # fmt: skip


def test_two_commits_ratio_is_of_neighbours_and_has_an_interval() -> None:
    drift = [1.0, 3.0, 2.0, 5.0, 4.0, 1.5, 2.5, 3.5, 4.5]
    ratio, low, high = commits.median_and_interval([1.1 * slow / slow for slow in drift])
    assert (ratio, low, high) == (pytest.approx(1.1), pytest.approx(1.1), pytest.approx(1.1))
    ratio, low, high = commits.median_and_interval([0.9, 1.0, 1.1, 0.95, 1.05] * 6)
    assert low < ratio == 1.0 < high
    assert (low, high) == (pytest.approx(0.95), pytest.approx(1.05))


@pytest.mark.slow
def test_two_commits_same_commit_takes_steps_in_turn(tmp_path: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    found = tmp_path / "found.json"
    spawn([
        sys.executable, "-m", "benchmarks.commits", head.stdout.strip(),
        "--only", "p8 switch", "--rounds", "4", "--json", str(found),
    ])  # fmt: skip
    (case,) = json.loads(found.read_text())
    assert case["case"] == "p8 switch"
    assert case["low"] <= case["ratio"] <= case["high"]
    listed = subprocess.run(["git", "worktree", "list"], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    assert str(tempfile.gettempdir()) + "/tmp" not in listed.stdout
