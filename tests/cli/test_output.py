"""What a command says: JSON for programs, text and tables for people."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graftwerk.cli.output import Output, dump, printable, table
from tests.cli.commands import Run


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
