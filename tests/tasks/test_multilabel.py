"""Several labels a row: read from lists and texts, trained as transformers does it, given from chosen thresholds on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from graftwerk.config import RunConfig
from graftwerk.data.fields import labels_part
from graftwerk.data.settings import DataSettings
from graftwerk.errors import AdapterError, ConfigError, DataError
from graftwerk.models.load import load_model, load_tokenizer
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.multilabel import Multilabel, best_threshold
from graftwerk.tasks.predictions import LabelPredictions
from graftwerk.tasks.registry import parse_task
from graftwerk.training.head_start import output_layer, start_head
from graftwerk.training.setup import load_base_and_attach, prepare

TASK = Multilabel()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        (["b", "a", "b"], ["b", "a"]), ("b, a,", ["b", "a"]), ('["b, c", 1]', ["b, c", "1"]), ("", []), ([], []),
        ("one", ["one"]),
    ],
)  # fmt: skip
def test_labels_part_reads_lists_and_separated_texts(cell: Any, labels: list[str]) -> None:
    assert labels_part(cell) == labels
    assert labels_part("a|b, c", "|") == ["a", "b, c"]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (None, "is missing"), ("[broken", "begins like a JSON list"), (3, "not a list"),
        ([["a"]], "holds a label that is a"),
    ],
)  # fmt: skip
def test_labels_part_other_values_raise(cell: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        labels_part(cell)


def test_read_counts_labels_and_tells_what_cannot_be_learnt(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "labels": ["all", *(["rare"] if at == 3 else [])]} for at in range(20)]
    source = write(tmp_path / "a.jsonl", rows)
    splits = TASK.read(DataSettings(train=source, validation=None))
    assert splits.labels == ("all", "rare")
    assert {issue.code for issue in splits.issues} >= {"rare-labels", "constant-labels"}
    with pytest.raises(AdapterError, match="labels that the adapter was not trained for: rare"):
        TASK.read(DataSettings(train=source, validation=None), labels=("all",))
    other = write(tmp_path / "b.jsonl", [{"text": "other", "labels": ["else"]}])
    with pytest.raises(DataError, match="the test rows have labels that no training row has: else"):
        TASK.read(DataSettings(train=source, validation=None, test=other))
    none = write(tmp_path / "c.jsonl", [{"text": "other", "labels": []}, {"text": "one", "labels": ""}])
    with pytest.raises(DataError, match=r"no training row of .* has a label"):
        TASK.read(DataSettings(train=none, validation=None))


def test_classification_offered_lists_names_multilabel(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}", "label": ["a", "b"]} for at in range(20)]
    with pytest.raises(DataError, match=r"is a list, not a class \(several labels for a row: task=multilabel\)"):
        Classification().read(DataSettings(train=write(tmp_path / "a.jsonl", rows)))
    rows = [{"text": f"text {at}", "label": json.dumps(["a", "b"][: at % 3])} for at in range(20)]
    splits = Classification().read(DataSettings(train=write(tmp_path / "b.jsonl", rows)))
    (found,) = [issue for issue in splits.issues if issue.code == "many-classes"]
    assert found.grave
    assert "task=multilabel" in str(found.hint)


def test_loss_equals_transformers_own(tiny_encoder: Path, gloss_texts: list[str], tmp_path: Path) -> None:
    rows = [{"text": text, "labels": list("abc"[: at % 4])} for at, text in enumerate(gloss_texts[:12])]
    splits = TASK.read(DataSettings(train=write(tmp_path / "a.jsonl", rows), validation=None))
    tokenizer = load_tokenizer(str(tiny_encoder))
    model = load_model(str(tiny_encoder), TASK, splits)
    batch = TASK.collator.collate(TASK.encode(splits.train, tokenizer, splits, 48), tokenizer)
    assert batch["labels"].tolist() == [[float(name in row["labels"]) for name in "abc"] for row in splits.train]
    theirs = model(**batch)
    torch.testing.assert_close(TASK.objective.loss(theirs, batch), theirs.loss)


@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_has_the_highest_f1_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, 60)
    scores = (rng.random(60) * 0.7 + 0.3 * targets).round(1)
    chosen = f1_score(targets, scores >= best_threshold(scores, targets))
    assert chosen == max(f1_score(targets, scores >= each) for each in np.linspace(0, 1, 101))
    assert best_threshold(scores, np.zeros(60, dtype=int)) == 0.5


def test_tuned_thresholds_are_of_all_labels_or_of_each_and_given_ones_stay() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((80, 3)) < [0.5, 0.3, 0.02]).astype(int)
    scores = (0.4 * targets + 0.6 * rng.random((80, 3))) * [1.0, 0.2, 1.0]
    predictions = LabelPredictions(None, scores, targets, np.full(3, 0.5))
    shared, seen = TASK.tuned(predictions)
    assert len(set(shared.thresholds or ())) == 1
    assert isinstance(seen, LabelPredictions)
    assert seen.thresholds.tolist() == list(shared.thresholds or ())
    each, _ = Multilabel(threshold="label").tuned(predictions)
    assert each.thresholds is not None
    assert shared.thresholds is not None
    assert each.thresholds[1] < each.thresholds[0]
    assert each.thresholds[2] == shared.thresholds[2], "too few rows for one of its own"
    given, same = Multilabel(threshold=0.3).tuned(predictions)
    assert given.thresholds is None
    assert same is predictions
    assert given.decoder.thresholds == (0.3,)  # type: ignore[attr-defined]
    assert parse_task(each.to_dict()) == each


def test_head_starts_at_the_log_odds_of_the_labels(tiny_encoder: Path, gloss_texts: list[str], tmp_path: Path) -> None:
    rows = [{"text": text, "labels": list("ab"[: 1 + (at % 4 == 0)])} for at, text in enumerate(gloss_texts[:40])]
    rows[0]["labels"] = []
    config = RunConfig.build(
        {
            "model": str(tiny_encoder), "task": "multilabel", "method": {"name": "lora", "r": 2},
            "data": {"train": write(tmp_path / "a.jsonl", rows), "validation": None, "max_length": 48,
                     "max_truncated": 1.0},
        }
    )  # fmt: skip
    prepared = prepare(config, lambda event: None)
    adapter, _ = load_base_and_attach(config, prepared, torch.float32)
    layer = output_layer(adapter, 2)
    assert layer is not None
    assert layer.bias is not None
    start_head(adapter, prepared, warm=True)
    assert layer.bias.tolist() == [0.0, 0.0]
    start_head(adapter, prepared, warm=False)
    shares = [np.mean([name in row["labels"] for row in rows]) for name in "ab"]
    assert layer.bias.detach().sigmoid().tolist() == pytest.approx(shares, abs=0.02)


def test_parse_task_other_names_lead_to_the_task() -> None:
    for name, known in (("multi-label", "multilabel"), ("ratings", "regression"), ("sentiment", "classification")):
        with pytest.raises(ConfigError, match=f"no task `{name}`") as caught:
            parse_task(name)
        assert f"did you mean `{known}`?" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("task", "columns", "other"),
    [
        ("classification", {"text": "a", "score": 1}, "regression"),
        ("classification", {"text": "a", "labels": ["b"]}, "multilabel"),
        ("classification", {"tokens": ["a"], "tags": ["O"]}, "token-classification"),
        ("multilabel", {"text": "a", "label": "b"}, "classification"),
        ("regression", {"anchor": "a", "positive": "b"}, "similarity"),
        ("similarity", {"text": "a", "label": "b"}, "classification"),
    ],
)
def test_columns_of_another_task_lead_to_it(tmp_path: Path, task: str, columns: dict[str, Any], other: str) -> None:
    with pytest.raises(ConfigError, match="has no column") as caught:
        parse_task(task).read(DataSettings(train=write(tmp_path / "rows.jsonl", [columns])))
    assert f"another task: task={other}." in str(caught.value.hint)


def test_columns_of_the_same_task_under_a_wrong_name_are_no_other_task(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(ConfigError) as caught:
        Classification().read(DataSettings(train=source, columns={"label": "labl"}))
    assert "another task" not in str(caught.value.hint)
    assert "did you mean `label`?" in str(caught.value.hint)
