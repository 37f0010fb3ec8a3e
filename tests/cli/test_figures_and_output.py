"""How numbers and foreign text are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graftwerk.cli.figures import byte_size, count, figure, number, seconds, share
from graftwerk.cli.output import Output, dump, printable, table
from tests.cli.commands import Run


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (8.5e-4, "850 µs"),
        (0.0032, "3.2 ms"),
        (4.06, "4.1 s"),
        (59.96, "60.0 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_durations(value: float, text: str) -> None:
    assert seconds(value) == text


def test_numbers() -> None:
    assert [number(value) for value in (0.7884, None, float("nan"))] == ["0.788", "–", "–"]
    assert [count(value) for value in (770, 337_920, 22.7e6, 1.5e9)] == ["770", "337,920", "22.7 M", "1.5 B"]
    assert [byte_size(value) for value in (480, 5_200, 1_371_187, 2.5e10)] == ["480 B", "5.2 kB", "1.4 MB", "25.0 GB"]
    assert share(0.01491) == "1.49 %"
    assert figure({"value": 0.5, "low": 0.4, "high": 0.6}) == ("0.500", "0.400 to 0.600")
    assert figure({"value": 0.5, "low": None, "high": None}) == ("0.500", "")


def test_json_has_no_nan_and_no_foreign_types() -> None:
    data = {"a": float("nan"), "b": [float("inf"), np.float32(0.5), np.arange(2)], "c": Path("x"), 3: (True, None)}
    assert json.loads(dump(data)) == {"a": None, "b": [None, 0.5, [0, 1]], "c": "x", "3": [True, None]}


def test_text_from_files_cannot_drive_the_terminal() -> None:
    hostile = "a\x1b[31mred\x07\u202egnp.exe\nb\ttab"
    shown = printable(hostile)
    assert shown == "a\ufffd[31mred\ufffd\ufffdgnp.exe b tab"
    assert printable("café – naïve 漢字") == "café – naïve 漢字"


def test_a_table_that_is_not_for_a_terminal_has_no_trailing_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table("name", "value", numbers=("value",))
    shown.add_row("[bold]x[/bold]", "1")
    Output().show(shown)
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    Output(as_json=True).show(shown)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "value" in captured.err


def test_quiet_keeps_results_and_errors(graftwerk: Run) -> None:
    assert graftwerk("methods", "-q").out == graftwerk("methods").out
