"""`graftwerk predict` for files and standard input: order, reasons, pipes, files of answers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from graftwerk.data import row_source
from graftwerk.training.train import train
from tests.cli.commands import Run

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, glosses: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        {
            "model": str(tiny_encoder),
            "data": {"train": str(glosses), "validation": 24},
            "method": {"name": "lora", "r": 2},
            "training": {"max_steps": 1, "report_to": ["jsonl"]},
            "output_dir": str(tmp_path_factory.mktemp("runs") / "run"),
        }
    ).folder


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("arguments", [["-"], ["--data", "-"]], ids=["text", "data"])
def test_predict_answers_each_line_of_standard_input(
    graftwerk: Run, run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    stdin(monkeypatch, "\ufeffein großer Vogel\r\n\na b\x0bc\nlast".encode())
    said = graftwerk("predict", run, *arguments)
    assert said.code == 0, said.err
    cells = [line.split("\t") for line in said.out.splitlines()]
    assert all(1 / 12 < float(cell[1]) < 1 for cell in cells if cell[-1])  # the score of the best of twelve classes
    assert [cell[-1] for cell in cells] == ["ein großer Vogel", "", "a b\N{REPLACEMENT CHARACTER}c", "last"]
    assert "note: 1 of 4 rows have no answer: the text is empty (1); the first is line 2" in said.err


def test_predict_json_gives_each_row_with_its_reason(graftwerk: Run, run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na bird,\n,x\n")
    said = graftwerk("predict", run, "--data", rows, "--json")
    assert said.code == 0, said.err
    first, second = said.json["predictions"]
    assert set(first) == {"label", "scores", "text"}
    assert second == {"reason": "`text` is empty"}
    assert said.json["notes"] == [f"1 of 2 rows have no answer: `text` is empty (1); the first is {rows}:3"]


def test_predict_writes_a_file_and_says_where(graftwerk: Run, run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("a bird\nbread\n")
    out = tmp_path / "out.csv"
    said = graftwerk("predict", run, "--data", rows, "--output", out)
    assert said.code == 0, said.err
    assert said.out == f"{out}\n"
    assert out.read_text().splitlines()[0].startswith("text,label,score_")
    assert graftwerk("predict", run, "--data", rows, "--output", out).code == 7
    whole = out.read_bytes()
    out.write_bytes(whole[:-10])
    said = graftwerk("predict", run, "--data", rows, "--output", out, "--resume", "--json")
    assert said.json["resumed_at"] == 1
    assert out.read_bytes() == whole
    said = graftwerk("predict", run, "a bird", "bread", "--output", out, "--overwrite")
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-", "--resume"], "--output"),
        (["a text", "--data", "rows.csv"], "not both"),
        ([], "nothing to predict"),
        (["-", "a text"], "empty"),
        (["--data", "rows.xlsx"], "rows.xlsx"),
        (["--data", "rows.csv", "--output", "out.xlsx"], ".parquet"),
        (["--data", "rows.csv", "--output", "no/such/folder/out.csv"], "no folder"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_predict_refuses_with_a_hint(
    graftwerk: Run, run: Path, tmp_path: Path, arguments: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text\na bird\n")
    stdin(monkeypatch, b"")
    said = graftwerk("predict", run, *arguments)
    if why == "empty":  # beside other texts, - is a text like any
        assert said.code == 0, said.err
        assert said.out.splitlines()[0].endswith("\t-")
        return
    assert said.code == 2
    assert why in said.err
    assert "hint:" in said.err


@pytest.mark.parametrize("setting", ["temperature=0.5", "stop=a", "num_return_sequences=2", "seed=1"])
def test_predict_refuses_settings_of_writing_for_a_task_that_labels(graftwerk: Run, run: Path, setting: str) -> None:
    said = graftwerk("predict", run, "a bird", "--set", setting)
    assert said.code == 2
    assert f"`{setting.partition('=')[0]}` does nothing for classification" in said.err
    assert "hint:" in said.err


def test_predict_in_a_pipe_ends_well_when_the_reader_leaves(run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("".join(f"bird {n}\n" for n in range(3000)))
    command = f"cat {rows} | {sys.executable} -m graftwerk predict {run} - 2>err | head -n 3; echo ${{PIPESTATUS[@]}}"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment)
    *lines, codes = said.stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["bird 0", "bird 1", "bird 2"]
    assert codes.split()[1:] == ["0", "0"], (tmp_path / "err").read_text()
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_standard_input_hands_on_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read, "r"))
    monkeypatch.setattr(row_source, "PATIENCE", 0.01)
    rows: Any = iter(row_source.open_source("-"))
    os.write(write, b"one\ntw")
    assert next(rows).cells == {"text": "one"}
    assert next(rows) is None  # nothing more for now, and half a line is no line

    def more() -> None:
        os.write(write, b"o\n\xff")
        os.close(write)

    threading.Timer(0.01, more).start()
    rest = [row for row in rows if row is not None]
    assert [row.cells["text"] for row in rest] == ["two", "?"]
    assert rest[1].fault == "is not UTF-8 (byte 0xff)"
    assert json.dumps(rest[1].cells)
