"""Augmented rows in a run: made before training, counted apart, never held out, part of what the run is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.augmentation.augment import augment
from graftwerk.errors import ConflictError, DataError
from graftwerk.evaluation.evaluate import evaluate
from graftwerk.training.run_dir import Run, RunDir
from graftwerk.training.train import train

Tree = dict[str, Any]
DROPOUT = {"name": "word_dropout", "probability": 0.3, "n": 2}


@pytest.fixture
def with_augment(run_file: Callable[..., Tree]) -> Callable[..., Tree]:
    def build(*augmenters: Any, **training: Any) -> Tree:
        tree = run_file(max_steps=2, eval_steps=2, **training)
        tree["data"]["augment"] = list(augmenters)
        return tree

    return build


def test_augmented_rows_are_made_counted_and_reused(with_augment: Callable[..., Tree]) -> None:
    tree = with_augment(DROPOUT, {"name": "word_shuffle", "weight": 2.0})
    folder = Path(tree["output_dir"])
    before = augment(tree)  # by hand, as `graftwerk augment run.yaml` does: the run takes what is there
    stamp = (folder / "augmented.jsonl").stat().st_mtime_ns
    run = train(tree)
    assert (folder / "augmented.jsonl").stat().st_mtime_ns == stamp
    data = run.manifest["data"]
    dropped, shuffled = data["augmented"]["made"]
    assert before.counts == (dropped, shuffled)
    assert data["rows"]["train"] == 36
    assert data["rows"]["augmented"] == dropped["made"] + 2 * shuffled["made"]
    real = json.loads((folder / "adapter" / "graftwerk.json").read_text())["data"]["fingerprint"]
    assert real == data["fingerprint"]
    card = (folder / "adapter" / "README.md").read_text()
    assert f"augmented: {dropped['made']:,} rows by word\\_dropout" in card
    held = {row["text"] for split in ("validation", "test") for row in held_out(tree, split)}
    originals = {json.loads(line)["origin"]["row"] for line in (folder / "augmented.jsonl").read_text().splitlines()}
    from graftwerk.data.keyed_rng import fingerprint

    assert not originals & {fingerprint(text) for text in held}
    assert evaluate(run)["rows"] == 12, "the held-out rows are still those of the run"
    with pytest.raises(ConflictError, match=r"data\.augment"):
        train({**tree, "data": {**tree["data"], "augment": [DROPOUT]}}, resume=True)
    tree["data"]["augment"] = []
    again = train(tree, overwrite=True)
    assert "augmented" not in again.manifest["data"]["rows"]
    assert not (folder / "augmented.jsonl").exists(), "what an earlier run made is not left lying there"


def held_out(tree: Tree, split: str) -> Any:
    from graftwerk.config import RunConfig

    settings = RunConfig.build(tree)
    return getattr(settings.task.read(settings.data), split)


def test_augmented_rows_from_file_are_trained_on(
    with_augment: Callable[..., Tree], glosses: Path, tmp_path: Path
) -> None:
    tree = with_augment(DROPOUT)
    made = augment(tree, out=tmp_path / "mine.jsonl")
    tree["data"]["augment"] = [{"name": "file", "path": str(made.path)}]
    run = train(tree)
    assert run.manifest["data"]["rows"]["augmented"] == made.rows
    assert run.manifest["data"]["augmented"]["files"] == [str(made.path)]
    assert not (Path(tree["output_dir"]) / "augmented.jsonl").exists()

    # all rows of the source, and so the held-out ones too
    rows = [json.loads(line) for line in glosses.read_text().splitlines()]
    wanted = set(tree["data"]["filter"]["label"])
    augment(data=[row for row in rows if row["label"] in wanted], by=DROPOUT, out=tmp_path / "all.jsonl")
    tree["data"]["augment"] = [{"name": "file", "path": str(tmp_path / "all.jsonl")}]
    with pytest.raises(DataError, match="were made from validation rows"):
        train(tree, overwrite=True)


def test_augmented_rows_changed_refuses_resume(with_augment: Callable[..., Tree], tmp_path: Path) -> None:
    tree = with_augment(DROPOUT, save_steps=1)
    made = augment(tree, out=tmp_path / "mine.jsonl")
    tree["data"]["augment"] = [{"name": "file", "path": str(made.path)}]
    folder = Path(tree["output_dir"])
    train(tree)
    manifest = Run(folder).manifest
    RunDir(folder).write_manifest({**manifest, "status": "interrupted"})
    made.path.write_bytes(made.path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ConflictError, match="data"):
        train(tree, resume=True)
