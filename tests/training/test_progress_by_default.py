"""`train`, `evaluate`, `predict_file` and `compare` in Python: who watches is told, wherever they watch from."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk import display
from graftwerk.display import shown_rows
from graftwerk.evaluation.evaluate import evaluate
from graftwerk.evaluation.predict_file import predict_file
from graftwerk.training.timing import Clock
from graftwerk.training.train import train

Build = Callable[..., dict[str, Any]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_train_shows_lines_by_default_and_nothing_when_quiet(
    run_file: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    train(run_file(), output_dir=str(tmp_path / "shown"))
    shown = capsys.readouterr()
    assert shown.out == ""
    for words in ("reading the data ...", "loading the model ...", " parameters (", "validation accuracy", "step "):
        assert words in shown.err
    with caplog.at_level(logging.WARNING, logger="graftwerk"):
        run = train(run_file(), output_dir=str(tmp_path / "quiet"), quiet=True)
    assert capsys.readouterr() == ("", "")
    train(run_file(), output_dir=str(tmp_path / "heard"), listener=lambda event: None)
    assert capsys.readouterr() == ("", ""), "a listener is told in place of the display"
    evaluate(run, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_train_on_terminal_draws_bar(run_file: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    train(run_file(), output_dir=str(tmp_path / "run"))
    assert "━" in stream.getvalue()


def test_long_evaluation_and_prediction_show_rows(
    run_file: Build, tmp_path: Path, glosses: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "SHORT", 0.0)
    run = train(run_file(), output_dir=str(tmp_path / "run"), quiet=True)
    evaluate(run)
    assert "evaluating " in capsys.readouterr().err
    predict_file(run, glosses, tmp_path / "answers.jsonl")
    assert "predicting 240/240" in capsys.readouterr().err
    predict_file(run, glosses, tmp_path / "answers.jsonl", overwrite=True, quiet=True)
    assert capsys.readouterr().err == ""


def test_shown_rows_given_function_is_told_instead(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int | None]] = []
    with shown_rows("evaluating", lambda *rows: told.append(rows), quiet=False) as report:
        report(4, 4)
    assert told == [(4, 4)]
    assert capsys.readouterr().err == ""


def test_clock_slow_first_step_is_left_out_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("graftwerk.training.timing.time.monotonic", lambda: now[0])
    clock = Clock()
    paces = []
    for took in (30.0, 1.0, 3.0, 2.0):
        now[0] += took
        clock.step()
        paces.append(clock.step_seconds)
    assert paces == [0.0, 1.0, 2.0, 2.0]


def test_train_first_time_left_is_near_the_truth(run_file: Build, tmp_path: Path) -> None:
    """The first step, of which no pace is known, says no time; the second counts the evaluations to come."""
    left: list[float | None] = []

    def listener(event: Any) -> None:
        if event.kind == "step":
            left.append(event.values["left_seconds"])

    train(run_file(logging_steps=1), output_dir=str(tmp_path / "run"), listener=listener)
    assert left[0] is None
    assert all(seconds is not None for seconds in left[1:])
    assert left[-1] == 0
