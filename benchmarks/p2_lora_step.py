"""P2: one training step of LoRA on all linear layers, against the frozen floor and against PEFT.

The floor is the same model frozen: forward, and the gradient with respect to its input embeddings, no adapter. Forward
and backward are timed, with the model's own loss on every side; no optimizer. Gradients are compared with PEFT's first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import harness, material
from benchmarks.harness import Options, Row, Timed, expect, interleaved

DROPOUTS = (0.0, 0.1)
CLOSE = 1e-5


def cases(quick: bool) -> dict[str, tuple[Callable[[], Any], dict[str, Any]]]:
    """Name -> how the base is loaded, and the batch."""
    smol = material.token_batch(material.SMOLLM2, 1 if quick else 4, 32 if quick else 128)
    mini = material.token_batch(material.MINILM, 4 if quick else 16, 32)
    return {
        f"SmolLM2-135M {smol['input_ids'].shape[0]}x{smol['input_ids'].shape[1]}": (
            material.smollm2,
            material.labelled(smol),
        ),
        f"MiniLM {mini['input_ids'].shape[0]}x32": (material.minilm, material.labelled(mini, classes=2)),
    }


def without_own_dropout(model: Any) -> Any:
    """Training mode, but for the base's own dropout, so that the gradients of the sides can be compared."""
    import torch

    model.train()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora" not in name:
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def floor(base: Any, batch: Mapping[str, Any]) -> Callable[[], object]:
    base.requires_grad_(False)
    embeddings = base.get_input_embeddings()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}

    def step() -> None:
        given = embeddings(batch["input_ids"]).detach().requires_grad_()
        base(inputs_embeds=given, **rest).loss.backward()

    return step


def training(model: Any, batch: Mapping[str, Any]) -> Callable[[], object]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        model(**batch).loss.backward()

    return step


def pair(load: Callable[[], Any], p: float) -> tuple[Any, Any, Any]:
    """Our model, its graft, and PEFT's model with the same weights."""
    import graftwerk as gw

    model = load()
    graft = gw.attach(model, gw.LoRA(r=8, lora_alpha=16, lora_dropout=p, target_modules="all-linear"))
    material.randomise(graft)
    twin = material.peft_twin(graft, load())
    return without_own_dropout(model), graft, without_own_dropout(twin)


def compare_gradients(model: Any, graft: Any, twin: Any, batch: Mapping[str, Any], what: str) -> float:
    """The largest difference of a gradient of A or B, over the largest value of that gradient."""
    training(model, batch)()
    training(twin, batch)()
    theirs = {
        name.replace(".default", "").removeprefix("base_model.model."): parameter.grad
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad and "lora_" in name
    }
    ours = {key: parameter.grad for key, parameter in graft.named_parameters() if "lora_" in key}
    expect(ours.keys() == theirs.keys() and bool(ours), f"{what}: other parameters have gradients")
    worst = max(float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max().clamp_min(1e-12)) for key in ours)
    expect(worst <= 100 * CLOSE, f"{what}: gradients differ by {worst:.1e}")
    absolute = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    expect(absolute <= CLOSE, f"{what}: gradients differ by {absolute:.1e}")
    return absolute


def measure(options: Options) -> Sequence[Row]:
    rows = []
    for name, (load, batch) in cases(options.quick).items():
        for p in DROPOUTS:
            what = f"{name}, dropout {p}"
            model, graft, twin = pair(load, p)
            differ = compare_gradients(model, graft, twin, batch, what) if p == 0 else None
            sides = {
                "floor": floor(load(), batch),
                "ours": training(model, batch),
                "peft": training(twin, batch),
            }
            timed = interleaved(sides, options.repeats)
            rows.append(row(what, timed, differ))
            del model, graft, twin, sides
            gc.collect()
    return rows


def row(what: str, timed: Mapping[str, Timed], differ: float | None) -> Row:
    base, ours, peer = timed["floor"], timed["ours"], timed["peft"]
    ratio = ours.median / base.median
    return Row(
        goal="P2",
        what=what,
        ours=ours.median,
        peer=peer.median,
        unit="s",
        ratio=ratio,
        target="step over the frozen floor at most 1.05",
        reached=ratio <= 1.05,
        worst={"ours": ours.worst, "peer": peer.worst},
        settings={
            "times": {side: each.as_dict() for side, each in timed.items()},
            "floor": base.median,
            "PEFT over the floor": peer.median / base.median,
            "LoRA": "r 8, alpha 16, all linear layers, float32, the same weights on both sides",
            "largest difference of a gradient": differ,
        },
    )


if __name__ == "__main__":
    raise SystemExit(harness.main("P2", measure))
