"""Regression: numbers read, learnt standardised, answered in the units of the rows by whoever runs the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graftwerk.config import RunConfig
from graftwerk.data.fields import number_part
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, DataError
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.models.load import load_model, load_tokenizer
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.regression import Regression, scale_of
from graftwerk.training.train import Run, train

TASK = Regression()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def rated(tmp_path: Path, gloss_texts: list[str]) -> str:
    """Glosses with their length, far from 0."""
    return write(tmp_path / "rated.jsonl", [{"text": text, "score": 1e5 + 9 * len(text)} for text in gloss_texts])


def config_of(model: Path, data: str, folder: Path, **settings: Any) -> RunConfig:
    training = {"max_steps": 20, "learning_rate": 0.01, "save_steps": 10, **settings}
    return RunConfig.build(
        {
            "model": str(model), "task": "regression", "method": {"name": "lora", "r": 2}, "training": training,
            "data": {"train": data, "validation": 30, "test": 30, "max_length": 48, "max_truncated": 1.0},
            "output_dir": str(folder),
        }
    )  # fmt: skip


def of(run: Run, metric: str) -> float:
    value: float = run.manifest["metrics"]["test"][metric]["value"]
    return value


@pytest.mark.parametrize(("cell", "number"), [(3, 3.0), (-0.5, -0.5), (" 2.50 ", 2.5), ("1e3", 1000.0)])
def test_number_part_reads_numbers_also_from_text(cell: Any, number: float) -> None:
    assert number_part(cell) == number


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (None, "is missing"), (math.nan, "is missing"), ("nan", "is missing"), (" ", "is empty"),
        (True, "not a number"),
        ("3,5", "write it with a point"), ("good", "'good', not a number"), (math.inf, "is infinite"), ([1], "a list"),
    ],
)  # fmt: skip
def test_number_part_other_values_raise(cell: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        number_part(cell)


def test_read_scores_all_alike_raises_and_two_are_told(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "score": 1.0} for at in range(20)]
    with pytest.raises(DataError, match=r"have the score 1.0; there is nothing to learn"):
        TASK.read(DataSettings(train=write(tmp_path / "a.jsonl", rows)))
    for at, row in enumerate(rows):
        row["score"] = float(at % 2)
    splits = TASK.read(DataSettings(train=write(tmp_path / "b.jsonl", rows)))
    assert [issue.code for issue in splits.issues if issue.code == "few-scores"] == ["few-scores"]


def test_classification_offered_scores_names_regression(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "label": at / 8} for at in range(40)]
    source = write(tmp_path / "a.jsonl", rows)
    splits = Classification().read(DataSettings(train=source, validation=None))
    (found,) = [issue for issue in splits.issues if issue.code == "many-classes"]
    assert found.grave
    assert "this looks like regression: task=regression" in str(found.hint)
    with pytest.raises(DataError) as caught:  # held-out rows have scores that no training row has
        Classification().read(DataSettings(train=source, validation=5))
    assert "this looks like regression: task=regression" in str(caught.value.hint)
    numbered = [{"text": f"text {at}", "label": at % 12} for at in range(40)]
    splits = Classification().read(DataSettings(train=write(tmp_path / "b.jsonl", numbered), validation=None))
    assert "many-classes" not in {issue.code for issue in splits.issues}


@pytest.mark.parametrize("scale", [(0.0, 1.0), (3.0, 2.0)])
def test_loss_equals_transformers_own_of_standardised_numbers(
    tiny_encoder: Path, rated: str, scale: tuple[float, float]
) -> None:
    splits = TASK.read(DataSettings(train=rated, max_train_rows=12, validation=None))
    tokenizer = load_tokenizer(str(tiny_encoder))
    model = load_model(str(tiny_encoder), TASK, splits)
    rows = [{**row, "score": row["score"] / 1e5} for row in splits.train]
    task = TASK.scaled(*scale)
    batch = task.collator.collate(task.encode(rows, tokenizer, splits, 48), tokenizer)
    loss = task.objective.loss(task.objective.forward(model, batch), batch)
    assert model.config.problem_type == "regression"
    theirs = model(**{**batch, "labels": ((batch["labels"] - scale[0]) / scale[1]).float()})
    torch.testing.assert_close(loss, theirs.loss)
    raw = task.objective.per_row_outputs(theirs, batch)[:, 0]
    torch.testing.assert_close(raw, theirs.logits[:, 0].double() * scale[1] + scale[0])
    assert loss.item() == pytest.approx(F.mse_loss(raw, batch["labels"]).item() / scale[1] ** 2, rel=1e-5)


def test_scale_of_without_a_centre_is_the_root_mean_square() -> None:
    assert scale_of([1.0, 3.0], centred=True) == (2.0, 1.0)
    assert scale_of([1.0, 7.0], centred=False) == (0.0, 5.0)


@pytest.mark.parametrize("method", ["full", "ia3"])
def test_train_numbers_far_from_zero_learns_them(tiny_encoder: Path, rated: str, tmp_path: Path, method: str) -> None:
    settings = config_of(tiny_encoder, rated, tmp_path / "run", learning_rate=1e-3).model_dump(mode="json")
    run = train(RunConfig.build({**settings, "method": method}))
    scores = [json.loads(line)["score"] for line in Path(rated).read_text(encoding="utf-8").splitlines()]
    constant = torch.tensor(scores).std().item()
    assert of(run, "rmse") < 1.1 * constant  # and not 1e5 away
    result = evaluate(run)
    assert result["metrics"] == run.manifest["metrics"]["test"]
    assert result["compute"]["type"] == "float32"


def test_train_decoder_without_a_bias_learns_numbers_from_their_root_mean_square(
    tiny_decoder: Path, gloss_texts: list[str], tmp_path: Path
) -> None:
    rows = [{"text": text, "score": 5.0 + len(text) / 100} for text in gloss_texts]
    run = train(config_of(tiny_decoder, write(tmp_path / "rows.jsonl", rows), tmp_path / "run"))
    assert evaluate(run)["metrics"] == run.manifest["metrics"]["test"]
    assert of(run, "rmse") < 2.0
    assert abs(predict(run, ["a text"])["predictions"][0]["score"] - 5.5) < 3


def test_warm_start_of_a_finished_run_begins_with_its_answers(tiny_encoder: Path, rated: str, tmp_path: Path) -> None:
    first = train(config_of(tiny_encoder, rated, tmp_path / "first"))
    tiny = {"max_steps": 1, "learning_rate": 1e-12, "head_learning_rate": 1e-12}
    settings = {**tiny, "warm_start": str(first.folder)}
    second = train(config_of(tiny_encoder, rated, tmp_path / "second", **settings))
    assert of(second, "rmse") == pytest.approx(of(first, "rmse"), rel=1e-4)
    with pytest.raises(ConfigError, match="a checkpoint of a regression holds standardised numbers"):
        train(
            config_of(
                tiny_encoder, rated, tmp_path / "third", **tiny,
                warm_start=str(next(Path(first.folder, "checkpoints").glob("step-*"))),
            )
        )  # fmt: skip


def test_label_smoothing_of_numbers_raises(tiny_encoder: Path, rated: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`label_smoothing` has no meaning for regression"):
        train(config_of(tiny_encoder, rated, tmp_path / "run", label_smoothing=0.1))
