"""Refusal of a run that cannot fit into memory, before its model is loaded; its plan beside what was measured after.

A trace takes a second or more, so small runs are let through by a bound from the model's configuration alone. A run is
refused only if its tensors alone exceed the memory there is: what the plan may be wrong about (the allocator, the
process) never refuses a run that fits.
"""

from __future__ import annotations

import math
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import MemoryShortage
from graftwerk.formatting import byte_size
from graftwerk.training.batch_sampler import BatchSampler
from graftwerk.training.callbacks.base import TrainingLoop
from graftwerk.training.distributed.launcher import fsdp_version, launched_world_size
from graftwerk.training.events import Event, Listener
from graftwerk.training.planning.calibration import learn
from graftwerk.training.planning.plan import Planner
from graftwerk.training.setup import Prepared

KEY = "training.check_memory"
WORTH_SECONDS = 20.0
"""Seconds of a training after which a plan to compare it with costs little beside it."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Settings of models whose layers are several times as large as their widths say."""
PROCESS = 1 << 30
"""More than a process takes beside its tensors."""


def check_memory(
    config: RunConfig, prepared: Prepared, num_processes: int | None, emit: Listener
) -> dict[str, Any] | None:
    """Raise if a training cannot fit into the memory that is available.

    Args:
        config: Settings of the run.
        prepared: Its rows.
        num_processes: Processes that train together; None finds the number as training does.
        emit: Listener of events; hears of a run that may not fit, and of one that cannot be planned.

    Returns:
        The plan (`Planner.plan`), or None if none was needed or possible.

    Raises:
        ResourceError: The tensors of one step are larger; the hint says what would fit.
    """
    if not config.training.check_memory:
        return None
    planner = Planner(config, prepared, num_processes)
    free = planner.available()
    if free is None or planner.num_processes * upper_bound(config, prepared, planner.architecture) <= free:
        return None
    emit(Event("phase", 0, name="planning the memory"))
    found = planned(planner)
    if why := found.get("why_not"):
        emit(Event("warning", 0, text=f"the memory of this run is not known: {why}"))
        return None
    try:
        refuse_unfit(planner, found)
    except MemoryShortage:
        emit(Event("unfit", 0, needed_bytes=found["memory"]["least_peak_bytes"], available_bytes=free))
        raise
    if not found["fits"]:
        peak = byte_size(found["memory"]["train_peak_bytes"])
        text = f"the plan of this run is {peak} of memory, and {byte_size(free)} are available: it may not fit"
        emit(Event("warning", 0, text=text))
    return found


def refuse_unfit(planner: Planner, found: dict[str, Any]) -> None:
    """Raise if the tensors of a planned run are larger than the memory that is available.

    Raises:
        ResourceError: They are, and `training.check_memory` is on; the hint says what would fit.
    """
    config, memory, free = planner.config, found["memory"], found["available_bytes"]
    if not config.training.check_memory or free is None or memory["least_peak_bytes"] <= free:
        return
    smaller = planner.fit(free, largest_batch=False)
    less = "a smaller model, a method that trains less, or shorter rows (data.max_length)"
    if smaller is not None:
        peak = byte_size(smaller["plan"]["memory"]["train_peak_bytes"])
        less = f"{' '.join(smaller['overrides'])} (planned peak {peak})"
    raise MemoryShortage(
        f"training `{config.method.name}` needs {byte_size(memory['least_peak_bytes'])} of memory at least "
        f"({byte_size(memory['weights_bytes'])} of weights, {byte_size(memory['activations_bytes'])} of activations, "
        f"{byte_size(memory['gradients_bytes'] + memory['optimizer_bytes'])} of gradients and optimizer; planned peak "
        f"{byte_size(memory['train_peak_bytes'])}), and {byte_size(free)} are available",
        hint=f"{less}; {KEY}=false skips this check",
    )


def planned_cost(
    plan: dict[str, Any] | None,
    config: RunConfig,
    prepared: Prepared,
    num_processes: int,
    trainer: TrainingLoop,
    peak: int | None,
) -> dict[str, float]:
    """Return the planned figures that a finished run is compared with.

    None after a short run without a plan, and of launched processes. The machine's calibration learns from the
    difference.

    Args:
        plan: The plan from before the training, or None.
        config: Settings of the run.
        prepared: Its rows.
        num_processes: Processes of this machine that shared the rows of a step, and whose memory is ``peak``.
        trainer: The trainer that has trained.
        peak: Measured peak of the training in bytes, or None.

    Returns:
        ``planned_peak_memory_bytes`` and ``planned_step_seconds``.
    """
    if num_processes != trainer.distributed.world_size:
        return {}  # what launched processes share is not in a plan
    if plan is None and trainer.state.seconds >= WORTH_SECONDS:
        plan = planned(Planner(config, prepared, num_processes))
    if plan is None or "why_not" in plan:
        return {}
    used, planned_peak = plan["calibration"], plan["memory"]["train_peak_bytes"]
    if peak is not None and trainer.clock.mean_step_seconds and trainer.state.seconds >= WORTH_SECONDS:
        learn(
            trainer.device.type,
            used["process_bytes"] + (peak - planned_peak) / num_processes,
            used["time_factor"] * trainer.clock.mean_step_seconds / plan["time"]["step_seconds"],
        )
    return {
        "planned_step_seconds": plan["time"]["step_seconds"],
        "planned_peak_memory_bytes": planned_peak,
    }


def planned(planner: Planner) -> dict[str, Any]:
    """Return the plan of a run without its largest batch, or ``why_not`` if its step cannot be traced."""
    if fsdp_version() and launched_world_size() != "1":
        return {"why_not": "the processes share the base (FSDP), and each one's part is not planned"}
    try:
        return planner.plan(largest_batch=False)
    except Exception as error:  # a model's code that needs values of tensors; its training may work all the same
        lines = str(error).strip().splitlines() or [""]
        return {"why_not": f"{type(error).__name__}: {lines[0][:200]}"}


def upper_bound(config: RunConfig, prepared: Prepared, architecture: Any) -> float:
    """Return bytes that one process of a training never exceeds, infinite for a model of unknown size.

    Everything is counted as if all weights were trained, with twice the values that the widest layers save.
    """
    text = architecture.get_text_config()
    width, vocabulary, depth = (
        getattr(text, name, None) for name in ("hidden_size", "vocab_size", "num_hidden_layers")
    )
    heads = getattr(text, "num_attention_heads", None)
    if not (width and vocabulary and depth and heads) or any(getattr(text, name, None) for name in EXPERTS):
        return math.inf
    depth += getattr(text, "decoder_layers", None) or getattr(text, "num_decoder_layers", None) or 0
    sizes = (getattr(text, name, None) for name in ("intermediate_size", "encoder_ffn_dim", "d_ff", "n_inner"))
    inner = max([4 * width, *(size for size in sizes if isinstance(size, int))])
    training, outputs = config.training, vocabulary if "LM" in prepared.task.auto_class().__name__ else width
    total = 0.0
    for rows, split in (
        (training.max_micro_batch_size, "train"),
        (training.eval_batch_size, "validation"),
    ):
        longest = BatchSampler(prepared.examples[split], rows, seed=0, group=False).longest
        layers = depth if split == "train" else 2
        saved = layers * (40 * width + 8 * inner + 6 * heads * longest) + 3 * outputs
        total = max(total, 2 * 4.0 * rows * longest * saved)
    weights = 4.0 * (2 * vocabulary * width + depth * (8 * width**2 + 4 * width * inner))
    return float(PROCESS + 5 * weights + total)
