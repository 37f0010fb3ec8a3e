"""`graftwerk chat` through a pipe and in a terminal: turns, commands, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.cli.chat import _answering, _terminal
from graftwerk.errors import RunInterrupted
from graftwerk.evaluation.chat import AnswerStopped
from graftwerk.training.signals import StopSignals
from tests.cli.commands import Run, Said
from tests.evaluation.test_chat import adapter_of

Talk = Callable[..., Said]


@pytest.fixture(scope="module")
def adapter(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of("instruction", tiny_decoder, tmp_path_factory.mktemp("chat") / "adapter")


@pytest.fixture
def talk(graftwerk: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    def run(lines: str, *options: object, target: Path = adapter) -> Said:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return graftwerk("chat", target, "--max-new-tokens", 5, *options)

    return run


def test_chat_pipe_answers_a_turn_a_line(talk: Talk) -> None:
    said = talk("a large bird\n\na kind of bread\n")
    assert said.code == 0, said.err
    first, second = said.out.splitlines()
    assert first
    assert second
    assert "1 empty lines were left out" in said.err
    found = talk("a large bird\na kind of bread\n", "--json").json["predictions"]
    assert [turn["text"] for turn in found] == ["a large bird", "a kind of bread"]
    assert [turn["output"] for turn in found] == [first, second]
    # The second turn knows the first, and an answer is that of `predict` otherwise.
    assert talk("a kind of bread\n").out.strip() != second


def test_chat_commands_reset_base_exit_and_help(talk: Talk) -> None:
    said = talk("a large bird\n/base\n/reset\na large bird\n/base\n/nothing\n//reset\n/help\n/exit\nnever\n", "--json")
    assert said.code == 0, said.err
    turns = said.json["predictions"]
    assert [turn["text"] for turn in turns] == ["a large bird", "a large bird", "/reset"]
    assert turns[0] == turns[1]  # the conversation began anew, and the base answered both
    assert turns[0]["base"] != turns[0]["output"]
    assert "base" not in turns[2]
    assert "answers of the base: on" in said.err
    assert "there is no command /nothing" in said.err
    assert "/reset  forget the conversation" in said.err
    shown = talk("/base\na large bird\n").out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["adapter", "base"]


def test_chat_settings_are_checked_and_used(talk: Talk) -> None:
    lines = "a large bird\n"
    sampled = [talk(lines, "--temperature", 1.5, "--top-k", 80, "--seed", seed).out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    said = talk(lines, "--seed", 1)
    assert said.code == 2
    assert "`seed` does nothing without sampling" in said.err
    said = talk(lines, "--top-p", 1.5)
    assert said.code == 2
    assert "top_p" in said.err


def test_chat_task_that_does_not_write_exits_4(talk: Talk, tiny_decoder: Path, tmp_path: Path) -> None:
    said = talk("a\n", target=adapter_of("causal", tiny_decoder, tmp_path / "causal"))
    assert said.code == 0, said.err
    assert "the model has no chat template" in said.err
    folder = adapter_of("classification", tiny_decoder, tmp_path / "classes")
    said = talk("a\n", target=folder)
    assert said.code == 4
    assert "there is no chat with an adapter for classification" in said.err
    assert "graftwerk predict RUN" in said.err


def test_answering_first_interrupt_ends_the_answer_and_the_second_the_command() -> None:
    with StopSignals().installed():
        with _answering(True) as passed:
            assert passed("piece") == "piece"
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(AnswerStopped):
                passed("piece")
        with _answering(True) as passed:
            assert passed("another answer") == "another answer"
    for interactive, signals in ((True, 2), (False, 1)):
        with pytest.raises(RunInterrupted):
            interrupt(interactive, signals)


def interrupt(interactive: bool, signals: int) -> None:
    with StopSignals().installed(), _answering(interactive):
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)


def test_terminal_ends_with_the_end_of_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["one", "two"])

    def given(prompt: str) -> Any:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", given)
    assert list(_terminal()) == ["one", "two"]
    assert capsys.readouterr().out == "\n"
