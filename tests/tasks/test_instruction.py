"""Instruction tuning: which tokens are trained, for every format; templates that do not fit or do harm."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, DataError, IntegrityError, ModelError, UnsupportedError
from graftwerk.models.load import load_config, load_tokenizer
from graftwerk.tasks.base import Example, Splits
from graftwerk.tasks.chat import _fitting, encode_conversations, end_ids
from graftwerk.tasks.example_checks import check_examples
from graftwerk.tasks.instruction import Instruction
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.template import ModelTemplate, Rendered, template_for
from graftwerk.tasks.text import IGNORED

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHER_BEGINNING = CHATML.replace("{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|bot|>' }}{% endif %}")
TURNS = [["user", "a short high fly ball"], ["assistant", "act"], ["user", "fruit"], ["assistant", "food"]]


@pytest.fixture(scope="session")
def tokenizer(tiny_decoder: Path) -> Any:
    """No chat template, no pad token of its own: padding is the end token."""
    return load_tokenizer(str(tiny_decoder))


@pytest.fixture(scope="session")
def chat_tokenizer(tiny_decoder: Path) -> Any:
    tokenizer = load_tokenizer(str(tiny_decoder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def with_template(tiny_decoder: Path, template: str) -> Any:
    tokenizer = load_tokenizer(str(tiny_decoder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer: Any, example: Example) -> list[str]:
    """The runs of trained tokens, decoded."""
    runs: list[list[int]] = [[]]
    for label in example.target:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [said(tokenizer, run) for run in runs if run]


def said(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids)).replace(" ##", "")


def read(path: Path, rows: list[Any], task: Instruction | None = None, **settings: Any) -> Splits:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return (task or Instruction()).read(DataSettings(train=str(path), validation=None, **settings))


def encode(tokenizer: Any, splits: Splits, task: Instruction | None = None, max_length: int = 200) -> list[Example]:
    return (task or Instruction()).encode(splits.train, tokenizer, splits, max_length)


SAME = {"turns": [["user", "what is it ?\n\na ball"], ["assistant", "act"]]}
FORMATS = {
    "instruction": {"instruction": "what is it ?", "input": "a ball", "output": "act"},
    "prompt-completion": {"prompt": "what is it ?\n\na ball", "completion": "act"},
    "chat": {
        "messages": [{"role": "user", "content": "what is it ?\n\na ball"}, {"role": "assistant", "content": "act"}]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "what is it ?\n\na ball"}, {"from": "gpt", "value": "act"}]
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_read_every_format_gives_same_turns_and_trained_tokens(
    name: str, tmp_path: Path, tokenizer: Any, chat_tokenizer: Any
) -> None:
    splits = read(tmp_path / "rows.jsonl", [FORMATS[name]])
    assert splits.train == [SAME]
    (plain,) = encode(tokenizer, splits)
    assert trained(tokenizer, plain) == ["act </s>"]
    # The small vocabulary has no marks: each of "###", ":" and "?" is one or more unknown tokens.
    asked = "[UNK] [UNK] [UNK] instruction [UNK] what is it [UNK] a ball [UNK] [UNK] [UNK] response [UNK]"
    assert said(tokenizer, plain.inputs["input_ids"]) == f"{asked} act </s>"
    assert said(tokenizer, plain.prompt or []) == asked
    (chat,) = encode(chat_tokenizer, splits)
    assert trained(chat_tokenizer, chat) == ["act <|im_end|>"]
    assert said(chat_tokenizer, chat.inputs["input_ids"]) == (
        "<|im_start|> user what is it [UNK] a ball <|im_end|> <|im_start|> assistant act <|im_end|>"
    )
    assert chat.prompt == chat.inputs["input_ids"][: len(chat.prompt or ())]
    assert said(chat_tokenizer, chat.prompt or []).endswith("<|im_start|> assistant")
    assert plain.notes == chat.notes == ()


def test_encode_trains_every_assistant_turn_alone(tokenizer: Any, chat_tokenizer: Any) -> None:
    rows = [{"turns": [["system", "be brief"], *TURNS]}]
    task = Instruction()
    (plain,) = task.encode(rows, tokenizer, None, 200)  # type: ignore[arg-type]
    (chat,) = task.encode(rows, chat_tokenizer, None, 200)  # type: ignore[arg-type]
    assert trained(tokenizer, plain) == ["act </s>", "food </s>"]
    assert trained(chat_tokenizer, chat) == ["act <|im_end|>", "food <|im_end|>"]
    assert task.decoder.reference(chat) == "food"
    assert said(chat_tokenizer, chat.prompt or []).endswith("fruit <|im_end|> <|im_start|> assistant")


def test_collate_trains_eos_where_pad_token_is_eos(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    task = Instruction().for_model(load_config_of_llama())
    examples = task.encode([{"turns": TURNS[:2]}, {"turns": TURNS}], tokenizer, None, 200)  # type: ignore[arg-type]
    batch = task.collator.collate(examples, tokenizer)
    short = examples[0].length
    assert batch["labels"][0, short - 1] == tokenizer.eos_token_id
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (examples[1].length - short)
    assert (batch["labels"][0, short:] == IGNORED).all()


def load_config_of_llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig()


def test_template_render_equals_transformers(chat_tokenizer: Any) -> None:
    messages = [{"role": role, "content": content} for role, content in TURNS]
    template = template_for(chat_tokenizer)
    assert template.render([TURNS])[0].text == chat_tokenizer.apply_chat_template(messages, tokenize=False)
    asked = chat_tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert template.render([TURNS[:3]], asked=True)[0].text == asked


def test_encode_adds_system_message_to_rows_without_one(chat_tokenizer: Any) -> None:
    task = Instruction(system="be brief")
    rows = [{"turns": TURNS[:2]}, {"turns": [["system", "be long"], *TURNS[:2]]}]
    texts = [
        said(chat_tokenizer, example.inputs["input_ids"]) for example in task.encode(rows, chat_tokenizer, None, 99)
    ]  # type: ignore[arg-type]
    assert texts[0].startswith("<|im_start|> system be brief <|im_end|>")
    assert texts[1].startswith("<|im_start|> system be long <|im_end|>")


# templates


def test_template_for_copied_tokenizer_renders_equally(chat_tokenizer: Any) -> None:
    template = template_for(chat_tokenizer, "chat")
    turns = [[("user", "a"), ("assistant", "b")]]
    expected = template.render(turns)
    for copied in (copy.deepcopy(chat_tokenizer), pickle.loads(pickle.dumps(chat_tokenizer))):
        again = template_for(copied, "chat")
        assert again is not template
        assert again.render(turns) == expected


def test_encode_template_that_rewrites_earlier_answers_raises(tiny_decoder: Path) -> None:
    tokenizer = with_template(tiny_decoder, FORGETS)
    with pytest.raises(DataError, match="writes assistant turn 1 otherwise once more turns follow"):
        Instruction().encode([{"turns": TURNS}], tokenizer, None, 200)  # type: ignore[arg-type]
    (example,) = Instruction().encode([{"turns": TURNS[:2]}], tokenizer, None, 200)  # type: ignore[arg-type]
    assert trained(tokenizer, example) == ["act <|im_end|>"]


def test_encode_template_with_other_generation_prompt_raises(tiny_decoder: Path) -> None:
    with pytest.raises(DataError, match="is not how it writes answers"):
        Instruction().encode([{"turns": TURNS}], with_template(tiny_decoder, OTHER_BEGINNING), None, 200)  # type: ignore[arg-type]


def test_encode_template_exception_is_quoted(tiny_decoder: Path) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    tokenizer = with_template(tiny_decoder, no_system)
    with pytest.raises(DataError, match="no system here"):
        Instruction(system="be brief").encode([{"turns": TURNS}], tokenizer, None, 200)  # type: ignore[arg-type]


def test_check_examples_answers_without_end_are_severe(tiny_decoder: Path) -> None:
    tokenizer = with_template(tiny_decoder, NO_END)
    examples = Instruction().encode([{"turns": TURNS}, {"turns": TURNS[:2]}], tokenizer, None, 200)  # type: ignore[arg-type]
    (finding,) = [it for it in check_examples("train", examples, lambda at: f"rows:{at}") if it.code == "end-untrained"]
    assert (finding.rows, finding.grave, finding.example) == (2, True, "rows:0")
    assert trained(tokenizer, examples[1]) == ["act"]


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "product": "{{ 'x' * 10**11 }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "replaced": "{% set x = 'a' * 99999 %}{{ x | replace('a', x) | length }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "power": "{{ 9**(9**9) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_template_bomb_ends_only_its_process(name: str) -> None:
    template = ModelTemplate(BOMBS[name], {})
    try:
        (rendered,) = template.render([TURNS])
    except (IntegrityError, ModelError):
        return
    assert rendered.unfit


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum(1) }}",
        "{% if %}",
        "x" * 200_000,
    ],
)
def test_template_forbidden_operation_is_refused(source: str) -> None:
    try:
        (rendered,) = ModelTemplate(source, {}).render([TURNS])
    except ModelError:
        return
    assert rendered.unfit or rendered.text == ""


def test_template_render_supports_common_jinja() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ ns.n }}{{ bos_token }}{{ strftime_now('%Y') }}"
    )
    template = ModelTemplate(source, {"bos_token": "<s>"})
    (rendered,) = template.render([[["system", "x"], ["user", "ä"]]], asked=True)
    assert rendered.text == '{"role": "user", "content": "ä"}1<s>2025'


def test_end_ids_include_end_of_turn_token(tokenizer: Any, chat_tokenizer: Any) -> None:
    assert end_ids(template_for(tokenizer), tokenizer) == [tokenizer.eos_token_id]
    ends = [chat_tokenizer.eos_token_id, chat_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert end_ids(template_for(chat_tokenizer), chat_tokenizer) == sorted(ends)


def test_template_for_selects_chat_or_plain(tokenizer: Any, chat_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        template_for(tokenizer, "chat")
    assert template_for(chat_tokenizer, "plain").name == "plain"
    assert template_for(chat_tokenizer).name == "chat"


def test_instruction_for_model_encoder_decoder_raises() -> None:
    from transformers import T5Config

    with pytest.raises(UnsupportedError, match="causal"):
        Instruction().for_model(T5Config())


# lengths


def test_encode_conversations_truncates_question_not_answer(chat_tokenizer: Any) -> None:
    long = [["user", "ball " * 100], *TURNS[1:]]
    (whole,) = encode_conversations([long], template_for(chat_tokenizer), chat_tokenizer, 10_000)
    (cut,) = encode_conversations([long], template_for(chat_tokenizer), chat_tokenizer, 60)
    assert len(cut.ids) == 60
    assert cut.truncated == len(whole.ids) - 60
    assert cut.trained == whole.trained
    assert cut.ids[-20:] == whole.ids[-20:]
    assert cut.ids[:3] == whole.ids[:3]
    assert cut.prompt == cut.ids[: len(cut.prompt)]


def test_check_examples_masked_labels_are_severe(chat_tokenizer: Any) -> None:
    rows = [{"turns": [["user", "a"], ["assistant", "ball " * 50]]}, {"turns": [["system", "fly " * 50], *TURNS[:2]]}]
    examples = Instruction().encode(rows, chat_tokenizer, None, 30)  # type: ignore[arg-type]
    assert [example.length for example in examples] == [30, 30]
    assert all(example.truncated > 0 for example in examples)
    (finding,) = check_examples("train", examples)
    assert (finding.code, finding.rows, finding.grave) == ("labels-all-masked", 1, True)


def test_check_examples_chat_tokens_in_text_are_reported(chat_tokenizer: Any) -> None:
    rows = [{"turns": [["user", "say <|im_end|>"], ["assistant", "no"]]}]
    (finding,) = check_examples("train", Instruction().encode(rows, chat_tokenizer, None, 99))  # type: ignore[arg-type]
    assert (finding.code, finding.grave) == ("special-token-in-text", False)


# rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 that has the unknown role 'tool'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn is the assistant's"),
        ({"messages": [*FORMATS["chat"]["messages"], {"role": "user", "content": "x"}]}, "last turn is the user's"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "user", "content": 3}]}, "is the number 3"),
        ({"messages": "hello"}, "is no list of messages"),
        ({"messages": [{"role": "user"}]}, "has no `content`"),
        ({"messages": []}, "has no messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "calls a tool"),
        ({"messages": [*FORMATS["chat"]["messages"], {"role": "system", "content": "x"}]}, "only the first can be"),
    ],
)
def test_read_bad_conversation_raises_with_line(row: Any, said: str, tmp_path: Path) -> None:
    rows = [FORMATS["chat"], row]
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows.jsonl", rows)
    assert "rows.jsonl:2" in str(caught.value.where)
    assert said in str(caught.value.where)
    splits = read(tmp_path / "rows.jsonl", rows, on_bad_row="skip")
    assert splits.train == [SAME]
    assert [finding.rows for finding in splits.issues if finding.code == "rows-skipped"] == [1]


def test_read_ambiguous_format_raises(tmp_path: Path) -> None:
    both = {**FORMATS["chat"], "prompt": "p", "completion": "c"}
    with pytest.raises(ConfigError, match="several formats: chat, prompt-completion"):
        read(tmp_path / "rows.jsonl", [both])
    assert read(tmp_path / "rows.jsonl", [both], format="prompt-completion").train == [
        {"turns": [["user", "p"], ["assistant", "c"]]}
    ]
    assert read(tmp_path / "rows.jsonl", [both], format="chat").train == [SAME]


def test_read_unknown_format_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format"):
        read(tmp_path / "rows.jsonl", [{"text": "plain"}])
    with pytest.raises(ConfigError, match="no format"):
        read(tmp_path / "rows.jsonl", [FORMATS["chat"]], format="instruction")
    task = Instruction(prompt="{a}", answer="{b}")
    with pytest.raises(ConfigError, match="no format of this task"):
        read(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}], task, format="chat")


def test_read_missing_or_empty_input_is_accepted(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "input": "", "output": "x"},
        {"instruction": "b", "output": "x"},
        {"instruction": "c", "input": None, "output": "x"},
        {"instruction": "d", "input": "e", "output": "x"},
    ]
    turns = [row["turns"][0][1] for row in read(tmp_path / "rows.jsonl", rows).train]
    assert turns == ["a", "b", "c", "d\n\ne"]


def test_instruction_prompt_and_answer_templates_make_turns(glosses: Path) -> None:
    task = parse_task({"name": "instruction", "prompt": "Which kind of thing is this? {text}", "answer": "{label}"})
    assert isinstance(task, Instruction)
    splits = task.read(DataSettings(train=str(glosses), validation=0.1))
    first = splits.train[0]["turns"]
    assert first[0][1].startswith("Which kind of thing is this? seizing property")
    assert first[1] == ["assistant", "noun.act"]
    assert task.example_from_text("a ball") == {"turns": [["user", "Which kind of thing is this? a ball"]]}
    with pytest.raises(ConfigError, match="several columns"):
        Instruction(prompt="{a} {b}", answer="{c}").example_from_text("x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "no column"}, "names no column"),
        ({"prompt": "{a.b}"}, "is no column"),
        ({"prompt": "{a!r}"}, "is no column"),
        ({"prompt": "{}"}, "is no column"),
        ({"answer": "{label}"}, "does nothing without `prompt`"),
        ({"promt": "{a}"}, "did you mean `prompt`"),
    ],
)
def test_parse_task_invalid_instruction_settings_raise(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        parse_task({"name": "instruction", **settings})


def test_instruction_for_model_decoder_is_causal(tiny_decoder: Path) -> None:
    assert Instruction().for_model(load_config(str(tiny_decoder))).layout == "causal"


def test_encode_template_with_default_system_message_trains_answers_alone(tiny_decoder: Path) -> None:
    """As SmolLM2's does: only where the first message is none, so every prefix of a conversation begins with it."""
    own = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nbe a short ball<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(tiny_decoder, own)
    (example,) = Instruction().encode([{"turns": TURNS}], tokenizer, None, 200)  # type: ignore[arg-type]
    assert trained(tokenizer, example) == ["act <|im_end|>", "food <|im_end|>"]
    assert said(tokenizer, example.inputs["input_ids"]).startswith("<|im_start|> system be a short ball <|im_end|>")


CHAT_ROW = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}


@pytest.mark.parametrize(
    "row",
    [CHAT_ROW, {"instruction": "q", "output": "x"}, {"prompt": "q", "completion": "x"}],
    ids=["chat", "instruction", "prompt-completion"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_read_system_column_opens_conversation(row: Any, streaming: bool, tmp_path: Path) -> None:
    rows = [{**row, "system": "be rude"}, {**row, "system": None}]
    splits = read(tmp_path / "rows.jsonl", rows, streaming=streaming)
    turns = [["user", "q"], ["assistant", "x"]]
    assert [one["turns"] for one in splits.train] == [[["system", "be rude"], *turns], turns]
    assert "unused-columns" not in {finding.code for finding in splits.issues}


def test_read_system_column_contradicting_system_message_raises(tmp_path: Path) -> None:
    said = [{"from": "system", "value": "be kind"}, *CHAT_ROW["conversations"]]
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows.jsonl", [{"conversations": said, "system": "be rude"}])
    assert "has a `system` that differs" in str(caught.value.where)
    (row,) = read(tmp_path / "rows.jsonl", [{"conversations": said, "system": "be kind"}]).train
    assert [role for role, _ in row["turns"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize("streaming", [False, True])
def test_read_unused_columns_are_counted_by_name(streaming: bool, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "weight": 0, "name": None}]
    rows = [{"messages": messages, "id": at, "history": [["a", "b"]] if at else []} for at in range(3)]
    splits = read(tmp_path / "rows.jsonl", rows, streaming=streaming)
    (finding,) = [finding for finding in splits.issues if finding.code == "unused-columns"]
    for name, count in (("id", 3), ("history", 2), ("messages[].weight", 3)):
        assert f"`{name}` ({count} rows)" in finding.message
    assert "name`" not in finding.message
    assert finding.rows == 3


def test_encode_added_special_token_in_text_is_noted(tiny_decoder: Path) -> None:
    """Tokens with a role that no attribute of the tokenizer names: added as special, or a mark of the template."""
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(str(tiny_decoder))
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=False), "covid"])
    tokenizer.chat_template = CHATML
    for said, found in (("say <|im_end|>", True), ("say <|im_start|> now", True), ("covid", False)):
        rows = [{"turns": [["user", said], ["assistant", "no"]]}]
        for template in ("auto", "plain"):
            (example,) = Instruction(template=template).encode(rows, tokenizer, None, 99)  # type: ignore[arg-type]
            assert ("special-token-in-text" in example.notes) is found


def test_fitting_keeps_one_token_of_each_user_turn() -> None:
    turns = [("user", "abcdef"), ("assistant", "x")]
    rendered = Rendered("abcdefx", ((6, 7),))
    offsets = [(at, at + 1) for at in range(7)]
    assert _fitting(turns, rendered, offsets, 3) == ([0, 1, 6], 4)
    assert _fitting(turns, rendered, offsets, 2) == ([0, 6], 5)
    assert _fitting(turns, rendered, offsets, 1) == ([0], 6)  # the answer's end is lost before the question is


def test_template_longer_than_the_limit_is_refused() -> None:
    from graftwerk.tasks.template_worker import MAX_TEMPLATE, Refused, compile_template

    assert compile_template("x" * MAX_TEMPLATE).render() == "x" * MAX_TEMPLATE
    with pytest.raises(Refused, match="131,073 characters"):
        compile_template("x" * (MAX_TEMPLATE + 1))
