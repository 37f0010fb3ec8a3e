"""Close relatives of the families: every method on every one of them, in one pass over one model each.

What a pass asserts is what differs between architectures: which modules a method finds, that each of its tensors is
reached, that folding and rows know the layers' shapes, and that a stored adapter finds its places again. The whole
contract (`test_contract.py`) is tried on them in the slow tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.contract.cases import METHODS, MORE_PAIRS, has_head, method_of, model_and_batch, perturb
from tests.families import MORE


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def methods_on(family: str) -> list[str]:
    """The methods that work on a family as `model_and_batch("lora", family)` builds it."""
    heads = has_head("lora", MORE[family])
    return [method for method, other in MORE_PAIRS if other == family and (method != "probe" or heads)]


@pytest.mark.parametrize("family", MORE)
def test_methods_start_train_merge_and_leave(family: str) -> None:
    model, batch = model_and_batch("lora", family)
    batch["input_ids"][0, :3] = torch.tensor(METHODS["lora tokens"]["trainable_token_indices"])  # rows that train
    model.double()
    base = run(model, batch)
    keys = list(model.state_dict())
    for method in methods_on(family):
        torch.manual_seed(5)
        graft = gw.attach(model, method_of(method))
        model.double()
        if graft.method.identity_at_start:
            torch.testing.assert_close(run(model, batch), base, atol=2e-6, rtol=1e-5)
        if method != "full":
            perturb(graft.parameters(), 7)
        changed = run(model, batch)
        assert method == "full" or (changed - base).abs().max() > 1e-4, method
        logits = model(**batch).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()).sum().backward()
        for key, parameter in graft.named_parameters():
            assert parameter.grad is not None, f"{method}: {key}"
            assert parameter.grad.abs().sum() > 0, f"{method}: {key}"
        if graft.method.mergeable:
            graft.merge()
            torch.testing.assert_close(run(model, batch), changed, atol=1e-9, rtol=1e-9)
        gw.detach(model)
        model.zero_grad()
        assert list(model.state_dict()) == keys
        assert torch.equal(run(model, batch), base), method


@pytest.mark.parametrize("family", MORE)
def test_rows_of_all_methods_equal_one_by_one_and_survive_a_folder(family: str, tmp_path: Path) -> None:
    kinds = [method for method in methods_on(family) if method_of(method).supports_rows]
    model, batch = model_and_batch("lora", family, rows=len(kinds) + 1)
    batch["attention_mask"][:, :1] = 1
    batch["input_ids"][:, :1].clamp_(min=3)  # no padding token where it is a token: positions follow from these
    fresh, _ = model_and_batch("lora", family)
    names: list[str | None] = [kind.replace(" ", "-") for kind in kinds]
    for seed, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        torch.manual_seed(seed)
        graft = gw.attach(model, method_of(kind), name=str(name))
        perturb(graft.parameters(), seed)
        save_adapter(graft, tmp_path / str(name))
        load_adapter(fresh, tmp_path / str(name), name=str(name))
    names.append(None)
    if family != "gemma2":  # its own mask of a position that sees nothing is NaN in float64
        for owner in (model, fresh):
            owner.double()
    alone = []
    for index, name in enumerate(names):
        gw.activate(model, name)
        alone.append(run(model, {key: value[index : index + 1] for key, value in batch.items()})[0])
    for owner in (model, fresh):
        gw.activate(owner, rows=names)
        together = run(owner, batch)
        for index, (name, one) in enumerate(zip(names, alone, strict=True)):
            row = together[index]
            if row.dim() == 2 and "decoder_input_ids" not in batch:
                real = batch["attention_mask"][index].bool()  # what a model says at padding is nobody's answer
                row, one = row[real], one[real]
            torch.testing.assert_close(row, one, atol=1e-5, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


def test_methods_of_all_kinds_are_tried() -> None:
    tried = {method for family in MORE for method in methods_on(family)}
    assert tried == set(METHODS)
