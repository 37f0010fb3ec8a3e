"""Rows with different adapters: the stacked way against one adapter after the other, and what is kept of it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftwerk.modeling.attach as gw
from graftwerk.kernels import flags as fast
from graftwerk.kernels.batched_adapters import BatchedLoRA
from graftwerk.kernels.dispatch import BATCHED
from graftwerk.methods.base import AdapterModule
from graftwerk.methods.registry import parse_method
from graftwerk.modeling import per_row_adapters as rows_module
from graftwerk.modeling.adapter_slots import ModelAdapters, slots_of
from graftwerk.modeling.per_row_adapters import BatchedGroup, SequentialGroups, row_groups
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, REFUSED, method_of, model_and_batch, perturb
from tests.families import FAMILIES

SOME = ("bert", "gpt2", "llama", "opt", "t5", "modernbert")
LAYERED = [name for name in METHODS if method_of(name).kind == "layer" and name != "probe"]
PAIRS = [
    (name, family)
    for name in METHODS
    for family in SOME
    if method_of(name).supports_rows and (name, family) not in REFUSED
]
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


def attached(model: Any, settings: dict[str, Any], name: str, seed: int) -> gw.Adapter:
    graft = gw.attach(model, parse_method(settings), name=name)
    perturb(graft.parameters(), seed)
    return graft


def other_size(method: str) -> dict[str, Any]:
    """The same method with another rank or bottleneck, where it has one."""
    settings = dict(METHODS[method])
    for key in ("r", "adapter_size", "num_virtual_tokens"):
        if key in settings:
            settings[key] += 3
    return settings


def mixed(method: str, family: str, rows: list[str | None], *, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """A model in float64 with adapters `a` and `b` of a method, `c` of another size, and `other`, a LoRA."""
    model, batch = model_and_batch(method, family, rows=len(rows), seed=seed)
    torch.manual_seed(5)
    for number, name in enumerate("abc"):
        attached(model, other_size(method) if name == "c" else METHODS[method], name, number)
    attached(model, {"name": "lora", "r": 5, "lora_alpha": 3}, "other", 9)
    model.double()
    gw.activate(model, rows=rows)
    return model, batch


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def gradients(model: Any, batch: dict[str, Tensor], names: str) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch).logits
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()).sum().backward()
    return {
        f"{name}.{key}": parameter.grad.clone()
        for name in names
        for key, parameter in gw.adapters(model)[name].named_parameters()
        if parameter.grad is not None
    }


def parts(model: Any) -> list[Any]:
    """What each adapted layer does for the rows chosen now."""
    boxes = [box for module in model.modules() if (box := slots_of(module)) is not None]
    return [part for box in boxes for part in row_groups((box, box.training, fast.enabled("rows")))]


def has_kernel(model: Any) -> bool:
    """Return True if the method of adapter `a` has a batched form; the others answer group by group."""
    return any(type(module) in BATCHED for _, module in gw.adapters(model)["a"].modules())


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_batched_rows_equal_sequential(method: str, family: str) -> None:
    """Logits and gradients, with mixed sizes, a partner of another kind and rows without any."""
    rows = ["a", None, "c", "b", "other", "a", None]
    model, batch = mixed(method, family, rows)
    found = logits(model, batch)
    found_gradients = gradients(model, batch, "abc")
    if method in LAYERED and has_kernel(model):
        assert any(isinstance(part, BatchedGroup) and len(part.modules) > 2 for part in parts(model))
    with fast.plain():
        assert all(isinstance(part, SequentialGroups) for part in parts(model))
        torch.testing.assert_close(found, logits(model, batch), **CLOSE)
        expected = gradients(model, batch, "abc")
    assert found_gradients.keys() == expected.keys()
    assert expected
    for key, gradient in expected.items():
        torch.testing.assert_close(found_gradients[key], gradient, **CLOSE, msg=lambda text, at=key: f"{at}: {text}")
    frozen = [parameter for graft in gw.adapters(model).values() for parameter in graft.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    torch.testing.assert_close(model(**batch).logits, found, **CLOSE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"name": "ia3", "feedforward_modules": ["query"]}, {"name": "ia3", "feedforward_modules": []}),
        ({"name": "bottleneck", "adapter_size": 3}, {"name": "bottleneck", "adapter_size": 3, "layer_norm": False}),
        ({"name": "bottleneck", "adapter_size": 3}, {"name": "bottleneck", "adapter_size": 3, "non_linearity": "silu"}),
    ],
)
def test_rows_of_one_method_with_settings_that_do_not_batch_equal_sequential(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    model, batch = model_and_batch("lora", "bert", rows=4)
    for number, settings in enumerate((one, other)):
        targets = {"target_modules": ["query"]} if settings["name"] == "ia3" else {}
        attached(model, {**settings, **targets}, "ab"[number], number)
    model.double()
    gw.activate(model, rows=["a", "b", None, "a"])
    found = logits(model, batch)
    with fast.plain():
        torch.testing.assert_close(found, logits(model, batch), **CLOSE)


@pytest.mark.parametrize("method", LAYERED)
def test_rows_without_adapter_are_bit_equal_to_base(method: str) -> None:
    rows = [None, "a", None, "c", "other"]
    model, batch = mixed(method, "bert" if method == "bitfit" else "llama", rows)
    mine = logits(model, batch)
    with gw.disabled(model):
        base = logits(model, batch)
    assert torch.equal(mine[[0, 2]], base[[0, 2]])
    assert not torch.allclose(mine[[1, 3, 4]], base[[1, 3, 4]], atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "houlsby", "parallel", "ia3", "dora", "prefix", "prompt"])
def test_beams_use_adapter_of_their_row(method: str) -> None:
    rows = ["a", None, "c"]
    model, batch = mixed(method, "llama", rows)
    batch = {key: value.flip(1) for key, value in batch.items()}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    together = model.generate(**batch, **options)
    for row, name in enumerate(rows):
        gw.activate(model, name)
        real = batch["attention_mask"][row].bool()
        alone = model.generate(**{key: value[row : row + 1, real] for key, value in batch.items()}, **options)
        assert torch.equal(together[row, -5:], alone[0, -5:]), row


@pytest.mark.parametrize("method", LAYERED)
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (3, 2, 4), (6, 1, 4), (3, 4)])
def test_rows_of_any_input_shape_equal_sequential(method: str, shape: tuple[int, ...]) -> None:
    """(B·T, d) as some layers flatten it, (B, T, d), beams, one token: the same values in the same order."""
    rows = [None, "a", "c"] if shape[0] % 3 == 0 else ["a", "c"]
    model, _ = mixed(method, "bert" if method == "bitfit" else "llama", rows)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and (box := slots_of(module)) is not None
        and isinstance(box.get("a"), AdapterModule)
    ]
    assert layers
    for layer in layers[:7]:
        x = torch.randn(*shape[:-1], layer.in_features, dtype=torch.float64)
        if method == "parallel" and layer.in_features != model.config.hidden_size:
            continue  # the block's end takes what its beginning read
        with torch.no_grad():
            found = layer(x)
            with fast.plain():
                torch.testing.assert_close(found, layer(x), **CLOSE)


def test_groups_of_repeated_rows_keep_a_rows_entries_together() -> None:
    model, _ = mixed("lora", "bert", ["a", None, "a"])
    model_adapters = ModelAdapters.of(model)
    assert model_adapters is not None
    groups = model_adapters.selection.groups(6, torch.device("cpu"))
    assert {group.name: group.index.tolist() for group in groups} == {"a": [0, 1, 4, 5], None: [2, 3]}


def test_ranks_far_apart_are_batched_apart() -> None:
    model, batch = model_and_batch("lora", "llama", rows=6)
    for number, rank in enumerate((1, 2, 4, 16, 17, 3)):
        attached(model, {"name": "lora", "r": rank}, f"r{rank}", number)
    names = ["r16", "r1", "r4", "r17", "r2", "r3"]
    gw.activate(model, rows=names)
    found = {tuple(sorted(BATCHED[type(delta)].padded_dim(delta) for delta in part.modules)) for part in parts(model)}
    assert found == {(1, 2, 3, 4), (16, 17)}
    model.double()
    together = logits(model, batch)
    for row, name in enumerate(names):
        gw.activate(model, name)
        torch.testing.assert_close(together[row], logits(model, batch)[row], **CLOSE)


def test_few_adapters_for_many_rows_run_sequentially() -> None:
    model, batch = model_and_batch("lora", "llama", rows=2 * rows_module.SEQUENTIAL_ROWS)
    attached(model, METHODS["lora"], "a", 1)
    attached(model, METHODS["lora"], "b", 2)
    for names in (["a", "b"], ["a"]):
        gw.activate(model, rows=[names[row % len(names)] for row in range(len(batch["input_ids"]))])
        assert all(isinstance(part, SequentialGroups) for part in parts(model))
    half = len(batch["input_ids"]) // 2
    gw.activate(model, rows=["a"] * half + ["b"] * half)
    model.double()
    together = logits(model, batch)
    gw.activate(model, "b")
    torch.testing.assert_close(together[half:], logits(model, batch)[half:], **CLOSE)


@pytest.mark.parametrize("method", [*LAYERED, "prefix", "prefix mlp"])
def test_cached_batch_is_rebuilt_after_parameter_change(method: str) -> None:
    """By an optimizer, by `load_state_dict` in place and with other objects, by another tensor behind the parameter."""
    rows = ["a", None, "c", "b"]
    model, batch = mixed(method, "bert" if method == "bitfit" else "llama", rows)
    gw.activate(model, rows=rows)
    before = logits(model, batch)
    graft = gw.adapters(model)["c"]
    for change in ("step", "load", "assign", "assign while disabled", "data"):
        with torch.no_grad():
            if change.startswith("assign"):
                others = {key: value + 0.25 for key, value in model.state_dict().items() if ".graft.c." in key}
                assert others
                with gw.disabled(model) if change.endswith("disabled") else nullcontext():
                    model.load_state_dict(others, strict=False, assign=True)
            if change == "load":
                graft.load_state_dict({key: tensor + 0.25 for key, tensor in graft.state_dict().items()})
            for parameter in graft.parameters():
                if change == "step":
                    parameter.add_(0.25)
                elif change == "data":
                    parameter.data = parameter.data + 0.25
        found = logits(model, batch)
        with fast.plain():
            torch.testing.assert_close(found, logits(model, batch), **CLOSE)
        assert not torch.allclose(found[2], before[2], atol=1e-6)
        assert torch.equal(found[1], before[1])
        before = found


@pytest.mark.parametrize("trainable", [False, True])
def test_cached_batch_is_rebuilt_after_loaded_adapter_changes(trainable: bool, tmp_path: Path) -> None:
    """Frozen ones share one version; those that train have each their own, or autograd would mistake one for all."""
    model, batch = model_and_batch("lora", "llama", rows=3)
    attached(model, METHODS["lora"], "a", 1).save(tmp_path)
    gw.detach(model)
    for name in "ab":
        load_adapter(model, tmp_path, name, trainable=trainable)
    gw.activate(model, rows=["a", None, "b"])
    sources = {len(part.cache.sources) for part in parts(model)}
    assert sources == ({4} if trainable else {2})
    before = logits(model, batch)
    own = [parameter for _, module in gw.adapters(model)["b"].modules() for parameter in module.parameters()]
    versions = [parameter._version for parameter in own]
    with torch.no_grad():
        gw.adapters(model)["b"]._module(model.model.layers[1].mlp.up_proj).lora_B.weight[0, 0] += 3
    after = [parameter._version for parameter in own]
    assert sum(one != other for one, other in zip(versions, after, strict=True)) == (1 if trainable else len(after))
    found = logits(model, batch)
    assert torch.equal(found[:2], before[:2])
    assert not torch.allclose(found[2], before[2], atol=1e-4)
    for _, module in gw.adapters(model)["a"].modules():
        torch.nn.init.zeros_(module.lora_B.weight)
    with gw.disabled(model):
        base = logits(model, batch)
    torch.testing.assert_close(logits(model, batch)[0], base[0])
    model.double()
    assert {part.adapters().a.dtype for part in parts(model)} == {torch.float64}
    found = logits(model, batch)
    with fast.plain():
        torch.testing.assert_close(found, logits(model, batch), **CLOSE)
    twin = copy.deepcopy(model)
    gw.adapters(twin)["b"]._module(twin.model.layers[0].mlp.up_proj).lora_B.weight.data.add_(2)
    with fast.plain():
        expected = logits(twin, batch)
    torch.testing.assert_close(logits(twin, batch), expected, **CLOSE)
    assert torch.equal(logits(model, batch), found)


def test_cached_dora_is_rebuilt_after_base_weight_changes() -> None:
    model, batch = mixed("dora", "llama", ["a", "b", "c"])
    before = logits(model, batch)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2).add_(0.1)
    found = logits(model, batch)
    assert not torch.allclose(found, before)
    with fast.plain():
        torch.testing.assert_close(found, logits(model, batch), **CLOSE)
    gw.adapters(model)["a"].activate()
    torch.testing.assert_close(logits(model, batch)[0], found[0], **CLOSE)
    gw.adapters(model)["a"].merge()
    torch.testing.assert_close(logits(model, batch)[0], found[0], **CLOSE)


def test_cached_batch_is_built_once_per_choice_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = mixed("lora", "llama", ["a", "b", "c"])
    made = []
    init = BatchedLoRA.__init__
    monkeypatch.setattr(BatchedLoRA, "__init__", lambda self, *of: (made.append(len(of[0])), init(self, *of))[1])
    for _ in range(3):
        logits(model, batch)
    layers = len(gw.adapters(model)["a"].hosts)
    assert made == [3] * layers
    with gw.disabled(model):
        logits(model, batch)
    logits(model, batch)
    assert len(made) == layers
    selection = next(box for module in model.modules() if (box := slots_of(module)) is not None).selection
    assert selection._cache
    gw.activate(model, "a")
    assert not selection._cache
    gw.activate(model, rows=["b", "b", "a"])
    logits(model, batch)
    assert len(made) == 2 * layers


def test_rows_after_inference_mode_pass_input_gradients() -> None:
    model, batch = mixed("lora", "llama", ["a", "b", "c"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        model(**batch)
    embeds = model.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
    model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits.sum().backward()
    assert embeds.grad is not None


def test_deepcopy_batches_its_own_adapters() -> None:
    model, batch = mixed("lora", "llama", ["a", "b", "c"])
    before = logits(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in gw.adapters(twin)["b"].parameters():
            parameter.add_(0.5)
    assert torch.equal(logits(model, batch), before)
    changed = logits(twin, batch)
    assert torch.equal(changed[0], before[0])
    assert not torch.allclose(changed[1], before[1], atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_in_training_draws_per_adapter(use_dora: bool) -> None:
    """Masks differ from stack to stack, so adapters with dropout work in turn while they train, and only then."""
    model, batch = model_and_batch("lora", "llama", rows=4)
    settings = {"name": "lora", "r": 2, "lora_dropout": 0.5, "use_dora": use_dora}
    attached(model, settings, "a", 1)
    attached(model, settings, "b", 2)
    gw.activate(model, rows=["a", "b", None, "a"])
    model.eval()
    assert all(isinstance(part, BatchedGroup) for part in parts(model))
    still = logits(model, batch)
    model.train()
    assert all(isinstance(part, SequentialGroups) for part in parts(model))
    assert not torch.allclose(logits(model, batch), still, atol=1e-4)
    model.eval()
    assert torch.equal(logits(model, batch), still)


def test_rows_under_autocast_equal_plain() -> None:
    model, batch = model_and_batch("lora", "llama", rows=3)
    for number, name in enumerate("ab"):
        attached(model, METHODS["lora"], name, number)
    gw.activate(model, rows=["a", None, "b"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model, batch)
        with fast.plain():
            torch.testing.assert_close(found, logits(model, batch), atol=0.1, rtol=0.1)


def test_rows_on_bfloat16_base_equal_sequential() -> None:
    model, batch = model_and_batch("lora", "llama", rows=4)
    model.to(torch.bfloat16)
    for number, name in enumerate(("lora", "houlsby", "ia3", "dora")):
        attached(model, METHODS[name], name, number)
    for name in ("lora", "houlsby", "ia3", "dora"):
        gw.activate(model, rows=[name] * 4)
        found = logits(model, batch)
        assert found.dtype == torch.bfloat16
        with fast.plain():
            torch.testing.assert_close(found, logits(model, batch), atol=0.05, rtol=0.05)


def test_families_are_listed() -> None:
    assert set(SOME) <= FAMILIES.keys()
