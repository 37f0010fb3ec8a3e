"""Token classification: words and tags of three formats, labelled once, cut with overlap, counted as by seqeval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.data.settings import DataSettings
from graftwerk.errors import AdapterError, ConfigError, DataError
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.evaluation.metrics import metrics_of
from graftwerk.models.load import load_config, load_model, load_tokenizer
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.spans import spans_of, tags_of_spans, words_of
from graftwerk.tasks.tag_predictions import NOBODY, UNREAD, TagPredictions
from graftwerk.tasks.token_classification import TokenClassification
from graftwerk.tasks.windows import NOWHERE, windows_of
from graftwerk.training.train import train

TASK = TokenClassification()
ROWS = [
    {"tokens": ["Press", "Ctrl", "+", "S", "in", "Files"], "tags": ["O", "B-KEY", "I-KEY", "I-KEY", "O", "B-APP"]},
    {"tokens": ["Nothing", "here"], "tags": ["O", "O"]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(source: str, task: TokenClassification = TASK, **settings: Any) -> Any:
    return task.read(DataSettings(train=source, validation=None, **settings))


# reading


def test_spans_of_counts_as_conlls_script_and_seqeval_do() -> None:
    cases = {
        "B-P I-P O B-L": [(0, 2, "P"), (3, 4, "L")],
        "I-P I-P O": [(0, 2, "P")],  # an I- without a beginning begins
        "B-P B-P I-P": [(0, 1, "P"), (1, 3, "P")],
        "B-P I-L I-L": [(0, 1, "P"), (1, 3, "L")],  # another kind begins
        "O O": [],
        "B-A-B I-A-B": [(0, 2, "A-B")],
    }
    for tags, spans in cases.items():
        assert spans_of(tags.split()) == spans, tags
    assert spans_of(list("PPOLP"), plain=True) == [(0, 2, "P"), (3, 4, "L"), (4, 5, "P")]


@pytest.mark.parametrize("seed", range(3))
def test_entity_metrics_equal_seqeval(seed: int) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(seed)
    names = ("B-A", "B-B", "I-A", "I-B", "O")
    shape = (30, 12)
    targets = rng.choice(5, shape, p=[0.15, 0.1, 0.15, 0.1, 0.5])
    tags = np.where(rng.random(shape) < 0.75, targets, rng.integers(0, 5, shape))
    lengths = rng.integers(1, 13, 30)
    padded = np.arange(12)[None] >= lengths[:, None]
    tags[padded], targets[padded] = NOBODY, NOBODY
    found = TagPredictions(None, tags, targets, np.ones(shape), np.arange(30), names)
    figures = {name: figure["value"] for name, figure in metrics_of(found, resamples=100).items()}
    gold, given = found.target_names, found.tag_names
    theirs = [list(map(list, rows)) for rows in (gold, given)]
    assert figures["entity_f1"] == pytest.approx(seqeval.f1_score(*theirs))
    assert figures["entity_precision"] == pytest.approx(seqeval.precision_score(*theirs))
    assert figures["entity_recall"] == pytest.approx(seqeval.recall_score(*theirs))
    assert figures["entity_f1_macro"] == pytest.approx(seqeval.f1_score(*theirs, average="macro"))
    assert figures["word_accuracy"] == pytest.approx(seqeval.accuracy_score(*theirs))


def test_read_formats_give_the_same_rows(tmp_path: Path) -> None:
    words = write(tmp_path / "words.jsonl", ROWS)
    lines = "-DOCSTART- -X- O\n\n" + "\n\n".join(
        "\n".join(f"{word}\tX\t{tag}" for word, tag in zip(row["tokens"], row["tags"], strict=True)) for row in ROWS
    )
    (tmp_path / "words.conll").write_text(lines + "\n", encoding="utf-8")
    listed = [{"tokens": " ".join(row["tokens"]), "tags": json.dumps(row["tags"])} for row in ROWS]
    spans = [
        {"text": "Press Ctrl+S in Files", "spans": [{"start": 6, "end": 12, "label": "KEY"}, [16, 21, "APP"]]},
        {"text": "Nothing here", "spans": []},
    ]
    bioes = [{**ROWS[0], "tags": ["O", "B-KEY", "I-KEY", "E-KEY", "O", "S-APP"]}, ROWS[1]]
    sources = [
        words, str(tmp_path / "words.conll"), write(tmp_path / "listed.jsonl", listed),
        write(tmp_path / "spans.jsonl", spans), write(tmp_path / "bioes.jsonl", bioes),
    ]  # fmt: skip
    for source in sources:
        splits = read(source)
        rows = [{part: row[part] for part in ("tokens", "tags")} for row in splits.train]
        assert rows == ROWS, source
        assert splits.labels == ("B-APP", "B-KEY", "I-KEY", "O")
        assert TASK.resolved(splits).scheme == "bio"
    plain = read(write(tmp_path / "plain.jsonl", [{**ROWS[1], "tags": ["NN", "RB"]}]))
    assert plain.labels == ("NN", "RB")
    assert TASK.resolved(plain).scheme == "plain"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "holds a word that is empty"),
        ({"tokens": [], "tags": []}, "is empty"),
        ({"text": "a b", "spans": [[0, 9, "X"]]}, "has the span 0 to 9, and 3 characters"),
        ({"text": "a b", "spans": [[1, 2, "X"]]}, "in which there is no word"),
        ({"text": "a b", "spans": [[0, 3, "X"], [2, 3, "Y"]]}, "overlaps another"),
        ({"text": "a b", "spans": [["0", 3, "X"]]}, "which is no span"),
    ],
)
def test_read_bad_rows_raise_with_their_place(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"bad.jsonl:1: .*{words}"):
        read(write(tmp_path / "bad.jsonl", [row]))


def test_read_conll_sentences_of_unequal_lines_raise_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "bad.conll").write_text("a O\n\nb O\nc\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad.conll:3: has a sentence with 1 and 2 fields a line"):
        read(str(tmp_path / "bad.conll"))


def test_read_tags_that_cannot_be_learnt_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"have the tag `O`; there is nothing to find"):
        read(write(tmp_path / "none.jsonl", [ROWS[1]]))
    mixed = [{"tokens": ["a", "b"], "tags": ["B-X", "X"]}]
    with pytest.raises(DataError, match=r"some tags are BIO \(B-X\) and some are not \(X\)"):
        read(write(tmp_path / "mixed.jsonl", mixed))
    with pytest.raises(DataError, match="'X', which is no BIO tag"):
        read(write(tmp_path / "mixed.jsonl", mixed), TokenClassification(scheme="bio"))
    assert read(str(tmp_path / "mixed.jsonl"), TokenClassification(scheme="plain")).labels == ("B-X", "X")
    other = write(tmp_path / "other.jsonl", [{"tokens": ["a"], "tags": ["B-NEW"]}])
    with pytest.raises(DataError, match="the test rows have tags that no training row has: B-NEW"):
        read(write(tmp_path / "words.jsonl", ROWS), test=other)
    with pytest.raises(AdapterError, match="not trained for: B-NEW"):
        TASK.read(DataSettings(train=other, validation=None), labels=("B-X", "O"))
    with pytest.raises(ConfigError) as caught:
        parse_task("ner")
    assert "did you mean `token-classification`?" in str(caught.value.hint)


def test_tags_of_spans_inside_a_word_cuts_it() -> None:
    assert words_of("Datei-Menü öffnen") == [(0, 5), (5, 6), (6, 10), (11, 17)]
    words, tags = tags_of_spans("Dateimenü", [(0, 5, "GUI")])
    assert (words, tags) == ([(0, 5), (5, 9)], ["B-GUI", "O"])


# encoding


def test_encode_labels_the_first_piece_as_transformers_aligns_words(minilm: str, tmp_path: Path) -> None:
    splits = read(write(tmp_path / "words.jsonl", [*ROWS, {"tokens": ["Bäckerei", "gThumb"], "tags": ["O", "B-APP"]}]))
    tokenizer = load_tokenizer(minilm)
    assert splits.labels is not None
    for row, example in zip(splits.train, TASK.encode(splits.train, tokenizer, splits, 64), strict=True):
        theirs = tokenizer(row["tokens"], is_split_into_words=True)
        assert example.inputs["input_ids"] == theirs["input_ids"]
        before: set[int | None] = {None}
        expected = []
        for word in theirs.word_ids():
            expected.append(-100 if word in before else splits.labels.index(row["tags"][word]))
            before.add(word)
        assert example.target == expected


def test_encode_for_a_decoder_labels_the_last_piece(tiny_decoder: Path, minilm: str, tmp_path: Path) -> None:
    assert TASK.for_model(load_config(str(tiny_decoder)))._last
    assert not TASK.for_model(load_config(minilm))._last
    tokenizer = load_tokenizer(minilm)
    (first,), (last,) = (
        windows_of([("gThumb is", [(0, 6), (7, 9)])], tokenizer, 64, last=last)[0] for last in (False, True)
    )
    pieces = tokenizer.convert_ids_to_tokens(first.inputs["input_ids"])
    assert first.at == [1, len(pieces) - 2]
    assert last.at == [len(pieces) - 3, len(pieces) - 2]
    assert len(pieces) > 4


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("max_length", "overlap"), [(12, None), (9, 0), (20, 13)])
def test_windows_of_a_long_row_hold_each_word_once_with_context(
    minilm: str, gloss_texts: list[str], max_length: int, overlap: int | None, last: bool
) -> None:
    tokenizer = load_tokenizer(minilm)
    text = " ".join(gloss_texts[:4])
    words = words_of(text)
    (windows,) = windows_of([(text, words)], tokenizer, max_length, overlap, last=last)
    assert len(windows) > 3
    assert [word for window in windows for word in window.words] == list(range(len(words)))
    for window in windows:
        assert len(window.inputs["input_ids"]) <= max_length
        for word, at in zip(window.words, window.at, strict=True):
            piece = tokenizer.convert_ids_to_tokens(window.inputs["input_ids"][at]).removeprefix("##")
            own = text[slice(*words[word])].lower()
            assert own.endswith(piece) if last else own.startswith(piece)
    if overlap is None:  # inside of the row, no word is answered right at an edge
        inner = [at for window in windows[1:-1] for at in window.at]
        assert min(inner) > 1
        assert max(inner) < max_length - 2


def test_windows_of_a_word_without_a_token_is_nowhere(minilm: str) -> None:
    text = "a \u200b b"
    (windows,) = windows_of([(text, [(0, 1), (2, 3), (4, 5)])], load_tokenizer(minilm), 16)
    assert windows[0].words == [0, 1, 2]
    assert windows[0].at[1] == NOWHERE
    with pytest.raises(ConfigError, match="windows of 14 tokens cannot share 14"):
        windows_of([(text, [(0, 1)])], load_tokenizer(minilm), 16, 14)


def test_loss_equals_transformers_own(tiny_encoder: Path, tmp_path: Path) -> None:
    splits = read(write(tmp_path / "words.jsonl", ROWS))
    task, tokenizer = TASK.with_labels(splits.labels or ()), load_tokenizer(str(tiny_encoder))
    model = load_model(str(tiny_encoder), task, splits)
    batch = task.collator.collate(task.encode(splits.train, tokenizer, splits, 64), tokenizer)
    theirs = model(**batch)
    torch.testing.assert_close(task.objective.loss(theirs, batch), theirs.loss)
    assert task.objective.num_targets(batch) == 8


# predictions


def test_predictions_join_windows_and_answer_words_without_a_token() -> None:
    tags = np.array([[0, 1, NOBODY], [1, UNREAD, 2], [2, NOBODY, NOBODY]])
    found = TagPredictions(0.5, tags, tags.clip(-1), np.full((3, 3), 0.5), np.array([4, 4, 7]), ("B-A", "I-A", "O"))
    assert found.rows == 2
    assert found.tag_names == [("B-A", "I-A", "I-A", "O", "O"), ("O",)]
    assert found.certainties == [[0.5] * 5, [0.5]]
    assert found.num_targets == 5
    assert metrics_of(found, resamples=100)["entity_f1"]["value"] == 1.0
    broken = TagPredictions(0.5, tags, None, np.full((3, 3), np.nan), np.array([4, 4, 7]), ("B-A", "I-A", "O"))
    assert not broken.finite


def test_train_rows_longer_than_the_model_are_answered_whole(
    tiny_encoder: Path, gloss_texts: list[str], tmp_path: Path
) -> None:
    rows = []
    for text in gloss_texts:
        words = text.split()
        rows.append({"tokens": words, "tags": ["B-X" if len(word) > 6 else "O" for word in words]})
    config = {
        "model": str(tiny_encoder), "task": "token-classification", "method": {"name": "lora", "r": 2},
        "data": {"train": write(tmp_path / "rows.jsonl", rows), "test": 40, "validation": 40, "max_length": 16},
        "training": {"num_train_epochs": 2, "learning_rate": 0.01}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    run = train(RunConfig.build(config))
    assert run.manifest["task_settings"]["scheme"] == "bio"
    assert "windows" in {finding["code"] for finding in run.manifest["data"]["findings"]}
    result = evaluate(run)
    assert result["rows"] == 40
    assert result["metrics"] == run.manifest["metrics"]["test"]
    text = ", ".join(gloss_texts[:3])
    (answer,) = predict(run, [text])["predictions"]
    assert len(answer["tags"]) == len(words_of(text))
    assert answer["text"] == text
    for entity in answer["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
    given = [{"tokens": row["tokens"]} for row in rows[:3]]
    answers = predict(run, data=write(tmp_path / "asked.jsonl", given))["predictions"]
    assert [answer["tokens"] for answer in answers] == [row["tokens"] for row in given]
    assert [len(answer["tags"]) for answer in answers] == [len(row["tokens"]) for row in given]
    assert all(
        " ".join(answer["tokens"][entity["start"] : entity["end"]]) == entity["text"]
        for answer in answers
        for entity in answer["entities"]
    )
