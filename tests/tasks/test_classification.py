"""Text classification, from a source to a loss: reading, splitting, encoding, padding, scoring."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from graftwerk.data.settings import DataSettings
from graftwerk.data.splits_reader import read_unanswered
from graftwerk.errors import AdapterError, ConfigError, DataError
from graftwerk.models.load import load_model, load_tokenizer
from graftwerk.models.positions import fix_padding
from graftwerk.tasks.base import Example, Splits
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.registry import parse_task

TASK = Classification()


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(texts: str, label: str) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text in texts]


def codes(splits: Splits) -> list[str]:
    return [finding.code for finding in splits.issues]


def test_parse_task_unknown_name_suggests_nearest() -> None:
    assert isinstance(parse_task("classification"), Classification)
    with pytest.raises(ConfigError, match="no task `clasification`") as caught:
        parse_task("clasification")
    assert "did you mean `classification`?" in str(caught.value.hint)


# reading


def test_read_glosses_stratified_without_issues(glosses: Path) -> None:
    splits = TASK.read(DataSettings(train=str(glosses), validation=36, test=0.1))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (180, 36, 24)
    assert splits.labels is not None
    assert len(splits.labels) == 12
    assert Counter(row["label"] for row in splits.validation) == dict.fromkeys(splits.labels, 3)
    assert splits.issues == ()
    assert splits.origin["rows"] == {"train": 180, "validation": 36, "test": 24}


def test_read_filtered_reviews_stratified_without_issues(movies: str) -> None:
    splits = TASK.read(
        DataSettings(train=movies, filter={"source": "rotten_tomatoes"}, validation=500, max_train_rows=2000)
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2000, 500, 0)
    assert splits.labels == ("0", "1")
    assert splits.issues == ()
    # Half of the snippets are positive, and so of every split.
    assert Counter(row["label"] for row in splits.validation) == {"0": 250, "1": 250}
    assert Counter(row["label"] for row in splits.train) == {"0": 1000, "1": 1000}


def test_read_fingerprint_depends_on_rows_not_path(glosses: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"validation": 36, "test": 24}
    first = TASK.read(DataSettings(train=str(glosses), **settings))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(glosses.read_bytes())
    assert TASK.read(DataSettings(train=str(moved), **settings)).fingerprint == first.fingerprint
    assert TASK.read(DataSettings(train=str(moved), split_seed=1, **settings)).fingerprint != first.fingerprint
    text = json.loads(glosses.read_text(encoding="utf-8").splitlines()[0])["text"]
    moved.write_text(glosses.read_text(encoding="utf-8").replace(text, text + "!"), encoding="utf-8")
    assert TASK.read(DataSettings(train=str(moved), **settings)).fingerprint != first.fingerprint


def test_read_numeric_and_text_labels_match_across_formats(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": f"t{at}", "label": at % 2} for at in range(10)])
    (tmp_path / "b.csv").write_text("text,label\nx,1\ny,0\n")
    splits = TASK.read(DataSettings(train=train, validation=str(tmp_path / "b.csv")))
    assert splits.labels == ("0", "1")
    assert [row["label"] for row in splits.validation] == ["1", "0"]


def test_read_skipped_rows_are_counted_per_source(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [*rows_of("abc", "x"), *rows_of("def", "y"), {"text": "", "label": "x"}])
    test = write(tmp_path / "b.jsonl", [*rows_of("gh", "x"), *rows_of("i", "y"), {"text": "t"}])
    with pytest.raises(DataError, match="1 of 7 rows"):
        TASK.read(DataSettings(train=train, test=test, validation=None))
    splits = TASK.read(DataSettings(train=train, test=test, validation=None, on_bad_row="skip"))
    assert codes(splits) == ["rows-skipped", "rows-skipped"]
    assert splits.issues[0].example == f"{train}:7: `text` is empty"
    assert splits.issues[1].example == f"{test}:4: `label` is missing"


def test_read_bad_data_raises_or_is_reported(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="no rows"):
        TASK.read(DataSettings(train=empty))
    one = write(tmp_path / "one.jsonl", rows_of("abcdef", "x"))
    with pytest.raises(DataError, match="one class"):
        TASK.read(DataSettings(train=one, validation=2))
    train = write(tmp_path / "a.jsonl", [*rows_of("aabc", "x"), *rows_of("def", "y")])
    said = TASK.read(DataSettings(train=train, validation=None, filter={"label": ["x", "y", "z"]})).issues[0]
    assert (said.code, said.message.count("label: z")) == ("filter-unmatched", 1)
    other = write(tmp_path / "b.jsonl", [*rows_of("A", "x"), *rows_of("z", "y")])
    splits = TASK.read(DataSettings(train=train, validation=other, max_train_rows=100))
    assert codes(splits) == ["fewer-rows", "duplicates", "leakage"]
    with pytest.raises(ConfigError, match="same source"):
        TASK.read(DataSettings(train=train, test=train))
    with pytest.raises(ConfigError, match="holds out 7 of 7"):
        TASK.read(DataSettings(train=train, validation=7))


def test_read_labels_of_adapter_take_precedence(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", rows_of("abc", "y"))
    splits = TASK.read(DataSettings(train=rows, validation=None), labels=("y", "x"))
    assert splits.labels == ("y", "x")
    with pytest.raises(AdapterError, match="the class 'y'"):
        TASK.read(DataSettings(train=rows, validation=None), labels=("n", "x"))


def test_read_repeated_texts_do_not_leak(tmp_path: Path) -> None:
    rows = [{"text": f"text {at // 2}" + " " * (at % 2), "label": at // 2 % 2} for at in range(200)]
    splits = TASK.read(DataSettings(train=write(tmp_path / "a.jsonl", rows), validation=40, test=40))
    assert "leakage" not in codes(splits)
    assert (len(splits.validation), len(splits.test)) == (40, 40)


def test_read_unanswered_rows_without_labels(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"review": "a"}, {"review": ""}, {"review": "b", "label": 3}])
    columns = {"text": "review", "label": "label"}
    with pytest.raises(DataError, match="1 of 3 rows"):
        read_unanswered(source, TASK.row_format, columns)
    table, findings = read_unanswered(source, TASK.row_format, columns, "skip")
    assert table.rows == [{"text": "a"}, {"text": "b"}]
    assert table.where(1) == f"{source}:3"
    assert [finding.rows for finding in findings] == [1]
    with pytest.raises(DataError, match="no rows"):
        read_unanswered(write(tmp_path / "b.jsonl", []), TASK.row_format)


# encoding


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits([], [], [], ("no", "yes", "maybe"), "none")


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    return load_tokenizer(str(tiny_encoder))


def test_encode_ids_equal_tokenizer(tokenizer: Any, splits: Splits, gloss_texts: list[str]) -> None:
    rows = [{"text": text, "label": "maybe"} for text in gloss_texts[:20]]
    examples = TASK.encode(rows, tokenizer, splits, 512)
    assert [example.inputs["input_ids"] for example in examples] == [
        tokenizer(text)["input_ids"] for text in gloss_texts[:20]
    ]
    assert {example.target for example in examples} == {2}
    assert {example.truncated for example in examples} == {0}


def test_encode_truncation_is_counted_and_keeps_special_tokens(
    tokenizer: Any, splits: Splits, gloss_texts: list[str]
) -> None:
    whole = TASK.encode([{"text": text} for text in gloss_texts], tokenizer, splits, 512)
    cut = TASK.encode([{"text": text} for text in gloss_texts], tokenizer, splits, 12)
    assert sum(example.truncated > 0 for example in cut) > 100
    for full, short in zip(whole, cut, strict=True):
        assert full.length == short.length + short.truncated
        assert short.length <= 12
        assert short.inputs["input_ids"][-1] == tokenizer.sep_token_id
        assert short.inputs["input_ids"][:-1] == full.inputs["input_ids"][: short.length - 1]


def test_encode_slow_tokenizer_equals_fast(tokenizer: Any, splits: Splits, gloss_texts: list[str]) -> None:
    class Slow:
        """The same tokenizer without the answers that only a fast one has."""

        is_fast = False
        num_special_tokens_to_add = staticmethod(tokenizer.num_special_tokens_to_add)

        def __call__(self, text: str, **kwargs: Any) -> Any:
            assert isinstance(text, str)
            assert not kwargs.get("return_overflowing_tokens")
            return tokenizer(text, **kwargs)

    rows = [{"text": text} for text in gloss_texts[:30]]
    assert TASK.encode(rows, Slow(), splits, 12) == TASK.encode(rows, tokenizer, splits, 12)


def test_encode_unknown_label_raises(tokenizer: Any, splits: Splits) -> None:
    with pytest.raises(DataError, match="'never', which is none of: no, yes, maybe"):
        TASK.encode([{"text": "a", "label": "never"}], tokenizer, splits, 12)
    assert TASK.encode([{"text": "a"}], tokenizer, splits, 12)[0].target is None
    assert TASK.encode([], tokenizer, splits, 12) == []


def test_encode_max_length_without_room_raises(tokenizer: Any, splits: Splits) -> None:
    with pytest.raises(ConfigError, match="no room"):
        TASK.encode([{"text": "a"}], tokenizer, splits, 2)


# batches


def test_collate_masks_padding_where_pad_token_is_eos(splits: Splits) -> None:
    tokenizer = SimpleNamespace(pad_token_id=2, pad_token_type_id=0)
    batch = TASK.collator.collate(
        [Example({"input_ids": [5, 2]}, 0), Example({"input_ids": [5, 6, 7, 2]}, 1)], tokenizer
    )
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [5, 6, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert TASK.objective.num_targets(batch) == 2


def test_collate_without_targets_has_no_labels() -> None:
    tokenizer = SimpleNamespace(pad_token_id=0, pad_token_type_id=0)
    inputs = {"input_ids": [5, 6], "token_type_ids": [0, 1]}
    batch = TASK.collator.collate(
        [Example(inputs, None), Example({name: ids[:1] for name, ids in inputs.items()}, 1)], tokenizer
    )
    assert "labels" not in batch
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]


def test_loss_is_mean_cross_entropy_in_float32() -> None:
    logits = torch.randn(6, 3, dtype=torch.bfloat16)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = TASK.objective.loss(SimpleNamespace(logits=logits), {"labels": labels})
    assert loss.dtype == torch.float32
    expected = -torch.log_softmax(logits.float(), -1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(loss, expected)
    smoothed = TASK.objective.loss(SimpleNamespace(logits=logits), {"labels": labels}, label_smoothing=0.3)
    uniform = -torch.log_softmax(logits.float(), -1).mean()
    torch.testing.assert_close(smoothed, 0.7 * expected + 0.3 * uniform)


def test_predictions_are_probabilities_in_row_order() -> None:
    logits = [torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])]
    rows = [Example({"input_ids": [1]}, target) for target in (1, 0, 0)]
    result = TASK.decoder.predictions(logits, rows, 0.5, None)
    assert result.scores.argmax(-1).tolist() == [1, 0, 0]
    np.testing.assert_allclose(result.scores.sum(-1), 1, rtol=1e-12)
    assert result.targets is not None
    assert result.targets.tolist() == [1, 0, 0]
    assert [answer["label"] for answer in TASK.decoder.format_predictions(result, ["no", "yes"])] == ["yes", "no", "no"]
    assert TASK.decoder.predictions(logits, [*rows[:2], Example({"input_ids": [1]}, None)], None, None).targets is None


# with models


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_decoder"])
def test_forward_padded_batch_equals_rows_alone(
    kind: str, request: pytest.FixtureRequest, splits: Splits, gloss_texts: list[str]
) -> None:
    place = str(request.getfixturevalue(kind))
    tokenizer = load_tokenizer(place)
    model = load_model(place, TASK, splits)
    fix_padding(model, tokenizer)
    examples = TASK.encode([{"text": text, "label": "yes"} for text in gloss_texts[:8]], tokenizer, splits, 64)
    with torch.inference_mode():
        together = model(**TASK.collator.collate(examples, tokenizer)).logits
        alone = torch.cat([model(**TASK.collator.collate([example], tokenizer)).logits for example in examples])
    assert together.shape == (8, 3)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_decoder"])
def test_classification_learns_real_glosses(kind: str, request: pytest.FixtureRequest, glosses: Path) -> None:
    """Two classes, a few dozen steps of a model of random weights: better than chance on the rows it saw."""
    place = str(request.getfixturevalue(kind))
    splits = TASK.read(
        DataSettings(train=str(glosses), filter={"label": ["noun.animal", "noun.cognition"]}, validation=8)
    )
    tokenizer = load_tokenizer(place)
    torch.manual_seed(0)
    model = load_model(place, TASK, splits)
    fix_padding(model, tokenizer)
    examples = TASK.encode(splits.train, tokenizer, splits, 64)
    batch = TASK.collator.collate(examples, tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        TASK.objective.loss(model(**batch), batch).backward()
        optimizer.step()
    with torch.inference_mode():
        kept = TASK.objective.per_row_outputs(TASK.objective.forward(model, batch), batch)
    scores = TASK.decoder.predictions(list(kept.split(1)), examples, None, None)
    assert (scores.scores.argmax(-1) == scores.targets).mean() > 0.9
    assert model.config.id2label == {0: "noun.animal", 1: "noun.cognition"}
