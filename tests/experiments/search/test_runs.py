"""Events of a real training as a search hears them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.experiments.search.runs import Active, Runs
from tests.experiments.here import InThisProcess


class Here(InThisProcess):
    """A runner in this process that keeps the rows it passes on, by step."""

    def run(self, job: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        self.sent: dict[int, list[float]] = {}

        def heard(event: dict[str, Any]) -> None:
            if event["kind"] == "rows":
                self.sent[event["step"]] = event["rows"]
            on_event(event)

        return super().run(dict(job), heard)


def test_runs_train_judges_each_evaluation_by_its_own_rows(tmp_path: Path, tiny_encoder: Path, glosses: Path) -> None:
    config = RunConfig.build(
        {
            "model": str(tiny_encoder), "method": "lora", "output_dir": str(tmp_path / "search"),
            "data": {"train": str(glosses), "validation": 24, "test": 48, "max_train_rows": 32},
            "training": {"max_steps": 3, "eval_steps": 1, "report_to": []},
        }
    )  # fmt: skip
    runs, active, judged = Runs(config, [], 1, lambda event: None), Active("trial 0"), dict[int, list[float] | None]()

    def gives_up(event: Mapping[str, Any]) -> bool:
        judged[event["step"]] = active.rows
        return False

    runner = Here(tmp_path / "log")
    runs.train(runner, runs.config_of({}, "trials/000"), active, rows=True, gives_up=gives_up)
    assert sorted(judged) == [1, 2, 3]
    assert judged == runner.sent
    assert judged[1] != judged[3]
