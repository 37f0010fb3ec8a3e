"""What must not be forgotten: measured before and after on the same rows, bounded, refused where too much is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.errors import AdapterError, ConfigError, ForgettingError
from graftwerk.evaluation.evaluate import evaluate
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.evaluation.results_io import ROWS, load_predictions
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.exports.merge import merge
from graftwerk.exports.push import push
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.predictions import ClassPredictions
from graftwerk.training.events import Event
from graftwerk.training.retained import RetainedMeter, compared, points_lost, summary
from graftwerk.training.train import train

Tree = dict[str, Any]
ANIMALS, PLANTS = ["noun.act", "noun.animal"], ["noun.plant", "noun.food", "noun.body"]


def quiet(event: Event) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def tree(tiny_encoder: Path, glosses: Path) -> Callable[..., Tree]:
    """A run of 4 steps on some classes; the task of earlier runs has two, that of later ones three."""

    def build(output_dir: Path, classes: list[str], method: Any = "lora", **evaluation: Any) -> Tree:
        return {
            "model": str(tiny_encoder),
            "data": {
                "train": str(glosses),
                "filter": {"label": classes},
                "max_train_rows": 20,
                "validation": None,
                "test": 10,
                "max_length": 16,
                "max_truncated": 1.0,
            },
            "method": method,
            "training": {"max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 5e-3, "report_to": []},
            "evaluation": {"resamples": 100, "latency_batches": 1, **evaluation},
            "output_dir": str(output_dir),
        }

    return build


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tree: Callable[..., Tree]) -> Path:
    return train(tree(tmp_path_factory.mktemp("earlier") / "run", ANIMALS), listener=quiet).folder


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory, tree: Callable[..., Tree], earlier: Path) -> Any:
    """Trained from the earlier run's weights on other classes, with the earlier run's rows retained."""
    given = tree(tmp_path_factory.mktemp("later") / "run", PLANTS, retained={"animals": {"run": str(earlier)}})
    given["training"] |= {"warm_start": str(earlier), "new_head": True, "learning_rate": 5e-2}
    return train(given, listener=quiet)


def test_retained_before_equals_the_earlier_runs_own_metrics(later: Any, earlier: Path) -> None:
    entry = later.manifest["retained"]["entries"]["animals"]
    assert (entry["metric"], entry["rows"], entry["split"]) == ("accuracy", 10, "test")
    own = json.loads((earlier / "manifest.json").read_text())["metrics"]["test"]["accuracy"]
    assert entry["before"] == own


def test_retained_after_equals_the_earlier_head_on_the_later_weights(later: Any, earlier: Path) -> None:
    """The oracle: the earlier adapter, loaded whole, with the later run's weights but its own head."""
    opened = load_adapter_for(earlier)
    (adapter,) = opened.model.__dict__["_graftwerk_record"].adapters.values()
    weights = load_adapter_for(later).model.__dict__["_graftwerk_record"].adapters
    (other,) = weights.values()
    own = adapter.state_dict()
    adapter.load_state_dict(
        {key: own[key] if adapter.is_head(key) else value for key, value in other.state_dict().items()}
    )
    from graftwerk.evaluation.held_out import held_out
    from graftwerk.evaluation.inference import run_model

    _, rows = held_out(opened)
    expected: Any = run_model(opened.model, opened.task, opened.encode(rows), opened.tokenizer)
    stored = later.manifest["retained"]["entries"]["animals"]["stored"]
    found: Any = load_predictions(later.folder / ROWS, stored, stored["name"])
    assert np.allclose(found.scores, expected.scores, atol=1e-6)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)


def test_retained_measurement_changes_nothing_that_is_trained(
    tmp_path: Path, tree: Callable[..., Tree], later: Any, earlier: Path
) -> None:
    given = tree(tmp_path / "run", PLANTS)
    given["training"] |= {"warm_start": str(earlier), "new_head": True, "learning_rate": 5e-2}
    plain = train(given, listener=quiet)
    assert plain.manifest["metrics"] == later.manifest["metrics"]
    tensors = [run.adapter / "adapter_model.safetensors" for run in (plain, later)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    assert "retained" not in plain.manifest


def test_new_head_takes_the_method_and_no_head(later: Any, earlier: Path) -> None:
    assert later.manifest["labels"] == sorted(PLANTS)
    assert evaluate(later, quiet=True)["rows"] == 10


@pytest.mark.parametrize(
    "method",
    ["full", pytest.param("prefix", marks=pytest.mark.slow), pytest.param("bottleneck", marks=pytest.mark.slow)],
)
def test_retained_rows_are_answered_under_every_kind_of_method(
    tmp_path: Path, tree: Callable[..., Tree], method: str
) -> None:
    first = train(tree(tmp_path / "first", ANIMALS, method), listener=quiet)
    given = tree(tmp_path / "second", PLANTS, method, retained={"animals": {"run": str(first.folder)}})
    given["training"] |= {"warm_start": str(first.folder), "new_head": True}
    entry = train(given, listener=quiet).manifest["retained"]["entries"]["animals"]
    assert entry["before"] == first.manifest["metrics"]["test"]["accuracy"]


def test_general_sample_perplexity_rises_and_the_limit_refuses(
    tmp_path: Path, tiny_decoder: Path, glosses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over-trained on one word: the run is finished, ends with exit code 9, and is not handed over."""
    from graftwerk.cli.main import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"word word word {n}"}) + "\n" for n in range(20)))
    given: Tree = {
        "model": str(tiny_decoder),
        "task": "causal",
        "data": {"train": str(rows), "validation": None, "test": 4, "max_length": 16},
        "method": "full",
        "training": {"max_steps": 12, "learning_rate": 0.05, "per_device_train_batch_size": 4, "report_to": []},
        "evaluation": {"resamples": 100, "retained": "general", "max_forgetting": 2},
        "output_dir": str(tmp_path / "run"),
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(given))
    assert main(["train", str(file), "--json"]) == 9
    said = capsys.readouterr()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    retained = manifest["retained"]
    assert manifest["status"] == "finished"
    assert (retained["limit"], retained["exceeded"]) == ("2 points", ["general"])
    entry = retained["entries"]["general"]
    assert entry["rows"] > 200
    assert entry["after"]["value"] > 1.02 * entry["before"]["value"]
    assert entry["forgetting"]["low"] < entry["forgetting"]["value"] < entry["forgetting"]["high"]
    assert json.loads(said.out.splitlines()[-1])["error"] == "forgetting"
    assert "adapter" in json.loads(said.out.splitlines()[-1])["recovered"]
    with pytest.raises(ForgettingError, match="general"):
        train(given, resume=True, listener=quiet)
    for hand_over in (
        lambda **more: merge(tmp_path / "run", tmp_path / "merged", rows=1, **more),
        lambda **more: push(tmp_path / "run" / "adapter", "me/run", dry_run=True, **more),
    ):
        with pytest.raises(ForgettingError, match="allow"):
            hand_over()
        assert hand_over(allow_forgetting=True)
    assert "forgotten" in (tmp_path / "run" / "report.html").read_text().casefold()
    assert "## Retained" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_answers_of_an_earlier_run_are_written_as_they_were_there() -> None:
    """By its own settings of generation; how many rows are written together is this run's business."""
    asked: list[Any] = []

    class Asked:
        def __call__(self, examples: Any, settings: EvaluationSettings | None) -> None:
            asked.append(settings)

    own = EvaluationSettings(max_new_tokens=7, generation_batch_size=4)
    meter = RetainedMeter([], None, Asked(), own, "")  # type: ignore[arg-type]
    for evaluation in (EvaluationSettings(num_beams=3), None, EvaluationSettings(generate=False)):
        entry = SimpleNamespace(name="a", task=SimpleNamespace(generates=True), examples=[], evaluation=evaluation)
        meter.measure(entry)  # type: ignore[arg-type]
    assert asked == [EvaluationSettings(num_beams=3, generation_batch_size=4), own, None]


def test_origin_of_what_is_retained_shows_no_secret() -> None:
    task, secret = Classification(), "hf_abcdefghijKLMNOPQRST0123456789"
    found = ClassPredictions(None, np.eye(2), np.arange(2))
    for origin in (f"https://me:{secret}@host/rows.csv", f"rows/token={secret}/rows.csv"):
        entry = SimpleNamespace(task=task, origin=origin, split="test", splits=SimpleNamespace(labels=("a", "b")))
        told = compared(entry, found, found, EvaluationSettings(resamples=100))  # type: ignore[arg-type]
        assert secret not in json.dumps(told)
        assert told["origin"].endswith("rows.csv")


def test_points_lost_counts_points_and_percent() -> None:
    assert points_lost("bleu", -3.0, 30.0) == pytest.approx((3.0, 10.0))
    assert points_lost("rmse", 0.5, 2.0) == pytest.approx((25.0, 25.0))
    assert points_lost("accuracy", 0.01, 0.5) == pytest.approx((-1.0, -2.0))


@pytest.mark.parametrize(("limit", "exceeded"), [("2 points", ["a"]), ("4 points", []), ("10 %", []), ("5 %", ["a"])])
def test_summary_names_the_entries_above_the_limit(limit: str, exceeded: list[str]) -> None:
    lost = {"value": 3.0, "low": 1.0, "high": 5.0}
    entries = {"a": {"forgetting": lost, "percent": 6.0}, "b": {"forgetting": {**lost, "value": 1.0}, "percent": 2.0}}
    found = summary(entries, limit, 0.0)
    assert (found["exceeded"], found["forgetting"]["name"]) == (exceeded, "a")


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"retained": {"x": {}}}, "give `run`"),
        ({"retained": {"x": {"run": "a", "texts": "b"}}}, "give `run`"),
        ({"retained": {"x": {"texts": "general", "columns": {"text": "t"}}}}, "columns"),
        ({"max_forgetting": 2}, "give `retained: general`"),
        ({"retained": "general", "max_forgetting": "much"}, "an amount"),
    ],
)
def test_invalid_retained_raises(tree: Callable[..., Tree], evaluation: Tree, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig.build(tree(Path("run"), ANIMALS, **evaluation))


def test_retained_of_another_kind_of_model_raises(tmp_path: Path, tree: Callable[..., Tree], earlier: Path) -> None:
    rows = str(tmp_path / "rows.jsonl")
    for entry, said in (
        ({"texts": "general"}, "no likelihood"),
        ({"data": rows}, "no head"),
        ({"run": str(earlier / "adapter"), "data": None}, None),
    ):
        given = tree(tmp_path / "run", PLANTS, retained={"x": entry})
        if said is None:
            continue
        with pytest.raises(ConfigError, match=said):
            train(given, listener=quiet)


def test_retained_adapter_folder_alone_needs_rows(tmp_path: Path, tree: Callable[..., Tree], earlier: Path) -> None:
    alone = tmp_path / "adapter"
    shutil.copytree(earlier / "adapter", alone)
    with pytest.raises(ConfigError, match="no rows of its own"):
        train(tree(tmp_path / "run", PLANTS, retained={"x": {"run": str(alone)}}), listener=quiet)


def test_lent_heads_that_do_not_fit_raise_and_leave_the_model(tiny_encoder: Path) -> None:
    from transformers import BertForSequenceClassification

    from graftwerk.modeling.task_heads import stored_heads

    model = BertForSequenceClassification.from_pretrained(tiny_encoder)
    with pytest.raises(AdapterError, match="another width"):
        stored_heads(model, ["classifier"], {"classifier.weight": torch.zeros(3, 5, device="cpu")}, 2)
    with pytest.raises(AdapterError, match="no head that fits"):
        stored_heads(model, ["classifier"], {}, 2)
