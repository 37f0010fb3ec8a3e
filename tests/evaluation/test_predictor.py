"""`open`: one object that answers texts and rows as `predict` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graftwerk as gw
from graftwerk.errors import ConfigError, DataError
from tests.exports.conftest import LABELS, make_adapter  # noqa: F401 - a fixture


@pytest.fixture
def folder(tiny_encoder: Path, make_adapter: Any) -> Path:  # noqa: F811
    made: Path = make_adapter(tiny_encoder, "lora", "classification")
    return made


def test_predictor_answers_as_predict_does(folder: Path) -> None:
    predictor = gw.open(folder)
    texts = ["An animal that eats grass.", "A tool."]
    assert predictor(texts) == gw.predict(folder, texts)["predictions"]
    assert predictor(texts[0])["scores"] == pytest.approx(predictor(texts)[0]["scores"])
    assert predictor({"text": texts[0]})["label"] == predictor(texts[0])["label"]
    assert predictor([]) == []
    assert (predictor.labels, predictor.task.name) == (LABELS, "classification")
    assert not predictor.model.training
    assert repr(predictor).startswith("<Predictor: lora for classification on ")


def test_predictor_says_what_was_cut(folder: Path) -> None:
    predictor = gw.open(folder)
    predictor("word " * 200)
    assert predictor.notes == ["1 of 1 rows were cut to 48 tokens"]
    predictor("word")
    assert predictor.notes == []


def test_predictor_refuses_what_is_no_question(folder: Path) -> None:
    predictor = gw.open(folder)
    with pytest.raises(DataError, match="question 2 of 2 is empty"):
        predictor(["a tool", " "])
    with pytest.raises(ConfigError, match="question 1 is int, neither a text nor a row"):
        predictor([7])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no column `text`"):
        predictor({"txt": "a tool"})
    with pytest.raises(DataError, match="cannot be used"):
        predictor({"text": ""})


def test_open_with_settings_of_evaluation_that_do_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="`num_beams` does nothing"):
        gw.open(folder, evaluation={"num_beams": 4})
