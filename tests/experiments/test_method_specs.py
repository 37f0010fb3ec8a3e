"""Methods and seeds as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from graftwerk.errors import ConfigError
from graftwerk.experiments.method_specs import parse_method_specs, parse_seeds, settings_not_used
from graftwerk.methods.lora import LoRA


def test_parse_method_specs_accepts_names_mappings_and_methods() -> None:
    entries = parse_method_specs(
        ["lora", "dora", {"name": "lora", "r": 16}, {"label": "tiny", "name": "lora", "r": 2}, LoRA(r=4)]
    )
    assert [entry.name for entry in entries] == ["lora", "dora", "lora-r16", "tiny", "lora-r4"]
    assert entries[0].method == LoRA()
    assert entries[1].method == LoRA(use_dora=True)
    assert entries[2].method == LoRA(r=16)
    assert entries[3].method == LoRA(r=2)


def test_parse_method_specs_splits_text_at_commas() -> None:
    assert [entry.name for entry in parse_method_specs(" full, lora ,houlsby,")] == ["full", "lora", "houlsby"]


def test_parse_method_specs_names_are_valid_folder_names() -> None:
    entry = parse_method_specs([{"name": "lora", "target_modules": ["query", "value"], "lora_alpha": 2.5}])[0]
    assert entry.name == "lora-target_modules-query-value-lora_alpha2.5"


def test_settings_not_used_by_bare_name_are_named() -> None:
    own = {"name": "lora", "r": 16, "target_modules": ["query"]}
    (said,) = settings_not_used(parse_method_specs("lora,ia3"), own)
    assert "without the run file's target_modules=['query'], r=16" in said
    assert "methods='[{name: lora, target_modules: [query], r: 16}]'" in said
    for entries, method in (("ia3", own), ([own], own), ("lora", "lora"), ("lora", {"name": "lora", "r": 8}),
                            ("lora", None), ("lora", {"name": "lora", "r": "many"})):  # fmt: skip
        assert not settings_not_used(parse_method_specs(entries), method), (entries, method)


def test_parse_method_specs_own_learning_rates() -> None:
    entries = parse_method_specs(
        ["lora", {"name": "lora", "learning_rate": 5e-3}, {"name": "ia3", "head_learning_rate": 1}]
    )
    assert [entry.name for entry in entries] == ["lora", "lora-learning_rate0.005", "ia3-head_learning_rate1"]
    assert entries[1].method == LoRA()
    tree = {"training": {"learning_rate": "auto", "seed": 3}}
    assert entries[0].changed(tree)["training"] == {"learning_rate": "auto", "seed": 3}
    assert entries[1].changed(tree)["training"] == {"learning_rate": 5e-3, "seed": 3}
    assert entries[2].changed(tree)["training"] == {"learning_rate": "auto", "head_learning_rate": 1, "seed": 3}


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ([], "no methods"),
        ("", "no methods"),
        (["lora", "lora"], "same method"),
        (["lora", {"name": "lora", "r": 8}], "same method"),
        (["dora", {"name": "lora", "use_dora": True, "label": "d"}], "same method"),
        ([{"label": "x", "name": "lora"}, {"label": "X", "name": "full"}], "two methods would be called"),
        ([{"label": "../up", "name": "lora"}], "a label is"),
        ([{"label": "", "name": "lora"}], "a label is"),
        ([{"label": "a/b", "name": "lora"}], "a label is"),
        (["loar"], "no method"),
        ([{"name": "lora", "rnk": 3}], "no setting"),
        ([{"name": "lora", "target_modules": ["x" * 80]}], "too long"),
        ([7], "a method is a name"),
        ([{"name": "lora", "learning_rate": -1}], "learning_rate"),
        ([{"name": "lora", "learning_rate": 1}, {"name": "lora", "r": 8, "learning_rate": 1}], "same method"),
    ],
)
def test_parse_method_specs_invalid_value_raises(methods: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_method_specs(methods)


@pytest.mark.parametrize(("given", "wanted"), [("0,1, 2", [0, 1, 2]), ((3, 1), [3, 1]), (4, [4]), ("7", [7])])
def test_parse_seeds_accepts_numbers_lists_and_text(given: Any, wanted: list[int]) -> None:
    assert parse_seeds(given) == wanted


@pytest.mark.parametrize("given", ["", [], "a", [-1], [0, 0], [True], [1.5], "1.5", [None]])
def test_parse_seeds_invalid_value_raises(given: Any) -> None:
    with pytest.raises(ConfigError, match="seed"):
        parse_seeds(given)
