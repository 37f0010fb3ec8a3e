"""Frozen modules of an adapted model keep less for backward, and nothing else about them changes."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwerk.kernels import flags as fast
from graftwerk.kernels.memory_efficient import OWN
from graftwerk.kernels.recompute import ActivationTable
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.adapted_module import make_memory_efficient
from graftwerk.modeling.attach import activate, attach, detach, disabled
from tests.families import FAMILIES, Family

STEPS = 50


def grafted(family: str, *, p: float = 0.0, classifier: bool = False) -> tuple[Any, Any, dict[str, Tensor]]:
    chosen: Family = FAMILIES[family]
    model = chosen.build(classifier=classifier)
    torch.manual_seed(3)
    graft = attach(model, LoRA(r=2, lora_dropout=p))
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = chosen.batch(labels=not classifier)
    if classifier:
        batch["labels"] = torch.tensor([0, 1, 2])
    return model.train(), graft, batch


def gradients(model: Any, graft: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    model(**batch).loss.backward()
    return {key: parameter.grad.clone() for key, parameter in graft.named_parameters() if parameter.grad is not None}


class Kept:
    """A tensor in the hands of autograd: gone when its node is (checkpointing makes nodes that nothing hangs on)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def bytes_kept(model: Any, batch: dict[str, Tensor]) -> int:
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    handed: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        handed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = model(**batch).loss
    assert loss.requires_grad
    alive = [kept.tensor.untyped_storage() for reference in handed if (kept := reference()) is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in own}.values())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_plain(family: str, p: float) -> None:
    model, graft, batch = grafted(family, p=p)
    got = gradients(model, graft, batch)
    with fast.plain():
        expected = gradients(model, graft, batch)
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        torch.testing.assert_close(
            gradient, expected[key], atol=1e-5, rtol=1e-4, msg=lambda text, at=key: f"{at}: {text}"
        )


@pytest.mark.parametrize("family", ["bert", "llama", "gemma", "gpt2", "t5", "bart"])
def test_gradients_with_dropout_equal_under_checkpointing(family: str) -> None:
    model, graft, batch = grafted(family, p=0.3)
    expected = gradients(model, graft, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, graft, batch)
    for key, gradient in got.items():
        torch.testing.assert_close(
            gradient, expected[key], atol=1e-6, rtol=1e-5, msg=lambda text, at=key: f"{at}: {text}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes_are_fewer_than_plain(family: str) -> None:
    model, _, batch = grafted(family, p=0.3)
    with fast.plain():
        plain = bytes_kept(model, batch)
    assert bytes_kept(model, batch) < 0.75 * plain


@pytest.mark.parametrize(
    ("family", "classes"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "SiLUActivation"}),
        ("gemma", {"GemmaRMSNorm", "GemmaMLP", "GELUTanh"}),
        ("bert", {"LayerNorm", "GELUActivation"}),
        ("gpt2", {"LayerNorm", "NewGELUActivation"}),
        ("t5", {"T5LayerNorm"}),
    ],
)
def test_classes_are_swapped_and_restored(family: str, classes: set[str]) -> None:
    model = FAMILIES[family].build()
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    attach(model, LoRA(r=2))
    frugal = {type(module).__name__ for module in model.modules() if hasattr(type(module), OWN)}
    assert classes <= frugal
    assert [key for key in model.state_dict() if ".graft." not in key] == keys
    twin = copy.deepcopy(model)
    for one in (model, twin):
        detach(one)
        assert {name: type(module) for name, module in one.named_modules()} == before


def test_classes_after_last_delete_are_restored() -> None:
    model = FAMILIES["llama"].build()
    before = [type(module) for module in model.modules()]
    first, second = attach(model, LoRA(r=2), name="a"), attach(model, LoRA(r=2), name="b")
    second.delete()
    assert any(hasattr(type(module), OWN) for module in model.modules())
    first.delete()
    assert [type(module) for module in model.modules()] == before


def test_trained_norm_keeps_its_forward() -> None:
    model, graft, batch = grafted("llama")
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight.requires_grad_(True)
    gradients(model, graft, batch)
    got = norm.weight.grad.clone()
    with fast.plain():
        gradients(model, graft, batch)
    torch.testing.assert_close(got, norm.weight.grad)


def test_disabled_output_is_bit_equal_to_base() -> None:
    model = FAMILIES["gpt2"].build()
    batch = FAMILIES["gpt2"].batch()
    expected = model(**batch).logits
    attach(model, LoRA(r=2))
    with disabled(model):
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_below_lowest_adapted_layer_is_saved(checkpointing: bool) -> None:
    """Layers without adapters below those with: no part of the graph, whatever their number.

    Checkpointing itself keeps what goes into each layer, with an adapter or without.
    """
    from transformers import LlamaForCausalLM

    kept: dict[bool, list[int]] = {True: [], False: []}
    for adapted in kept:
        for layers in (2, 4):
            config = FAMILIES["llama"].config()
            config.num_hidden_layers = layers
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
            path = f"layers.{layers - 1}.mlp.down_proj"
            if adapted:
                attach(model, LoRA(r=2, target_modules=(path,)))
            else:
                model.requires_grad_(False)
                model.model.get_submodule(path).weight.requires_grad_(True)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            kept[adapted].append(bytes_kept(model, FAMILIES["llama"].batch(labels=True)))
    growth = {adapted: bytes_[1] - bytes_[0] for adapted, bytes_ in kept.items()}
    assert growth[True] == growth[False]
    assert (growth[True] > 0) is checkpointing


def test_input_changed_in_place_is_not_recomputed() -> None:
    model, graft, batch = grafted("llama")

    class Doubled(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: Tensor) -> Any:
            return self.own(x).mul_(2)

    layer = model.model.layers[1]
    layer.post_attention_layernorm = Doubled(layer.post_attention_layernorm)
    got = gradients(model, graft, batch)
    with fast.plain():
        expected = gradients(model, graft, batch)
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)


def losses(
    family: str, p: float, classifier: bool, *, stop: int | None = None, start: Any = None
) -> tuple[list[float], Any]:
    """Losses of training steps; ``stop``: the state after so many; ``start``: such a state, to go on from."""
    model, graft, batch = grafted(family, p=p, classifier=classifier)
    # At 1e-3 AdamW, which divides by the size of each gradient, makes 4e-5 of the last bits by step 48 on two of these.
    optimizer = torch.optim.AdamW(list(graft.parameters()), lr=3e-4)
    torch.manual_seed(11)
    done = 0
    if start is not None:
        done, weights, moments, state = start
        graft.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        torch.set_rng_state(state)
    found = []
    for _ in range(done, stop or STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    weights = {key: value.clone() for key, value in graft.state_dict().items()}
    return found, (stop, weights, copy.deepcopy(optimizer.state_dict()), torch.get_rng_state())


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize(
    ("family", "classifier"),
    [("bert", True), ("llama", False), ("t5", False), pytest.param("bart", False, marks=pytest.mark.slow)],
)
def test_fifty_steps_losses_equal_plain(family: str, classifier: bool, p: float) -> None:
    got, _ = losses(family, p, classifier)
    with fast.plain():
        expected, _ = losses(family, p, classifier)
    assert len(got) == STEPS
    assert got[-1] < got[0] - 0.01
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-5, rtol=0)


def test_resume_with_dropout_is_bit_equal() -> None:
    whole, _ = losses("llama", 0.2, False, stop=12)
    _, state = losses("llama", 0.2, False, stop=5)
    rest, _ = losses("llama", 0.2, False, stop=12, start=state)
    assert rest == whole[5:]


def test_several_active_adapters_equal_plain() -> None:
    model, first, batch = grafted("llama", p=0.2)
    second = attach(model, LoRA(r=3, init_lora_weights=False), name="second")
    activate(model, ["default", "second"])
    model.train()
    got = {**gradients(model, first, batch), **{f"2.{k}": p.grad for k, p in second.named_parameters()}}
    with fast.plain():
        expected = {**gradients(model, first, batch), **{f"2.{k}": p.grad for k, p in second.named_parameters()}}
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)


def test_dropout_group_joins_query_key_value_only() -> None:
    model, _, _ = grafted("llama", p=0.2)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp

    def group_of(layer: Any) -> Any:
        return layer.graft.get("default").group

    assert group_of(attention.q_proj) is group_of(attention.k_proj) is group_of(attention.v_proj)
    assert group_of(mlp.gate_proj) is group_of(mlp.up_proj)
    assert group_of(mlp.gate_proj) is not group_of(attention.q_proj)
    assert group_of(model.model.layers[1].mlp.up_proj) is not group_of(mlp.up_proj)
    assert group_of(mlp.down_proj) is not group_of(mlp.up_proj)
    assert group_of(attention.o_proj) is not group_of(attention.q_proj)


class NewGELUActivation(nn.Module):
    """Has the name of a known activation, and a product that autocast computes in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x @ torch.eye(x.shape[-1]) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_activation_is_recomputed_in_types_of_its_forward(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    act, x, grad = NewGELUActivation(), torch.randn(5, 8), torch.randn(5, 8)
    results = []
    for efficient in (False, True):
        table = ActivationTable()
        if efficient:
            make_memory_efficient([act], table)
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = act(given)
        recipe = table.recipe(y)
        assert (recipe is not None) == efficient
        if recipe is not None:
            assert torch.equal(recipe.compute(*recipe.inputs), y)
        y.backward(grad)
        results.append((y.detach(), given.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
