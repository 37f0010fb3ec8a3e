"""`model_dtype`: the type of the base's weights, from the run file to predictions and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation import inference
from graftwerk.evaluation.evaluate import evaluate
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.experiments.preflight import preflight
from graftwerk.exports.export import export
from graftwerk.exports.merge import merge
from graftwerk.models import hardware
from graftwerk.serialization.untrusted_files import read_tensors
from graftwerk.tasks import tokenization
from graftwerk.training import mode, setup, step_batches
from graftwerk.training.events import Event
from graftwerk.training.mode import base_dtype
from graftwerk.training.train import train
from tests.conftest import MINILM
from tests.tasks.test_causal import INSTRUCTION
from tests.tasks.test_causal import tree as causal_tree

Build = Callable[..., dict[str, Any]]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("device", "compute", "asked", "method", "expected"),
    [
        ("cuda", BF16, "auto", "lora", BF16),
        ("cuda", F16, "auto", "prefix", F16),
        ("mps", F16, "auto", "lora", F16),
        ("cuda", F32, "auto", "lora", F32),
        ("cuda", BF16, "float32", "lora", F32),
        ("cuda", BF16, "auto", "full", F32),
        ("cpu", BF16, "auto", "lora", F32),
        ("cpu", BF16, "bfloat16", "lora", BF16),
    ],
)
def test_base_dtype_follows_device_compute_type_and_run_file(
    run_file: Build, device: str, compute: torch.dtype, asked: str, method: str, expected: torch.dtype
) -> None:
    settings = RunConfig.build({**run_file(method=method), "model_dtype": asked})
    assert base_dtype(settings, compute, torch.device(device)) == expected


def test_base_dtype_of_a_regression_is_float32(run_file: Build) -> None:
    settings = RunConfig.build({**run_file(), "task": "regression"})
    assert base_dtype(settings, BF16, torch.device("cuda")) == F32


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method": "full"}, UnsupportedError, "Full fine-tuning trains the base's own weights.* bfloat16"),
        ({"task": "regression"}, UnsupportedError, "numbers that a regression answers"),
        ({"training.compute_type": "float32"}, ConfigError, "multiplied in that type.* is float32"),
        ({"model_dtype": "float16"}, UnsupportedError, "float16 needs an accelerator"),
        ({"model_dtype": "int8"}, ConfigError, "model_dtype"),
    ],
)
def test_invalid_model_dtype_raises_before_the_model_and_in_the_plan(
    run_file: Build, changes: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base_and_attach", lambda *_: pytest.fail("the model was loaded"))
    tree = {**run_file(), "model_dtype": "bfloat16"}
    with pytest.raises(error, match=words):
        train(RunConfig.build(tree, changes))
    if changes != {"task": "regression"}:  # whose rows these are not
        with pytest.raises(error, match=words):
            preflight(RunConfig.build(tree, changes))


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, glosses: Path) -> dict[str, Any]:
    """A run as an accelerator takes it with bfloat16: `auto`, and the compute type."""
    from tests.training.conftest import _tree

    tree = _tree(tiny_encoder, glosses, tmp_path_factory.mktemp("bfloat16") / "run")
    types: dict[str, torch.dtype] = {}

    def look(event: Event) -> None:
        if event.kind == "start":
            events.append(event)

    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(hardware.ENVIRONMENT, "bfloat16")
        patch.setattr(mode, "frozen_dtype", lambda compute, device: compute)
        real = setup.load_base_and_attach

        def watched(*args: Any) -> Any:
            adapter, base = real(*args)
            types.update({name: parameter.dtype for name, parameter in adapter.model.named_parameters()})
            types.update({f"own {name}": parameter.dtype for name, parameter in adapter.named_parameters()})
            return adapter, base

        patch.setattr(setup, "load_base_and_attach", watched)
        plan = preflight(RunConfig.build(tree))
        run = train(tree, listener=look)
    return {"run": run, "types": types, "start": events[0].values, "plan": plan}


def test_run_on_a_bfloat16_base_says_so_and_trains_in_float32(bfloat16_run: dict[str, Any]) -> None:
    run, types = bfloat16_run["run"], bfloat16_run["types"]
    assert (run.manifest["compute"]["model_dtype"], run.manifest["compute"]["type"]) == ("bfloat16", "bfloat16")
    assert bfloat16_run["start"]["model_dtype"] == bfloat16_run["plan"]["model"]["dtype"] == "bfloat16"
    assert types["bert.encoder.layer.0.attention.self.query.weight"] == types["classifier.weight"] == BF16
    own = [dtype for name, dtype in types.items() if name.startswith("own ")]
    assert len(own) > 4
    assert set(own) == {F32}
    stored = read_tensors(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {F32}
    assert json.loads((run.adapter / "graftwerk.json").read_text())["compute"]["model_dtype"] == "bfloat16"
    (state, *_) = sorted(run.folder.glob("checkpoints/*/state.json"))
    assert json.loads(state.read_text())["run"]["environment"]["model_dtype"] == "bfloat16"


def test_evaluate_reads_the_base_in_the_type_of_training(
    bfloat16_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bfloat16_run["run"]
    monkeypatch.delenv(hardware.ENVIRONMENT)
    result = evaluate(run)
    assert (result["compute"]["model_dtype"], result["compute"]["type"]) == ("bfloat16", "bfloat16")
    assert result["metrics"]["accuracy"]["value"] == run.manifest["metrics"]["test"]["accuracy"]["value"]


@pytest.mark.parametrize("of", ["run", "adapter"])
def test_base_of_a_bfloat16_run_in_float32_has_the_values_of_training(bfloat16_run: dict[str, Any], of: str) -> None:
    """The machine that uses it multiplies in float32 (the tests' environment)."""
    run = bfloat16_run["run"]
    loaded = load_adapter_for(run if of == "run" else run.adapter)
    assert loaded.dtype == loaded.model.dtype == F32
    for name, parameter in loaded.model.named_parameters():
        if "graftwerk" not in name and "attention.self.query" in name and "lora" not in name:
            assert torch.equal(parameter, parameter.to(BF16).float()), name
    assert loaded.compute(4)["model_dtype"] == "float32"


@pytest.mark.parametrize("environment", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["auto", "bfloat16"])
def test_merge_and_export_agree_with_a_bfloat16_base(
    bfloat16_run: dict[str, Any], environment: str, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bfloat16_run["run"]
    monkeypatch.setenv(hardware.ENVIRONMENT, environment)
    loaded = load_adapter_for(run)
    (adapter,) = _adapters(loaded.model)
    path = "bert.encoder.layer.1.attention.self.query"
    base = loaded.model.get_submodule(path).weight.detach().double()
    a, b = (adapter.state_dict()[f"{path}.lora_{side}.weight"].double() for side in "AB")
    exact = base + adapter.method.lora_alpha / adapter.method.r * (b @ a)
    result = merge(run, tmp_path / "merged", dtype=stored)
    assert result["dtype"] == ("float32" if stored == "auto" else stored)  # that of the checkpoint
    merged = read_tensors(tmp_path / "merged" / "model.safetensors")[f"{path}.weight"]
    if stored == "auto":
        torch.testing.assert_close(merged.double(), exact, rtol=0, atol=1e-6)
        assert not torch.equal(merged, merged.to(BF16).float())  # the adapter is not rounded to the base's type
    else:  # rounded once
        assert (merged == exact.to(BF16)).double().mean() > 0.99  # all but where float32 is between two
    parity = export(run, tmp_path / "peft", to="peft")["parity"]
    assert parity["max_abs_difference"] < (1e-5 if environment == "float32" else 5e-2)


@pytest.fixture
def same_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the 16-bit padding so that dropout masks agree across types."""
    monkeypatch.setattr(tokenization, "MULTIPLE", 1)


@pytest.mark.usefixtures("same_lengths")
def test_cached_hidden_states_of_a_bfloat16_base_are_near_those_of_float32(run_file: Build, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        events: list[Event] = []
        method = {"name": "lora", "r": 2, "layers_to_transform": [1]}
        tree = run_file(tmp_path / dtype, method=method, trunk_cache=True, max_steps=8, report_to=[])
        train({**tree, "model_dtype": dtype}, listener=events.append)
        losses[dtype] = [event.values["loss"] for event in events if event.kind == "step"]
    assert len(losses["bfloat16"]) == 8
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)


def _adapters(model: Any) -> Any:
    from graftwerk.modeling.attach import adapters

    return adapters(model).values()


BOUND = 0.02
"""Of a step's loss to float32's: largest difference over the first loss, and twice the mean of each over its own.

`docs/accelerators.md` has what was measured.
"""


@pytest.mark.usefixtures("same_lengths")
@pytest.mark.parametrize("kind", [pytest.param("encoder", marks=pytest.mark.slow), "decoder"])
def test_losses_of_50_steps_on_a_bfloat16_base_are_near_those_of_float32(
    kind: str, run_file: Build, tiny_decoder: Path, glosses: Path, tmp_path: Path
) -> None:
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        events: list[Event] = []
        length = {"max_steps": 50, "eval_steps": 50, "logging_steps": 1, "report_to": []}
        if kind == "encoder":
            tree = {**run_file(tmp_path / dtype, **length, learning_rate=1e-3), "model": MINILM}
        else:
            tree = causal_tree(tiny_decoder, glosses, tmp_path / dtype, INSTRUCTION, **length)
        train({**tree, "model_dtype": dtype}, listener=events.append)
        losses[dtype] = [event.values["loss"] for event in events if event.kind == "step"]
    ours, plain = np.array(losses["bfloat16"]), np.array(losses["float32"])
    assert len(ours) == len(plain) == 50
    assert plain[-5:].mean() < 0.95 * plain[:5].mean()
    assert not np.array_equal(ours, plain)
    assert np.abs(ours - plain).max() / plain[0] < BOUND
    assert np.abs(ours / plain - 1).mean() < BOUND / 2


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_lengths_in_16_bits_are_padded_to_few(
    compute: str, run_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training and of evaluation: a CPU compiles and keeps code for each."""
    widths: dict[str, set[int]] = {"training": set(), "evaluation": set()}

    def record(kind: str, move: Any) -> Any:
        def moved(batch: Any, *rest: Any) -> Any:
            widths[kind].add(batch["input_ids"].shape[1])
            return move(batch, *rest)

        return moved

    monkeypatch.setattr(step_batches, "moved", record("training", step_batches.moved))
    monkeypatch.setattr(inference, "to_device", record("evaluation", inference.to_device))
    tree = run_file(tmp_path / "run", per_device_train_batch_size=2, per_device_eval_batch_size=2, compute_type=compute)
    tree["data"]["max_length"] = 21
    train(tree)
    for kind, found in widths.items():
        assert max(found) == 21, kind
        assert (found <= {8, 16, 21}) == (compute == "bfloat16"), kind


@pytest.mark.parametrize("setting", ["stream", "tokens"])
def test_lengths_in_16_bits_stay_within_positions_and_tokens_of_a_batch(
    setting: str, run_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed rows are counted with the tokens that were cut off; `per_device_train_tokens` counts padding."""
    shapes: list[tuple[int, ...]] = []

    def record(batch: Any, *rest: Any) -> Any:
        shapes.append(tuple(batch["input_ids"].shape))
        return moved(batch, *rest)

    moved = step_batches.moved
    monkeypatch.setattr(step_batches, "moved", record)
    tokens = {"per_device_train_tokens": 60} if setting == "tokens" else {}
    tree = run_file(tmp_path / "run", compute_type="bfloat16", max_steps=12, **tokens)
    tree["data"]["max_length"] = longest = 13 if setting == "stream" else 23
    if setting == "stream":
        tree["data"] |= {"streaming": True, "validation": None, "test": None, "max_train_rows": None}
        tree["training"] |= {"eval_steps": None}
    train(tree)
    assert max(width for _, width in shapes) <= longest
    if setting == "tokens":
        assert max(rows * width for rows, width in shapes) <= 60
