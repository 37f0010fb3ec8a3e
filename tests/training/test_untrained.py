"""Rows without a trained token: they change nothing in any way of training, are counted, and choose no checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.errors import DataError
from graftwerk.evaluation.evaluate import evaluate
from graftwerk.tasks.base import Example
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.example_checks import check_examples
from graftwerk.training.train import Run, train
from tests.training.children import log_of
from tests.training.test_forked_workers import forked

LONG = {
    "messages": [
        {"role": "system", "content": "fly " * 80},
        *({"role": r, "content": "a"} for r in ("user", "assistant")),
    ]
}
Build = Callable[..., Run]


def turn(at: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"what {at}"}, {"role": "assistant", "content": f"act {at}"}]}


@pytest.fixture
def run(tmp_path: Path, tiny_decoder: Path) -> Build:
    """Train on these rows, one row a step in their order of length; the rows without a trained token come together."""

    def run(name: str, rows: list[Any], held: list[Any] | None = None, **changes: Any) -> Run:
        for file, content in (("train", rows), ("held", held or [])):
            (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        tree = {
            "model": str(tiny_decoder),
            "task": {"name": "instruction", "template": "plain"},
            "data": {
                "train": str(tmp_path / "train.jsonl"),
                "validation": str(tmp_path / "held.jsonl") if held else None,
                "max_length": 40,
                "max_truncated": 1,
                "allow": ["all"],
            },
            "method": {"name": "lora", "r": 2},
            "training": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": 1,
                "report_to": ["jsonl"],
                "logging_steps": 1,
            },
            "evaluation": {"generate": False},
            "output_dir": str(tmp_path / name),
        }
        return train(tree, overwrite=True, **changes)

    return run


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packing": {"training.packing": True},
    "token budget": {"training.per_device_train_tokens": 100},
    "streaming": {"data.streaming": True},
    "no clipping": {"training.max_grad_norm": None},
}


@pytest.mark.parametrize("way", WAYS)
def test_train_step_without_trained_token_is_skipped_and_counted(way: str, run: Build) -> None:
    done = run("run", [LONG, *map(turn, range(5))], **WAYS[way])
    assert done.manifest["status"] == "finished"
    assert (done.manifest["cost"]["steps"], done.manifest["cost"]["untrained_steps"]) == (6, 1)
    assert len(log_of(done.folder, "step")) == 5, "a skipped step has no loss"
    (warned,) = log_of(done.folder, "warning")
    assert "no row of this step has a trained token" in warned["text"]


def test_train_step_without_trained_token_is_skipped_by_all_processes(run: Build, tmp_path: Path) -> None:
    """The two longest rows, which have nothing to learn, make one step that two processes share."""
    shared = {"training.processes": 2, "training.per_device_train_batch_size": 2}
    rows = [LONG, LONG, *map(turn, range(4))]
    assert forked(lambda: run("run", rows, **shared)).wait() == 0
    done = Run(tmp_path / "run")
    assert (done.manifest["cost"]["steps"], done.manifest["cost"]["untrained_steps"]) == (3, 1)
    assert len(log_of(done.folder, "step")) == 2


def test_train_step_with_untrained_micro_batch_equals_step_without_it(run: Build) -> None:
    """One micro-batch of a step has nothing to learn: the loss is that of the others."""
    losses = {}
    for name, rows in (("with", [LONG, *map(turn, range(3))]), ("without", [*map(turn, range(3))])):
        done = run(name, rows, **{"training.gradient_accumulation_steps": 4})
        (step,) = log_of(done.folder, "step")
        losses[name] = (step["loss"], step["grad_norm"])
    assert losses["with"] == pytest.approx(losses["without"], rel=1e-5)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_train_split_without_any_trained_token_is_refused_even_if_allowed(
    split: str, run: Build, tmp_path: Path
) -> None:
    sets = {"train": [turn(at) for at in range(4)], "validation": [turn(9)], split: [LONG, LONG]}
    with pytest.raises(DataError, match=f"all 2 {split} rows have no trained token left") as caught:
        run("run", sets["train"], sets["validation"])
    assert "data.allow" not in str(caught.value.hint)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_evaluate_rows_without_trained_token_have_no_loss(run: Build, tmp_path: Path) -> None:
    done = run("run", [turn(at) for at in range(4)])
    (tmp_path / "asked.jsonl").write_text(json.dumps(LONG) + "\n")
    measured = evaluate(done, tmp_path / "asked.jsonl")
    assert measured["loss"] is None
    assert "perplexity" not in measured["metrics"]


def test_check_examples_causal_row_of_one_token_is_untrained() -> None:
    """A causal model predicts nothing for the first token of a row."""
    one, two = (Example({"input_ids": ids}, ids) for ids in ([5], [5, 6]))
    assert check_examples("test", [two], task=Causal()) == ()
    (finding,) = check_examples("test", [one, two], task=Causal())
    assert (finding.code, finding.rows) == ("labels-all-masked", 1)
