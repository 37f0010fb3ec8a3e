"""Switching between adapters that train: their parameters are walked once, and again after anything was exchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graftwerk.modeling.attach as gw
from graftwerk.modeling import adapter_tensors
from graftwerk.modeling.adapter_walk import AdapterWalk
from graftwerk.modeling.module_index import base_modules
from tests.contract.cases import method_of, model_and_batch

QUERY = "bert.encoder.layer.0.attention.self.query"


def of(adapter: gw.Adapter, path: str) -> Any:
    return dict(adapter.modules())[path]


def renew_parameter(model: Any, adapter: gw.Adapter) -> None:
    factor = of(adapter, QUERY).lora_A
    factor.weight = nn.Parameter(factor.weight.detach().clone(), factor.weight.requires_grad)


def assign_tensors(model: Any, adapter: gw.Adapter) -> None:
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)


def convert(model: Any, adapter: gw.Adapter) -> None:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def widen_head(model: Any, adapter: gw.Adapter) -> None:
    tensors = adapter.state_dict()
    tensors |= {key: value.repeat_interleave(2, 0) for key, value in tensors.items() if adapter.is_head(key)}
    adapter.load_state_dict(tensors)


def add_module(model: Any, adapter: gw.Adapter) -> None:
    of(adapter, "classifier").extra = nn.Linear(2, 2).requires_grad_(adapter.active)


def rename_module(model: Any, adapter: gw.Adapter) -> None:
    children = of(adapter, QUERY)._modules
    children["other"] = children.pop("lora_B")


def remove_parameter(model: Any, adapter: gw.Adapter) -> None:
    of(adapter, QUERY).lora_A.weight = None


def exchange_hosts(model: Any, adapter: gw.Adapter) -> None:
    layers = model.bert.encoder.layer
    layers[0], layers[1] = layers[1], copy.deepcopy(layers[0])


def exchange_slots(model: Any, adapter: gw.Adapter) -> None:
    model.classifier._modules["graft"] = copy.deepcopy(model.classifier._modules["graft"])


def exchange_module(model: Any, adapter: gw.Adapter) -> None:
    slots = model.classifier._modules["graft"]
    slots.put(adapter.name, copy.deepcopy(slots.get(adapter.name)))


ACTIONS = [
    renew_parameter, assign_tensors, convert, widen_head, add_module, rename_module, remove_parameter, exchange_hosts,
    exchange_slots, exchange_module,
]  # fmt: skip


def flags(adapter: gw.Adapter) -> set[bool]:
    return {parameter.requires_grad for _, module in adapter.modules() for parameter in module.parameters()}


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_activate_after_exchange_of_modules_or_parameters_trains_the_chosen_adapter_alone(
    action: Callable[[Any, gw.Adapter], None], idle: bool
) -> None:
    model, _ = model_and_batch("lora", "bert", rows=2)
    first, second = (gw.attach(model, method_of("lora"), name) for name in ("first", "second"))
    for name in ("first", "second", "first"):
        gw.activate(model, name)
    action(model, second if idle else first)
    for adapter, other in ((second, first), (first, second)):
        gw.activate(model, adapter.name)
        assert (flags(adapter), flags(other)) == ({True}, {False})
        assert {id(parameter) for parameter in adapter.parameters()} <= {id(one) for one in model.parameters()}


def test_base_modules_follow_a_renamed_child() -> None:
    model, _ = model_and_batch("lora", "bert", rows=2)
    layers = model.bert.encoder.layer._modules
    assert "bert.encoder.layer.1" in base_modules(model)
    layers["last"] = layers.pop("1")
    assert base_modules(model)["bert.encoder.layer.last"] is layers["last"]


def test_activate_walks_each_adapter_once_and_its_own_flags_last(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []

    class Counted(AdapterWalk):
        def __init__(self, *args: Any) -> None:
            walks.append(args)
            super().__init__(*args)

    monkeypatch.setattr(adapter_tensors, "AdapterWalk", Counted)
    model, _ = model_and_batch("lora", "bert", rows=2)
    first, second = (gw.attach(model, method_of("lora"), name) for name in ("first", "second"))
    fixed = next(second.parameters()).requires_grad_(False)
    for name in ("first", "second", "first", "second"):
        gw.activate(model, name)
    assert [args[1] for args in walks] == ["first", "second"]
    assert not fixed.requires_grad
    twin = copy.deepcopy(model)
    gw.activate(twin, "first")
    assert (flags(gw.adapters(twin)["first"]), flags(first)) == ({True}, {False})


def test_activate_asks_only_adapters_that_begin_or_cease_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_and_batch("lora", "bert", rows=2)
    adapters = {name: gw.attach(model, method_of("lora"), name) for name in ("a", "b", "c", "d")}
    adapters["c"].freeze()
    asked: list[tuple[str, bool]] = []
    train_while = adapter_tensors.AdapterTensors.train_while

    def note(self: Any, used: bool) -> None:
        asked.append((self.name, used))
        train_while(self, used)

    monkeypatch.setattr(adapter_tensors.AdapterTensors, "train_while", note)
    for chosen, expected in (
        ("a", {("d", False), ("a", True)}),
        ("c", {("a", False)}),
        ("b", {("b", True)}),
        (["b", "c"], set()),
        (None, {("b", False)}),
    ):
        gw.activate(model, chosen)
        assert set(asked) == expected
        asked.clear()
    gw.activate(model, "b")
    adapters["b"].delete()
    again = gw.attach(model, method_of("lora"), "b")
    assert flags(again) == {True}
    again.freeze()
    for name in ("a", "b", "a"):
        gw.activate(model, name)
        assert (flags(adapters["a"]), flags(again)) == ({name == "a"}, {False})
