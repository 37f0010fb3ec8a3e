"""`graftwerk errors`: rows of a run's own files, filtered and sorted; every way in which there is nothing to show."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwerk.evaluation.analysis import analysis_of, write_analysis
from graftwerk.evaluation.row_results import records_of, write_records
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import checksum
from graftwerk.tasks.base import Example, Predictions, Task
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.predictions import ClassPredictions, ScorePredictions
from graftwerk.tasks.regression import Regression
from graftwerk.tasks.tag_predictions import TagPredictions
from graftwerk.tasks.token_classification import TokenClassification
from tests.cli.commands import Run

SECOND = [0.1, 0.9, 0.8, 0.3, 0.6, 0.95]
"""Probability of `pos` of each row; the first three rows are `neg`."""


def write_run(
    folder: Path,
    task: Task,
    predictions: Predictions,
    labels: tuple[str, ...],
    rows: list[dict[str, Any]],
    **changes: Any,
) -> Path:
    """The files of a finished run with these predictions of its test rows."""
    examples = [Example({"input_ids": [1]}, None, row=row) for row in rows]
    judged, records = records_of(task, predictions, examples, rows, labels, lambda at: f"a/rows.csv:{at + 2}")
    file = checksum(write_records(folder, "test", records))
    write_analysis(folder, {"test": {**analysis_of(predictions, labels, judged, records), "file": file}})
    manifest = {"status": "finished", "task": task.name, "labels": list(labels), "metrics": {"test": {}}, **changes}
    (folder / "manifest.json").write_bytes(dump_object(manifest, folder / "manifest.json", seal=True))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    second = np.array(SECOND)
    predictions = ClassPredictions(0.5, np.stack([1 - second, second], axis=1), np.array([0, 0, 0, 1, 1, 1]))
    rows = [{"text": text} for text in ("plain", "a Film", "dull", "quiet", "good", "a film")]
    return write_run(tmp_path / "run", Classification(), predictions, ("neg", "pos"), rows)


def test_errors_lists_wrong_rows_the_worst_first(graftwerk: Run, run: Path) -> None:
    said = graftwerk("errors", run)
    assert said.code == 0, said.err
    assert said.err == "test: 6 rows, 3 wrong, 3 match, 3 shown\n"
    heading, _, *lines = said.out.splitlines()
    assert heading.split() == ["row", "where", "true", "predicted", "nats", "confidence", "text"]
    assert [line.split()[:4] for line in lines] == [
        ["2", "rows.csv:3", "neg", "pos"],
        ["3", "rows.csv:4", "neg", "pos"],
        ["4", "rows.csv:5", "pos", "neg"],
    ]
    assert lines[0].split()[4:] == ["2.3", "0.9", "a", "Film"]
    assert graftwerk("errors", run / "adapter", "-q").out == said.out  # the adapter of the run


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--true", "pos"], [4]),
        (["--predicted", "pos"], [2, 3]),
        (["--true", "pos", "--predicted", "pos", "--all"], [5, 6]),
        (["--contains", "FILM"], [2]),
        (["--contains", "film", "--all"], [2, 6]),
        (["--limit", "1"], [2]),
        (["--confident", "--all"], [6, 1, 2, 3, 4, 5]),
        (["--contains", "nowhere"], []),
    ],
)
def test_errors_filters_rows(graftwerk: Run, run: Path, options: list[str], rows: list[int]) -> None:
    found = graftwerk("errors", run, *options, "--json").json
    assert [row["row"] for row in found["predictions"]] == rows
    assert (found["split"], found["rows"], found["wrong"]) == ("test", 6, 3)
    assert found["matching"] == (3 if "--limit" in options else len(rows))


def test_errors_output_writes_csv_and_jsonl_of_all_rows(graftwerk: Run, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "errors.csv"
    said = graftwerk("errors", run, "--output", path)
    assert said.code == 0, said.err
    assert said.last == str(path)
    rows = list(csv.DictReader(path.open(newline="")))
    assert list(rows[0]) == [
        "row", "where", "text", "true", "predicted", "wrong", "error", "confidence", "score_neg", "score_pos"
    ]  # fmt: skip
    assert [row["text"] for row in rows] == ["a Film", "dull", "quiet"]
    assert float(rows[0]["score_pos"]) == 0.9
    said = graftwerk("errors", run, "--output", path)
    assert said.code == 7
    assert "--overwrite" in said.err
    assert graftwerk("errors", run, "--output", path, "--overwrite", "--limit", "1").code == 0
    assert len(list(csv.DictReader(path.open(newline="")))) == 1
    found = graftwerk("errors", run, "-o", tmp_path / "errors.jsonl", "--json").json
    assert "predictions" not in found
    lines = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [2, 3, 4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--true", "poss"], "this run has no label `poss`"),
        (["--true", "poss"], "did you mean `pos`? there are: neg, pos"),
        (["--split", "validation"], "there are no validation rows in this run"),
        (["--split", "train"], "there is no split `train`"),
        (["--output", "errors.xlsx"], "its ending says the form: .csv, .tsv, .jsonl"),
        (["--overwrite"], "--overwrite is for the file of --output"),
        (["--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_errors_invalid_option_exits_2(graftwerk: Run, run: Path, options: list[str], said: str) -> None:
    found = graftwerk("errors", run, *options)
    assert found.code == 2
    assert said in " ".join(found.err.split())
    assert found.out == ""


def test_errors_of_a_task_without_labels_refuses_their_filters(graftwerk: Run, tmp_path: Path) -> None:
    predictions = ScorePredictions(0.5, np.array([1.0, 5.0]), np.array([1.5, 2.0]))
    run = write_run(tmp_path / "run", Regression(), predictions, (), [{"text": "one"}, {"text": "two"}])
    said = graftwerk("errors", run)
    assert said.err == "test: 2 rows, 2 match, 2 shown\n"
    assert said.out.splitlines()[2].split() == ["2", "rows.csv:3", "2", "5", "3", "two"]
    for options, text in (
        (["--true", "1"], "regression has no labels"),
        (["--confident"], "answers of regression have no probability"),
        (["--all"], "answers of regression are not right or wrong"),
    ):
        found = graftwerk("errors", run, *options)
        assert found.code == 2
        assert text in found.err


def test_errors_of_tags_shows_missed_and_extra_entities(graftwerk: Run, tmp_path: Path) -> None:
    tags = np.array([[1, 0, 3], [0, 0, 1]])
    targets = np.array([[1, 2, 0], [0, 0, 1]])
    labels = ("O", "B-ORG", "I-ORG", "B-PER")
    predictions = TagPredictions(0.5, tags, targets, np.array([[0.9, 0.7, 0.8], [0.9] * 3]), np.arange(2), labels)
    rows = [{"tokens": ["New", "York", "Ann"]}, {"tokens": ["at", "the", "Met"]}]
    run = write_run(tmp_path / "run", TokenClassification().with_labels(labels), predictions, labels, rows)
    (found,) = graftwerk("errors", run, "--true", "ORG", "--json").json["predictions"]
    assert found["text"] == "New York Ann"
    assert [(entity["label"], entity["text"]) for entity in found["true"]] == [("ORG", "New York")]
    assert (found["error"], found["confidence"]) == (3.0, 0.8)
    line = graftwerk("errors", run).out.splitlines()[2]
    assert "ORG: New York   ORG: New; PER: Ann" in line
    assert graftwerk("errors", run, "--true", "PER", "--json").json["matching"] == 0
    assert "there are: ORG, PER" in graftwerk("errors", run, "--predicted", "LOC").err


def test_errors_without_predictions_says_why(graftwerk: Run, run: Path, tmp_path: Path) -> None:
    manifest = run / "manifest.json"
    before = json.loads(manifest.read_text())

    def said_with(**changes: Any) -> str:
        content = {key: value for key, value in {**before, **changes}.items() if key != "digest"}
        manifest.write_bytes(dump_object(content, manifest, seal=True))
        found = graftwerk("errors", run)
        assert found.code == 2
        return found.err

    assert "it is not finished (status: interrupted)" in said_with(status="interrupted")
    assert "held no rows out" in said_with(metrics={})
    (run / "predictions" / "analysis.json").unlink()
    assert "an older version trained it" in said_with()
    said = graftwerk("errors", tmp_path)
    assert said.code == 2
    assert "is not a run folder" in said.err
    assert "there is no folder" in graftwerk("errors", tmp_path / "nowhere").err


def test_errors_changed_or_missing_file_exits_8(graftwerk: Run, run: Path) -> None:
    rows = run / "predictions" / "test.jsonl"
    rows.write_text(rows.read_text().replace("dull", "fine"))
    said = graftwerk("errors", run)
    assert said.code == 8
    assert "test.jsonl is not what was written" in said.err
    rows.unlink()
    assert "test.jsonl is missing" in graftwerk("errors", run).err
    analysis = run / "predictions" / "analysis.json"
    analysis.write_text(analysis.read_text().replace('"wrong": 3', '"wrong": 2'))
    assert graftwerk("errors", run).code == 8
