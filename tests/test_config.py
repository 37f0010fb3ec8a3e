"""Run files: what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftwerk.config import RunConfig, parse_overrides
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
