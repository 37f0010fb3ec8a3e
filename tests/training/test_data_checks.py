"""The gate before a training: each finding has a file that triggers it, and the batch is shown as it is learnt."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, DataError
from graftwerk.experiments.preflight import preflight
from graftwerk.training.batch_display import show_batch
from graftwerk.training.data_checks import raise_on_severe
from graftwerk.training.train import train
from tests.tiny_text import GNOME

LEAK = {"code": "leakage", "message": "rows leak", "example": "f:1", "hint": "take them out", "grave": True}


@pytest.fixture(scope="session")
def mbart(text_model: Callable[[str], Path]) -> Path:
    return text_model("mbart")


def run(model: Path, folder: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": str(model),
        "task": {"name": "translation", "source_lang": "de_DE", "target_lang": "en_XX"},
        "data": {"train": str(GNOME["de"]), "validation": 6, "max_length": 64, "max_truncated": 1},
        "method": {"name": "lora", "r": 2},
        "output_dir": str(folder / "run"),
    }
    return RunConfig.build(tree, changes)


def test_severe_issues_raise_unless_allowed_by_name() -> None:
    with pytest.raises(DataError, match="rows leak") as caught:
        raise_on_severe([LEAK, {**LEAK, "code": "x", "grave": False, "message": "not this"}], ())
    assert "data.allow=[leakage]" in str(caught.value.hint)
    assert caught.value.where == "f:1"
    assert "not this" not in caught.value.what
    raise_on_severe([LEAK], ("leakage",))
    raise_on_severe([LEAK], ("all",))


def test_allow_unknown_issue_raises(mbart: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no severe issue `leekage`") as caught:
        preflight(run(mbart, tmp_path, **{"data.allow": ["leekage"]}))
    assert "did you mean `leakage`" in str(caught.value.hint)


def test_train_refuses_what_doctor_refuses(tiny_encoder: Path, glosses: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(glosses.read_text(encoding="utf-8").splitlines()[:30]) + "\n")
    tree = {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "test": str(test), "max_train_rows": 24, "max_truncated": 1},
        "method": "bitfit",
        "training": {"max_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(DataError, match="also stand in"):
        train(tree)
    assert not (tmp_path / "run" / "adapter").exists()
    done = train(tree, **{"data.allow": ["leakage"]})
    assert "leakage" in {finding["code"] for finding in done.manifest["data"]["findings"]}
    events = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert any(event["kind"] == "first_batch" for event in events)


def codes(config: RunConfig) -> dict[str, bool]:
    return {finding["code"]: finding["grave"] for finding in preflight(config)["findings"]}


def test_check_encoded_references_over_generation_limit_are_reported(mbart: Path, tmp_path: Path) -> None:
    assert "answer-limit" not in codes(run(mbart, tmp_path))
    assert codes(run(mbart, tmp_path, **{"evaluation.max_new_tokens": 2}))["answer-limit"] is False  # all may be cut
    assert codes(run(mbart, tmp_path, **{"evaluation.max_new_tokens": 2, "data.max_truncated": 0.99}))["answer-limit"]


def test_first_batch_of_encoder_decoder_shows_decoder_targets(mbart: Path, tmp_path: Path) -> None:
    batch = preflight(run(mbart, tmp_path))["first_batch"]
    for row in batch["rows"]:
        assert not any(row["trained"])
        assert "</s>" in row["answer"]
        assert "en_XX" in row["answer"]
        assert "de_DE" in row["tokens"]


BATCH = {
    "shape": [5, 6],
    "rows": [
        {
            "tokens": ["who", "?", "me", "</s>"],
            "trained": [False, False, True, True],
            "padding": 2,
            "label": None,
            "answer": None,
        },
        {"tokens": ["a\x1b[2J"], "trained": [False], "padding": 0, "label": "good", "answer": None},
    ],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_first_batch_is_marked_in_pipe_and_coloured_in_terminal() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    show_batch(BATCH, pipe)
    assert "  1. who ? «me </s>» ·×2\n" in pipe.getvalue()
    assert "-> «good»" in pipe.getvalue()
    assert "\x1b" not in pipe.getvalue()
    assert "and 2 more" in pipe.getvalue()
    row = {**BATCH["rows"][0], "tokens": [f"t{at}" for at in range(51)], "trained": [False] * 51}
    show_batch({"shape": [4, 51], "rows": [row] * 4}, long := io.StringIO())
    assert "  3. t0 t1 t2 " in long.getvalue()
    assert "  4. " not in long.getvalue()
    assert long.getvalue().endswith("  and 1 more\n")
    assert " t22 t23 [3 more] t27 t28 " in long.getvalue()
    show_batch(BATCH, terminal)
    assert "who ? \x1b[32mme </s>\x1b[0m \x1b[2m·×2\x1b[0m" in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
