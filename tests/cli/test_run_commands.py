"""From a run file to figures by commands alone: train, evaluate, predict, report, compare."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from graftwerk.cli.compare import read_settings
from graftwerk.errors import ConfigError
from tests.cli.commands import Run, Said


@pytest.fixture
def run(graftwerk: Run, config: Path, tmp_path: Path) -> Path:
    said = graftwerk("train", config, "-q")
    assert said.code == 0, said.err
    return tmp_path / "run"


def figures(said: Said) -> list[str]:
    assert said.code == 0, said.err
    return list(said.json["metrics"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "training.learning_rate=-1",
            "`training.learning_rate`: Input should be greater than 0, or: Input should be 'auto'",
        ),
        ("learning_rat=1", "unknown key `learning_rat`; did you mean `learning_rate`?"),
        ("method.layers=bottom", "`layers` of method `lora`: layers are chosen as"),
        ("data.filter.nowhere=1", "`data.filter=null` takes the filter away"),
        ("data.columns.label=stars", "`data.columns: {label: ...}` names the right one"),
    ],
)
def test_train_invalid_setting_exits_2_naming_its_key(graftwerk: Run, config: Path, given: str, said: str) -> None:
    found = graftwerk("train", config, given, "--dry-run")
    assert found.code == 2
    assert said in " ".join(found.err.split())


def test_train_null_override_removes_filter(graftwerk: Run, config: Path) -> None:
    found = graftwerk("train", config, "data.filter.nowhere=1", "data.filter=null", "--dry-run")
    assert found.code == 0, found.err


def test_compare_dry_run_unknown_metric_or_cost_exits_2(graftwerk: Run, config: Path) -> None:
    for option, said in (("--metric", "there is no metric `foo`"), ("--prefer", "there is no cost `foo`")):
        found = graftwerk("compare", config, "methods=lora", option, "foo", "--dry-run")
        assert found.code == 2
        assert said in found.err


def test_train_prints_cost_first_and_run_folder_last(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    said = graftwerk("train", config)
    assert said.code == 0, said.err
    assert said.last == str(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
    before, _, after = said.err.partition("4 steps of 16 rows")
    assert "parameters" in before + after.partition("\n")[0]
    assert "step 4: validation accuracy" in after
    assert "test: 36 rows" in said.out


def test_train_json_prints_result(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    said = graftwerk(
        "train", config, "--json", "method=ia3", "training.max_steps=2", f"output_dir={tmp_path / 'other'}"
    )
    assert said.code == 0, said.err
    result = said.json
    assert result["run"] == str(tmp_path / "other")
    assert (Path(result["adapter"]) / "adapter_model.safetensors").is_file()
    assert result["method"]["name"] == "ia3"
    assert result["cost"]["steps"] == 2
    assert 0 <= result["metrics"]["test"]["accuracy"]["low"] <= result["metrics"]["test"]["accuracy"]["high"] <= 1
    assert "2 steps" in said.err


def test_train_dry_run_writes_nothing(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    said = graftwerk("train", config, "--dry-run", "--json")
    assert said.code == 0, said.err
    assert said.json["dry_run"] is True
    assert said.json["steps"] == 4
    assert said.json["plan"]["time"]["training_seconds"] > 0
    assert said.json["plan"]["memory"]["train_peak_bytes"] > said.json["plan"]["memory"]["weights_bytes"] > 0
    for command in (["train", config], ["compare", config, "methods=lora,ia3", "seeds=0"]):
        assert " of memory (" in graftwerk(*command, "--dry-run").out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["doctor"]], ids=" ".join)
def test_command_failing_early_leaves_no_folder(
    graftwerk: Run, config: Path, tmp_path: Path, command: list[str]
) -> None:
    said = graftwerk(command[0], config, *command[1:], "data.train=nowhere.csv", f"output_dir={tmp_path / 'a' / 'b'}")
    assert said.code == 2, said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_train_finished_run_exits_7_without_overwrite(graftwerk: Run, config: Path, run: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    said = graftwerk("train", config, "--json")
    assert said.code == 7
    assert "--overwrite" in said.json["hint"]
    said = graftwerk("train", config, "--resume")
    assert said.code == 0
    assert said.err == f"the run in {run} is finished; nothing was left to do\n"
    assert said.last == str(run)
    assert weights.stat().st_mtime_ns == before
    assert graftwerk("train", config, "--overwrite", "-q").code == 0
    assert weights.stat().st_mtime_ns != before


def test_evaluate_predict_and_report_commands(graftwerk: Run, run: Path, glosses: Path, tmp_path: Path) -> None:
    said = graftwerk("evaluate", run, "--json")
    assert {"accuracy", "f1_macro", "f1_weighted", "roc_auc"} <= set(figures(said))
    assert said.json["rows"] == 36
    assert said.json["cost"]["latency_ms_batch_1"] > 0
    shown = graftwerk("evaluate", run).out
    assert "accuracy" in shown
    assert "latency a row, batch of 32" in shown

    rows = [json.loads(line) for line in glosses.read_text().splitlines()[:5]]
    own = tmp_path / "own.csv"
    with own.open("w", newline="") as file:
        csv.writer(file).writerows([["gloss", "label"], *([row["text"], row["label"]] for row in rows)])
    said = graftwerk("evaluate", run / "adapter", "--data", own, "--column", "text=gloss", "--json")
    assert figures(said)
    assert said.json["rows"] == 5

    said = graftwerk("predict", run, "a large bird", "a kind of bread", "--json")
    assert said.code == 0, said.err
    assert len(said.json["predictions"]) == 2
    one = said.json["predictions"][0]
    assert one["label"] == max(one["scores"], key=one["scores"].get)
    assert sum(one["scores"].values()) == pytest.approx(1)
    lines = graftwerk("predict", run, "a large bird").out.splitlines()
    assert lines == [f"{one['label']}\t{one['scores'][one['label']]:.3f}\ta large bird"]
    lines = graftwerk("predict", run, "--data", own, "--column", "text=gloss").out.splitlines()
    assert [line.split("\t")[2] for line in lines] == [row["text"] for row in rows]

    (run / "report.html").unlink()
    said = graftwerk("report", run)
    assert said.code == 0, said.err
    assert Path(said.last) == run / "report.html"
    assert (run / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


@pytest.mark.parametrize("arguments", [[], ["a text", "--data", "x.csv"]], ids=["neither", "both"])
def test_predict_needs_either_texts_or_data(graftwerk: Run, arguments: list[str]) -> None:
    said = graftwerk("predict", "nowhere", *arguments)
    assert said.code == 2
    assert "--data" in said.err


def test_compare_dry_run_prints_plan(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    said = graftwerk("compare", config, "methods=lora,[no]", "--dry-run")
    assert said.code == 2
    said = graftwerk(
        "compare", config, "methods=lora,full,dora", "seeds=0,1", "training.max_steps=3", "--dry-run", "--json"
    )
    assert said.code == 0, said.err
    plan = said.json
    assert [one["name"] for one in plan["methods"]] == ["lora", "full", "dora"]
    assert plan["steps"] == 3 * 2 * 3
    assert plan["methods"][1]["parameters"]["share"] == 1
    assert not (tmp_path / "run").exists()


def test_compare_writes_report_and_resumes(graftwerk: Run, config: Path, tmp_path: Path) -> None:
    command = ["compare", config, "methods=[lora, {name: lora, r: 2, label: small}]", "seeds=0", "training.max_steps=2"]
    said = graftwerk(*command, "--json")
    assert said.code == 0, said.err
    result = said.json
    assert result["comparison"] == str(tmp_path / "run")
    assert {method["name"] for method in result["methods"]} == {"lora", "small"}
    assert Path(result["report"]).is_file()
    shown = graftwerk(*command)
    assert shown.code == 0, shown.err
    assert shown.last == str(tmp_path / "run")
    assert "small" in shown.out


def test_read_settings_splits_methods_seeds_and_overrides() -> None:
    assert read_settings(["methods=lora,full", "seeds=[1, 2]", "learning_rate=1e-3"]) == (
        "lora,full",
        "1, 2",
        {"learning_rate": 1e-3},
    )
    assert read_settings(["methods={name: lora, r: 2}"]) == ([{"name": "lora", "r": 2}], "0,1,2", {})
    with pytest.raises(ConfigError, match="no methods are named"):
        read_settings(["seeds=1"])
    with pytest.raises(ConfigError, match="not YAML"):
        read_settings(["methods=[lora"])
    with pytest.raises(ConfigError, match="not of the form"):
        read_settings(["methods=lora", "seeds"])


def test_train_launched_process_of_other_rank_prints_nothing(
    graftwerk: Run, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under `accelerate launch` every process runs the command; only the main one prints and writes the report."""
    monkeypatch.setattr("graftwerk.training.train.run_training", lambda *_, **__: None)
    monkeypatch.setenv("RANK", "1")
    said = graftwerk("train", config, "--json")
    assert (said.code, said.out) == (0, "")
    assert not (tmp_path / "run").exists()
