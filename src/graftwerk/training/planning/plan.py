"""The plan of a run: memory, time and size before any weight is loaded, and what to change so that it fits.

Memory on a CPU is that of the process above its start, as a run's manifest measures it: the weights, what the C
library's allocator holds for the tensors of a traced step (`step_trace`, `allocator`), and what the process takes
beside (`calibration`). On CUDA it is what torch's caching allocator reserves. Deep models are traced at two depths and
carried on by layer, which is exact for equal layers.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftwerk.config import RunConfig
from graftwerk.devices import best_device
from graftwerk.machine import available
from graftwerk.training.batch_sampler import BatchSampler
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.mode import base_dtype
from graftwerk.training.num_processes import resolve_num_processes
from graftwerk.training.planning.allocator import held_by_cuda, held_by_libc, products_held, repeated
from graftwerk.training.planning.calibration import QUANTIZED_BYTES, calibration
from graftwerk.training.planning.call_times import LINEAR_SPEED, CallTimes, speeds_of
from graftwerk.training.planning.step_time import StepWork, evaluated_shapes, mean_step, shapes_of
from graftwerk.training.planning.step_trace import shallower, trace_step
from graftwerk.training.run_dir import RunDir
from graftwerk.training.setup import Prepared, prepare, with_initial_text
from graftwerk.training.warm_start import warm_labels

DEPTHS = (4, 8)
"""Depths at which deeper models are traced, counted above the chosen top layers; shallower models are traced whole."""
_TOP = re.compile(r"top-(\d+)")


@dataclass(frozen=True)
class Memory:
    """Bytes of a run, of all its processes together.

    Attributes:
        train_peak_bytes: Peak of training, with the evaluations on the way and the filling of the activation cache.
        eval_peak_bytes: Peak of evaluation.
        least_peak_bytes: Bytes that training cannot do without: the tensors alone, of one row if memory errors halve
            the batch (accelerators).
        weights_bytes: The model as it is loaded.
        trained_bytes: Trained parameters.
        gradients_bytes: Their gradients.
        optimizer_bytes: The optimizer's state.
        cached_bytes: Hidden states of frozen layers that are computed once.
        activations_bytes: What the forward pass keeps for the backward pass.
        workspace_bytes: The rest of the peak: the loss, temporary tensors, the allocator, the process.
    """

    train_peak_bytes: int
    eval_peak_bytes: int
    least_peak_bytes: int
    weights_bytes: int
    trained_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    cached_bytes: int
    activations_bytes: int
    workspace_bytes: int


class Planner:
    """Plan runs on the same rows: the rows are read and encoded once.

    Args:
        config: Settings of the run.
        prepared: Its rows, if they are read already.
        num_processes: Processes that train together; None finds the number as training does.

    Raises:
        ConfigError, DataError, ModelError, ResourceError: Training would raise it while it prepares.

    Example:
        >>> from graftwerk.config import RunConfig
        >>> planner = Planner(RunConfig.load("run.yaml"))  # doctest: +SKIP
        >>> planner.plan()["memory"]["train_peak_bytes"]  # doctest: +SKIP
        425413632
    """

    def __init__(self, config: RunConfig, prepared: Prepared | None = None, num_processes: int | None = None) -> None:
        from graftwerk.models.load import load_config

        self.config, self.device = config.anchored(), best_device()
        self._known: dict[str, tuple[dict[str, float], StepWork]] = {}
        self.num_processes = num_processes or _num_processes(self.config)  # before anything is computed here
        self._trains_here = num_processes is not None
        with self._threads_of_training():
            self.calibration = calibration(self.device.type)
        self.prepared = prepared or prepare(
            self.config, lambda event: None, warm_labels(self.config.training.warm_start)
        )
        self.architecture = load_config(self.config.model, self.config.revision)
        for key, value in self.prepared.task.model_kwargs(self.prepared.splits).items():
            setattr(self.architecture, key, value)

    def plan(self, config: RunConfig | None = None, *, largest_batch: bool = True) -> dict[str, Any]:
        """Return the plan of the run, or of the same run with other settings of its method or training.

        Args:
            config: The other settings; model, task and data are those of the planner.
            largest_batch: Look for the largest batch too, which takes as long again.

        Returns:
            ``memory`` (`Memory`), ``time`` (``step_seconds`` of a mean step, ``epoch_seconds``, ``training_seconds``
            with the evaluations), ``adapter_bytes``, ``available_bytes`` (None if unknown), ``fits``, ``largest_batch``
            (None also where memory does not grow with the rows), ``processes``, ``calibration`` (`Calibration`) and
            ``traced`` (``rows`` of a micro-batch, ``tokens`` of its longest row).

        Raises:
            ConfigError, UnsupportedError: The method does not suit the model.
        """
        config = self.config if config is None else config.anchored()
        found, free = self._measured(config), self.available()
        memory = self._memory(found, config)
        largest = None if free is None or not largest_batch else self._largest_batch(config, found, memory, free)
        return {
            "memory": asdict(memory),
            "time": self._time(found, config),
            "adapter_bytes": round(found["trained"]),
            "available_bytes": free,
            "fits": None if free is None else memory.train_peak_bytes <= free,
            "largest_batch": largest,
            "processes": self.num_processes,
            "calibration": asdict(self.calibration),
            "traced": {"rows": self._micro_batch(config), "tokens": self._longest()},
        }

    def fit(self, limit: int, *, largest_batch: bool = True) -> dict[str, Any] | None:
        """Return the first change of settings with which training takes at most ``limit`` bytes.

        Tried in this order: nothing; fewer rows in a micro-batch, and as many more micro-batches in a step; fewer rows
        in a batch of the evaluation where that is the peak; activations recomputed in backward; all of them. The result
        of training is the same but for rounding and dropout.

        Returns:
            ``overrides`` (``key=value``, as on the command line) and ``plan``, or None if nothing of it suffices.
        """
        training, found = self.config.training, self._measured(self.config)
        if self.num_processes * sum(found[part] for part in ("weights", "trained", "gradients", "optimizer")) > limit:
            return None
        rows, evaluated = _halvings(training.per_device_train_batch_size), training.eval_batch_size
        for recompute in dict.fromkeys((training.gradient_checkpointing, True)):
            for size in (evaluated >> halvings for halvings in range(evaluated.bit_length())):
                if (fitting := self._fitting(limit, rows, size, recompute)) is not None:
                    config, changes = fitting
                    overrides = [f"{key}={value}".replace("=True", "=true") for key, value in changes.items()]
                    return {"overrides": overrides, "plan": self.plan(config, largest_batch=largest_batch)}
                smallest = self._measured(self._changed(rows[-1], size, recompute)[0])
                if smallest["alive"] <= max(smallest[part] for part in ("step_peak", "filling_peak", "errors")):
                    break  # evaluation is not the peak
        return None

    def _fitting(
        self, limit: int, sizes: list[int], evaluated: int, recompute: bool
    ) -> tuple[RunConfig, dict[str, Any]] | None:
        """Return the run with the most rows in a micro-batch that fits, as `_changed` does, or None."""
        most, least = (self._peak(self._changed(size, evaluated, recompute)[0]) for size in (sizes[0], sizes[-1]))
        slope = (most - least) / max(sizes[0] - sizes[-1], 1)
        for size in sizes:
            if least + slope * (size - sizes[-1]) > 1.05 * limit:
                continue  # by far too much: not worth a trace
            config, changes = self._changed(size, evaluated, recompute)
            if self._peak(config) <= limit:
                return config, changes
        return None

    def _changed(self, rows: int, evaluated: int, recompute: bool) -> tuple[RunConfig, dict[str, Any]]:
        """Return the run with batches of so many rows, and what that changes in the settings."""
        training, changes = self.config.training, dict[str, Any]()
        if rows != training.per_device_train_batch_size:
            changes |= training.micro_batch_overrides(rows)
        if recompute != training.gradient_checkpointing:
            changes["training.gradient_checkpointing"] = recompute
        tree = self.config.model_dump(mode="json")
        if evaluated < RunConfig.build(tree, changes).training.eval_batch_size:  # by default it falls with the rows
            changes["training.per_device_eval_batch_size"] = evaluated
        return RunConfig.build(tree, changes) if changes else self.config, changes

    def _peak(self, config: RunConfig) -> int:
        return self._memory(self._measured(config), config).train_peak_bytes

    def _measured(self, config: RunConfig) -> dict[str, float]:
        """Return the figures of a trace, carried on to the depth of the model."""
        return self._traced(config)[0]

    def _traced(self, config: RunConfig) -> tuple[dict[str, float], StepWork]:
        """Return these and the work of the traced step; each run is traced once."""
        key = config.model_dump_json()
        if key not in self._known:
            self._known[key] = self._carried(config)
        return self._known[key]

    def _carried(self, config: RunConfig) -> tuple[dict[str, float], StepWork]:
        depth, chosen = int(self.architecture.num_hidden_layers), getattr(config.method, "layers", None)
        top = _TOP.fullmatch(chosen) if isinstance(chosen, str) else None
        low, high = (layers + (int(top[1]) if top else 0) for layers in DEPTHS)
        if depth <= high or (chosen is not None and top is None):
            return self._figures(config, self.architecture)
        (lower, less), (higher, more) = (
            self._figures(config, shallower(self.architecture, layers)) for layers in (low, high)
        )
        factor = (depth - low) / (high - low)
        carried = {key: lower[key] + factor * (higher[key] - lower[key]) for key in lower}
        # The peak of a few layers may be that of an evaluation, and the peak of many that of a step.
        evaluated = carried["evaluation_peak"] if self.prepared.examples["validation"] else 0
        alive = max(carried["step_peak"], carried["filling_peak"], carried["errors"], evaluated)
        # Gaps between blocks keep their share, or grow with depth where live gradients fragment the freed activations.
        held = max(carried["held"], alive * higher["held"] / max(higher["alive"], 1))
        return {**carried, "alive": alive, "held": held}, less.carried_on(more, factor)

    def _figures(self, config: RunConfig, architecture: Any) -> tuple[dict[str, float], StepWork]:
        from graftwerk.models.hardware import compute_type

        prepared = self.prepared
        if config.method != self.config.method:
            prepared = replace(prepared, method=with_initial_text(config.method, prepared.tokenizer))
        with self._threads_of_training():
            compute = compute_type(config.compute_type, self.device)
        weights_dtype = base_dtype(config, compute, self.device)
        rows = {"train": self._micro_batch(config), "eval": config.training.eval_batch_size}
        own = RunConfig.build(
            config.model_dump(mode="json"),
            {f"training.per_device_{part}_batch_size": size for part, size in rows.items()},
        )
        with tempfile.TemporaryDirectory() as folder:
            types = {"dtype": compute, "weights_dtype": weights_dtype}
            shallow, kind = copy.deepcopy(architecture), self.device.type
            trace = trace_step(own, prepared, shallow, Path(folder) / "none", **types, kind=kind)
        evaluates, (steps, _, every) = bool(self.prepared.examples["validation"]), self._steps(config)
        series = repeated(trace, min(steps, every), max(0, steps - every) if evaluates else None)
        beside = 0
        if self.device.type == "cpu":
            train, validation = (self.prepared.examples[split] for split in ("train", "validation"))
            shapes = shapes_of(train, config.training, self._micro_batch(config), self.num_processes, steps, compute)
            evaluated = evaluated_shapes(validation, config.training.eval_batch_size, compute)
            products = trace.products * shapes + trace.evaluated_products * evaluated
            beside = products_held(products + trace.fixed_products)
        held = held_by_cuda(series.events) if self.device.type == "cuda" else held_by_libc(series) or 0
        evaluation = trace.evaluation_peak if evaluates else 0
        errors = trace.codes if config.method.starts_from_errors else 0  # kept until the first step, as wide as these
        alive = max(trace.step_peak, trace.filling_peak, evaluation, errors)
        parts = {key: float(value) for key, value in vars(trace).items() if isinstance(value, int | float)}
        parts |= {"alive": alive, "held": max(held, alive)}
        return {**parts, "beside": beside, "errors": errors}, trace.work

    def _memory(self, found: Mapping[str, float], config: RunConfig) -> Memory:
        process, each = self._process_bytes(config), self.num_processes
        peak, least = found["weights"] + found["held"] + found["beside"] + process, found["weights"] + found["alive"]
        if self.device.type != "cpu":  # where filling the cache halves its rows if memory runs out
            evaluated = found["evaluation_peak"] if self.prepared.examples["validation"] else 0
            least = found["weights"] + max(found["step_peak"], evaluated)
        if self.device.type != "cpu" and each == 1 and self._micro_batch(config) > 1:
            per_row = found["kept"] / self._micro_batch(config)
            least -= per_row * (self._micro_batch(config) - 1)
        names = ("weights", "trained", "gradients", "optimizer", "cached", "kept")
        parts = {name: round(each * found[name]) for name in names}
        return Memory(
            train_peak_bytes=round(each * peak),
            eval_peak_bytes=round(each * (found["weights"] + found["evaluation_peak"] + process)),
            least_peak_bytes=round(each * least),
            weights_bytes=parts["weights"],
            trained_bytes=parts["trained"],
            gradients_bytes=parts["gradients"],
            optimizer_bytes=parts["optimizer"],
            cached_bytes=parts["cached"],
            activations_bytes=parts["kept"],
            workspace_bytes=max(0, round(each * peak) - sum(parts.values())),
        )

    def _process_bytes(self, config: RunConfig) -> float:
        imported = QUANTIZED_BYTES if config.quantization is not None and self.device.type == "cpu" else 0
        return self.calibration.process_bytes + imported

    def _steps(self, config: RunConfig) -> tuple[int, int, int]:
        """Return the steps of the training, those of an epoch, and those from one evaluation to the next."""
        training = config.training
        per_epoch = math.ceil(len(self.prepared.examples["train"]) / training.global_batch_size())
        return training.num_steps(per_epoch), per_epoch, training.eval_steps or per_epoch

    def _largest_batch(self, config: RunConfig, found: Mapping[str, float], memory: Memory, free: int) -> int | None:
        """Return the most rows of a micro-batch that fit: a step's tensors grow by the same bytes with each row.

        None if they do not grow (tokens bound a micro-batch, or the optimizer takes more than the rows).
        """
        rows = config.training.per_device_train_batch_size
        tree = config.model_dump(mode="json")
        less = self._measured(RunConfig.build(tree, {"training.per_device_train_batch_size": rows // 2 or 2}))
        filling = self.num_processes * (found["weights"] + found["filling_peak"] + self._process_bytes(config))
        if max(memory.eval_peak_bytes, filling) > free:
            return 0
        apart = found["rows"] - less["rows"]  # there may be fewer rows than a micro-batch asks for
        grown = 0.0 if apart == 0 else (found["step_peak"] - less["step_peak"]) / apart
        if grown <= 0:
            return None
        share = found["held"] / max(found["alive"], 1)
        # the peak may be that of an evaluation or of filling the cache, which do not grow
        left = free - memory.train_peak_bytes + self.num_processes * share * (found["alive"] - found["step_peak"])
        return max(0, int(self.num_processes * found["rows"] + left / (share * grown)))

    def _time(self, found: Mapping[str, float], config: RunConfig) -> dict[str, float]:
        """Return the seconds of a mean step, of an epoch, and of the training with its evaluations."""
        from graftwerk.models.hardware import compute_type

        factor, train = self.calibration.time_factor, self.prepared.examples["train"]
        with self._threads_of_training():
            compute = compute_type(config.compute_type, self.device)
            times = CallTimes(speeds_of(compute, self.device.type), self.device.type)
            step = mean_step(train, config.training, self._micro_batch(config), self.num_processes, compute)
            step_seconds = factor * step.seconds(self._traced(config)[1], times)
        steps, per_epoch, every = self._steps(config)
        held_out = sum(example.length for example in self.prepared.examples["validation"])
        evaluated = factor * found["evaluated"] * held_out / (LINEAR_SPEED * times.speeds.operations)
        return {
            "step_seconds": step_seconds,
            "epoch_seconds": step_seconds * per_epoch,
            "training_seconds": step_seconds * steps + evaluated * max(1.0, steps / every),
        }

    @contextmanager
    def _threads_of_training(self) -> Iterator[None]:
        """Compute on as many threads as a process of the training inside the block, on which speeds depend."""
        from graftwerk.models.hardware import set_threads, threads_wanted

        before = torch.get_num_threads()
        threads = before if self._trains_here else max(1, threads_wanted() // self.num_processes)
        if threads == before:
            yield
            return
        set_threads(threads)
        try:
            yield
        finally:
            set_threads(before)

    def _micro_batch(self, config: RunConfig) -> int:
        return math.ceil(config.training.per_device_train_batch_size / self.num_processes)

    def available(self) -> int | None:
        """Return the bytes of memory there are for a run, or None if the machine does not say."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            return int(free)
        return available()

    def _longest(self) -> int:
        return BatchSampler(self.prepared.examples["train"], 1, seed=0, group=False).longest


def plan(
    config: RunConfig | str | Path | Mapping[str, Any], *, fit: int | None = None, **overrides: Any
) -> dict[str, Any]:
    """Plan a run: its memory, its time and the size of its adapter, before any weight is loaded.

    Args:
        config: A run file, its content as a mapping, or a `RunConfig`.
        fit: Bytes that training may take at most; the plan then says under ``fit`` what to change (`Planner.fit`).
        overrides: Settings by name, over those of the run file, as for `train`.

    Returns:
        The plan, as `Planner.plan` describes it.

    Raises:
        ConfigError, DataError, ModelError, ResourceError: Training would raise it before it loads the model.

    Example:
        >>> plan("run.yaml", method="lora")["memory"]["train_peak_bytes"]  # doctest: +SKIP
        425413632
    """
    planner = Planner(RunConfig.of(config, overrides))
    found = planner.plan()
    return found if fit is None else {**found, "fit": planner.fit(fit)}


def _num_processes(config: RunConfig) -> int:
    """Return the number of processes that would train, which need not be possible here."""
    asked = config.training.processes
    if asked != "auto":
        return asked
    return resolve_num_processes(config, Checkpoints(RunDir(config.output_dir).checkpoints), False)


def _halvings(rows: int) -> list[int]:
    """Return the numbers of rows that a batch can be cut into by halving it, the whole batch first."""
    return [rows >> halvings for halvings in range(rows.bit_length()) if rows % (1 << halvings) == 0]
