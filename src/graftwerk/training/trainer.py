"""The training loop.

Read `Trainer.fit` first: it takes steps and, between them, runs callbacks, saves and stops.

Legend: a *step* is one update of the optimizer from ``rows_per_step`` rows; it is computed in *micro-batches*, on one
or several processes. Everything that the next step depends on is in `TrainState`, the parameters, the optimizer's
moments and the random generators, and goes into every checkpoint; row order and learning rate follow from the step's
number. Logging, evaluation, health checks and early stopping are callbacks (`training/callbacks/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graftwerk.devices import is_out_of_memory, release
from graftwerk.errors import RunInterrupted
from graftwerk.modeling.attach import Adapter
from graftwerk.tasks.base import Task
from graftwerk.tasks.packing import check_packing
from graftwerk.training import optim, rng
from graftwerk.training.activation_cache.cache import ActivationCache
from graftwerk.training.batch_sampler import BatchSampler
from graftwerk.training.callbacks.base import Outcome, StepResult
from graftwerk.training.callbacks.defaults import default_callbacks
from graftwerk.training.callbacks.early_stopping import EarlyStopping
from graftwerk.training.callbacks.validation import Validation
from graftwerk.training.checkpoint import Snapshot
from graftwerk.training.class_weights import weighted_task
from graftwerk.training.distributed import Distributed, connect
from graftwerk.training.events import Event
from graftwerk.training.gradients import ForwardPasses, GradientAccumulator
from graftwerk.training.mode import check_compute_type, check_placement, training_mode
from graftwerk.training.oom import halve_micro_batch, out_of_memory_error
from graftwerk.training.retention.retention import Retention
from graftwerk.training.run_dir import TRUNK
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.snapshot import load_state_dict, state_dict
from graftwerk.training.step_batches import StepBatches
from graftwerk.training.timing import Clock
from graftwerk.training.trainer_inputs import RunContext, TrainingData
from graftwerk.training.trainer_state import TrainState
from graftwerk.training.validation import Evaluator, check_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwerk.training.compilation import CompiledStacks

SEED_STRIDE = 1_000_003
"""Training draws from other seeds than initialisation, and each process from its own."""


class Trainer:
    """Train an adapter that is attached and active on its model.

    Args:
        adapter: Adapter to train; its model is moved to the device that accelerate chooses.
        task: Task whose loss is minimized.
        tokenizer: Tokenizer of the model.
        data: Encoded rows.
        settings: Training settings.
        run: The run that the training belongs to.
        dtype: Type that forward passes compute in; anything but float32 means autocast.
        distributed: Processes that train together; None detects them from the launcher's environment.

    Raises:
        ConfigError: The settings need validation rows and there are none.
        UnsupportedError: The model or the launcher does not support the settings.
        ResourceError: The optimizer's state does not fit into memory.
    """

    def __init__(
        self,
        adapter: Adapter,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        data: TrainingData,
        settings: TrainingSettings,
        run: RunContext,
        *,
        dtype: torch.dtype = torch.float32,
        distributed: Distributed | None = None,
    ) -> None:
        check_settings(settings, bool(data.validation), task)
        self.adapter, self.task, self.tokenizer, self.settings = adapter, task, tokenizer, settings
        self.train, self.validation = data.train, data.validation
        self.checkpoints, self.emit, self.stop, self.identity = run.checkpoints, run.emit, run.stop, dict(run.identity)
        self.dtype, self.distributed = dtype, distributed or connect()
        self.device = self.distributed.device
        check_compute_type(dtype, self.device)
        check_placement(adapter.model, self.distributed.world_size)
        self.model = self.distributed.prepare(adapter.model)
        self.parameters = list(adapter.parameters())

        self.rows_per_step = settings.global_batch_size(self.distributed.num_devices)
        self.batch_sampler = BatchSampler(
            data.train, self.rows_per_step, seed=settings.seed, group=settings.length_group, draw=data.sampler
        )
        self.steps_per_epoch = self.batch_sampler.steps_per_epoch
        self.total_steps = settings.num_steps(self.steps_per_epoch)
        self.warmup_steps = math.ceil(settings.warmup_ratio * self.total_steps)

        self.optimizer = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)  # does nothing otherwise
        if settings.packing:
            check_packing(adapter.model, task, self.batch_sampler.part(0), tokenizer)
        self.activation_cache = self._build_activation_cache(run.shared_cache)
        self.gradients = self._build_gradients(data)
        self.evaluate = self._build_evaluator()
        self.evaluations = Validation(settings.eval_steps, settings.metric_for_best)
        early_stopping = EarlyStopping(settings.early_stopping_patience)
        self.callbacks = default_callbacks(self, self.evaluations, early_stopping, data.prior_loss)

        self.state = TrainState(step=0, micro_batch=self.gradients.initial_micro_batch())
        self.clock = Clock()
        self.saved_step = -1
        self.log_position: Callable[[], int] = lambda: 0
        self._stop_signal = 0  # the signal that all processes agreed on at the last step

    def _build_optimizer(self) -> torch.optim.AdamW:
        try:
            return optim.build_optimizer(self.adapter, self.settings, self.task)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory_error(self, "the optimizer's state does not fit into memory") from None

    def _build_activation_cache(self, shared: Path | None) -> ActivationCache:
        return ActivationCache(
            self.adapter, self.task, self.tokenizer, self.settings, dtype=self.dtype, processes=self.distributed,
            folder=self.checkpoints.folder.parent / TRUNK, shared=shared, emit=self.emit,
            stop_requested=self.stop.is_requested,
        )  # fmt: skip

    def _build_gradients(self, data: TrainingData) -> GradientAccumulator:
        compiled: CompiledStacks | None = None
        if self.settings.compile:
            from graftwerk.training.compilation import compile_stacks  # loads the compiler

            compiled = compile_stacks(self.adapter.model, self.distributed, lambda event: self.emit(event))
        task = weighted_task(self.settings, self.task, data.labels, data.train)  # evaluation has no class weights
        batches = StepBatches(
            self.model, task, self.tokenizer, self.batch_sampler, self.settings, self.distributed,
            data.max_length or self.batch_sampler.longest, self.dtype,
        )  # fmt: skip
        passes = ForwardPasses(self.activation_cache, compiled, self.dtype)
        return GradientAccumulator(batches, passes, self.parameters, self.optimizer, self.scaler, self.stop)

    def _build_evaluator(self) -> Evaluator:
        return Evaluator(
            self.adapter, self.task, self.tokenizer, self.distributed,
            batch_size=self.settings.eval_batch_size, dtype=self.dtype,
            stop_requested=self.stop.is_requested, serve=self.activation_cache.serving,
            say=lambda text: self.emit(Event("memory", self.state.step, text=text)),
        )  # fmt: skip

    def retain(self, retention: Retention) -> None:
        """Add losses against forgetting to every step, before the first one.

        Args:
            retention: The strategies; they are started on the model as it is now.
        """
        with rng.untouched(self.device):
            retention.start(self)
        self.gradients.extra_losses = retention.losses
        self.callbacks.insert(self.callbacks.index(self.evaluations), retention)

    # -- training loop ---------------------------------------------------------------------------------------------

    def fit(self, log_position: Callable[[], int] = lambda: 0) -> TrainState:
        """Train to the end, from the beginning or from the state that `restore` loaded.

        Args:
            log_position: Function that forces the event log to the disk and returns its size in bytes; stored in
                checkpoints.

        Returns:
            The state after the last step.

        Raises:
            RunInterrupted: SIGINT or SIGTERM came; the state is saved.
            DivergedError: Too many steps had a non-finite loss or gradient.
            ResourceError: Memory or disk do not suffice; earlier checkpoints are intact.
        """
        self.log_position = log_position
        self.clock.start(self.state.seconds)
        if self.state.step == 0:
            rng.seed(self.settings.seed + SEED_STRIDE * (1 + self.distributed.rank))  # every process its own dropout
        with self.stop.deferring(), training_mode(self.adapter.model, self.settings.gradient_checkpointing):
            if not self.is_finished:
                epochs = self.total_steps * self.rows_per_step / max(len(self.train), 1)
                self.activation_cache.open(self.train, self.validation, epochs, self.state.step)
            self._between_steps(None)
            while not self.is_finished:
                self._between_steps(self._step())
        self.state.seconds = self.clock.seconds()
        return self.state

    @property
    def all_steps_done(self) -> bool:
        """True once all steps are done."""
        return self.state.step >= self.total_steps

    @property
    def is_finished(self) -> bool:
        """True once all steps are done or a callback ends the training."""
        return self.all_steps_done or any(callback.is_reached(self.state) for callback in self.callbacks)

    @property
    def evaluation_due(self) -> bool:
        """True if the steps done so far end with an evaluation."""
        return self.evaluations.is_due(self)

    def _step(self) -> StepResult:
        """Take one optimizer step, or skip it if its gradient is not finite or no token was trained."""
        state, settings = self.state, self.settings
        rows = self.batch_sampler(state.step)
        while True:
            try:
                gradient = self.gradients(rows, state.micro_batch)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            if self.distributed.world_size == 1 and self.activation_cache.leave_device():
                release()  # the states are read from the host from now on
                continue
            halve_micro_batch(self)  # outside of the handler, whose traceback holds the failed tensors
        factor = optim.schedule(settings.lr_scheduler_type, state.step, self.total_steps, self.warmup_steps)
        optim.set_rates(self.optimizer, factor)
        state.step += 1
        if gradient.num_targets:  # without any, AdamW would still move the weights by momentum
            optim.step_if(self.optimizer, gradient.finite)
        if not self.all_steps_done and self.batch_sampler.has_in_memory(state.step):
            self.gradients.batches.prefetch(self.batch_sampler(state.step), state.micro_batch)
        loss, norm, self._stop_signal = gradient.read()  # all that the device can do is launched
        outcome = self._outcome(gradient.num_targets, loss, norm)
        self.scaler.update()
        self.clock.step()
        return StepResult(loss, norm, outcome)

    def _outcome(self, num_targets: float, loss: float, norm: float) -> Outcome:
        if not num_targets:
            return Outcome.UNTRAINED
        if math.isfinite(loss) and math.isfinite(norm):
            return Outcome.APPLIED
        if self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > 1:
            return Outcome.OVERFLOW
        return Outcome.NOT_FINITE

    def _between_steps(self, result: StepResult | None) -> None:
        """Run the callbacks, save a checkpoint if one is due, stop if a signal came.

        Args:
            result: Result of the last step, or None before the first step of this process.
        """
        state = self.state
        with rng.untouched(self.device):  # the states that are saved are those that the next step draws from
            for callback in self.callbacks:
                callback.on_train_begin(self) if result is None else callback.on_step_end(self, result)
        if state.step and self.saved_step != state.step and self._save_due():
            self._save()
        if signum := self._stop_signal if self.distributed.world_size > 1 else self.stop.signum:
            if state.step and self.saved_step != state.step:
                self._save()
            raise RunInterrupted(
                signum,
                f"stopped after step {state.step} of {self.total_steps}",
                recovered=self.checkpoints.recoverable(),
                hint="run the same command with --resume to continue from there",
            )

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        step, every = self.state.step, self.settings.save_steps
        is_best = self.state.best is not None and self.state.best["step"] == step
        return is_best or self.is_finished or (step % every == 0 if every else self.evaluation_due)

    def _save(self) -> None:
        self.state.seconds = self.clock.seconds()
        snapshot = state_dict(self)  # with the random states of all processes: before anything else can draw
        if self.distributed.is_main:
            with rng.untouched(self.device):
                path = self.checkpoints.save(snapshot)
                self.emit(Event("checkpoint", self.state.step, path=str(path), seconds=self.clock.seconds()))
        self.distributed.barrier()
        self.saved_step = self.state.step
        self.clock.pause()

    def restore(self, snapshot: Snapshot) -> None:
        """Load everything that the next step depends on. The caller has checked that the checkpoint is of this run.

        Args:
            snapshot: A checkpoint of this run.

        Raises:
            ConfigError: The checkpoint was written by another number of processes.
            AdapterError, IntegrityError: Its tensors do not match this adapter.
        """
        load_state_dict(self, snapshot)
        self.saved_step = self.state.step

    def seconds_left(self) -> float | None:
        """Return the estimated seconds to the end of training, or None until steps tell how long they take.

        Before the first evaluation, a row of it counts as the forward pass of a step: a third of its time.
        """
        steps, pace = self.total_steps - self.state.step, self.clock.step_seconds
        if steps and not pace:
            return None
        evaluations = math.ceil(steps / (self.settings.eval_steps or self.steps_per_epoch))
        guess = pace / 3 * len(self.validation) / self.rows_per_step
        return steps * pace + evaluations * (self.clock.evaluation_seconds or guess)
