"""Recommendations: the table of rules, the plan's figures, measured comparisons, and what does not fit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from graftwerk.config import RunConfig, parse_overrides
from graftwerk.errors import ConfigError, ResourceError
from graftwerk.experiments.recommendation import recommend as module
from graftwerk.experiments.recommendation.evidence import find_evidence
from graftwerk.experiments.recommendation.recommend import PLANS, recommend
from graftwerk.experiments.recommendation.rules import AIMS, CANDIDATES, EPOCHS, RULES, Rule, epochs_for, settings_of
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.strict_json import dump_object
from graftwerk.training.planning import plan as planning

SIZES = {"full": 900, "probe": 100, "lora-top": 200}
"""Megabytes of the fake plan; 300 for the others."""


class FakePlanner:
    """A planner by a table: the smaller the micro-batch, the less memory."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def plan(self, config: RunConfig) -> dict[str, Any]:
        name = "lora-top" if getattr(config.method, "layers", None) else config.method.name
        peak = SIZES.get(name, 300) * 10**6 * config.training.per_device_train_batch_size // 16
        return {
            "memory": {"train_peak_bytes": peak}, "adapter_bytes": 10_000 if name == "ia3" else 1_000_000,
            "time": {"step_seconds": 0.1 if name == "lora-top" else 0.3}, "fits": True, "available_bytes": 10**10,
        }  # fmt: skip


@pytest.fixture(autouse=True)
def _planned(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"parameters": {"total": 22_700_000}, "data": {"rows": {"train": 2000}, "fingerprint": "f" * 64}}
    monkeypatch.setattr(module, "preflight", lambda config: facts)
    monkeypatch.setattr(planning, "Planner", FakePlanner)


@pytest.fixture
def config(tmp_path: Path, tiny_encoder: Path) -> RunConfig:
    tree = {"model": str(tiny_encoder), "method": "lora", "data": {"train": "rows.csv"}}
    return RunConfig.build({**tree, "output_dir": str(tmp_path / "runs" / "mine")})


def test_rules_name_candidates_aims_and_sources() -> None:
    for rule in RULES:
        assert rule.candidate in CANDIDATES
        assert rule.aims
        assert rule.aims <= set(AIMS)
        assert rule.source
        assert rule.why
        assert rule.points
    for label in CANDIDATES:
        assert parse_method(settings_of(label, 12)).name == CANDIDATES[label]["name"]
    assert [epochs_for(rows)[0] for rows in (10, 400, 2_000, 10**6)] == [epochs for _, epochs, _ in EPOCHS]


def test_recommend_each_aim_has_its_method(config: RunConfig) -> None:
    first = {aim: recommend(config, aim)["ranked"][0]["label"] for aim in AIMS}
    assert first == {
        "quality": "lora", "memory": "lora-top", "speed": "lora-top", "size": "ia3", "many-tasks": "lora",
    }  # fmt: skip


def test_recommend_plans_the_best_alone(config: RunConfig) -> None:
    ranked = recommend(config, "quality")["ranked"]
    assert [one["plan"] is not None for one in ranked] == [True] * PLANS + [False] * (len(CANDIDATES) - PLANS)


def test_recommend_orders_reasons_and_gives_points_by_place(config: RunConfig) -> None:
    ranked = recommend(config, "size")["ranked"]
    for one in ranked:
        weights = [abs(reason["points"]) for reason in one["reasons"]]
        assert weights == sorted(weights, reverse=True)
    places = [reason for one in ranked for reason in one["reasons"] if "smallest adapter" in reason["text"]]
    first = [reason for reason in ranked[0]["reasons"] if reason["text"] == "smallest adapter"]
    assert [reason["points"] for reason in first] == [module.PLAN_POINTS]
    last = next(reason for reason in places if reason["text"].startswith(f"{PLANS} of {PLANS} by"))
    assert last["points"] == 0


def test_recommend_top_layers_are_a_third_and_cached_where_that_is_the_aim(config: RunConfig) -> None:
    assert [settings_of("lora-top", depth)["layers"] for depth in (12, 2)] == ["top-4", "top-1"]
    for aim in AIMS:
        settings = next(one for one in recommend(config, aim)["ranked"] if one["label"] == "lora-top")["settings"]
        assert settings["method.layers"] == "top-1"  # of the two that this model has
        assert settings.get("training.trunk_cache", False) == (aim in ("speed", "memory"))


def test_rule_holds_from_its_least_to_below_its_most() -> None:
    rule = Rule("lora", frozenset(AIMS), 1, "why", "where", parameters=(10, 20), rows=(5, 6), writes=True)
    assert [rule.holds("size", parameters, 5, True) for parameters in (9, 10, 19, 20)] == [False, True, True, False]
    assert [rule.holds("size", 10, rows, True) for rows in (4, 5, 6)] == [False, True, False]
    assert not rule.holds("size", 10, 5, False)


def test_recommend_rules_look_at_the_size_of_the_model(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"parameters": {"total": 3 * 10**9}, "data": {"rows": {"train": 20_000}, "fingerprint": "f" * 64}}
    monkeypatch.setattr(module, "preflight", lambda config: facts)
    ranked = recommend(config, "quality")["ranked"]
    assert ranked[0]["label"] == "lora-r64"
    assert ranked[0]["settings"]["method.use_rslora"] is True
    full = next(one for one in ranked if one["label"] == "full")
    assert any("forgets most" in reason["text"] for reason in full["reasons"])


def test_recommend_command_is_one_that_train_takes(config: RunConfig) -> None:
    for one in recommend(config, "speed")["ranked"]:
        words = shlex.split(one["command"])
        assert words[:3] == ["graftwerk", "train", "run.yaml"]
        built = RunConfig.build(config.model_dump(mode="json"), parse_overrides(words[3:]))
        assert built.method.name == one["method"]
        assert built.training.learning_rate == one["settings"]["training.learning_rate"]


def test_recommend_memory_makes_the_micro_batch_smaller_or_leaves_out(config: RunConfig) -> None:
    found = recommend(config, "quality", memory=200_000_000)
    lora = next(one for one in found["ranked"] if one["label"] == "lora")
    assert lora["settings"]["training.per_device_train_batch_size"] < 16
    small = lora["settings"]["training.per_device_train_batch_size"]
    assert small * lora["settings"]["training.gradient_accumulation_steps"] == 16
    found = recommend(config, "quality", memory=50_000_000)
    assert [one["label"] for one in found["left_out"]] == ["full"]
    assert found["left_out"][0]["reason"] == "needs 56.2 MB, and there are 50.0 MB"
    planned = [one["plan"] is not None for one in recommend(config, "many-tasks", memory=200_000_000)["ranked"]]
    assert planned == sorted(planned, reverse=True)  # though a smaller micro-batch took points
    with pytest.raises(ResourceError, match=r"no method fits into 1.0 MB: probe, the smallest, needs 6.2 MB"):
        recommend(config, "quality", memory=1_000_000)


def test_recommend_unknown_aim_raises(config: RunConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        recommend(config, "sped")
    assert "did you mean `speed`?" in str(caught.value)


def comparison(folder: Path, model: str, fingerprint: str, **changes: Any) -> None:
    figure = {"low": 0.7, "high": 0.8, "note": None}
    methods = [
        {"name": name, "settings": {"name": name}, "figure": {**figure, "value": value}}
        for name, value in (("bottleneck", 0.80), ("lora", 0.74), ("ia3", 0.79))
    ]
    differences = [
        {"a": "bottleneck", "b": "lora", "value": 0.06, "low": 0.03, "high": 0.09, "p": 0.01},
        {"a": "bottleneck", "b": "ia3", "value": 0.01, "low": -0.02, "high": 0.04, "p": 0.6},
    ]
    content = {
        "format": 1, "status": "finished", "task": "classification", "model": model, "metric": "accuracy", "rows": 500,
        "split": "test", "data": {"fingerprint": fingerprint}, "methods": methods, "differences": differences,
        **changes,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_bytes(dump_object(content, folder / "comparison.json", seal=True))


def test_recommend_measured_comparison_outweighs_the_rules(config: RunConfig, tmp_path: Path) -> None:
    before = recommend(config, "quality")
    assert any("no comparison of this task was found" in text for text in before["unknown"])
    comparison(tmp_path / "runs" / "cmp", config.model, "f" * 64)
    after = recommend(config, "quality")
    assert after["ranked"][0]["label"] == "bottleneck"
    assert not any("no comparison" in text for text in after["unknown"])
    lora = next(one for one in after["ranked"] if one["label"] == "lora")
    worse = next(reason for reason in lora["reasons"] if reason["points"] == -4)
    assert "worse by 6.0 points [3.0, 9.0]" in worse["text"]
    assert "these rows, 500 test rows" in worse["source"]


def test_find_evidence_weighs_and_refuses(tmp_path: Path) -> None:
    comparison(tmp_path / "a", "other", "f")
    comparison(tmp_path / "b" / "deep", "mine", "other")
    comparison(tmp_path / "begun", "mine", "f", status="running")
    comparison(tmp_path / "torn", "mine", "f")
    (tmp_path / "torn" / "comparison.json").write_text("{")
    found = find_evidence(tmp_path, "mine", "classification", "f", 6)
    assert sorted(points for points, _, _ in found.points["bottleneck"]) == [1.0, 2.0]
    assert found.files == 2
    assert len(found.notes) == 1
    assert find_evidence(tmp_path, "mine", "summarization", "f", 6).points == {}


def searched(folder: Path, model: str, verdict: str = "better") -> None:
    folder.mkdir(parents=True)
    best = {"settings": {"training.learning_rate": 0.002, "training.num_train_epochs": 7, "method.r": 32}}
    content = {
        "format": 1, "status": "finished", "task": "classification", "model": model, "metric": "accuracy",
        "method": {"name": "lora"}, "best": best, "difference": {"verdict": verdict},
    }  # fmt: skip
    (folder / "search.json").write_bytes(dump_object(content, folder / "search.json", seal=True))


def test_find_evidence_takes_settings_of_a_search(config: RunConfig, tmp_path: Path) -> None:
    searched(tmp_path / "runs" / "search", config.model)
    lora = next(one for one in recommend(config, "quality")["ranked"] if one["label"] == "lora")
    assert lora["settings"]["training.learning_rate"] == 0.002
    assert lora["settings"]["training.num_train_epochs"] == 7
    assert lora["settings"]["method.r"] == 32
    assert str(tmp_path / "runs" / "search") in str(lora["reasons"])
    short = RunConfig.build(config.model_dump(mode="json"), {"training.max_steps": 50})
    lora = next(one for one in recommend(short, "quality")["ranked"] if one["label"] == "lora")
    assert lora["settings"]["method.r"] == 32
    assert "training.num_train_epochs" not in lora["settings"]


def test_find_evidence_leaves_settings_of_another_model_and_of_no_difference(tmp_path: Path) -> None:
    searched(tmp_path / "a", "other")
    searched(tmp_path / "b", "mine", "no difference shown")
    found = find_evidence(tmp_path, "mine", "classification", "f", 6)
    assert (found.files, found.settings) == (2, {})


def test_find_evidence_maps_entries_to_candidates_and_skips_ablations(tmp_path: Path) -> None:
    def entry(name: str, value: float, **settings: Any) -> dict[str, Any]:
        settings = parse_method({"name": "lora", **settings}).to_dict()
        return {"name": name, "settings": settings, "figure": {"value": value, "low": 0.7, "high": 0.9, "note": None}}

    methods = [
        entry("dora", 0.84, use_dora=True), entry("lora", 0.80), entry("lora-r16", 0.82, r=16),
        entry("top", 0.81, layers="top-2"), entry("pissa", 0.83, init_lora_weights="pissa"),
    ]  # fmt: skip
    differences = [
        {"a": "dora", "b": one["name"], "value": 0.01, "low": -0.02, "high": 0.04, "p": 0.6} for one in methods[1:]
    ]
    changes = {"methods": methods, "differences": differences}
    comparison(tmp_path / "a", "mine", "f", **changes)
    comparison(tmp_path / "abl", "mine", "f", **changes, ablation={"design": "grid"})
    found = find_evidence(tmp_path, "mine", "classification", "f", 6).points
    assert {label: [points for points, _, _ in said] for label, said in found.items()} == {
        "dora": [4.0], "lora": [2.0], "lora-top": [2.0],
    }  # fmt: skip


def test_recommend_leaves_out_what_is_at_odds_with_the_run_file(config: RunConfig) -> None:
    changed = RunConfig.build(config.model_dump(mode="json"), {"quantization": "nf4", "training.max_steps": 50})
    found = recommend(changed, "quality")
    assert [one["label"] for one in found["left_out"]] == ["full"]
    assert "quantiz" in found["left_out"][0]["reason"]
    for one in found["ranked"]:
        assert "num_train_epochs" not in one["command"]
        assert not any("epochs to start with" in reason["text"] for reason in one["reasons"])


def test_recommend_asks_for_facts_whatever_fits_here(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, asked = module.preflight, list[bool]()
    monkeypatch.setattr(module, "preflight", lambda given: asked.append(given.training.check_memory) or usual(given))
    recommend(config, "quality", memory=200_000_000)
    assert asked == [False]
