"""LoRA on parameters against its equation, expert by expert, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.methods.base import Role, TargetModule
from graftwerk.methods.lora import LoRA
from graftwerk.methods.lora_parameters import ParameterLoRA

E, R, IN, OUT = 4, 3, 5, 6


def lora(experts: int = E, transposed: bool = False) -> ParameterLoRA:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(experts * R, IN, generator=draw), torch.randn(OUT, R * experts, generator=draw)
    return ParameterLoRA(nn.Parameter(a), nn.Parameter(b), 0.5, experts, transposed)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def update(module: ParameterLoRA, expert: int) -> Tensor:
    """s B_e A_e, taken apart as PEFT lays it out."""
    a, b = module.lora_A.weight, module.lora_B.weight
    return 0.5 * b[:, expert :: module.experts] @ a[expert * R : (expert + 1) * R]


def test_merged_value_of_experts_equals_the_equation() -> None:
    module, value = lora(), weight(E, OUT, IN)
    expected = torch.stack([value[e] + update(module, e) for e in range(E)])
    torch.testing.assert_close(module.merged_value(value), expected, atol=1e-6, rtol=1e-6)


def test_merged_value_of_transposed_experts_equals_the_equation() -> None:
    module, value = lora(transposed=True), weight(E, IN, OUT)
    expected = torch.stack([value[e] + update(module, e).T for e in range(E)])
    torch.testing.assert_close(module.merged_value(value), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(OUT, IN), (1, OUT, IN)])
def test_merged_value_of_one_matrix_equals_the_equation(shape: tuple[int, ...]) -> None:
    module, value = lora(experts=1), weight(*shape)
    expected = value + update(module, 0)
    torch.testing.assert_close(module.merged_value(value), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_merge_in_place_equals_merged_value(transposed: bool) -> None:
    module, value = lora(transposed=transposed), weight(E, *((IN, OUT) if transposed else (OUT, IN)))
    expected, place = module.merged_value(value), value.data_ptr()
    with torch.no_grad():
        module.merge_(value)
    assert torch.equal(value, expected)
    assert value.data_ptr() == place


def test_merged_value_under_autocast_keeps_its_precision() -> None:
    module, value = lora(), weight(E, OUT, IN)
    with torch.autocast("cpu", torch.bfloat16):
        merged = module.merged_value(value)
    assert torch.equal(merged, module.merged_value(value))
    assert module.merged_value(value.bfloat16()).dtype is torch.bfloat16


def target(experts: int = E) -> TargetModule:
    return TargetModule("layers.0.experts.up", Role.PARAMETER, IN, OUT, False, layer=0, stack="causal", experts=experts)


def test_num_parameters_of_experts_follows_formula() -> None:
    method = LoRA(r=R, target_modules=[], target_parameters=["experts.up"], rank_pattern={"up": 7})
    built = method.build(target(), nn.Module())
    assert method.num_parameters([target()]) == E * 7 * (IN + OUT) == sum(p.numel() for p in built.parameters())


def test_parameter_lora_init_equals_lora_per_expert() -> None:
    layer = nn.Linear(IN, OUT)
    torch.manual_seed(0)
    built: Any = LoRA(r=R, target_modules=[], target_parameters=["up"]).build(target(), nn.Module())
    torch.manual_seed(0)
    plain: Any = LoRA(r=R * E).build(TargetModule("q", Role.QUERY, IN, OUT, False), layer)
    assert torch.equal(built.lora_A.weight, plain.lora_A.weight)
    assert not built.lora_B.weight.any()
    random: Any = LoRA(target_modules=[], target_parameters=["up"], init_lora_weights=False).build(
        target(), nn.Module()
    )
    assert random.lora_B.weight.any()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ],
)
def test_variant_on_parameters_raises(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=f"target_parameters and {named} exclude each other"):
        LoRA(target_parameters=["up"], **settings)
    LoRA(**settings)


def test_lora_without_any_target_raises() -> None:
    with pytest.raises(ValidationError, match="nothing would be adapted"):
        LoRA(target_modules=[], target_parameters=[])


def linear(path: str, layer: int) -> TargetModule:
    return TargetModule(path, Role.QUERY, IN, IN, False, layer=layer, stack="causal")


AVAILABLE = [
    *(linear(f"layers.{layer}.q_proj", layer) for layer in range(2)),
    *(
        TargetModule(f"layers.{layer}.{name}", Role.PARAMETER, IN, IN, False, None, layer, "causal", unfit=unfit)
        for layer in range(2)
        for name, unfit in (("experts.up_proj", None), ("q_proj.weight", None), ("norm.weight", "it has 1 dimension"))
    ),
]


def selected(**settings: Any) -> list[str]:
    return [one.path for one in LoRA(**settings).select_targets(AVAILABLE)]


def test_parameters_are_selected_alone_or_beside_modules() -> None:
    experts = ["layers.0.experts.up_proj", "layers.1.experts.up_proj"]
    assert selected(target_modules=[], target_parameters=["up_proj"]) == experts
    assert selected(target_parameters=["experts.up_proj"]) == ["layers.0.q_proj", "layers.1.q_proj", *experts]
    assert selected(target_modules=["q_proj"], target_parameters=experts[:1])[2:] == experts[:1]
    assert selected(target_modules=[], target_parameters=["up_proj"], layers="top-1") == experts[1:]
    assert selected() == ["layers.0.q_proj", "layers.1.q_proj"]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target_parameters": ["experts.upproj"]}, ConfigError, "(?s)`experts.upproj` .* mean `experts.up_proj`"),
        ({"target_parameters": ["norm.weight"]}, UnsupportedError, "layers.0.norm.weight`: it has 1 dimension"),
        ({"target_parameters": ["q_proj.weight"]}, ConfigError, "target_modules adapts as well"),
        ({"target_parameters": ["0.experts.up_proj"], "layers": "top-1"}, ConfigError, "in none of the chosen layers"),
        ({"target_parameters": ["up_proj"], "rank_pattern": {"up": 2}}, ConfigError, "`up` matches none"),
    ],
)
def test_target_parameters_unsupported_raise(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LoRA(**settings).select_targets(AVAILABLE)
