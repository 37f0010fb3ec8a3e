"""A search with a real (tiny) model in processes of its own, killed with SIGKILL in the midst of a trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwerk.experiments.search.journal import JOURNAL
from graftwerk.experiments.search.search import search

GIVEN = {"trials": 3, "finalists": 1, "repeats": 2, "learning_rate": "1e-3..1e-1", "r": "2,4"}
FIXED = {"target_modules": "attention", "lora_dropout": 0.0, "num_train_epochs": 2}


@pytest.mark.slow
def test_search_killed_in_a_trial_gives_what_it_would_have_given(
    tiny_encoder: Path, glosses: Path, tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        "model": str(tiny_encoder), "task": "classification", "method": "lora",
        "data": {"train": str(glosses), "validation": 24, "test": 48},
        "training": {"save_steps": 4, "report_to": ["jsonl"]}, "evaluation": {"latency_batches": 1},
    }  # fmt: skip
    whole = search(config, output_dir=str(tmp_path / "whole"), quiet=True, **GIVEN, **FIXED)
    folder = tmp_path / "killed"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(folder)}))
    words = [f"{key}={value}" for key, value in {**GIVEN, **FIXED}.items()]
    command = [sys.executable, "-m", "graftwerk", "search", str(tmp_path / "run.yaml"), *words, "--json", "--quiet"]
    for trial in ("001", "002"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        log = folder / "trials" / trial / "metrics.jsonl"
        while process.poll() is None and not (log.is_file() and '"kind": "checkpoint"' in log.read_text()):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    with (folder / JOURNAL).open("ab") as stream:
        stream.write(b'{"op_code":5,"work')
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    for key in ("number", "state", "settings", "value", "evaluations"):
        assert [one[key] for one in result["trials"]] == [one[key] for one in whole.result["trials"]], key
    assert result["best"]["metrics"] == whole.result["best"]["metrics"]
    assert result["text"] == whole.result["text"]
    assert len(result["notes"]) == 2
