"""A loss from what the head reads equals the loss of the logits; models that are not understood keep theirs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from graftwerk.kernels import flags as fast
from graftwerk.kernels import lm_head as before_head
from graftwerk.kernels.lm_head import LabelledLogits, labelled_tokens
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.attach import attach
from graftwerk.tasks.base import Example
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.text import IGNORED
from tests.families import FAMILIES, GATED

TOKENIZER = SimpleNamespace(pad_token_id=0)
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
SEQ2SEQ = [name for name, family in FAMILIES.items() if family.kind == "seq2seq"]
ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "encoder"]


def task_for(model: Any) -> Any:
    if model.config.is_encoder_decoder:
        return Summarization().for_model(model.config)
    return Causal() if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__ else Masked()


def rows(lengths: tuple[int, ...] = (9, 3, 6, 12), labelled: bool = True, seed: int = 0) -> list[Example]:
    """Rows whose second half is trained."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        target = [IGNORED] * (length // 2) + ids[length // 2 :] if labelled else [IGNORED] * length
        examples.append(Example({"input_ids": ids}, target))
    return examples


def learn(model: Any, batch: dict[str, Any], smoothing: float = 0.0) -> tuple[Any, float, dict[str, torch.Tensor], Any]:
    task = task_for(getattr(model, "module", model))
    model.zero_grad()
    outputs = task.objective.forward(model, batch)
    loss = task.objective.loss(outputs, batch, smoothing)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.inference_mode():
        told = task.objective.per_row_outputs(task.objective.forward(model, batch), batch)
    return outputs, float(loss.detach()), gradients, told


def compare(model: Any, batch: dict[str, Any], smoothing: float = 0.0, understood: bool = True) -> None:
    with fast.plain():
        plain, right, gradients, likelihoods = learn(model, batch, smoothing)
    assert not isinstance(plain, LabelledLogits)
    for _ in range(2):  # the first pass is the one that tries
        outputs, loss, found, told = learn(model, batch, smoothing)
        assert isinstance(outputs, LabelledLogits) == understood
        assert loss == pytest.approx(right, abs=1e-6)
        assert torch.allclose(told, likelihoods, atol=1e-5)
        assert {name for name in found if bool(found[name].any())} == {
            name for name in gradients if bool(gradients[name].any())
        }
        for name, gradient in found.items():
            assert torch.allclose(gradient, gradients[name], atol=1e-5, rtol=1e-4), name


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwerk.kernels.chunked_cross_entropy.LEAST_WORDS", 24)  # of 64


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ, *ENCODERS])
def test_labelled_tokens_loss_equals_model_loss(family: str, method: str, smoothing: float) -> None:
    model = FAMILIES[family].build()
    settings: dict[str, Any] = {"name": method} | ({"num_virtual_tokens": 3} if method == "prefix" else {})
    attach(model, parse_method(settings))
    model.train()
    batch = task_for(model).collator.collate(rows(), TOKENIZER)
    compare(model, batch, smoothing)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_labelled_tokens_with_prompts_and_checkpointing_equals_model_loss(family: str) -> None:
    model = FAMILIES[family].build()
    attach(model, parse_method({"name": "prompt", "num_virtual_tokens": 3}))
    batch = task_for(model).collator.collate(rows(), TOKENIZER)
    compare(model.train(), batch)
    model = FAMILIES[family].build()
    attach(model, parse_method("lora"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(model.train(), batch)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_labelled_tokens_rows_with_few_labels_equal_model_loss(family: str) -> None:
    model = FAMILIES[family].build()
    attach(model, parse_method("lora"))
    nothing = task_for(model).collator.collate(rows(labelled=False), TOKENIZER)
    compare(model.train(), nothing)
    one = rows((7,), labelled=False)
    one[0].target[3] = one[0].inputs["input_ids"][3]
    compare(model, task_for(model).collator.collate(one, TOKENIZER))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tied_head_gets_both_gradients(family: str, tied: bool) -> None:
    config = FAMILIES[family].config()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = getattr(tf, FAMILIES[family].lm)(config)
    for key in list(vars(config)):
        if "dropout" in key:
            setattr(config, key, 0.0)
    model.eval()
    compare(model, task_for(model).collator.collate(rows(), TOKENIZER))


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def test_head_cap_scale_and_bias_are_recognised() -> None:
    batch = Causal().collator.collate(rows(), TOKENIZER)
    capped = built(tf.Gemma2Config(**GATED, final_logit_softcapping=2.0))
    with torch.no_grad():
        capped.lm_head.weight.mul_(50)  # or no logit comes near the cap
    scaled = built(tf.CohereConfig(**{k: v for k, v in GATED.items() if k != "head_dim"}, logit_scale=0.25))
    divided = built(tf.GraniteConfig(**{k: v for k, v in GATED.items() if k != "head_dim"}, logits_scaling=8.0))
    for model in (capped, scaled, divided):
        compare(model, batch)
    shapes = [vars(model.get_output_embeddings())[before_head._FOUND] for model in (capped, scaled, divided)]
    assert shapes == [(1.0, 2.0, False), (0.25, None, False), (0.125, None, False)]
    model = FAMILIES["bart"].build()
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    compare(model, task_for(model).collator.collate(rows(), TOKENIZER))
    assert vars(model.get_output_embeddings())[before_head._FOUND] == (1.0, None, True)


def test_head_cap_far_from_logits_is_recognised() -> None:
    small = built(tf.Gemma2Config(**GATED, final_logit_softcapping=30.0))
    compare(small, Causal().collator.collate(rows(), TOKENIZER))
    assert vars(small.get_output_embeddings())[before_head._FOUND] == (1.0, 30.0, False)


class Odd(tf.LlamaForCausalLM):
    """A model that does with its logits what none of the known ones does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + 0.1 * outputs.logits.sin()
        return outputs


class Strict(tf.LlamaForCausalLM):
    """A model that does not bear logits of another shape."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if "logits_to_keep" not in kwargs:
            outputs.logits = outputs.logits.view(*input_ids.shape, -1)
        return outputs


@pytest.mark.parametrize("kind", [Odd, Strict])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_unknown_head_returns_none(kind: Any, dropout: float) -> None:
    torch.manual_seed(0)
    model = kind(tf.LlamaConfig(**GATED, attention_dropout=dropout, initializer_range=0.3)).train()
    attach(model, parse_method({"name": "lora", "lora_dropout": dropout}))
    batch = Causal().collator.collate(rows(), TOKENIZER)
    torch.manual_seed(1)
    with fast.plain():
        _, right, *_ = learn(model, batch)
    torch.manual_seed(1)
    outputs, loss, *_ = learn(model, batch)
    assert not isinstance(outputs, LabelledLogits)
    assert loss == right  # to the last bit: the attempt left the generator as it was
    assert vars(model.get_output_embeddings())[before_head._FOUND] is None


class Doubled(nn.Linear):
    """A head with something attached to it, in the way of a graft."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * 2


def test_adapted_or_hooked_head_returns_none() -> None:
    batch = Causal().collator.collate(rows(), TOKENIZER)
    adapted = FAMILIES["llama"].build()
    adapted.lm_head.__class__ = Doubled
    compare(adapted, batch, understood=False)
    hooked = FAMILIES["llama"].build()
    hooked.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    compare(hooked, batch, understood=False)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        watched = FAMILIES["llama"].build()
        getattr(watched.lm_head, register)(lambda *args: None)  # would see two tokens of all
        compare(watched, batch, understood=False)
    other = FAMILIES["llama"].build()
    other.lm_head.forward = lambda hidden: nn.functional.linear(hidden, other.lm_head.weight) * 2
    compare(other, batch, understood=False)


def test_zero_head_is_probed_again() -> None:
    model = built(tf.Gemma2Config(**GATED, final_logit_softcapping=2.0))
    weight = model.lm_head.weight.detach().clone()
    batch = Causal().collator.collate(rows(), TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    compare(model, batch, understood=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight * 50)
    compare(model, batch)


def test_errors_of_forward_are_raised() -> None:
    model = FAMILIES["llama"].build()
    batch = Causal().collator.collate(rows(), TOKENIZER)
    Causal().objective.forward(model, batch)
    with pytest.raises(IndexError):
        Causal().objective.forward(model, batch | {"input_ids": batch["input_ids"] + 1000})


def test_hook_is_removed_after_forward() -> None:
    model = FAMILIES["llama"].build()
    batch = Causal().collator.collate(rows(), TOKENIZER)
    outputs = Causal().objective.forward(model, batch)
    assert not model.lm_head._forward_pre_hooks
    assert outputs.logits.shape == (int(Causal().objective.num_targets(batch)), 64)
    with fast.plain():
        plain = Causal().objective.forward(model, batch)
    assert torch.allclose(outputs.logits, plain.logits, atol=1e-6)
    mask = torch.ones_like(batch["labels"], dtype=torch.bool)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    places = mask.flatten().nonzero()[:, 0]
    labelled = labelled_tokens(model, inputs, mask.shape, places)
    assert labelled is not None
    assert labelled.hidden.shape == (batch["labels"].numel(), 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_labelled_tokens_under_autocast_equals_model_loss(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"].build()
    attach(model, parse_method("lora"))
    batch = Causal().collator.collate(rows(), TOKENIZER)
    with torch.autocast("cpu", dtype):
        with fast.plain():
            _, right, *_ = learn(model, batch)
        outputs, loss, *_ = learn(model, batch)
    assert isinstance(outputs, LabelledLogits)
    assert loss == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize(
    "family",
    ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "t5", pytest.param("mbart", marks=pytest.mark.slow)],
)
def test_fifty_steps_equal_plain(family: str, dropout: float) -> None:
    losses: list[list[float]] = []
    for plain in (True, False):
        model = FAMILIES[family].build()
        graft = attach(model, parse_method({"name": "lora", "lora_dropout": dropout}))
        model.train()
        optimizer = torch.optim.AdamW(graft.parameters(), lr=3e-3)
        task = task_for(model)
        torch.manual_seed(0)
        losses.append([])
        for step in range(50):
            batch = task.collator.collate(rows(seed=step % 5), TOKENIZER)
            with fast.plain() if plain else torch.enable_grad():
                loss = task.objective.loss(task.objective.forward(model, batch), batch, 0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][0] - losses[0][-1] > 0.02
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
