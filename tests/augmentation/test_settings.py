"""Augmenters as people write them in a run file."""

from __future__ import annotations

from typing import Any

import pytest

from graftwerk.augmentation.settings import (
    AUGMENTERS,
    BackTranslation,
    WordDropout,
    parse_augmenter,
    parse_augmenters,
)
from graftwerk.errors import ConfigError

BT = {"name": "back_translation", "model": "m"}


def test_parse_augmenter_accepts_names_mappings_and_instances() -> None:
    assert parse_augmenter("word-dropout") == parse_augmenter("word_dropout") == WordDropout()
    assert parse_augmenter({"name": "word_dropout", "probability": 0.2}) == WordDropout(probability=0.2)
    assert parse_augmenters(None) == ()
    assert parse_augmenters("word_dropout") == parse_augmenters([WordDropout()]) == (WordDropout(),)


@pytest.mark.parametrize("name", AUGMENTERS)
def test_parse_augmenter_to_dict_roundtrip(name: str) -> None:
    needed = {"file": {"path": "x"}, "back_translation": {"model": "m"}, "forward_translation": {"model": "m"}}
    augmenter = parse_augmenter({"name": name, **needed.get(name, {})})
    assert parse_augmenter(augmenter.to_dict()) == augmenter


def test_making_excludes_weight() -> None:
    assert WordDropout(weight=3).making() == WordDropout().making()
    assert WordDropout(seed=3).making() != WordDropout().making()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("word_dropuot", "did you mean `word_dropout`"),
        ({"name": "word_dropout", "probabilty": 0.1}, "no setting `probabilty`"),
        ({"name": "word_dropout", "probability": 1.0}, "less than 1"),
        ({"name": "word_dropout", "n": 0}, "greater than or equal to 1"),
        ({"name": "word_shuffle", "distance": 0}, "greater than or equal to 1"),
        ({"name": "back_translation"}, "`model`"),
        ({**BT, "num_beams": 4, "temperature": 0.5}, "`temperature` is for sampling"),
        ({**BT, "num_beams": 2, "n": 3}, "2 beams cannot give n = 3"),
        ({**BT, "temperature": 0, "n": 2}, "n must be 1"),
        ({**BT, "temperature": 0, "top_p": 0.5}, "`top_p` does nothing"),
        ({**BT, "tag": ""}, "`tag`"),
        ({"probability": 0.1}, "a mapping with `name`"),
        (7, "a mapping with `name`"),
    ],
)
def test_parse_augmenters_invalid_value_raises(value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_augmenters([value])
    assert said in str(caught.value)


def test_parse_augmenters_duplicate_raises() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_augmenters(["word_dropout", {"name": "word_dropout", "weight": 2}])
    assert len(parse_augmenters(["word_dropout", {"name": "word_dropout", "seed": 2}])) == 2
    with pytest.raises(ConfigError, match="is a list"):
        parse_augmenters(7)


def test_back_translation_through_has_two_legs() -> None:
    settings = parse_augmenter({**BT, "through": {"model": "out"}})
    assert isinstance(settings, BackTranslation)
    assert [leg.model for leg in settings.legs] == ["out", "m"]


def test_noise_has_the_defaults_of_its_papers() -> None:
    assert AUGMENTERS["word_shuffle"]().distance == 3  # type: ignore[attr-defined]
    assert WordDropout().probability == 0.1
