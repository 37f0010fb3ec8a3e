"""Trained rows on models: a base with these rows in its tables answers the same, and what cannot be is refused.

The contract tests go over the rows on every family as well ("lora tokens").
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import ConfigError, GraftwerkError, UnsupportedError
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.frozen_layers import find_frozen_prefix
from tests.contract.cases import perturb
from tests.families import ALL, GATED, SMALL

ROWS = [40, 3, 17]


def llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, tie_word_embeddings=tied)).eval()


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def batch_of(family: str, rows: int = 3) -> dict[str, Tensor]:
    batch = ALL[family].batch(rows=rows)
    batch["input_ids"][:, :3] = torch.tensor(ROWS)
    return batch


def rows_alone(model: Any, rows: Any = ROWS) -> gw.Adapter:
    """Trained rows moved away from their start, beside a LoRA that does nothing."""
    graft = gw.attach(model, LoRA(r=2, trainable_token_indices=rows))
    perturb((parameter for key, parameter in graft.named_parameters() if "token_adapter" in key), 7)
    return graft


@pytest.mark.parametrize("family", ALL)
def test_trained_rows_equal_base_with_replaced_rows(family: str) -> None:
    model, batch = ALL[family].build(), batch_of(family)
    oracle = copy.deepcopy(model)
    graft = rows_alone(model)
    (rows,) = [parameter for key, parameter in graft.named_parameters() if "token_adapter" in key]
    before = run(oracle, batch)
    with torch.no_grad():
        oracle.get_input_embeddings().weight[ROWS] = rows  # and with it whatever is tied
    assert not torch.allclose(run(oracle, batch), before, atol=1e-3)
    torch.testing.assert_close(run(model, batch), run(oracle, batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_merge_writes_token_rows_and_unmerge_is_bit_exact(tied: bool, tmp_path: Path) -> None:
    model, batch = llama(tied=tied), batch_of("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graft = rows_alone(model)
    rows = dict(graft.named_parameters())["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    expected = run(model, batch)
    graft.merge()
    assert torch.equal(model.model.embed_tokens.weight[ROWS], rows)
    assert torch.equal(model.lm_head.weight[ROWS], rows) == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(run(model, batch), expected)
    with gw.disabled(model):
        assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    model.save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(plain, batch), expected)
    graft.unmerge()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(run(model, batch), expected)
    graft.merge(keep_base=False)
    torch.testing.assert_close(run(model, batch), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_and_optimizer_state_are_for_the_rows_alone(tied: bool) -> None:
    model, batch = llama(tied=tied), batch_of("llama")
    graft = gw.attach(model, LoRA(r=2, trainable_token_indices=ROWS))
    optimizer = torch.optim.AdamW(graft.parameters())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert model.model.embed_tokens.weight.grad is None
    assert model.lm_head.weight.grad is None
    (rows,) = [parameter for key, parameter in graft.named_parameters() if "token_adapter" in key]
    assert rows.shape == (3, 16)
    assert rows.grad is not None
    assert bool((rows.grad != 0).all())
    assert max(state["exp_avg"].numel() for state in optimizer.state.values()) < model.config.vocab_size * 16


def test_rows_of_each_named_table_train_apart() -> None:
    model, batch = llama(tied=False), batch_of("llama")
    oracle = copy.deepcopy(model)
    graft = rows_alone(model, {"embed_tokens": ROWS, "lm_head": [5]})
    found = {key.partition(".token")[0]: one for key, one in graft.named_parameters() if "token_adapter" in key}
    with torch.no_grad():
        oracle.model.embed_tokens.weight[ROWS] = found["model.embed_tokens"]
        oracle.lm_head.weight[[5]] = found["lm_head"]
    torch.testing.assert_close(run(model, batch), run(oracle, batch))
    assert graft.num_parameters == graft.method.num_parameters(graft.targets)


def test_two_adapters_with_rows_switch_and_share_a_batch() -> None:
    model, batch = llama(tied=True), batch_of("llama")
    bare = run(model, batch)
    first = rows_alone(model)
    one = run(model, batch)
    second = gw.attach(model, LoRA(r=2, trainable_token_indices=[3, 9]), "b")
    perturb(second.parameters(), 11)
    two = run(model, batch)
    gw.activate(model, first.name)
    assert torch.equal(run(model, batch), one)
    gw.activate(model, rows=["b", None, first.name])
    mixed = run(model, batch)
    torch.testing.assert_close(mixed, torch.stack([two[0], bare[1], one[2]]))
    # Both at once apply one after the other: of the row that both have, the second's stands.
    gw.activate(model, [first.name, "b"])
    embedded = model.model.embed_tokens(torch.tensor([[3, 17]]))[0]
    assert torch.equal(embedded[0], dict(second.named_parameters())[KEY][0])
    assert torch.equal(embedded[1], dict(first.named_parameters())[KEY][2])
    second.delete()
    gw.activate(model, first.name)
    assert torch.equal(run(model, batch), one)


KEY = "model.embed_tokens.token_adapter.trainable_tokens_delta"


def test_new_tokens_train_alone() -> None:
    """The use: tokens are added, and their rows are all that changes in the table."""
    model = llama(tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(66)
    before = model.lm_head.weight.clone()
    graft = gw.attach(model, LoRA(r=2, trainable_token_indices=[64, 65]))
    ids = torch.tensor([[64, 5, 65, 6]])
    optimizer = torch.optim.SGD(graft.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    graft.merge()
    changed = (model.lm_head.weight != before).any(1).nonzero().flatten()
    assert changed.tolist() == [64, 65]


# -- what is refused ---------------------------------------------------------------------------------------------------


def deberta() -> Any:
    return tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SMALL, legacy=False))


def mobilebert() -> Any:
    return tf.MobileBertForMaskedLM(
        tf.MobileBertConfig(**SMALL, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16)
    )


def parametrized() -> Any:
    model = llama(tied=True)
    torch.nn.utils.parametrizations.weight_norm(model.model.embed_tokens)
    return model


def with_max_norm() -> Any:
    model = llama(tied=True)
    model.model.embed_tokens.max_norm = 1.0
    return model


def quantized() -> Any:
    model = llama(tied=False)
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(64, 16, dtype=torch.int8), False)
    return model


def of_images() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **sizes))


LISTED: dict[str, Any] = {"trainable_token_indices": ROWS}
CASES: list[tuple[Any, dict[str, Any], type[GraftwerkError], str]] = [
    (lambda: llama(tied=True), {"trainable_token_indices": [3, 64]}, ConfigError, "row 64 is out of range"),
    (lambda: llama(tied=True), {"trainable_token_indices": {"embed_token": [3]}}, ConfigError, "is no embedding"),
    (lambda: llama(tied=True), {"trainable_token_indices": {"lm_head": [3]}}, ConfigError, "shares its weights with"),
    (
        lambda: llama(tied=True),
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
        ConfigError,
        "shares its weights with",
    ),
    (
        lambda: llama(tied=True),
        {"trainable_token_indices": {"embed_tokens": [3], "model.embed_tokens": [4]}},
        ConfigError,
        "named twice",
    ),
    (lambda: llama(tied=True), {**LISTED, "modules_to_save": ["embed_tokens"]}, ConfigError, "is trained whole"),
    (lambda: llama(tied=True), {**LISTED, "modules_to_save": ["lm_head"]}, ConfigError, "is trained whole"),
    (lambda: llama(tied=True), {**LISTED, "target_modules": ["lm_head"]}, ConfigError, "adapted as a layer"),
    (
        lambda: ALL["opt"].build(),
        {"trainable_token_indices": {"embed_positions": [3]}},
        UnsupportedError,
        "OPTLearnedPositionalEmbedding computes something else",
    ),
    (deberta, LISTED, UnsupportedError, "DebertaV2LMPredictionHead reads its weight"),
    (mobilebert, LISTED, UnsupportedError, "MobileBertLMPredictionHead reads its weight"),
    (parametrized, LISTED, UnsupportedError, "computed from others"),
    (with_max_norm, LISTED, UnsupportedError, "max_norm"),
    (quantized, LISTED, UnsupportedError, "is quantized"),
    (of_images, LISTED, UnsupportedError, "no embedding of tokens"),
]


@pytest.mark.parametrize(("build", "settings", "kind", "words"), CASES)
def test_invalid_rows_raise_and_leave_the_model_as_it_was(
    build: Any, settings: dict[str, Any], kind: type[GraftwerkError], words: str
) -> None:
    model = build()
    classes = {path: type(module) for path, module in model.named_modules()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(kind, match=words) as caught:
        gw.attach(model, LoRA(r=2, **settings))
    assert caught.value.hint
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not gw.adapters(model)


def test_rows_cannot_differ_by_row_where_tokens_may_come_first() -> None:
    config = tf.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = tf.XLNetLMHeadModel(config).eval()
    gw.attach(model, LoRA(r=2, trainable_token_indices=ROWS))
    with pytest.raises(UnsupportedError, match="may have the tokens in its first dimension"):
        gw.activate(model, rows=["default", None])


def test_rows_of_positions_cannot_differ_by_row() -> None:
    model = ALL["bert"].build()
    gw.attach(model, LoRA(r=2, trainable_token_indices={"position_embeddings": [1]}))
    with pytest.raises(UnsupportedError, match="other numbers than a row's tokens"):
        gw.activate(model, rows=["default", None])


@pytest.mark.parametrize(("rows", "reason"), [(ROWS, "rows of an embedding are trained"), ({"lm_head": [3]}, None)])
def test_no_layer_is_frozen_below_trained_rows_of_the_input(rows: Any, reason: str | None) -> None:
    model = llama(tied=False)
    method = LoRA(r=2, layers="top-1", trainable_token_indices=rows)
    if reason is None:
        assert find_frozen_prefix(model, read_architecture(model), method, ()).skipped == 1
        return
    with pytest.raises(UnsupportedError, match=reason):
        find_frozen_prefix(model, read_architecture(model), method, ())
