"""Settings of prefix, prompt and P-tuning: what they imply, what contradicts itself, what would do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from graftwerk.errors import ConfigError
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.methods.prompt_tuning import Prompt
from graftwerk.methods.ptuning import PTuning
from graftwerk.methods.registry import parse_method


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_init_text_implies_init_from_text(method: str) -> None:
    for values in ({"init_text": "a film"}, {"prompt_tuning_init_text": "a film"}):
        settings = parse_method({"name": method, **values})
        assert isinstance(settings, Prefix | Prompt)
        assert settings.init == "text"
        assert settings.wants_token_ids
        tokenized = settings.with_token_ids([4, 5])
        assert not tokenized.wants_token_ids
        assert tokenized.start_ids(10) == (4, 5) * 10
        assert parse_method(tokenized.to_dict()) == tokenized
    assert parse_method({"name": method, "init_token_ids": [4]}).to_dict()["init"] == "text"
    assert Prompt().start_ids(10) is None


def test_init_aliases_are_accepted() -> None:
    assert Prefix.parse({"reparametrization": True}) == Prefix(prefix_projection=True)
    assert Prompt.parse({"prompt_tuning_init": "TEXT", "init_text": "a"}) == Prompt(init_text="a")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "prompt", "init": "text"}, "needs `init_text` or `init_token_ids`"),
        ({"name": "prompt", "init": "random", "init_text": "a film"}, "but `init` is `random`"),
        ({"name": "prefix", "num_virtual_tokens": 0}, "num_virtual_tokens"),
        (
            {"name": "prefix", "encoder_hidden_size": 8},
            "`encoder_hidden_size` has no effect without `prefix_projection`",
        ),
        ({"name": "prefix", "init_text": "a film", "init_std": 0.1}, "`init_std` has no effect on a start from text"),
        ({"name": "ptuning", "encoder_num_layers": 3}, "no effect with MLP"),
        ({"name": "ptuning", "encoder_dropout": 0.1}, "`encoder_dropout` works between the layers"),
        (
            {
                "name": "ptuning",
                "encoder_reparameterization_type": "LSTM",
                "encoder_num_layers": 1,
                "encoder_dropout": 0.1,
            },
            "`encoder_dropout` works between the layers",
        ),
        (
            {"name": "ptuning", "encoder_reparameterization_type": "NONE", "encoder_hidden_size": 3},
            "there is no network",
        ),
        ({"name": "ptuning", "init_text": "a film"}, "no setting `init_text`"),
        ({"name": "prompt", "num_virtual_token": 3}, "did you mean `num_virtual_tokens`"),
    ],
)
def test_init_contradicting_settings_raise(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_method(values)
    assert words in str(caught.value)


def test_num_vector_parameters_equals_hand_count() -> None:
    """BERT base: 12 attentions of width 768."""
    assert Prefix().num_vector_parameters([768] * 12, [768]) == 20 * 12 * 2 * 768 == 368_640
    network = Prefix(prefix_projection=True, encoder_hidden_size=512)
    assert network.num_vector_parameters([768] * 12, [768]) == 20 * 768 + 768 * 512 + 512 + 512 * 18_432 + 18_432
    assert Prompt().num_vector_parameters(768) == 15_360
    assert PTuning(encoder_hidden_size=128).num_vector_parameters(768) == 15_360 + 98_432 + 16_512 + 99_072
    lstm = PTuning(encoder_reparameterization_type="LSTM", encoder_hidden_size=128)
    assert lstm.num_vector_parameters(768) == 15_360 + 919_552 + 395_264 + 65_792 + 197_376


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_start_ids_repeat_the_text_and_refuse_ids_beyond_the_vocabulary(method: str) -> None:
    built: Any = parse_method({"name": method, "num_virtual_tokens": 5, "init_token_ids": [4, 9]})
    assert built.start_ids(10) == (4, 9, 4, 9, 4)
    with pytest.raises(ConfigError, match="token id 9 is not in the model's vocabulary of 9"):
        built.start_ids(9)
