"""Packed rows learn exactly what they learn alone; what cannot be packed is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.methods.base import Method
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.attach import attach
from graftwerk.tasks.base import Example
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.packing import bins, check_packing, pack
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.text import IGNORED
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.validation import check_settings
from tests.families import FAMILIES

DECODERS = ("llama", "gpt2", "qwen2", "gemma", "mistral")
TOKENIZER = SimpleNamespace(pad_token_id=0)


def rows(lengths: tuple[int, ...] = (9, 3, 6, 12, 2), seed: int = 0) -> list[Example]:
    """Rows whose second half is trained; the first token too where a row is short, as in causal modelling."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        labels = list(ids) if length < 4 else [IGNORED] * (length // 2) + ids[length // 2 :]
        examples.append(Example({"input_ids": ids}, labels))
    return examples


def learn(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    task = Causal()
    model.zero_grad()
    outputs = task.objective.forward(model, batch)
    loss = task.objective.loss(outputs, batch)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def made_generic(graft: Any) -> None:
    """Adapters begin as nothing; here they are something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "ia3", "bottleneck"])
@pytest.mark.parametrize("family", DECODERS)
def test_pack_loss_and_gradients_equal_unpacked(family: str, method: str) -> None:
    model = FAMILIES[family].build()
    settings: dict[str, Any] = {"name": method} | ({"num_virtual_tokens": 3} if method == "prefix" else {})
    made_generic(attach(model, parse_method(settings)))
    examples = rows()
    packed = pack(examples, TOKENIZER, 16)
    assert packed["input_ids"].shape == (3, 15)
    model.train()
    alone, gradients = learn(model, Causal().collator.collate(examples, TOKENIZER))
    together, packed_gradients = learn(model, packed)
    assert together == pytest.approx(alone, abs=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, packed_gradients[name], atol=1e-5, rtol=1e-4), name
    check_packing(model, Causal(), examples, TOKENIZER)
    assert model.training


@pytest.mark.parametrize("family", DECODERS)
def test_check_packing_rows_that_attend_to_each_other_raise(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: with positions that run on, transformers does not tell the rows apart."""
    from graftwerk.tasks import packing

    def runs_on(examples: Any, tokenizer: Any, max_length: int) -> Any:
        batch = pack(examples, tokenizer, max_length)
        width = batch["position_ids"].shape[1]
        return batch | {"position_ids": torch.arange(width).expand_as(batch["position_ids"])}

    monkeypatch.setattr(packing, "pack", runs_on)
    with pytest.raises(UnsupportedError, match="see each other"):
        check_packing(FAMILIES[family].build(), Causal(), rows(), TOKENIZER)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_check_packing_virtual_tokens_raise(family: str, method: str) -> None:
    model = FAMILIES[family].build()
    chosen: Method = parse_method({"name": method, "num_virtual_tokens": 3})
    attach(model, chosen)
    with pytest.raises(UnsupportedError, match="cannot each have virtual tokens"):
        check_packing(model, Causal(), rows(), TOKENIZER)


def test_check_packing_accepts_single_row() -> None:
    check_packing(FAMILIES["llama"].build(), Causal(), rows((5,)), TOKENIZER)


def test_bins_are_greedy_and_within_max_length() -> None:
    assert bins([9, 3, 6, 12, 2], 16) == [[3, 1], [0, 2], [4]]
    assert bins([8, 8, 16], 16) == [[2], [0, 1]], "what fits exactly fits"
    lengths = [7, 7, 7, 2, 2, 20, 5]
    packed = bins(lengths, 10)
    assert sorted(row for group in packed for row in group) == list(range(7))
    assert [sum(lengths[row] for row in group) for group in packed if len(group) > 1] == [9, 9]
    assert [5] in packed, "a row longer than the bound stands alone"


def test_pack_restarts_positions_and_ignores_first_label() -> None:
    examples = rows((4, 3, 2))
    batch = pack(examples, TOKENIZER, 8)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert batch["labels"][0, 4] == IGNORED
    assert batch["labels"][1].tolist() == [IGNORED, examples[2].target[1], *[IGNORED] * 5]
    assert Causal().objective.num_targets(batch) == Causal().objective.num_targets(
        Causal().collator.collate(examples, TOKENIZER)
    )


@pytest.mark.parametrize("task", ["classification", "masked"])
def test_check_settings_packing_unsupported_task_raises(task: str) -> None:
    with pytest.raises(ConfigError, match=f"rows of {task} cannot be packed"):
        check_settings(TrainingSettings(packing=True), True, parse_task(task))


def test_can_pack_is_false_for_encoder_decoder() -> None:
    from transformers import BartConfig

    task = parse_task("summarization").for_model(BartConfig())
    assert not task.can_pack
    assert not Masked().can_pack
    assert Causal().can_pack
