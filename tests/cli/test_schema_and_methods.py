"""What `graftwerk schema` and `graftwerk methods` say comes from the settings models and the methods' own files."""

from __future__ import annotations

from typing import Any

import pytest

from graftwerk.cli.methods import describe_methods, notes_on
from graftwerk.cli.schema import describe
from graftwerk.config import RunConfig
from graftwerk.methods.registry import METHODS, SHORTHANDS, parse_method
from graftwerk.schema import run_keys, run_schema
from graftwerk.settings_parsing import known_keys
from tests.cli.commands import Run


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Enough of JSON schema to try run files on ours."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    for word, count in (("anyOf", any), ("oneOf", lambda found: sum(found) == 1)):
        if word in schema:
            return bool(count([accepts(option, value, root) for option in schema[word]]))
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return bool(value == schema["const"])
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    kind = schema.get("type")
    if kind in kinds:
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number")):
            return False
        return not (
            value is not None
            and kind in ("integer", "number")
            and (
                value < schema.get("minimum", value)
                or value > schema.get("maximum", value)
                or value <= schema.get("exclusiveMinimum", value - 1)
                or value >= schema.get("exclusiveMaximum", value + 1)
            )
        )
    if kind == "array":
        return isinstance(value, list) and all(accepts(schema.get("items", {}), item, root) for item in value)
    if kind == "object" or "properties" in schema:
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", True)
        return (
            isinstance(value, dict)
            and all(name in value for name in schema.get("required", []))
            and all(
                accepts(known[name], item, root)
                if name in known
                else (accepts(more, item, root) if isinstance(more, dict) else more)
                for name, item in value.items()
            )
        )
    return True


RUN = {"model": "m", "data": {"train": "rows.csv"}, "method": "lora"}


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"method": {"name": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj"]}}, True),
        ({"method": {"name": "dora", "rank": 4}}, True),
        ({"method": {"name": "lora", "r": 0}}, False),
        ({"method": {"name": "lora", "adapter_size": 8}}, False),
        ({"method": "lorra"}, False),
        ({"method": {"r": 8}}, False),
        ({"training": {"lr": 1e-3, "epochs": 2}}, True),
        ({"training": {"learning_rate": "auto"}}, True),
        ({"training": {"learning_rate": "fast"}}, False),
        ({"trainin": {}}, False),
        ({"data": {"train": "x", "validation": 0.2, "filter": {"source": ["a", "b"]}}}, True),
        ({"data": {}}, False),
        ({"data": {"train": "x", "augment": ["word_dropout", {"name": "word_shuffle", "distance": 2}]}}, True),
        ({"data": {"train": "x", "augment": {"name": "word_dropout", "n": 2}}}, True),
        ({"data": {"train": "x", "augment": [{"name": "back_translation", "model": "m"}]}}, True),
        ({"data": {"train": "x", "augment": [{"name": "back_translation"}]}}, False),
        ({"data": {"train": "x", "augment": [{"name": "word_dropout", "distance": 2}]}}, False),
    ],
)
def test_run_schema_agrees_with_run_config(change: dict[str, Any], right: bool) -> None:
    tree = {**RUN, **change}
    schema = run_schema()
    assert accepts(schema, tree, schema) is right
    from graftwerk.errors import ConfigError

    if right:
        RunConfig.build(tree)
    else:
        with pytest.raises(ConfigError):
            RunConfig.build(tree)


def test_run_schema_has_every_method_setting() -> None:
    schema = run_schema()
    names = set()
    for method in METHODS.values():
        own = schema["$defs"][method.__name__]
        assert known_keys(method) | {"name"} == set(own["properties"]), method
        assert own["additionalProperties"] is False
        names.update(own["properties"]["name"]["enum"])
    assert names == {*METHODS, *SHORTHANDS}


def test_run_keys_all_have_a_meaning() -> None:
    keys = list(run_keys())
    assert len(keys) > 60
    assert [key["key"] for key in keys if not key["meaning"]] == []
    assert {key["key"] for key in keys if key["required"] and "(" not in key["key"]} == {
        "model",
        "data.train",
        "method",
    }
    rate = next(key for key in keys if key["key"] == "training.learning_rate")
    assert rate["kind"] == "number > 0 | auto"
    assert rate["default"] == "auto"
    kinds = {key["key"]: key["kind"] for key in keys}
    assert kinds["data.allow"] == "list of text"
    assert kinds["method(lora).modules_to_save"] == "list of text | auto"


def test_schema_command_prints_keys(graftwerk: Run) -> None:
    said = graftwerk("schema", "--json")
    assert said.code == 0
    assert said.json["properties"]["model"]
    assert said.err == ""
    said = graftwerk("schema")
    assert "training.per_device_train_batch_size" in said.out
    assert "method(lora).r" in said.out


def test_methods_command_prints_every_method(graftwerk: Run) -> None:
    said = graftwerk("methods", "--json")
    assert said.code == 0
    rows = {row["name"]: row for row in said.json["methods"]}
    assert set(rows) == set(METHODS)
    lora = rows["lora"]
    assert lora["paper"].startswith("Hu et al. 2021")
    assert lora["mergeable"] is True
    assert lora["peft_type"] == "LORA"
    assert lora["learning_rate"] == METHODS["lora"].default_learning_rate
    assert lora["parameters"].startswith("r (in + out) for each adapted layer")
    assert "classification" in lora["tasks"]
    assert rows["bottleneck"]["peft_type"] is None
    said = graftwerk("methods")
    for row in rows.values():
        assert row["title"] in said.out
    for shorthand in SHORTHANDS:
        assert f"{shorthand} is short for" in said.out


@pytest.mark.parametrize("name", list(METHODS))
def test_method_docstring_states_cost(name: str) -> None:
    for subject in ("Parameters", "Trade-off"):
        assert notes_on(METHODS[name], subject).endswith("."), subject
    row = next(row for row in describe_methods() if row["name"] == name)
    parse_method({"name": name})
    assert row["settings"] == list(METHODS[name].model_fields)


def keys_shown(text: str) -> list[str]:
    return [line.partition(": ")[0] for line in text.splitlines() if not line.startswith(" ")]


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("training.adam_", {"training.adam_beta1", "training.adam_beta2", "training.adam_epsilon"}),
        ("data.delimiter", {"data.delimiter"}),
        ("method.lora.r", {"method(lora).r"}),
        ("lora.r", {"method(lora).r"}),
        ("method(lora).use_", {"method(lora).use_dora", "method(lora).use_rslora"}),
        ("method.mini_r", {"method(miss).mini_r"}),
    ],
)
def test_schema_prefix_shows_a_part(graftwerk: Run, prefix: str, shown: set[str]) -> None:
    said = graftwerk("schema", prefix)
    assert said.code == 0
    assert set(keys_shown(said.out)) == shown
    assert {key["key"] for key in graftwerk("schema", prefix, "--json").json["keys"]} == shown


def test_schema_lines_hold_whole_words(graftwerk: Run) -> None:
    said = graftwerk("schema").out
    assert keys_shown(said) == [key["key"] for key in run_keys()]
    words = {word for key in run_keys() for word in f"{key['key']}: ({key['kind']}) {key['meaning']}".split()}
    assert words <= set(said.split())
    assert describe(next(key for key in run_keys() if key["key"] == "data.delimiter"), 30).splitlines()[:3] == [
        "data.delimiter: null  (text |", "        null)", "    the character between the",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [("epochs", "`training.num_train_epochs`"), ("lroa", "did you mean `lora`?")],
)
def test_schema_unknown_prefix_leads_to_keys(graftwerk: Run, prefix: str, hint: str) -> None:
    said = graftwerk("schema", prefix)
    assert (said.code, said.out) == (2, "")
    assert hint in said.err
