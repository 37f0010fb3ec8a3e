"""Trackers: what they get, and that a run does not depend on them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graftwerk.errors import ConfigError, ResourceError
from graftwerk.training.callbacks import trackers
from graftwerk.training.callbacks.trackers import MLflow, Service, Tracking, check_trackers, numbers
from graftwerk.training.events import Event
from graftwerk.training.train import train


class Kept(Service):
    """A tracker that keeps what it gets, and fails where it is told to."""

    name = "kept"

    def __init__(self, fails: str = "") -> None:
        self.fails, self.got = fails, list[Any]()
        self.waits = threading.Event()
        self.waits.set()

    def _do(self, what: str, *values: Any) -> None:
        self.waits.wait(20)
        self.got.append((what, *values))
        if what == self.fails:
            raise RuntimeError("no route to api_key=abcdefghijklmnop\n\x1b[2J")

    def open(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        self._do("open", dict(settings), known)
        return known or "run-1"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._do("log", dict(values), step)

    def finish(self, values: Mapping[str, float], step: int, adapter: Path) -> None:
        self._do("finish", dict(values), step, adapter.name)

    def close(self, finished: bool) -> None:
        self._do("close", finished)


EVENTS = [
    Event("phase", 0, name="reading"),
    Event("step", 1, loss=0.5, grad_norm=float("inf"), skipped=True),
    Event("evaluation", 1, metrics={"accuracy": 0.5}),
    Event("finish", 2, metrics={"test": {"accuracy": {"value": 0.8, "low": 0.7}}}, cost={"steps": 2}),
]


def follow(service: Service, folder: Path, **options: Any) -> list[str]:
    said: list[str] = []
    options = {"resumed": False, **options}
    tracking = Tracking(service, folder, {"training": {"seed": 0}, "model": "m"}, on_trouble=said.append, **options)
    for event in EVENTS:
        tracking(event)
    tracking.close()
    return said


def test_tracking_sends_settings_curves_metrics_and_adapter(tmp_path: Path) -> None:
    service = Kept()
    assert follow(service, tmp_path) == []
    assert service.got == [
        ("open", {"training.seed": 0, "model": "m"}, None),
        ("log", {"train/loss": 0.5}, 1),
        ("log", {"validation/metrics/accuracy": 0.5}, 1),
        ("finish", {"test/accuracy": 0.8, "test/accuracy/low": 0.7, "cost/steps": 2.0}, 2, "adapter"),
        ("close", True),
    ]
    again = Kept()
    follow(again, tmp_path, resumed=True)
    assert again.got[0][2] == "run-1"


@pytest.mark.parametrize("where", ["open", "log", "finish"])
def test_tracking_failure_is_one_warning(tmp_path: Path, where: str) -> None:
    service = Kept(fails=where)
    (said,) = follow(service, tmp_path)
    assert said.startswith("the tracker kept failed: RuntimeError: no route to")
    assert "continues without it" in said
    assert "abcdefghijklmnop" not in said
    assert "\x1b" not in said
    assert [what for what, *_ in service.got].count("close") == (where != "open")


def test_tracking_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    service = Kept()
    service.waits.clear()
    (said,) = follow(service, tmp_path, close_seconds=0.05)
    assert "has not taken everything within 0.05 seconds" in said
    service.waits.set()


def test_tracking_too_slow_counts_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WAITING", 2)
    service, said = Kept(), list[str]()
    service.waits.clear()
    tracking = Tracking(service, tmp_path, {}, resumed=False, on_trouble=said.append)
    for step in range(5):
        tracking(Event("step", step, loss=1.0))
    service.waits.set()
    tracking.close()
    assert said == [
        "the tracker kept failed: it was too slow, and 3 events were left out; the run continues without it"
    ]


def test_numbers_leaves_out_what_is_none() -> None:
    assert numbers({"a": {"value": 1}, "b": True, "c": "x", "d": None, "e": float("nan")}) == {"a": 1.0}


def test_check_trackers_missing_package_or_key_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_trackers(["jsonl", "tensorboard"])
    monkeypatch.setattr(trackers, "installed", lambda name: False)
    with pytest.raises(ResourceError, match="mlflow, which is not installed") as caught:
        check_trackers(["mlflow"])
    assert "graftwerk[mlflow]" in str(caught.value.hint)
    monkeypatch.setattr(trackers, "installed", lambda name: True)
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="no key") as caught:
        check_trackers(["wandb"])
    assert "WANDB_MODE=offline" in str(caught.value.hint)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password none\n")
    check_trackers(["wandb"])
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


@pytest.fixture
def settings(tiny_encoder: Path, glosses: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_encoder),
        "method": "ia3",
        "data": {"train": str(glosses), "validation": 24, "test": 24, "max_train_rows": 32},
        "training": {"max_steps": 2, "logging_steps": 1},
        "output_dir": str(tmp_path / "runs" / "tracked"),
    }


def test_train_with_a_tracker_that_fails_finishes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "installed", lambda name: True)
    monkeypatch.setattr(MLflow, "open", Kept(fails="open").open)
    events: list[Event] = []
    run = train(settings, report_to=["jsonl", "mlflow"], listener=events.append)
    assert run.manifest["status"] == "finished"
    said = [event.values["text"] for event in events if event.kind == "warning"]
    assert [text for text in said if "the tracker mlflow failed" in text] == said
    assert len(said) == 1


@pytest.mark.slow
def test_train_tracked_by_wandb_offline(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    events: list[Event] = []
    run = train(settings, report_to=["wandb"], listener=events.append)
    assert [event for event in events if event.kind == "warning"] == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    content = file.read_bytes()
    names = ("training.max_steps", "train/loss", "validation/loss", "test/accuracy", "adapter_model.safetensors")
    for part in map(str.encode, names):
        assert part in content, part
    assert (run.folder / "trackers" / "wandb.txt").read_text().strip() in folder.name


@pytest.mark.slow
def test_train_tracked_by_mlflow_in_a_database(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    from mlflow.tracking import MlflowClient

    events: list[Event] = []
    run = train(settings, report_to=["mlflow"], listener=events.append)
    assert [event for event in events if event.kind == "warning"] == []
    client = MlflowClient()
    experiment = client.get_experiment_by_name("graftwerk")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "tracked")
    assert found.data.params["training.max_steps"] == "2"
    assert found.data.metrics["test/accuracy"] == run.manifest["metrics"]["test"]["accuracy"]["value"]
    assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 2
    names = {Path(file.path).name for file in client.list_artifacts(found.info.run_id, "adapter")}
    assert names == {path.name for path in run.adapter.iterdir()}
