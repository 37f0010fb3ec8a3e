"""P4: the loss of a causal language model in tiles of the vocabulary, against the one transformers computes itself.

Both sides are the same model with the same adapter; what differs is who computes the loss. Memory is what the
allocator hands out at most at one time for head and loss, forward and backward, against the logits of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import harness, material
from benchmarks.harness import Options, Row, expect, interleaved


def measure(options: Options) -> list[Row]:
    import torch

    from graftwerk.inject.attach import attach
    from graftwerk.methods.catalog import parse_method
    from graftwerk.tasks.causal import Causal

    model = material.smollm2()
    graft = attach(model, parse_method({"name": "lora", "r": 8, "target_modules": "all-linear"}))
    material.randomise(graft)
    model.train()  # lora_dropout is 0
    task = Causal()
    rows = []
    for share in (0.3,) if options.quick else (0.3, 1.0):
        batch = material.token_batch(material.SMOLLM2, 2 if options.quick else 4, 32 if options.quick else 128)
        batch = material.labelled(batch, share)

        def ours(batch: dict[str, Any] = batch) -> torch.Tensor:
            return task.loss(task.forward(model, batch), batch)

        def theirs(batch: dict[str, Any] = batch) -> torch.Tensor:
            loss: torch.Tensor = model(**batch, use_cache=False).loss
            return loss

        losses, gradients = {}, {}
        for name, side in {"ours": ours, "peer": theirs}.items():
            model.zero_grad()
            loss = side()
            loss.backward()
            losses[name] = float(loss.detach())
            gradients[name] = torch.cat([parameter.grad.flatten() for parameter in graft.parameters()])
        with torch.no_grad():
            labelled = task.forward(model, batch)
            exact = float(
                torch.nn.functional.cross_entropy(
                    labelled.hidden.double() @ labelled.head.weight.double().T,
                    batch["labels"][:, 1:][batch["labels"][:, 1:] != -100],
                )
            )
        # Rounding in float32 is relative: of a loss of 10 the last bit is 1e-6.
        difference = abs(losses["ours"] - losses["peer"]) / losses["peer"]
        off = {name: abs(loss - exact) / exact for name, loss in losses.items()}
        expect(
            difference <= 1e-6 or off["ours"] <= max(1e-6, off["peer"]),
            f"the losses differ by {difference:.2g} of {exact:.6g}; from float64: {off}",
        )
        apart = float((gradients["ours"] - gradients["peer"]).abs().max() / gradients["peer"].abs().max())
        expect(apart <= 1e-5, f"the gradients differ by {apart:.2g} of the largest")

        def step(side: Callable[[], torch.Tensor]) -> Callable[[], object]:
            return lambda: side().backward()

        timed = interleaved({"ours": step(ours), "peer": step(theirs)}, options.repeats, before=model.zero_grad)
        faster = timed["peer"].median / timed["ours"].median
        tokens, words = batch["input_ids"].numel(), model.config.vocab_size
        shared = {
            "model": "SmolLM2-135M, float32",
            "batch": f"{batch['input_ids'].shape[0]} x {batch['input_ids'].shape[1]} tokens, {share:.0%} labelled",
            "adapter": "LoRA r 8, all-linear, on both sides, without dropout",
            "peer": "model(input_ids, attention_mask, labels=labels, use_cache=False).loss",
            "loss": exact,
            "loss difference, relative": difference,
            "difference from the loss in float64, relative": off,
            "gradient difference, of the largest": apart,
        }
        held = {name: _held_by_loss(model, batch, name == "ours") for name in ("ours", "peer")}
        of_logits = held["ours"] / (tokens * words * 4)
        what = f"SmolLM2 {batch['input_ids'].shape[0]}x{batch['input_ids'].shape[1]}, {share:.0%} labelled"
        rows += [
            Row(
                goal="P4",
                what=f"{what}: step time",
                ours=timed["ours"].median,
                peer=timed["peer"].median,
                unit="s/step",
                ratio=faster,
                target="1.15 times faster" if share < 1 else "for comparison: no slower",
                reached=faster >= (1.15 if share < 1 else 1.0),
                worst={name: side.worst for name, side in timed.items()},
                settings={**shared, "times": {name: side.times for name, side in timed.items()}},
            ),
            Row(
                goal="P4",
                what=f"{what}: memory of head and loss, of the logits'",
                ours=held["ours"] / 1e6,
                peer=held["peer"] / 1e6,
                unit="MB",
                ratio=of_logits,
                target="at most 0.05",
                reached=of_logits <= 0.05,
                settings={**shared, "logits": f"{tokens} x {words} in float32: {tokens * words * 4 / 1e6:.0f} MB"},
            ),
        ]
    return rows


def _held_by_loss(model: Any, batch: dict[str, Any], ours: bool) -> int:
    """Bytes that head and loss hold at most at one time, gradients of the hidden states included."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    from graftwerk.tasks.block_loss import Head, block_loss

    labels, width = batch["labels"], model.config.hidden_size
    hidden = torch.randn(*labels.shape, width, requires_grad=True)
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    weight = model.get_output_embeddings().weight

    def run() -> None:
        if ours:
            block_loss(hidden[mask], Head(weight), labels[:, 1:][labels[:, 1:] != -100])[0].backward()
        else:
            ForCausalLMLoss(torch.nn.functional.linear(hidden, weight), labels, len(weight)).backward()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


if __name__ == "__main__":
    raise SystemExit(harness.main("P4", measure))
