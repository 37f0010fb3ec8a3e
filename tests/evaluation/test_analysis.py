"""What the predictions of a split say together: against scikit-learn, by hand, and at the limits of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from graftwerk.evaluation.analysis import MOST_PAIRS, MOST_WORST, analysis_of, calibration, write_analysis
from graftwerk.evaluation.row_results import judge, records_of
from graftwerk.tasks.base import Example, Predictions, Task
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.instruction import Instruction
from graftwerk.tasks.multilabel import Multilabel
from graftwerk.tasks.predictions import ClassPredictions, LabelPredictions, ScorePredictions, TextPredictions
from graftwerk.tasks.regression import Regression

N = 300


def classes(number: int) -> ClassPredictions:
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.full(number, 0.5), size=N)
    return ClassPredictions(0.5, scores, rng.integers(0, number, size=N))


def analysed(task: Task, predictions: Predictions, names: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [{"text": f"text {at}"} for at in range(predictions.rows)]
    examples = [Example({"input_ids": [1]}, None, row=row) for row in rows]
    judged, records = records_of(task, predictions, examples, rows, names, lambda at: f"rows.csv:{at + 2}")
    return analysis_of(predictions, names, judged, records), records


def test_analysis_of_classes_equals_scikit_learn() -> None:
    predictions = classes(4)
    assert predictions.targets is not None
    names = ["a", "b", "c", "d"]
    found, records = analysed(Classification(), predictions, names)
    chosen = predictions.scores.argmax(axis=1)
    assert found["confusion"] == {"labels": names, "counts": confusion_matrix(predictions.targets, chosen).tolist()}
    assert found["wrong"] == int((chosen != predictions.targets).sum())
    expected = precision_recall_fscore_support(predictions.targets, chosen)
    by_label = {each["label"]: each for each in found["by_label"]}
    for at, name in enumerate(names):
        given = [by_label[name][part] for part in ("precision", "recall", "f1", "rows")]
        assert given == pytest.approx([values[at] for values in expected])
    assert [each["rows"] for each in found["by_label"]] == sorted((e["rows"] for e in found["by_label"]), reverse=True)
    assert records[7]["row"] == 8
    assert records[7]["where"] == "rows.csv:9"
    assert records[7]["text"] == "text 7"
    assert records[7]["true"] == names[predictions.targets[7]]
    assert records[7]["confidence"] == predictions.scores[7].max()
    assert records[7]["error"] == pytest.approx(-np.log(predictions.scores[7, predictions.targets[7]]))
    assert records[7]["scores"] == dict(zip(names, predictions.scores[7].tolist(), strict=True))


def test_analysis_worst_rows_are_wrong_ones_by_error_and_cut() -> None:
    predictions = classes(3)
    rows = [{"text": "long " * 200} for _ in range(N)]
    examples = [Example({"input_ids": [1]}, None, row=row) for row in rows]
    judged, records = records_of(Classification(), predictions, examples, rows, [])
    worst = analysis_of(predictions, [], judged, records)["worst"]
    assert len(worst) == MOST_WORST
    assert all(row["wrong"] for row in worst)
    errors = sorted((record["error"] for record in records if record["wrong"]), reverse=True)
    assert [row["error"] for row in worst] == errors[:MOST_WORST]
    assert all(len(row["text"]) < 310 and row["text"].endswith("…") for row in worst)
    unsure = ClassPredictions(0.5, np.array([[0.34, 0.33, 0.33], [0.45, 0.55, 0.0]]), np.array([0, 0]))
    assert [row["row"] for row in analysed(Classification(), unsure, [])[0]["worst"]] == [2]  # though its error is less


def test_analysis_many_classes_lists_the_most_frequent_confusions() -> None:
    predictions = classes(40)
    assert predictions.targets is not None
    found, _ = analysed(Classification(), predictions, [])
    assert "confusion" not in found
    cells = confusion_matrix(predictions.targets, predictions.scores.argmax(axis=1), labels=range(40))
    np.fill_diagonal(cells, 0)
    assert found["confused_pairs"] == int((cells > 0).sum())
    counts = [pair["rows"] for pair in found["confusions"]]
    assert counts == sorted(cells.ravel().tolist(), reverse=True)[:MOST_PAIRS]
    assert all(cells[int(pair["true"]), int(pair["predicted"])] == pair["rows"] for pair in found["confusions"])


def test_analysis_of_labels_has_thresholds_and_the_surest_mistake() -> None:
    scores = np.array([[0.9, 0.2], [0.6, 0.9], [0.1, 0.3]])
    predictions = LabelPredictions(0.5, scores, np.array([[1, 0], [0, 1], [0, 1]]), np.array([0.5, 0.4]))
    found, records = analysed(Multilabel(), predictions, ["x", "y"])
    assert found["wrong"] == 2
    assert [record["confidence"] for record in records] == [None, 0.6, 0.7]
    assert records[1]["predicted"] == ["x", "y"]
    assert {
        each["label"]: (each["right"], each["predicted"], each["rows"], each["threshold"]) for each in found["by_label"]
    } == {
        "x": (1, 2, 1, 0.5),
        "y": (1, 1, 2, 0.4),
    }
    assert found["calibration"]["answers"] == 6


def test_analysis_of_numbers_has_residuals() -> None:
    targets = np.arange(10.0)
    found, records = analysed(Regression(), ScorePredictions(0.1, targets + 1, targets), [])
    assert found["residuals"]["mean"] == pytest.approx(1.0)
    assert found["residuals"]["points"][3] == [3.0, 1.0]
    assert records[3]["residual"] == records[3]["error"] == 1.0
    assert "wrong" not in found
    assert "wrong" not in records[0]


def test_records_of_written_answers_and_of_likelihoods() -> None:
    turns = [{"turns": [["user", f"say {at}"], ["assistant", str(at)]]} for at in range(2)]
    examples = [Example({"input_ids": [1]}, [1], row=row) for row in turns]
    nll, tokens = np.array([2.0, 9.0]), np.array([2, 3])
    written = TextPredictions(0.5, nll, tokens, texts=("0", " 7"), references=("0", "1"), sources=("say 0", "say 1"))
    judged, records = records_of(Instruction(), written, examples, turns, ())
    assert judged.error_name == "nats a token"
    assert [record["wrong"] for record in records] == [False, True]
    assert [record["error"] for record in records] == [1.0, 3.0]
    assert (records[1]["source"], records[1]["true"], records[1]["predicted"]) == ("say 1", "1", " 7")
    blocks = [Example({"input_ids": [1]}, [1], row={"text": f"block {at}"}) for at in range(2)]
    _, records = records_of(Causal(), TextPredictions(0.5, nll, tokens), blocks, [{"text": "one row"}], (), str)
    assert [record["source"] for record in records] == ["block 0", "block 1"]
    assert not {"where", "wrong", "true"} & set(records[0])


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 1.0])
    right = np.array([True, True, True, False, True, False, True])
    found = calibration(confidence, right)
    # five answers near .96, four of them right; two at .55, one of them right
    assert found["expected_calibration_error"] == pytest.approx(5 / 7 * abs(4.8 / 5 - 4 / 5) + 2 / 7 * 0.05)
    assert [each["rows"] for each in found["bins"]] == [2, 5]
    assert found["bins"][1]["low"] == pytest.approx(0.376, abs=5e-4)  # Wilson's interval of 4 in 5
    assert found["bins"][1]["high"] == pytest.approx(0.964, abs=5e-4)


def test_write_analysis_seals_and_redacts(tmp_path: Path) -> None:
    predictions = classes(2)
    judged = judge(Classification(), predictions, [], [])
    records = [{"row": 1, "text": "hf_abcdefghijklmnopqrstuvwxyz0123"}] * predictions.rows
    write_analysis(tmp_path, {"test": analysis_of(predictions, [], judged, records)})
    text = (tmp_path / "predictions" / "analysis.json").read_text()
    assert "hf_abc" not in text
    assert json.loads(text)["digest"].startswith("sha256:")
