"""Prefixes in the attention of every family: what is seen, where it stands, how it starts, that nothing is left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from graftwerk.errors import ConfigError, ConflictError, ModelError, UnsupportedError
from graftwerk.methods.prefix_tuning import Prefix, PrefixModule
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.attach import activate, attach, detach, disabled
from tests.families import FAMILIES, GATED
from tests.modeling.soft import CAUSAL, CLOSE, SEQ2SEQ, expect_rows, generate, left_padded, logits, moved, one

METHODS = {
    "prefix": Prefix(num_virtual_tokens=3),
    "network": Prefix(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
}
LONGER = {
    "prefix": Prefix(num_virtual_tokens=5),
    "network": Prefix(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=5),
}
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", METHODS)


@families
@methods
def test_rows_with_mixed_prefix_lengths_equal_single_rows(method: str, family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(rows=4)
    base = logits(model, batch)
    moved(model, METHODS[method], "a", 1)
    moved(model, LONGER[method], "b", 2)
    rows = ["a", "b", None, "b"]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(logits(model, one(batch, row)))
    activate(model, rows=rows)
    expect_rows(logits(model, batch), alone, batch)
    activate(model, rows=[None] * 4)
    assert torch.equal(logits(model, batch), base)


@families
@methods
def test_every_attention_has_a_trained_prefix(method: str, family: str) -> None:
    """In the encoder, the decoder and the cross-attention; checkpointed either way, the gradients are the same."""
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(labels=True)
    view = read_architecture(model)
    widths = [place.kv_heads * place.head_dim for place in view.attentions]
    assert len(widths) == (6 if FAMILIES[family].kind == "seq2seq" else 2)
    graft = moved(model, METHODS[method], "a", 1)
    assert graft.num_parameters == METHODS[method].num_vector_parameters(widths, [stack.width for stack in view.stacks])
    hosts = {key.rpartition(".prefix")[0] for key, _ in graft.named_parameters()}
    assert {place.path for place in view.attentions} <= hosts
    model.train()
    model(**batch).loss.backward()
    plain = {key: parameter.grad for key, parameter in graft.named_parameters()}
    assert all((gradient != 0).all() for gradient in plain.values())
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch).loss.backward()
        for key, parameter in graft.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[key], atol=1e-6, rtol=1e-4)


@families
def test_eager_attention_equals_sdpa(family: str) -> None:
    batch = FAMILIES[family].batch()
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = FAMILIES[family].build()
        model.set_attn_implementation(implementation)
        moved(model, METHODS["prefix"], "a", 1)
        moved(model, LONGER["prefix"], "b", 2)
        activate(model, rows=["a", None, "b"])
        outputs.append(logits(model, batch))
    for row in range(3):
        seen = slice(None) if "decoder_input_ids" in batch else batch["attention_mask"][row].bool()
        torch.testing.assert_close(outputs[0][row][seen], outputs[1][row][seen], **CLOSE)


def test_eager_attention_weights_cover_prefix() -> None:
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch()
    model.set_attn_implementation("eager")
    attach(model, METHODS["prefix"])
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in attentions] == [(3, 4, 7, 10)] * 2
    assert (attentions[0][..., :3] > 0).all()


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_left_padded_generation_equals_rows_alone(family: str) -> None:
    model, batch = FAMILIES[family].build(), left_padded(FAMILIES[family].batch())
    moved(model, METHODS["prefix"], "a", 1)
    moved(model, LONGER["network"], "b", 2)
    rows = ["a", "b", None]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(generate(model, one(batch, row)))
    activate(model, rows=rows)
    tokens, scores = generate(model, batch)
    torch.testing.assert_close(scores, torch.cat([score for _, score in alone]), **CLOSE)
    assert torch.equal(tokens, torch.cat([token for token, _ in alone]))


def test_left_padding_without_position_ids_equals_rows_alone() -> None:
    """OPT counts positions by the mask, with a prefix as well as without."""
    model, batch = FAMILIES["opt"].build(), left_padded(FAMILIES["opt"].batch())
    moved(model, METHODS["prefix"], "a", 1)
    moved(model, LONGER["prefix"], "b", 2)
    rows = ["a", "b", None]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(logits(model, one(batch, row)))
    activate(model, rows=rows)
    expect_rows(logits(model, batch), alone, batch)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_beams_of_mixed_rows_with_and_without_cache(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    batch = left_padded(batch) if family in CAUSAL else batch
    moved(model, METHODS["prefix"], "a", 1)
    moved(model, LONGER["network"], "b", 2)
    activate(model, rows=["b", None, "a"])
    tokens, scores = generate(model, batch, num_beams=2)
    again, slow = generate(model, batch, num_beams=2, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, slow, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_static_cache_generation_equals_dynamic(family: str) -> None:
    model, batch = FAMILIES[family].build(), left_padded(FAMILIES[family].batch())
    moved(model, METHODS["prefix"], "a", 1)
    _, dynamic = generate(model, batch)
    _, static = generate(model, batch, cache_implementation="static")
    torch.testing.assert_close(static, dynamic, **CLOSE)


def test_cache_of_earlier_turn_continues_equally() -> None:
    """The prefix is not in the cache, so the cache's length is the text's."""
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(padded=False)
    moved(model, METHODS["prefix"], "a", 1)
    whole = logits(model, batch)
    with torch.no_grad():
        first = model(input_ids=batch["input_ids"][:, :4], use_cache=True)
        rest = model(input_ids=batch["input_ids"][:, 4:], past_key_values=first.past_key_values)
    assert rest.past_key_values.get_seq_length() == 7
    torch.testing.assert_close(rest.logits, whole[:, 4:], **CLOSE)


# -- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
@methods
def test_init_from_text_equals_text_in_front(method: str, family: str) -> None:
    if family == "mistral":
        # With a window as short as the family's, text would slide out of it; a prefix does not.
        torch.manual_seed(0)
        model = tf.MistralForCausalLM(tf.MistralConfig(**GATED, sliding_window=32)).eval()
    else:
        model = FAMILIES[family].build()
    batch = FAMILIES[family].batch(padded=True)
    text = torch.tensor([[5, 9, 33]])
    front = {
        "input_ids": torch.cat((text.expand(3, -1), batch["input_ids"]), dim=1),
        "attention_mask": torch.cat((torch.ones(3, 3, dtype=torch.long), batch["attention_mask"]), dim=1),
    }
    expected = logits(model, front)[:, 3:]
    attach(model, METHODS[method].with_token_ids([5, 9, 33]))
    actual, real = logits(model, batch), batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], **CLOSE)


def test_init_from_text_uses_bare_base() -> None:
    method = METHODS["prefix"].with_token_ids([5, 9, 33])
    clean = attach(FAMILIES["llama"].build(), method).state_dict()
    model = FAMILIES["llama"].build().train()
    moved(model, METHODS["prefix"], "other", 1)
    crowded = attach(model, method, name="again").state_dict()
    assert model.training
    assert all(torch.equal(clean[key], crowded[key]) for key in clean)


def test_init_text_is_repeated_or_cut() -> None:
    method = Prefix(num_virtual_tokens=5, init_token_ids=[7, 8])
    assert method.start_ids(64) == (7, 8, 7, 8, 7)
    assert method.with_token_ids(range(3, 13)).start_ids(64) == (3, 4, 5, 6, 7)


def test_init_without_ids_or_with_foreign_ids_raises() -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(ConfigError, match="not yet tokenized"):
        attach(model, Prefix(init_text="a film"))
    with pytest.raises(ConfigError, match="token id 64 is not in the model's vocabulary of 64"):
        attach(model, Prefix(init_token_ids=[3, 64]))
    assert model.config._attn_implementation == "sdpa"


@methods
def test_merged_state_equals_attention_inputs(method: str) -> None:
    model, batch = FAMILIES["bart"].build(), FAMILIES["bart"].batch()
    graft = moved(model, METHODS[method], "a", 1)
    expected = logits(model, batch)
    folded = {
        f"{path}.{key}": value for path, module in graft.modules() for key, value in module.merged_state().items()
    }
    plain = attach(model, METHODS["prefix"], name="plain")
    plain.load_state_dict(folded)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-6, rtol=1e-5)


# -- several adapters, and nothing left behind ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_several_prefixes_are_concatenated(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    first = moved(model, METHODS["prefix"], "a", 1)
    second = moved(model, LONGER["prefix"], "b", 2)
    activate(model, ["a", "b"])
    both = logits(model, batch)
    joined = attach(model, Prefix(num_virtual_tokens=8), name="joined")
    joined.load_state_dict(
        {key: torch.cat((value, second.state_dict()[key])) for key, value in first.state_dict().items()}
    )
    torch.testing.assert_close(logits(model, batch), both, atol=1e-6, rtol=1e-5)


def _hooks(model: Any) -> dict[str, tuple[int, int]]:
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}


@families
def test_detach_removes_everything(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    base, hooks, config = logits(model, batch), _hooks(model), copy.deepcopy(model.config)
    own = {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}
    for name in ("a", "b"):
        moved(model, METHODS["network"], name, 1)
    assert model.config._attn_implementation == "graftwerk_sdpa"
    with disabled(model):
        assert torch.equal(logits(model, batch), base)
    detach(model)
    assert _hooks(model) == hooks
    assert {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")} == own
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(logits(model, batch), base)


def test_saved_configuration_names_original_attention(tmp_path: Path) -> None:
    model = FAMILIES["t5"].build()
    attach(model, METHODS["prefix"])
    model.config.save_pretrained(tmp_path)
    assert "graftwerk" not in (tmp_path / "config.json").read_text()
    assert "graftwerk" not in str(model.config.to_diff_dict())


def test_attach_leaves_other_models_unchanged() -> None:
    first, second = FAMILIES["bert"].build(), FAMILIES["bert"].build()
    base = logits(second, FAMILIES["bert"].batch())
    attach(first, METHODS["prefix"])
    assert second.config._attn_implementation == "sdpa"
    assert torch.equal(logits(second, FAMILIES["bert"].batch()), base)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_deepcopy_is_independent(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    moved(model, METHODS["network"], "a", 1)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, PrefixModule):
                module.prefix_output.bias.add_(1)
    activate(twin, None)
    assert torch.equal(logits(model, batch), expected)
    activate(model, None)
    assert torch.equal(logits(twin, batch), logits(model, batch))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_attach_attention_without_interface_raises() -> None:
    model = FAMILIES["llama"].build()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedError, match="flex_attention"):
        attach(model, METHODS["prefix"])
    gpt2 = FAMILIES["gpt2"].build()
    gpt2.set_attn_implementation("eager")
    gpt2.config.reorder_and_upcast_attn = True
    with pytest.raises(UnsupportedError, match="reorder_and_upcast_attn"):
        attach(gpt2, METHODS["prefix"])


def test_attach_attention_bypassing_interface_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build()
    last = model.model.layers[1].self_attn
    monkeypatch.setattr(last, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(UnsupportedError, match="does not go through transformers' attention interface") as caught:
        attach(model, METHODS["prefix"].with_token_ids([5, 9]))
    assert caught.value.where == "model.layers.1.self_attn"
    assert model.config._attn_implementation == "sdpa"


def test_forward_after_changed_attention_raises() -> None:
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch()
    attach(model, METHODS["prefix"])
    model.set_attn_implementation("eager")
    with pytest.raises(ConflictError, match="attention implementation was changed to `eager`"):
        logits(model, batch)


def test_forward_text_beyond_positions_raises() -> None:
    model, batch = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].batch(tokens=62, padded=False)
    attach(model, METHODS["prefix"])
    with pytest.raises(
        ModelError, match="62 tokens of text and 3 virtual tokens are more than the 64 positions"
    ) as caught:
        logits(model, batch)
    assert "61 tokens" in str(caught.value)
    activate(model, None)
    logits(model, batch)


# -- against PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_outputs_equal_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, batch = FAMILIES[family].build(), left_padded(FAMILIES[family].batch())
    right = FAMILIES[family].batch()
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    graft = moved(model, METHODS["prefix"], "a", 1)
    state = graft.state_dict()
    # One row for each token: layer by layer, keys before values.
    flat = torch.cat(
        [state[f"{p.path}.prefix_{side}"] for p in read_architecture(model).attentions for side in ("key", "value")],
        dim=1,
    )
    wrapped.prompt_encoder["default"].load_prompt_embeddings(flat)
    wrapped.eval()
    with torch.no_grad():
        real = right["attention_mask"].bool()
        torch.testing.assert_close(logits(model, right)[real], wrapped(**right).logits[real], **CLOSE)
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**batch, **options), wrapped.generate(**batch, **options))
