"""Parameter counts by formula, and the equations of the layer methods against their papers, number by number."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graftwerk.modeling.attach as gw
from graftwerk.errors import ConfigError
from graftwerk.kernels import flags
from graftwerk.methods.base import Role, SmallModule, TargetModule
from graftwerk.methods.bottleneck import Bottleneck, BottleneckNetwork
from graftwerk.methods.ia3 import IA3
from graftwerk.methods.lora import LoRA
from graftwerk.methods.low_rank import init_factors
from graftwerk.methods.pissa import pissa_init
from graftwerk.methods.qera import qera_init
from graftwerk.methods.registry import METHODS, SHORTHANDS, parse_method
from graftwerk.modeling.adapted_module import adapt
from graftwerk.modeling.adapter_slots import ModelAdapters
from tests.families import FAMILIES


def place(inputs: int, outputs: int, role: Role = Role.OTHER_LINEAR, bias: bool = True) -> TargetModule:
    return TargetModule("layer", role, inputs, outputs, bias)


def adapted(method: Any, inputs: int = 12, outputs: int = 10, role: Role = Role.OTHER_LINEAR) -> tuple[nn.Linear, Any]:
    """One linear layer with one delta on it, active."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    record = ModelAdapters(layer)
    delta = method.build(place(inputs, outputs, role), layer)
    record.slots(layer).put("a", delta)
    adapt(layer, record.slots(layer))
    record.selection.choose(("a",))
    layer.requires_grad_(False)
    delta.requires_grad_(True)
    return layer, delta


def test_num_parameters_lora_r8_on_512x512_is_8192() -> None:
    delta = LoRA(r=8).build(place(512, 512), nn.Linear(512, 512))
    assert LoRA(r=8).num_parameters([place(512, 512)]) == sum(p.numel() for p in delta.parameters()) == 8192


def test_num_parameters_bottleneck_64_on_1024_follows_formula() -> None:
    network = BottleneckNetwork(1024, 1024, 64, "gelu", False, 1.0)
    without = Bottleneck(adapter_size=64, layer_norm=False)
    assert without.num_parameters([place(1024, 1024)]) == sum(p.numel() for p in network.parameters()) == 132_160
    assert without.num_parameters([place(1024, 1024)] * 48) == 6_343_680
    assert Bottleneck(adapter_size=64).num_parameters([place(1024, 1024)]) == 132_160 + 2 * 1024


def test_num_parameters_dora_and_ia3_follow_formula() -> None:
    assert LoRA(r=4, use_dora=True).num_parameters([place(30, 20)]) == 4 * 50 + 20
    assert IA3().num_parameters([place(30, 20, Role.KEY), place(30, 20, Role.FFN_OUT)]) == 20 + 30


def test_num_parameters_of_miss_hira_shira_and_oft() -> None:
    target = [place(30, 20)]
    assert parse_method({"name": "miss", "r": 4}).num_parameters(target) == 4 * 20
    assert parse_method({"name": "miss", "r": 4, "init_weights": "mini", "mini_r": 5}).num_parameters(target) == 4 * 5
    assert parse_method({"name": "hira", "r": 4}).num_parameters(target) == 4 * 50
    assert parse_method({"name": "shira", "r": 4}).num_parameters(target) == 4 * 50
    assert parse_method({"name": "oft", "oft_block_size": 5}).num_parameters(target) == 6 * 10
    assert parse_method({"name": "oft", "r": 5}).num_parameters(target) == 5 * 15
    assert parse_method({"name": "oft", "r": 5, "block_share": True}).num_parameters(target) == 15
    square = [place(384, 384)]
    sizes = [parse_method(name).num_parameters(square) for name in ("lora", "miss", "hira", "shira", "oft")]
    assert sizes[:4] == [6144] * 4
    assert sizes[4] == 5952  # as near as blocks of a divisor come


def test_lora_output_equals_equation() -> None:
    layer, delta = adapted(LoRA(r=3, lora_alpha=7))
    nn.init.normal_(delta.lora_B.weight)
    x = torch.randn(2, 5, 12)
    expected = F.linear(x, layer.weight, layer.bias) + (7 / 3) * x @ delta.lora_A.weight.T @ delta.lora_B.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_lora_scale_follows_rslora_and_patterns() -> None:
    method = LoRA(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"q": 16}, alpha_pattern={"b.q": 2})
    assert method.scale_at("x.v") == 8 / math.sqrt(4)
    assert method.scale_at("a.q") == 8 / math.sqrt(16)
    assert method.scale_at("b.q") == 2 / math.sqrt(16)
    assert method.rank_at("b.q") == 16
    assert method.scale_at("x.notq") == 8 / math.sqrt(4)


def test_dora_output_equals_equation() -> None:
    """m * (W + sBA) / ||W + sBA||, rows being outputs."""
    layer, delta = adapted(LoRA(r=3, use_dora=True))
    with torch.no_grad():
        delta.lora_B.weight.normal_()
        delta.lora_magnitude_vector.add_(torch.rand(10))
    x = torch.randn(2, 5, 12)
    whole = layer.weight + delta.scale * delta.lora_B.weight @ delta.lora_A.weight
    whole = delta.lora_magnitude_vector[:, None] * whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias))


def test_pissa_init_is_best_low_rank_approximation() -> None:
    weight = torch.randn(10, 12)
    a, b = pissa_init(weight, 4, scale=2.0)
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(2.0 * b @ a, u[:, :4] @ torch.diag(s[:4]) @ vh[:4], atol=1e-5, rtol=1e-4)


def test_qera_init_minimises_error_of_outputs() -> None:
    """On inputs of these sizes no matrix of rank 3 corrects more: the best is a truncated SVD of the scaled error."""
    torch.manual_seed(0)
    error, mean_square = torch.randn(10, 12), torch.rand(12) * torch.logspace(-4, 2, 12)
    a, b = qera_init(error, mean_square, torch.randn(3, 12), torch.zeros(10, 3), scale=2.0)
    left = ((error - 2.0 * b @ a) ** 2 * mean_square).sum()
    best = (torch.linalg.svdvals(error * mean_square.sqrt())[3:] ** 2).sum()
    assert left.item() == pytest.approx(best.item(), rel=1e-4)
    assert left < ((error - truncated_svd(error, 3)) ** 2 * mean_square).sum() / 2  # which ignores the inputs
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def truncated_svd(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_qera_init_of_a_large_layer_is_near_the_best() -> None:
    """The decomposition of a large matrix is randomised."""
    torch.manual_seed(0)
    error = torch.randn(300, 400)
    a, b = qera_init(error, torch.ones(400), torch.randn(8, 400), torch.zeros(300, 8), scale=0.5)
    squares = torch.linalg.svdvals(error) ** 2
    corrected = squares.sum() - ((error - 0.5 * b @ a) ** 2).sum()
    assert corrected > 0.99 * squares[:8].sum()


def test_small_module_has_the_state_of_a_module() -> None:
    one, other, plain = SmallModule(), SmallModule(), nn.Module()
    assert {key: type(value) for key, value in vars(one).items()} == {
        key: type(value) for key, value in vars(plain).items()
    }
    shared = [key for key, value in vars(one).items() if isinstance(value, dict | set) and value is vars(other)[key]]
    assert not shared


def test_qera_init_keeps_drawn_directions_where_there_is_no_error() -> None:
    error, (a, b) = torch.outer(torch.ones(4), torch.arange(6.0)), init_factors(6, 4, 5, zero_b=True)
    started_a, started_b = qera_init(error, torch.ones(6), a, b, scale=0.5)
    torch.testing.assert_close(0.5 * started_b @ started_a, error, atol=1e-5, rtol=1e-5)
    assert torch.equal(started_a[1:], a[1:])
    assert not started_b[:, 1:].any()
    for nothing, inputs in ((torch.zeros(4, 6), torch.ones(6)), (error, torch.zeros(6))):
        started_a, started_b = qera_init(nothing, inputs, a, b, scale=0.5)
        assert torch.equal(started_a, a)
        assert torch.equal(started_b, b)


def test_ia3_and_bitfit_outputs_equal_equations() -> None:
    x = torch.randn(2, 5, 12)
    layer, delta = adapted(IA3(), role=Role.KEY)
    nn.init.normal_(delta.ia3_l)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) * delta.ia3_l.flatten())
    layer, delta = adapted(IA3(), role=Role.FFN_OUT)
    nn.init.normal_(delta.ia3_l)
    torch.testing.assert_close(layer(x), F.linear(x * delta.ia3_l.flatten(), layer.weight, layer.bias))
    layer, delta = adapted(parse_method("bitfit"))
    nn.init.normal_(delta.bitfit_b)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias + delta.bitfit_b))


def test_bottleneck_output_equals_equation() -> None:
    layer, delta = adapted(Bottleneck(adapter_size=3, non_linearity="relu", scaling=0.5))
    net = delta.bottleneck
    nn.init.normal_(net.up.weight)
    x = torch.randn(2, 5, 12)
    y = F.linear(x, layer.weight, layer.bias)
    inner = F.relu(F.linear(F.layer_norm(y, (10,), net.norm.weight, net.norm.bias), net.down.weight, net.down.bias))
    torch.testing.assert_close(layer(x), y + 0.5 * F.linear(inner, net.up.weight, net.up.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_gradient", [True, False])
def test_lora_fused_equals_plain(bias: bool, input_gradient: bool) -> None:
    """Outputs and every gradient, one autograd node against the plain operations."""
    layer, delta = adapted(LoRA(r=3, lora_alpha=5))
    if not bias:
        layer.bias = None
    nn.init.normal_(delta.lora_B.weight)
    x = torch.randn(2, 5, 12, requires_grad=input_gradient)
    upstream = torch.randn(2, 5, 10)
    results = []
    for fused in (True, False):
        x.grad = delta.lora_A.weight.grad = delta.lora_B.weight.grad = None
        with nullcontext() if fused else flags.plain("fused"):
            y = layer(x)
        assert ("LoRALinear" in type(y.grad_fn).__name__ or "LoRALinear" in str(y.grad_fn.next_functions)) == fused
        (y * upstream).sum().backward()
        results.append([y.detach(), x.grad, delta.lora_A.weight.grad, delta.lora_B.weight.grad])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_lora_dropout_affects_low_rank_path_only() -> None:
    layer, delta = adapted(LoRA(r=3, lora_dropout=0.5))
    x = torch.randn(4, 12)
    delta.train()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))  # B is zero: nothing else is dropped
    nn.init.normal_(delta.lora_B.weight)
    assert not torch.equal(layer(x), layer(x))
    delta.eval()
    assert torch.equal(layer(x), layer(x))


def test_miss_output_equals_equation() -> None:
    """Every input entry i meets row i mod r of D: shards of 5 of 12 inputs, the last of two entries."""
    layer, delta = adapted(parse_method({"name": "miss", "r": 5}))
    nn.init.normal_(delta.miss_block)
    x = torch.randn(2, 4, 12)
    whole = layer.weight + torch.stack([delta.miss_block[i % 5] for i in range(12)], dim=1)
    torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias), atol=1e-5, rtol=1e-5)
    assert delta.miss_block.numel() == 5 * 10


def test_miss_mini_and_bat_output_equals_equation() -> None:
    x = torch.randn(3, 12)
    layer, delta = adapted(parse_method({"name": "miss", "r": 4, "init_weights": "mini", "mini_r": 5}))
    nn.init.normal_(delta.miss_block)
    update = torch.stack([torch.stack([delta.miss_block[i % 4, o % 5] for i in range(12)]) for o in range(10)])
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + update, layer.bias), atol=1e-5, rtol=1e-5)
    layer, delta = adapted(parse_method({"name": "miss", "r": 2, "init_weights": "bat"}))
    nn.init.normal_(delta.miss_block)
    whole = layer.weight.clone()
    for j in range(5):
        for i in range(6):
            block = (slice(2 * j, 2 * j + 2), slice(2 * i, 2 * i + 2))
            whole[block] += layer.weight[block] @ delta.miss_block[j] + delta.miss_block[j]
    torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias), atol=1e-5, rtol=1e-5)


def test_hira_and_shira_output_equals_equation() -> None:
    x = torch.randn(2, 4, 12)
    layer, delta = adapted(parse_method({"name": "hira", "r": 3}))
    nn.init.normal_(delta.hira_B)
    whole = layer.weight * (1 + delta.hira_B @ delta.hira_A)
    torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias), atol=1e-5, rtol=1e-5)
    layer, delta = adapted(parse_method({"name": "shira", "r": 2}))
    nn.init.normal_(delta.shira_weight)
    whole = layer.weight.clone()
    for value, row, column in zip(delta.shira_weight, *delta.shira_indices.tolist(), strict=True):
        whole[row, column] += value
    torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias), atol=1e-5, rtol=1e-5)
    assert len({*zip(*delta.shira_indices.tolist(), strict=True)}) == 2 * (12 + 10)


def test_oft_output_equals_equation() -> None:
    """R is orthogonal with the exact inverse, and its transpose near the series, whose sign of Q is the other one."""
    layer, delta = adapted(parse_method({"name": "oft", "oft_block_size": 4, "use_cayley_neumann": False}))
    nn.init.normal_(delta.oft_R.weight, std=0.05)
    x, rotation = torch.randn(2, 5, 12), delta.rotation()
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(4).expand(3, 4, 4), atol=1e-6, rtol=1e-6)
    expected = F.linear(x @ torch.block_diag(*rotation), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    _, series = adapted(parse_method({"name": "oft", "oft_block_size": 4, "num_cayley_neumann_terms": 12}))
    series.oft_R.weight.data.copy_(delta.oft_R.weight)
    torch.testing.assert_close(series.rotation(), rotation.mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "miss", "r": 4, "init_weights": "mini", "mini_r": 2},
        {"name": "miss", "r": 4, "init_weights": "bat"},
        {"name": "oft", "r": 2, "use_cayley_neumann": False},
        {"name": "oft", "oft_block_size": 4, "block_share": True},
    ],
    ids=str,
)
def test_variant_starts_as_base_and_merges_exactly(spec: dict[str, Any]) -> None:
    model = FAMILIES["gpt2"].build().double()
    batch = FAMILIES["gpt2"].batch()
    with torch.no_grad():
        bare = model(**batch).logits
        adapter = gw.attach(model, parse_method(spec))
        torch.testing.assert_close(model(**batch).logits, bare, atol=1e-9, rtol=1e-9)
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.1
        expected = model(**batch).logits
        assert not torch.allclose(expected, bare, atol=1e-4)
        adapter.merge()
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-9, rtol=1e-9)
        adapter.unmerge()
        assert torch.equal(model(**batch).logits, expected)


def test_dropout_of_miss_and_hira_acts_on_update_only() -> None:
    for spec in ({"name": "miss", "r": 5, "miss_dropout": 0.5}, {"name": "hira", "r": 3, "hira_dropout": 0.5}):
        layer, delta = adapted(parse_method(spec))
        x = torch.randn(4, 12)
        delta.train()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))  # the update is zero at the start
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
        assert not torch.equal(layer(x), layer(x))
        delta.eval()
        assert torch.equal(layer(x), layer(x))


def test_learning_rate_factor_loraplus_applies_to_b_only() -> None:
    graft = gw.attach(FAMILIES["bert"].build(classifier=True), LoRA(r=2, loraplus_lr_ratio=16))
    factors = {key: graft.learning_rate_factor(key) for key, _ in graft.named_parameters()}
    assert {f for key, f in factors.items() if "lora_B" in key} == {16.0}
    assert {f for key, f in factors.items() if "lora_B" not in key} == {1.0}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lroa", "did you mean `lora`"),
        ({"name": "lora", "rnak": 3}, "did you mean"),
        ({"name": "lora", "r": 0}, "greater than or equal to 1"),
        ({"name": "lora", "use_dora": True, "init_lora_weights": "pissa"}, "exclude each other"),
        ({"name": "lora", "use_dora": True, "init_lora_weights": "qera"}, "init_lora_weights=qera exclude each other"),
        ({"name": "lora", "target_modules": []}, "target_modules is empty"),
        ({"name": "miss", "init_weights": False}, "init_weights"),
        ({"name": "hira", "target_modules": []}, "target_modules is empty"),
        ({"name": "oft", "r": 4, "oft_block_size": 8}, "not both"),
        ({"name": "oft", "oft_block_size": 1}, "nothing to rotate"),
        ({"name": "bottleneck", "adapter_size": 4, "reduction_factor": 2}, "not both"),
        ({"r": 8}, "with `name`"),
    ],
)
def test_parse_method_invalid_setting_raises(spec: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_method(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "lora", "target_modules": ["qurey"]}, "did you mean `query`"),
        ({"name": "lora", "rank_pattern": {"nothing": 2}}, "matches none"),
        ({"name": "lora", "init_lora_weights": "pissa", "r": 40}, "singular directions"),
        ({"name": "ia3", "feedforward_modules": ["nothing"]}, "none of the targets"),
        ({"name": "miss", "r": 40}, "wider than the input"),
        ({"name": "miss", "r": 5, "init_weights": "bat"}, "divides into blocks of 5"),
        ({"name": "miss", "init_weights": "mini", "mini_r": 5}, "do not divide the output"),
        ({"name": "hira", "rank_pattern": {"nothing": 2}}, "matches none"),
        ({"name": "shira", "r": 9}, "would train"),
        ({"name": "lora", "modules_to_save": ["nothing"]}, "no module `nothing`"),
    ],
)
def test_select_targets_unmatched_name_raises(spec: Any, words: str) -> None:
    model = FAMILIES["bert"].build(classifier=True)
    with pytest.raises(ConfigError, match=words):
        gw.attach(model, parse_method(spec))
    assert not gw.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_registry_every_method_has_description() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.title
        assert "arXiv" in method.paper or "OpenReview" in method.paper
        assert method.default_learning_rate > 0
        assert all(field.description for field in method.model_fields.values()), name
    assert {parse_method(name).name for name in SHORTHANDS} <= set(METHODS)


def test_select_suffix_matches_whole_names_only() -> None:
    method = LoRA(target_modules=["dense"])
    places = [place(2, 2)]
    named = [TargetModule(path, Role.OTHER_LINEAR, 2, 2, True) for path in ("a.dense", "a.predense", "dense")]
    assert [p.path for p in method.select_targets(named)] == ["a.dense", "dense"]
    assert places


def test_bottleneck_default_size_is_a_sixteenth_of_width() -> None:
    assert [Bottleneck().size(width) for width in (8, 64, 384)] == [1, 4, 24]
