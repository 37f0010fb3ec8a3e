"""Adapters on models whose weights accelerate keeps elsewhere: offloaded before the adapter came, or after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import ConflictError, UnsupportedError
from graftwerk.serialization.fingerprint import fingerprint
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, REFUSED, in_turn, method_of, model_and_batch, perturb
from tests.families import FAMILIES

CPU = torch.device("cpu")


def to_memory(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device=CPU)


def to_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=CPU)


def in_parts(model: Any, folder: Path) -> Any:
    devices = {name: "cpu" if number else "disk" for number, (name, _) in enumerate(model.named_children())}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder))


def adapted(model: Any, method: str) -> gw.Adapter:
    torch.manual_seed(3)
    graft = gw.attach(model, method_of(method), name="a")
    perturb(graft.parameters(), 5)
    return graft


def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


PAIRS = [(method, family) for method in METHODS for family in ("bert", "llama") if (method, family) not in REFUSED]
CASES = in_turn(PAIRS, core=(), every=2)


@pytest.mark.parametrize("offload", [to_memory, to_disk, in_parts])
@pytest.mark.parametrize(("method", "family"), CASES)
def test_offload_after_attach_outputs_and_gradients_equal_plain(
    method: str, family: str, offload: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    plain, batch = model_and_batch(method, family)
    graft = adapted(plain, method)
    wanted = answers(plain, batch)
    plain(**batch).logits.sum().backward()
    model, _ = model_and_batch(method, family)
    own = list(adapted(model, method).parameters())
    model = offload(model, tmp_path)
    torch.testing.assert_close(answers(model, batch), wanted)
    if method == "full":  # whose parameters are the base's, and offloaded like them
        with pytest.raises(ConflictError, match="have been replaced"):
            gw.activate(model, None)
        return
    model(**batch).logits.sum().backward()
    for parameter, expected in zip(own, graft.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    with gw.disabled(model):
        assert not torch.allclose(answers(model, batch), wanted)


@pytest.mark.parametrize("offload", [to_memory, to_disk, in_parts])
@pytest.mark.parametrize(("method", "family"), CASES)
def test_attach_after_offload_outputs_equal_plain(
    method: str, family: str, offload: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    plain, batch = model_and_batch(method, family)
    bare = answers(plain, batch)
    adapted(plain, method)
    model, _ = model_and_batch(method, family)
    model = offload(model, tmp_path)
    if method in ("full", "lora tokens"):  # of offloaded weights one does not see which modules share one
        with pytest.raises(UnsupportedError, match="is offloaded"):
            adapted(model, method)
        return
    graft = adapted(model, method)
    torch.testing.assert_close(answers(model, batch), answers(plain, batch))
    assert not any(parameter.is_meta for parameter in graft.parameters())
    gw.detach(model)
    torch.testing.assert_close(answers(model, batch), bare)


def test_load_adapter_on_offloaded_base_equals_plain(tmp_path: Path) -> None:
    plain, batch = model_and_batch("dora", "roberta")
    adapted(plain, "dora").save(tmp_path / "a")
    model, _ = model_and_batch("dora", "roberta")
    model = to_memory(model, tmp_path)
    assert fingerprint(model) == fingerprint(plain)
    graft = load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(answers(model, batch), answers(plain, batch))
    graft.save(tmp_path / "b")


def test_init_from_text_on_offloaded_base_equals_plain(tmp_path: Path) -> None:
    for settings in ({"name": "prompt"}, {"name": "prefix"}):
        found = []
        for offload in (False, True):
            model = FAMILIES["bert"].build()
            if offload:
                model = to_memory(model, tmp_path)
            method = gw_method(settings)
            found.append(list(gw.attach(model, method).state_dict().values()))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def gw_method(settings: dict[str, Any]) -> Any:
    from graftwerk.methods.registry import parse_method

    return parse_method({**settings, "num_virtual_tokens": 2, "init_text": "a b"}).with_token_ids([3, 4])  # type: ignore[attr-defined]


def test_merge_on_offloaded_weights_raises(tmp_path: Path) -> None:
    model, _ = model_and_batch("lora", "llama")
    model = to_memory(model, tmp_path)
    graft = adapted(model, "lora")
    with pytest.raises(UnsupportedError, match="offloaded"):
        graft.merge()


def test_unmerge_after_offload_raises(tmp_path: Path) -> None:
    model, batch = model_and_batch("lora", "llama")
    graft = adapted(model, "lora")
    graft.merge()
    wanted = answers(model, batch)
    model = to_memory(model, tmp_path)
    torch.testing.assert_close(answers(model, batch), wanted)
    with pytest.raises(ConflictError, match="cannot unmerge `a`"):
        graft.unmerge()


def test_save_while_adapter_is_offloaded_raises(tmp_path: Path) -> None:
    plain, batch = model_and_batch("lora", "llama")
    adapted(plain, "lora")
    model, _ = model_and_batch("lora", "llama")
    graft = adapted(model, "lora")
    model = cpu_offload(model, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    torch.testing.assert_close(answers(model, batch), answers(plain, batch))
    with pytest.raises(ConflictError, match="is offloaded"):
        graft.save(tmp_path / "a")
    remove_hook_from_submodules(model)
    graft.save(tmp_path / "a")
