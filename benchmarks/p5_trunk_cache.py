"""P5: the frozen layers below the lowest adapted one computed once, against PEFT's `layers_to_transform`.

Whole trainings of several epochs, from a model in memory to the last step; ours with the cost of computing and keeping
the hidden states, and of its checkpoint. The peer is PEFT (for the head alone: plain PyTorch) in a loop that does
nothing but the steps, on batches that are collated beforehand, with the same loss, optimizer and order. Both have
dropout off, since a cache has none in the frozen layers, and without it the losses must agree step by step.

A BERT of 12 layers with random weights (width 384, as MiniLM-L12), the real MiniLM (6 layers), the real SmolLM2 (30).
The formula of the goal, for n weights a layer, top k of L layers, E epochs: E (2 L + 2 k) / (2 (L - k) + 4 k E).
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Row, expect, interleaved

RATE, BATCH = 1e-3, 8


@dataclass(frozen=True)
class Case:
    """One line: the top ``top`` layers (0: the head alone) of a model, over ``epochs`` passes."""

    model: str
    top: int
    layers: int
    epochs: int
    rows: int
    tokens: int
    target: float | None = None

    @property
    def name(self) -> str:
        what = f"top {self.top} of {self.layers}" if self.top else "head only"
        return f"{self.model} {what}, {self.epochs} epochs"

    @property
    def formula(self) -> float:
        top, layers, epochs = self.top, self.layers, self.epochs
        return epochs * (2 * layers + 2 * top) / (2 * (layers - top) + 4 * top * epochs)

    @property
    def wanted(self) -> float:
        return self.target or 0.9 * self.formula


CASES = (
    Case("BERT-12", 2, 12, 3, 96, 64, 1.7),
    Case("BERT-12", 2, 12, 10, 96, 64, 2.5),
    Case("BERT-12", 0, 12, 10, 96, 64, 8.0),
    Case("MiniLM", 1, 6, 3, 96, 64),
    Case("MiniLM", 2, 6, 3, 96, 64),
    Case("MiniLM", 1, 6, 10, 96, 64),
    Case("SmolLM2", 4, 30, 3, 32, 64),
)


def _model(name: str) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from benchmarks import material

    if name == "SmolLM2":
        return material.smollm2()
    if name == "MiniLM":
        model = material.minilm()
    else:
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536, num_labels=2
        )
        model = BertForSequenceClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


class Sides:
    """Both trainings of a case, and the losses of their last runs."""

    def __init__(self, case: Case) -> None:
        import torch

        from benchmarks import material
        from graftwerk.methods.registry import parse_method
        from graftwerk.modeling.attach import attach, detach
        from graftwerk.tasks.base import Example
        from graftwerk.tasks.registry import parse_task
        from graftwerk.training.settings import TrainingSettings

        self.case, self.model = case, _model(case.model)
        causal = case.model == "SmolLM2"
        place = material.SMOLLM2 if causal else material.MINILM
        self.tokenizer = material.tokenizer(place)
        ids = material.token_batch(place, case.rows, case.tokens)["input_ids"].tolist()
        asked = case.tokens * 7 // 10  # of a causal row; the rest is what is learnt
        targets = [[-100] * asked + row[asked:] if causal else at % 2 for at, row in enumerate(ids)]
        self.rows = [Example({"input_ids": row}, target) for row, target in zip(ids, targets, strict=True)]
        task = parse_task("causal" if causal else "classification")
        self.task = task.for_model(self.model.config)
        method = {"name": "lora", "layers": f"top-{case.top}"} if case.top else {"name": "probe"}
        self.method = parse_method(method)
        self.settings = TrainingSettings(
            num_train_epochs=case.epochs, per_device_train_batch_size=BATCH, learning_rate=RATE,
            head_learning_rate=RATE,
            lr_scheduler_type="constant", warmup_ratio=0.0, max_grad_norm=None, logging_steps=1, trunk_cache="auto",
        )  # fmt: skip
        torch.manual_seed(1)
        graft = attach(self.model, self.method)
        for parameter in graft.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.start = {key: value.clone() for key, value in graft.state_dict().items()}
        self.losses: dict[str, list[float]] = {}
        self.trunk: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            work = self._trainer(graft, Path(folder))
            order = [work.batch_sampler(step) for step in range(work.total_steps)]
            self.batches = [
                self.task.collator.collate([self.rows[row] for row in rows], self.tokenizer) for rows in order
            ]
            self.peer = self._peer(graft, Path(folder))
        detach(self.model)
        self.first = [value.detach().clone() for value in self.trained]

    def _trainer(self, graft: Any, folder: Path) -> Any:
        from graftwerk.training.checkpoint import Checkpoints
        from graftwerk.training.trainer import Trainer
        from graftwerk.training.trainer_inputs import RunContext, TrainingData

        losses: list[float] = []
        self.losses["ours"] = losses

        def emit(event: Any) -> None:
            if event.kind == "step":
                losses.append(event.values["loss"])

        return Trainer(
            graft, self.task, self.tokenizer, TrainingData(self.rows), self.settings,
            RunContext(Checkpoints(folder / "checkpoints"), emit),
        )  # fmt: skip

    def _peer(self, graft: Any, folder: Path) -> Any:
        """PEFT's model with the same weights, read from our folder; for the head alone the model itself."""
        base = copy.deepcopy(self.model)
        from graftwerk.modeling.attach import detach

        detach(base)
        if self.case.top:
            from peft import PeftModel

            from graftwerk.serialization.folder import save_adapter

            save_adapter(graft, folder / "adapter", metadata={})
            model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
            model.train()
        else:
            model = base.train().requires_grad_(False)
            for path, value in self.start.items():
                parameter = model.get_parameter(path)
                parameter.data.copy_(value)
                parameter.requires_grad_(True)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model

    def ours(self) -> None:
        from graftwerk.modeling.attach import attach, detach

        graft = attach(self.model, self.method)
        graft.load_state_dict(self.start)
        with tempfile.TemporaryDirectory() as folder:
            work = self._trainer(graft, Path(folder))
            work.fit()
        self.trunk = work.activation_cache.metrics()
        detach(self.model)

    def theirs(self) -> None:
        import torch

        with torch.no_grad():
            for parameter, value in zip(self.trained, self.first, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)
        losses = []
        for batch in self.batches:
            optimizer.zero_grad(set_to_none=True)
            loss = self.task.objective.loss(self.task.objective.forward(self.peer, batch), batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        self.losses["peer"] = losses


def measure(options: Options) -> list[Row]:
    import torch

    logging.getLogger("peft").setLevel(logging.ERROR)
    rows = []
    for case in CASES:
        if options.extra.only and options.extra.only not in case.name:
            continue
        if options.quick:
            case = Case(case.model, case.top, case.layers, min(case.epochs, 2), 8, 16, case.target)
        sides = Sides(case)
        run: dict[str, Callable[[], None]] = {"ours": sides.ours, "peer": sides.theirs}
        timed = interleaved(run, repeats=options.repeats, warmup=0 if options.quick else 1)
        ours, theirs = (torch.tensor(sides.losses[side]) for side in ("ours", "peer"))
        expect(ours.shape == theirs.shape, f"{case.name}: {len(ours)} steps and {len(theirs)}")
        apart = float((ours - theirs).abs().max())
        expect(apart < 1e-4, f"{case.name}: losses differ by {apart:.2g}")
        expect(sides.trunk["kept"] and not sides.trunk["rows_computed"], f"{case.name}: {sides.trunk}")
        ratio = timed["peer"].median / timed["ours"].median
        rows.append(
            Row(
                goal="P5",
                what=case.name,
                ours=timed["ours"].median,
                peer=timed["peer"].median,
                unit="s",
                ratio=ratio,
                target=f"at least {case.wanted:.2f} (formula {case.formula:.2f})",
                reached=ratio >= case.wanted,
                worst={name: side.worst for name, side in timed.items()},
                settings={
                    "rows": case.rows, "tokens": case.tokens, "batch": BATCH, "losses_apart": apart,
                    "fill_seconds": sides.trunk["fill_seconds"], "bytes": sides.trunk["bytes"],
                    "peer": "PEFT layers_to_transform" if case.top else "plain PyTorch",
                    "times": {name: side.times for name, side in timed.items()},
                },
                note="random weights" if case.model == "BERT-12" else "",
            )
        )  # fmt: skip
    return rows


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="cases whose name has this in it: `BERT-12 top 2`")


if __name__ == "__main__":
    raise SystemExit(harness.main("P5", measure, _arguments, keep=True))
