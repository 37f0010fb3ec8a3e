"""torch.compile: adapted models are traced without a break, and give what they give eagerly.

No code is generated: the backends run the traced graph (`Counting`), or that of forward and backward (`aot_eager`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import graftwerk as gw
from graftwerk.kernels import flags
from graftwerk.methods.dropout import InputDropout
from tests.contract.cases import METHODS, REFUSED, method_of, perturb
from tests.families import FAMILIES, Family

UNBROKEN = {
    "lora": "llama", "dora": "bert", "ia3": "llama", "houlsby": "bert", "parallel": "bert", "bitfit": "bert",
    "prefix": "llama", "prompt": "llama",
}  # fmt: skip
"""Methods, and the family of their fast test."""
PAIRS = [
    (name, family)
    for name in METHODS
    for family in ("bert", "llama", "t5")
    if name != "probe" and (name, family) not in REFUSED
]
MATRIX = [pytest.param(name, family, marks=pytest.mark.slow) for name, family in PAIRS]
BROKEN = ("ptuning lstm",)
"""Methods whose graphs are cut: torch leaves LSTMs out of graphs."""
P = 0.2
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def _shallow(family: Family) -> Family:
    def config() -> Any:
        made = family.config()
        made.num_hidden_layers = 1
        return made

    return replace(family, config=config)


SHALLOW = {name: _shallow(FAMILIES[name]) for name in ("bert", "llama", "t5")}
"""Models of one layer: each layer is traced, and takes its time."""


class Counting:
    """A backend that counts the graphs which dynamo hands over, and runs them as they are, or by a compiler."""

    def __init__(self) -> None:
        self.graphs, self.compiler = 0, lambda graph, inputs: graph.forward

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made = self.compiler(graph, inputs)  # may raise to have the frame traced again
        self.graphs += 1
        return made


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(name: str, family: str, p: float) -> tuple[Any, gw.Adapter, dict[str, Tensor]]:
    """A model with an adapter, in training mode if there is dropout."""
    chosen, method = SHALLOW[family], method_of(name)
    method = method.model_copy(update={key: p for key in type(method).model_fields if key.endswith("_dropout")})
    model = chosen.build(dropout=p)
    torch.manual_seed(5)
    adapter = gw.attach(model, method)
    perturb(adapter.parameters(), 7, scale=0.1)
    return model.train(p > 0), adapter, chosen.batch(labels=True)


def step(call: Any, adapter: gw.Adapter, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    adapter.model.zero_grad()
    torch.manual_seed(11)
    loss = call(**batch).loss
    loss.backward()
    return loss.detach(), {key: value.grad.clone() for key, value in adapter.named_parameters()}


def native_dropout(self: InputDropout, x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.dropout(x.to(dtype), self.p)


def compare_steps(name: str, family: str, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a compiled training step with dropout with an eager one that draws its masks as graphs do."""
    model, adapter, batch = adapted(name, family, P)
    loss, gradients = step(torch.compile(model, backend=backend, fullgraph=name not in BROKEN), adapter, batch)
    monkeypatch.setattr(InputDropout, "dropped", native_dropout)
    with flags.plain():
        expected, plain = step(model, adapter, batch)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(gradients, plain, **CLOSE)


def compare_evaluations(name: str, family: str, backend: Any) -> None:
    model, _, batch = adapted(name, family, 0.0)
    with torch.no_grad():
        logits = torch.compile(model, backend=backend, fullgraph=name not in BROKEN)(**batch).logits
        expected = model(**batch).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize(("name", "family"), UNBROKEN.items())
def test_compiled_step_with_dropout_is_one_graph_and_equals_eager(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting()
    compare_steps(name, family, counting, monkeypatch)
    assert counting.graphs == 1


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_compiled_evaluation_is_one_graph_and_equals_eager(name: str) -> None:
    counting = Counting()
    compare_evaluations(name, "bert", counting)
    assert counting.graphs == 1


@pytest.mark.parametrize(("name", "family"), MATRIX)
def test_contract_compiled_forward_and_backward_equal_eager(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_steps(name, family, "aot_eager", monkeypatch)
    torch._dynamo.reset()
    compare_evaluations(name, family, "aot_eager")


@pytest.mark.parametrize("training", [False, True])
def test_compiled_classifier_with_a_head_of_its_own_is_one_graph(training: bool) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config)
    gw.attach(model, method_of("lora"))
    ids = torch.arange(1, 17, device="cpu").view(2, 8)
    logits = torch.compile(model.train(training), backend="eager", fullgraph=True)(input_ids=ids).logits
    assert logits.shape == (2, 3)
