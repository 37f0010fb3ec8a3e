"""A search over synthetic scores: killed, torn, resumed, by two workers, and its last word."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graftwerk.config import RunConfig
from graftwerk.errors import (
    ConfigError,
    ConflictError,
    DivergedError,
    IntegrityError,
    MemoryShortage,
    ResourceError,
    RunInterrupted,
)
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.search.driver import SearchDriver
from graftwerk.experiments.search.finals import Finals
from graftwerk.experiments.search.header import search_header
from graftwerk.experiments.search.journal import JOURNAL, cut_torn_end
from graftwerk.experiments.search.runs import Runs
from graftwerk.experiments.search.search import Search, read_search, search
from graftwerk.experiments.search.space import Axis
from graftwerk.experiments.search.study import Study
from graftwerk.experiments.search.table import as_text
from graftwerk.experiments.workers import ThisMachine
from graftwerk.reporting.html import write_report
from tests.experiments.search import fake_runs
from tests.experiments.search.fake_runs import FakeRunner, in_child

SPACE = {"learning_rate": "1e-4..1e-1", "r": "4,8,16", "target_modules": "attention", "lora_dropout": 0.0}
SMALL: dict[str, Any] = {**SPACE, "num_train_epochs": 3, "finalists": 2, "repeats": 2, "quiet": True}
KILLED = -signal.SIGKILL


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", FakeRunner)
    monkeypatch.setattr(FakeRunner, "at", staticmethod(lambda job, epoch: None))
    monkeypatch.setattr(FakeRunner, "jobs", [])


def run_file(folder: Path, **changes: Any) -> dict[str, Any]:
    data = {"train": "rows.csv", "validation": 40, "test": 400}
    return {"model": "tiny", "data": data, "method": "lora", "output_dir": str(folder), **changes}


def trials_of(found: Search) -> list[dict[str, Any]]:
    return [{key: one[key] for key in ("number", "state", "settings", "value")} for one in found.result["trials"]]


def kill_at(monkeypatch: pytest.MonkeyPatch, trial: int, epoch: int) -> None:
    def at(job: Mapping[str, Any], now: int) -> None:
        if job["config"]["output_dir"].endswith(f"trials/{trial:03d}") and now == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(FakeRunner, "at", staticmethod(at))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers_module, "JobRunner", FakeRunner)
        patch.setattr(FakeRunner, "jobs", [])
        events = list[ProgressEvent]()
        folder = tmp_path_factory.mktemp("searches") / "whole"
        found = search(run_file(folder), trials=12, listener=events.append, **SMALL)
        found.jobs, found.events = list(FakeRunner.jobs), events  # type: ignore[attr-defined]
    return found


def test_search_finds_better_settings_and_shows_it_on_fresh_rows(whole: Search) -> None:
    result = whole.result
    assert [trial["state"] for trial in result["trials"]].count("complete") >= 4
    assert result["trials"][0]["settings"] == result["defaults"]  # the run file's own come first
    assert result["difference"]["verdict"] == "better"
    assert result["text"].startswith("The settings found beat the defaults: accuracy better by")
    assert result["best"]["metrics"]["accuracy"]["value"] > result["default"]["metrics"]["accuracy"]["value"]
    assert result["seeds"] == [1001, 1002]
    assert "beat the defaults" in str(whole)


def test_search_measures_test_rows_of_two_settings_once_with_fresh_seeds(whole: Search) -> None:
    jobs = whole.jobs  # type: ignore[attr-defined]
    trained = [job for job in jobs if job["kind"] == "trial"]
    assert {job["config"]["training"]["seed"] for job in trained if "/trials/" in job["config"]["output_dir"]} == {0}
    assert {job["config"]["training"]["seed"] for job in trained if "/finals/" in job["config"]["output_dir"]} == {
        1001,
        1002,
    }
    measured = [Path(job["config"]["output_dir"]).name for job in jobs if job["kind"] == "run"]
    chosen = f"trial-{whole.result['best']['trial']:03d}"
    assert sorted(measured) == sorted(f"{name}-seed{seed}" for name in (chosen, "defaults") for seed in (1001, 1002))
    assert jobs.index(next(job for job in jobs if job["kind"] == "run")) == len(jobs) - 4  # after all training


def test_search_events_count_all_runs_and_say_when_a_trial_was_given_up(whole: Search) -> None:
    events = whole.events  # type: ignore[attr-defined]
    assert (events[-1].done, events[-1].total) == (12 + 3 * 2 + 2 * 2,) * 2
    for trial in whole.result["trials"]:
        assert [at for at, _ in trial["evaluations"]] == [1.0, 2.0, 3.0][: len(trial["evaluations"])]
        said = next(one.text for one in events if one.kind == "run" and one.run == f"trial {trial['number']}")
        ended = f"given up after {10 * len(trial['evaluations'])} steps "
        assert said.startswith(ended if trial["state"] == "pruned" else "validation accuracy ")


@pytest.mark.parametrize(("metric", "first"), [("accuracy", "90.0"), ("perplexity", "0.1")])
def test_plain_shows_the_eight_best_first_and_counts_the_others(metric: str, first: str) -> None:
    def trial(number: int, state: str, value: float | None) -> dict[str, Any]:
        return {"number": number, "state": state, "value": value, "settings": {"method.r": number}, "seconds": 2.0}

    done = [trial(number, "complete", (1 + number) / 10) for number in range(9)]
    others = [trial(9, "pruned", None), trial(10, "fail", None), trial(11, "fail", None)]
    result = {"metric": metric, "status": "running", "space": [{"key": "method.r"}], "trials": [*done, *others]}
    lines = as_text(result).splitlines()
    rows = [line.split() for line in lines[2 : lines.index("")]]
    assert (len(rows), rows[0][1]) == (8, first)
    order = range(1, 9) if metric == "accuracy" else range(8)
    assert sorted(int(row[0]) for row in rows) == [*order]
    assert [int(row[0]) for row in rows] == sorted(order, reverse=metric == "accuracy")
    assert "12 trials (1 given up early, 2 failed)" in lines[-2]


def test_search_best_file_is_a_run_file_with_the_best_settings(whole: Search) -> None:
    best = RunConfig.load(whole.folder / "best.yaml")
    found = whole.result["best"]["settings"]
    assert best.training.learning_rate == found["training.learning_rate"]
    assert best.method.r == found["method.r"]  # type: ignore[attr-defined]
    assert best.output_dir == whole.folder.absolute() / "best"


def test_search_killed_five_times_tries_the_same(
    whole: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file(tmp_path / "killed")
    for trial, epoch in ((0, 2), (3, 1), (3, 3), (7, 1), (11, 3)):
        kill_at(monkeypatch, trial, epoch)
        assert in_child(lambda: search(config, trials=12, **SMALL)) == KILLED  # type: ignore[func-returns-value,arg-type]
    monkeypatch.setattr(FakeRunner, "at", staticmethod(lambda job, epoch: None))
    found = search(config, trials=12, **SMALL)
    assert trials_of(found) == trials_of(whole)
    assert found.result["best"]["settings"] == whole.result["best"]["settings"]
    assert any("running when an earlier search ended" in note for note in found.result["notes"])


def test_search_killed_after_a_trial_was_given_up_gives_it_up(
    whole: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation is stored, and the run has not ended yet."""
    config = run_file(tmp_path / "killed")
    pruned = [trial["number"] for trial in whole.result["trials"] if trial["state"] == "pruned"]
    monkeypatch.setattr(FakeRunner, "end_job", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    assert in_child(lambda: search(config, trials=12, **SMALL)) == KILLED  # type: ignore[func-returns-value,arg-type]
    monkeypatch.setattr(FakeRunner, "end_job", FakeRunner.ask_to_end)
    FakeRunner.jobs.clear()
    assert trials_of(search(config, trials=12, **SMALL)) == trials_of(whole)
    assert not any(job.get("config", {}).get("output_dir", "").endswith(f"/{pruned[0]:03d}") for job in FakeRunner.jobs)


def test_search_refused_leaves_the_trials_of_a_search_without_its_summary(tmp_path: Path) -> None:
    config = run_file(tmp_path / "one")
    search(config, trials=2, **SMALL)
    (tmp_path / "one" / "search.json").unlink()
    with pytest.raises(ConflictError):
        search(config, trials=2, **{**SMALL, "r": "4,8"})
    assert (tmp_path / "one" / "trials" / "000" / "manifest.json").is_file()


def test_search_with_a_larger_budget_goes_on(tmp_path: Path, whole: Search) -> None:
    config = run_file(tmp_path / "more")
    search(config, trials=5, **SMALL)
    assert trials_of(search(config, trials=12, **SMALL)) == trials_of(whole)


def test_search_cuts_a_torn_last_line_off(tmp_path: Path, whole: Search) -> None:
    config = run_file(tmp_path / "torn")
    search(config, trials=5, **SMALL)
    journal = tmp_path / "torn" / JOURNAL
    with journal.open("ab") as stream:
        stream.write(b'{"op_code":4,"worker_id":"a","stu')
    (tmp_path / "torn" / f"{JOURNAL}.lock").touch()  # held up for half a minute otherwise
    found = search(config, trials=12, **SMALL)
    assert trials_of(found) == trials_of(whole)
    assert any("33 bytes of study.journal were torn off" in note for note in found.result["notes"])


def test_mend_refuses_damage_in_the_midst(tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL
    journal.write_bytes(b'{"op_code":0}\n{"op_co\n{"op_code":4}\n')
    with pytest.raises(IntegrityError, match="line 2"):
        cut_torn_end(journal)
    journal.write_bytes(b'{"op_code":0}\n\0\0\0\n')
    assert cut_torn_end(journal) == 4
    assert journal.read_bytes() == b'{"op_code":0}\n'


def test_search_trials_that_cannot_fit_are_infeasible_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRunner, "lacks", staticmethod(lambda config: 7 if config["method"]["r"] == 16 else 0))
    found = search(run_file(tmp_path / "small"), trials=14, **{**SMALL, "pruner": "none"})
    states = {
        state: {one["settings"]["method.r"] for one in found.result["trials"] if one["state"] == state}
        for state in ("complete", "infeasible")
    }
    assert states["infeasible"] == {16}
    assert 16 not in states["complete"]
    assert all(one["settings"]["method.r"] != 16 for one in found.result["finalists"])
    refused = [one for one in found.result["trials"] if one["state"] == "infeasible"]
    # told as a constraint, and not as a failure: the sampler goes elsewhere, and does not try it over and over
    assert len(refused) <= 5
    study = Study(found.folder / JOURNAL, [], {})
    assert {trial.number for trial in study._trials() if trial.constraints.get("memory") == 7} == {
        one["number"] for one in refused
    }
    assert f"14 trials ({len(refused)} too large for the memory)" in str(found)
    assert f"trial {refused[0]['number']} too large for the memory: training needs 107 bytes" in str(found)
    page = write_report(found.folder).read_text()
    assert f"14 trials, of them {len(refused)} too large for the memory" in page
    again = search(run_file(tmp_path / "small"), trials=14, **{**SMALL, "pruner": "none"})
    assert again.result["trials"] == found.result["trials"]


def test_search_two_workers_share_one_study(tmp_path: Path, whole: Search) -> None:
    found = search(run_file(tmp_path / "two"), trials=12, workers=2, **SMALL)
    records = found.result["trials"]
    assert [record["number"] for record in records] == list(range(12))
    assert all(record["state"] in ("complete", "pruned") for record in records)
    assert found.result["difference"]["verdict"] == "better"


def test_search_two_workers_stop_at_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, stopped = threading.Event(), threading.Event()

    def at(job: Mapping[str, Any], epoch: int) -> None:
        if job["config"]["output_dir"].endswith("trials/001"):
            started.set()
            stopped.wait(20)  # as a real job, which saves when it is asked to end
            raise RunInterrupted(signal.SIGTERM, "stopped")
        started.wait(20)
        raise ResourceError("the disk is full")

    monkeypatch.setattr(FakeRunner, "at", staticmethod(at))
    monkeypatch.setattr(FakeRunner, "end_job", lambda self: stopped.set())
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        search(run_file(tmp_path / "two"), trials=12, workers=2, **SMALL)
    assert stopped.is_set()
    assert "trials in" in str(caught.value.recovered)


def test_search_prunes_hopeless_trials_by_median_and_by_row(tmp_path: Path) -> None:
    for pruner in ("median", "wilcoxon"):
        found = search(run_file(tmp_path / pruner), trials=16, pruner=pruner, sampler="random", **SMALL)
        pruned = [trial for trial in found.result["trials"] if trial["state"] == "pruned"]
        assert pruned, pruner
        best = max(trial["value"] for trial in found.result["trials"] if trial["value"] is not None)
        assert all(len(trial["evaluations"]) < 3 for trial in pruned)
        assert all(trial["evaluations"][-1][1] < best for trial in pruned)
    never = search(run_file(tmp_path / "none"), trials=6, pruner="none", sampler="random", **SMALL)
    assert all(trial["state"] == "complete" for trial in never.result["trials"])
    assert len({trial["settings"]["training.learning_rate"] for trial in never.result["trials"]}) == 6


def test_search_wilcoxon_without_row_scores_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "rows", None)
    found = search(run_file(tmp_path / "none"), trials=6, pruner="wilcoxon", sampler="random", **SMALL)
    assert all(trial["state"] == "complete" for trial in found.result["trials"])
    assert sum("no score for each row" in note for note in found.result["notes"]) == 1


def test_search_grid_tries_each_point_once(tmp_path: Path) -> None:
    given = {**SMALL, "learning_rate": "1e-3,3e-3,1e-2", "r": "4,8"}
    found = search(run_file(tmp_path / "grid"), sampler="grid", pruner="none", **given)
    points = [tuple(trial["settings"].values()) for trial in found.result["trials"]]
    assert sorted(points) == [(rate, r) for rate in (1e-3, 3e-3, 1e-2) for r in (4, 8)]


def test_search_seconds_are_those_of_each_worker(tmp_path: Path) -> None:
    class Records(list[dict[str, Any]]):
        def records(self) -> list[dict[str, Any]]:
            return self

    base, axes, wanted, notes = read_search(run_file(tmp_path), {"seconds": 4, "workers": 2, **SPACE})
    driver = SearchDriver(base, axes, wanted, notes, listener=lambda event: None)
    spent = list[bool]()
    for seconds in (7.0, 9.0):
        pruned, running = {"state": "pruned", "seconds": seconds}, {"state": "running", "seconds": None}
        driver.study = Records([pruned, running])  # type: ignore[assignment]
        spent.append(driver._spent())
        assert driver._finished_trials() == 1
    assert spent == [False, True]
    alone, both = (Runs(base, ["trial"] * 5, workers, lambda event: None) for workers in (1, 2))
    for runs in (alone, both):
        runs.eta.finished("trial", 10.0)
    assert both.left() == pytest.approx(alone.left() / 2)  # type: ignore[operator]
    threads = [runner.threads for runner in ThisMachine(2).runners(tmp_path / "log")]
    assert threads == [max(1, (os.cpu_count() or 1) // 2)] * 2
    assert ThisMachine().runners(tmp_path / "log")[0].threads is None


def test_search_header_notes_severe_findings_alone(tmp_path: Path) -> None:
    base, axes, wanted, _ = read_search(run_file(tmp_path), SPACE)
    findings = [{"message": "few rows", "grave": False}, {"message": "rows stand twice", "grave": True}]
    checked = {"machine": {}, "origin": {}, "fingerprint": "f", "rows": {}, "summary": {}, "findings": findings}
    assert search_header(base, axes, wanted, {}, "accuracy", checked)["notes"] == ["rows stand twice"]


def test_search_trial_that_is_hopeless_at_its_end_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "is_hopeless", lambda study, ticket, step, value, rows: step >= 300)
    found = search(run_file(tmp_path / "late"), trials=2, **SMALL)
    assert [trial["state"] for trial in found.result["trials"]] == ["complete"] * 2


def test_search_of_a_task_that_is_measured_at_the_end_prunes_by_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRunner, "measures", False)
    found = search(run_file(tmp_path / "loss"), trials=12, sampler="random", **SMALL)
    pruned = [trial for trial in found.result["trials"] if trial["state"] == "pruned"]
    best = max(trial["value"] for trial in found.result["trials"] if trial["value"] is not None)
    assert pruned
    for trial in pruned:
        training = {"learning_rate": trial["settings"]["training.learning_rate"], "seed": 0}
        assert fake_runs.quality({"training": training, "method": {"r": trial["settings"]["method.r"]}}) < best


@pytest.mark.parametrize("pruner", ["median", "wilcoxon"])
def test_study_of_an_error_gives_up_what_is_above_the_others_after_four_trials(tmp_path: Path, pruner: Any) -> None:
    axis = Axis("training.learning_rate", 1e-4, 1e-1, log=True)
    study = Study(tmp_path / JOURNAL, [axis], {}, sampler="random", pruner=pruner, higher=False)

    def is_hopeless(value: float) -> bool:
        ticket = study.next()
        found = study.is_hopeless(ticket, 100, value, [-value - 0.001 * row for row in range(20)])
        study.complete(ticket, value, 1.0)
        return found

    assert [is_hopeless(value) for value in (0.1, 0.4, 0.5, 0.6)] == [False] * 4
    assert [is_hopeless(value) for value in (0.05, 0.55)] == [False, True]
    assert study.records()[0]["evaluations"] == [[1.0, 0.1]]


@pytest.mark.parametrize(("metric", "chosen"), [("rmse", [1, 3]), ("pearson", [2, 0])])
def test_finals_take_the_best_trials_by_the_sense_of_the_metric(tmp_path: Path, metric: str, chosen: list[int]) -> None:
    config = {**run_file(tmp_path), "task": "regression"}
    base, _, wanted, _ = read_search(config, {**SPACE, "finalists": 2})
    records = [
        {"number": number, "state": "complete", "value": value, "settings": {"method.r": number}}
        for number, value in enumerate((0.5, 0.2, 0.9, 0.3))
    ]
    runs = Runs(base, [], 1, lambda event: None)
    finals = Finals(runs, wanted, metric, {"method.r": 9}, records, higher=metric == "pearson")
    assert [one["number"] for one in finals.finalists] == chosen
    one, other = (f"trial-{number:03d}" for number in chosen)
    finals.values |= {one: {1: 0.4}, other: {1: 0.6, 2: 0.6}}
    assert finals._winner() == other  # a run of the first failed
    finals.values[one][2] = 0.4
    assert finals._winner() == (other if metric == "pearson" else one)


def test_search_seconds_end_it(tmp_path: Path) -> None:
    found = search(run_file(tmp_path / "short"), seconds=1e-6, **SMALL)
    assert len(found.result["trials"]) == 1


def test_search_counts_failed_trials(tmp_path: Path) -> None:
    given = {**SMALL, "learning_rate": "3e-3,0.5"}
    found = search(run_file(tmp_path / "diverging"), sampler="grid", **given)
    failed = [trial for trial in found.result["trials"] if trial["state"] == "fail"]
    assert len(failed) == 3
    assert all(trial["reason"] == "the loss is not finite" for trial in failed)
    assert "3 failed" in str(found)
    with pytest.raises(DivergedError, match="none of the 3 trials came to an end: the loss is not finite"):
        search(run_file(tmp_path / "all"), trials=3, **{**SMALL, "learning_rate": 0.5})


def test_search_trial_or_finalist_without_memory_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(job: Mapping[str, Any], epoch: int) -> None:
        folder = job["config"]["output_dir"]
        if job["config"]["method"]["r"] == 16 or folder.endswith("defaults-seed1001"):
            raise MemoryShortage("one row at a time does not fit into memory")

    monkeypatch.setattr(FakeRunner, "at", staticmethod(at))
    given = {**SMALL, "learning_rate": "3e-3,1e-3", "r": "8,16"}
    found = search(run_file(tmp_path / "large"), sampler="grid", pruner="none", **given)
    states = [(trial["settings"]["method.r"], trial["state"]) for trial in found.result["trials"]]
    assert sorted(states) == [(8, "complete"), (8, "complete"), (16, "fail"), (16, "fail")]
    assert any("does not fit" in str(one["failed"]) for one in found.result["finalists"])


def test_search_defaults_stand_if_no_trial_is_better(tmp_path: Path) -> None:
    best = run_file(tmp_path / "stands", training={"learning_rate": 3e-3})
    found = search(best, trials=1, **{**SMALL, "r": "4,8"})
    assert found.result["difference"] is None
    assert "the defaults stand" in found.result["text"]
    assert found.result["best"]["settings"] == found.result["default"]["settings"]


def test_search_worse_settings_or_failed_finalists_leave_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials' seed flatters r=4, or the finalists run out of memory."""
    usual = fake_runs.quality

    def flattering(config: Mapping[str, Any]) -> float:
        seed = config["training"]["seed"]
        if "/finals/" in config["output_dir"]:
            return usual(config) - (0.2 if config["method"]["r"] == 4 else 0)
        return usual(config) + (0.05 if seed == 0 and config["method"]["r"] == 4 else 0)

    monkeypatch.setattr(fake_runs, "quality", flattering)
    given = {**SMALL, "learning_rate": 3e-3, "r": "4,8"}
    found = search(run_file(tmp_path / "worse"), sampler="grid", pruner="none", **given)
    assert found.result["difference"]["verdict"] == "worse"
    assert found.result["best"] == {**found.result["default"], "trial": None}
    assert RunConfig.load(tmp_path / "worse" / "best.yaml").method.r == 8  # type: ignore[attr-defined]
    assert "found " not in str(found).split("rows.")[1].split("The settings")[0]

    def at(job: Mapping[str, Any], epoch: int) -> None:
        if "/finals/trial" in job["config"]["output_dir"]:
            raise MemoryShortage("too large")

    monkeypatch.setattr(FakeRunner, "at", staticmethod(at))
    found = search(run_file(tmp_path / "failed"), sampler="grid", pruner="none", **given)
    assert found.result["text"] == "All finalists failed with fresh seeds; the defaults stand."


@pytest.mark.parametrize("name", ["config.yaml", "best.yaml", "trials/mine.txt", "finals/mine.txt"])
def test_search_overwrite_in_a_folder_of_something_else_raises(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConflictError, match="and no search"):
        search(run_file(tmp_path), trials=2, overwrite=True, **SMALL)
    assert mine.read_text() == "mine"


def test_search_no_difference_is_said(tmp_path: Path) -> None:
    near = run_file(tmp_path / "near", training={"learning_rate": 3e-3})
    found = search(near, trials=6, pruner="none", **{**SMALL, "learning_rate": "2.5e-3..3.5e-3", "r": 4})
    assert found.result["difference"]["verdict"] == "no difference shown"
    assert found.result["text"].startswith("No difference shown from the defaults: ")
    assert found.result["best"]["settings"] != found.result["default"]["settings"]  # for the user to choose


def test_search_ctrl_c_keeps_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Search) -> None:
    config = run_file(tmp_path / "stopped")

    def stop(event: ProgressEvent) -> None:
        if event.run == "trial 2" and event.step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    def at(job: Mapping[str, Any], epoch: int) -> None:
        if job["config"]["output_dir"].endswith("trials/002") and epoch == 3:
            raise RunInterrupted(signal.SIGINT, "stopped by SIGINT")  # what the signal does to a real job

    monkeypatch.setattr(FakeRunner, "at", staticmethod(at))
    with pytest.raises(RunInterrupted) as caught:
        search(config, trials=12, listener=stop, **SMALL)
    assert caught.value.exit_code == 130
    assert "run the same command again" in str(caught.value.hint)
    assert "2 trials in" in str(caught.value.recovered)
    monkeypatch.setattr(FakeRunner, "at", staticmethod(lambda job, epoch: None))
    assert trials_of(search(config, trials=12, **SMALL)) == trials_of(whole)


def test_search_refuses_another_config(tmp_path: Path) -> None:
    config = run_file(tmp_path / "one")
    long = [f"layers.{at}.query" for at in range(30)]
    given = {**SMALL, "target_modules": long}
    search(config, trials=2, **given)
    same = {"logging_steps": 7, "report_to": ["jsonl"], "check_memory": False, "processes": 1}
    assert len(search(config, trials=2, **{**given, **same}).result["trials"]) == 2
    before = (tmp_path / "one" / JOURNAL).read_bytes()
    for other in ({"r": "4,8"}, {"sampler": "random"}, {"training.weight_decay": 0.1}, {"target_modules": long[:-1]}):
        with pytest.raises(ConflictError, match="other settings: ") as caught:
            search(config, trials=2, **{**given, **other})
        assert "--overwrite" in str(caught.value.hint)
    assert (tmp_path / "one" / JOURNAL).read_bytes() == before
    anew = search(config, trials=2, overwrite=True, **{**SMALL, "r": "4,8"})
    assert len(anew.result["trials"]) == 2


def test_search_refuses_the_folder_of_a_run(tmp_path: Path, whole: Search) -> None:
    with pytest.raises(ConflictError, match="is the folder of a run"):
        search(run_file(whole.folder / "trials" / "000"), trials=2, **SMALL)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trials": 0}, "greater than or equal to 1"),
        ({"seconds": 0}, "greater than 0"),
        ({"learning_rat": "1e-4..1e-2"}, "did you mean `learning_rate`?"),
        ({"trial": 3}, "did you mean `trials`?"),
        ({"method.rr": "4,8"}, "did you mean `r`?"),
        ({"r": "8..4"}, "is empty"),
        ({"r": "0..8"}, "greater than or equal to 1"),
        ({"r": "4,4"}, "has a value twice"),
        ({"r": "4,"}, "empty value"),
        ({"learning_rate": "1e-4.."}, "is no range"),
        ({"seed": "0,1"}, "is not searched"),
        ({"sampler": "tpee"}, "'tpe', 'random' or 'grid'"),
        ({"max_steps": 5, "epochs": "1,2"}, "would change nothing"),
        ({"metric": "bleu"}, "there is no metric `bleu`"),
    ],
)
def test_search_invalid_argument_raises(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search(run_file(tmp_path / "none"), quiet=True, **given)
    assert said in str(caught.value)
    assert not (tmp_path / "none").exists()
    assert not FakeRunner.jobs


@pytest.mark.parametrize("split", ["validation", "test"])
def test_search_without_held_out_rows_raises(tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.experiments.search import fake_runs

    monkeypatch.setitem(fake_runs.ROWS_OF, split, 0)
    with pytest.raises(ConfigError) as caught:
        search(run_file(tmp_path / "none"), quiet=True)
    assert caught.value.where == f"data.{split}"
    assert not (tmp_path / "none").exists()


def test_search_without_optuna_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ResourceError) as caught:
        search(run_file(tmp_path / "none"), quiet=True)
    assert caught.value.hint == "pip install 'graftwerk[search]'"
    assert not (tmp_path / "none").exists()


def test_search_report_shows_the_last_word_and_the_charts(whole: Search) -> None:
    trial = write_report(whole.folder / "trials" / "000").read_text(encoding="utf-8")
    assert "train again with these settings to measure them" in trial
    page = write_report(whole.folder).read_text(encoding="utf-8")
    assert "The settings found beat the defaults" in page
    for chart in ("Importance: ", "All ", "accuracy against learning_rate", "accuracy against r"):
        assert f'aria-label="{chart}' in page
    assert json.dumps(whole.to_dict())
