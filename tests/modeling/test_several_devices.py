"""Adapters on models that accelerate spreads over two accelerators, or offloads to memory or disk (`fake_devices`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn

import graftwerk.modeling.attach as gw
from graftwerk.errors import UnsupportedError
from graftwerk.evaluation.inference import to_device
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, REFUSED, method_of, model_and_batch
from tests.fake_devices import FIRST, SECOND, DevicesMixedError, fake_devices


def spread(model: Any, folder: Path, *, rest: Any = 1) -> Any:
    """Put embeddings (with the head that shares their weight) and the first layers at 0, and the rest elsewhere."""
    places: dict[str, Any] = {}
    tied = model.config.tie_word_embeddings and model.config.is_encoder_decoder

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList):
                places.update({f"{path}.{number}": rest if number else 0 for number in range(len(child))})
            elif any(isinstance(part, nn.ModuleList) for part in child.modules()):
                walk(child, f"{path}.")
            elif any(True for _ in (*child.parameters(), *child.buffers())):
                places[path] = 0 if "embed" in path or name == "shared" or (tied and name == "lm_head") else rest

    walk(model, "")
    main = None if rest == 1 else 0
    return dispatch_model(model, places, main_device=main, offload_dir=str(folder))


def spread_and_to_memory(model: Any, folder: Path) -> Any:
    return spread(model, folder, rest="cpu")


def spread_and_to_disk(model: Any, folder: Path) -> Any:
    return spread(model, folder, rest="disk")


def to_memory(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device=FIRST)


def to_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=FIRST)


LAYOUTS: list[Callable[..., Any]] = [spread, spread_and_to_memory, spread_and_to_disk, to_memory, to_disk]


def is_fast(number: int, family: str, layout: Callable[..., Any]) -> bool:
    """Return True for each method on two devices, on one of two families in turn, and a third of them offloaded."""
    turn = ("llama", "bert")[number % 2]
    return family == turn and (layout is spread or (layout is spread_and_to_memory and number % 3 == 0))


CASES = [
    pytest.param(
        method,
        family,
        layout,
        marks=() if is_fast(number, family, layout) else pytest.mark.slow,
        id=f"{method}-{family}-{layout.__name__}",
    )
    for layout in LAYOUTS
    for number, method in enumerate(METHODS)
    for family in ("llama", "bert", "t5")
    if (method, family) not in REFUSED
]
NEEDS_MEMORY = {"full": "is offloaded", "lora tokens": "is offloaded"}
"""Methods that read whole weights of the base, which are not there while they are offloaded -> words of the error."""


def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits.cpu()


def adapted(model: Any, method: str) -> gw.Adapter:
    torch.manual_seed(3)
    adapter = gw.attach(model, method_of(method), name="a")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.device))
    return adapter


def step(model: Any, adapter: gw.Adapter, batch: dict[str, Tensor]) -> list[Tensor]:
    """Take one training step; return its logits and gradients."""
    parameters = list(adapter.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, foreach=False)
    logits = model(**batch).logits
    logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.device == parameter.device for parameter in parameters)
    optimizer.step()
    return [logits.detach().cpu(), *(parameter.grad.cpu() for parameter in parameters if parameter.grad is not None)]


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@pytest.mark.parametrize(("method", "family", "layout"), CASES)
def test_method_on_spread_model_equals_the_plain_one_or_is_refused(
    method: str, family: str, layout: Callable[..., Any], tmp_path: Path
) -> None:
    """Attach, predict, train a step, save, load, merge and detach, with every operation on one device."""
    plain, batch = model_and_batch(method, family)
    own = adapted(plain, method)
    wanted = [*step(plain, own, batch), answers(plain, batch)]
    with fake_devices():
        model = layout(model_and_batch(method, family)[0], tmp_path / "base")
        bare = answers(model, batch)
        offloads = any(parameter.is_meta for parameter in model.parameters())
        if (method == "full" and offloads) or (method == "lora tokens" and layout in (to_memory, to_disk)):
            with pytest.raises(UnsupportedError, match=NEEDS_MEMORY[method]):
                adapted(model, method)
            return
        adapter = adapted(model, method)
        assert not any(parameter.is_meta for parameter in adapter.parameters())
        _close([*step(model, adapter, batch), answers(model, batch)], wanted)
        adapter.save(tmp_path / "a")
        other = layout(model_and_batch(method, family)[0], tmp_path / "other")
        load_adapter(other, tmp_path / "a", name="a")
        _close([answers(other, batch)], wanted[-1:])
        if adapter.method.mergeable and adapter.hosts and offloads:
            with pytest.raises(UnsupportedError, match="offloaded"):
                adapter.merge()
        elif adapter.method.mergeable:
            adapter.merge()
            _close([answers(model, batch)], wanted[-1:])
            adapter.unmerge()
        gw.detach(model)
        torch.testing.assert_close(answers(model, batch), bare)


def test_fake_devices_refuse_operations_that_mix_them() -> None:
    with fake_devices():
        first, second = torch.ones(2, device=FIRST), torch.ones(2).to(SECOND)
        assert (first.device, second.device, (first * 2).device) == (FIRST, SECOND, FIRST)
        with pytest.raises(DevicesMixedError, match="cuda:0, cuda:1"):
            first + second
        with pytest.raises(DevicesMixedError, match="cpu, cuda:0"):
            first @ torch.ones(2, 2)
        assert (first + second.to(FIRST)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("layout", [spread, to_memory])
def test_batches_go_to_the_device_that_reads_them(
    layout: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # which only a real accelerator can
    with fake_devices():
        model, batch = model_and_batch("lora", "llama")
        moved = to_device(batch, layout(model, tmp_path / "base"))
        assert {tensor.device for tensor in moved.values()} == {FIRST}


def _close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Compare with the plain model, up to the order of sums: hooks end fusions that span two modules."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * max(1.0, float(other.abs().max())))
