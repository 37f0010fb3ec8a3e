"""`layers`: what can be said, what it means on each kind of model, and what is refused; PEFT reads what we write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftwerk.modeling.attach as gw
from graftwerk.errors import ConfigError
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.architectures import read_architecture
from graftwerk.schema import run_schema
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.contract.cases import perturb
from tests.families import FAMILIES, IDS, SMALL

METHODS: list[dict[str, Any]] = [
    {"name": "lora", "r": 2},
    {"name": "lora", "r": 2, "use_dora": True},
    {"name": "lora", "r": 2, "init_lora_weights": "pissa"},
    {"name": "miss", "r": 2},
    {"name": "hira", "r": 2},
    {"name": "shira", "r": 2},
    {"name": "oft", "oft_block_size": 4},
    {"name": "bottleneck", "placement": "houlsby", "adapter_size": 3},
    {"name": "bottleneck", "placement": "parallel", "adapter_size": 3},
    {"name": "ia3"},
    {"name": "bitfit"},
    {"name": "prefix", "num_virtual_tokens": 3},
    {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6},
]


def bert(layers: int = 4) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(**{**SMALL, "num_hidden_layers": layers}, max_position_embeddings=64, num_labels=3)
    ).eval()


def layers_of(graft: gw.Adapter) -> set[tuple[str, int]]:
    """(stack, layer) of everything that an adapter touches."""
    view = read_architecture(graft.model)
    found = {(str(place.stack), int(place.layer)) for place in graft.targets if place.layer is not None}
    assert all(place.layer is not None for place in graft.targets)
    return found | {(place.stack, place.layer) for place in view.attentions if place.path in graft.hosts}


@pytest.mark.parametrize(
    ("said", "meant"),
    [("top-2", {2, 3}), ("TOP-1", {3}), ("1-2", {1, 2}), ("3-3", {3}), ([0, 2], {0, 2}), (3, {3}), ("2", {2}),
     (None, {0, 1, 2, 3}), ("all", {0, 1, 2, 3}), ("top-4", {0, 1, 2, 3})],
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_layers_chosen_adapts_only_those(method: dict[str, Any], said: Any, meant: set[int]) -> None:
    parsed = parse_method({**method, "layers": said})
    if parsed.layers is None:  # type: ignore[attr-defined]
        pytest.skip("all layers is another test")
    graft = gw.attach(bert(), parsed)
    assert layers_of(graft) == {("encoder", layer) for layer in meant}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_layers_all_equals_no_choice(method: dict[str, Any]) -> None:
    parsed = parse_method({**method, "layers": "all"})
    assert parsed == parse_method(method)


@pytest.mark.parametrize(
    ("said", "words"),
    [("top-5", "has 4 layers"), ("2-4", "has 4 layers"), ([4], "has 4 layers"), ("encoder:top-1", "one stack"),
     ("decoder:", "one stack")],
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS[::3], ids=str)
def test_layers_out_of_range_raises(method: dict[str, Any], said: Any, words: str) -> None:
    model = bert()
    with pytest.raises(ConfigError, match=words) as caught:
        gw.attach(model, parse_method({**method, "layers": said}))
    assert caught.value.hint
    assert caught.value.where == "method.layers"
    assert not gw.adapters(model)


@pytest.mark.parametrize("said", ["top-0", "3-1", "last", "", [], [-1], [1.5], True, "top", "1-", "sideways:top-1"])
def test_layers_invalid_choice_raises(said: Any) -> None:
    with pytest.raises(ConfigError, match="layers"):
        parse_method({"name": "lora", "layers": said})


@pytest.mark.parametrize("name", ["probe", "full", "prompt", "ptuning"])
def test_layers_on_method_outside_layers_raises(name: str) -> None:
    with pytest.raises(ConfigError, match="no setting `layers`"):
        parse_method({"name": name, "layers": "top-1"})


def test_layers_to_transform_is_alias() -> None:
    assert parse_method({"name": "lora", "layers_to_transform": [1, 0]}).layers == (0, 1)  # type: ignore[attr-defined]


def test_target_outside_chosen_layers_raises() -> None:
    method = {"name": "lora", "r": 2, "target_modules": ["query", "pooler.dense"], "layers": "top-1"}
    with pytest.raises(ConfigError, match=r"`pooler.dense` is in none of the chosen layers"):
        gw.attach(bert(), parse_method(method))
    with pytest.raises(ConfigError, match="none of the chosen layers"):
        gw.attach(bert(), parse_method({**method, "target_modules": ["pooler.dense"]}))


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    ("said", "meant"),
    [("top-1", {("encoder", 1), ("decoder", 1)}), ([0], {("encoder", 0), ("decoder", 0)}),
     ("decoder:top-1", {("decoder", 1)}), ("decoder:", {("decoder", 0), ("decoder", 1)}),
     ("encoder:0-0", {("encoder", 0)}), ("decoder:0", {("decoder", 0)})],
)  # fmt: skip
@pytest.mark.parametrize("method", [METHODS[0], METHODS[3], METHODS[5], METHODS[7], METHODS[8]], ids=str)
def test_layers_on_encoder_decoder_selects_stack(
    family: str, method: dict[str, Any], said: Any, meant: set[Any], tmp_path: Path
) -> None:
    model = FAMILIES[family].build()
    graft = gw.attach(model, parse_method({**method, "layers": said}), name="a")
    assert layers_of(graft) == meant
    _stored_and_loaded(graft, FAMILIES[family].batch(), tmp_path)


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "gpt2", "llama", "mistral"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_layers_roundtrip_through_folder(family: str, method: dict[str, Any], tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    if method["name"] == "bitfit" and family in ("modernbert", "llama", "mistral"):
        pytest.skip("no bias to train")
    graft = gw.attach(model, parse_method({**method, "layers": "top-1"}), name="a")
    assert {layer for _, layer in layers_of(graft)} == {1}
    if graft.method.kind == "layer":
        assert graft.method.num_parameters(graft.targets) == graft.num_parameters
    _stored_and_loaded(graft, FAMILIES[family].batch(), tmp_path)


def _stored_and_loaded(graft: gw.Adapter, batch: dict[str, torch.Tensor], folder: Path) -> None:
    perturb(graft.parameters(), 7, 0.1)
    model = graft.model
    with torch.no_grad():
        before = model(**batch).logits
    save_adapter(graft, folder / "adapter", metadata={})
    gw.detach(model)
    again = load_adapter(model, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, atol=2e-6, rtol=1e-5)
    assert again.method.layers == graft.method.layers  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "opt", "llama", "t5", "bart"]
)
@pytest.mark.parametrize("said", ["top-1", [0]])
def test_layers_folder_loads_in_peft(family: str, said: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES[family].build()
    graft = gw.attach(model, parse_method({"name": "lora", "r": 2, "layers": said}), name="a")
    perturb(graft.parameters(), 7, 0.1)
    batch = FAMILIES[family].batch()
    with torch.no_grad():
        wanted = model(**batch).logits
    save_adapter(graft, tmp_path / "adapter", metadata={})
    written = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert written.layers_to_transform == [1 if said == "top-1" else 0]
    other = peft.PeftModel.from_pretrained(FAMILIES[family].build(), str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(other(**batch).logits, wanted, atol=2e-6, rtol=1e-5)
    (tmp_path / "adapter" / "graftwerk.json").unlink()
    gw.detach(model)
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, wanted, atol=2e-6, rtol=1e-5)


def test_prefix_in_top_layer_shifts_positions() -> None:
    """Two prefixes in different layers of a decoder: text begins behind both, as it does where both are everywhere."""
    import transformers as tf

    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=4, n_positions=64, **IDS)
    ).eval()
    seen: list[torch.Tensor] = []
    model.transformer.wpe.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gw.attach(model, parse_method({"name": "prefix", "num_virtual_tokens": 3, "layers": "top-1"}), name="a")
    gw.attach(model, parse_method({"name": "prefix", "num_virtual_tokens": 2, "layers": [0]}), name="b")
    batch = {"input_ids": torch.arange(3, 8)[None].repeat(2, 1)}
    for names, first in ((["a"], 3), (["b"], 2), (["a", "b"], 5), ([], 0)):
        gw.activate(model, names)
        with torch.no_grad():
            model(**batch)
        assert int(seen[-1].min()) == first, names
    gw.activate(model, rows=["a", "b"])
    with torch.no_grad():
        model(**batch)
    assert seen[-1][:, 0].tolist() == [3, 2]


def test_layers_is_in_schema() -> None:
    assert "top-4 (the four highest)" in str(run_schema())
