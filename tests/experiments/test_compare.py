"""A real comparison on a tiny model: stopped, with a run killed, resumed, and its result."""

from __future__ import annotations

import copy
import json
import os
import shlex
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from graftwerk.config import RunConfig
from graftwerk.errors import (
    ConfigError,
    ConflictError,
    DivergedError,
    MemoryShortage,
    RunInterrupted,
    UnsupportedError,
)
from graftwerk.evaluation.results_io import EVALUATION, PREDICTIONS, load_evaluation
from graftwerk.experiments import compare as compare_module
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.compare import Comparison, compare
from graftwerk.experiments.header import _notes
from graftwerk.experiments.job_runner import Crashed, JobRunner
from graftwerk.experiments.jobs import perform
from graftwerk.experiments.method_specs import parse_method_specs
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.workers import Workers
from graftwerk.serialization.untrusted_files import read_json
from graftwerk.training.train import train

METHODS = ["full", {"label": "small", "name": "lora", "r": 2}]
SEEDS = [0, 1]


class OneProcess(JobRunner):
    """Workers whose warm process outlives a comparison, so that these tests pay for its imports once."""

    shared: Any = None

    def __exit__(self, *_: Any) -> None:
        OneProcess.shared, self._process = self._process, None

    def _started(self) -> Any:
        self._process, OneProcess.shared = self._process or OneProcess.shared, None
        return super()._started()

    @classmethod
    def end(cls) -> None:
        last = JobRunner(Path(os.devnull))
        last._process = cls.shared
        last._close()


@pytest.fixture(scope="module")
def settings(tiny_encoder: Path, glosses: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 48},
        "training": {"num_train_epochs": 2, "save_steps": 4, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 2},
        "output_dir": str(tmp_path_factory.mktemp("comparisons") / "cmp"),
    }


class Story:
    """What happened in the three calls that the tests look at."""

    interrupted: RunInterrupted
    after_interrupt: list[str]
    killed: Comparison
    finished: Comparison
    moments: list[ProgressEvent]


@pytest.fixture(scope="module")
def story(settings: dict[str, Any]) -> Iterator[Story]:
    """First call: SIGTERM in the second run. Second: the process of another run is killed. Third: to the end."""
    patch = pytest.MonkeyPatch()
    patch.setattr(workers_module, "JobRunner", OneProcess)
    made: dict[str, Any] = {"workers": None}
    start = OneProcess.__init__

    def remember(self: OneProcess, log: Path, threads: int | None = None) -> None:
        made["workers"] = self
        start(self, log, threads)

    patch.setattr(OneProcess, "__init__", remember)
    told = Story()
    done: list[str] = []

    def stop(moment: ProgressEvent) -> None:
        if moment.run == "small, seed 0" and moment.step >= 6 and not done:
            done.append("stopped")
            os.kill(os.getpid(), signal.SIGTERM)

    def kill(moment: ProgressEvent) -> None:
        if moment.run == "full, seed 1" and moment.steps and len(done) == 1:
            done.append("killed")
            os.kill(made["workers"]._job, signal.SIGKILL)

    try:
        with pytest.raises(RunInterrupted) as caught:
            compare(settings, METHODS, SEEDS, listener=stop, report=False)
        told.interrupted = caught.value
        folder = Path(settings["output_dir"])
        told.after_interrupt = sorted(path.name for path in folder.iterdir() if path.is_dir())
        told.killed = compare(settings, METHODS, SEEDS, listener=kill, report=False)
        told.moments = []
        told.finished = compare(settings, METHODS, SEEDS, listener=told.moments.append, report=True)
        assert done == ["stopped", "killed"]
        yield told
    finally:
        patch.undo()
        OneProcess.end()


def test_compare_signal_stops_after_save(story: Story) -> None:
    assert story.interrupted.exit_code == 128 + signal.SIGTERM
    assert "1 of 4 runs" in str(story.interrupted.recovered)
    assert "to resume" in str(story.interrupted.hint)
    assert story.after_interrupt == ["full-seed0", "small-seed0"]


def test_compare_resumes(story: Story) -> None:
    """The run that got the signal continued from its checkpoint; the finished one was not trained again."""
    events = [json.loads(line) for line in (story.killed.folder / "small-seed0" / "metrics.jsonl").open()]
    assert any(event["kind"] == "resume" and event["step"] >= 4 for event in events)
    events = [json.loads(line) for line in (story.killed.folder / "full-seed0" / "metrics.jsonl").open()]
    assert not any(event["kind"] == "resume" for event in events)


def test_compare_interrupted_counts_failed_runs_apart(settings: dict[str, Any]) -> None:
    class FailsThenStops(JobRunner):
        errors: ClassVar[list[BaseException]] = [
            DivergedError("the loss is nan"), MemoryShortage("one row is too much"), RunInterrupted(15, "stopped")
        ]  # fmt: skip

        def run(self, job: Mapping[str, Any], on_event: Any) -> dict[str, Any]:
            raise self.errors.pop(0)

    driver = compare_module.ComparisonDriver(
        settings, parse_method_specs(["lora", "probe", "ia3"]), [0], {}, None, listener=lambda event: None
    )
    with pytest.raises(RunInterrupted) as caught:
        driver._run_all(Workers([FailsThenStops(Path(os.devnull))]), "accuracy", overwrite=True)
    assert caught.value.recovered == f"0 of 3 runs (2 failed) in {settings['output_dir']}"


def test_compare_killed_run_is_reported_and_others_continue(story: Story) -> None:
    methods = {method["name"]: method for method in story.killed.result["methods"]}
    assert "SIGKILL" in methods["full"]["failed"]["1"]
    assert set(methods["full"]["runs"]) == {"0"}
    assert set(methods["small"]["runs"]) == {"0", "1"}
    assert "full, seed 1, failed: the process of this run was killed" in story.killed.table()


def test_compare_again_runs_only_what_is_left(story: Story) -> None:
    runs = {moment.run for moment in story.moments if moment.kind == "run"}
    assert runs == {"full, seed 1"}
    there = {m.run for m in story.moments if m.kind == "note" and m.text.startswith("already finished: accuracy ")}
    assert there == {"full, seed 0", "small, seed 0", "small, seed 1"}
    assert story.moments[-1].kind == "end"
    assert (story.moments[-1].done, story.moments[-1].total) == (4, 4)
    assert all(method["failed"] == {} for method in story.finished.result["methods"])


def test_compare_metrics_equal_those_of_runs(story: Story, settings: dict[str, Any]) -> None:
    result = story.finished.to_dict()
    assert result["status"] == "finished"
    assert (result["split"], result["rows"], result["metric"]) == ("test", 48, "accuracy")
    for method in result["methods"]:
        values = []
        for seed in SEEDS:
            run = Path(settings["output_dir"]) / f"{method['name']}-seed{seed}"
            manifest = json.loads((run / "manifest.json").read_text())
            evaluation, predictions = load_evaluation(run, run / "adapter") or pytest.fail("nothing stored")
            value = float((predictions.scores.argmax(1) == predictions.targets).mean())
            # Training measured the model in its memory, evaluation the adapter that was written.
            assert manifest["metrics"]["test"]["accuracy"]["value"] == pytest.approx(value)
            assert evaluation["metrics"]["accuracy"]["value"] == pytest.approx(value)
            stored = method["runs"][str(seed)]
            assert stored["value"] == pytest.approx(value)
            assert stored["folder"] == run.name
            assert stored["training_seconds"] == manifest["cost"]["training_seconds"]
            values.append(value)
        figure = method["figure"]
        assert figure["value"] == pytest.approx(np.mean(values))
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert set(method["metrics"]) == {"accuracy", "f1_macro", "f1_weighted", "roc_auc"}
        for cost, amount in method["cost"].items():
            assert amount is not None, cost
            assert amount > 0, cost
    sizes = {method["name"]: method["cost"] for method in result["methods"]}
    assert sizes["small"]["trained_parameters"] < sizes["full"]["trained_parameters"]
    assert sizes["small"]["adapter_bytes"] < sizes["full"]["adapter_bytes"]


def test_compare_result_has_differences_front_and_recommendation(story: Story) -> None:
    result = story.finished.result
    (pair,) = result["differences"]
    assert {pair["a"], pair["b"]} == {"full", "small"}
    assert pair["low"] <= pair["value"] <= pair["high"]
    assert pair["verdict"] in {"better", "worse", "practically equal", "no difference shown"}
    assert pair["verdict"].split()[0] in pair["text"]
    assert set(result["front"]) == set(result["methods"][0]["cost"])
    assert "small" in result["front"]["trained_parameters"]
    best = max((method["figure"] for method in result["methods"]), key=lambda figure: figure["value"])
    shown = best["low"] > result["majority"]["value"]
    assert result["majority"]["value"] == result["majority"]["share"] == pytest.approx(4 / 48, abs=2 / 48)
    assert (result["recommendation"] is not None) is shown
    assert (result["at_chance"] is None) is shown
    assert (result["at_chance"] in result["notes"]) is not shown
    assert result["resolution"] == pytest.approx((pair["high"] - pair["low"]) / 2)
    assert ("Recommended" in story.finished.table()) is shown
    assert ("always answering the most frequent label" in story.finished.table()) is not shown
    assert str(story.finished) == story.finished.table()


def test_compare_run_is_bit_equal_to_train(story: Story, settings: dict[str, Any], tmp_path: Path) -> None:
    """In a process forked from the warm one, and in this one, which has used its threads: the same bytes.

    For the run that was stopped and resumed, too.
    """
    for name, method in (("full", "full"), ("small", {"name": "lora", "r": 2})):
        run = train({**settings, "method": method, "output_dir": str(tmp_path / name)})
        here = load_file(run.adapter / "adapter_model.safetensors")
        there = load_file(story.finished.folder / f"{name}-seed0" / "adapter" / "adapter_model.safetensors")
        assert here.keys() == there.keys()
        for key in here:
            assert np.array_equal(here[key], there[key]), key


def test_compare_writes_reports(story: Story) -> None:
    assert story.finished.report == story.finished.folder / "report.html"
    assert story.finished.report.stat().st_size > 1000
    assert (story.finished.folder / "small-seed0" / "report.html").is_file()


def test_comparison_opens_its_folder_again(story: Story, tmp_path: Path) -> None:
    again = Comparison(story.finished.folder)
    assert again.result == story.finished.result
    assert repr(again) == f"<Comparison {again.folder}: 2 methods, 2 seeds>"
    with pytest.raises(ConfigError, match="holds no comparison"):
        Comparison(tmp_path)


def test_header_notes_say_what_the_metrics_are_worth() -> None:
    base = RunConfig.build({"model": "m", "data": {"train": "rows.csv"}, "method": "lora"})
    findings = [{"message": "few rows", "grave": False}, {"message": "rows stand twice", "grave": True}]
    rows = {"train": 8, "validation": 4, "test": 4}
    assert _notes(base, [0, 1], {"rows": rows, "findings": findings}, {}, None) == ["rows stand twice"]
    one_rate = RunConfig.build(base.model_dump(mode="json"), {"training.learning_rate": 1e-3})
    notes = _notes(one_rate, [0], {"rows": {**rows, "test": 0}, "findings": []}, {}, None)
    assert [note.split(" ")[0] for note in notes] == ["the", "one", "all"]
    assert "at learning rate 0.001, " in notes[-1]
    with pytest.raises(ConfigError, match="nothing is held out"):
        _notes(base, [0, 1], {"rows": {"train": 8}, "findings": []}, {}, None)


def test_comparison_command_repeats_it(story: Story) -> None:
    """The resolved settings lie in the folder, and the command names them."""
    command = story.finished.result["command"]
    assert command.startswith("graftwerk compare ")
    assert "seeds=0,1" in command
    assert "label: small" in command
    RunConfig.load(story.finished.folder / "config.yaml")


def test_compared_run_command_trains_into_another_folder(story: Story) -> None:
    for name in ("small-seed0", "small-seed1"):
        run = story.finished.folder / name
        program, verb, config, *overrides = shlex.split(read_json(run / "manifest.json")["command"])
        assert (program, verb, config) == ("graftwerk", "train", str((run / "config.yaml").absolute()))
        again = RunConfig.load(config, overrides)
        assert not again.output_dir.exists()
        assert again.output_dir.parent == run.absolute().parent
        first = RunConfig.load(run / "config.yaml")
        assert again.model_copy(update={"output_dir": first.output_dir}) == first


def test_load_evaluation_damaged_predictions_return_none(story: Story, settings: dict[str, Any]) -> None:
    run = story.finished.folder / "small-seed1"
    good = (run / PREDICTIONS).read_bytes()
    try:
        (run / PREDICTIONS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert load_evaluation(run, run / "adapter") is None
    finally:
        (run / PREDICTIONS).write_bytes(good)
    assert load_evaluation(run, run / "adapter") is not None
    kept = json.loads((run / EVALUATION).read_text())
    assert kept["adapter"]["bytes"] == (run / "adapter" / "graftwerk.json").stat().st_size


# -- what is refused, before anything is trained ----------------------------------------------------------------------


def config(settings: dict[str, Any], method: Any = "lora", **changes: Any) -> dict[str, Any]:
    return RunConfig.build({**settings, "method": method, **changes}).model_dump(mode="json")


def check(settings: dict[str, Any], method: Any = "lora", folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    tree = config(settings, method, **changes)
    runs = {} if folder is None else {str(folder): {**tree, "output_dir": str(folder)}}
    return perform({"kind": "check", "configs": {"it": tree}, "runs": runs}, lambda message: None)


def test_check_counts_parameters_of_each_method(settings: dict[str, Any]) -> None:
    checked = check(settings, {"name": "lora", "r": 2})
    assert checked["rows"] == {"train": 168, "validation": 24, "test": 48}
    assert checked["parameters"]["it"]["trained"] > 0
    assert checked["main_metric"] == "accuracy"


def test_check_other_settings_than_existing_run_raise(story: Story, settings: dict[str, Any]) -> None:
    run = story.finished.folder / "small-seed0"
    lora = {"name": "lora", "r": 2}
    check(settings, lora, run)
    with pytest.raises(ConflictError, match=r"training.num_train_epochs: 2.0 -> 5.0"):
        check(settings, lora, run, training={**settings["training"], "num_train_epochs": 5})
    with pytest.raises(ConflictError, match="method"):
        check(settings, {"name": "lora", "r": 4}, run)


def test_check_changed_rows_raise(story: Story, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = Path(settings["data"]["train"]).read_text().splitlines()
    run = tmp_path / "run"
    run.mkdir()
    source = story.finished.folder / "small-seed0"
    copy = tmp_path / "rows.jsonl"
    copy.write_text("\n".join(rows[:-1]) + "\n")
    data = {**settings["data"], "train": str(copy)}
    (run / "manifest.json").write_bytes((source / "manifest.json").read_bytes())
    (run / "config.yaml").write_text(RunConfig.build(config(settings, {"name": "lora", "r": 2}, data=data)).dump())
    with pytest.raises(ConflictError, match="the rows themselves"):
        check(settings, {"name": "lora", "r": 2}, run, data=data)


def test_check_unsuitable_method_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        check(settings, {"name": "lora", "target_modules": ["nowhere"]})
    assert "method `it`" in str(caught.value.where)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"methods": []}, "no methods"),
        ({"methods": ["lora", "lora"]}, "same method"),
        ({"seeds": [0, 0]}, "given twice"),
        ({"metric": "bleu"}, "no metric"),
        ({"prefer": "money"}, "no cost"),
        ({"seed": 3}, "seeds=0,1,2"),
        ({"training.seed": 3}, "several seeds"),
        ({"method": "lora"}, "for every method"),
        ({"method.r": 3}, "for every method"),
        ({"num_train_epoch": 3}, "unknown key `num_train_epoch`"),
    ],
)
def test_compare_invalid_arguments_raise(settings: dict[str, Any], arguments: dict[str, Any], said: str) -> None:
    given = {"methods": ["lora", "full"], **arguments}
    with pytest.raises(ConfigError) as caught:
        compare(settings, quiet=True, **given)
    assert said in str(caught.value)


def test_compare_overrides_leave_settings_of_caller(settings: dict[str, Any]) -> None:
    before = copy.deepcopy(settings)
    with pytest.raises(ConfigError, match="no cost"):
        compare(settings, ["lora"], quiet=True, prefer="money", **{"training.num_train_epochs": 7})
    assert settings == before


def test_compare_into_folder_of_run_raises(settings: dict[str, Any], tmp_path: Path) -> None:
    for name, what in (("search.json", "a search"), ("manifest.json", "a run")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ConflictError, match=f"folder of {what}"):
            compare({**settings, "output_dir": str(tmp_path)}, ["lora"], quiet=True)


def test_compare_locked_folder_raises(settings: dict[str, Any], tmp_path: Path) -> None:
    from graftwerk.training.lock import RunLock

    with RunLock(tmp_path), pytest.raises(ConflictError, match="in use"):
        compare({**settings, "output_dir": str(tmp_path)}, ["lora"], quiet=True)


# -- the processes ----------------------------------------------------------------------------------------------------


def stand_in(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> JobRunner:
    """Workers that talk to a script in place of the warm process."""
    import subprocess
    import sys

    started = subprocess.Popen

    def popen(command: list[str], **kwargs: Any) -> Any:
        assert command[1:] == ["-m", "graftwerk.experiments.fork_server"]
        return started([sys.executable, "-c", script], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return JobRunner(tmp_path / "log")


def test_job_runner_worker_error_keeps_its_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"started": 0},
        {"event": {"kind": "step"}},
        {"error": {"error": "memory", "exit_code": 5, "what": "too large", "where": "there", "hint": "smaller"}},
        {"ended": 4},
    ]
    script = f"import sys, json\nsys.stdin.readline()\nfor line in {messages!r}: print(json.dumps(line), flush=True)\n"
    events: list[dict[str, Any]] = []
    with stand_in(script, monkeypatch, tmp_path) as workers, pytest.raises(MemoryShortage) as caught:
        workers.run({"kind": "run"}, events.append)
    assert (caught.value.what, caught.value.where, caught.value.hint) == ("too large", "there", "smaller")
    assert events == [{"kind": "step"}]


def test_job_runner_dead_worker_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "import sys\nsys.stdin.readline()\nprint('the last words', file=sys.stderr)\nsys.exit(3)"
    with stand_in(script, monkeypatch, tmp_path) as workers, pytest.raises(Crashed) as caught:
        workers.run({"kind": "run"}, lambda event: None)
    assert "code 3" in caught.value.what
    assert "the last words" in caught.value.what


def test_job_runner_job_asked_to_end_before_it_has_started_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its process still imports, or the runner is between two jobs, when another worker has failed."""
    script = """
import json, os, signal, sys, time
def end(*_):
    print(json.dumps({"error": {"error": "interrupted", "exit_code": 143, "what": "saved"}}), flush=True)
    print(json.dumps({"ended": 143}), flush=True)
signal.signal(signal.SIGTERM, end)
while sys.stdin.readline():
    print(json.dumps({"event": {"kind": "phase"}}), flush=True)
    sys.stdin.readline()
    print(json.dumps({"started": os.getpid()}), flush=True)
    time.sleep(2) or print(json.dumps({"done": {}}) + "\\n" + json.dumps({"ended": 0}), flush=True)
"""

    def on_event(event: dict[str, Any]) -> None:
        workers.end_job()
        workers.end_job()  # asked twice, told once: a second signal would stop it before it has saved
        assert workers._process is not None
        assert workers._process.stdin is not None
        workers._process.stdin.write(b"\n")
        workers._process.stdin.flush()

    with stand_in(script, monkeypatch, tmp_path) as workers:
        with pytest.raises(RunInterrupted, match="saved"):
            workers.run({"kind": "run"}, on_event)
        process, workers._process = workers._process, None
        assert process is not None
        process.kill()
        process.communicate()
        workers.end_job()
        with pytest.raises(RunInterrupted):
            workers.run({"kind": "run"}, lambda event: None)
        assert workers._process is None


def test_job_runner_restores_signal_handlers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    script = (
        'import sys\nsys.stdin.readline()\nprint(\'{"done": {}}\\n{"ended": 0}\', flush=True)\nsys.stdin.readline()'
    )
    with stand_in(script, monkeypatch, tmp_path) as workers:
        assert workers.run({}, lambda event: None) == {}
        assert signal.getsignal(signal.SIGTERM) is before
