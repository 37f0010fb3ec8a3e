"""Groups, rates and schedules; the optimizer's state by name."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from graftwerk.errors import IntegrityError
from graftwerk.methods.base import Method
from graftwerk.methods.learning_rates import LEARNING_RATES
from graftwerk.methods.lora import LoRA
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.attach import Adapter, attach
from graftwerk.tasks.token_classification import TokenClassification
from graftwerk.training.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    peak_rates,
    schedule,
    set_rates,
)
from graftwerk.training.settings import TrainingSettings


def grafted(tiny_encoder: Path, method: Method | str = "lora") -> Adapter:
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    return attach(model, parse_method(method))


def rates_by_key(graft: Adapter, **settings: object) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(graft, TrainingSettings(**settings))  # type: ignore[arg-type]
    return {key: (group["lr"], group["weight_decay"]) for group in groups for key in group["keys"]}


def test_parameter_groups_have_every_parameter_once(tiny_encoder: Path) -> None:
    graft = grafted(tiny_encoder, "houlsby")
    groups = parameter_groups(graft, TrainingSettings(weight_decay=0.1))
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in graft.parameters()}
    assert len(grouped) == len(list(graft.parameters()))


def test_parameter_groups_decay_only_matrices(tiny_encoder: Path) -> None:
    for method in ("houlsby", "ia3", "bitfit", "dora"):
        graft = grafted(tiny_encoder, method)
        shapes = {key: tuple(parameter.shape) for key, parameter in graft.named_parameters()}
        for key, (_, decay) in rates_by_key(graft, weight_decay=0.1).items():
            matrix = len(shapes[key]) == 2 and 1 not in shapes[key]
            assert decay == (0.1 if matrix else 0.0), (method, key, shapes[key])


def test_peak_rates_auto_are_method_defaults(tiny_encoder: Path) -> None:
    graft = grafted(tiny_encoder)
    own = LoRA.default_learning_rate
    assert peak_rates(graft, TrainingSettings()).method == own
    assert peak_rates(graft, TrainingSettings(learning_rate=7e-4)).method == 7e-4
    assert peak_rates(graft, TrainingSettings(head_learning_rate=5e-5)).head == 5e-5


def test_peak_rates_auto_are_those_of_the_task(tiny_encoder: Path) -> None:
    graft = grafted(tiny_encoder)
    rates = peak_rates(graft, TrainingSettings(), TokenClassification())
    assert rates.method == rates.head == LEARNING_RATES["token-classification"]["lora"] != LoRA.default_learning_rate
    assert peak_rates(graft, TrainingSettings(learning_rate=7e-4), TokenClassification()).method == 7e-4


def test_peak_rates_head_follows_method_or_its_default(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graft = grafted(tiny_encoder)
    monkeypatch.setattr(LoRA, "default_head_learning_rate", None)
    assert peak_rates(graft, TrainingSettings(learning_rate=7e-4)).head == 7e-4
    monkeypatch.setattr(LoRA, "default_head_learning_rate", 3e-3)
    assert peak_rates(graft, TrainingSettings(learning_rate=7e-4)).head == 3e-3
    rates = rates_by_key(graft, learning_rate=7e-4)
    assert rates["classifier.weight"][0] == 3e-3
    assert rates["bert.encoder.layer.0.attention.self.query.lora_A.weight"][0] == 7e-4


def test_parameter_groups_lora_plus_ratio_applies_to_b(tiny_encoder: Path) -> None:
    rates = rates_by_key(grafted(tiny_encoder, LoRA(loraplus_lr_ratio=16.0)), learning_rate=1e-3)
    place = "bert.encoder.layer.0.attention.self.query"
    assert rates[f"{place}.lora_A.weight"][0] == pytest.approx(1e-3)
    assert rates[f"{place}.lora_B.weight"][0] == pytest.approx(16e-3)
    assert rates["classifier.weight"][0] == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedule_rises_and_falls(kind: str) -> None:
    factors = [schedule(kind, step, total=100, warmup=10) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))
    if kind == "constant":
        assert factors[-1] == 1.0
    else:
        assert 0 < factors[-1] < 0.02
        assert factors[55] == pytest.approx(0.5, abs=0.01)
    assert schedule("linear", 0, total=1, warmup=0) == 1.0


def test_set_rates_multiplies_peaks(tiny_encoder: Path) -> None:
    optimizer = build_optimizer(grafted(tiny_encoder), TrainingSettings(learning_rate=1e-2))
    set_rates(optimizer, 0.5)
    set_rates(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-3}


def test_optimizer_tensors_roundtrip_continues_equally(tiny_encoder: Path) -> None:
    def step(graft: Adapter, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in graft.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    settings = TrainingSettings(weight_decay=0.01)
    first, second = grafted(tiny_encoder), grafted(tiny_encoder)
    one, two = build_optimizer(first, settings), build_optimizer(second, settings)
    step(first, one, 1)
    stored = {key: tensor.clone() for key, tensor in optimizer_tensors(one).items()}
    assert stored["step.classifier.weight"].item() == 1
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(two, stored)
    step(first, one, 2)
    step(second, two, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_load_optimizer_tensors_foreign_state_raises(tiny_encoder: Path) -> None:
    optimizer = build_optimizer(grafted(tiny_encoder), TrainingSettings())
    state = dict(optimizer_tensors(optimizer))
    missing = {key: tensor for key, tensor in state.items() if key != "exp_avg.classifier.bias"}
    with pytest.raises(IntegrityError, match=r"exp_avg.classifier.bias"):
        load_optimizer_tensors(optimizer, missing)
    with pytest.raises(IntegrityError, match="shape"):
        load_optimizer_tensors(optimizer, {**state, "exp_avg.classifier.bias": torch.zeros(7)})
