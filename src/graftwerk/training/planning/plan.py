"""The plan of a run: memory, time and size before any weight is loaded, and what to change so that it fits.

Memory on a CPU is that of the process above its start, as a run's manifest measures it: the weights, what the C
library's allocator holds for the tensors of a traced step (`step_trace`, `allocator`), and `PROCESS_BYTES`. On CUDA it
is what torch's caching allocator reserves. Deep models are traced at two depths and carried on by layer, which is exact
for equal layers.
"""

from __future__ import annotations

import copy
import math
import tempfile
from array import array
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftwerk.config import RunConfig
from graftwerk.devices import best_device
from graftwerk.machine import available
from graftwerk.training.planning.allocator import held_by_cuda, held_by_libc
from graftwerk.training.planning.step_trace import StepTrace, trace_step
from graftwerk.training.setup import Prepared, prepare, with_initial_text
from graftwerk.training.warm_start import warm_labels

PROCESS_BYTES = 100_000_000
"""Memory of a training beside its tensors: loggers, kernels' scratch, gaps between blocks (70 to 150 MB measured)."""
WHOLE = 6
"""Layers up to which a model is traced as a whole."""
DEPTHS = (2, 4)
"""Depths at which deeper models are traced."""
EFFICIENCY = 0.35
"""Share of the speed of a square matrix product that the products of a step reach (MiniLM and SmolLM2 on two cores)."""
CALL_SECONDS = 20e-6
"""Of each operation, whatever its size."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a run.

    Attributes:
        train_peak_bytes: Peak of training.
        eval_peak_bytes: Peak of evaluation.
        weights_bytes: The model as it is loaded.
        trained_bytes: Trained parameters.
        gradients_bytes: Their gradients.
        optimizer_bytes: The optimizer's state.
        activations_bytes: What the forward pass keeps for the backward pass.
        workspace_bytes: The rest of the peak: the loss, temporary tensors, the allocator, the process.
    """

    train_peak_bytes: int
    eval_peak_bytes: int
    weights_bytes: int
    trained_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int


class Planner:
    """Plan runs on the same rows: the rows are read and encoded once.

    Args:
        config: Settings of the run.

    Raises:
        ConfigError, DataError, ModelError, ResourceError: Training would raise it while it prepares.

    Example:
        >>> from graftwerk.config import RunConfig
        >>> planner = Planner(RunConfig.load("run.yaml"))  # doctest: +SKIP
        >>> planner.plan()["memory"]["train_peak_bytes"]  # doctest: +SKIP
        425413632
    """

    def __init__(self, config: RunConfig) -> None:
        from graftwerk.models.load import load_config

        self.config = config.anchored()
        self.prepared = prepare(self.config, lambda event: None, warm_labels(self.config.training.warm_start))
        self.architecture = load_config(self.config.model, self.config.revision)
        self.device = best_device()
        for key, value in self.prepared.task.model_kwargs(self.prepared.splits).items():
            setattr(self.architecture, key, value)

    def plan(self, config: RunConfig | None = None) -> dict[str, Any]:
        """Return the plan of the run, or of the same run with other settings of its method or training.

        Args:
            config: The other settings; model, task and data are those of the planner.

        Returns:
            ``memory`` (`Memory`), ``time`` (``step_seconds``, ``epoch_seconds``), ``adapter_bytes``,
            ``available_bytes`` (None if the machine does not say), ``fits`` and ``largest_batch`` (None as well), and
            ``traced`` (``rows`` of a micro-batch and ``tokens`` of its longest row).

        Raises:
            ConfigError, UnsupportedError: The method does not suit the model.
        """
        config = self.config if config is None else config.anchored()
        found = self._measured(config)
        training, free = config.training, self._available()
        memory = self._memory(found)
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        steps = math.ceil(len(self.prepared.examples["train"]) / rows)
        step_seconds = self._step_seconds(found, config)
        return {
            "memory": asdict(memory),
            "time": {"step_seconds": step_seconds, "epoch_seconds": step_seconds * steps},
            "adapter_bytes": found["trained"],
            "available_bytes": free,
            "fits": None if free is None else memory.train_peak_bytes <= free,
            "largest_batch": None if free is None else self._largest_batch(config, found, free),
            "traced": {"rows": training.per_device_train_batch_size, "tokens": self._longest()},
        }

    def fit(self, limit: int) -> dict[str, Any] | None:
        """Return the first change of settings with which training takes at most ``limit`` bytes.

        Tried in this order: nothing; fewer rows in a micro-batch, and as many more micro-batches in a step; activations
        recomputed in backward; both. The result of training is the same but for rounding and dropout.

        Returns:
            ``overrides`` (``key=value``, as on the command line) and ``plan``, or None if nothing of it suffices.
        """
        training = self.config.training
        rows = training.per_device_train_batch_size
        sizes = [rows >> halvings for halvings in range(rows.bit_length()) if rows % (1 << halvings) == 0]
        for recompute in dict.fromkeys((training.gradient_checkpointing, True)):
            for size in sizes:
                changes: dict[str, Any] = {}
                if size != rows:
                    steps = training.gradient_accumulation_steps * rows // size
                    changes |= {"training.per_device_train_batch_size": size}
                    changes |= {"training.gradient_accumulation_steps": steps}
                if recompute != training.gradient_checkpointing:
                    changes |= {"training.gradient_checkpointing": recompute}
                config = RunConfig.build(self.config.model_dump(mode="json"), changes) if changes else self.config
                if self._memory(self._measured(config)).train_peak_bytes <= limit:
                    return {
                        "overrides": [f"{key}={_text(value)}" for key, value in changes.items()],
                        "plan": self.plan(config),
                    }
        return None

    def _measured(self, config: RunConfig) -> dict[str, int]:
        """Return the figures of a trace, carried on to the depth of the model."""
        depth = int(self.architecture.num_hidden_layers)
        if depth <= WHOLE or _chooses_layers(config):
            return self._figures(config, self.architecture)
        low, high = (self._figures(config, _cut(self.architecture, layers)) for layers in DEPTHS)
        factor = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        carried = {key: round(low[key] + factor * (high[key] - low[key])) for key in low}
        # Gaps between blocks are no sum over layers: they keep their share.
        return {**carried, "held": round(carried["alive"] * high["held"] / max(high["alive"], 1))}

    def _figures(self, config: RunConfig, architecture: Any) -> dict[str, int]:
        prepared = self.prepared if config.method == self.config.method else _with_method(self.prepared, config)
        with tempfile.TemporaryDirectory() as folder:
            trace = trace_step(
                config, prepared, copy.deepcopy(architecture), self._dtype(config), Path(folder) / "none"
            )
        figures = {
            name: getattr(trace, name)
            for name in ("weights", "trained", "optimizer", "gradients", "kept", "operations", "calls")
        }
        events = _without_model(trace)
        held = held_by_cuda(events) if self.device.type == "cuda" else held_by_libc(events) or 0
        figures |= {"alive": trace.step_peak, "held": max(held, trace.step_peak), "evaluation": trace.evaluation_peak}
        return figures

    def _memory(self, found: dict[str, int]) -> Memory:
        process = 0 if self.device.type == "cuda" else PROCESS_BYTES
        peak = found["weights"] + found["held"] + process
        parts = sum(found[part] for part in ("weights", "trained", "gradients", "optimizer", "kept"))
        return Memory(
            train_peak_bytes=peak,
            eval_peak_bytes=found["weights"] + found["evaluation"] + process,
            weights_bytes=found["weights"],
            trained_bytes=found["trained"],
            gradients_bytes=found["gradients"],
            optimizer_bytes=found["optimizer"],
            activations_bytes=found["kept"],
            workspace_bytes=max(0, peak - parts),
        )

    def _largest_batch(self, config: RunConfig, found: dict[str, int], free: int) -> int:
        """Return the most rows of a micro-batch that fit: what is alive grows by the same bytes with each row."""
        rows = config.training.per_device_train_batch_size
        other = rows // 2 or 2
        tree = config.model_dump(mode="json")
        less = self._measured(RunConfig.build(tree, {"training.per_device_train_batch_size": other}))
        per_row = max(1.0, (found["alive"] - less["alive"]) / (rows - other) * found["held"] / max(found["alive"], 1))
        return max(0, int(rows + (free - self._memory(found).train_peak_bytes) / per_row))

    def _step_seconds(self, found: dict[str, int], config: RunConfig) -> float:
        from graftwerk.models.hardware import SIDE, probe

        kind = self.device.type
        name = str(self._dtype(config)).removeprefix("torch.")
        speed = EFFICIENCY * 2 * SIDE.get(kind, 1024) ** 3 / probe(kind)[name]
        return found["operations"] / speed + found["calls"] * CALL_SECONDS

    def _dtype(self, config: RunConfig) -> torch.dtype:
        from graftwerk.models.hardware import compute_type

        return compute_type(config.compute_type, self.device)

    def _available(self) -> int | None:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            return int(free)
        return available()

    def _longest(self) -> int:
        return max(example.length for example in self.prepared.examples["train"])


def _without_model(trace: StepTrace) -> array[int]:
    """Return the allocations of a trace without those of the model as it is loaded, which is mapped from its file."""
    made, kept = 0, array("q")
    for event in trace.events:
        made += event >= 0
        if event >= 0:
            kept.append(0 if made <= trace.loaded else event)
        elif -event > trace.loaded:
            kept.append(event)
    return kept


def _cut(architecture: Any, layers: int) -> Any:
    """Return the configuration of the same model with fewer layers in each of its stacks."""
    shallow = copy.deepcopy(architecture)
    whole = int(architecture.num_hidden_layers)
    for name, value in list(vars(shallow).items()):
        if isinstance(value, list) and len(value) == whole:  # what each layer is
            setattr(shallow, name, value[:layers])
    shallow.num_hidden_layers = layers
    for name in ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(shallow, name, None), int):
            setattr(shallow, name, layers)
    return shallow


def _chooses_layers(config: RunConfig) -> bool:
    """Return True if a method is placed on some layers only, so that layers are not alike."""
    return any(getattr(config.method, name, None) for name in ("layers", "last_layers", "layers_to_transform"))


def _with_method(prepared: Prepared, config: RunConfig) -> Prepared:
    return replace(prepared, method=with_initial_text(config.method, prepared.tokenizer))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
