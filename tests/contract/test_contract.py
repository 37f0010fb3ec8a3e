"""What every method promises on every family, asserted on real modules built from configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import ConfigError, ConflictError, UnsupportedError
from graftwerk.methods.linear_probe import Probe
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.methods.prompt_tuning import Prompt
from graftwerk.methods.ptuning import PTuning
from graftwerk.modeling.architectures import read_architecture
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.contract.cases import (
    METHODS,
    MORE_PAIRS,
    PAIRS,
    REFUSED,
    has_head,
    in_turn,
    method_of,
    model_and_batch,
    perturb,
)
from tests.families import ALL, FAMILIES, MORE

SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE_PAIRS]
"""The close relatives: fast in `test_more_families.py`, and here whole."""
QUICK = in_turn(PAIRS)
matrix = pytest.mark.parametrize(("method", "family"), [*QUICK, *SLOW])
CLOSE = {"atol": 2e-6, "rtol": 1e-5}

PARTNERS = {"lora": "prefix", "lora attention": "prompt", "rslora": "ia3", "dora": "parallel", "pissa": "ptuning mlp"}
"""What a method shares a batch with: an adapter of another kind; LoRA for all that are none themselves."""
HEAD_NAMES = ("classifier.", "score.", "classification_head.", "pre_classifier.", "head.")
"""What transformers calls the parts of a task head, on whatever family."""


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def grafted(
    method: str, family: str, *, name: str = "a", rows: int = 3, moved: bool = True
) -> tuple[Any, dict[str, Tensor], gw.Adapter]:
    model, batch = model_and_batch(method, family, rows=rows)
    torch.manual_seed(5)
    graft = gw.attach(model, method_of(method), name=name)
    if moved:
        perturb(graft.parameters(), 7)
    return model, batch, graft


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A loss that every logit takes part in, unequally."""
    logits = model(**batch).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()
    return (logits * weights).sum() + logits.log_softmax(-1)[..., 0].sum()


def _generates(method: str, family: str) -> bool:
    return ALL[family].kind != "encoder" and method != "probe"


def test_the_matrix_is_whole() -> None:
    assert len(FAMILIES) >= 15
    assert len(METHODS) >= 17
    assert len(MORE) >= 15
    assert len(PAIRS) + len(MORE_PAIRS) == len(METHODS) * len(ALL) - len(REFUSED) > 480


@pytest.mark.parametrize(("method", "family"), REFUSED)
def test_refused_with_its_reason_and_the_model_unharmed(method: str, family: str) -> None:
    model, batch = model_and_batch(method, family)
    before, keys = run(model, batch), list(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UnsupportedError, match=REFUSED[method, family]) as caught:
        gw.attach(model, method_of(method))
    assert caught.value.hint
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, batch), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@matrix
def test_start(method: str, family: str) -> None:
    """Identity where the method promises it, and the head is the base's own to begin with."""
    model, batch = model_and_batch(method, family)
    before = run(model, batch)
    torch.manual_seed(5)
    gw.attach(model, method_of(method))
    if method_of(method).identity_at_start:
        torch.testing.assert_close(run(model, batch), before, **CLOSE)
    else:
        assert not torch.allclose(run(model, batch), before, atol=1e-4)


@matrix
def test_base_is_untouched(method: str, family: str) -> None:
    """State-dict keys, values and object identities of the base, also after a training step; and all of it after
    detach."""
    model, batch = model_and_batch(method, family)
    before = run(model, batch)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    modules = dict(model.named_modules())
    classes = {name: type(module) for name, module in modules.items()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(5)
    graft = gw.attach(model, method_of(method))
    optimizer = torch.optim.SGD(graft.parameters(), lr=0.1)
    loss_of(model, batch).backward()
    at_start = run(model, batch)
    optimizer.step()
    assert not torch.allclose(run(model, batch), at_start, atol=1e-5), "a step changes what the model says"
    for name, value in values.items():
        if method != "full":
            assert torch.equal(model.state_dict()[name], value), name
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
    for name, buffer in buffers.items():
        assert model.get_buffer(name) is buffer
    for name, module in modules.items():
        assert model.get_submodule(name) is module
    assert [key for key in model.state_dict() if "graft" not in key.split(".")] == list(values)
    gw.detach(model)
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(run(model, batch), before)


@matrix
def test_every_element_trains_and_nothing_else(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A rectifier that is off for all of these rows would hide whether its weights can be reached; this is about wiring.
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, x: torch.nn.functional.silu(x))
    model, _, graft = grafted(method, family, moved=False)
    # Far enough that nothing is zero any more, and not so far that an activation function saturates to a slope of zero.
    perturb(graft.parameters(), 7, scale=0.1)
    _to_double(model, family)
    mine = {id(parameter) for parameter in graft.parameters()}
    assert mine
    seen: dict[str, Tensor] = {}
    for seed in range(6):
        _, batch = model_and_batch(method, family, rows=6, seed=seed)
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (id(parameter) not in mine), name
        for key, parameter in graft.named_parameters():
            assert parameter.grad is not None, key
            seen[key] = seen.get(key, 0) + parameter.grad.abs()
    for key, total in seen.items():
        if method == "full":
            # Tokens and positions that no row has cannot be learnt about; every tensor as a whole is.
            assert total.abs().sum() > 0, key
        else:
            assert (total > 0).all(), f"{key}: {(total == 0).sum()} of {total.numel()} elements get no gradient"


@matrix
def test_counts_follow_the_formula(method: str, family: str) -> None:
    model, _ = model_and_batch(method, family)
    view = read_architecture(model)
    base = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = sum(size for name, size in base.items() if name.startswith(tuple(f"{head}." for head in view.heads)))
    torch.manual_seed(5)
    graft = gw.attach(model, method_of(method))
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert graft.num_parameters + graft.num_head_parameters == real
    assert graft.num_head_parameters == heads
    assert f"{real:,} parameters" in str(graft)
    settings = graft.method
    if isinstance(settings, Prefix):
        widths = [place.kv_heads * place.head_dim for place in view.attentions]
        formula = settings.num_vector_parameters(widths, [stack.width for stack in view.stacks])
    elif isinstance(settings, Prompt | PTuning):
        formula = settings.num_vector_parameters(next(stack.width for stack in view.stacks if stack.kind != "decoder"))
    elif method == "full":
        formula = sum(base.values()) - heads
    elif method == "probe":
        formula = 0
        assert heads == sum(size for name, size in base.items() if name.startswith(HEAD_NAMES)) > 0
    else:
        formula = settings.num_parameters(graft.targets)
        assert graft.targets
    assert graft.num_parameters == formula
    if method == "bitfit":
        outside = (*HEAD_NAMES, "lm_head.")  # Phi's output layer has a bias, which is left out, and that is said
        biases = {name: size for name, size in base.items() if name.endswith(".bias")}
        assert formula == sum(size for name, size in biases.items() if not name.startswith(outside))
        assert ("lm_head.bias" in str(graft)) == ("lm_head.bias" in biases)


@matrix
def test_disabled_equals_base(method: str, family: str) -> None:
    model, batch = model_and_batch(method, family)
    before = run(model, batch)
    graft = gw.attach(model, method_of(method))
    perturb(graft.parameters(), 7)
    after = run(model, batch)
    assert not torch.allclose(after, before, atol=1e-4)
    with gw.disabled(model):
        assert torch.equal(run(model, batch), before)
    assert torch.equal(run(model, batch), after)
    gw.activate(model, None)
    assert torch.equal(run(model, batch), before)


@matrix
def test_switch_and_delete(method: str, family: str) -> None:
    model, batch, first = grafted(method, family)
    out_a = run(model, batch)
    second = gw.attach(model, method_of(method), name="b")
    perturb(second.parameters(), 8)
    out_b = run(model, batch)
    assert not torch.allclose(out_a, out_b, atol=1e-4)
    gw.activate(model, "a")
    assert torch.equal(run(model, batch), out_a)
    second.activate()
    assert torch.equal(run(model, batch), out_b)
    first.delete()
    assert list(gw.adapters(model)) == ["b"]
    assert torch.equal(run(model, batch), out_b)
    with pytest.raises(ConfigError, match="there is no adapter `a`"):
        gw.activate(model, "a")
    second.delete()
    with gw.disabled(model):
        base = run(model, batch)
    assert torch.equal(run(model, batch), base)


@matrix
def test_merge(method: str, family: str) -> None:
    model, batch, graft = grafted(method, family)
    if not graft.method.mergeable:
        with pytest.raises(UnsupportedError, match="cannot be merged"):
            graft.merge()
        return
    model.double()  # so that what is left is a difference of the mathematics, not of rounding
    with gw.disabled(model):
        base = run(model, batch)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    unmerged = run(model, batch)
    graft.merge()
    torch.testing.assert_close(run(model, batch), unmerged, atol=1e-9, rtol=1e-9)
    with gw.disabled(model):
        assert torch.equal(run(model, batch), base)
    assert graft.merged
    with pytest.raises(ConflictError, match="unmerge"):
        gw.attach(model, method_of("lora"), name="other")
    graft.unmerge()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in bits.items())
    assert torch.equal(run(model, batch), unmerged)


@matrix
def test_mixed_rows_equal_one_by_one(method: str, family: str) -> None:
    """Two adapters of the method, one of another kind, and none, all in one batch."""
    model, batch, _ = grafted(method, family, rows=5)
    partner = gw.attach(model, method_of(PARTNERS.get(method, "lora")), name="partner")
    perturb(partner.parameters(), 9)
    rows = ["a", None, "b", "partner", "a"]
    if not method_of(method).supports_rows:
        for mixed in (["a", None], ["partner", "a"]):
            with pytest.raises(UnsupportedError, match=r"`a` is .* cannot differ by row"):
                gw.activate(model, rows=mixed)
        rows = ["partner", None, "partner", "partner", None]  # it may lie beside them
    else:
        other = gw.attach(model, method_of(method), name="b")
        perturb(other.parameters(), 8)
    exact = _to_double(model, family)
    alone = []
    for index, name in enumerate(rows):
        gw.activate(model, name)
        alone.append(run(model, {key: value[index : index + 1] for key, value in batch.items()}))
    gw.activate(model, rows=rows)
    _same_rows(run(model, batch), alone, batch, **exact)
    with pytest.raises(ConfigError, match="named for 5 rows"):
        run(model, {key: value[:3] for key, value in batch.items()})


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_rows_of_all_kinds_in_one_batch(family: str) -> None:
    kinds = [kind for kind in METHODS if method_of(kind).supports_rows and (kind, family) not in REFUSED]
    if not has_head("lora", ALL[family]):
        kinds = [kind for kind in kinds if kind != "probe"]  # with a language model there is no head for it
    model, batch = model_and_batch("lora", family, rows=len(kinds) + 1)
    for seed, kind in enumerate(kinds):
        graft = gw.attach(model, method_of(kind), name=kind.replace(" ", "-"))
        perturb(graft.parameters(), seed)
    exact = _to_double(model, family)
    rows = [*gw.adapters(model), None]
    batch["attention_mask"][:, :1] = 1
    batch["input_ids"][:, :1].clamp_(min=3)  # no padding token where it is a token: positions follow from these
    alone = []
    for index, name in enumerate(rows):
        gw.activate(model, name)
        alone.append(run(model, {key: value[index : index + 1] for key, value in batch.items()}))
    gw.activate(model, rows=rows)
    _same_rows(run(model, batch), alone, batch, **exact)


def _to_double(model: Any, family: str) -> dict[str, float]:
    """Compute in float64, so that what is left is a difference of the mathematics, and return the tolerances then.

    transformers' softmax of Gemma 2 is float32 always. There float64's lowest number, which masks, is minus infinity,
    and a row of padding that sees padding alone is NaN, in the bare model too.
    """
    if family == "gemma2":
        return {"atol": 1e-5, "rtol": 1e-4}
    model.double()
    return {"atol": 1e-9, "rtol": 1e-9}


def _same_rows(together: Tensor, alone: list[Tensor], batch: dict[str, Tensor], *, atol: float, rtol: float) -> None:
    for index, one in enumerate(alone):
        row = together[index]
        if row.dim() == 2 and "decoder_input_ids" not in batch:
            # What a model says at padding is nobody's answer.
            real = batch["attention_mask"][index].bool()
            row, one = row[real], one[:, real]
        torch.testing.assert_close(row, one[0], atol=atol, rtol=rtol, msg=lambda text, at=index: f"row {at}: {text}")


@matrix
def test_save_and_load(method: str, family: str, tmp_path: Path) -> None:
    model, batch, graft = grafted(method, family)
    expected = run(model, batch)
    save_adapter(graft, tmp_path / "adapter")
    fresh, _ = model_and_batch(method, family)
    loaded = load_adapter(fresh, tmp_path / "adapter", name="again")
    assert loaded.method.name == graft.method.name
    torch.testing.assert_close(run(fresh, batch), expected, **CLOSE)
    own, others = graft.state_dict(), loaded.state_dict()
    assert list(own) == list(others)
    # What is loaded to be used does not train, says so, and does not forget it when it was switched off.
    size = sum(parameter.numel() for parameter in graft.parameters())
    assert f"  trains   {size:,} parameters" in str(graft)
    assert f"  frozen   {size:,} parameters" in str(loaded)
    with gw.disabled(fresh):
        pass
    assert loaded.frozen
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


@matrix
def test_training_goes_on_from_a_saved_adapter(method: str, family: str, tmp_path: Path) -> None:
    """Two steps, a folder, two more: the same weights as four steps without the folder."""

    def train(model: Any, graft: gw.Adapter, batch: dict[str, Tensor], steps: int) -> None:
        optimizer = torch.optim.SGD(graft.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    model, batch, graft = grafted(method, family)
    train(model, graft, batch, 2)
    save_adapter(graft, tmp_path / "adapter")
    fresh, _ = model_and_batch(method, family)
    again = load_adapter(fresh, tmp_path / "adapter", name="a", trainable=True)
    train(model, graft, batch, 2)
    train(fresh, again, batch, 2)
    expected = dict(graft.named_parameters())
    assert expected.keys() == dict(again.named_parameters()).keys()
    for key, parameter in again.named_parameters():
        torch.testing.assert_close(
            parameter, expected[key], atol=1e-5, rtol=1e-4, msg=lambda text, at=key: f"{at}: {text}"
        )


@matrix
def test_gradient_checkpointing_gives_the_same_gradients(method: str, family: str) -> None:
    model, batch, graft = grafted(method, family)
    exact = _to_double(model, family)
    model.train()
    loss_of(model, batch).backward()
    plain = {key: parameter.grad.clone() for key, parameter in graft.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss_of(model, batch).backward()
    assert plain
    for key, parameter in graft.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key], **exact, msg=lambda text, at=key: f"{at}: {text}")


@pytest.mark.parametrize(
    ("method", "family"), [pair for pair in (*QUICK, *SLOW) if _generates(*getattr(pair, "values", pair))]
)
def test_generation_with_and_without_cache(method: str, family: str) -> None:
    model, batch, _ = grafted(method, family)
    batch.pop("decoder_input_ids", None)
    if ALL[family].kind == "decoder":
        batch = {key: value.flip(1) for key, value in batch.items()}  # padding on the left, as generation wants it
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    beams = model.generate(**batch, **options, num_beams=2, use_cache=True)
    assert torch.equal(beams, model.generate(**batch, **options, num_beams=2, use_cache=False))


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.kind != "encoder"])
def test_generation_with_a_probe(family: str) -> None:
    """A language model has no task head, which is said; its output layer, asked for by name, is a head like any."""
    kind = ALL[family]
    with pytest.raises(UnsupportedError, match="the task head alone"):
        gw.attach(kind.build(), method_of("probe"))
    model, batch = kind.build(), kind.batch(rows=2, padded=False)
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**batch, **options)
    graft = gw.attach(model, Probe(modules_to_save=("lm_head",)))
    assert torch.equal(model.generate(**batch, **options), before)
    perturb(graft.parameters(), 7)
    cached = model.generate(**batch, **options)
    assert not torch.equal(cached, before)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    with gw.disabled(model):
        assert torch.equal(model.generate(**batch, **options), before)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.classifier])
@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix", "prompt", "ia3", "probe"])
def test_each_adapter_keeps_its_own_head(method: str, family: str, tmp_path: Path) -> None:
    """Two adapters with different label counts on one base, each with its own head, also through a folder."""
    kind = ALL[family]
    batch = kind.batch(rows=3)
    if kind.kind == "seq2seq":
        batch = {
            "input_ids": batch["input_ids"].clamp_min(3),
            "attention_mask": torch.ones_like(batch["attention_mask"]),
        }
        batch["input_ids"][:, -1] = 2
    model = kind.build(classifier=True, labels=3)
    first = gw.attach(model, method_of(method), name="three")
    perturb(first.parameters(), 1)
    out = run(model, batch)
    other = kind.build(classifier=True, labels=5)
    five = gw.attach(other, method_of(method), name="five")
    perturb(five.parameters(), 2)
    expected = run(other, batch)
    save_adapter(five, tmp_path / "five")
    load_adapter(model, tmp_path / "five", name="five")
    assert run(model, batch).shape == (3, 5)
    torch.testing.assert_close(run(model, batch), expected, **CLOSE)
    gw.activate(model, "three")
    assert torch.equal(run(model, batch), out)
    gw.activate(model, rows=["three", "five", "three"])
    with pytest.raises(UnsupportedError, match="different numbers of scores"):
        run(model, batch)


def test_head_is_tried_in_the_matrix() -> None:
    assert sum(has_head(method, ALL[family]) for method, family in PAIRS) > 80
