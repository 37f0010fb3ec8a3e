"""Two gloo processes stand for what GPUs do: patience while one works alone, DDP of two adapters, FSDP1 in bfloat16."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from graftwerk.methods.registry import parse_method
from graftwerk.modeling.attach import activate, attach
from tests.families import FAMILIES
from tests.training.test_processes import together

SHORT, LONG, ALONE = timedelta(seconds=1), timedelta(minutes=2), 2.0
"""Timeouts of collectives, and how long the first process works alone, in seconds."""


def model_and_batch() -> tuple[Any, dict[str, Tensor]]:
    batch = FAMILIES["llama"].batch(padded=False)
    torch.manual_seed(0)
    return FAMILIES["llama"].build(classifier=False), {**batch, "labels": batch["input_ids"].clone()}


def slow_on_main(function: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Let the main process take its time for this function."""

    def called(*args: Any, **kwargs: Any) -> Any:
        if rank == 0:
            time.sleep(ALONE)
        return function(*args, **kwargs)

    return called


def test_barrier_outlasts_the_timeout_of_collectives_while_one_process_fills_the_trunk_or_writes(
    run_file: Callable[..., Any], tmp_path: Path, still: Path
) -> None:
    """The timeout is short only while the first process is alone: a slow machine is no failure."""
    upper = {"name": "lora", "layers": "top-1"}
    tree = run_file(tmp_path / "run", method=upper, max_steps=1, eval_steps=None, trunk_cache=True)
    tree["model"] = str(still)

    def job(rank: int) -> None:
        from graftwerk.evaluation import sample_outputs
        from graftwerk.training import finalize
        from graftwerk.training.activation_cache.cache import ActivationCache
        from graftwerk.training.train import train

        set_timeout = dist.distributed_c10d._set_pg_timeout
        in_file, predictions, phases = ActivationCache._in_file, finalize._predictions, []

        def filled(*args: Any) -> Any:
            phases.append("trunk")
            set_timeout(SHORT)
            made = in_file(*args)
            set_timeout(LONG)
            return made

        def predicted(*args: Any) -> Any:
            phases.append("predictions")
            made = predictions(*args)
            set_timeout(SHORT if phases.count("predictions") == 1 else LONG)  # until those of the next split are in
            return made

        ActivationCache._computed = slow_on_main(ActivationCache._computed, rank)  # type: ignore[method-assign]
        ActivationCache._in_file = filled  # type: ignore[method-assign]
        sample_outputs.before_and_after = slow_on_main(sample_outputs.before_and_after, rank)
        finalize._predictions = predicted
        train(tree)
        assert phases == ["trunk", "predictions", "predictions"]

    assert [child.wait() for child in together(job)] == [0, 0]


def test_two_trainable_adapters_one_active_train_under_ddp() -> None:
    """DDP waits for the gradient of every parameter that requires one."""

    def job(rank: int) -> None:
        dist.init_process_group("gloo")
        model, batch = model_and_batch()
        first, second = attach(model, parse_method("lora"), "first"), attach(model, parse_method("ia3"), "second")
        for adapter, other in ((second, first), (first, second)):
            activate(model, adapter.name)
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                batch["input_ids"] = (batch["input_ids"] + rank) % 64
                wrapped(**batch).loss.backward()
            assert all(parameter.grad is None for parameter in other.parameters())
            for parameter in adapter.parameters():
                assert parameter.grad is not None
                own = [torch.empty_like(parameter.grad) for _ in range(2)]
                dist.all_gather(own, parameter.grad)
                assert torch.equal(*own)
                parameter.grad = None

    assert [child.wait() for child in together(job)] == [0, 0]


def test_activate_parameters_of_idle_adapters_require_no_gradient_and_keep_their_place() -> None:
    model, _ = model_and_batch()
    first = attach(model, parse_method("lora"), "first")
    fixed = next(first.parameters()).requires_grad_(False)  # by the user's own choice
    count, names = first.num_parameters, [name for name, _ in first.named_parameters()]
    second = attach(model, parse_method("ia3"), "second")
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert (first.num_parameters, [name for name, _ in first.named_parameters()]) == (count, names)
    assert not first.frozen
    activate(model, rows=["first", "second", None])
    assert all(parameter.requires_grad for one in (first, second) for parameter in one.parameters())
    assert not fixed.requires_grad
    activate(model, "first")
    assert [parameter.requires_grad for parameter in first.parameters()] == [True] * len(names)
    assert not any(parameter.requires_grad for parameter in second.parameters())
    second.freeze()
    activate(model, "second")
    assert second.frozen
    assert list(second.parameters()) == []


@pytest.mark.parametrize("method", ["lora", {"name": "prefix", "num_virtual_tokens": 3}])
def test_fsdp1_beside_a_bfloat16_base_trains_adapters_of_the_same_type(method: Any) -> None:
    """FSDP1 flattens parameters of one type alone: as attached it refuses, after `model.to` it trains."""

    def job(rank: int) -> None:
        from functools import partial

        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        dist.init_process_group("gloo")
        model, batch = model_and_batch()
        adapter = attach(model.to(torch.bfloat16), parse_method(method))
        shapes = {key: tensor.shape for key, tensor in adapter.state_dict().items()}
        layers = {type(model.model.layers[0])}
        wrap = partial(
            FullyShardedDataParallel,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls=layers),
        )
        if method == "lora":
            with pytest.raises(ValueError, match="uniform dtype"):
                wrap(copy.deepcopy(model))
        sharded = wrap(model.to(torch.bfloat16))
        optimizer = torch.optim.AdamW([p for p in sharded.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            loss = sharded(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[2] < losses[0]
        with FullyShardedDataParallel.summon_full_params(sharded, writeback=False):
            full = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
        assert {key: tensor.shape for key, tensor in full.items()} == shapes
        alone = attach(model_and_batch()[0].to(torch.bfloat16), parse_method(method))
        alone.load_state_dict(full)
        alone.model.to(torch.bfloat16)
        assert float(alone.model(**batch).loss.detach()) < losses[0]

    assert [child.wait() for child in together(job)] == [0, 0]
