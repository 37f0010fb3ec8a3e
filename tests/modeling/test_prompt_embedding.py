"""Virtual tokens at the input of every family: where they stand, what the outside sees, generation, PEFT's equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from graftwerk.errors import ConfigError, ConflictError, ModelError, UnsupportedError
from graftwerk.methods.base import Method
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.methods.prompt_tuning import Prompt
from graftwerk.methods.ptuning import PTuning
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.attach import activate, adapters, attach, detach, disabled
from tests.families import FAMILIES
from tests.modeling.soft import (
    CAUSAL,
    CLOSE,
    ENCODERS,
    SEQ2SEQ,
    expect_rows,
    generate,
    left_padded,
    logits,
    moved,
    one,
    perturb,
)

NETWORK = {"encoder_hidden_size": 5}
METHODS: dict[str, Method] = {
    "prompt": Prompt(num_virtual_tokens=3),
    "mlp": PTuning(num_virtual_tokens=3, **NETWORK),
    "lstm": PTuning(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", **NETWORK),
}
LONGER = Prompt(num_virtual_tokens=5)
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", METHODS)


def classifier_batch(family: str, **options: Any) -> dict[str, Tensor]:
    batch = FAMILIES[family].batch(**options)
    if FAMILIES[family].kind == "seq2seq":
        # These heads read the end token: one in each row.
        del batch["decoder_input_ids"]
        batch["input_ids"] = torch.where(batch["input_ids"] == 2, 3, batch["input_ids"])
        batch["input_ids"][:, 3] = 2
    return batch


# -- what is computed -------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("padded", [False, True])
def test_init_from_text_equals_text_in_front(family: str, padded: bool) -> None:
    """Through every way of embedding: scaled, projected, counted from the padding, sinusoidal, rotary, relative."""
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(padded=padded)
    text = torch.tensor([[5, 9, 33]]).expand(3, -1)
    front = {
        **batch,
        "input_ids": torch.cat((text, batch["input_ids"]), dim=1),
        "attention_mask": torch.cat((torch.ones_like(text), batch["attention_mask"]), dim=1),
    }
    expected = logits(model, front)
    attach(model, Prompt(num_virtual_tokens=3, init_token_ids=[5, 9, 33]))
    actual = logits(model, batch)
    if FAMILIES[family].kind != "seq2seq":
        real = batch["attention_mask"].bool()
        actual, expected = actual[real], expected[:, 3:][real]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*ENCODERS, *CAUSAL])
def test_init_from_text_on_classifier_equals_text_in_front(family: str) -> None:
    """Encoders pool the first virtual token then, and decoders their last real one."""
    model, batch = FAMILIES[family].build(classifier=True), FAMILIES[family].batch()
    text = torch.tensor([[5, 9, 33]]).expand(3, -1)
    front = {
        "input_ids": torch.cat((text, batch["input_ids"]), dim=1),
        "attention_mask": torch.cat((torch.ones_like(text), batch["attention_mask"]), dim=1),
    }
    expected = logits(model, front)
    attach(model, Prompt(num_virtual_tokens=3, init_token_ids=[5, 9, 33]))
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


@families
def test_rows_with_mixed_prompt_lengths_equal_single_rows(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(rows=4)
    base = logits(model, batch)
    moved(model, METHODS["lstm"], "a", 1)
    moved(model, LONGER, "b", 2)
    rows = ["a", "b", None, "b"]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(logits(model, one(batch, row)))
    activate(model, rows=rows)
    expect_rows(logits(model, batch), alone, batch)
    activate(model, rows=[None] * 4)
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].classifier])
def test_rows_on_classifier_equal_single_rows(family: str) -> None:
    model, batch = FAMILIES[family].build(classifier=True), classifier_batch(family, rows=4)
    moved(model, METHODS["prompt"], "a", 1)
    moved(model, LONGER, "b", 2)
    rows = ["a", "b", None, "b"]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(logits(model, one(batch, row)))
    activate(model, rows=rows)
    torch.testing.assert_close(logits(model, batch), torch.cat(alone), **CLOSE)


@families
def test_rows_without_mask_equal_single_rows(family: str) -> None:
    """A mask is made where rows differ in length, also for the decoder's look at its encoder."""
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(padded=False)
    moved(model, METHODS["prompt"], "a", 1)
    moved(model, LONGER, "b", 2)
    activate(model, rows=["a", "b", None])
    expected = logits(model, batch)
    torch.testing.assert_close(
        logits(model, {key: value for key, value in batch.items() if key != "attention_mask"}), expected, **CLOSE
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "llama", "gpt2", "opt"])
def test_caller_position_ids_and_embeddings_are_used(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    moved(model, METHODS["prompt"], "a", 1)
    moved(model, LONGER, "b", 2)
    activate(model, rows=["a", None, "b"])
    expected = logits(model, batch)
    first = 1 if family == "roberta" else 0
    positions = torch.arange(first, first + 7).expand(3, -1)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "position_ids": positions}
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, given)[real], expected[real], **CLOSE)


def test_token_types_and_positional_arguments_are_accepted() -> None:
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch(padded=False)
    moved(model, METHODS["prompt"], "a", 1)
    types = torch.ones_like(batch["input_ids"])
    typed = logits(model, {**batch, "token_type_ids": types})
    assert not torch.allclose(typed, logits(model, batch), atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"], types).logits, typed)
    # The virtual tokens are of the first type: the same as with all of it in front.
    embeds = model.get_input_embeddings()(batch["input_ids"])
    front = adapters(model)["a"].state_dict()["bert.prompt_embeddings"].expand(3, -1, -1)
    activate(model, None)
    wide = {
        "inputs_embeds": torch.cat((front, embeds), dim=1),
        "token_type_ids": torch.cat((torch.zeros(3, 3, dtype=torch.long), types), dim=1),
    }
    torch.testing.assert_close(logits(model, wide)[:, 3:], typed, **CLOSE)


# -- what the outside sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*ENCODERS, *CAUSAL])
def test_outputs_cover_text_positions_only(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(labels=True)
    moved(model, METHODS["prompt"], "a", 1)
    moved(model, LONGER, "b", 2)
    activate(model, rows=["a", None, "b"])
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        plain = model(**batch, return_dict=False)
    assert output.logits.shape == (3, 7, 64)
    assert torch.isfinite(output.loss)
    assert [state.shape[1] for state in output.hidden_states] == [7] * 3
    torch.testing.assert_close(plain[1], output.logits)


@families
@methods
def test_every_element_gets_gradient_with_checkpointing(method: str, family: str) -> None:
    """With enough virtual tokens: two units of a ReLU have to meet at one of them for a gradient on what joins them."""
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(labels=True)
    if family == "mistral":
        model.config.sliding_window = 64
    width = next(stack.width for stack in read_architecture(model).stacks if stack.kind != "decoder")
    settings = METHODS[method].model_copy(update={"num_virtual_tokens": 40, "encoder_hidden_size": None})
    torch.manual_seed(3)
    graft = attach(model, settings)
    assert graft.num_parameters == settings.num_vector_parameters(width)
    model.train()
    model(**batch).loss.backward()
    plain = {key: parameter.grad for key, parameter in graft.named_parameters()}
    for key, gradient in plain.items():
        assert (gradient != 0).all(), key
    for reentrant in (False, True) if method == "prompt" else ():
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch).loss.backward()
        for key, parameter in graft.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[key], atol=1e-6, rtol=1e-4)


def test_sliding_window_reaches_prompt_through_layers() -> None:
    """Two layers with windows of 4 see 6 virtual tokens before the text; what stands further back cannot be trained."""
    model, batch = FAMILIES["mistral"].build(), FAMILIES["mistral"].batch(labels=True)
    graft = attach(model, Prompt(num_virtual_tokens=8))
    model(**batch).loss.backward()
    values = next(graft.parameters())
    assert values.grad.ne(0).all(dim=1).tolist() == [False] * 2 + [True] * 6
    assert values.grad.ne(0).any(dim=1).tolist() == [False] * 2 + [True] * 6


def test_dead_units_alone_lack_gradient() -> None:
    """What no start can prevent later on: a unit that training has switched off for every virtual token."""
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch(labels=True)
    graft = attach(model, METHODS["mlp"])
    encoder = dict(graft.modules())["bert"]
    with torch.no_grad():
        encoder.mlp_head[2].bias[1] = -100
    model(**batch).loss.backward()
    assert (encoder.mlp_head[2].bias.grad != 0).tolist() == [True, False, True, True, True]
    assert encoder.mlp_head[2].weight.grad[1].eq(0).all()
    assert encoder.mlp_head[4].weight.grad[:, 1].eq(0).all()


@pytest.mark.parametrize("count", [1, 2, 20])
def test_no_unit_is_dead_at_start(count: int) -> None:
    for kind in ("MLP", "LSTM"):
        torch.manual_seed(count)
        method = PTuning(num_virtual_tokens=count, encoder_reparameterization_type=kind)
        encoder = method.build_prompt(torch.nn.Embedding(64, 16), 16)
        encoder.vectors().sum().backward()
        assert encoder.mlp_head[-1].bias.grad.ne(0).all()
        for layer in encoder.mlp_head[:-1]:
            if isinstance(layer, torch.nn.Linear):
                assert layer.bias.grad.ne(0).all()


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_left_padded_generation_equals_rows_alone(family: str) -> None:
    model, batch = FAMILIES[family].build(), left_padded(FAMILIES[family].batch())
    moved(model, METHODS["lstm"], "a", 1)
    moved(model, LONGER, "b", 2)
    for rows in (["a", "b", None], ["b", "b", "b"]):
        alone = []
        for row, name in enumerate(rows):
            activate(model, name)
            alone.append(generate(model, one(batch, row)))
        activate(model, rows=rows) if None in rows else activate(model, "b")
        tokens, scores = generate(model, batch)
        torch.testing.assert_close(scores, torch.cat([score for _, score in alone]), **CLOSE)
        assert torch.equal(tokens, torch.cat([token for token, _ in alone]))


def test_left_padding_without_position_ids_equals_rows_alone() -> None:
    """OPT counts positions by the mask, with virtual tokens as well as without."""
    model, batch = FAMILIES["opt"].build(), left_padded(FAMILIES["opt"].batch())
    moved(model, METHODS["prompt"], "a", 1)
    moved(model, LONGER, "b", 2)
    rows = ["a", "b", None]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(logits(model, one(batch, row)))
    activate(model, rows=rows)
    expect_rows(logits(model, batch), alone, batch)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("padded", [False, True])
def test_beams_of_mixed_rows_with_and_without_cache(family: str, padded: bool) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(padded=padded)
    batch = left_padded(batch) if family in CAUSAL else batch
    moved(model, METHODS["mlp"], "a", 1)
    moved(model, LONGER, "b", 2)
    activate(model, rows=["b", None, "a"])
    tokens, scores = generate(model, batch, num_beams=2)
    again, slow = generate(model, batch, num_beams=2, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, slow, **CLOSE)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_seq2seq_generation_equals_rows_alone(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    moved(model, METHODS["prompt"], "a", 1)
    moved(model, LONGER, "b", 2)
    rows = ["a", "b", None]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(generate(model, one(batch, row))[1])
    activate(model, rows=rows)
    torch.testing.assert_close(generate(model, batch)[1], torch.cat(alone), **CLOSE)


def test_left_padding_trains_to_finite_gradients() -> None:
    model, batch = FAMILIES["llama"].build(), left_padded(FAMILIES["llama"].batch(labels=True))
    graft = moved(model, METHODS["prompt"], "a", 1)
    moved(model, LONGER, "b", 2)
    activate(model, rows=["a", "b", None])
    model(**batch).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in graft.parameters())


def test_prompt_with_prefix_is_independent_of_attach_order() -> None:
    """The prefix stands before the virtual tokens, these before the text, at whatever time each was attached."""
    batch = left_padded(FAMILIES["gpt2"].batch())
    results = []
    for order in (("prefix", "prompt"), ("prompt", "prefix")):
        model = FAMILIES["gpt2"].build()
        for name in order:
            method = Prefix(num_virtual_tokens=2) if name == "prefix" else METHODS["prompt"]
            moved(model, method, name, 1 if name == "prefix" else 2)
        activate(model, ["prefix", "prompt"])
        results.append(generate(model, batch)[1])
        torch.testing.assert_close(generate(model, batch, use_cache=False)[1], results[-1], **CLOSE)
    torch.testing.assert_close(*results, **CLOSE)
    # From text, both together are the base with all that text in front.
    model = FAMILIES["gpt2"].build()
    batch = FAMILIES["gpt2"].batch(padded=False)
    text = torch.tensor([[5, 9, 33, 20, 21]]).expand(3, -1)
    expected = logits(model, {"input_ids": torch.cat((text, batch["input_ids"]), dim=1)})[:, 5:]
    attach(model, Prefix(num_virtual_tokens=2, init_token_ids=[5, 9]), name="prefix")
    attach(model, Prompt(num_virtual_tokens=3, init_token_ids=[33, 20, 21]), name="prompt")
    activate(model, ["prefix", "prompt"])
    # The embeddings of the prompt's text never saw the prefix; its keys and values are computed behind it.
    torch.testing.assert_close(logits(model, batch), expected, **CLOSE)


# -- start, and nothing left behind -----------------------------------------------------------------------------------


def test_init_random_uses_model_embeddings() -> None:
    for family in ("bert", "gemma", "mbart"):
        model = FAMILIES[family].build()
        graft = attach(model, LONGER)
        stack = model.get_submodule(next(iter(dict(graft.modules()))))
        words = stack.get_input_embeddings()(torch.arange(64))
        (start,) = graft.state_dict().values()
        assert all((words == row).all(dim=1).any() for row in start)


@methods
def test_merged_state_equals_stack_inputs(method: str) -> None:
    model, batch = FAMILIES["t5"].build(), FAMILIES["t5"].batch()
    graft = moved(model, METHODS[method], "a", 1)
    expected = logits(model, batch)
    ((path, module),) = graft.modules()
    bare = attach(model, PTuning(num_virtual_tokens=3, encoder_reparameterization_type="NONE"), name="bare")
    bare.load_state_dict({f"{path}.{key}": value for key, value in module.merged_state().items()})
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-6, rtol=1e-5)


@families
def test_detach_removes_everything(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    base = logits(model, batch)
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    moved(model, METHODS["prompt"], "a", 1)
    moved(model, METHODS["lstm"], "b", 1)
    with disabled(model):
        assert torch.equal(logits(model, batch), base)
    adapters(model)["a"].delete()
    assert not torch.allclose(logits(model, batch), base, atol=1e-4)
    detach(model)
    assert {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()} == hooks
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_deepcopy_is_independent(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    moved(model, METHODS["prompt"], "a", 1)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    perturb(adapters(twin)["a"].parameters(), 5)
    assert not torch.allclose(logits(twin, batch), expected, atol=1e-4)
    activate(twin, None)
    assert torch.equal(logits(model, batch), expected)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_static_cache_raises() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch()
    moved(model, METHODS["prompt"], "a", 1)
    with pytest.raises(UnsupportedError, match="static cache has no room"):
        generate(model, left_padded(batch), cache_implementation="static")
    activate(model, None)
    generate(model, left_padded(batch), cache_implementation="static")


@pytest.mark.parametrize("masked", [False, True])
def test_cache_of_other_adapters_raises(masked: bool) -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(padded=False)
    moved(model, METHODS["prompt"], "a", 1)
    with torch.no_grad():
        activate(model, None)
        cache = model(**batch, use_cache=True).past_key_values
        activate(model, "a")
        extra = {"attention_mask": torch.ones(3, 8)} if masked else {"position_ids": torch.tensor([[7]])}
        with pytest.raises(ConflictError, match="the cache holds 7 positions"):
            model(input_ids=batch["input_ids"][:, :1], past_key_values=cache, **extra)


def test_generation_from_used_cache_raises() -> None:
    """`generate` would cut as many tokens off the new text as there are virtual ones in the cache."""
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(padded=False)
    moved(model, METHODS["prompt"], "a", 1)
    first = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, torch.full((3, 6), 9)), dim=1)
    with pytest.raises(ConflictError, match="begin with an empty cache"):
        model.generate(
            input_ids=longer,
            attention_mask=torch.ones_like(longer),
            past_key_values=first.past_key_values,
            max_new_tokens=3,
            do_sample=False,
        )


def test_unsupported_masks_and_rows_raise() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(padded=False)
    moved(model, METHODS["prompt"], "a", 1)
    ids = batch["input_ids"]
    with pytest.raises(UnsupportedError, match="one number for each token"):
        logits(model, {"input_ids": ids, "attention_mask": torch.ones(3, 1, 7, 7)})
    with pytest.raises(ConfigError, match="attention_mask has 10 columns for 7 tokens"):
        logits(model, {"input_ids": ids, "attention_mask": torch.ones(3, 10)})
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
    with pytest.raises(UnsupportedError, match="packed into one row"):
        logits(model, {"input_ids": ids, "position_ids": packed})
    gpt2 = FAMILIES["gpt2"].build()
    attach(gpt2, METHODS["prompt"])
    with pytest.raises(UnsupportedError, match="no token type"):
        logits(gpt2, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})


@pytest.mark.parametrize(("family", "room"), [("bert", 64), ("roberta", 63), ("bart", 64), ("opt", 64)])
def test_forward_text_beyond_positions_raises(family: str, room: int) -> None:
    model = FAMILIES[family].build()
    attach(model, METHODS["prompt"])
    logits(model, FAMILIES[family].batch(tokens=room - 3, padded=False))
    with pytest.raises(ModelError, match=f"3 virtual tokens are more than the {room} positions"):
        logits(model, FAMILIES[family].batch(tokens=room - 2, padded=False))


# -- against PEFT -----------------------------------------------------------------------------------------------------


def _peft(model: Any, graft: Any, config: Any) -> Any:
    """The same values in PEFT, on a model of its own."""
    import peft

    wrapped = peft.get_peft_model(model, config)
    ((_, module),) = ((path, m) for path, m in graft.modules() if hasattr(m, "vectors"))
    theirs = wrapped.prompt_encoder["default"]
    with torch.no_grad():
        if config.peft_type == "PROMPT_TUNING":
            theirs.embedding.weight[: module.n] = module.vectors()
        else:
            theirs.load_state_dict(module.state_dict())
    return wrapped.eval()


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "SEQ_CLS") for family in ("bert", "roberta", "distilbert", "modernbert", "electra")),
        *((family, "CAUSAL_LM") for family in ("gpt2", "opt", "llama", "gemma")),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_2_SEQ_LM"),
    ],
)
def test_outputs_equal_peft(family: str, task: str) -> None:
    peft = pytest.importorskip("peft")
    kind = FAMILIES[family]
    base, batch = kind.build(classifier=task == "SEQ_CLS"), kind.batch()
    configs = {
        "prompt": peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        "mlp": peft.PromptEncoderConfig(
            task_type=task, num_virtual_tokens=3, encoder_hidden_size=5, num_transformer_submodules=1
        ),
        "lstm": peft.PromptEncoderConfig(
            task_type=task,
            num_virtual_tokens=3,
            encoder_hidden_size=5,
            num_transformer_submodules=1,
            encoder_reparameterization_type="LSTM",
            encoder_num_layers=2,
        ),
    }
    for method, config in configs.items():
        config.num_attention_heads = 4
        config.token_dim = next(stack.width for stack in read_architecture(base).stacks if stack.kind != "decoder")
        model = copy.deepcopy(base)
        graft = attach(model, METHODS[method].model_copy(update={"modules_to_save": ()}))
        wrapped = _peft(copy.deepcopy(base), graft, config)
        expected, actual = logits(wrapped, batch), logits(model, batch)
        if task == "CAUSAL_LM":
            real = batch["attention_mask"].bool()
            expected, actual = expected[:, 3:][real], actual[real]
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_greedy_generation_equals_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    base = FAMILIES[family].build()
    batch = {key: value for key, value in FAMILIES[family].batch(padded=False).items() if not key.startswith("dec")}
    model = copy.deepcopy(base)
    graft = moved(model, METHODS["prompt"], "a", 1)
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    wrapped = _peft(base, graft, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **options), wrapped.generate(**batch, **options))


def test_mean_pooling_equals_peft() -> None:
    """The published ModernBERTs pool the mean, over the virtual tokens too."""
    peft = pytest.importorskip("peft")
    config = FAMILIES["modernbert"].config()
    config.classifier_pooling = "mean"
    torch.manual_seed(0)
    base, batch = tf.ModernBertForSequenceClassification(config).eval(), FAMILIES["modernbert"].batch()
    model = copy.deepcopy(base)
    graft = attach(model, METHODS["prompt"].model_copy(update={"modules_to_save": ()}), name="a")
    wrapped = _peft(base, graft, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    torch.testing.assert_close(logits(model, batch), logits(wrapped, batch), **CLOSE)
    moved(model, LONGER, "b", 2)
    rows = ["a", None, "b"]
    alone = []
    for row, name in enumerate(rows):
        activate(model, name)
        alone.append(logits(model, one(batch, row)))
    activate(model, rows=rows)
    torch.testing.assert_close(logits(model, batch), torch.cat(alone), **CLOSE)
    without = {"input_ids": batch["input_ids"]}
    ones = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["attention_mask"])}
    torch.testing.assert_close(logits(model, without), logits(model, ones), **CLOSE)
