"""Helpers forked for a training on a processor: the same run as one process makes, whole ends, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk import machine
from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, ResourceError, UnsupportedError
from graftwerk.methods.registry import METHODS, SHORTHANDS, parse_method
from graftwerk.training import forked_workers as helpers
from graftwerk.training import num_processes as how_many
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.events import Event
from graftwerk.training.train import Run, train
from tests.tasks.test_causal import INSTRUCTION
from tests.tasks.test_causal import tree as causal_tree
from tests.training.children import Child, log_of, until
from tests.training.test_processes import same_figures, together

Tree = dict[str, Any]
Build = Callable[..., Tree]


def forked(work: Callable[[], object]) -> Child:
    """In a process of its own that may fork again: what this one has computed does not matter to tiny models."""

    def begin() -> None:
        how_many._against = lambda: None
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        work()

    return Child(begin)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


FAST = ("bitfit", "bottleneck", "full", "lora", "oft", "pissa", "prefix", "probe")
"""Methods of every kind of placement; the others are tried in the slow tests."""


@pytest.mark.parametrize(
    "method",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted({*METHODS, *SHORTHANDS})],
)
def test_forked_every_method_trains_as_one_process(method: str, run_file: Build, tmp_path: Path, still: Path) -> None:
    """Evaluation rows are shared out too, 11 of them. On 4 processes, the 6 rows of a step are shared unevenly."""
    counts = {"one": 1, "two": 2, **({"four": 4} if method == "lora" else {})}
    for name, count in counts.items():
        tree = run_file(tmp_path / name, method=method, processes=count, learning_rate=1e-3)
        tree["model"] = str(still)
        tree["data"]["validation"] = 11
        tree["quantization"] = "nf4" if parse_method(method).starts_from_errors else None
        assert forked(lambda tree=tree: train(tree)).wait() == 0  # type: ignore[misc]
    for name in counts.keys() - {"one"}:
        same_figures(tmp_path / "one", tmp_path / name, steps=12)
    one, two = Run(tmp_path / "one").manifest, Run(tmp_path / "two").manifest
    assert one["metrics"]["test"]["accuracy"] == two["metrics"]["test"]["accuracy"]
    assert (one["cost"]["processes"], two["cost"]["processes"]) == (1, 2)


def test_forked_predictions_are_in_order_of_rows(tiny_decoder: Path, glosses: Path, tmp_path: Path) -> None:
    for name, count in (("one", 1), ("two", 2)):
        tree = causal_tree(tiny_decoder, glosses, tmp_path / name, INSTRUCTION, processes=count, compute_type="float32")
        tree["data"]["test"] = 11
        assert forked(lambda tree=tree: train(tree)).wait() == 0  # type: ignore[misc]
    one, two = (Run(tmp_path / name).manifest for name in ("one", "two"))
    assert one["metrics"]["test"].keys() == two["metrics"]["test"].keys() >= {"exact_match", "perplexity"}
    for metric, figure in one["metrics"]["test"].items():
        assert figure["value"] == pytest.approx(two["metrics"]["test"][metric]["value"], rel=1e-4), metric
    assert one["examples"] == two["examples"]


def test_forked_collectives() -> None:
    def work() -> None:
        def job() -> None:
            from graftwerk.training.distributed import connect
            from graftwerk.training.distributed.predictions import gather_lists

            processes = connect(shares_rows=True)
            assert (processes.world_size, processes.is_main) == (3, os.environ["RANK"] == "0")
            assert processes.total_bytes([100, 20, 3][processes.rank]) == 123
            assert processes.broadcast([100, 20, 3][processes.rank]) == 100
            texts = [["a"], ["ü\ud83d", None], []]
            assert gather_lists(processes, texts[processes.rank]) == texts
            own, none, part = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
            own.grad = torch.full((2,), float(processes.rank))
            part.grad = torch.ones(2) if processes.rank == 1 else None
            processes.all_reduce_gradients([own, none, part])
            assert own.grad.tolist() == [3.0, 3.0]
            assert none.grad is None
            assert part.grad is not None
            assert part.grad.tolist() == [1.0, 1.0]

        helpers.run_forked(job, 3, lambda: None)

    assert forked(work).wait() == 0


ALONE = """
import numpy, scipy.special, torch, transformers
import graftwerk.training.trainer
from graftwerk.training.num_processes import _alone
before, again = _alone(), _alone()
torch.set_num_threads(2)
torch.ones(600, 600) @ torch.ones(600, 600)
print(before, again, _alone())
"""


@pytest.mark.slow
def test_alone_sees_working_threads_but_not_those_of_imports() -> None:
    """Else `auto` would be one process everywhere, or forks would hang."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout == "True True False\n", done.stderr


def test_available_memory_respects_control_group(tmp_path: Path) -> None:
    assert machine._group_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert machine._group_available(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._group_available(tmp_path) is None


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_accumulation_steps": 2},
        {"per_device_train_tokens": 60},
        {"packing": True},
        {"gradient_checkpointing": True},
        {"length_group": False},
    ],
)
def test_forked_step_has_rows_of_settings(training: Tree, tiny_decoder: Path, glosses: Path, tmp_path: Path) -> None:
    for name, count in (("one", 1), ("two", 2)):
        tree = causal_tree(
            tiny_decoder, glosses, tmp_path / name, "causal", processes=count, compute_type="float32", **training
        )
        assert forked(lambda tree=tree: train(tree)).wait() == 0  # type: ignore[misc]
    one, two = (log_of(tmp_path / name, "step") for name in ("one", "two"))
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], rel=1e-5)
    assert [a["grad_norm"] for a in one] == pytest.approx([b["grad_norm"] for b in two], rel=1e-4)


def test_forked_compute_type_is_that_of_main_process(run_file: Build, tmp_path: Path) -> None:
    """What is fast is found by trying, and may come out otherwise in each of them."""

    def work() -> None:
        import graftwerk.models.hardware as hardware
        import graftwerk.training.trainer as loop

        def found(wanted: str, device: Any) -> torch.dtype:
            return torch.float32 if os.environ["RANK"] == "0" else torch.bfloat16

        def used(dtype: torch.dtype, device: Any) -> None:
            assert dtype == torch.float32, "a helper that fails ends the run"

        hardware.compute_type, loop.check_compute_type = found, used  # type: ignore[assignment]
        train(run_file(processes=2, max_steps=2))

    assert forked(work).wait() == 0


def test_run_forked_restores_the_process(run_file: Build, tmp_path: Path) -> None:
    def work() -> None:
        hook = sys.excepthook
        environment, threads = {name: os.environ.get(name) for name in helpers._ENVIRONMENT}, torch.get_num_threads()
        train(run_file(tmp_path / "two", processes=2, max_steps=2))
        assert {name: os.environ.get(name) for name in helpers._ENVIRONMENT} == environment
        assert torch.get_num_threads() == threads
        assert sys.excepthook is hook
        assert not torch.distributed.is_initialized()
        assert children_of(os.getpid()) == []
        train(run_file(tmp_path / "one", processes=1, max_steps=2))  # alone again
        assert Run(tmp_path / "one").manifest["cost"]["processes"] == 1

    assert forked(work).wait() == 0


def test_forked_signal_stops_all_and_resume_uses_as_many(run_file: Build, tmp_path: Path) -> None:
    """With dropout: after the resume every process draws what it would have drawn. Asked for by the environment, kept
    by what is resumed."""
    tree = run_file()

    def interrupted() -> None:
        os.environ[how_many.ENVIRONMENT] = "2"

        def listener(event: Event) -> None:
            if (event.kind, event.step) == ("step", 5):
                os.kill(os.getpid(), signal.SIGTERM)

        train(tree, listener=listener)

    def whole() -> None:
        os.environ[how_many.ENVIRONMENT] = "2"
        train({**tree, "output_dir": str(tmp_path / "whole")})

    assert forked(interrupted).wait() == 143
    assert Run(tmp_path / "run").manifest["status"] == "interrupted"
    assert forked(lambda: train(tree, resume=True)).wait() == 0
    assert forked(whole).wait() == 0
    assert Run(tmp_path / "run").manifest["cost"]["processes"] == 2
    assert log_of(tmp_path / "run", "step", "evaluation") == log_of(tmp_path / "whole", "step", "evaluation")
    assert forked(lambda: train(tree, resume=True)).wait() == 0, "finished: given back"


def test_forked_kill_of_main_ends_workers_and_run_resumes(run_file: Build, tmp_path: Path) -> None:
    tree = run_file(processes=2, save_steps=1)
    child = forked(lambda: train(tree))
    until(lambda: len(Checkpoints(tmp_path / "run" / "checkpoints").steps()) > 1)
    others = children_of(child.pid)
    assert len(others) == 1
    assert child.kill() == -signal.SIGKILL
    until(lambda: not any(_runs(pid) for pid in others), seconds=10)
    assert forked(lambda: train(tree, resume=True)).wait() == 0
    whole = {**tree, "output_dir": str(tmp_path / "whole")}
    assert forked(lambda: train(whole)).wait() == 0
    assert log_of(tmp_path / "run", "step", "evaluation") == log_of(tmp_path / "whole", "step", "evaluation")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_run_forked_dead_worker_raises_with_checkpoint(run_file: Build, tmp_path: Path) -> None:
    def work() -> None:
        def listener(event: Event) -> None:
            if (event.kind, event.step) == ("step", 5):
                os.kill(children_of(os.getpid())[0], signal.SIGKILL)

        with pytest.raises(ResourceError, match="SIGKILL, as the kernel sends when memory runs out") as caught:
            train(run_file(processes=2), listener=listener)
        assert caught.value.recovered == str(tmp_path / "run" / "checkpoints" / "step-000004")
        assert caught.value.hint is not None
        assert "training.processes=1" in caught.value.hint
        assert children_of(os.getpid()) == []

    assert forked(work).wait() == 0


def test_forked_errors_equal_those_of_one_process(run_file: Build, tmp_path: Path) -> None:
    tree = run_file(processes=2)
    tree["data"]["columns"] = {"text": "no such column", "label": "label"}
    alone = {**tree, "training": {**tree["training"], "processes": 1}, "output_dir": str(tmp_path / "other")}
    codes = {forked(lambda tree=tree: train(tree)).wait() for tree in (tree, alone)}  # type: ignore[misc]
    assert len(codes) == 1
    assert codes < {2, 3}
    good = run_file(processes=2)
    assert forked(lambda: train(good)).wait() == 0
    assert forked(lambda: train(good)).wait() == 7, "there is a run already"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_run_forked_error_of_all_is_raised_itself(kind: type[Exception], run_file: Build) -> None:
    def work() -> None:
        import graftwerk.training.step_batches as loop

        def wrong(*_: Any, **__: Any) -> None:
            raise kind("in every process")

        loop.micro_batches = wrong  # type: ignore[assignment]
        with pytest.raises(kind, match="in every process"):
            train(run_file(processes=2))
        assert children_of(os.getpid()) == []

    assert forked(work).wait() == 0


def test_run_forked_error_of_one_worker_is_named(run_file: Build) -> None:
    def work() -> None:
        import graftwerk.training.step_batches as loop

        before = loop.micro_batches

        def wrong(*args: Any, **named: Any) -> Any:
            if os.environ["RANK"] == "1":
                raise OSError("only there")
            return before(*args, **named)

        loop.micro_batches = wrong
        with pytest.raises(ResourceError, match="OSError: only there"):
            train(run_file(processes=2))

    assert forked(work).wait() == 0


def test_forked_ctrl_c_counts_once(run_file: Build, tmp_path: Path) -> None:
    def work() -> None:
        os.setpgid(0, 0)

        def listener(event: Event) -> None:
            if (event.kind, event.step) == ("step", 5):
                os.killpg(0, signal.SIGINT)

        train(run_file(processes=2), listener=listener)

    assert forked(work).wait() == 130
    assert Run(tmp_path / "run").manifest["status"] == "interrupted"


def test_resume_with_other_number_of_processes_raises_and_hint_works(run_file: Build, tmp_path: Path) -> None:
    def stopped(tree: Tree) -> None:
        def listener(event: Event) -> None:
            if (event.kind, event.step) == ("step", 5):
                os.kill(os.getpid(), signal.SIGTERM)

        train(tree, listener=listener)

    def other() -> None:
        with pytest.raises(
            ConfigError, match="trained by 2 processes that shared its steps and would be resumed with 3"
        ) as e:
            train(run_file(processes=3), resume=True)
        assert e.value.hint == "training.processes=2, in `graftwerk train`"

    assert forked(lambda: stopped(run_file(processes=2))).wait() == 143
    assert forked(other).wait() == 0
    os.environ[how_many.ENVIRONMENT] = "1"
    try:
        assert how_many.resolve_num_processes(RunConfig.build(run_file()), Checkpoints(tmp_path / "none"), True) == 1
        assert forked(lambda: train(run_file(), resume=True)).wait() == 0, "what was begun goes before"
    finally:
        del os.environ[how_many.ENVIRONMENT]
    assert Run(tmp_path / "run").manifest["cost"]["processes"] == 2


def test_resume_of_launched_run_by_forked_raises(run_file: Build, tmp_path: Path) -> None:
    """Launched processes bring rows of their own: the steps would be half as large."""
    tree = run_file(per_device_train_batch_size=3)

    def interrupted(rank: int) -> None:
        def listener(event: Event) -> None:
            if (event.kind, event.step) == ("step", 5):
                os.kill(os.getpid(), signal.SIGTERM)

        train(tree, listener=listener)

    def plain(**training: Any) -> None:
        with pytest.raises(ConfigError, match="2 processes that were launched") as caught:
            train({**tree, "training": {**tree["training"], **training}}, resume=True)
        assert caught.value.hint == "accelerate launch, 2 processes"

    assert [child.wait() for child in together(interrupted)] == [143, 143]
    assert forked(plain).wait() == 0
    assert forked(lambda: plain(processes=2)).wait() == 0


def settings(tiny_encoder: Path, glosses: Path, tmp_path: Path, **training: Any) -> RunConfig:
    return RunConfig.build(causal_tree(tiny_encoder, glosses, tmp_path / "run", "classification", **training))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path, tmp_path: Path) -> Path:
    """A model that is large by its configuration, and a process that may be forked, of 8 cores."""
    monkeypatch.setattr(how_many, "_against", lambda: None)
    monkeypatch.setattr("graftwerk.models.hardware.threads_wanted", lambda: 8)
    monkeypatch.setattr("graftwerk.training.num_processes.available", lambda: 2**34)
    monkeypatch.delenv(how_many.ENVIRONMENT, raising=False)
    folder = tmp_path / "large"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 384, "num_hidden_layers": 6}))
    return folder


@pytest.mark.parametrize(
    ("training", "method", "count"),
    [
        ({"per_device_train_batch_size": 16}, "lora", 2),
        ({"per_device_train_batch_size": 15}, "lora", 1),
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}, "lora", 4),
        ({"per_device_train_batch_size": 800}, "lora", 8),
        ({"per_device_train_batch_size": 16}, "full", 1),
        ({"per_device_train_batch_size": 16}, "probe", 1),
        ({"per_device_train_batch_size": 16}, {"name": "lora", "layers": "top-2"}, 1),
        ({"per_device_train_batch_size": 16, "trunk_cache": False}, {"name": "lora", "layers": "top-2"}, 2),
        ({"per_device_train_batch_size": 16, "processes": 3}, "full", 3),
        ({"per_device_train_batch_size": 4, "processes": 1}, "lora", 1),
    ],
)
def test_num_processes_auto_depends_on_rows_and_method(
    training: Tree, method: Any, count: int, free: Path, glosses: Path, tmp_path: Path
) -> None:
    tree = causal_tree(free, glosses, tmp_path / "run", "classification", method, **training)
    config = RunConfig.build(tree)
    assert how_many.resolve_num_processes(config, Checkpoints(tmp_path / "none"), False) == count


def test_num_processes_auto_is_one_if_unsuitable(
    free: Path, tiny_encoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = Checkpoints(tmp_path / "none")
    config = settings(free, glosses, tmp_path, per_device_train_batch_size=16)
    assert how_many.resolve_num_processes(config, none, False) == 2
    assert (
        how_many.resolve_num_processes(
            settings(tiny_encoder, glosses, tmp_path, per_device_train_batch_size=16), none, False
        )
        == 1
    )
    monkeypatch.setattr("graftwerk.training.num_processes.available", lambda: 2**28)
    assert how_many.resolve_num_processes(config, none, False) == 1
    monkeypatch.setenv(how_many.ENVIRONMENT, "5")
    assert how_many.resolve_num_processes(config, none, False) == 5
    monkeypatch.setenv(how_many.ENVIRONMENT, "many")
    with pytest.raises(ConfigError, match="not a number of processes"):
        how_many.resolve_num_processes(config, none, False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert how_many.resolve_num_processes(config, none, False) == 1
    for asked, raised in ((4, False), (2, True)):
        launched = settings(free, glosses, tmp_path, per_device_train_batch_size=16, processes=asked)
        if raised:
            with pytest.raises(ConfigError, match="4 were launched"):
                how_many.resolve_num_processes(launched, none, False)
        else:
            assert how_many.resolve_num_processes(launched, none, False) == 1


def test_num_processes_impossible_raises(
    tiny_encoder: Path, glosses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = Checkpoints(tmp_path / "none")
    two = settings(tiny_encoder, glosses, tmp_path, per_device_train_batch_size=16, processes=2)
    torch.ones(300, 300) @ torch.ones(300, 300)  # now threads have been at work
    with pytest.raises(UnsupportedError, match="2 processes cannot be started here") as caught:
        how_many.resolve_num_processes(two, none, False)
    assert caught.value.hint is not None
    monkeypatch.setattr(how_many, "_against", lambda: None)
    assert how_many.resolve_num_processes(two, none, False) == 2
    many = settings(tiny_encoder, glosses, tmp_path, per_device_train_batch_size=16, processes=17)
    with pytest.raises(ConfigError, match="cannot share a step's 16 rows"):
        how_many.resolve_num_processes(many, none, False)
