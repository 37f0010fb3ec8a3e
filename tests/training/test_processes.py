"""Two processes that train together give the losses of one with the same total batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from graftwerk.errors import UnsupportedError
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.distributed.connect import connect
from graftwerk.training.distributed.predictions import deal_batches
from graftwerk.training.distributed.sharded import ShardedProcesses
from graftwerk.training.events import Event
from graftwerk.training.train import Run, train
from tests.tasks.test_causal import tree as causal_tree
from tests.training.children import Child, log_of

Tree = dict[str, Any]
Build = Callable[..., Tree]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(function: Callable[[int], object], count: int = 2) -> list[Child]:
    """``function(rank)`` in forked processes that find what `accelerate launch` puts into the environment."""
    from accelerate.state import AcceleratorState

    port = str(free_port())

    def begin(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        AcceleratorState._reset_state(True)  # what this test's process may have set up for itself alone
        function(rank)

    return [Child(lambda rank=rank: begin(rank)) for rank in range(count)]  # type: ignore[misc]


def same_figures(one: Path, two: Path, *, steps: int = 10) -> None:
    for kind, count in (("step", steps), ("evaluation", 3)):
        alone, shared = log_of(one, kind), log_of(two, kind)
        assert len(alone) == len(shared) == count
        for a, b in zip(alone, shared, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"kind", "best"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (kind, a["step"], name)


def test_deal_batches_deals_whole_batches() -> None:
    """So that a batch, and how its answers round, does not depend on how many processes there are."""
    batches = [[5, 4], [3, 2], [1]]
    assert deal_batches(batches, 2) == [[5, 4, 1], [3, 2]]
    assert deal_batches(batches, 1) == [[5, 4, 3, 2, 1]]


def test_launched_processes_train_as_one_with_same_total_batch(run_file: Build, tmp_path: Path, still: Path) -> None:
    """36 rows, 8 a step: the last step of an epoch has 4. Three batches of evaluation rows are shared out, unevenly."""
    shared = run_file(tmp_path / "two", per_device_train_batch_size=4, per_device_eval_batch_size=4)
    alone = run_file(tmp_path / "one", per_device_train_batch_size=8, per_device_eval_batch_size=4)
    for tree in (shared, alone):
        tree["model"] = str(still)
        tree["data"]["validation"] = 11
    assert [child.wait() for child in together(lambda rank: train(shared))] == [0, 0]
    train(alone)
    same_figures(tmp_path / "one", tmp_path / "two")
    one, two = Run(tmp_path / "one").manifest, Run(tmp_path / "two").manifest
    assert one["status"] == two["status"] == "finished"
    assert one["metrics"]["test"]["accuracy"] == two["metrics"]["test"]["accuracy"]
    generators = Checkpoints(tmp_path / "two" / "checkpoints").load(10).rng
    assert {name.split(".")[0] for name in generators} == {"0", "1"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_launched_losses_without_logits_equal_one_process(
    method: str, tiny_decoder: Path, glosses: Path, tmp_path: Path
) -> None:
    """With `full` the head is trained, by a gradient that the loss itself makes."""
    trees = {}
    for name, size in (("two", 6), ("one", 12)):
        training = {"per_device_train_batch_size": size, "learning_rate": 1e-3, "compute_type": "float32"}
        trees[name] = causal_tree(tiny_decoder, glosses, tmp_path / name, "causal", method, **training)
    assert [child.wait() for child in together(lambda rank: train(trees["two"]))] == [0, 0]
    train(trees["one"])
    one, two = (log_of(tmp_path / name, "step") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_sharded_processes_train_as_one_with_same_total_batch(
    tiny_decoder: Path, glosses: Path, tmp_path: Path
) -> None:
    """FSDP2: each process holds half of the frozen base, and the whole adapter."""
    trees = {}
    for name, size in (("two", 6), ("one", 12)):
        training = {"per_device_train_batch_size": size, "learning_rate": 1e-3, "compute_type": "float32"}
        trees[name] = causal_tree(tiny_decoder, glosses, tmp_path / name, "causal", "lora", **training)

    def sharded(rank: int) -> None:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        models: list[Any] = []
        prepare, reduce = ShardedProcesses.prepare, ShardedProcesses.all_reduce_gradients

        def prepared(self: ShardedProcesses, model: Any) -> Any:
            models.append(model)
            return prepare(self, model)

        def looked(self: ShardedProcesses, parameters: Any) -> None:
            parts = [parameter for parameter in models[0].parameters() if isinstance(parameter, DTensor)]
            assert len(parts) > 10
            assert sum(part.to_local().numel() for part in parts) < 0.6 * sum(part.numel() for part in parts)
            reduce(self, parameters)

        ShardedProcesses.prepare, ShardedProcesses.all_reduce_gradients = prepared, looked  # type: ignore[method-assign]
        train(trees["two"])

    assert [child.wait() for child in together(sharded)] == [0, 0]
    train(trees["one"])
    for a, b in zip(log_of(tmp_path / "one", "step"), log_of(tmp_path / "two", "step"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    one, two = (Run(tmp_path / name) for name in ("one", "two"))
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], atol=1e-5, rtol=1e-3, msg=key)
    said = [json.loads((run.adapter / "graftwerk.json").read_text())["base"] for run in (one, two)]
    assert said[0] == said[1]


def test_launched_signal_to_one_stops_both_and_resumes(run_file: Build, tmp_path: Path, still: Path) -> None:
    """With dropout: after the resume every process draws what it would have drawn."""
    tree = run_file(per_device_train_batch_size=3)

    def interrupted(rank: int) -> None:
        def listener(event: Event) -> None:
            if (event.kind, event.step) == ("step", 5):
                os.kill(os.getpid(), signal.SIGTERM)

        train(tree, listener=listener)  # only the main process has a listener

    assert [child.wait() for child in together(interrupted)] == [143, 143]
    assert Run(tmp_path / "run").manifest["status"] == "interrupted"
    assert [child.wait() for child in together(lambda rank: train(tree, resume=True))] == [0, 0]
    whole = {**tree, "output_dir": str(tmp_path / "whole")}
    assert [child.wait() for child in together(lambda rank: train(whole))] == [0, 0]
    assert log_of(tmp_path / "run", "step", "evaluation") == log_of(tmp_path / "whole", "step", "evaluation")
    assert [child.wait() for child in together(lambda rank: train(tree, resume=True))] == [0, 0], "finished: given back"


SCRIPT = """
import json, sys
from graftwerk.training.train import train
run = train(json.load(open(sys.argv[1])))
sys.stdout.write(f"status: {run.manifest['status']}\\n")  # in one piece: two processes write
"""


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_process(run_file: Build, tmp_path: Path, still: Path) -> None:
    """The real launcher, cold. Accelerate starts several CPU processes on one machine through its torchrun launcher
    only.
    """
    shared = {**run_file(tmp_path / "two", per_device_train_batch_size=4), "model": str(still)}
    alone = {**run_file(tmp_path / "one", per_device_train_batch_size=8), "model": str(still)}
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text(json.dumps(shared))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "config.json")],
        capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("status: finished") == 2
    train(alone)
    same_figures(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("stage", "content", "instead"),
    [
        (2, '{"zero_optimization": {"stage": 2}}', "--multi_gpu"),
        (3, '{"zero_optimization": {"stage": 3}}', "--fsdp_version 2"),
        (0, "{}", "--multi_gpu"),
        (1, None, "--multi_gpu"),
    ],
)
def test_connect_refuses_deepspeed_with_what_to_launch_instead(
    stage: int, content: str | None, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if content is None:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    else:
        (tmp_path / "ds.json").write_text(content)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(UnsupportedError, match=rf"DeepSpeed \(ZeRO stage {stage}\)") as caught:
        connect()
    assert instead in str(caught.value.hint)
