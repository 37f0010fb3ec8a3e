"""The last layer at the first token alone gives the answers and gradients of the whole layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from graftwerk.kernels import flags
from graftwerk.kernels.first_token import READERS, first_token_alone
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.activate import activate
from graftwerk.modeling.attach import attach
from graftwerk.tasks.objective import ClassObjective, LabelObjective, ScoreObjective
from tests.contract.cases import METHODS
from tests.families import SMALL

FAMILIES = [name.removesuffix("ForSequenceClassification") for name in sorted(READERS)]
HOOKED = {"prompt": 3, "ptuning mlp": 3, "ptuning lstm": 3, "prefix": 0, "prefix mlp": 0}
"""Tokens that methods with hooks on the stack put in front of a row."""


def classifier(family: str = "Bert", **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SMALL, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0, **settings}
    if family == "DebertaV2":
        sizes |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
        sizes["pooler_hidden_size"] = sizes["hidden_size"]
    config = getattr(tf, f"{family}Config")(**sizes)
    return getattr(tf, f"{family}ForSequenceClassification")(config).eval()


def batch_of(labels: Tensor | None = None) -> dict[str, Tensor]:
    tokens = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 4, 6, 7])[:, None]).long()
    return {
        "input_ids": tokens * mask,
        "attention_mask": mask,
        "labels": torch.tensor([0, 2, 1, 2]) if labels is None else labels,
    }


def lengths_read(model: Any) -> list[int]:
    """Note the number of tokens that the last layer's feed-forward block reads, from now on."""
    lengths: list[int] = []
    block = model.base_model.encoder.layer[-1].intermediate.dense
    block.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    return lengths


def learn(model: Any, objective: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and the gradients of a step."""
    model.zero_grad()
    outputs = objective.forward(model, batch)
    objective.loss(outputs, batch).backward()
    return outputs.logits.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def compare(model: Any, objective: Any, batch: dict[str, Tensor]) -> None:
    with flags.plain("first"):
        logits, gradients = learn(model, objective, batch)
    found, others = learn(model, objective, batch)
    torch.testing.assert_close(found, logits, atol=1e-6, rtol=1e-5)
    assert others.keys() == gradients.keys()
    assert any(bool(gradient.any()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_token_gives_logits_and_gradients_of_the_whole_layer(family: str) -> None:
    model = classifier(family)
    lengths = lengths_read(model)
    compare(model, ClassObjective(), batch_of())
    assert lengths == [9, 1]


@pytest.mark.parametrize("method", METHODS)
def test_first_token_with_each_method_equals_the_plain_path(method: str) -> None:
    model = classifier()
    adapter = attach(model, parse_method(METHODS[method]))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapter.named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    lengths = lengths_read(model)
    compare(model, ClassObjective(), batch_of())
    whole = 9 + HOOKED.get(method, 0)
    assert lengths == [whole, whole if method in HOOKED else 1]


def test_first_token_with_an_adapter_for_each_row_equals_the_plain_path() -> None:
    model = classifier()
    for name in ("a", "b"):
        adapter = attach(model, parse_method({"name": "lora", "r": 2}), name)
        for _, parameter in adapter.named_parameters():
            nn.init.normal_(parameter, std=0.1)
    activate(model, rows=["a", None, "b", "a"])
    lengths = lengths_read(model)
    compare(model, ClassObjective(), batch_of())
    assert lengths == [9, 1]


@pytest.mark.parametrize(
    ("objective", "classes", "labels"),
    [
        (ScoreObjective(mean=1.0, deviation=2.0), 1, torch.tensor([0.5, 1.0, -2.0, 3.0])),
        (LabelObjective(), 3, torch.eye(3)[[0, 2, 1, 2]]),
    ],
)
def test_first_token_serves_numbers_and_several_labels(objective: Any, classes: int, labels: Tensor) -> None:
    model = classifier(num_labels=classes)
    lengths = lengths_read(model)
    compare(model, objective, batch_of(labels))
    assert lengths == [9, 1]


def _checkpointed(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()


def _subclassed(model: Any) -> None:
    class Mean(type(model)):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            return super().forward(**inputs)

    model.__class__ = Mean


def _chunked(model: Any) -> None:
    for layer in model.base_model.encoder.layer:
        layer.chunk_size_feed_forward = 3
    model.config.chunk_size_feed_forward = 3


class _Mean(nn.Module):
    """A reader of all tokens in place of the pooler."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(dim=1)


def _other_stack(model: Any) -> None:
    class Stack(type(model.bert)):  # type: ignore[misc]
        pass

    model.bert.__class__ = Stack


@pytest.mark.parametrize(
    "change",
    [
        _checkpointed,
        _subclassed,
        _chunked,
        lambda model: setattr(model.config, "output_hidden_states", True),
        lambda model: model.base_model.register_forward_hook(lambda module, inputs, output: None),
        lambda model: setattr(model.bert, "pooler", _Mean()),
        lambda model: model.bert.pooler.register_forward_hook(lambda module, inputs, output: None),
        lambda model: setattr(model, "forward", model.forward),
        _other_stack,
    ],
    ids=[
        "checkpointing",
        "another forward",
        "chunks",
        "hidden states",
        "a hook",
        "another reader",
        "a reader's hook",
        "a forward of its own",
        "another stack",
    ],
)
def test_whole_layer_runs_if_more_than_the_first_token_may_be_read(change: Callable[[Any], None]) -> None:
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    change(model)
    lengths = lengths_read(model)
    outputs = ClassObjective().forward(model, batch_of())
    outputs.logits.sum().backward()
    assert lengths
    assert set(lengths) <= {3, 9}


def test_replaced_head_that_reads_all_tokens_gets_them() -> None:
    model = classifier("Roberta")
    model.classifier = nn.Sequential(_Mean(), nn.Linear(SMALL["hidden_size"], 3))
    with flags.plain("first"):
        whole = ClassObjective().forward(model, batch_of()).logits
    assert torch.equal(ClassObjective().forward(model, batch_of()).logits, whole)


def test_model_without_layers_is_left_alone() -> None:
    model = classifier(num_hidden_layers=0)
    assert ClassObjective().forward(model, batch_of()).logits.shape == (4, 3)


def test_checkpointed_layer_runs_again_for_the_first_token() -> None:
    model, objective = classifier(), ClassObjective()
    gradients = learn(model, objective, batch_of())[1]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _checkpointed(model)
    lengths = lengths_read(model)
    with objective.narrowed(model):
        _, found = learn(model, objective, batch_of())
    assert lengths == [1, 1]
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_first_token_leaves_no_hook_behind() -> None:
    model = classifier()
    with pytest.raises(IndexError):
        ClassObjective().forward(model, {"input_ids": torch.tensor([[64]])})
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_whose_head_reads_other_tokens_are_left_alone() -> None:
    config = tf.DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=2)
    for model in (tf.DistilBertForSequenceClassification(config), nn.Linear(2, 2)):
        with first_token_alone(model):
            assert not any(module._forward_pre_hooks for module in model.modules())
