"""Tasks in sequence: the matrix and its measures by hand, a real sequence stopped and resumed, and its report."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from graftwerk.cli.main import main
from graftwerk.errors import ConfigError, ConflictError, RunInterrupted
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.sequence import sequence as module
from graftwerk.experiments.sequence.plan import read_plan
from graftwerk.experiments.sequence.results import Matrix
from graftwerk.experiments.sequence.sequence import LearntSequence, sequence
from graftwerk.experiments.sequence.table import unmeasured
from graftwerk.tasks.predictions import ClassPredictions, ScorePredictions
from tests.experiments.here import InThisProcess

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def tree(tiny_encoder: Path, glosses: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    def task(classes: list[str]) -> Tree:
        return {"data": {"filter": {"label": classes}, "test": 10}}

    return {
        "model": str(tiny_encoder),
        "data": {
            "train": str(glosses),
            "max_train_rows": 20,
            "validation": None,
            "max_length": 16,
            "max_truncated": 1.0,
        },
        "method": "lora",
        "training": {"max_steps": 5, "learning_rate": 8e-2, "report_to": []},
        "evaluation": {"resamples": 100, "latency_batches": 1},
        "tasks": {
            "moving": task(["noun.act", "noun.animal"]),
            "growing": task(["noun.body", "noun.food", "noun.plant"]),
        },
        "variants": {"replay": {"training": {"retain": {"replay": 0.5}}}, "apart": {"adapters": "each"}},
        "output_dir": str(tmp_path_factory.mktemp("sequences") / "seq"),
    }


class Stopping(InThisProcess):
    """A runner that a signal ends after some runs."""

    left: ClassVar[int] = 3

    def run(self, job: Any, on_event: Any) -> Any:
        if job["kind"] == "run":
            if not Stopping.left:
                raise RunInterrupted(signal.SIGTERM, "stopped by SIGTERM")
            Stopping.left -= 1
        return super().run(job, on_event)


@pytest.fixture(scope="module")
def stopped_and_resumed(tree: Tree) -> tuple[RunInterrupted, list[ProgressEvent], LearntSequence]:
    events: list[ProgressEvent] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "JobRunner", Stopping)
        with pytest.raises(RunInterrupted) as stopped:
            sequence(tree, seeds=0, listener=lambda event: None)
        patch.setattr(module, "JobRunner", InThisProcess)
        return stopped.value, events, sequence(tree, seeds=0, listener=events.append)


def test_sequence_resumes_where_it_stopped(
    stopped_and_resumed: tuple[RunInterrupted, list[ProgressEvent], LearntSequence],
) -> None:
    stopped, events, learnt = stopped_and_resumed
    assert "3 of 4 runs" in str(stopped.recovered)
    assert [event.kind for event in events if event.text.startswith("already finished")] == ["note"] * 3
    assert learnt.result["status"] == "finished"


def test_sequence_matrix_is_that_of_its_runs(
    stopped_and_resumed: tuple[RunInterrupted, list[ProgressEvent], LearntSequence],
) -> None:
    learnt = stopped_and_resumed[2]
    replay, apart = learnt.result["variants"]

    def accuracy(variant: str, run: str, *keys: str) -> float:
        manifest: Any = json.loads((learnt.folder / f"{variant}-seed0" / run / "manifest.json").read_text())
        for key in keys:
            manifest = manifest[key]
        return float(manifest["value"])

    test = ("metrics", "test", "accuracy")
    cells = [[cell and cell["value"] for cell in row] for row in replay["matrix"]]
    first, second = accuracy("replay", "1-moving", *test), accuracy("replay", "2-growing", *test)
    after = accuracy("replay", "2-growing", "retained", "entries", "moving", "after")
    assert cells == [[first, None], [after, second]]
    assert replay["mean"]["value"] == pytest.approx(100 * (after + second) / 2)
    assert replay["backward_transfer"]["value"] == pytest.approx(100 * (after - first))
    assert replay["forgetting"]["value"] == pytest.approx(100 * (first - after))
    assert replay["cost"]["retention_seconds"] > 0
    assert apart["forgetting"]["value"] == 0
    assert apart["matrix"][1][0] == apart["matrix"][0][0]
    assert learnt.result["matrix"] == replay["matrix"]
    assert set(learnt.to_dict()) >= {"matrix", "mean", "backward_transfer", "forgetting"}
    assert "replay:" in learnt.table()


def test_sequence_second_run_starts_from_the_first(
    stopped_and_resumed: tuple[RunInterrupted, list[ProgressEvent], LearntSequence],
) -> None:
    folder = stopped_and_resumed[2].folder
    config = (folder / "replay-seed0" / "2-growing" / "config.yaml").read_text()
    assert f"warm_start: {folder}/replay-seed0/1-moving" in config
    assert "warm_start: null" in (folder / "apart-seed0" / "2-growing" / "config.yaml").read_text()


def test_sequence_report_draws_each_task(
    stopped_and_resumed: tuple[RunInterrupted, list[ProgressEvent], LearntSequence],
) -> None:
    report = stopped_and_resumed[2].report
    assert report is not None
    html = report.read_text()
    assert html.count('class="chart curve wide"') == 2
    assert "Backward transfer" in html
    assert "apart" in html


@pytest.mark.slow
def test_sequence_task_that_is_learnt_anew_is_followed_by_the_later_ones(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JobRunner", InThisProcess)
    own = {**tree, "variants": {"lora": {}}, "output_dir": str(tmp_path / "seq")}
    sequence(own, seeds=0, quiet=True)
    first, second = sorted((tmp_path / "seq" / "lora-seed0").iterdir())
    earlier = (second / "manifest.json").stat().st_mtime_ns
    events: list[ProgressEvent] = []
    sequence(own, seeds=0, listener=events.append)
    assert sum("already finished" in event.text for event in events) == 2
    assert (second / "manifest.json").stat().st_mtime_ns == earlier
    shutil.rmtree(first)
    sequence(own, seeds=0, listener=lambda event: None)
    assert (second / "manifest.json").stat().st_mtime_ns > earlier


def test_sequence_in_the_folder_of_another_raises(
    tree: Tree, stopped_and_resumed: tuple[RunInterrupted, list[ProgressEvent], LearntSequence], monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "JobRunner", InThisProcess)
    other = {**tree, "training": {**tree["training"], "max_steps": 2}}
    with pytest.raises(ConflictError, match="max_steps"):
        sequence(other, seeds=0, quiet=True)


def predictions(right: list[int]) -> ClassPredictions:
    scores = np.zeros((len(right), 2))
    scores[np.arange(len(right)), [1 - hit for hit in right]] = 1.0
    return ClassPredictions(None, scores, np.zeros(len(right), dtype=np.int64))


def test_matrix_measures_equal_those_by_hand() -> None:
    """Three tasks, two seeds: what is forgotten is counted from the best state, not from the first."""
    rng = np.random.default_rng(0)
    shares = {(0, 0): 0.8, (1, 0): 0.9, (2, 0): 0.6, (1, 1): 0.7, (2, 1): 0.5, (2, 2): 0.9}
    cells = {
        ("a", seed, after, task): predictions(
            list(rng.permutation([1] * round(40 * share) + [0] * round(40 * (1 - share))))
        )
        for (after, task), share in shares.items()
        for seed in (0, 1)
    }
    matrix = Matrix(cells, ["accuracy"] * 3, {"a": [0, 1]}, confidence=0.95, resamples=500)
    found = {name: measure.values["a"] for name, measure in matrix.measures().items()}
    assert found["mean"]["value"] == pytest.approx(100 * (0.6 + 0.5 + 0.9) / 3)
    assert found["learning"]["value"] == pytest.approx(100 * (0.8 + 0.7 + 0.9) / 3)
    assert found["backward_transfer"]["value"] == pytest.approx(100 * ((0.6 - 0.8) + (0.5 - 0.7)) / 2)
    assert found["forgetting"]["value"] == pytest.approx(100 * ((0.9 - 0.6) + (0.7 - 0.5)) / 2)
    assert found["forgetting"]["low"] < 25 < found["forgetting"]["high"]
    assert matrix.rows("a")[0][1] is None


def test_matrix_cell_whose_metric_is_undefined_is_empty_with_the_reason() -> None:
    """Numbers that are all alike have no correlation: the variant has no measures, and the other one has them."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=30)

    def numbers(scores: Any) -> ScorePredictions:
        return ScorePredictions(None, scores, truth)

    cells = {
        (variant, seed, after, task): numbers(truth + rng.normal(size=30))
        for variant in ("a", "b")
        for seed in (0, 1)
        for after, task in ((0, 0), (1, 0), (1, 1))
    }
    cells["a", 1, 1, 0] = numbers(np.ones(30))
    matrix = Matrix(cells, ["pearson"] * 2, {"a": [0, 1], "b": [0, 1]}, confidence=0.95, resamples=200)
    empty, whole = matrix.rows("a")[1]
    assert empty is not None
    assert empty["value"] is None
    assert "undefined" in empty["note"]
    assert whole is not None
    assert whole["value"] is not None
    assert list(matrix.measures()["forgetting"].values) == ["b"]
    result = {"tasks": [{"name": "x", "metric": "pearson"}, {"name": "y", "metric": "pearson"}]}
    assert unmeasured({**result, "variants": [{"name": "a", "matrix": matrix.rows("a")}]}) == [
        f"a, x after y: {empty['note']}"
    ]
    alone = Matrix(
        {key: cells[key] for key in cells if key[0] == "a"},
        ["pearson"] * 2,
        {"a": [0, 1]},
        confidence=0.95,
        resamples=200,
    )
    assert alone.measures() == {}


@pytest.mark.slow
def test_matrix_interval_covers_the_truth_over_rows_and_seeds() -> None:
    """Of 60 simulated sequences, the 90 % interval of the mean misses few: it is over rows, not over cells."""
    rng, missed = np.random.default_rng(1), 0
    for _ in range(60):
        cells: Any = {}
        for seed in (0, 1, 2):
            for after, task, share in ((0, 0, 0.7), (1, 0, 0.6), (1, 1, 0.8)):
                cells["a", seed, after, task] = predictions(list((rng.random(60) < share).astype(int)))
        matrix = Matrix(cells, ["accuracy"] * 2, {"a": [0, 1, 2]}, confidence=0.9, resamples=200)
        figure = matrix.measures()["mean"].values["a"]
        assert figure["low"] is not None
        assert figure["high"] is not None
        missed += not figure["low"] <= 70 <= figure["high"]
    assert missed <= 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"one": {}}}, "two tasks or more"),
        ({"tasks": {"a/b": {}, "c": {}}}, "cannot be"),
        ({"variants": {"x": {"adapters": "some"}}}, "adapters: some"),
        ({"training": {"warm_start": "run"}}, "set by the sequence"),
        ({"variants": {"x": {"training": {"new_head": True}}}}, "set by the sequence"),
        ({"variants": {"lora": "lora"}}, "settings by name"),
        ({"variants": {"x": {"training": 3}}}, "settings by name"),
        ({"variants": ["lora"]}, "variants have names"),
        ({"evaluation": "general"}, "settings by name"),
    ],
)
def test_invalid_sequence_raises(tree: Tree, changes: Tree, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_plan({**tree, **changes}, {})


def test_overrides_are_those_of_all_tasks_and_variants_and_a_bound_waits_for_what_it_bounds(tree: Tree) -> None:
    changes = {
        "variants": {"short": {"training": {"max_steps": 2}}, "long": {"training": {"max_steps": 9}}},
        "evaluation": {**tree.get("evaluation", {}), "max_forgetting": "2 points"},
    }
    plan = read_plan({**tree, **changes}, {"max_steps": 3})
    runs = [plan.config_of(variant, 0, place) for variant in plan.variants for place in (0, 1)]
    assert [run.training.max_steps for run in runs] == [3] * 4
    assert [run.evaluation.max_forgetting is None for run in runs] == [True, False] * 2


def test_unknown_variant_raises(tree: Tree) -> None:
    with pytest.raises(ConfigError, match="replay"):
        read_plan(tree, {}, ["reply"])


@pytest.mark.slow
def test_sequence_dry_run_trains_nothing(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sequence.yaml"
    file.write_text(json.dumps({**tree, "output_dir": str(tmp_path / "out")}))
    assert main(["sequence", str(file), "seeds=0,1", "variants=replay", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["variants"], list(found["tasks"])) == (["replay"], ["moving", "growing"])
    assert not (tmp_path / "out").exists()
