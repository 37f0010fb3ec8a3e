"""What a person sees of a run: lines where nothing can be redrawn, a bar on a terminal, silence once nobody listens."""

from __future__ import annotations

import io
from typing import Any

import pytest

from graftwerk import display as room
from graftwerk.training.events import Event
from graftwerk.training.progress_display import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


PLAN: dict[str, Any] = {
    "total_steps": 375,
    "steps_per_epoch": 125,
    "rows_per_step": 16,
    "method": "lora",
    "learning_rate": 1e-3,
    "device": "cpu",
    "compute_type": "float32",
    "model_dtype": "float32",
    "processes": 1,
    "parameters": {"trained": 338_690, "head": 770, "total": 22_713_986, "share": 0.0149},
}


def told(*events: Event, stream: io.StringIO | None = None, quiet: bool = False) -> str:
    stream = stream or io.StringIO()
    with Progress(quiet=quiet, stream=stream) as progress:
        for event in events:
            progress(event)
    return stream.getvalue()


def test_progress_start_prints_cost() -> None:
    said = told(Event("phase", 0, name="loading the model"), Event("start", 0, **PLAN))
    assert said.startswith("loading the model ...\n")
    for words in ("338,690 of 22.7 M parameters", "1.5 %", "375 steps of 16 rows", "125 an epoch", "0.001", "cpu"):
        assert words in said
    assert "leaves out" not in said


def test_progress_start_names_skipped_layers() -> None:
    text = "6 of 14 weight matrices, which are no linear layers to adapt: 2 x experts.down_proj"
    assert f"\nleaves out {text}\n" in told(Event("start", 0, **PLAN, left_out=[text]))


def test_progress_without_terminal_prints_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for step in range(1, 13):
            progress(Event("progress", step, total=12, loss=0.5, left_seconds=12.0 - step))
            now[0] += 1
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 1/12  loss 0.500  11 s left",
        "step 6/12  loss 0.500  6 s left",
        "step 11/12  loss 0.500  1 s left",
        "step 12/12  loss 0.500",
    ]


def test_rows_prints_after_two_seconds_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with room.Rows("predicting", stream=stream) as rows:
        for done, at in ((0, 0.0), (1, 0.5), (2, 1.9), (10, 10.0), (11, 11.0), (20, 20.0), (40, 40.0)):
            now[0] = at
            rows(done, 40)
    assert stream.getvalue().splitlines() == [
        "predicting 10/40  30 s left",
        "predicting 20/40  20 s left",
        "predicting 40/40",
    ]


def test_rows_count_the_time_left_from_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with room.Rows("predicting", stream=stream) as rows:
        for done, at in ((500, 60.0), (510, 70.0), (1000, 560.0)):  # a model was loaded, and 500 rows were there
            now[0] = at
            rows(done, 1000)
        rows(3, None)
        now[0] += 6
        rows(4, None)
    assert stream.getvalue().splitlines() == [
        "predicting 500/1000",
        "predicting 510/1000  8 min 10 s left",
        "predicting 1000/1000",
        "predicting 4",
    ]


def test_progress_on_terminal_draws_bar() -> None:
    said = told(
        Event("progress", 3, total=12, loss=0.25, left_seconds=125.0),
        Event("evaluation", 3, accuracy=0.75, loss=0.6, best=True, seconds=4.0),
        stream=Terminal(),
    )
    assert "3/12" in said
    assert "0.250" in said
    assert "2 min 05 s left" in said
    assert "step 3: validation accuracy 0.750, loss 0.600 (the best so far)" in said


def test_progress_quiet_still_prints_problems_with_hint() -> None:
    events = [
        Event("progress", 70, total=100, loss=0.7, left_seconds=1.0),
        Event("diagnosis", 70, code="no_learning", text="nothing is learnt", hint="training.learning_rate=auto"),
        Event(
            "finding", 0, code="leakage", message="3 rows leak", rows=3, example="'x'", hint="remove them", grave=True
        ),
        Event("warning", 0, text="the log is full"),
    ]
    said = told(*events, quiet=True)
    assert said == (
        "step 70: diagnosis: nothing is learnt\n  hint: training.learning_rate=auto\n"
        "finding: 3 rows leak\n  for instance: 'x'\n  hint: remove them\n"
        "warning: the log is full\n"
    )
    assert "step 70/100" in told(*events)


def test_progress_broken_pipe_silences_output() -> None:
    class Broken(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Broken()
    with Progress(stream=stream) as progress:
        for step in range(1, 5):
            progress(Event("evaluation", step, accuracy=0.5))
    assert stream.writes == 1


def test_progress_escapes_control_characters() -> None:
    assert "\x1b" not in told(Event("finding", 0, message="class '\x1b[2J'", rows=1, example="\x07"))
