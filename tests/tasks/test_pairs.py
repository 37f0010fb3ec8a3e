"""Pairs of texts: read, split, encoded as transformers does it, trained and answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftwerk.config import RunConfig
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, DataError
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.models.load import load_tokenizer
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.example_checks import UNSEPARATED
from graftwerk.tasks.tokenization import encode_pairs
from graftwerk.training.train import train

TASK = Classification()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path, gloss_texts: list[str]) -> str:
    """Glosses with their second half, or with another gloss's."""
    rows = []
    for at, text in enumerate(gloss_texts[:60]):
        half = len(text) // 2
        other = gloss_texts[(at + 7) % 60]
        second = text[half:] if at % 2 else other[len(other) // 2 :]
        rows.append({"premise": text[:half], "hypothesis": second, "label": ("no", "yes")[at % 2]})
    return write(tmp_path / "pairs.jsonl", rows)


COLUMNS = {"text": "premise", "text_pair": "hypothesis"}


@pytest.mark.parametrize("max_length", [12, 17, 512])
def test_encode_pairs_any_length_equals_longest_first_of_transformers(
    minilm: str, gloss_texts: list[str], max_length: int
) -> None:
    tokenizer = load_tokenizer(minilm)
    given = list(zip(gloss_texts[:20], gloss_texts[20:40], strict=True))
    for (first, second), (inputs, lost) in zip(given, encode_pairs(given, tokenizer, max_length), strict=True):
        theirs = tokenizer(first, second, truncation="longest_first", max_length=max_length)
        assert inputs == {name: theirs[name] for name in ("input_ids", "token_type_ids")}
        assert 1 in inputs["token_type_ids"]
        assert lost == len(tokenizer(first, second)["input_ids"]) - len(inputs["input_ids"])
        assert (lost > 0) == (len(tokenizer(first, second)["input_ids"]) > max_length)


def test_encode_pairs_without_room_raises(minilm: str) -> None:
    with pytest.raises(ConfigError, match="no room for two texts"):
        encode_pairs([("a", "b")], load_tokenizer(minilm), 4)


def test_read_second_column_named_or_present_gives_pairs(pairs: str) -> None:
    splits = TASK.read(DataSettings(train=pairs, columns=COLUMNS, test=10))
    assert set(splits.train[0]) == {"text", "text_pair", "label"}
    assert TASK.resolved(splits).pairs is True
    single = TASK.read(DataSettings(train=pairs, columns={"text": "premise"}, test=10))
    assert set(single.train[0]) == {"text", "label"}
    assert TASK.resolved(single).pairs is False
    left_out = Classification(pairs=False)
    with pytest.raises(ConfigError, match="no part `text_pair`"):
        left_out.read(DataSettings(train=pairs, columns=COLUMNS))


def test_read_other_second_texts_changes_the_fingerprint(pairs: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"columns": COLUMNS, "validation": None, "test": 10}
    before = TASK.read(DataSettings(train=pairs, **settings)).fingerprint
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    rows[3]["hypothesis"] += " indeed"
    assert TASK.read(DataSettings(train=write(tmp_path / "o.jsonl", rows), **settings)).fingerprint != before
    streamed: dict[str, Any] = {"columns": COLUMNS, "validation": None, "streaming": True}
    fingerprints = {
        TASK.read(DataSettings(train=source, **streamed)).fingerprint for source in (pairs, str(tmp_path / "o.jsonl"))
    }
    assert len(fingerprints) == 2


def test_read_pairs_without_second_text_are_bad_rows(pairs: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    rows[4]["hypothesis"] = "  "
    with pytest.raises(DataError, match=r"bad.jsonl:5: `hypothesis`.* is empty"):
        TASK.read(DataSettings(train=write(tmp_path / "bad.jsonl", rows), columns=COLUMNS))


@pytest.mark.parametrize("streaming", [False, True])
def test_read_splits_of_pairs_and_single_texts_raises(pairs: str, tmp_path: Path, streaming: bool) -> None:
    renamed = [
        {"text": row["premise"], "text_pair": row["hypothesis"], "label": row["label"]}
        for row in map(json.loads, Path(pairs).read_text(encoding="utf-8").splitlines())
    ]
    one = write(tmp_path / "one.jsonl", renamed[:40])
    other = write(tmp_path / "other.jsonl", [{"text": row["text"], "label": row["label"]} for row in renamed[40:]])
    with pytest.raises(ConfigError, match=r"the train rows of .* are pairs with `text_pair`, the test rows are not"):
        TASK.read(DataSettings(train=one, test=other, validation=None, streaming=streaming))


def test_encode_tokenizer_without_separator_is_told(tiny_decoder: Path, pairs: str) -> None:
    splits = TASK.read(DataSettings(train=pairs, columns=COLUMNS))
    examples = TASK.encode(splits.train, load_tokenizer(str(tiny_decoder)), splits, 64)
    assert all(UNSEPARATED in example.notes for example in examples)


def test_train_pairs_then_answers_need_both_texts(tiny_encoder: Path, pairs: str, tmp_path: Path) -> None:
    config = {
        "model": str(tiny_encoder), "method": {"name": "lora", "r": 2}, "output_dir": str(tmp_path / "run"),
        "data": {"train": pairs, "columns": COLUMNS, "test": 10, "max_length": 32, "max_truncated": 1.0},
        "training": {"max_steps": 2},
    }  # fmt: skip
    run = train(RunConfig.build(config))
    assert run.manifest["task_settings"] == {"name": "classification", "pairs": True}
    assert evaluate(run)["metrics"]["accuracy"] == run.manifest["metrics"]["test"]["accuracy"]
    both = predict(run, ["a plant\tgrows"])["predictions"]
    rows = write(tmp_path / "rows.jsonl", [{"premise": "a plant", "hypothesis": "grows"}])
    answers = predict(run, data=rows)["predictions"]
    assert answers == [{**both[0], "text": "a plant", "text_pair": "grows"}]
    assert predict(run, ["a plant\twalks"])["predictions"] != both
    with pytest.raises(ConfigError, match="answers pairs of texts"):
        predict(run, ["a plant grows"])
    with pytest.raises(ConfigError, match="no column `hypothesis`"):
        predict(run, data=write(tmp_path / "single.jsonl", [{"premise": "a plant"}]))
