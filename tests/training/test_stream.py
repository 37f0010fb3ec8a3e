"""Training on streamed rows: the same run as in memory where all fit the buffer, and the same whatever interrupts."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.errors import RunInterrupted
from graftwerk.experiments.preflight import preflight
from graftwerk.training.events import Event
from graftwerk.training.gradients import Gradient, GradientAccumulator
from graftwerk.training.train import Run, train

Tree = dict[str, Any]
Build = Callable[..., Tree]


@pytest.fixture
def tree(tmp_path: Path, run_file: Build, glosses: Path) -> Tree:
    """8 steps of 6 rows an epoch, the last of 3; two epochs."""
    rows = [line for line in glosses.read_text(encoding="utf-8").splitlines() if '"noun.a' in line]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:30] + rows[45:60]) + "\n")
    (tmp_path / "validation.jsonl").write_text("\n".join(rows[30:45]) + "\n")
    settings = run_file(load_best=False)
    settings["data"] = {
        "train": str(tmp_path / "train.jsonl"),
        "validation": str(tmp_path / "validation.jsonl"),
        "max_length": 24,
        "max_truncated": 1.0,
        "streaming": True,
        "buffer_rows": 14,
    }
    return settings


def learnt(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def with_data(tree: Tree, folder: Path, **changes: Any) -> Tree:
    return {**tree, "data": {**tree["data"], **changes}, "output_dir": str(folder)}


def test_stream_large_buffer_equals_run_in_memory(tree: Tree, tmp_path: Path) -> None:
    streamed = train(with_data(tree, tmp_path / "streamed", buffer_rows=60))
    memory = train(with_data(tree, tmp_path / "memory", streaming=False, buffer_rows=10_000))
    assert learnt(streamed) == learnt(memory)
    assert streamed.manifest["data"]["rows"] == memory.manifest["data"]["rows"]
    assert "streamed" in {found["code"] for found in streamed.manifest["data"]["findings"]}


def test_stream_small_buffer_takes_every_row_once(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    seen: list[tuple[int, ...]] = []

    def gradients(self: GradientAccumulator, rows: Any, micro_batch: int) -> Gradient:
        held.append(len(self.batches.sampler.part(rows[0] // 12 * 12)))
        seen.append(tuple(rows))
        assert [self.batches.sampler.examples[row].inputs for row in rows]
        return Gradient(0.0, torch.tensor([1.0, 1.0, 0.0]))

    monkeypatch.setattr(GradientAccumulator, "__call__", gradients)
    train(tree)
    for epoch in (seen[:8], seen[8:]):
        assert Counter(row for rows in epoch for row in rows) == Counter(range(45))
        assert sorted(map(len, epoch)) == [3, 6, 6, 6, 6, 6, 6, 6]
    assert seen[:8] != seen[8:]
    assert max(held) == 12, "14 rows, in whole steps"


def test_stream_interrupted_run_resumes_bit_exact(tree: Tree, tmp_path: Path) -> None:
    whole = train(with_data(tree, tmp_path / "whole"))

    def stop(event: Event) -> None:
        if (event.kind, event.step) == ("step", 11):  # in the second part of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        train(with_data(tree, tmp_path / "stopped"), listener=stop)
    resumed = train(with_data(tree, tmp_path / "stopped"), resume=True)
    assert learnt(resumed) == learnt(whole)


def test_stream_dry_run_counts_steps_and_shows_first_batch(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = preflight(RunConfig.build(tree))
    memory = preflight(RunConfig.build(with_data(tree, Path("x"), streaming=False, buffer_rows=10_000)))
    assert checked["steps"] == memory["steps"] == 16
    assert checked["data"]["truncated"] == memory["data"]["truncated"]
    assert checked["data"]["labels"] == memory["data"]["labels"]
    for key in ("longest", "tokens"):
        assert checked["data"]["lengths"]["train"][key] == memory["data"]["lengths"]["train"][key]
    assert abs(checked["data"]["lengths"]["train"]["median"] - memory["data"]["lengths"]["train"]["median"]) <= 1
    first: list[Any] = []

    def gradients(self: GradientAccumulator, rows: Any, micro_batch: int) -> Gradient:
        first.append({len(self.batches.sampler.examples[row].inputs["input_ids"]) for row in rows})
        return Gradient(0.0, torch.tensor([1.0, 1.0, 0.0]))

    monkeypatch.setattr(GradientAccumulator, "__call__", gradients)
    train(tree)
    assert {len(row["tokens"]) for row in checked["first_batch"]["rows"]} == first[0]


def test_stream_chunked_texts_are_counted_as_trained(tree: Tree, tiny_decoder: Path, tmp_path: Path) -> None:
    tree = {**with_data(tree, tmp_path / "lm", max_length=8), "model": str(tiny_decoder), "task": "causal"}
    run = train(tree)
    rows = run.manifest["data"]["rows"]["train"]
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows > len(texts)
    memory = train({**with_data(tree, tmp_path / "memory", streaming=False, buffer_rows=10_000)})
    assert memory.manifest["data"]["rows"]["train"] == rows
    assert run.manifest["cost"]["steps"] == memory.manifest["cost"]["steps"]
