"""What tests of commands share: how a command answered, and a small run file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.out.rstrip("\n").rpartition("\n")[2]

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object, which is all there is on stdout."""
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Run = Callable[..., Said]


def run_file(folder: Path, model: Path, rows: Path, **changes: Any) -> Path:
    """A small run: 12 classes of glosses on a tiny encoder, a few steps."""
    settings = {
        "model": str(model),
        "data": {"train": str(rows), "validation": 36, "test": 36},
        "method": "lora",
        "training": {"max_steps": 4, "eval_steps": 2, "report_to": ["jsonl"]},
        "evaluation": {"resamples": 100, "latency_batches": 1},
        "output_dir": str(folder / "run"),
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
