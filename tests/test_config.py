"""Run files: what is refused before anything is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from graftwerk.absolute_paths import with_absolute_paths
from graftwerk.config import RunConfig, parse_overrides
from graftwerk.data.sources import matching
from graftwerk.errors import ConfigError

FILE = """model: m
data:
  train: rows.jsonl
method: {name: lora, r: 4}
"""


@pytest.mark.parametrize(
    ("content", "key", "first", "second"),
    [
        (f"{FILE}model: other\n", "model", 1, 5),
        ("model: m\ndata:\n  train: a\n  columns: {text: a,\n    text: b}\nmethod: lora\n", "text", 4, 5),
        ("model: m\ndata:\n  train:\n  - source: a\n    weight: 1\n    weight: 2\nmethod: lora\n", "weight", 5, 6),
        ("model: m\nmethod: {name: lora,\n  rank_pattern: {a: 1,\n    a: 2}}\ndata: {train: a}\n", "a", 3, 4),
        ('{"model": "m",\n "data": {"train": "a",\n  "train": "b"},\n "method": "lora"}\n', "train", 2, 3),
        ("model: m\ndata: {train: a}\nmethod: lora\ntraining: {class_weights: {1: 2,\n  1.0: 3}}\n", "1.0", 4, 5),
    ],
)
def test_run_file_with_duplicate_key_is_refused(
    content: str, key: str, first: int, second: int, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"the key `{key}` stands twice, first in line {first}") as caught:
        RunConfig.load(path)
    assert caught.value.where == f"{path}:{second}"


@pytest.mark.parametrize(
    "given",
    [["seed=1", "training.seed=2"], ["method.r=1", "method.r=1"], ["data.filter={a: 1, a: 2}"]],
)
def test_override_given_twice_is_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"twice|both set"):
        parse_overrides(given)


def test_anchored_makes_every_path_to_something_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a [b]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("model", "run"):
        (folder / name).mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.de", "c.en"):
        (folder / name).touch()
    here = str(folder)
    tree = {
        "model": "model",
        "data": {
            "train": ["a.jsonl", "./b.jsonl", "*.jsonl", "owner/name", "pkg://package/rows.csv", "no.jsonl"],
            "validation": {"source": "c.de", "target": "c.en"},
            "test": 0.1,
            "augment": [{"name": "back_translation", "model": "run", "through": {"model": "model", "base": "run"}}],
        },
        "training": {"warm_start": "run"},
        "output_dir": "runs/run",
    }
    found = with_absolute_paths(tree)
    assert found["model"] == f"{here}/model"
    data = found["data"]
    assert [*data["train"][:2], *data["train"][3:]] == [
        f"{here}/a.jsonl", f"{here}/b.jsonl", "owner/name", "pkg://package/rows.csv", "no.jsonl",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in matching(data["train"][2]) or ()] == ["a.jsonl", "b.jsonl"]
    assert data["validation"] == {"source": f"{here}/c.de", "target": f"{here}/c.en"}
    assert data["test"] == 0.1
    (made,) = data["augment"]
    assert (made["model"], made["through"]) == (f"{here}/run", {"model": f"{here}/model", "base": f"{here}/run"})
    assert found["training"]["warm_start"] == f"{here}/run"
    assert found["output_dir"] == "runs/run"
    assert tree["data"]["train"][0] == "a.jsonl", "the tree that is given stays as it is"


def test_anchored_sets_keep_their_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.de").touch()
    sets = [{"source": "a.de", "target": "b.en", "prefix": "a.de", "validation": "a.de", "weight": 2.0}]
    (found,) = with_absolute_paths({"model": "m", "data": {"train": sets}, "output_dir": "x"})["data"]["train"]
    place = str(tmp_path / "a.de")
    assert found == {"source": place, "target": "b.en", "prefix": "a.de", "validation": place, "weight": 2.0}


def test_build_leaves_the_mapping_of_its_caller() -> None:
    tree = {"model": "x", "method": {"name": "lora", "r": 2}, "data": {"train": "y", "columns": {"text": "a"}}}
    before = copy.deepcopy(tree)
    built = RunConfig.build(tree, ["method.r=4", "training.seed=7", "data.columns.label=b"])
    assert built.training.seed == 7
    assert built.data.columns == {"text": "a", "label": "b"}
    assert tree == before


def test_quoted_override_stays_text() -> None:
    tree = {"model": "x", "method": "lora", "data": {"train": "y"}}
    assert RunConfig.build(tree, ["revision='85e2415'"]).revision == "85e2415"
    assert RunConfig.build(tree, ["learning_rate=1e-3"]).training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E3", 1000.0), ("-.5", -0.5), ("1.", 1.0), ("{alpha: 1e1, r: 4}", {"alpha": 10.0, "r": 4}),
        ("nan", "nan"), ("infinity", "infinity"), ("'1e3'", "1e3"), ("[\"1e3\", 1e3]", ["1e3", 1000.0]),
        ("85e2415", "85e2415"), ("1e3x", "1e3x"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_parse_overrides_reads_numbers_as_yaml_1_2(text: str, value: object) -> None:
    assert parse_overrides([f"key={text}"]) == {"key": value}


def test_load_run_file_reads_numbers_as_yaml_1_1(tmp_path: Path) -> None:
    """Run folders of earlier versions hold texts like 1e3 unquoted."""
    path = tmp_path / "run.yaml"
    path.write_text(FILE + "revision: 1e3\ntraining: {learning_rate: 1e-3}\n")
    config = RunConfig.load(path)
    assert (config.revision, config.training.learning_rate) == ("1e3", 1e-3)
    path.write_text(config.dump())
    assert RunConfig.load(path).revision == "1e3"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0.5}, "`evaluation.temperature` does nothing for classification"),
        ({"stop": "a"}, "`evaluation.stop` does nothing for classification"),
        ({"temperature": 1.0, "num_return_sequences": 2, "task": "summarization"}, "measures one answer to a row"),
    ],
)
def test_config_refuses_sampling_that_a_run_does_not_use(given: dict[str, Any], said: str) -> None:
    task = given.pop("task", "classification")
    tree = {"model": "m", "data": {"train": "rows.csv"}, "method": "lora", "task": task, "evaluation": given}
    with pytest.raises(ConfigError, match=said):
        RunConfig.build(tree)
