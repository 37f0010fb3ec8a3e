"""Modules of `modules_to_save`: trained and stored whole, never adapted as well, and loaded again by us and by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, ConfigError, UnsupportedError
from graftwerk.methods.registry import parse_method
from graftwerk.serialization import folder as store
from graftwerk.serialization.folder import load_adapter, save_adapter
from graftwerk.serialization.peft_format import PREFIX, Stored
from graftwerk.training.warm_start import warm_start
from tests.families import FAMILIES
from tests.serialization.peft_models import load_in_peft

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 2},
    "dora": {"name": "lora", "r": 2, "use_dora": True},
    "pissa": {"name": "lora", "r": 2, "init_lora_weights": "pissa"},
    "ia3": {"name": "ia3"},
    "bottleneck": {"name": "bottleneck", "adapter_size": 2},
    "bitfit": {"name": "bitfit"},
    "prefix": {"name": "prefix", "num_virtual_tokens": 2, "prefix_projection": True, "encoder_hidden_size": 4},
    "prompt": {"name": "prompt", "num_virtual_tokens": 2},
    "ptuning": {"name": "ptuning", "num_virtual_tokens": 2, "encoder_hidden_size": 4},
    "probe": {"name": "probe"},
}


def build(family: str) -> Any:
    return FAMILIES[family].build(classifier=family != "llama")


def run(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        logits = model(**FAMILIES[family].batch()).logits
    return logits if logits.dim() == 2 else logits[:, -7:]


def randomised(graft: gw.Adapter) -> gw.Adapter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return graft


def loaded_by_peft(family: str, folder: Path) -> Tensor:
    return run(load_in_peft(build(family), folder), family)


@pytest.mark.parametrize(
    ("method", "family", "saved"),
    [(method, "bert", ["classifier", "pooler"]) for method in METHODS]
    + [(method, "llama", ["embed_tokens"]) for method in ("lora", "ia3", "prefix", "prompt", "probe")]
    + [("lora", "distilbert", ["classifier"]), ("ia3", "bert", ["1.output"]), ("lora", "bert", ["pooler"])],
)
def test_modules_to_save_by_suffix_roundtrip(method: str, family: str, saved: list[str], tmp_path: Path) -> None:
    model = build(family)
    graft = randomised(gw.attach(model, parse_method({**METHODS[method], "modules_to_save": saved})))
    expected = run(model, family)
    assert not torch.allclose(expected, run(build(family), family), atol=1e-3)
    save_adapter(graft, tmp_path / "a")
    again = build(family)
    loaded = load_adapter(again, tmp_path / "a")
    assert loaded.heads == graft.heads
    torch.testing.assert_close(run(again, family), expected, **CLOSE)
    # The warm start reads the folder beside an adapter that has copies of the same modules.
    fresh = gw.attach(build(family), graft.method)
    warm_start(fresh, str(tmp_path / "a"))
    torch.testing.assert_close(run(fresh.model, family), expected, **CLOSE)
    own = method in ("bottleneck", "bitfit", "probe") or (family == "llama" and method == "prompt")
    own = own or (family == "bert" and method == "prefix")
    assert store.read_adapter_config(tmp_path / "a").peft_type.startswith("GRAFTWERK_") == own
    if not own:
        torch.testing.assert_close(loaded_by_peft(family, tmp_path / "a"), expected, **CLOSE)


@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        (["query", "dense"], ["bert.pooler"]),  # a saved module that holds adapted layers
        (["query"], ["bert.encoder.layer.0.attention.self.query"]),  # one that would be adapted itself
        (["query", "key"], ["encoder.layer.1", "layer.1.output"]),  # nested: the outer one holds the inner
    ],
)
def test_saved_modules_are_excluded_from_targets_as_in_peft(
    targets: list[str], saved: list[str], tmp_path: Path
) -> None:
    model = build("bert")
    method = parse_method({**METHODS["lora"], "target_modules": targets, "modules_to_save": [*saved, "classifier"]})
    graft = randomised(gw.attach(model, method))
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved, task_type="SEQ_CLS")
    theirs = peft.get_peft_model(build("bert"), config)
    assert {f"{PREFIX}{path}" for path in graft.hosts} == {
        name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert not any(".graft." in key for key in graft.state_dict())
    model(**FAMILIES["bert"].batch()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in graft.parameters())
    expected = run(model, "bert")
    save_adapter(graft, tmp_path / "a")
    torch.testing.assert_close(loaded_by_peft("bert", tmp_path / "a"), expected, **CLOSE)
    again = build("bert")
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(run(again, "bert"), expected, **CLOSE)


@pytest.mark.parametrize("saved", ["pooler", "pooler.dense"])
@pytest.mark.parametrize("first", ["saving", "adapting"])
def test_attach_module_saved_by_one_and_adapted_by_other_equals_alone(saved: str, first: str) -> None:
    """Alone, by row and after the other is deleted, each answers as on a model of its own."""
    methods = {
        "saving": parse_method({**METHODS["lora"], "target_modules": ["query"], "modules_to_save": [saved]}),
        "adapting": parse_method({**METHODS["lora"], "target_modules": ["dense"], "modules_to_save": []}),
    }
    alone = {}
    for name, method in methods.items():
        model = build("bert")
        torch.manual_seed(5)
        alone[name] = run(randomised(gw.attach(model, method, name)).model, "bert")
    model = build("bert")
    bare = run(model, "bert")
    for name in sorted(methods, key=lambda name: name != first):
        torch.manual_seed(5)
        randomised(gw.attach(model, methods[name], name))
    for name in methods:
        gw.activate(model, name)
        torch.testing.assert_close(run(model, "bert"), alone[name], **CLOSE)
    gw.activate(model, rows=["saving", None, "adapting"])
    by_row = torch.stack([alone["saving"][0], bare[1], alone["adapting"][2]])
    torch.testing.assert_close(run(model, "bert"), by_row, **CLOSE)
    gw.adapters(model)["saving"].delete()
    gw.activate(model, "adapting")
    torch.testing.assert_close(run(model, "bert"), alone["adapting"], **CLOSE)
    gw.detach(model)
    assert torch.equal(run(model, "bert"), bare)


@pytest.mark.parametrize(
    ("error", "method"),
    [
        (ConfigError, {"name": "lora", "modules_to_save": ["encoder", "pooler"]}),
        (ConfigError, {"name": "lora", "modules_to_save": ["bert"]}),
        (ConfigError, {"name": "lora", "modules_to_save": ["dropout"]}),
        (UnsupportedError, {"name": "prefix", "modules_to_save": ["layer.1"]}),
        (UnsupportedError, {"name": "prompt", "modules_to_save": ["bert"]}),
        (UnsupportedError, {"name": "bottleneck", "placement": "parallel", "modules_to_save": ["intermediate"]}),
    ],
)
def test_attach_saved_modules_that_leave_no_target_raise(error: type[Exception], method: dict[str, Any]) -> None:
    model = build("bert")
    with pytest.raises(error, match=r"modules_to_save|saved whole"):
        gw.attach(model, parse_method(method))
    assert not gw.adapters(model)


def test_saved_embedding_returns_dtype_of_base() -> None:
    model = build("llama").to(torch.bfloat16)
    method = parse_method({**METHODS["lora"], "modules_to_save": ["embed_tokens"]})
    graft = gw.attach(model, method)
    assert run(model, "llama").dtype is torch.bfloat16
    assert all(parameter.dtype is torch.float32 for parameter in graft.parameters())


def test_saved_norm_copy_is_plain_layer_norm() -> None:
    """Classes for frozen modules are on the base when a second adapter copies a module of it."""
    model = build("bert")
    gw.attach(model, parse_method("lora"), "first")
    graft = gw.attach(model, parse_method({"name": "lora", "modules_to_save": ["1.output.LayerNorm"]}), "second")
    copies = dict(graft.modules())["bert.encoder.layer.1.output.LayerNorm"]
    assert type(copies) is torch.nn.LayerNorm


@pytest.mark.parametrize("other", ["default", "elsewhere"])
def test_load_adapter_adapted_layers_inside_saved_module(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.1.0 adapted such layers, stored them, and copied whatever adapters stood on the module with it."""
    model = build("bert")
    graft = randomised(gw.attach(model, parse_method({**METHODS["lora"], "modules_to_save": ["classifier", "pooler"]})))
    expected = run(model, "bert")
    write = store._WRITERS["lora"]

    def as_before(graft: gw.Adapter, base_name: str | None) -> Stored:
        stored = write(graft, base_name)
        a, b = torch.randn(2, 16), torch.randn(16, 2)
        layer = f"{PREFIX}bert.pooler.dense"
        for path in (layer, f"{layer}.graft.{other}"):
            stored.tensors.update({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
        return stored

    monkeypatch.setitem(store._WRITERS, "lora", as_before)
    save_adapter(graft, tmp_path / "a")
    again = build("bert")
    if other == "default":
        load_adapter(again, tmp_path / "a")
        torch.testing.assert_close(run(again, "bert"), expected, **CLOSE)
    else:
        with pytest.raises(AdapterError, match="copy of another adapter, `elsewhere`"):
            load_adapter(again, tmp_path / "a")


def test_attach_saved_module_that_is_never_called_raises() -> None:
    """Mamba takes the weight out of `dt_proj` and never calls it: a copy would not be asked."""
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=4)
    with pytest.raises(UnsupportedError, match=r"dt_proj.*never called"):
        gw.attach(tf.MambaForCausalLM(config), parse_method({**METHODS["lora"], "modules_to_save": ["dt_proj"]}))
