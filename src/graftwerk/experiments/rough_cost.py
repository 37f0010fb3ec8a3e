"""A rough figure for the time and the memory of a training, from counts alone: nothing is run but a short probe.

Operations: two a parameter and token in the forward pass, two for the gradients of activations, two more for those of
trained parameters; frozen layers that are computed once count once. The machine does them at a share of the speed that
a square matrix product reaches. Memory: the process itself, weights, 12 bytes a trained parameter (gradient and AdamW's
moments), and what a micro-batch of long rows leaves for the backward pass. Within a factor of two or so for the models
it was tried on; a plan that measures may take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.devices import best_device
from graftwerk.models.hardware import SIDE, compute_type, probe

EFFICIENCY = 0.12
"""Share of the speed of a square matrix product that training reaches: MiniLM on two cores."""
STEP_SECONDS = 0.03
"""Of a step whatever the model: Python, the optimizer, the batch."""
PROCESS_BYTES = 400_000_000
"""Of Python with torch and transformers."""
VALUES_A_TOKEN = 20
"""Values that a layer saves for backward, for each token and each dimension of its width."""


def rough_cost(config: RunConfig, model: Any, plan: Mapping[str, Any]) -> dict[str, float]:
    """Return ``seconds`` of training with its evaluations, and ``memory_bytes`` of the process, both rough.

    Args:
        config: Settings of the run.
        model: The model, with or without storage.
        plan: ``data``, ``parameters``, ``steps``, ``steps_per_epoch``, ``rows_per_step`` and ``trunk``, as `preflight`
            returns them.
    """
    from torch import nn

    training, rows, lengths = config.training, plan["data"]["rows"], plan["data"]["lengths"]
    tables = sum(it.weight.numel() for it in model.modules() if isinstance(it, nn.Embedding))
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    dense = plan["parameters"]["total"] - tables + (head.weight.numel() if tied else 0)
    trained = min(plan["parameters"]["trained"], dense)
    tokens = lengths["train"]["tokens"] / rows["train"]
    frozen = plan["trunk"]["layers_skipped"] / (plan["trunk"]["layers"] or 1) if plan["trunk"]["on"] else 0.0
    passes = plan["steps"] * plan["rows_per_step"] * tokens
    evaluations = max(1, plan["steps"] // (training.eval_steps or plan["steps_per_epoch"]))
    held_out = {"validation": evaluations, "test": 1}
    seen = sum(times * lengths[name]["tokens"] for name, times in held_out.items() if name in rows)
    operations = (1 - frozen) * (4 * dense * passes + 2 * dense * seen) + 2 * trained * passes
    operations += 2 * frozen * dense * sum(lengths[name]["tokens"] for name in rows)
    device = best_device()
    name = str(compute_type(training.compute_type, device)).removeprefix("torch.")
    speed = EFFICIENCY * 2 * SIDE.get(device.type, 1024) ** 3 / probe(device.type)[name]

    micro = training.per_device_train_batch_size * lengths["train"]["p95"]
    layers = 2 if training.gradient_checkpointing else (1 - frozen) * model.config.num_hidden_layers
    saved = 4 * micro * model.config.hidden_size * VALUES_A_TOKEN * layers
    base = 4 * plan["parameters"]["total"]
    if config.quantization is not None:
        linear = plan["parameters"]["total"] - tables - (0 if tied or head is None else head.weight.numel())
        base -= (4 - config.quantization.bits / 8) * linear
    memory = PROCESS_BYTES + base + 12 * plan["parameters"]["trained"] + saved
    seconds = plan["steps"] * STEP_SECONDS + operations / speed
    return {"seconds": float(f"{seconds:.2g}"), "memory_bytes": float(f"{memory + plan['trunk']['bytes']:.2g}")}
