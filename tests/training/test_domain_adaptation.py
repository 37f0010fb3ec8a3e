"""A task on top of a domain: continued pretraining, its adapter merged in, and a second adapter trained on that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwerk.cli.main import main
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.modeling.attach import activate
from graftwerk.serialization.folder import load_adapter


@pytest.mark.slow
def test_task_on_top_of_a_domain_by_the_commands_of_the_example(
    tmp_path: Path, tiny_decoder: Path, glosses: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity inside and outside of the domain, before and after both; the two adapters stacked answer alike."""
    monkeypatch.chdir(tmp_path)
    training: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    data = {
        "train": str(glosses),
        "max_train_rows": 24,
        "validation": 4,
        "test": 8,
        "max_length": 64,
        "max_truncated": 1.0,
    }
    common: dict[str, Any] = {
        "model": str(tiny_decoder),
        "method": {"name": "lora", "r": 4, "target_modules": "all-linear"},
        "training": {**training, "report_to": []},
    }
    domain = {
        **common,
        "task": "causal",
        "data": data,
        "evaluation": {"baseline": True, "retained": "general", "resamples": 100},
        "output_dir": "runs/domain",
    }
    columns = {"columns": {"prompt": "text", "completion": "label"}}
    task = {
        **common,
        "task": {"name": "instruction", "template": "plain"},
        "data": {**data, **columns, "allow": ["all"]},
        "evaluation": {"resamples": 100, "generate": False},
        "output_dir": "runs/task",
    }
    for name, tree in (("domain", domain), ("task", task)):
        Path(f"{name}.yaml").write_text(json.dumps(tree))
    assert main(["train", "domain.yaml"]) == 0
    assert main(["merge", "runs/domain", "--out", "runs/domain-base", "--dtype", "float32"]) == 0
    retained = "evaluation.retained={domain: {run: runs/domain}, general: general}"
    assert main(["train", "task.yaml", "model=runs/domain-base", retained]) == 0
    first, second = (json.loads(Path(f"runs/{name}/manifest.json").read_text()) for name in ("domain", "task"))
    inside, outside = second["retained"]["entries"]["domain"], second["retained"]["entries"]["general"]
    after = first["metrics"]["test"]["perplexity"]["value"]
    assert after < first["baseline"]["test"]["perplexity"]["value"]
    assert inside["before"]["value"] == pytest.approx(after, rel=1e-4)
    assert outside["before"]["value"] == pytest.approx(
        first["retained"]["entries"]["general"]["after"]["value"], rel=1e-4
    )
    assert inside["after"]["value"] != inside["before"]["value"]
    assert not [found for found in second["data"]["findings"] if found["code"] == "retained-rows"]
    ids = torch.tensor([[5, 6, 7, 8]], device="cpu")
    merged, stacked = load_adapter_for("runs/task").model, load_adapter_for("runs/domain").model
    load_adapter(stacked, "runs/task/adapter", name="task", force=True)
    activate(stacked, ["default", "task"])
    with torch.no_grad():
        torch.testing.assert_close(stacked(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-4)
