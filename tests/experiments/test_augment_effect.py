"""The effect of augmentation, measured like a method: the same runs with and without, on the same held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftwerk.errors import ConfigError
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.compare import compare
from graftwerk.experiments.method_specs import parse_method_specs, with_and_without
from graftwerk.training.run_dir import read_manifest
from tests.experiments.here import InThisProcess


def test_compare_with_and_without_augmentation(
    tiny_encoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    settings = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 48, "augment": [{"name": "word_dropout", "n": 2}]},
        "training": {"max_steps": 2, "eval_steps": 2, "report_to": ["jsonl"]},
        "evaluation": {"latency_batches": 1, "resamples": 100},
        "output_dir": str(tmp_path / "cmp"),
    }
    result = compare(settings, "probe", 0, augment="with,without", quiet=True, report=False).result
    assert [method["name"] for method in result["methods"]] == ["probe-augmented", "probe-plain"]
    assert {(one["a"], one["b"]) for one in result["differences"]} & {
        ("probe-augmented", "probe-plain"),
        ("probe-plain", "probe-augmented"),
    }
    assert "augment=with,without" in result["command"]
    assert "methods=probe " in result["command"]
    rows = {}
    for name in ("probe-augmented", "probe-plain"):
        manifest = read_manifest(tmp_path / "cmp" / f"{name}-seed0")
        assert manifest is not None
        rows[name] = manifest["data"]["rows"]
    assert rows["probe-plain"] == {"train": 168, "validation": 24, "test": 48}
    assert rows["probe-augmented"].pop("augmented") > 168
    assert rows["probe-augmented"] == rows["probe-plain"]


def test_with_and_without_names_and_changes_specs() -> None:
    crossed = with_and_without(parse_method_specs("lora,ia3"), "with,without", True)
    assert [entry.name for entry in crossed] == ["lora-augmented", "lora-plain", "ia3-augmented", "ia3-plain"]
    tree = {"data": {"train": "x", "augment": ["word_dropout"]}}
    assert [entry.changed(tree)["data"]["augment"] for entry in crossed[:2]] == [["word_dropout"], []]
    assert tree["data"]["augment"] == ["word_dropout"]
    assert with_and_without(crossed, None, False) == crossed


@pytest.mark.parametrize("words", ["with,with", "both", "", ["without", "never"]])
def test_with_and_without_invalid_words_raise(words: Any) -> None:
    with pytest.raises(ConfigError, match="not understood"):
        with_and_without(parse_method_specs("lora"), words, True)


def test_with_and_without_no_augmenter_raises() -> None:
    with pytest.raises(ConfigError, match="nothing to do with and without"):
        with_and_without(parse_method_specs("lora"), "with,without", False)
