"""`graftwerk search` and `graftwerk recommend`: what they print and refuse before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftwerk.cli import doctor
from graftwerk.experiments import preflight as checking
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.recommendation import recommend as recommending
from graftwerk.training.planning import plan as planning
from tests.cli.commands import Run
from tests.experiments.search.fake_runs import FakeRunner


def test_search_dry_run_prints_space_and_cost(
    graftwerk: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = graftwerk("search", config, "data.test=8", "r=4,8", "learning_rate=1e-4..1e-2", "--dry-run", "--json")
    assert said.code == 0, said.err
    assert [axis["key"] for axis in said.json["space"]][:2] == ["training.learning_rate", "method.r"]
    assert said.json["defaults"]["method.r"] == 8
    assert (said.json["budget"]["trials"], said.json["runs"]) == (20, 20 + 4 * 3)
    assert "logarithmic" in said.err
    priced, real = list[float](), checking.preflight
    few = {"code": "few-rows", "message": "there are few rows", "grave": False}
    monkeypatch.setattr(checking, "preflight", lambda base: {**real(base), "findings": [few]})
    monkeypatch.setattr(doctor, "describe_cost", lambda plan, seconds: priced.append(seconds) or "")
    for words, trials in (("seconds=5e-3", 0), ("seconds=1e9 trials=6", 6)):
        given = [*words.split(), "workers=2", "data.test=8", "--metric", "f1_macro"]
        said = graftwerk("search", config, *given, "--dry-run", "--json")
        assert said.code == 0, said.err
        run = said.json["plan"]["time"]["training_seconds"]
        assert priced.pop() == pytest.approx((trials + 12) * run / 2 + (0 if trials else 5e-3))
        assert said.json["budget"]["metric"] == "f1_macro"
        assert "note: there are few rows" in said.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trials=0"], "greater than or equal to 1"),
        (["learning_rat=1e-4..1e-2"], "did you mean `learning_rate`?"),
        (["data.test=null"], "data.test=0.2"),
    ],
)
def test_search_refuses_before_anything_is_done(graftwerk: Run, config: Path, words: list[str], hint: str) -> None:
    said = graftwerk("search", config, *words, "--dry-run")
    assert said.code == 2
    assert hint in said.err


def test_search_command_prints_the_last_word(
    graftwerk: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", FakeRunner)
    words = ["trials=6", "finalists=1", "repeats=2", "r=4,16", "data.test=8", f"output_dir={tmp_path / 'search'}"]
    said = graftwerk("search", config, *words)
    assert said.code == 0, said.err
    assert "on test rows that no trial has seen" in said.out
    assert said.out.rstrip().endswith(str(tmp_path / "search"))
    for name in ("best.yaml", "report.html", "search.json", "study.journal", "config.yaml"):
        assert (tmp_path / "search" / name).is_file(), name
    assert graftwerk("report", tmp_path / "search").code == 0


def test_recommend_command_prints_reasons_and_command(
    graftwerk: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: dict[str, Any] = {
        "memory": {"train_peak_bytes": 10**8}, "adapter_bytes": 10_000, "time": {"step_seconds": 0.1},
        "fits": True, "available_bytes": 10**10,
    }  # fmt: skip

    class Planner:
        def __init__(self, config: Any) -> None: ...

        def plan(self, config: Any) -> dict[str, Any]:
            return plan

    facts = {"parameters": {"total": 10**7}, "data": {"rows": {"train": 2000}, "fingerprint": "f" * 64}}
    monkeypatch.setattr(recommending, "preflight", lambda config: facts)
    monkeypatch.setattr(planning, "Planner", Planner)
    said = graftwerk("recommend", config, "--aim", "many-tasks", "--memory", "8GB")
    assert said.code == 0, said.err
    assert f"graftwerk train {config} 'method={{name: lora}}'" in said.out
    assert said.out.startswith(
        "aim many-tasks: 10.0 M parameters, 2,000 training rows, classification, 8.0 GB of memory"
    )
    assert said.out.count("graftwerk train ") == 5
    assert "[docs/performance.md]" in said.out
    assert "not known:" in said.out
    assert graftwerk("recommend", config, "--memory", "1kB").code == 5
    assert graftwerk("recommend", config, "--aim", "sped").code == 2
