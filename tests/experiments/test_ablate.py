"""An ablation: its cells, the effect of each axis, and one made, stopped and resumed on a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwerk.cli.ablate import read_settings
from graftwerk.cli.main import main
from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, RunInterrupted
from graftwerk.evaluation.paired_bootstrap import joint_bootstrap
from graftwerk.experiments import workers as workers_module
from graftwerk.experiments.ablate import ablate
from graftwerk.experiments.aggregation import effects
from graftwerk.experiments.factors import read_ablation
from graftwerk.experiments.header import comparison_header
from graftwerk.experiments.method_specs import parse_method_specs
from graftwerk.experiments.progress import ProgressEvent
from graftwerk.experiments.table import describe_effects
from graftwerk.experiments.tuning import read_axes
from graftwerk.tasks.predictions import ClassPredictions
from tests.cli.commands import run_file
from tests.experiments.here import InThisProcess


def base(method: Any = "lora", **changes: Any) -> RunConfig:
    return RunConfig.build({"model": "m", "method": method, "data": {"train": "rows.csv"}, **changes})


def test_read_ablation_grid_has_all_combinations() -> None:
    found = read_ablation(base(), {"method.rank": "4,8", "method.target_modules": "attention,all-linear"})
    assert [dict(cell.values) for cell in found.cells] == [
        {"method.r": r, "method.target_modules": where} for r in (4, 8) for where in ("attention", "all-linear")
    ]
    assert found.cells[0].spec.name == "lora-r4-target_modules-attention"
    assert found.cells[0].spec.method.to_dict()["r"] == 4
    assert found.words() == ["method.r=4,8", "method.target_modules=attention,all-linear"]
    assert found.planned([0]) == (
        "2 values of method.r, 2 values of method.target_modules, all combinations: 4 cells, 1 seed (seeds=0): 4 runs"
    )
    lists = read_ablation(base(), {"method.target_modules": [["query"], ["query", "value"]], "lr": [1e-3, 3e-3]})
    assert lists.words() == ["method.target_modules=[[query], [query, value]]", "training.learning_rate=0.001,0.003"]
    axes, _, _, others = read_settings(lists.words())
    assert read_ablation(base(), axes) == lists
    assert others == {}
    mixed = {"target_modules": "attention,[query, value]", "layers": [None, [0]]}
    found = read_ablation(base(), mixed)
    assert read_ablation(base(), read_settings(found.words())[0]) == found
    assert lists.cells[1].spec.changes["training.learning_rate"] == 3e-3


def test_read_ablation_one_at_a_time_changes_the_run_files_values() -> None:
    axes = {"method.r": [8, 4, 16], "method.target_modules": "attention,all-linear"}
    found = read_ablation(base({"name": "lora", "target_modules": "attention"}), axes, "one-at-a-time")
    values = [tuple(cell.values.values()) for cell in found.cells]
    assert values == [(8, "attention"), (4, "attention"), (16, "attention"), (8, "all-linear")]
    names = [cell.spec.name for cell in found.cells]
    assert found.groups(names) == {
        "method.r": {"8": [names[0]], "4": [names[1]], "16": [names[2]]},
        "method.target_modules": {"attention": [names[0]], "all-linear": [names[3]]},
    }
    assert found.words()[-1] == "design=one-at-a-time"


def test_comparison_header_command_has_what_was_chosen(tmp_path: Path) -> None:
    rows = {"train": 9, "validation": 9, "test": 9}
    checked = {"rows": rows, "main_metric": "accuracy", "machine": {}, "versions": {}, "origin": {}, "fingerprint": "f"}
    config, specs = base(output_dir=str(tmp_path)), parse_method_specs("lora,ia3")
    axes, _ = read_axes({"max_grad_norm": "1,null"})
    given: dict[str, Any] = {"checked": {**checked, "findings": [], "summary": {}}, "own": "lora", "axes": axes}
    plain = comparison_header(config, specs, [0], None, None, **given, prefer="trained_parameters", margin=None)
    assert plain["metric"] == "accuracy"
    assert plain["command"].endswith("methods=lora,ia3 seeds=0 max_grad_norm=1,null")
    chosen = comparison_header(config, specs, [0], None, "f1_macro", **given, prefer="adapter_bytes", margin=0.005)
    assert chosen["metric"] == "f1_macro"
    assert chosen["command"].endswith(" --metric f1_macro --prefer adapter_bytes --margin 0.005")


@pytest.mark.parametrize(
    ("axes", "design", "what", "hint"),
    [
        ({"method.rnk": "4,8"}, "grid", "method.rnk", "did you mean `method.r"),
        ({"method.adapter_size": "4,8"}, "grid", "no setting of lora", "lora has: "),
        ({"r": "4,8", "data.max_length": "4,8"}, "grid", "data.max_length", ""),
        ({"seed": "4,8"}, "grid", "no axis", "seeds=0,1,2"),
        ({"method.r": "4,4"}, "grid", "twice", ""),
        ({"method.r": "4,"}, "grid", "empty value", ""),
        ({"method.r": [4]}, "grid", "several values", ""),
        ({"method.r": "4"}, "grid", "several values", ""),
        ({"method.r": "4,x"}, "grid", "valid integer", ""),
        ({"method.r": "4,8", "method.rank": "2,16"}, "grid", "given twice", ""),
        ({"method.r": range(1, 300)}, "grid", "too many", "one-at-a-time"),
        ({"method.r": "4,8"}, "latin", "no design", "one-at-a-time"),
        ({}, "grid", "several values", "method.r=4,8,16"),
        ({"method.use_dora": "true,false", "method.init_lora_weights": "true,pissa"}, "grid", "exclude", ""),
    ],
)
def test_read_ablation_wrong_axes_raise(axes: dict[str, Any], design: str, what: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_ablation(base(), axes, design)
    assert what in str(caught.value)
    assert hint in str(caught.value.hint or "")


def answers(share: float, seed: int, rows: int = 400) -> ClassPredictions:
    """Predictions of which a share is right; hard rows are hard for all."""
    hard, own = np.random.default_rng(0).random(rows), np.random.default_rng(seed).random(rows)
    right = 0.7 * hard + 0.3 * own < share
    scores = np.zeros((rows, 2))
    scores[np.arange(rows), right.astype(int)] = 1
    return ClassPredictions(None, scores, np.ones(rows, dtype=np.int64))


def test_effects_are_differences_of_means_over_the_same_other_values() -> None:
    ablation = read_ablation(base(), {"method.r": [4, 8], "method.lora_alpha": [8, 16]})
    shares = {(4, 8): 0.60, (4, 16): 0.602, (8, 8): 0.70, (8, 16): 0.702}
    cells = {
        cell.spec.name: {seed: answers(shares[tuple(cell.values.values())], 10 * at + seed) for seed in (1, 2, 3)}  # type: ignore[index]
        for at, cell in enumerate(ablation.cells)
    }
    joint = joint_bootstrap(cells, "accuracy", resamples=500)
    found = effects(ablation, joint, "accuracy", 0.95)
    rank, alpha = found["effects"]
    means = dict(zip(joint.methods, joint.means, strict=True))
    names = [cell.spec.name for cell in ablation.cells]
    (difference,) = rank["differences"]
    assert difference["value"] == pytest.approx(
        np.mean([means[n] for n in names[:2]]) - np.mean([means[n] for n in names[2:]])
    )
    assert (difference["verdict"], alpha["differences"][0]["verdict"]) == ("worse", "no difference shown")
    assert (
        rank["levels"][1]["figure"]["low"] < rank["levels"][1]["figure"]["value"] < rank["levels"][1]["figure"]["high"]
    )
    # two cells a value know more than one: the interval of a main effect is narrower than that of two cells
    single = joint.difference(names[0], names[2], 0.95)
    assert difference["high"] - difference["low"] < single["high"] - single["low"]
    said = describe_effects({"ablation": found, "metric": "accuracy"})
    assert said[0].startswith("Effect of method.r, means over 2 cells each: 4: ")
    assert "; 8 against 4: better by " in said[0]
    # a cell that failed takes its block with it, so that nothing else differs
    del cells[names[0]]
    kept = ablation.groups(cells)
    assert kept["method.r"] == {"4": [names[1]], "8": [names[3]]}
    assert kept["method.lora_alpha"] == {"8": [names[2]], "16": [names[3]]}
    assert not any(ablation.groups({names[0]})["method.r"].values())


def test_ablate_trains_cells_resumes_and_reports(
    tmp_path: Path,
    tiny_encoder: Path,
    glosses: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(workers_module, "JobRunner", InThisProcess)
    config = run_file(tmp_path, tiny_encoder, glosses, training={"max_steps": 2, "report_to": ["jsonl"]})
    given = ["method.r=2,4", "learning_rate=1e-2", "seeds=0", f"output_dir={tmp_path / 'abl'}"]
    assert main(["ablate", str(config), *given, "--dry-run"]) == 0
    assert "2 cells, 1 seed (seeds=0): 2 runs, 4 steps of 16 rows" in capsys.readouterr().out
    assert not (tmp_path / "abl").exists()
    lists = "method.target_modules=[query],[query, value],attention"
    assert main(["ablate", str(config), lists, "seeds=0", "--dry-run"]) == 0
    assert "3 values of method.target_modules" in capsys.readouterr().out
    assert main(["compare", str(config), "methods=lora", "warmup_ratio=[0],[0.1]", "--dry-run"]) == 2
    assert "not YAML" not in capsys.readouterr().err
    assert main(["ablate", str(config), *given, "--dry-run", "--ray", "auto"]) == 2
    assert "a dry run asks no Ray cluster" in capsys.readouterr().err
    assert main(["ablate", str(config), "method.adapter_size=2,4", "--dry-run"]) == 2
    assert "no setting of lora" in capsys.readouterr().err

    def stop(event: ProgressEvent) -> None:
        if event.kind == "run" and event.done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(RunInterrupted(15, "stopped")))
    try:
        with pytest.raises(RunInterrupted):
            ablate(config, {"method.r": "2,4"}, 0, listener=stop, learning_rate=1e-2, output_dir=str(tmp_path / "abl"))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert main(["ablate", str(config), *given, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("already finished") == 1
    result = json.loads(said.out)
    assert [each["axis"] for each in result["ablation"]["effects"]] == ["method.r"]
    assert result["training"]["learning_rate"] == 1e-2
    assert [method["changes"] for method in result["methods"]] == [{"method.r": 2}, {"method.r": 4}]
    words = shlex.split(result["command"])
    assert words[1] == "ablate"
    assert words[3:] == ["method.r=2,4", "seeds=0"]
    assert main(words[1:]) == 0
    said = capsys.readouterr()
    assert said.err.count("already finished") == 2
    assert "Effect of method.r: 2: " in said.out
    page = (tmp_path / "abl" / "report.html").read_text()
    assert "Effect of each setting" in page
