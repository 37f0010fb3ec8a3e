"""Summarization: prefixes by family, templates of causal models, what is cut of a document that is too long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from graftwerk.errors import ConfigError, DataError, GraftwerkError, IntegrityError, ModelError, UnsupportedError
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.text import IGNORED
from tests.families import FAMILIES
from tests.tiny_text import SYNOPSES, rows_of

ROWS = rows_of(SYNOPSES)[:6]


def test_summarization_chat_on_encoder_decoder_raises(text_model: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="encoder-decoder") as caught:
        Summarization(chat=False).for_model(AutoConfig.from_pretrained(text_model("bart")))
    assert caught.value.where == "task.chat"


def on(folder: Path, **settings: Any) -> tuple[Summarization, Any]:
    task = Summarization(**settings).for_model(AutoConfig.from_pretrained(folder))
    return task, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "settings", "prefix"),
    [
        ("t5", {}, "summarize: "), ("bart", {}, ""), ("mbart50", {}, ""),
        ("t5", {"prefix": ""}, ""), ("bart", {"prefix": "tl;dr "}, "tl;dr "),
    ],
)  # fmt: skip
def test_encode_prefix_and_labels_equal_tokenizer(
    family: str, settings: dict[str, str], prefix: str, text_model: Callable[[str], Path]
) -> None:
    task, tokenizer = on(text_model(family), **settings)
    assert task.to_dict()["prefix"] == prefix, "the manifest has to say what was read"
    examples = task.encode(ROWS, tokenizer, None, 2000)
    golden = tokenizer([prefix + row["document"] for row in ROWS], text_target=[row["summary"] for row in ROWS])
    assert [example.inputs["input_ids"] for example in examples] == golden["input_ids"]
    assert [example.target for example in examples] == golden["labels"]
    assert [task.decoder.reference(example) for example in examples] == [row["summary"] for row in ROWS]
    assert [task.decoder.source(example) for example in examples] == [row["document"] for row in ROWS]


def test_encode_uses_chat_template_unless_disabled(text_model: Callable[[str], Path]) -> None:
    row = {"document": "It prints.", "summary": "A printer"}
    task, tokenizer = on(text_model("llama"), template="Sum: {document}")
    example = task.encode([row], tokenizer, None, 100)[0]
    assert tokenizer.decode(example.inputs["input_ids"]) == "<s>u:Sum: It prints.</s><s>a:A printer</s>"
    assert tokenizer.decode(example.prompt) == "<s>u:Sum: It prints.</s><s>a:"
    assert tokenizer.decode([token for token in example.target if token != IGNORED]) == "A printer</s>"
    plain, _ = on(text_model("llama"), template="Sum: {document}\n", chat=False)
    example = plain.encode([row], tokenizer, None, 100)[0]
    assert tokenizer.decode(example.inputs["input_ids"]) == "Sum: It prints.\nA printer</s>"


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_encode_answer_ends_with_end_token_of_chat_template(text_model: Callable[[str], Path]) -> None:
    """Its end token is not the tokenizer's: it is learnt, what follows it is not, and it ends what is generated."""
    task, tokenizer = on(text_model("llama"), template="Sum: {document}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = CHATML
    row = {"document": " It prints. ", "summary": "A printer"}
    example = task.encode([row], tokenizer, None, 100)[0]
    assert tokenizer.decode(example.prompt) == "<|user|>\nSum:  It prints.<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(example.inputs["input_ids"][len(example.prompt) :]) == "A printer<|end|>\n"
    assert tokenizer.decode([token for token in example.target if token != IGNORED]) == "A printer<|end|>"
    assert task.encode([task.example_from_text(" It prints. ")], tokenizer, None, 100)[0].prompt == example.prompt
    ends = task.generation.options(None, tokenizer, example)["eos_token_id"]
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}


@pytest.mark.parametrize(
    ("template", "error", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", IntegrityError, "half a se"),
        ("{{ 'a' * 99999999999 }}", DataError, "memory"),
        ("{{ ''.__class__.__mro__ }}", DataError, "does not take"),
        ("{{ raise_exception('no users here') }}", DataError, "no users here"),
        ("{% for", ModelError, "is not a template"),
    ],
)
def test_encode_hostile_chat_template_raises_with_hint(
    template: str, error: type[GraftwerkError], said: str, text_model: Callable[[str], Path]
) -> None:
    """It is code from outside, so it runs in a process with limits; the error says how to do without it."""
    task, tokenizer = on(text_model("llama"))
    tokenizer.chat_template = template

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("rendered in this process")

    tokenizer.apply_chat_template = refuse
    with pytest.raises(error, match=said) as caught:
        task.encode(ROWS, tokenizer, None, 128)
    assert "task.chat=false" in str(caught.value.hint)
    plain, tokenizer = on(text_model("llama"), chat=False)
    tokenizer.chat_template = template
    assert len(plain.encode(ROWS, tokenizer, None, 128)) == len(ROWS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_encode_truncates_document_not_template_or_answer(family: str, text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model(family), template="<< {document} >>\n")
    for row in ROWS:
        whole = task.encode([row], tokenizer, None, 5000)[0]
        cut = task.encode([row], tokenizer, None, 100)[0]
        assert whole.truncated == 0
        assert cut.truncated >= whole.length - 100 > 0
        assert 90 <= cut.length <= 100, "room is left unused"
        text = tokenizer.decode(cut.prompt)
        before, after = tokenizer.decode(whole.prompt).split(row["document"])
        assert text.startswith(before)
        assert text.endswith(after)
        assert row["document"].startswith(text[len(before) : -len(after)].rstrip("\ufffd"))
        assert [t for t in cut.target if t != IGNORED] == [t for t in whole.target if t != IGNORED]


def test_encode_long_answer_is_truncated_and_counted(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("gpt2"), template="{document}\n")
    row = {"document": "short", "summary": "word " * 100}
    example = task.encode([row], tokenizer, None, 60)[0]
    answer = tokenizer(row["summary"])["input_ids"]
    assert example.length == 60
    assert example.truncated == len(answer) + 1 - (60 - len(example.prompt))
    assert tokenizer.decode(example.prompt) == "short\n"


def test_encode_without_summary_leaves_room_for_answer(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("gpt2"))
    example = task.encode([task.example_from_text(ROWS[0]["document"])], tokenizer, None, 100)[0]
    assert example.target is None
    assert 60 <= len(example.prompt) <= 75


def test_encode_template_without_room_raises(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("gpt2"), template="very long " * 20 + "{document}")
    with pytest.raises(ConfigError, match="the template alone takes"):
        task.encode(ROWS, tokenizer, None, 64)


def test_summarization_causal_loss_equals_model_loss(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("llama"))
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(text_model("llama")).eval()
    batch = task.collator.collate(task.encode(ROWS, tokenizer, None, 128), tokenizer)
    own = float(task.objective.loss(task.objective.forward(model, batch), batch))
    assert own == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_summarization_for_model_encoder_raises() -> None:
    with pytest.raises(UnsupportedError, match="needs a causal or encoder-decoder model"):
        Summarization().for_model(FAMILIES["bert"].config())
