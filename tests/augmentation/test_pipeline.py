"""The file of augmented rows: what stands in the way of making it, and what is found broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graftwerk as gw
from graftwerk.augmentation.augment import augment
from graftwerk.augmentation.pipeline import about_of, make, weighted
from graftwerk.augmentation.progress_log import Journal, journal_of
from graftwerk.augmentation.settings import parse_augmenter
from graftwerk.errors import ConfigError, ConflictError, DataError, IntegrityError

Rows = list[dict[str, Any]]
DROPOUT = [parse_augmenter({"name": "word_dropout", "probability": 0.5})]


def test_make_existing_file_raises_without_overwrite(tmp_path: Path, labelled: Rows) -> None:
    target = tmp_path / "a.jsonl"
    first = make(labelled, DROPOUT, target)
    with pytest.raises(ConflictError, match="there is a file"):
        make(labelled, DROPOUT, target)
    with pytest.raises(ConflictError, match=r"other rows \(6 then, 5 now\)"):
        make(labelled[:5], DROPOUT, target, resume=True)
    with pytest.raises(ConflictError, match="other settings"):
        make(labelled, [parse_augmenter("word_shuffle")], target, resume=True)
    assert target.read_bytes().count(b"\n") == first.rows
    assert make(labelled[:5], DROPOUT, target, overwrite=True).counts[0]["read"] == 5


def test_make_resume_changed_file_raises(tmp_path: Path, labelled: Rows) -> None:
    target = tmp_path / "a.jsonl"
    make(labelled, DROPOUT, target)
    target.write_bytes(target.read_bytes() + b"{}\n")
    with pytest.raises(IntegrityError, match="damaged or changed"):
        make(labelled, DROPOUT, target, resume=True)


def test_make_resume_rows_with_unusual_line_breaks_roundtrip(tmp_path: Path) -> None:
    """A line of the file ends at a line feed alone."""
    rows = [{"text": "one two three four five six", "label": f"a{sign}b"} for sign in "\u2028\x85\x1c\x0b"]
    target = tmp_path / "a.jsonl"
    first = make(rows, DROPOUT, target)
    assert make(rows, DROPOUT, target, resume=True).parts == first.parts


def test_make_resume_metadata_with_wrong_types_raises(tmp_path: Path, labelled: Rows) -> None:
    target = tmp_path / "a.jsonl"
    make(labelled, DROPOUT, target)
    about = json.loads(about_of(target).read_text())
    for made in (None, 1, [1], [{}], [{"made": "a"}]):
        about_of(target).write_text(json.dumps({**about, "made": made}))
        with pytest.raises(IntegrityError, match="should"):
            make(labelled, DROPOUT, target, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_make_foreign_file_raises(tmp_path: Path, labelled: Rows, resume: bool) -> None:
    target = tmp_path / "a.jsonl"
    target.write_text("{}\n")
    with pytest.raises(ConflictError, match="there is a file"):
        make(labelled, DROPOUT, target, resume=resume)


def test_journal_truncated_anywhere_resumes(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    with Journal(target, {"rows": "x"}, keep=True) as journal:
        for place in range(3):
            journal.add(f"{place}", [[f"Tür {place}", True]])
    whole = journal_of(target).read_bytes()
    for size in range(len(whole)):
        journal_of(target).write_bytes(whole[:size])
        with Journal(target, {"rows": "x"}, keep=True) as journal:
            done = sorted(journal.done)
            for place in range(len(done), 3):
                journal.add(f"{place}", [[f"Tür {place}", True]])
        assert done == [f"{place}" for place in range(len(done))]
        assert journal_of(target).read_bytes() == whole


def test_journal_second_process_or_other_identity_raises(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    with Journal(target, {"rows": "x"}, keep=True), pytest.raises(ConflictError, match="another process"):
        Journal(target, {"rows": "x"}, keep=True)
    with pytest.raises(ConflictError, match="other rows or settings"):
        Journal(target, {"rows": "y"}, keep=True)
    with Journal(target, {"rows": "y"}, keep=False) as journal:
        assert journal.done == {}


def test_weighted_repeats_or_samples_rows() -> None:
    rows = [{"text": f"row {place}"} for place in range(400)]
    assert weighted(rows, 1.0) == rows
    assert weighted(rows, 2.0)[:4] == [rows[0], rows[0], rows[1], rows[1]]
    half = weighted(rows, 0.5)
    assert 150 < len(half) < 250
    assert weighted(rows[::-1], 0.5) == half[::-1], "a row's own text decides"
    assert 550 < len(weighted(rows, 1.5)) < 650


def test_augment_file_and_list_of_rows_give_equal_bytes(tmp_path: Path, labelled: Rows) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    before = data.read_bytes()
    by = [{"name": "word_dropout", "probability": 0.5}]
    one = gw.augment(data=data, by=by, out=tmp_path / "a.jsonl")
    other = gw.augment(data=labelled, by=by, out=tmp_path / "b.jsonl")
    assert one.path.read_bytes() == other.path.read_bytes()
    assert data.read_bytes() == before
    planned = gw.augment(data=data, by=by, out=tmp_path / "c.jsonl", dry_run=True)
    assert planned["augmenters"][0]["variants"] == 6
    assert planned["augmenters"][0]["writes"] == "text"
    assert not (tmp_path / "c.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"data": None}, ConfigError, "give a run file or data"),
        ({"config": {}}, ConfigError, "not both"),
        ({"by": None}, ConfigError, "no augmenter is named"),
        ({"by": "file"}, ConfigError, "`path`"),
        ({"by": {"name": "file", "path": "x"}}, ConfigError, "makes none"),
        ({"out": None}, ConfigError, "no output file is named"),
        ({"out": "rows.csv"}, ConfigError, "ends otherwise"),
        ({"data": []}, DataError, "no rows"),
        ({"data": [{"text": 7}]}, DataError, "no text as `text`"),
        ({"data": [{"text": "a b"}, {"label": "x"}]}, DataError, "row 2 of 2 has no `text`"),
        ({"data": [{"other": "a b"}]}, ConfigError, "which part of a row"),
        ({"data": [{"text": "a b", "origin": "web"}]}, ConfigError, "1 of 1 rows have a column `origin`"),
        ({"by": {"name": "back_translation", "model": "m"}}, ConfigError, "reads the part `target`"),
        (
            {"by": {"name": "back_translation", "model": "m", "reads": "text", "writes": "text"}},
            ConfigError,
            "cannot write `text` from itself",
        ),
        ({"training.seed": 1}, ConfigError, "setting of a run file"),
    ],
)
def test_augment_invalid_arguments_raise(
    tmp_path: Path, labelled: Rows, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    given: dict[str, Any] = {"data": labelled, "by": "word_dropout", "out": str(tmp_path / "x.jsonl")}
    with pytest.raises(error, match=said):
        augment(**{**given, **change})
    assert not (tmp_path / "x.jsonl").exists()


def test_augment_out_equal_to_data_raises(tmp_path: Path, labelled: Rows) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    with pytest.raises(ConfigError, match="stays as it is"):
        augment(data=data, by="word_dropout", out=data, overwrite=True)


def test_augmented_sentences_summarize_counts(tmp_path: Path, labelled: Rows) -> None:
    made = make(labelled, [parse_augmenter({"name": "word_dropout", "n": 2})], tmp_path / "a.jsonl")
    about = json.loads(about_of(made.path).read_text())
    assert about["sha256"] == made.fingerprint
    assert about["identity"]["read"] == 6
    said = made.sentences()
    assert said[0] == f"word_dropout: {made.rows} rows from 6"
    assert any("left out: the variant is the same as the row's own" in line for line in said)
