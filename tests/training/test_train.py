"""`train` from a run file to a run folder, and everything that it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.errors import (
    AdapterError,
    ConfigError,
    ConflictError,
    DataError,
    DivergedError,
    GraftwerkError,
    ModelError,
    ResourceError,
    RunInterrupted,
    UnsupportedError,
)
from graftwerk.models import load as loading
from graftwerk.serialization.untrusted_files import read_tensors
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import TRANSIENT, Event
from graftwerk.training.train import Run, run_training, train
from tests.training.children import left_by, log_of

Tree = dict[str, Any]
Build = Callable[..., Tree]


def stopping_at(step: int, signum: int = signal.SIGTERM) -> Callable[[Event], None]:
    def listener(event: Event) -> None:
        if (event.kind, event.step) == ("step", step):
            os.kill(os.getpid(), signum)

    return listener


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model here has not checked enough before."""

    def load_model(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_model", load_model)


def test_train_writes_complete_run_folder(run_file: Build, tmp_path: Path) -> None:
    events: list[Event] = []
    run = train(run_file(report_to=["jsonl", "tensorboard"]), listener=events.append)
    assert run.folder == tmp_path / "run"
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest.pop("digest").startswith("sha256:")
    assert manifest == run.manifest
    assert manifest["status"] == "finished"
    assert manifest["format"] == 1
    assert manifest["data"]["rows"] == {"train": 36, "validation": 12, "test": 12}
    assert 0 < manifest["parameters"]["head"] < manifest["parameters"]["trained"] < manifest["parameters"]["total"]
    assert manifest["parameters"]["share"] == manifest["parameters"]["trained"] / manifest["parameters"]["total"]
    assert set(manifest["cost"]) == {
        "training_seconds", "steps", "step_seconds", "peak_memory_bytes", "adapter_bytes", "first_step_seconds",
        "processes",
    }  # fmt: skip
    assert manifest["cost"]["steps"] == 12
    for split in ("validation", "test"):
        figure = manifest["metrics"][split]["accuracy"]
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert manifest["best"]["metric"] == "accuracy"
    assert manifest["best"]["step"] in (4, 8, 12)
    assert manifest["best"]["value"] == manifest["metrics"]["validation"]["accuracy"]["value"]
    assert RunConfig.load(run.folder / "config.yaml").training.learning_rate == 1e-2
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert list((run.folder / "tensorboard").iterdir())
    assert not (run.folder / ".lock").exists()
    logged = [line["kind"] for line in log_of(run.folder)]
    assert logged.count("step") == 12
    assert logged.count("evaluation") == 3
    assert logged[-1] == "finish"
    assert [event.kind for event in events if event.kind not in TRANSIENT] == logged
    assert run.to_dict()["adapter"] == str(run.adapter)


def test_train_saves_best_state(run_file: Build) -> None:
    # A rate that ruins what was learnt: the last state is not the best.
    run = train(run_file(learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=None, seed=1))
    best = run.manifest["best"]["step"]
    values = {line["step"]: line["accuracy"] for line in log_of(run.folder, "evaluation")}
    assert values[best] == max(values.values())
    assert best != 12, "this setting no longer tells the two apart"
    stored = read_tensors(run.adapter / "adapter_model.safetensors")
    checkpoint = Checkpoints(run.folder / "checkpoints").weights(best)
    assert torch.equal(stored["base_model.model.classifier.weight"], checkpoint["classifier.weight"])
    last = Checkpoints(run.folder / "checkpoints").weights(12)
    assert not torch.equal(stored["base_model.model.classifier.weight"], last["classifier.weight"])


def test_train_load_best_false_saves_last_state(run_file: Build) -> None:
    run = train(run_file(learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=None, seed=1, load_best=False))
    stored = read_tensors(run.adapter / "adapter_model.safetensors")
    last = Checkpoints(run.folder / "checkpoints").weights(12)
    assert torch.equal(stored["base_model.model.classifier.weight"], last["classifier.weight"])


def test_train_is_deterministic_by_seed(run_file: Build, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run_file(tmp_path / name, seed=seed))
    assert left_by(tmp_path / "a") == left_by(tmp_path / "b")
    assert left_by(tmp_path / "a") != left_by(tmp_path / "c")


def test_train_finished_run_is_returned_or_refused(run_file: Build, no_model: None, tmp_path: Path) -> None:
    tree = run_file()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"status": "finished"}))
    (tmp_path / "run" / "config.yaml").write_text(RunConfig.build(run_file()).dump())
    with pytest.raises(ConflictError, match="finished run") as caught:
        train(tree)
    assert caught.value.exit_code == 7
    assert "--overwrite" in str(caught.value)
    assert train(tree, resume=True).manifest == {"status": "finished"}
    with pytest.raises(ConflictError, match=r"training.learning_rate: 0.01 -> 0.02"):
        train(tree, resume=True, learning_rate=0.02)
    with pytest.raises(ConfigError, match="only one of them"):
        train(tree, resume=True, overwrite=True)


def test_train_interrupted_run_without_flag_is_refused(run_file: Build, no_model: None, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"status": "running"}))
    with pytest.raises(ConflictError, match="not finished") as caught:
        train(run_file())
    assert "--resume" in str(caught.value)


def test_train_foreign_files_are_refused_or_untouched(run_file: Build, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "precious").write_text("x")
    with pytest.raises(ConflictError, match=r"has adapter, but no manifest.json"):
        train(run_file())
    assert (adapter / "precious").read_text() == "x"


def test_overwrite_replaces_run_and_leaves_other_files(run_file: Build, tmp_path: Path) -> None:
    train(run_file())
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "evaluation.json").write_text("{}")  # figures of the adapter that goes
    run = train(run_file(learning_rate=2e-2), overwrite=True)
    assert run.manifest["status"] == "finished"
    assert (run.folder / "notes.txt").read_text() == "mine"
    assert not (run.folder / "evaluation.json").exists()
    assert len(log_of(run.folder, "step")) == 12


def test_overwrite_with_bad_settings_leaves_earlier_run(run_file: Build, tmp_path: Path) -> None:
    train(run_file())
    before = left_by(tmp_path / "run")
    tree = run_file()
    tree["data"]["train"] = str(tmp_path / "missing.jsonl")
    with pytest.raises(GraftwerkError):
        train(tree, overwrite=True)
    assert left_by(tmp_path / "run") == before
    assert Run(tmp_path / "run").manifest["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"learning_rate": 5e-3}}, "training.learning_rate: 0.01 -> 0.005"),
        ({"training": {"num_train_epochs": 3}}, "training.num_train_epochs: 2.0 -> 3.0"),
        ({"method": {"name": "lora", "r": 4}}, "method.r: 8 -> 4"),
        ({"data": {"max_train_rows": 30}}, "data.max_train_rows: 36 -> 30"),
    ],
)
def test_resume_other_settings_raises_with_difference(
    run_file: Build, no_model: None, tmp_path: Path, stopped: Path, change: Tree, said: str
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    tree = run_file()
    for room, values in change.items():
        tree[room] = {**tree[room], **values} if isinstance(tree[room], dict) else values
    with pytest.raises(ConflictError) as caught:
        train(tree, resume=True)
    assert said in caught.value.what
    assert "warm_start" in (caught.value.hint or "")
    assert "step-000009" in (caught.value.recovered or "")


def test_resume_other_data_raises(
    run_file: Build, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are the same; the file that they name has another row."""
    source = tmp_path / "rows.jsonl"
    tree = run_file()
    lines = Path(tree["data"]["train"]).read_text().splitlines()
    tree["data"]["train"] = str(source)
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunInterrupted):
        train(tree, listener=stopping_at(5))
    changed = [json.loads(line) for line in lines]
    for row in changed:
        row["text"] += " and so on"
    source.write_text("".join(json.dumps(row) + "\n" for row in changed))
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConflictError, match=r"data: '[0-9a-f]+") as caught:
        train(tree, resume=True)
    assert "warm_start" in (caught.value.hint or "")


def test_resume_of_a_trial_keeps_what_its_training_cost(run_file: Build) -> None:
    """Also where a first resumed call is cut short, which leaves a manifest of another status."""
    before = run_training(RunConfig.of(run_file(), {}), started_at=time.monotonic(), trial=True).manifest

    def cut(event: Event) -> None:
        if event.values.get("name") == "evaluating":
            raise RunInterrupted(signal.SIGTERM, "cut short")

    with pytest.raises(RunInterrupted):
        train(run_file(), resume=True, listener=cut)
    after = train(run_file(), resume=True, quiet=True).manifest
    assert (before["status"], after["status"]) == ("trial", "finished")
    assert before["cost"]["step_seconds"] > 0
    for key in ("step_seconds", "first_step_seconds"):
        assert after["cost"][key] == before["cost"][key]
    assert after["trunk"] == before["trunk"]


def test_resume_free_settings_may_change(run_file: Build, tmp_path: Path, stopped: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    run = train(run_file(save_total_limit=5), resume=True)
    assert run.manifest["status"] == "finished"


def test_warm_start_from_unfinished_run_loads_weights(run_file: Build, tmp_path: Path, stopped: Path) -> None:
    """As the refusal offers it: the checkpoint, and another folder."""
    for number, source in enumerate((stopped, stopped / "checkpoints" / "step-000009")):
        tree = run_file(
            tmp_path / str(number), warm_start=str(source), learning_rate=1e-12, max_steps=1, eval_steps=None
        )
        weights = Checkpoints(train(tree).folder / "checkpoints").weights(1)
        for key, tensor in Checkpoints(stopped / "checkpoints").weights(9).items():
            assert torch.allclose(weights[key], tensor, atol=1e-6), key


@pytest.mark.parametrize("method", ["lora", "dora", "full", "bitfit", "prefix", "houlsby", "ptuning"])
def test_warm_start_from_adapter_loads_weights(run_file: Build, tmp_path: Path, method: str) -> None:
    first = train(run_file(tmp_path / "first", method=method, max_steps=2, eval_steps=None))
    again = run_file(tmp_path / "again", method=method, warm_start=str(first.folder), max_steps=1, eval_steps=None)
    second = train(again, learning_rate=1e-12)
    before = Checkpoints(first.folder / "checkpoints").weights(2)
    after = Checkpoints(second.folder / "checkpoints").weights(1)
    for key, tensor in before.items():
        assert torch.allclose(after[key], tensor, atol=1e-5), key


def test_warm_start_from_other_method_raises(run_file: Build, tmp_path: Path, stopped: Path) -> None:
    with pytest.raises(AdapterError):
        train(run_file(method="bitfit", warm_start=str(stopped)))
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_train_bad_settings_raise_before_model_is_loaded(run_file: Build, no_model: None) -> None:
    without = run_file(early_stopping_patience=1, eval_steps=None)
    without["data"]["validation"] = None
    with pytest.raises(ConfigError, match="needs validation rows"):
        train(without)
    with pytest.raises(ConfigError, match="no metric `acuracy`"):
        train(run_file(metric_for_best="acuracy"))
    with pytest.raises(ConfigError, match="did you mean `learning_rate`"):
        train(run_file(), **{"training.learning_rat": 1})
    with pytest.raises(ConfigError, match="no folder"):
        train(run_file(warm_start="nowhere"))
    missing = run_file()
    missing["data"]["train"] += "x"
    with pytest.raises(GraftwerkError, match="topic_wordnet"):
        train(missing)
    one_class = run_file()
    one_class["data"]["filter"] = {"label": "noun.act"}
    one_class["data"] |= {"validation": 2, "test": 2}
    with pytest.raises(DataError, match="nothing to tell apart"):
        train(one_class)


def test_train_unwritable_folder_raises_before_reading(run_file: Build, no_model: None) -> None:
    with pytest.raises(ResourceError, match=r"/proc/1/run|/sys/run") as caught:
        train(run_file("/sys/run"))
    assert caught.value.exit_code == 5


def test_train_file_in_place_of_folder_raises(run_file: Build, no_model: None, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConflictError, match="is a file"):
        train(run_file())


def test_train_without_validation_saves_last_state(run_file: Build) -> None:
    tree = run_file(eval_steps=None)
    tree["data"] |= {"validation": None, "test": None}
    run = train(tree)
    assert run.manifest["best"] is None
    assert run.manifest["metrics"] == {}
    assert Checkpoints(run.folder / "checkpoints").steps() == [6, 12]


def test_train_diverged_is_recorded_and_checkpoint_stays(run_file: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwerk.tasks.objective import ClassObjective

    real, calls = ClassObjective.loss, []

    def loss(self: Any, outputs: Any, batch: Any, smoothing: float = 0.0) -> Any:
        if not torch.is_grad_enabled():
            return real(self, outputs, batch, smoothing)
        calls.append(1)
        return real(self, outputs, batch, smoothing) * (float("nan") if len(calls) > 6 else 1.0)

    monkeypatch.setattr(ClassObjective, "loss", loss)
    events: list[Event] = []
    with pytest.raises(DivergedError) as caught:
        train(run_file(max_bad_steps=2), listener=events.append)
    assert caught.value.exit_code == 6
    folder = Path(run_file()["output_dir"])
    assert (caught.value.recovered or "").endswith("step-000008")
    assert [event.step for event in events if event.kind == "bad_step"] == [7, 8]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "diverged"
    assert manifest["cost"]["training_seconds"] > 0  # a budget of time counts it
    assert manifest["error"]["exit_code"] == 6
    assert not (folder / "adapter").exists()
    weights = Checkpoints(folder / "checkpoints").load_latest()
    assert weights is not None
    assert all(torch.isfinite(tensor).all() for tensor in weights.weights.values())
    assert '"nan"' in (folder / "metrics.jsonl").read_text()


def test_train_ignores_wall_clock_jumps(run_file: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + (-1) ** next(jumps) * 1e8)
    run = train(run_file(max_steps=2, eval_steps=None))
    assert 0 < run.manifest["cost"]["training_seconds"] < 600
    assert 0 < run.manifest["cost"]["first_step_seconds"] < 6000
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    first, *others = (line["left_seconds"] for line in lines if line["kind"] == "step")
    assert first is None
    assert others
    assert all(0 <= left < 600 for left in others)


def test_train_float16_on_cpu_raises_before_model(run_file: Build, no_model: None) -> None:
    with pytest.raises(UnsupportedError, match="float16"):
        train(run_file(compute_type="float16"))


def test_train_warns_of_unused_launcher_precision(run_file: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    events: list[Event] = []
    train(run_file(max_steps=1, eval_steps=None, compute_type="float32"), listener=events.append)
    assert ["bf16" in event.values["text"] for event in events if event.kind == "warning"] == [True]


def test_resume_with_log_off_keeps_log(run_file: Build, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        train(run_file(), listener=stopping_at(3))
    with pytest.raises(RunInterrupted):
        train(run_file(report_to=[]), resume=True, listener=stopping_at(6))
    train(run_file(), resume=True)
    assert [line["step"] for line in log_of(tmp_path / "run", "step")] == [1, 2, 3, 7, 8, 9, 10, 11, 12]


def test_train_full_disk_for_log_finishes(run_file: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        if b'"step": 5' in content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    events: list[Event] = []
    assert train(run_file(), listener=events.append).manifest["status"] == "finished"
    assert len([event for event in events if event.kind == "warning"]) == 1
    assert [line["step"] for line in log_of(tmp_path / "run", "step")] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]


def test_train_full_disk_in_save_exits_5_and_resumes(
    run_file: Build, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwerk.training import checkpoint

    real = checkpoint.write_tensors

    def write_tensors(path: Path, tensors: Any) -> str:
        if "step-000008" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
    with pytest.raises(ResourceError, match=r"disk is full; [0-9,]+ bytes are needed") as caught:
        train(run_file())
    assert caught.value.exit_code == 5
    assert Run(tmp_path / "run").manifest["status"] == "interrupted"
    monkeypatch.undo()
    train(run_file(), resume=True)
    assert left_by(tmp_path / "run") == left_by(undisturbed)


def test_finish_oversized_examples_are_left_out(run_file: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [{"source": "x" * 2_000_000, "reference": None, "before": None, "after": "y"}]
    monkeypatch.setattr("graftwerk.evaluation.sample_outputs.before_and_after", lambda *given, **more: long)
    events: list[Event] = []
    manifest = train(run_file(), listener=events.append).manifest
    assert (manifest["status"], manifest["examples"]) == ("finished", [])
    assert any("sample outputs" in event.values["text"] for event in events if event.kind == "warning")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("place", ["step-000008", "latest", "adapter", "manifest.json"])
def test_train_disk_error_names_newest_complete_checkpoint(
    run_file: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, place: str
) -> None:
    """Whatever could not be written: what was saved before is named, and is whole."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if f".{place}.partial" in name and (tmp_path / "run" / "checkpoints" / "step-000004").is_dir():
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ResourceError) as caught:
        train(run_file(num_train_epochs=1.5, eval_steps=4))
    monkeypatch.undo()
    kept = str(caught.value.recovered)
    assert Path(kept).parent == tmp_path / "run" / "checkpoints"
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert kept.endswith(f"step-{steps[-1]:06d}")
    Checkpoints(tmp_path / "run" / "checkpoints").load(steps[-1])


@pytest.mark.parametrize("method", ["lora", "full", "bitfit"])
def test_train_base_with_nan_names_the_base(run_file: Build, tmp_path: Path, tiny_encoder: Path, method: str) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_encoder, base)
    tensors = load_file(base / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layer.1.intermediate.dense.bias"))
    tensors[name][0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"intermediate\.dense\.bias") as caught:
        train(run_file(method=method) | {"model": str(base)})
    assert caught.value.exit_code == 4
    assert "learning_rate" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "override", "key", "value"),
    [
        ({"num_train_epochs": 2}, "epochs=8", "num_train_epochs", 8),
        ({"epochs": 2}, "num_train_epochs=8", "num_train_epochs", 8),
        ({"epochs": 2}, "training.epochs=8", "num_train_epochs", 8),
        ({"per_device_train_batch_size": 2}, "batch_size=8", "per_device_train_batch_size", 8),
        ({"learning_rate": 1e-3}, "lr=0.5", "learning_rate", 0.5),
    ],
)
def test_override_by_alias_replaces_value_of_file(
    run_file: Build, file: dict[str, Any], override: str, key: str, value: float
) -> None:
    tree = run_file()
    tree["training"] = file
    assert getattr(RunConfig.build(tree, [override]).training, key) == value
    tree = run_file(method={"name": "lora", "r": 2, "lora_alpha": 3})
    method = RunConfig.build(tree, ["method.rank=4", "method.alpha=5"]).method
    assert method.to_dict() | {"r": 4, "lora_alpha": 5} == method.to_dict()


def test_run_file_with_key_and_its_alias_raises(run_file: Build) -> None:
    for changes in (
        {"training": {"num_train_epochs": 2, "epochs": 8}},
        {"method": {"name": "lora", "r": 2, "rank": 4}},
    ):
        with pytest.raises(ConfigError, match="another spelling of a key that is given too"):
            RunConfig.build(run_file() | changes)


def test_names_that_yaml_reads_as_numbers_stay_text(run_file: Build, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    said = "model: x\nmethod: lora\ndata: {train: y, columns: {text: 0, label: 2019}, filter: {3: a}}\n"
    path.write_text(said + "training: {class_weights: {1: 2.0, 0: 1.0}}\n")
    config = RunConfig.load(path)
    assert config.training.class_weights == {"1": 2.0, "0": 1.0}
    assert config.data.columns == {"text": "0", "label": "2019"}
    assert config.data.filter == {"3": "a"}
    path.write_text(said + "training: {class_weights: {yes: 2.0}}\n")
    with pytest.raises(ConfigError, match="put it in quotes"):
        RunConfig.load(path)
