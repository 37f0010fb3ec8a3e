"""Attention maps: those of transformers, a hand-made prefix found in them, and any length within a memory bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graftwerk as gw
from graftwerk.cli.main import main
from graftwerk.errors import ConfigError
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.inspection.attention import attend
from graftwerk.inspection.attribution import ask
from graftwerk.modeling import attention_weights
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.attention_weights import recorded_attention
from tests.exports.conftest import Make
from tests.families import FAMILIES

pytest.importorskip("captum")
TEXT = "a small animal that eats grass"
N, HEAD = 3, 1
"""Virtual tokens of the hand-made prefix, and the head of keys that sees two of them alone."""
KEPT = ("task", "task_settings", "labels", "max_length")


def recorded(model: Any, **inputs: Any) -> tuple[list[torch.Tensor], Any]:
    """The weights of each call, (B, H, Q, S), and the model's output."""
    found: list[list[torch.Tensor]] = []

    def take(module: Any, start: int, weights: torch.Tensor) -> None:
        if start == 0:
            found.append([])
        found[-1].append(weights)

    with torch.no_grad(), recorded_attention(model, take):
        output = model(**inputs)
    return [torch.cat(parts, dim=2) for parts in found], output


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_recorded_attention_is_that_of_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[family].build().eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    inputs = {"input_ids": ids}
    if FAMILIES[family].kind == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :4]
    own = {path.path: path.cross for path in read_architecture(model).attentions}
    before = [config._attn_implementation for config in (model.config,)]
    found, output = recorded(model, **inputs)
    assert [config._attn_implementation for config in (model.config,)] == before
    monkeypatch.setattr(attention_weights, "MOST_BYTES", 12 * 4 * 7 * 2)  # two queries at a time
    sliced, again = recorded(model, **inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, sliced, strict=True))
    assert torch.allclose(output[0], again[0], atol=1e-6)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
    assert torch.allclose(output[0], expected[0], atol=1e-5)
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions") if len(inputs) > 1 else ("attentions",)
    theirs = [one for name in names for one in expected[name]]
    assert len(found) == len(theirs) == len(own)
    for one in theirs:
        assert any(one.shape == mine.shape and torch.allclose(one, mine, atol=1e-5) for mine in found)


@pytest.fixture
def hand_made(make_adapter: Make, tmp_path: Path) -> Callable[[Path, Any], Path]:
    """Make a prefix of which one head always sees the first two columns alone: far apart along one direction, so that
    one of them is near every query; all other keys are zero.
    """

    def make(base: Path, task: Any) -> Path:
        loaded = load_adapter_for(make_adapter(base, {"name": "prefix", "num_virtual_tokens": N}, task))
        (adapter,) = gw.adapters(loaded.model).values()
        modules = dict(adapter.modules())
        for attention in read_architecture(loaded.model).attentions:
            key = torch.zeros(N, attention.kv_heads, attention.head_dim)
            key[0, HEAD] = torch.linspace(-1, 1, attention.head_dim) * 1e6
            key[1, HEAD] = -key[0, HEAD]
            modules[attention.path].prefix_key.data.copy_(key.flatten(1))
        facts = {"model": str(base), **{key: loaded.info.own[key] for key in KEPT}}
        return gw.save(adapter, tmp_path / "hand-made", metadata=facts)

    return make


def attention(folder: Path, text: str) -> dict[str, Any]:
    loaded = load_adapter_for(folder)
    return asdict(attend(loaded, ask(loaded, text)))


@pytest.mark.parametrize(
    "kind", ["encoder", "t5", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "bart"))]
)
def test_columns_of_a_hand_made_prefix_are_found(
    kind: str, tiny_encoder: Path, text_model: Callable[[str], Path], hand_made: Callable[[Path, Any], Path]
) -> None:
    base, task = (tiny_encoder, "classification") if kind == "encoder" else (text_model(kind), "summarization")
    each = attention(hand_made(base, task), TEXT)
    stacks = {(layer["stack"], layer["cross"]) for layer in each["layers"]}
    assert stacks == {
        "encoder": {("encoder", False)},
        "llama": {("causal", False)},
    }.get(kind, {("encoder", False), ("decoder", False), ("decoder", True)})
    for layer in each["layers"]:
        own = each["decoder_tokens"] if layer["stack"] == "decoder" else each["tokens"]
        keys = each["tokens"] if layer["cross"] else own
        maps = np.array(layer["maps"])  # (H, Q, n + K)
        assert maps.shape[1:] == (len(own), N + len(keys))
        assert np.allclose(maps.sum(2), 1, atol=0.01)
        assert (layer["virtual"], layer["virtual_columns"]) == (N, N)
        assert np.allclose(layer["shares"], maps[:, :, :N].sum(2).mean(1), atol=1e-3)
        assert layer["share"] == pytest.approx(np.mean(layer["shares"]), abs=1e-3)
        seen = maps[:, :, :2].sum(2).min(1) > 0.99  # (H,): the heads of one group of keys
        assert 1 <= seen.sum() < len(maps)
        assert seen[HEAD * seen.sum() : (HEAD + 1) * seen.sum()].all()
        assert (maps[seen][:, :, 2] == 0).all()
        others = maps[~seen][:, :, :N]
        assert np.allclose(others, others[:, :, :1], atol=2e-4)
    if kind == "encoder":
        assert each["tokens"][0] == "[CLS]"


def test_attention_of_a_long_text_is_kept_in_groups(tiny_encoder: Path, make_adapter: Make) -> None:
    folder = make_adapter(tiny_encoder, {"name": "prefix", "num_virtual_tokens": N}, "classification")
    each = attention(folder, " ".join([TEXT] * 20))
    tokens = each["tokens"]
    assert len(tokens) == 24
    assert tokens[0].startswith("[CLS] … ")
    for layer in each["layers"]:
        maps = np.array(layer["maps"])
        assert maps.shape[1:] == (24, N + 24)
        assert np.allclose(maps.sum(2), 1, atol=0.01)


def test_virtual_columns_of_a_prompt_are_those_before_the_text(tiny_encoder: Path, make_adapter: Make) -> None:
    folder = make_adapter(tiny_encoder, {"name": "prompt", "num_virtual_tokens": N}, "classification")
    each = attention(folder, TEXT)
    assert {layer["virtual"] for layer in each["layers"]} == {N}
    assert {len(layer["maps"][0]) for layer in each["layers"]} == {len(each["tokens"])}
    bare = attention(make_adapter(tiny_encoder, "lora", "classification"), TEXT)
    assert {(layer["virtual"], layer["share"]) for layer in bare["layers"]} == {(0, None)}


def test_explain_command_shows_attention(
    capsys: pytest.CaptureFixture[str], tiny_encoder: Path, hand_made: Callable[[Path, Any], Path]
) -> None:
    folder = str(hand_made(tiny_encoder, "classification"))
    assert main(["explain", folder, TEXT, "--attention", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["attention"][0]["layers"][0]["virtual"] == N
    assert any("eager kernel" in note for note in found["notes"])
    for words in ("virtual tokens", "to 100%", "seen most"):
        assert words in printed.err
    assert main(["explain", folder, "--attention"]) == 2
    with pytest.raises(ConfigError, match="there is no text"):
        gw.explain(folder, attention=True)
