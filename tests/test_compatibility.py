"""Files of graftwerk 0.1.0 still work: a run file, run folders, an adapter folder of each method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import graftwerk as gw
from graftwerk import errors
from graftwerk.errors import ResourceError
from graftwerk.reporting.files import hint_of

FIXTURES = Path(__file__).parent / "fixtures"
OLD = FIXTURES / "graftwerk_0_1_0"
"""Run files in it say `pkg://graftwerk_0_1_0/...`, which is found on the import path."""
METHODS = sorted(folder.name for folder in (OLD / "adapters").iterdir())
SCORES = json.loads((OLD / "logits.json").read_text())


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIXTURES)


def _copy(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / name
    shutil.copytree(OLD / name, folder)
    return folder


def _moved(folder: Path) -> Path:
    """Return the run's settings with its new folder, and today's default rows of an evaluation in place of 64."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    assert tree["training"].pop("per_device_eval_batch_size") == 64
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**tree, "output_dir": str(folder)}))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_adapter_of_0_1_0_loads_and_scores_as_then(method: str) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(OLD / "model", num_labels=3).eval()
    gw.load(model, OLD / "adapters" / method)
    with torch.no_grad():
        scores = model(*(torch.tensor(SCORES[name]) for name in ("input_ids", "attention_mask"))).logits
    torch.testing.assert_close(scores, torch.tensor(SCORES["logits"][method]), rtol=1e-5, atol=1e-5)


def test_stopped_run_of_0_1_0_resumes_to_what_0_1_0_reached(tmp_path: Path) -> None:
    folder = _copy("stopped", tmp_path)
    gw.train(_moved(folder), resume=True)
    then, now = (json.loads((run / "manifest.json").read_text()) for run in (OLD / "finished", folder))
    assert (now["status"], now["best"]["step"]) == ("finished", then["best"]["step"])
    last = Path("checkpoints") / "step-000018" / "adapter.safetensors"
    torch.testing.assert_close(load_file(folder / last), load_file(OLD / "finished" / last), rtol=1e-4, atol=1e-5)


def test_finished_run_of_0_1_0_evaluates_to_its_own_metrics(tmp_path: Path) -> None:
    folder = _copy("finished", tmp_path)
    then = json.loads((folder / "manifest.json").read_text())["metrics"]["test"]
    found = gw.evaluate(folder)
    assert found["split"] == "test"
    assert {name: value["value"] for name, value in found["metrics"].items()} == pytest.approx(
        {name: value["value"] for name, value in then.items()}, abs=1e-6
    )
    assert gw.train(_moved(folder), resume=True).manifest["status"] == "finished"  # nothing is left to do


def test_run_file_of_0_1_0_trains(tmp_path: Path) -> None:
    run = gw.train(OLD / "run.yaml", output_dir=str(tmp_path / "run"), max_steps=2)
    assert run.manifest["status"] == "finished"


def test_report_of_a_run_of_0_1_0_shows_its_hint() -> None:
    error = json.loads((OLD / "stopped" / "manifest.json").read_text())["error"]
    assert hint_of(error) == "the same command with --resume goes on from there"


def test_names_of_0_1_0_are_those_of_today() -> None:
    assert gw.Adapter is gw.Adapter
    assert gw.grafts is gw.adapters
    with pytest.warns(DeprecationWarning, match="ResourceError"):
        assert errors.EnvironmentFault is ResourceError
    with pytest.warns(DeprecationWarning, match="RunInterrupted"):
        assert errors.Interrupted is errors.RunInterrupted
    error = ResourceError("full", hint="clear it", recovered="step 4")
    said = error.as_dict()
    assert (said["mend"], said["kept"]) == (said["hint"], said["recovered"]) == ("clear it", "step 4")
    with pytest.warns(DeprecationWarning, match="hint"):
        assert error.mend == error.hint
    with pytest.warns(DeprecationWarning, match="recovered"):
        assert error.kept == error.recovered
    with pytest.warns(DeprecationWarning, match="ErrorReport"):
        assert errors.Explained is errors.ErrorReport
