"""`merge` and `export` by commands alone, from a run."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import pipeline

from tests.cli.commands import Run


def test_run_merges_and_exports_by_commands(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    assert graftwerk("train", config, "-q").code == 0
    said = graftwerk("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert said.code == 0, said.err
    assert said.last == str(tmp_path / "merged")
    assert "compared on 32 test rows of" in said.err
    assert "largest difference of probabilities" in said.err
    label = pipeline("text-classification", str(tmp_path / "merged"))("an animal that eats grass")[0]["label"]
    assert label in json.loads((tmp_path / "run" / "manifest.json").read_text())["labels"]

    again = graftwerk("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert again.code == 7
    assert "--overwrite replaces it" in again.err
    said = graftwerk("merge", tmp_path / "run", "--out", tmp_path / "merged", "--overwrite", "--json", "--rows", 5)
    assert said.json["parity"]["rows"] == 5
    assert said.json["parity"]["max_abs_difference"] < 1e-5

    out = tmp_path / "peft"
    said = graftwerk("export", tmp_path / "run", "--to", "peft", "--out", out, "--base-name", "org/tiny", "--json")
    assert said.code == 0, said.err
    assert said.json["out"] == str(out)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"

    wrong = graftwerk("export", tmp_path / "run", "--to", "pefft", "--out", tmp_path / "none")
    assert wrong.code == 2
    assert "did you mean `peft`?" in wrong.err
    refused = graftwerk("export", tmp_path / "run", "--to", "vllm", "--out", tmp_path / "none")
    assert refused.code == 4
    assert "causal language models" in refused.err
    assert not (tmp_path / "none").exists()
