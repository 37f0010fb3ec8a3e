"""An attach that fails late leaves the model, and the adapters on it, as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import UnsupportedError
from tests.contract.cases import METHODS, method_of, model_and_batch, perturb


def state_of(model: Any) -> tuple[Any, ...]:
    return (
        {name: type(module) for name, module in model.named_modules()},
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        model.config._attn_implementation,
        list(gw.adapters(model)),
    )


def scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


@pytest.mark.parametrize("beside", [None, "active", "by row"])
@pytest.mark.parametrize("method", ["lora", "parallel", "prefix", "prompt", "bitfit", "full", "lora tokens"])
def test_attach_out_of_memory_leaves_model_unchanged(
    method: str, beside: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert method in METHODS
    model, batch = model_and_batch("lora", "bert", rows=2)
    if beside is not None:
        perturb(gw.attach(model, method_of("lora"), name="first").parameters(), 3)
        if beside == "by row":
            gw.activate(model, rows=["first", None])
    before, expected = state_of(model), scores(model, batch)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(gw, "Adapter", fail)
        with pytest.raises(MemoryError):
            gw.attach(model, method_of(method), name="second")
    assert state_of(model) == before
    assert torch.equal(scores(model, batch), expected)
    perturb(gw.attach(model, method_of(method), name="second").parameters(), 4)
    assert not torch.allclose(scores(model, batch), expected)


def test_attach_full_to_offloaded_base_keeps_active_adapter(tmp_path: Path) -> None:
    model, batch = model_and_batch("lora", "bert")
    perturb(gw.attach(model, method_of("lora"), name="first").parameters(), 3)
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    expected = scores(model, batch)
    with pytest.raises(UnsupportedError, match="is offloaded"):
        gw.attach(model, method_of("full"), name="second")
    assert gw.adapters(model)["first"].active
    assert torch.equal(scores(model, batch), expected)


def test_adapter_text_counts_trained_parameters_share_and_bytes() -> None:
    model, _ = model_and_batch("lora", "bert", rows=2)
    base = sum(parameter.numel() for parameter in model.parameters())
    adapter = gw.attach(model, method_of("lora"))
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    said = str(adapter)
    assert f"trains   {trained:,} parameters, {round(100 * trained / base, 2):.2f} % of the base's {base:,}" in said
    assert f"on disk  {4 * trained / 1e6:.2f} MB" in said
