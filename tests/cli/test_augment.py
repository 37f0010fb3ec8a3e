"""`graftwerk augment` as people and programs use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import Run, run_file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = ["a bird that sings at night", "the act of putting things in order", "one"]
    path.write_text("".join(json.dumps({"text": text, "label": "x"}) + "\n" for text in texts))
    return path


def test_augment_data_file_writes_rows_and_resumes(graftwerk: Run, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.jsonl"
    command = ["augment", "--data", rows, "--by", "word-dropout", "probability=0.5", "n=2", "--out", out]
    said = graftwerk(*command, "--dry-run")
    assert said.code == 0
    assert "word_dropout" in said.out
    assert not out.exists()
    said = graftwerk(*command)
    assert said.code == 0, said.err
    assert said.last == str(out)
    assert "left out: the variant is the same as the row's own" in said.out
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["origin"]["settings"]["probability"] for row in made} == {0.5}
    again = graftwerk(*command)
    assert again.code == 7
    assert "--resume" in again.err
    again = graftwerk(*command, "--resume", "--json")
    assert again.json["found"] is True
    assert again.json["rows"] == len(made)


def test_augment_run_file_uses_its_training_rows(
    graftwerk: Run, tmp_path: Path, tiny_encoder: Path, glosses: Path
) -> None:
    data: dict[str, Any] = {"train": str(glosses), "validation": 36, "test": 36, "augment": ["word_shuffle"]}
    path = run_file(tmp_path, tiny_encoder, glosses, data=data)
    said = graftwerk("augment", path, "--json")
    assert said.code == 0, said.err
    assert said.json["file"] == str(tmp_path / "run" / "augmented.jsonl")
    assert said.json["made"][0]["read"] == 240 - 72
    planned = graftwerk("augment", path, "data.augment=[{name: word_shuffle, n: 3}]", "--dry-run", "--json").json
    assert planned["augmenters"][0]["variants"] == 3 * (240 - 72)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "word-dropout"], "both --data and --by"),
        (["run.yaml", "--data", "rows.jsonl"], "is a run file"),
        (["a.yaml", "b.yaml"], "one run file"),
        (["--data", "ROWS", "--by", "word-drop", "--out", "x.jsonl"], "did you mean `word_dropout`"),
        (["--data", "ROWS", "--by", "word-dropout", "p=1", "--out", "x.jsonl"], "no setting `p`"),
        (["--data", "ROWS", "--by", "word-dropout"], "no output file is named"),
        (["--data", "ROWS", "--by", "back-translation", "model=y", "model.x=1"], "no keys of its own"),
    ],
)
def test_augment_invalid_arguments_exit_2(graftwerk: Run, rows: Path, words: list[str], said: str) -> None:
    answer = graftwerk("augment", *(str(rows) if word == "ROWS" else word for word in words))
    assert answer.code == 2
    assert said in answer.err


def test_augment_help_shows_examples(graftwerk: Run) -> None:
    said = graftwerk("augment", "--help")
    assert "--by back-translation" in " ".join(said.out.split())


def test_dry_run_counts_augmented_rows(graftwerk: Run, tmp_path: Path, tiny_encoder: Path, glosses: Path) -> None:
    path = run_file(tmp_path, tiny_encoder, glosses, training={"num_train_epochs": 1})
    augment = "data.augment=[{name: word_shuffle, n: 3}]"
    made = 3 * (240 - 72)
    steps = -(-(made + 168) // 16)
    for words in (("train", path, augment, "--dry-run"), ("doctor", path, augment)):
        said = graftwerk(*words).out
        assert f"steps   {steps} of 16 rows" in said, said
        assert f"{made} augmented rows are counted" in said
    both = graftwerk(
        "compare", path, "methods=lora", "seeds=0", augment, "augment=with,without", "--dry-run", "--json"
    ).json
    assert [one["steps"] for one in both["methods"]] == [steps, 11]
    assert [one["augmented_at_most"] for one in both["methods"]] == [made, None]
