"""The result as text, and the progress of a comparison, on terminals and in pipes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from graftwerk.experiments.progress import ComparisonDisplay, ProgressEvent
from graftwerk.experiments.table import as_text, rich_table


@pytest.fixture
def result() -> dict[str, Any]:
    def method(name: str, value: float, parameters: int) -> dict[str, Any]:
        cost = {
            "trained_parameters": parameters,
            "adapter_bytes": 4 * parameters,
            "training_seconds": 61.2,
            "peak_memory_bytes": 512_300_000,
            "latency_ms_batch_1": 4.123,
            "latency_ms_batch_32": None,
        }
        figure = {"value": value, "low": value - 0.03, "high": value + 0.03}
        spread = 0.007 if name == "full" else 0.012
        return {
            "name": name,
            "figure": figure,
            "cost": cost,
            "failed": {},
            "mergeable": name != "full",
            "seed_spread": spread,
        }

    prompt = {"name": "prompt", "figure": None, "cost": {}, "failed": {"0": "the loss is not finite"}}
    return {
        "metric": "accuracy",
        "confidence": 0.95,
        "seeds": [0, 1, 2],
        "rows": 500,
        "split": "test",
        "methods": [
            method("bitfit", 0.754, 20_000),
            method("full", 0.792, 22_700_000),
            method("lora", 0.788, 338_690),
            prompt,
        ],
        "differences": [
            {"a": "bitfit", "b": "full", "value": -0.038, "low": -0.06, "high": -0.01, "p": 0.01},
            {"a": "bitfit", "b": "lora", "value": -0.034, "low": -0.05, "high": -0.01, "p": 0.02},
            {"a": "full", "b": "lora", "value": 0.004, "low": -0.02, "high": 0.028, "p": 0.9},
        ],
        "resolution": 0.024,
        "seed_spread": 0.0081,
        "recommendation": {"method": "lora", "reason": "it is cheap"},
        "notes": ["something to know"],
    }


def test_plain_lists_methods_and_notes(result: dict[str, Any]) -> None:
    text = as_text(result)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["full", "lora", "bitfit"]
    assert lines[2].split("  ")[0] == "full"
    assert "the best mean" in lines[2]
    assert "22.7 M" in lines[2]
    assert lines[3].startswith("lora *")
    assert "no difference shown (−0.4)" in lines[3]
    assert "worse by 3.8 [1.0, 6.0]" in lines[4]
    assert lines[0].index("SD of seeds") < lines[2].index(" 0.7 ") < lines[0].index("trained")
    assert "78.8" in lines[3]
    assert "75.8–81.8" in lines[3]
    assert "512 MB" in lines[3]
    assert len({line.index("worse") if "worse" in line else line.index("no diff") for line in lines[3:5]}) == 1, (
        "columns"
    )
    for said in (
        "accuracy in percent on 500 test rows, mean of 3 seeds",
        "under about 2.4 points",
        "Seeds of one method differ with a standard deviation of 0.8 points, pooled",
        "lora and bitfit can be merged into the base",
        "* Recommended: lora: it is cheap.",
        "prompt, seed 0, failed: the loss is not finite",
        "Note: something to know.",
    ):
        assert said in text
    assert "\x1b" not in text


def test_plain_one_seed_calls_nothing_worse(result: dict[str, Any]) -> None:
    for one in (*result["methods"], *result["differences"]):
        one.update({"seed_spread": None} if "name" in one else {"over_seeds": False})
    text = as_text({**result, "seeds": [0], "seed_spread": None})
    assert "lower by 3.8 [1.0, 6.0], one seed" in text
    assert "worse" not in text
    assert "SD of seeds" not in text


def test_rich_table_highlights_and_escapes_markup(result: dict[str, Any]) -> None:
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, width=150).print(rich_table(result))
    text = stream.getvalue()
    assert "\x1b[1m" in text, "the recommended method stands out"
    assert "no difference shown" in text
    hostile = {**result, "notes": ["[red]not markup[/red]"]}
    plainly = io.StringIO()
    Console(file=plainly, width=150).print(rich_table(hostile))
    assert "[red]not markup[/red]" in plainly.getvalue()


def test_plain_without_results_lists_failures(result: dict[str, Any]) -> None:
    empty = {**result, "methods": result["methods"][3:], "differences": [], "recommendation": None, "resolution": None}
    assert "failed: the loss is not finite" in as_text(empty)


def test_plain_equal_answers_show_no_resolution(result: dict[str, Any]) -> None:
    assert "differences under about 2.4 points cannot be detected" in as_text(result)
    alike = as_text({**result, "resolution": 0.0})
    assert "under about" not in alike
    assert "the same answers on every row" in alike


class Pipe(io.StringIO):
    def isatty(self) -> bool:
        return False


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    from graftwerk import display

    monkeypatch.setattr(display, "EVERY_SECONDS", 0.0)
    shown = ComparisonDisplay(stream=stream)
    for moment in (
        ProgressEvent("phase", 0, 6, text="checking rows and methods"),
        ProgressEvent("phase", 0, 6, "lora, seed 0", "loading the model"),
        ProgressEvent("step", 0, 6, "lora, seed 0", "", 30, 120, 432.0),
        ProgressEvent("note", 0, 6, "lora, seed 0", "the loss [is] not finite"),
        ProgressEvent("run", 1, 6, "lora, seed 0", "accuracy 78.8 (75.0 to 82.0)", left_seconds=300.0),
        ProgressEvent("end", 6, 6, text="done"),
    ):
        shown(moment)
    shown.close_bar()
    return stream.getvalue()


def test_display_in_pipe_prints_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(Pipe(), monkeypatch).splitlines() == [
        "[0/6] checking rows and methods",
        "[0/6] lora, seed 0: step 30/120, 7 min 12 s left",
        "[0/6] lora, seed 0: the loss [is] not finite",
        "[1/6] lora, seed 0: accuracy 78.8 (75.0 to 82.0), 5 min 00 s left",
        "[6/6] done",
    ]


def test_display_on_terminal_updates_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    text = told(Terminal(), monkeypatch)
    assert "the loss [is] not finite" in text
    assert "accuracy 78.8" in text
    assert "5 min 00 s left" in text


def test_display_closed_stream_is_ignored() -> None:
    stream = Pipe()
    shown = ComparisonDisplay(stream=stream)
    stream.close()
    shown(ProgressEvent("run", 1, 6, "lora, seed 0", "accuracy"))
    shown(ProgressEvent("end", 6, 6, text="done"))
