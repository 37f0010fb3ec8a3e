"""P1 makes its rows of whole runs: smallest budget at the score, medians of seeds that both sides have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.harness import RESULTS
from benchmarks.p1_time_to_score import BUDGETS, RUNS, SIZES, arguments, kept, measure, results, settings_of
from benchmarks.sides_of_p1 import SETTINGS

MACHINE = {"cpu": "A", "cores": 2}
SECONDS = {"ours": {1: 10.0, 2: 20.0, 3: 30.0}, "lengths": {1: 25.0, 2: 45.0, 3: 65.0}, "usual": {3: 9.0}}
SCORES = {"ours": {1: 0.7, 2: 0.81, 3: 0.82}, "lengths": {1: 0.6, 2: 0.7, 3: 0.8}, "usual": {3: 0.5}}


def made(seeds: tuple[int, ...] = (0, 1, 2), **scores: dict[int, float]) -> list[dict[str, Any]]:
    lines = []
    for side in SECONDS:
        for epochs in BUDGETS[side]:
            for seed in seeds:
                lines.append({
                    "set": "movies", "side": side, "epochs": epochs, "seed": seed,
                    "settings": settings_of(side, "movies", "float32"), "sizes": [*SIZES["movies"]], "machine": MACHINE,
                    "seconds": SECONDS[side][epochs] + seed, "step_seconds": 0.5, "steps": 40,
                    "planned": 750 if side == "usual" else 40,
                    "accuracy": {**SCORES, **scores}[side][epochs],
                })  # fmt: skip
    return lines


def test_results_time_smallest_budget_that_reaches_peer_score() -> None:
    lengths, usual = results("movies", "float32", made(), MACHINE)
    assert (lengths.ours, lengths.peer) == (21.0, 66.0)
    assert lengths.ratio == pytest.approx(66 / 21)
    assert lengths.reached
    assert lengths.worst == {"ours": 22.0, "peer": 67.0}
    assert lengths.settings["score"] == pytest.approx(0.8)
    assert usual.peer == pytest.approx(10 + 710 * 0.5)
    assert "extrapolated from 40 of 750 steps" in usual.note
    assert usual.reached


def test_results_peer_that_reaches_score_earlier_has_that_time() -> None:
    lengths = results("movies", "float32", made(lengths={1: 0.6, 2: 0.8, 3: 0.8}), MACHINE)[0]
    assert lengths.peer == 46.0


def test_results_score_never_reached_is_a_miss() -> None:
    lengths, usual = results("movies", "float32", made(ours={1: 0.5, 2: 0.6, 3: 0.79}), MACHINE)
    assert lengths.ours == 31.0
    assert not lengths.reached
    assert not usual.reached
    assert "below the score of 0.800" in lengths.note
    assert "below the score" in usual.note


def test_results_merge_pieces_and_repeated_run_replaces_former() -> None:
    pieces = [*made((0,)), *made((1,)), *made((2,))]
    assert results("movies", "float32", pieces, MACHINE)[0].ours == 21.0
    again = {**next(line for line in pieces if (line["side"], line["epochs"], line["seed"]) == ("ours", 2, 0))}
    again["seconds"] = 100.0
    row = results("movies", "float32", [*pieces, again], MACHINE)[0]
    assert row.ours == 22.0
    assert row.worst["ours"] == 100.0
    lacking = [line for line in pieces if (line["side"], line["epochs"], line["seed"]) != ("ours", 3, 2)]
    few = results("movies", "float32", lacking, MACHINE)[0]
    assert few.settings["seeds"] == [0, 1]
    assert few.note == "of 2 seeds only"
    assert results("movies", "float32", made((0,)), MACHINE)[0].note == "of 1 seed only"
    assert results("movies", "float32", pieces, MACHINE)[0].note == ""


def test_results_incomplete_peer_gives_no_row_and_ours_a_note() -> None:
    assert (
        results("movies", "float32", [r for r in made() if (r["side"], r["epochs"]) != ("lengths", 2)], MACHINE) == []
    )
    lines = [line for line in made() if (line["side"], line["epochs"]) != ("ours", 3)]
    assert "not run with 3 epochs" in results("movies", "float32", lines, MACHINE)[0].note


@pytest.mark.parametrize("change", [{"machine": {"cpu": "B"}}, {"settings": {}}, {"set": "imdb"}, {"sizes": [5, 5, 5]}])
def test_results_exclude_other_machines_and_settings(change: dict[str, Any]) -> None:
    assert results("movies", "float32", [{**line, **change} for line in made()], MACHINE) == []
    assert results("movies", "bfloat16", made(), MACHINE) == []


def test_committed_runs_are_complete_and_give_committed_rows() -> None:
    lines = kept(RESULTS / RUNS)
    for line in lines:
        assert line["side"] in SETTINGS
        assert line["epochs"] in BUDGETS[line["side"]]
        assert 0 < line["accuracy"] <= 1
        assert 0 < line["started"] < line["seconds"]
    committed = json.loads((RESULTS / "P1.json").read_text(encoding="utf-8"))
    for row in committed["rows"]:
        compute = row["settings"]["ours"]["compute_type"]
        name = row["what"].split(",")[0]
        of = row["settings"]["ours"]["processes"]
        made_again = results(name, compute, lines, committed["machine"], processes=of)
        again = {each.what: each for each in made_again}[row["what"]]
        assert (again.ours, again.peer, again.ratio) == pytest.approx((row["ours"], row["peer"], row["ratio"]))


def test_main_without_rows_leaves_results_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["p1", "--rows-only"])
    monkeypatch.setattr(harness, "write", lambda *_, **__: pytest.fail("results without rows were written"))
    with pytest.raises(SystemExit) as ended:
        harness.main("P1", measure, arguments, keep=True)
    assert ended.value.code == 0
    assert not list(tmp_path.iterdir())


def test_results_pair_sides_by_seed_and_machine() -> None:
    of_one, other = made((0, 1)), [{**line, "machine": {**MACHINE, "system": "K2"}} for line in made((2,))]
    slow = [{**line, "seconds": 10 * line["seconds"]} for line in other]
    lengths, usual = results("movies", "float32", [*of_one, *slow], MACHINE)
    assert lengths.settings["seeds"] == usual.settings["seeds"] == [0, 1, 2]
    assert (lengths.ours, lengths.peer) == (21.0, 66.0)
    assert lengths.ratio == pytest.approx(66 / 21)  # 65/20, 66/21, 670/220
    torn = [line for line in slow if line["side"] != "lengths"]
    assert results("movies", "float32", [*of_one, *torn], MACHINE)[0].settings["seeds"] == [0, 1]
    rest = [{**line, "machine": MACHINE} for line in other if line["side"] == "lengths"]
    assert results("movies", "float32", [*of_one, *torn, *rest], MACHINE)[0].settings["seeds"] == [0, 1]


def test_results_extrapolated_side_uses_its_own_seeds() -> None:
    lines = [line for line in made() if line["side"] != "usual" or line["seed"] == 2]
    usual = results("movies", "float32", lines, MACHINE)[1]
    assert usual.settings["seeds"] == [2]
    assert usual.ours == 22.0
    assert usual.ratio == pytest.approx((11 + 710 * 0.5) / 22)


def test_results_launched_peer_is_shown_for_comparison() -> None:
    launched = [
        {**line, "side": "launched", "settings": settings_of("launched", "movies", "float32"), "seconds": 50.0}
        for line in made()
        if (line["side"], line["epochs"]) == ("lengths", 3)
    ]
    row = results("movies", "float32", [*made(), *launched], MACHINE)[1]
    assert (row.what, row.target) == ("movies, against launched", "for comparison: no slower")
    assert row.ratio == pytest.approx(50 / 21)
    assert row.reached


def test_settings_of_differ_by_side() -> None:
    ours, lengths = (settings_of(side, "imdb", "bfloat16") for side in ("ours", "lengths"))
    assert "epochs" not in ours
    assert "library" in lengths
    assert "library" not in ours
    assert {(each["compute_type"], each["max_length"]) for each in (ours, lengths)} == {("bfloat16", SIZES["imdb"][2])}
