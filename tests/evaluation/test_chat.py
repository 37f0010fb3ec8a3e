"""Conversations with adapters that write: what the model is asked, what is streamed, what the base says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import graftwerk as gw
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation.chat import AnswerStopped, Chat, open_chat
from graftwerk.evaluation.evaluate import predict

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}question {{ m.content }} {% else %}answer {{ m.content }} </s> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)
SHORT = {"max_new_tokens": 6}


def adapter_of(task: str, base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter folder whose answers differ from the base's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    graft = gw.attach(model, gw.LoRA(r=4))
    for parameter in graft.parameters():
        parameter.data.normal_(std=0.3)
    metadata = {"model": str(base), "task": task, "task_settings": {"name": task, **settings}}
    return Path(gw.save(graft, folder, metadata=metadata))


@pytest.fixture(scope="module")
def instructed(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of("instruction", tiny_decoder, tmp_path_factory.mktemp("chat") / "adapter")


@pytest.fixture
def chat(instructed: Path) -> Chat:
    return open_chat(instructed, settings=SHORT)


def asked(chat: Chat, text: str) -> bool:
    """Return True if the last prompt holds a text, token for token."""
    assert chat._last is not None
    assert chat._last.prompt is not None
    ids = chat._loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = chat._last.prompt
    return any(prompt[start : start + len(ids)] == ids for start in range(len(prompt)))


def test_chat_first_answer_is_that_of_predict(chat: Chat, instructed: Path) -> None:
    pieces: list[str] = []
    answer = chat.ask("a large bird", pieces.append)
    assert answer == predict(instructed, "a large bird", evaluation=SHORT)["predictions"][0]["output"]
    assert answer
    assert "".join(pieces).strip() == answer
    assert len([piece for piece in pieces if piece]) > 1  # as it is written
    assert chat.style == "conversation"


def test_chat_second_turn_holds_the_first_until_reset(instructed: Path) -> None:
    chat = open_chat(instructed, settings={"max_new_tokens": 3})
    first = chat.ask("of")
    chat.ask("bird")
    assert all(asked(chat, text) for text in ("of", first, "bird"))
    assert not chat.notes
    assert chat.history[0] == ("of", first)
    assert [text for text, _ in chat.history] == ["of", "bird"]
    chat.reset()
    again = chat.ask("bird")
    assert not asked(chat, first)
    assert chat.history == [("bird", again)]


def test_chat_base_answers_without_the_adapter_and_leaves_the_conversation(
    chat: Chat, tiny_decoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="nothing was asked yet"):
        chat.ask_base()
    own = chat.ask("a large bird")
    pieces: list[str] = []
    base = chat.ask_base(pieces.append)
    assert base != own
    assert "".join(pieces).strip() == base
    assert chat.history == [("a large bird", own)]
    untrained = tmp_path / "untrained"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    metadata = {"model": str(tiny_decoder), "task": "instruction"}
    gw.save(gw.attach(model, gw.LoRA(r=4)), untrained, metadata=metadata)  # B is zero
    assert open_chat(untrained, settings=SHORT).ask("a large bird") == base
    assert chat.ask("a large bird") != base  # the adapter is on again


def test_chat_sampled_answers_follow_from_the_seed(instructed: Path) -> None:
    def answers(seed: int) -> list[str]:
        chat = open_chat(instructed, settings={**SHORT, "temperature": 1.5, "top_k": 50, "seed": seed})
        return [chat.ask("a large bird"), chat.ask("more")]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_chat_stopped_answer_counts_as_far_as_it_got(chat: Chat) -> None:
    pieces: list[str] = []

    def write(piece: str) -> None:
        if len("".join(pieces).split()) >= 2:
            raise AnswerStopped
        pieces.append(piece)

    whole = open_chat_answer(chat)
    chat.reset()
    stopped = chat.ask("a large bird", write)
    assert whole.startswith(stopped.strip())
    assert 0 < len(stopped) < len(whole)
    assert chat.history == [("a large bird", stopped)]
    assert chat.ask("and now")  # it goes on


def open_chat_answer(chat: Chat) -> str:
    return chat.ask("a large bird")


def test_chat_beams_are_written_at_once_and_so_are_answers_that_a_text_ends(
    instructed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    answer = open_chat(instructed, settings={**SHORT, "num_beams": 2}).ask("a large bird", pieces.append)
    assert pieces == [answer]
    given: list[Any] = []

    def generated(*args: Any, streamer: Any, **options: Any) -> list[list[str]]:
        given.append(streamer)
        return [["an answer"]]

    monkeypatch.setattr("graftwerk.evaluation.chat.generate_all", generated)
    open_chat(instructed, settings={**SHORT, "stop": "###"}).ask("a large bird", pieces.append)
    assert pieces[1:] == ["an answer"]
    assert given == [None]


def test_chat_conversation_longer_than_the_model_is_cut_and_said(chat: Chat) -> None:
    chat.ask("a large bird " * 40)
    assert any("tokens of the conversation do not fit into" in note for note in chat.notes)
    assert chat.history[0][1]  # half of the positions are left for the answer
    chat.reset()
    chat.ask("a large bird")
    assert not chat.notes


def test_chat_causal_without_template_goes_on_with_the_text(tiny_decoder: Path, tmp_path: Path) -> None:
    chat = open_chat(adapter_of("causal", tiny_decoder, tmp_path / "adapter"), settings=SHORT)
    assert chat.style == "continuation"
    tokenizer = chat._loaded.tokenizer
    first = chat.ask("a bird")
    assert chat._last is not None
    assert chat._last.prompt == tokenizer("a bird", add_special_tokens=False)["input_ids"]
    chat.ask("of it")
    assert chat._last.prompt == tokenizer(f"a bird{first}\nof it", add_special_tokens=False)["input_ids"]
    chat.ask("bird " * 70)
    assert chat.notes
    whole = tokenizer("bird " * 70, add_special_tokens=False)["input_ids"]
    assert chat._last.prompt == whole[-len(chat._last.prompt or ()) :]


def test_chat_causal_with_template_takes_it(tiny_decoder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(tiny_decoder, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    chat = open_chat(adapter_of("causal", base, tmp_path / "adapter"), settings=SHORT)
    assert chat.style == "conversation"
    chat.ask("large bird")
    tokenizer = chat._loaded.tokenizer
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "large bird"}], add_generation_prompt=True, return_dict=False
    )
    assert chat._last is not None
    assert chat._last.prompt == expected


@pytest.mark.parametrize("task", ["classification", "masked", "regression", "similarity", "token-classification"])
def test_open_chat_task_that_does_not_write_is_refused_before_its_model_is_loaded(
    task: str, instructed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from graftwerk.evaluation import chat as module

    monkeypatch.setattr(module, "load_adapter_for", lambda *args, **options: pytest.fail("the model was loaded"))
    folder = tmp_path / "adapter"
    shutil.copytree(instructed, folder)
    own = json.loads((folder / "graftwerk.json").read_text())
    own = {key: value for key, value in own.items() if key != "digest"} | {
        "task": task,
        "task_settings": {"name": task},
    }
    (folder / "graftwerk.json").write_text(json.dumps(own))
    with pytest.raises(UnsupportedError, match=f"there is no chat with an adapter for {task}: it writes no text"):
        open_chat(folder)


def test_chat_prompt_of_several_columns_and_odd_settings_raise(
    instructed: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    several = adapter_of(
        "instruction", tiny_decoder, tmp_path / "adapter", prompt="{premise} and {hypothesis}", answer="{label}"
    )
    with pytest.raises(ConfigError, match="made from several columns"):
        open_chat(several)
    with pytest.raises(ConfigError, match="`top_p` does nothing"):
        open_chat(instructed, settings={"temperature": 0, "top_p": 0.5})
    with pytest.raises(ConfigError, match="max_new_tokens"):
        open_chat(instructed, settings={"max_new_tokens": 0})
