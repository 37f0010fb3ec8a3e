"""The training loop.

Read `Trainer.fit` first: it takes steps and, between them, runs callbacks, saves and stops.

Legend: a *step* is one update of the optimizer from ``rows_per_step`` rows; it is computed in *micro-batches*, on one
or several processes. Everything that the next step depends on is in `TrainState`, the parameters, the optimizer's
moments and the random generators, and goes into every checkpoint; row order and learning rate follow from the step's
number. Logging, evaluation, health checks and early stopping are callbacks (`training/callbacks/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.data.mixture import Sampler
from graftwerk.devices import is_out_of_memory, release
from graftwerk.errors import RunInterrupted, UnsupportedError
from graftwerk.methods.learning_rates import default_learning_rates
from graftwerk.modeling.attach import Adapter
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.packing import check_packing
from graftwerk.training import optim, rng
from graftwerk.training.activation_cache.cache import ActivationCache
from graftwerk.training.batch_sampler import BatchSampler
from graftwerk.training.callbacks.base import Outcome, StepResult
from graftwerk.training.callbacks.defaults import default_callbacks
from graftwerk.training.callbacks.early_stopping import EarlyStopping
from graftwerk.training.callbacks.health_checks import HealthChecks
from graftwerk.training.callbacks.validation import Validation
from graftwerk.training.checkpoint import Checkpoints, Snapshot
from graftwerk.training.class_weights import weighted_task
from graftwerk.training.distributed import Distributed, connect
from graftwerk.training.events import Event, Listener
from graftwerk.training.gradients import GradientAccumulator
from graftwerk.training.mode import check_compute_type, check_placement, training_mode
from graftwerk.training.oom import halve_micro_batch, out_of_memory_error
from graftwerk.training.retention.retention import Retention
from graftwerk.training.run_dir import TRUNK
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.signals import StopSignals
from graftwerk.training.snapshot import load_state_dict, state_dict
from graftwerk.training.timing import Clock
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
        train: Encoded training rows.
        validation: Encoded validation rows; without any, nothing is evaluated and the last state is the best.
        settings: Training settings.
        checkpoints: Checkpoints to save states in.
        emit: Listener of every event.
        stop: Stop signals, checked between steps, during an evaluation and while the activation cache is filled.
        log_position: Function that forces the event log to the disk and returns its size in bytes; stored in
            checkpoints.
        identity: Settings, data and base model of the run; stored in checkpoints unchanged.
        dtype: Type that forward passes compute in; anything but float32 means autocast.
        prior_loss: As for `HealthChecks`.
        distributed: Processes that train together; None detects them from the launcher's environment.
        max_length: Tokens of a packed row; None means the length of the longest row.
        draw: Sampler of each epoch's rows, for several data sets; None takes every row once.
        labels: Class names by id, which `training.class_weights` refers to.
        shared_cache: Folder of hidden states of frozen layers shared with other runs, or None for no sharing.

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
        train: Sequence[Example],
        validation: Sequence[Example],
        settings: TrainingSettings,
        *,
        checkpoints: Checkpoints,
        emit: Listener = lambda event: None,
        stop: StopSignals | None = None,
        log_position: Callable[[], int] = lambda: 0,
        identity: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        prior_loss: float | None = None,
        distributed: Distributed | None = None,
        max_length: int | None = None,
        draw: Sampler | None = None,
        labels: Sequence[str] = (),
        shared_cache: Path | None = None,
    ) -> None:
        check_settings(settings, bool(validation), task)
        self.adapter, self.task, self.tokenizer, self.settings = adapter, task, tokenizer, settings
        self.train, self.validation = train, validation
        self.train_task = weighted_task(settings, task, labels, train)  # evaluation takes `task`, without class weights
        self.checkpoints, self.emit, self.stop = checkpoints, emit, stop or StopSignals()
        self.log_position, self.identity, self.dtype = log_position, dict(identity or {}), dtype
        self.distributed = distributed or connect()
        self.device = self.distributed.device
        check_compute_type(dtype, self.device)
        check_placement(adapter.model, self.distributed.world_size)
        self.model = self.distributed.prepare(adapter.model)
        self.parameters = list(adapter.parameters())
        devices = 1 if self.distributed.shares_rows else self.distributed.world_size
        self.rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * devices
        self.batch_sampler = BatchSampler(
            train, self.rows_per_step, seed=settings.seed, group=settings.length_group, draw=draw
        )
        try:
            self.optimizer = optim.build_optimizer(adapter, settings, task)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory_error(self, "the optimizer's state does not fit into memory") from None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)  # does nothing otherwise
        self.steps_per_epoch = self.batch_sampler.steps_per_epoch
        if settings.packing:
            check_packing(adapter.model, task, self.batch_sampler.part(0), tokenizer)
        self.total_steps = settings.max_steps or math.ceil(settings.num_train_epochs * self.steps_per_epoch)
        self.warmup_steps = math.ceil(settings.warmup_ratio * self.total_steps)
        self.clock = Clock()
        self.saved_step = -1
        self._stop_signal = 0  # the signal that all processes agreed on at the last step
        self.activation_cache = ActivationCache(
            adapter,
            task,
            tokenizer,
            settings,
            dtype=dtype,
            processes=self.distributed,
            folder=checkpoints.folder.parent / TRUNK,
            shared=shared_cache,
            emit=emit,
            stop_requested=lambda: self.stop.signum is not None,
        )
        self.gradients = GradientAccumulator(
            self.model,
            self.parameters,
            self.train_task,
            tokenizer,
            self.batch_sampler,
            settings,
            optimizer=self.optimizer,
            scaler=self.scaler,
            processes=self.distributed,
            activation_cache=self.activation_cache,
            compiled=self._compiled(),
            dtype=dtype,
            max_length=max_length or self.batch_sampler.longest,
            stop=self.stop,
        )
        self.state = TrainState(step=0, micro_batch=self.gradients.initial_micro_batch())
        self.evaluate = Evaluator(
            adapter,
            task,
            tokenizer,
            self.distributed,
            batch_size=settings.per_device_eval_batch_size,
            dtype=dtype,
            stop_requested=lambda: self.stop.signum is not None,
            say=lambda text: self.emit(Event("memory", self.state.step, text=text)),
            serve=self.activation_cache.serving,
        )
        self.evaluations = Validation(settings.eval_steps, settings.metric_for_best)
        self.early_stopping = EarlyStopping(settings.early_stopping_patience)
        health = HealthChecks(
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            learning_rate=optim.peak_rates(adapter, settings, task).method,
            default_learning_rate=default_learning_rates(adapter.method, task.name)[0],
            method=adapter.method.name,
            prior_loss=prior_loss,
        )
        self.callbacks = default_callbacks(settings, health, self.evaluations, self.early_stopping)

    def _compiled(self) -> CompiledStacks | None:
        if not self.settings.compile:
            return None
        if self.distributed.shards:
            raise UnsupportedError(
                "layers whose weights are shared out (FSDP) are not compiled", where="training.compile", hint="false"
            )
        from graftwerk.training.compilation import CompiledStacks  # loads the compiler

        return CompiledStacks(self.adapter.model, self.device, lambda event: self.emit(event))

    def retain(self, retention: Retention) -> None:
        """Add losses against forgetting to every step, before the first one.

        Args:
            retention: The strategies; they are started on the model as it is now.
        """
        with rng.untouched(self.device):
            retention.start(self)
        self.gradients.beside = retention.losses
        self.callbacks.append(retention)

    # -- training loop ---------------------------------------------------------------------------------------------

    def fit(self) -> TrainState:
        """Train to the end, from the beginning or from the state that `restore` loaded.

        Returns:
            The state after the last step.

        Raises:
            RunInterrupted: SIGINT or SIGTERM came; the state is saved.
            DivergedError: Too many steps had a non-finite loss or gradient.
            ResourceError: Memory or disk do not suffice; earlier checkpoints are intact.
        """
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
        """True once all steps are done or early stopping ends the training."""
        return self.all_steps_done or self.early_stopping.is_reached(self.state)

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
            self.gradients.prefetch(self.batch_sampler(state.step), state.micro_batch)
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
        return is_best or self.is_finished or (step % every == 0 if every else self.evaluations.is_due(self))

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
