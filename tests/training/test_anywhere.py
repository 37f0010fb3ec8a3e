"""A run that names its model and rows by relative paths is used, resumed and repeated from any other folder."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwerk.config import RunConfig
from graftwerk.errors import RunInterrupted
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.training.events import Event
from graftwerk.training.resume_check import differences
from graftwerk.training.train import Run, train


@pytest.fixture
def place(tmp_path: Path, tiny_encoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and rows; it is the current one."""
    folder = tmp_path / "work"
    shutil.copytree(tiny_encoder, folder / "models" / "tiny")
    lines = [line for line in glosses.read_text(encoding="utf-8").splitlines() if '"noun.a' in line]
    for name, some in (("a", lines[::3]), ("b", lines[1::3]), ("held", lines[2::3])):
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "model": "models/tiny",
        "data": {"train": ["a.jsonl", "b.jsonl"], "validation": "held.jsonl", "max_truncated": 1},
        "method": "probe",
        "training": {"max_steps": 4, "save_steps": 2, "report_to": ["jsonl"], "processes": 1},
        "evaluation": {"resamples": 100, "latency_batches": 1},
        "output_dir": "runs/run",
        **changes,
    }


def run_again(command: str) -> Run:
    """Run what a manifest or card gives as its command."""
    program, verb, config, *overrides = shlex.split(command)
    assert (program, verb) == ("graftwerk", "train")
    return train(RunConfig.load(config, overrides))


def test_train_with_relative_paths_leaves_a_run_that_is_used_from_anywhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = train(tree())
    before = evaluate(done)["metrics"]["accuracy"]
    monkeypatch.chdir(tmp_path)
    folder = place / "runs" / "run"
    assert evaluate(folder)["metrics"]["accuracy"] == before
    assert predict(folder, ["a ball"])["predictions"]
    assert predict(folder / "adapter", ["a ball"])["predictions"]
    assert train(folder / "config.yaml", resume=True).manifest == Run(folder).manifest
    repeated = run_again(Run(folder).manifest["command"])
    assert repeated.folder != folder
    assert repeated.manifest["metrics"] == Run(folder).manifest["metrics"]
    assert Run(folder).manifest["command"] in (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(place)
    assert train(tree(), resume=True).folder == Path("runs/run"), "the same run from where it began"
    warm = train(tree(training={**tree()["training"], "warm_start": "runs/run"}, output_dir="runs/warm"))
    monkeypatch.chdir(tmp_path)
    assert run_again(Run(place / warm.folder).manifest["command"]).manifest["status"] == "finished"


def test_train_resume_from_another_folder_is_same_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "checkpoint":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        train(tree(), listener=stop)
    monkeypatch.chdir(tmp_path)
    folder = place / "runs" / "run"
    assert train(folder / "config.yaml", resume=True).manifest["status"] == "finished"


def test_differences_of_relative_and_absolute_path_are_none(place: Path) -> None:
    older = {"config": RunConfig.build(tree()).model_dump(mode="json")}
    now = {"config": RunConfig.build(tree()).anchored().model_dump(mode="json")}
    assert older != now
    assert differences(older, now) == []
    other = {"config": RunConfig.build(tree(model="models")).model_dump(mode="json")}
    assert len(differences(older, other)) == 1


def test_differences_of_a_setting_that_did_not_exist_and_is_null_are_none() -> None:
    older, now = {"method": {"r": 8}}, {"method": {"r": 8, "new": None}}
    assert differences(older, now) == []
    assert differences(older, {"method": {"r": 8, "new": 0}}) == ["method.new: (missing) -> 0"]


def test_config_of_run_names_its_own_folder(place: Path) -> None:
    done = train(tree(output_dir="runs/2: #1"))
    written = yaml.safe_load((done.folder / "config.yaml").read_text(encoding="utf-8"))
    assert written["output_dir"] == str(place / "runs" / "2: #1")
    assert run_again(done.manifest["command"]).folder == place / "runs" / "2: #1-repeated"
