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

    from graftwerk.methods.registry import parse_method
    from graftwerk.modeling.attach import attach
    from graftwerk.tasks.causal import Causal

    model = material.smollm2()
    graft = attach(model, parse_method({"name": "lora", "r": 8, "target_modules": "all-linear"}))
    material.randomise(graft)
    model.train()  # lora_dropout is 0
    task = Causal()
    rows = []
    unlabelled = material.token_batch(material.SMOLLM2, 2 if options.quick else 4, 32 if options.quick else 128)
    for share in (0.3,) if options.quick else (0.3, 1.0):
        batch = material.labelled(unlabelled, share)

        def ours(batch: dict[str, Any] = batch) -> torch.Tensor:
            return task.objective.loss(task.objective.forward(model, batch), batch)

        def theirs(batch: dict[str, Any] = batch) -> torch.Tensor:
            loss: torch.Tensor = model(**batch, use_cache=False).loss
            return loss

        def in_float64(batch: dict[str, Any] = batch) -> torch.Tensor:
            """What both sides round: the same hidden states, head and loss in float64."""
            labelled, wanted = task.objective.forward(model, batch), batch["labels"][:, 1:]
            hidden, weight = labelled.hidden.cpu().double(), labelled.head.weight.detach().cpu().double()
            return torch.nn.functional.cross_entropy(hidden @ weight.T, wanted[wanted != -100].cpu())

        losses, gradients = {}, {}
        for name, side in {"ours": ours, "peer": theirs, "exact": in_float64}.items():
            model.zero_grad()
            loss = side()
            loss.backward()
            losses[name] = float(loss.detach())
            gradients[name] = torch.cat([parameter.grad.flatten() for parameter in graft.parameters()])
        largest = gradients["exact"].abs().max()
        off = {name: abs(losses[name] / losses["exact"] - 1) for name in ("ours", "peer")}
        bent = {name: float((gradients[name] - gradients["exact"]).abs().max() / largest) for name in ("ours", "peer")}
        # The peer is no measure of what is right: torch's softmax over 49,152 words in float32 is further off.
        expect(off["ours"] <= 1e-6, f"the loss is off by {off['ours']:.2g} of {losses['exact']:.6g}; {off}")
        expect(off["peer"] <= 1e-5, f"transformers' loss is another: off by {off['peer']:.2g}")
        expect(bent["ours"] <= 1e-5, f"the gradients are off by {bent['ours']:.2g} of the largest; {bent}")

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
            "loss": losses,
            "loss, relative difference from float64": off,
            "gradients, difference from float64, of the largest": bent,
        }
        held = {name: _held_by_loss(model, batch, name == "ours") for name in ("ours", "peer")}
        of_logits = held["ours"] / (tokens * words * 4)
        what = f"SmolLM2 {batch['input_ids'].shape[0]}x{batch['input_ids'].shape[1]}, {share:.0%} labelled"
        rows += [
            Row(
                goal="P4",
                what=f"{what}: loss, relative difference from float64",
                ours=off["ours"],
                peer=off["peer"],
                unit="of the loss",
                ratio=None,
                target="at most 1e-6",
                reached=off["ours"] <= 1e-6,
                settings=shared,
                note=f"the two sides differ by {abs(losses['ours'] / losses['peer'] - 1):.2g}, by the rounding of "
                "torch's softmax over all words; both are compared with the same head and loss in float64",
            ),
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

    from graftwerk.kernels.chunked_cross_entropy import Head, chunked_cross_entropy

    labels, width = batch["labels"], model.config.hidden_size
    hidden = torch.randn(*labels.shape, width, device=labels.device, requires_grad=True)
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    weight = model.get_output_embeddings().weight

    def run() -> None:
        if ours:
            chunked_cross_entropy(hidden[mask], Head(weight), labels[:, 1:][labels[:, 1:] != -100])[0].backward()
        else:
            ForCausalLMLoss(torch.nn.functional.linear(hidden, weight), labels, len(weight)).backward()

    if labels.device.type != "cpu":
        return material.peak_above_weights(run)
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
