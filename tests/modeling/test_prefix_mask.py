"""The mask of a prefix: one a pass, the same values in the form that fast kernels take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.modeling import prefix_attention, prefix_mask
from graftwerk.modeling.attach import activate
from tests.families import FAMILIES
from tests.modeling.soft import CLOSE, logits, moved


def prefixed(family: str, *rows: str | None) -> tuple[Any, dict[str, Tensor]]:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(rows=4)
    moved(model, Prefix(num_virtual_tokens=3), "a", 1)
    moved(model, Prefix(num_virtual_tokens=5), "b", 2)
    if rows:
        activate(model, rows=list(rows))
    return model, batch


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that were made from others or from nothing."""
    made: list[Tensor] = []
    original = prefix_mask._with_columns

    def noted(*args: Any) -> Tensor:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(prefix_mask, "_with_columns", noted)
    return made


@pytest.mark.parametrize("rows", [(), ("a", "b", None, "b")])
@pytest.mark.parametrize(("family", "masks"), [("bert", 1), ("llama", 1), ("mistral", 1), ("bart", 3)])
def test_mask_is_made_once_a_pass(family: str, masks: int, rows: Any, widened: list[Tensor]) -> None:
    """Not once a layer; an encoder-decoder has one of the encoder, of the decoder, and between the two."""
    model, batch = prefixed(family, *rows)
    for passes in (1, 2):
        logits(model, batch)
        again = passes - 1 if family == "bart" else 0  # without padding, the decoder's is the same in every pass
        assert len(widened) == passes * masks - again


def test_mask_changed_in_place_between_passes_is_made_again() -> None:
    model, batch = prefixed("llama")
    mask = batch["attention_mask"].bool()[:, None, None].expand(-1, -1, 7, -1).tril().clone()
    first = logits(model, {**batch, "attention_mask": mask})
    mask[:, :, :, 1] = False
    mask[:, :, 1, 1] = True
    second = logits(model, {**batch, "attention_mask": mask})
    fresh = logits(model, {**batch, "attention_mask": mask.clone()})
    assert torch.equal(second, fresh)
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_mask_made_in_inference_mode_serves_training(widened: list[Tensor]) -> None:
    model, batch = prefixed("llama")
    batch = {"input_ids": batch["input_ids"]}  # no padding: the mask of these sizes stays
    with torch.inference_mode():
        model(**batch)
    model(**batch).logits.sum().backward()
    assert len(widened) == 1
    assert not widened[0].is_inference()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("rows", [(), ("a", "b", None, "b")])
@pytest.mark.parametrize("family", ["bert", "llama", "mistral", "bart", "t5"])
def test_form_for_fast_kernels_changes_no_value(
    family: str, rows: Any, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = prefixed(family, *rows)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    plain = logits(model, batch)
    taken: list[Any] = []
    original = prefix_attention.sdpa_attention_forward

    def noted(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        taken.append(mask)
        return original(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(prefix_attention, "sdpa_attention_forward", noted)
    monkeypatch.setattr(prefix_mask, "has_fast_kernels", lambda query: True)
    activate(model, "b") if not rows else activate(model, rows=list(rows))
    assert torch.allclose(logits(model, batch), plain, **CLOSE)
    for mask in taken:
        free = mask is None or isinstance(mask, CausalBias)
        assert free or all(stride % prefix_mask.ALIGNED == 0 for stride in mask.stride()[:-1])
    if family == "llama" and not padded and not rows:
        assert all(isinstance(mask, CausalBias) for mask in taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligned_mask_has_rows_at_multiples_of_eight(dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 5, 11) > 0.5
    made = prefix_mask.aligned(mask, dtype)
    assert made.shape == mask.shape
    assert made.stride() == (80, 80, 16, 1)
    assert torch.equal(made, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf))
    numbers = torch.randn(2, 1, 5, 16).to(dtype)
    assert torch.equal(prefix_mask.aligned(numbers, dtype), numbers)
