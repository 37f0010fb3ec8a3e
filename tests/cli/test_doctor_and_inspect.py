"""`doctor` and `inspect` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Run, run_file


def test_doctor_reports_machine(graftwerk: Run) -> None:
    said = graftwerk("doctor", "--json")
    assert said.code == 0
    machine = said.json["machine"]
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > machine["memory_available_bytes"] > 0
    assert machine["compute_type"] in ("float32", "bfloat16", "float16")
    assert machine["versions"]["torch"]
    assert "compute type" in graftwerk("doctor").out


def test_doctor_checks_run_file_without_writing(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = graftwerk("doctor", config, "method=ia3", "--json")
    assert said.code == 0
    assert said.json["run"]["method"]["name"] == "ia3"
    shown = graftwerk("doctor", config).out
    for words in (
        "first batch as the model sees it (16 rows",
        "[CLS]",
        "noun.animal",
        "rows of each label",
        "longer than 64 tokens",
    ):
        assert words in shown
    assert "note: " in shown
    assert "no problems found" not in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_doctor_leaking_rows_exit_3(graftwerk: Run, tmp_path: Path, tiny_encoder: Path, glosses: Path) -> None:
    rows = glosses.read_text().splitlines()
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(rows[:30]) + "\n")
    config = run_file(tmp_path, tiny_encoder, glosses, data={"train": str(glosses), "test": str(test)})
    said = graftwerk("doctor", config, "--json")
    assert said.code == 3
    assert "also stand in the train rows" in said.json["what"]
    assert "SEVERE" in said.err


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"text": "no label"}', ":2"), ('{"text": "", "label": "noun.food"}', "empty"), ("{broken", ":2")],
)
def test_doctor_bad_row_exits_3_with_line(
    graftwerk: Run, tmp_path: Path, tiny_encoder: Path, glosses: Path, line: str, words: str
) -> None:
    rows = glosses.read_text().splitlines()
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([rows[0], line, *rows[1:]]) + "\n")
    said = graftwerk("doctor", run_file(tmp_path, tiny_encoder, data, data={"train": str(data)}))
    assert said.code == 3
    assert words in said.err
    assert "rows.jsonl:2" in said.err


def test_inspect_describes_run_and_adapter_folder(graftwerk: Run, tmp_path: Path) -> None:
    from tests.inspection.test_adapter import stored

    stored(tmp_path / "run" / "adapter", "lora")
    for place in (tmp_path / "run", tmp_path / "run" / "adapter"):
        said = graftwerk("inspect", place, "--json")
        assert said.code == 0
        assert said.json["peft_type"] == "LORA"
        assert len(said.json["layers"]) >= 3
    shown = graftwerk("inspect", place).out
    assert "bert.encoder.layer.1" in shown
    assert said.json["base"]["fingerprint"] in shown
    assert not {"False", "None", "[]"} & set(shown.replace(",", " ").split())  # disabled settings are left out
    assert "attention.self.query" in graftwerk("inspect", place, "--modules").out


def test_inspect_unsafe_files_exit_8(graftwerk: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04not to be opened")
    assert graftwerk("inspect", tmp_path).code in (5, 8)
    (tmp_path / "adapter_model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    said = graftwerk("inspect", tmp_path, "--json")
    assert said.code == 8
    assert said.json["error"] == "integrity"


def test_inspect_without_adapter_exits_2_with_hint(graftwerk: Run, tmp_path: Path) -> None:
    said = graftwerk("inspect", tmp_path / "nothing")
    assert said.code == 2
    assert f"there is no folder {tmp_path / 'nothing'}" in said.err
    one = tmp_path / "lora-seed0"
    one.mkdir()
    (one / "manifest.json").write_text("{}")
    said = graftwerk("inspect", one)
    assert said.code == 2
    assert "has no adapter yet" in said.err
    assert "--resume" in said.err
    (tmp_path / "comparison.json").write_text("{}")
    said = graftwerk("inspect", tmp_path)
    assert said.code == 2
    assert f"name one of its runs: {one}" in said.err
