"""The one training loop, over accelerate: `Trainer.fit` is the whole story, the methods below it are its sentences.

Legend: a *step* is one update of the optimizer from ``rows_per_step`` rows; it is worked off in *micro-batches*, on
one or several processes. Everything that the next step depends on is in `TrainState`, the parameters, the optimizer's
moments and the random generators, and goes into every checkpoint; row order and learning rate follow from the step's
number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from graftwerk.data.mixture import Sampler
from graftwerk.errors import DivergedError, EnvironmentFault, Interrupted
from graftwerk.evaluate.finite import refuse_broken_base
from graftwerk.inject.attach import Graft
from graftwerk.tasks.base import Example, Predictions, Task
from graftwerk.tasks.packing import check_packing, pack
from graftwerk.train import memory, optim, rng
from graftwerk.train.checkpoint import Checkpoints, Snapshot
from graftwerk.train.class_weights import weighted_task
from graftwerk.train.clock import Clock
from graftwerk.train.diagnosis import Diagnosis
from graftwerk.train.events import Event, Listener
from graftwerk.train.folder import TRUNK
from graftwerk.train.launch import Processes
from graftwerk.train.mode import check_compute_type, training_mode
from graftwerk.train.order import StepRows, micro_batches
from graftwerk.train.settings import TrainingSettings
from graftwerk.train.signals import StopSignals
from graftwerk.train.state import TrainState, put_back, take
from graftwerk.train.trunk.cache import Trunk
from graftwerk.train.validation import Evaluator, StopEvaluation, check_settings, is_better, points

SEED_STRIDE = 1_000_003
"""Training draws from other seeds than initialisation, and each process from its own."""


class Trainer:
    """Trains a graft that is attached and active on its model.

    Args: graft: What is trained; its model is moved to the device that accelerate chooses. train, validation: Encoded
        rows; without validation rows nothing is evaluated and the last state is the best. checkpoints: Where states
        go. emit: Told everything that happens. stop: Looked at between steps. log_position: Forces the event log to
        the disk and says how long it is; stored in checkpoints. identity: What this run is (settings, data, base);
        stored in checkpoints as it is. dtype: What forward passes compute in; anything but float32 means autocast.
        prior_loss: As for `Diagnosis`. processes: Those that train together; None: as this one was launched.
        max_length: Tokens of a packed row; None: those of the longest row.
        draw: The rows of each epoch, for several data sets; None: every row once. labels: The classes' names by their
        ids, where `training.class_weights` needs them.

    Raises:
        ConfigError: settings that ask for validation rows where there are none.
        UnsupportedError: the model or the way of launching cannot do what the settings ask.
        EnvironmentFault: the optimizer's state does not fit into memory.
    """

    def __init__(
        self,
        graft: Graft,
        task: Task,
        tokenizer: Any,
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
        processes: Processes | None = None,
        max_length: int | None = None,
        draw: Sampler | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        check_settings(settings, bool(validation), task)
        self.graft, self.task, self.tokenizer, self.settings = graft, task, tokenizer, settings
        self.train, self.validation = train, validation
        self._weighted = None if settings.class_weights is None else weighted_task(settings, task, labels, train)
        self.checkpoints, self.emit, self.stop = checkpoints, emit, stop or StopSignals()
        self.log_position, self.identity, self.dtype = log_position, dict(identity or {}), dtype
        self.processes = processes or Processes()
        self.device = self.processes.device
        check_compute_type(dtype, self.device)
        self.model = self.processes.prepare(graft.model)
        self.parameters = list(graft.parameters())
        devices = 1 if self.processes.sharing else self.processes.count
        self.rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * devices
        self.rows_of = StepRows(train, self.rows_per_step, seed=settings.seed, group=settings.length_group, draw=draw)
        try:
            self.optimizer = optim.build_optimizer(graft, settings)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_out_of_memory(error):
                raise
            raise self._no_memory("the optimizer's state does not fit into memory") from None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)  # does nothing otherwise
        self.steps_per_epoch = self.rows_of.steps_per_epoch
        self.max_length = max_length or self.rows_of.longest
        if settings.packing:
            check_packing(graft.model, task, self.rows_of.part(0), tokenizer)
        self.total_steps = settings.max_steps or math.ceil(settings.num_train_epochs * self.steps_per_epoch)
        self.warmup_steps = math.ceil(settings.warmup_ratio * self.total_steps)
        self.trunk = Trunk(
            graft,
            task,
            tokenizer,
            settings,
            dtype=dtype,
            processes=self.processes,
            folder=checkpoints.folder.parent / TRUNK,
            emit=emit,
            asked_to_stop=lambda: self.stop.signum is not None,
        )
        self.evaluate = Evaluator(
            graft,
            task,
            tokenizer,
            self.processes,
            batch_size=settings.per_device_eval_batch_size,
            dtype=dtype,
            asked_to_stop=lambda: self.stop.signum is not None,
            say=lambda text: self.emit(Event("memory", self.state.step, text=text)),
            serve=self.trunk.serving,
        )
        self.diagnosis = Diagnosis(
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            learning_rate=optim.peak_rates(graft, settings).method,
            default_learning_rate=graft.method.default_learning_rate,
            method=graft.method.name,
            prior_loss=prior_loss,
        )
        micro_batch = settings.per_device_train_batch_size
        if settings.per_device_train_tokens is not None:  # tokens bound a micro-batch, and rows only the step
            micro_batch *= settings.gradient_accumulation_steps
        if self.processes.sharing:
            micro_batch = math.ceil(micro_batch / self.processes.count)
        self.state = TrainState(step=0, micro_batch=micro_batch)
        self.best_predictions: tuple[int, Predictions] | None = None
        """Step and validation predictions of the best state, if this process made them."""
        self.first_step_at: float | None = None
        """`time.monotonic()` when the first step of this process was done."""
        self._targets = 0.0
        """What the loss of the last step was the mean over, by `Task.weight`, in all processes."""
        self._clock = Clock()
        self._news: list[Event] = []
        self._saved = -1
        self._asked_to_stop = 0

    # -- the story -------------------------------------------------------------------------------------------------

    def fit(self) -> TrainState:
        """Train to the end, from the beginning or from what `restore` put in.

        Raises:
            Interrupted: after SIGINT or SIGTERM, when the state is saved.
            DivergedError: too many steps with a non-finite loss or gradient.
            EnvironmentFault: memory or disk do not suffice; earlier checkpoints are whole.
        """
        self._clock.start(self.state.seconds)
        if self.state.step == 0:
            rng.seed(self.settings.seed + SEED_STRIDE * (1 + self.processes.index))  # every process its own dropout
        with self.stop.deferring(), training_mode(self.graft.model, self.settings.gradient_checkpointing):
            passes = self.total_steps * self.rows_per_step / max(len(self.train), 1)
            if not self.done:
                self.trunk.open(self.train, self.validation, passes, self.state.step)
            self._settle()
            while not self.done:
                self._step()
                self._settle()
        self.state.seconds = self._clock.seconds()
        return self.state

    @property
    def done(self) -> bool:
        patience = self.settings.early_stopping_patience
        return self.state.step >= self.total_steps or (patience is not None and self.state.stale >= patience)

    @property
    def learnt(self) -> Task:
        """The task with the loss of training, which class weights change; evaluation has that of `task`."""
        return self._weighted or self.task

    def hand_over(self) -> int:
        """Put the best evaluated state into the graft, where the settings say so; gives the step it is of."""
        best = self.state.best
        if not self.settings.load_best or best is None or best["step"] == self.state.step:
            return self.state.step
        self.graft.load_state_dict(self.checkpoints.weights(best["step"]))
        return int(best["step"])

    def plan(self) -> dict[str, Any]:
        """What will be done, for the first event."""
        rates = optim.peak_rates(self.graft, self.settings)
        return {
            "total_steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "rows_per_step": self.rows_per_step,
            "rows": {"train": len(self.train), "validation": len(self.validation)},
            "method": self.graft.method.name,
            "learning_rate": rates.method,
            "head_learning_rate": rates.head,
            "device": str(self.device),
            "compute_type": str(self.dtype).removeprefix("torch."),
            "processes": self.processes.count,
            "left_out": self.graft.left_out(),
        }

    # -- one step --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        state, settings = self.state, self.settings
        rows = self.rows_of(state.step)
        while True:
            try:
                loss, norm = self._gradients(rows)
                break
            except (MemoryError, RuntimeError) as error:
                if not memory.is_out_of_memory(error):
                    raise
            self._use_smaller_batches()  # outside of the handler, whose traceback holds the failed tensors
        factor = optim.schedule(settings.lr_scheduler_type, state.step, self.total_steps, self.warmup_steps)
        optim.set_rates(self.optimizer, factor)
        state.step += 1
        if not self._targets:
            self._untrained_step()
        elif math.isfinite(loss) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            state.loss_sum += loss
            state.loss_count += 1
            state.grad_norm = norm
            if state.step == 1:
                self._news += self._untouched()
        else:
            self._bad_step(loss, norm)
        self.scaler.update()
        self._clock.step()
        self.first_step_at = self.first_step_at or time.monotonic()
        if self._targets:
            self._news += self.diagnosis.trained(state.step, loss)
        if self._clock.progress_due():
            self._news.append(
                Event("progress", state.step, total=self.total_steps, loss=loss, left_seconds=self._left())
            )

    def _gradients(self, rows: Sequence[int]) -> tuple[float, float]:
        """The gradient of the mean loss over all targets of the step, clipped.

        Micro-batches count by their number of targets, so that the result does not depend on how the step was cut up.

        Returns:
            That mean loss, and the norm of the gradient before clipping; both are 0 in a step without a target.
        """
        processes = self.processes
        pieces = micro_batches(
            rows,
            self.rows_of.lengths,
            self.state.micro_batch,
            tokens=self.settings.per_device_train_tokens,
            processes=processes.count,
            process=processes.index,
        )
        # A process without rows left takes part with weight zero: the others wait for its gradients.
        batches = [self._batch(piece or rows[:1]) for piece in pieces]
        weights = [self.learnt.weight(batch) if piece else 0 for piece, batch in zip(pieces, batches, strict=True)]
        total = float(sum(weights))
        if processes.count > 1:
            total = processes.sum(torch.tensor(total, device=self.device)).item()
        self._targets = total
        loss_sum = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (batch, weight, piece) in enumerate(zip(batches, weights, pieces, strict=True), start=1):
            last = number == len(batches)
            with nullcontext() if last else processes.alone(self.model):
                examples = [self.train[row] for row in piece or rows[:1]]
                with self.trunk.serving(examples, batch), self._autocast():
                    outputs = self.learnt.forward(self.model, batch)
                    loss = self.learnt.loss(outputs, batch, self.settings.label_smoothing) * (weight / (total or 1.0))
                loss_sum += loss.detach()
                # Launched processes' gradients are averaged, and the mean is over all rows: hence times their number.
                processes.accelerator.backward(self.scaler.scale(loss * processes.averaged))
        processes.add_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        if self.settings.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if processes.count > 1:
            asked = torch.tensor(float(self.stop.signum or 0), device=self.device)
            each = processes.gather(torch.stack([loss_sum, asked]))  # a signal may reach one of them, or all
            loss_sum = each[:, 0].sum().to(self.device)
            self._asked_to_stop = max(self._asked_to_stop, int(each[:, 1].max()))
        figures: list[float] = torch.stack([loss_sum, norm]).tolist()  # the one wait for the device in a step
        return figures[0], figures[1]

    def _untrained_step(self) -> None:
        """Skip a step that nothing can be learnt from: by its momentum, the optimizer would move the weights."""
        state = self.state
        state.untrained_steps += 1
        if state.untrained_steps == 1:
            text = "no row of this step has a trained token; nothing is learnt from such steps, which are counted"
            self._news.append(Event("warning", state.step, text=text))

    def _untouched(self) -> list[Event]:
        """Return a warning if the first step's gradient did not reach every layer of the adapter."""
        own = [] if self.graft.method.kind != "layer" else list(self.graft.named_parameters())
        without = [key for key, parameter in own if parameter.grad is None]
        if not without:
            return []
        text = (
            f"{len(without)} of {len(own)} trained tensors got no gradient in the first step, {without[0]} for "
            f"instance: the model did not call their layers, so they stay as they are"
        )
        mend = "leave these layers out with method.target_modules, if the data never reach them"
        return [Event("warning", self.state.step, text=text, mend=mend)]

    def _bad_step(self, loss: float, norm: float) -> None:
        """A step that the optimizer does not see: weights and moments stay as they were."""
        state, most = self.state, self.settings.max_bad_steps
        if self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > 1:
            return  # an overflow of float16: the scale is lowered, as it is meant to be
        refuse_broken_base(self.graft.model, trained=state.bad_steps + 1 == state.step)
        state.bad_steps += 1
        what = "gradient" if math.isfinite(loss) else "loss"
        if state.bad_steps > most:
            raise DivergedError(
                f"the {what} of step {state.step} is not finite, and {most} such steps have been skipped already",
                where=f"step {state.step} of {self.total_steps}",
                mend="a lower training.learning_rate, a longer training.warmup_ratio, or training.max_grad_norm=1",
                kept=self.checkpoints.latest_said(),
            )
        text = f"the {what} is not finite; this step is skipped ({state.bad_steps} of at most {most})"
        self._news.append(Event("bad_step", state.step, text=text, loss=loss, grad_norm=norm))

    def _use_smaller_batches(self) -> None:
        """Half the micro-batch, twice the accumulation: the same step in less memory."""
        state = self.state
        self.optimizer.zero_grad(set_to_none=True)
        memory.release()
        if state.micro_batch == 1:
            raise self._no_memory("one row at a time does not fit into memory")
        if self.processes.count > 1:  # the others are waiting for gradients that this one cannot make
            raise self._no_memory(f"micro-batches of {state.micro_batch} rows do not fit into memory")
        state.micro_batch = math.ceil(state.micro_batch / 2)
        accumulation = math.ceil(self.rows_per_step / state.micro_batch)
        text = (
            f"out of memory ({memory.numbers(self.device)}): going on with {accumulation} micro-batches of "
            f"{state.micro_batch} rows; a step still has {self.rows_per_step} rows"
        )
        self._news.append(
            Event("memory", state.step, text=text, micro_batch=state.micro_batch, accumulation=accumulation)
        )

    # -- between steps ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Whatever is due after the steps done so far and not yet done: tell, evaluate, save, stop."""
        state, settings = self.state, self.settings
        at_end = state.step >= self.total_steps
        evaluation_due = at_end or state.step % (settings.eval_steps or self.steps_per_epoch) == 0
        better = False
        with rng.untouched(self.device):  # what is saved is what the next step draws from
            for event in self._news:
                self.emit(event)
            self._news.clear()
            if state.loss_count and (at_end or state.step % settings.logging_steps == 0):
                self._log()
            if evaluation_due and state.evaluated != state.step:
                with suppress(StopEvaluation):  # a resumed run makes up for one that was left
                    better = self._validate()
        save_due = state.step % settings.save_steps == 0 if settings.save_steps else evaluation_due
        if state.step and self._saved != state.step and (save_due or better or self.done):
            self._save()
        if signum := self._asked_to_stop if self.processes.count > 1 else self.stop.signum:
            if state.step and self._saved != state.step:
                self._save()
            raise Interrupted(
                signum,
                f"stopped after step {state.step} of {self.total_steps}",
                kept=self.checkpoints.latest_said(),
                mend="the same command with --resume goes on from there",
            )

    def _log(self) -> None:
        state = self.state
        figures = {
            "loss": state.loss_sum / state.loss_count,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": state.grad_norm,
            "epoch": state.step / self.steps_per_epoch,
            "seconds": self._clock.seconds(),
            "left_seconds": self._left(),
        }
        state.loss_sum, state.loss_count = 0.0, 0
        self.emit(Event("step", state.step, **figures))

    def _validate(self) -> bool:
        """Metrics on the validation rows; True if they are the best so far."""
        state = self.state
        if not self.validation:
            return False
        self._clock.pause()
        predictions = self.evaluate(self.validation)
        metrics = points(predictions, self.task)
        name = self.settings.metric_for_best or self.task.best_metric
        value = metrics.get(name)
        better = value is not None and (state.best is None or is_better(name, value, state.best["value"]))
        if better:
            state.best = {"step": state.step, "metric": name, "value": value}
            self.best_predictions = (state.step, predictions)
        state.stale = 0 if better else state.stale + 1
        state.evaluated, self._saved = state.step, -1
        self._clock.evaluation_seconds = self._clock.pause()
        self.emit(Event("evaluation", state.step, **metrics, best=better, seconds=self._clock.seconds()))
        for event in self.diagnosis.validated(state.step, predictions.loss):
            self.emit(event)
        if self.done and state.step < self.total_steps:
            text = f"{state.stale} evaluations in a row were no better than step {state.best and state.best['step']}"
            self.emit(Event("early_stopping", state.step, text=text))
        return better

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.state.seconds = self._clock.seconds()
        snapshot = take(self)  # with the random states of all processes: before anything else can draw
        if self.processes.main:
            with rng.untouched(self.device):
                path = self.checkpoints.save(snapshot)
                self.emit(Event("checkpoint", self.state.step, path=str(path), seconds=self._clock.seconds()))
        self.processes.wait()
        self._saved = self.state.step
        self._clock.pause()

    def restore(self, snapshot: Snapshot) -> None:
        """Put back everything that the next step depends on. The caller has checked that it is the same run.

        Raises:
            ConfigError: the checkpoint was made by another number of processes.
            AdapterError, IntegrityError: its tensors do not belong to this graft.
        """
        put_back(self, snapshot)
        self._saved = self.state.step

    # -- parts -----------------------------------------------------------------------------------------------------

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        examples = [self.train[row] for row in rows]
        if self.settings.packing:
            batch = pack(examples, self.tokenizer, self.max_length)
        else:
            batch = self.task.collate_training(examples, self.tokenizer)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def _left(self) -> float:
        """Seconds to the end of the training, by the pace so far."""
        steps = self.total_steps - self.state.step
        evaluations = math.ceil(steps / (self.settings.eval_steps or self.steps_per_epoch))
        return steps * self._clock.step_seconds + evaluations * self._clock.evaluation_seconds

    def _no_memory(self, what: str) -> EnvironmentFault:
        trained = sum(parameter.numel() for parameter in self.parameters)
        few = "training.processes=1, " if self.processes.sharing else ""
        return EnvironmentFault(
            f"{what}: {memory.numbers(self.device)}; rows have up to {self.rows_of.longest} tokens, {trained:,} "
            "parameters are trained",
            mend=f"{few}training.gradient_checkpointing=true, a smaller training.per_device_train_batch_size or "
            "data.max_length, "
            "a method that trains less, or a smaller model",
            kept=self.checkpoints.latest_said(),
        )
