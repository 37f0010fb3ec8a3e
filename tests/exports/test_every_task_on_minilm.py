"""What docs/tasks.md shows for each task, once by commands on a real model: from rows to a card that works."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwerk.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
ANSWERS = {
    "pairs": "label", "regression": "score", "multilabel": "labels", "token-classification": "entities",
    "similarity": "similarity",
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "pairs": {"task": "classification", "data": {"train": "pairs.jsonl"}},
    "regression": {"task": "regression", "data": {"train": str(EXAMPLES / "ratings_amazon.sample.jsonl")}},
    "multilabel": {
        "task": "multilabel",
        "data": {"train": str(EXAMPLES / "tags_debian.sample.jsonl"), "max_length": 128, "split_seed": 1},
    },
    "token-classification": {
        "task": "token-classification",
        "data": {"train": str(EXAMPLES / "spans_gnome_ui.sample.jsonl")},
    },
    "similarity": {
        "task": "similarity",
        "data": {
            "train": str(EXAMPLES / "summary_debian_synopsis.sample.jsonl"),
            "columns": {"anchor": "summary", "positive": "document"},
            "max_length": 128,
        },
    },
}


def write_pairs(path: Path) -> None:
    """Write each synopsis with its description and with that of the next package."""
    source = EXAMPLES / "summary_debian_synopsis.sample.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    pairs = [
        {"text": row["summary"], "text_pair": rows[(at + step) % len(rows)]["document"], "label": label}
        for at, row in enumerate(rows)
        for step, label in ((0, "right"), (1, "another's"))
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def ran(*arguments: object) -> dict[str, Any]:
    """Return what a command prints with --json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([*map(str, arguments), "--json"])
    assert code == 0, arguments
    value = json.loads(printed.getvalue())
    assert isinstance(value, dict)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_task_goes_from_rows_to_a_card_that_works(
    name: str, minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    settings = {
        **TASKS[name],
        "data": {"validation": 40, "test": 40, "max_truncated": 1.0, **TASKS[name]["data"]},
        "model": minilm,
        "method": "lora",
        "training": {"max_steps": 12},
        "evaluation": {"latency_batches": 1},
        "output_dir": "run",
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    ran("train", "run.yaml")
    assert ran("evaluate", "run")["rows"] == 40
    both = name in ("pairs", "similarity")
    text = "Press Ctrl+S to save a file." + ("\tText editor for the desktop" if both else "")
    (answer,) = ran("predict", "run", text)["predictions"]
    assert ANSWERS[name] in answer

    for folder, command in {
        "merged": ("merge", "run", "--out", "merged"),
        "peft": (
            "export",
            "run",
            "--to",
            "peft",
            "--out",
            "peft",
            "--base-name",
            "sentence-transformers/all-MiniLM-L6-v2",
        ),
    }.items():
        parity = ran(*command)["parity"]
        assert parity["rows"] == 32
        assert parity["max_abs_difference"] < 1e-5, folder
    assert ran("push", "peft", "me/it", "--dry-run")["notes"] == []

    for folder in ("run/adapter", "merged"):
        monkeypatch.chdir(tmp_path / folder)
        blocks = re.findall(r"```python\n(.*?)\n```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
        assert blocks, folder
        for code in blocks:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{folder}/README.md", "exec"), {})
            assert printed.getvalue(), folder
