"""`graftwerk init`: from a stranger's file to a run file that trains; a German Excel CSV from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.experiments.first_run import first_run
from graftwerk.tasks.registry import TASKS
from tests.cli.commands import Run


def excel(path: Path, encoding: str) -> Path:
    """What Excel saves in Germany: semicolons, CRLF, quotes where needed, empty cells, umlauts in the header."""
    good, bad = "Sehr schöne Größe, gern wieder", 'Leider "kaputt"; schlechte Qualität'
    with path.open("w", newline="", encoding=encoding) as file:
        rows = csv.writer(file, delimiter=";", lineterminator="\r\n")
        rows.writerow(["Nr", "Überprüfung", "Bewertung", "Größe"])
        for number in range(60):
            text = f"{good if number % 2 else bad} {number}"
            label = "gut" if number % 2 else "übel"
            rows.writerow([number, "" if number == 7 else text, "" if number == 20 else label, "groß" * (number % 3)])
    return path


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig", "utf-8"])
def test_german_excel_csv_from_init_to_predictions(
    graftwerk: Run, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    excel(tmp_path / "Bewertungen März.csv", encoding)
    said = graftwerk("init", "Bewertungen März.csv", "--model", tiny_encoder)
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "run.yaml"
    assert "data.delimiter" in said.out
    data = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))["data"]
    assert data["columns"] == {"text": "Überprüfung", "label": "Bewertung"}
    assert (data["delimiter"], data.get("encoding")) == (";", "cp1252" if encoding == "latin-1" else None)
    assert data["on_bad_row"] == "skip"
    said = graftwerk("train", "run.yaml", "max_steps=2", "evaluation.latency_batches=1", "--json")
    assert said.code == 0, said.err
    assert "Bewertungen März.csv cannot be used and were left out" in said.err
    run = Path(said.json["run"])
    assert json.loads((run / "manifest.json").read_text())["labels"] == ["gut", "übel"]
    if encoding != "latin-1":
        return
    said = graftwerk("predict", run, "--data", "Bewertungen März.csv", "-o", "antworten.csv")
    assert said.code == 0, said.err
    assert "read as Windows-1252" in said.err
    assert "1 of 60 rows have no answer: `Überprüfung` is empty" in said.err
    with (tmp_path / "antworten.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["Überprüfung"] == 'Leider "kaputt"; schlechte Qualität 2'
    assert rows[2]["Größe"] == "großgroß"
    assert rows[2]["label"] in ("gut", "übel")
    assert [row["Nr"] for row in rows if row["reason"]] == ["7"]


def test_init_writes_over_nothing_and_says_its_guesses(graftwerk: Run, tmp_path: Path, glosses: Path) -> None:
    out = tmp_path / "own.yaml"
    said = graftwerk("init", glosses, "--out", out, "--model", "some/model", "--json")
    assert said.code == 0, said.err
    assert said.json["rows"] == 240
    assert {guess["key"]: guess["value"] for guess in said.json["guesses"]}["task"] == "classification"
    assert all(guess["why"] for guess in said.json["guesses"])
    assert said.json["config"]["model"] == RunConfig.load(out).model == "some/model"
    assert "    label: label  # 12 classes: " in out.read_text()
    out.write_text("mine")
    assert graftwerk("init", glosses, "--out", out).code == 7
    assert out.read_text() == "mine"
    assert graftwerk("init", glosses, "--out", out, "--overwrite").code == 0
    assert out.read_text() != "mine"


CASES: dict[str, tuple[list[dict[str, Any]], str, dict[str, str]]] = {
    "few values": ([{"what": f"a long text {n}", "kind": "ab"[n % 2], "id": n} for n in range(30)], "classification",
                   {"text": "what", "label": "kind"}),
    "stars": ([{"review": f"a text {n}", "Stars": n % 5} for n in range(30)], "classification",
              {"text": "review", "label": "Stars"}),
    "chat": ([{"messages": [{"role": "user", "content": "a"}]}] * 3, "instruction", {}),
    "prompts": ([{"Prompt": "a", "completion": "b"}] * 3, "instruction", {"prompt": "Prompt"}),
    "pairs": ([{"source": "a", "target": "b"}] * 3, "translation", {}),
    "summaries": ([{"document": "a", "summary": "b"}] * 3, "summarization", {}),
    "texts": ([{"text": f"text {n}", "id": n} for n in range(9)], "masked", {"text": "text"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_first_run_tells_the_task_by_the_columns(tmp_path: Path, case: str) -> None:
    rows, task, columns = CASES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = first_run(str(path))
    assert made["config"]["task"] == task
    assert made["config"]["data"].get("columns", {}) == columns
    assert yaml.safe_load(made["text"]) == made["config"]


def test_first_run_of_lines_of_text_learns_their_language(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    assert first_run(str(tmp_path / "notes.txt"))["config"]["task"] == "masked"


def test_first_run_without_texts_or_with_lists_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"a": n, "b": n * 2}) + "\n" for n in range(9)))
    with pytest.raises(ConfigError, match="no column holds text") as caught:
        first_run(str(path))
    assert "a, b" in str(caught.value.hint)
    if "multilabel" not in TASKS:
        path.write_text("".join(json.dumps({"text": f"t{n}", "tags": ["a", "b"][: n % 3]}) + "\n" for n in range(9)))
        with pytest.raises(ConfigError, match="no task for several labels"):
            first_run(str(path))
