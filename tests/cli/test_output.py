"""What a command says: JSON for programs, text and tables for people."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graftwerk.cli.evaluate import _cost, _figure
from graftwerk.cli.main import as_fault
from graftwerk.cli.output import Output, dump, printable, table
from graftwerk.training.batch_display import show_batch
from tests.cli.commands import Run


def test_dump_converts_nan_numpy_and_paths() -> None:
    data = {"a": float("nan"), "b": [float("inf"), np.float32(0.5), np.arange(2)], "c": Path("x"), 3: (True, None)}
    assert json.loads(dump(data)) == {"a": None, "b": [None, 0.5, [0, 1]], "c": "x", "3": [True, None]}


def test_printable_replaces_control_characters() -> None:
    hostile = "a\x1b[31mred\x07\u202egnp.exe\nb\ttab"
    shown = printable(hostile)
    assert shown == "a\ufffd[31mred\ufffd\ufffdgnp.exe b tab"
    assert printable("café – naïve 漢字") == "café – naïve 漢字"


def test_show_table_without_terminal_keeps_140_columns_on_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = table("name", "value")
    shown.add_row("word " * 24, "1")
    Output().show(shown)
    assert "word " * 23 + "word" in capsys.readouterr().out


def test_show_table_without_terminal_has_no_trailing_spaces(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_quiet_keeps_results(graftwerk: Run) -> None:
    assert graftwerk("methods", "-q").out == graftwerk("methods").out


def run_in_shell(command: str) -> tuple[int, str]:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m graftwerk {command}"], stderr=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "command",
    ["--help", "methods --json", *(pytest.param(it, marks=pytest.mark.slow) for it in ("methods", "schema --json"))],
)
def test_command_full_disk_on_stdout_exits_5(command: str) -> None:
    code, said = run_in_shell(f"{command} >/dev/full")
    assert code == 5
    assert "No space left" in said
    assert "Traceback" not in said
    assert run_in_shell(f"{command} >/dev/full 2>&1")[0] == 5


def test_command_closed_streams_keep_exit_code() -> None:
    assert run_in_shell("methods --json >&- <&-")[0] == 0
    assert run_in_shell("methods --json >&- 2>&-")[0] == 0
    assert run_in_shell("train nothing.yaml --json >&- 2>&-")[0] == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), 2),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), 2),
        (OSError(errno.EMFILE, "Too many open files"), 5),
        (OSError(errno.ENOTDIR, "Not a directory", "a/b"), 5),
        (RuntimeError("could not create a primitive"), 5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), 5),
        (MemoryError(), 5),
    ],
)
def test_as_fault_system_error_has_known_exit_code(error: Exception, code: int) -> None:
    import torch  # noqa: F401 - whose errors are known once it is there

    assert as_fault(error).exit_code == code


@pytest.mark.parametrize(("rows", "last"), [(2, "  2. a «b»"), (3, "  3. a «b»"), (5, "  and 2 more")])
def test_show_batch_prints_three_rows_and_counts_the_rest(rows: int, last: str) -> None:
    stream = io.StringIO()
    row = {"tokens": ["a", "b"], "trained": [False, True], "padding": 0, "answer": None, "label": None}
    show_batch({"shape": (rows, 2), "rows": [row] * rows}, stream)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == last
    assert sum(line[2:4] in ("1.", "2.", "3.", "4.") for line in lines) == min(rows, 3)


def test_show_batch_leaves_the_midst_of_a_long_row_out_and_counts_it() -> None:
    stream = io.StringIO()
    row = {
        "tokens": [f"t{at}" for at in range(60)],
        "trained": [False] * 60,
        "padding": 4,
        "answer": None,
        "label": "7",
    }
    show_batch({"shape": (1, 64), "rows": [row]}, stream)
    first, last = (" ".join(f"t{at}" for at in range(start, start + 24)) for start in (0, 36))
    assert stream.getvalue().splitlines()[-2:] == [f"  1. {first} [12 more] {last} ·×4", "     -> «7»"]


@pytest.mark.parametrize(
    ("name", "measured", "shown"),
    [
        ("bleu", {"value": 23.44, "low": 20.1, "high": 26.0}, ("23.4", "20.1 to 26.0")),
        ("rougeL", {"value": 0.396, "low": 0.3, "high": 0.4}, ("39.6 %", "30.0 to 40.0 %")),
        ("perplexity", {"value": 12.34, "low": None, "high": None}, ("12.3", "")),
        ("roc_auc", {"value": 0.75, "low": 0.7, "high": 0.8}, ("0.750", "0.700 to 0.800")),
        ("rmse", {"value": None}, ("\N{EN DASH}", "")),
    ],
)
def test_figure_of_a_metric_has_its_own_unit(
    name: str, measured: dict[str, float | None], shown: tuple[str, str]
) -> None:
    assert _figure(name, measured) == shown


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("latency_ms_batch_32", 1.25, ("latency a row, batch of 32", "1.2 ms")),
        ("peak_memory_bytes", 2e9, ("peak memory", "2.0 GB")),
        ("training_seconds", 65.0, ("training", "1 min 05 s")),
        ("trained_parameters", 12345, ("trained parameters", "12,345")),
    ],
)
def test_cost_has_the_unit_that_its_name_says(name: str, value: float, shown: tuple[str, str]) -> None:
    assert _cost(name, value) == shown
