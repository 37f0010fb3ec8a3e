"""One run in one process, from the lock on its folder to the finished manifest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import DivergedError, ErrorReport, GraftwerkError, ResourceError, RunInterrupted
from graftwerk.sanitize import REDACTED, redacted
from graftwerk.serialization.atomic import FAULTS
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import understood
from graftwerk.training.callbacks.jsonl import JsonLines
from graftwerk.training.callbacks.tensorboard import TensorBoard
from graftwerk.training.callbacks.trackers import SERVICES, Tracking
from graftwerk.training.checkpoint import OPTIMIZER_SCALE, Checkpoints, Snapshot
from graftwerk.training.events import Event, EventBus
from graftwerk.training.lock import RunLock
from graftwerk.training.resume_check import environment_warning, refuse_changes
from graftwerk.training.run_dir import (
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    RunDir,
)
from graftwerk.training.signals import StopSignals

SECRETS_LEFT_OUT = (
    f"a path or URL in the run file holds a secret: no file of the run shows it (it says {REDACTED} there); this "
    "user's cache stores it for evaluating and resuming here; on another machine pass it again"
)
LAUNCHED_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}


@contextmanager
def _naming_recovered(checkpoints: Checkpoints) -> Iterator[None]:
    """Name the newest intact checkpoint in errors of disk and memory, whatever it was that could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        what, hint = FAULTS[error.errno]
        where = str(error.filename) if error.filename else None
        raise ResourceError(what, where=where, hint=hint, recovered=checkpoints.intact()) from error
    except ResourceError as error:
        error.recovered = checkpoints.intact() or error.recovered
        raise


class RunDriver:
    """Drive one run in one process, from the lock on its folder to the finished manifest.

    Args:
        settings: All settings of the run.
        folder: The run folder.
        checkpoints: The run's checkpoints.
        bus: Event bus; `checkpoints` warn through it.
        started_at: Value of `time.monotonic()` from which the seconds to the first step are counted.
        shared_cache: Folder of hidden states that other runs share.
        trial: Train, and measure validation rows alone; resumed without it, the run is measured on test rows too.
    """

    def __init__(
        self,
        settings: RunConfig,
        folder: RunDir,
        checkpoints: Checkpoints,
        bus: EventBus,
        started_at: float,
        shared_cache: Path | None,
        trial: bool = False,
    ) -> None:
        self.trial = trial
        self.settings, self.folder, self.checkpoints, self.bus = settings, folder, checkpoints, bus
        self.started_at, self.shared_cache = started_at, shared_cache
        self.stop = StopSignals(recoverable=checkpoints.recoverable)
        self.manifest: dict[str, Any] = {}

    def train_in_lock(self, *, resume: bool, overwrite: bool, forked: bool) -> None:
        """Lock the folder, and train unless the run is finished already.

        Args:
            resume: As for `train`.
            overwrite: As for `train`.
            forked: True in the processes of `run_forked`.
        """
        from graftwerk.training.distributed import connect, is_main_process

        main = is_main_process()
        with self.stop.installed(), RunLock(self.folder.path) if main else nullcontext():
            self.bus.listeners.insert(0, lambda event: self.stop.check())
            earlier = self.folder.claim(resume=resume, overwrite=overwrite) if main else None
            finished = earlier is not None and earlier["status"] == "finished"
            if finished:
                self._refuse_other_settings()
            if main:
                self.checkpoints.clean()
            self.processes = connect(shares_rows=forked)
            if not self.processes.any(finished):  # only the main process has looked at the folder
                with _naming_recovered(self.checkpoints):
                    self._train(resume, {} if earlier is None else earlier)
            elif main:
                text = f"the run in {self.folder.path} is finished; nothing was left to do"
                self.bus(Event("nothing_left", 0, text=text))
            self.processes.barrier()

    def _refuse_other_settings(self) -> None:
        """Raise ConflictError if a finished run was made with other settings than these."""
        written = self.folder.path / CONFIG
        if written.is_file():
            before = RunConfig.load(written).model_dump(mode="json")
            refuse_changes({"config": before}, {"config": self.settings.model_dump(mode="json")}, self.folder.adapter)

    def _train(self, resume: bool, earlier: Mapping[str, Any]) -> None:
        """Read the data, load the model, train, and store the results.

        Args:
            resume: Continue from the newest checkpoint.
            earlier: Manifest of the run that is resumed. Once it names a cost its training is done (a trial's, or that
                of an end that was cut short), and what it cost stays true.
        """
        from graftwerk.evaluation.cost import peak_memory, resident
        from graftwerk.machine import give_back
        from graftwerk.models.hardware import TYPES, compute_type, set_threads
        from graftwerk.serialization.base_digests import KEY, digest_of
        from graftwerk.training.augmented import add_augmented
        from graftwerk.training.base_proof import digests_before
        from graftwerk.training.data_checks import first_batch, raise_on_severe
        from graftwerk.training.finalize import finish
        from graftwerk.training.head_start import refuse_checkpoint, start_head
        from graftwerk.training.manifest import compute_of, data_identity, environment, opening, run_plan
        from graftwerk.training.mode import base_dtype, check_compute_type
        from graftwerk.training.multitask_sampling import sampler_of
        from graftwerk.training.planning.memory_check import check_memory, planned_cost
        from graftwerk.training.retained import RetainedMeter
        from graftwerk.training.retention.begin import retention_of
        from graftwerk.training.setup import load_base_and_attach, prepare, training_data
        from graftwerk.training.trainer import Trainer
        from graftwerk.training.trainer_inputs import RunContext
        from graftwerk.training.warm_start import warm_labels, warm_start

        settings, bus = self.settings, self.bus
        set_threads()
        dtype = compute_type(settings.compute_type, self.processes.device)
        types = list(TYPES.values())  # each process has tried for itself what is fast
        dtype = types[self.processes.broadcast(types.index(dtype))]
        check_compute_type(dtype, self.processes.device)
        weights = base_dtype(settings, dtype, self.processes.device)
        snapshot = self.checkpoints.load_latest() if resume else None
        identity: dict[str, Any] = {
            "config": redacted(settings.model_dump(mode="json")),
            "environment": environment(weights, settings.quantization is not None),
        }
        self._same_run(snapshot, identity, "config")
        early: list[Event] = []
        bus.listeners.append(early.append)
        bus(Event("phase", 0, name="reading the data"))
        new_head, warm = settings.training.new_head, settings.training.warm_start
        prepared = prepare(settings, bus, None if new_head else warm_labels(warm))
        raise_on_severe(prepared.findings, settings.data.allow)
        if snapshot is None:
            batch = first_batch(
                settings, prepared.task, prepared.splits, prepared.examples["train"], prepared.tokenizer
            )
            bus(Event("first_batch", 0, **batch))
        sharing = self.processes.world_size if self.processes.shares_rows else 1
        plan = check_memory(settings, prepared, sharing, bus) if self.processes.is_main else None
        prepared = add_augmented(prepared, settings, self.folder.path, bus, self.processes)
        identity["data"] = data_identity(prepared)
        if settings.training.retain is not None:
            identity["retained"] = "+".join(entry.identity for entry in prepared.retained)
            self._same_run(snapshot, identity, "retained")
        self._same_run(snapshot, identity, "data")
        bus(Event("phase", 0, name="loading the model"))
        give_back()  # what reading the rows has freed, which would be taken again unseen
        baseline = resident(self.processes.device)
        adapter, identity["base"] = load_base_and_attach(settings, prepared, weights, dtype, self.processes.device)
        self._same_run(snapshot, identity, "base")
        proof = digests_before(adapter, earlier) if self.processes.is_main else {}
        if warm is not None and warm_start(adapter, warm, new_head=new_head):
            refuse_checkpoint(prepared)
        if settings.training.retain is not None and warm is not None:
            identity["start"] = digest_of(adapter.state_dict())
            self._same_run(snapshot, identity, "start")
        prepared = start_head(adapter, prepared, warm=warm is not None and not new_head)
        trainer = Trainer(
            adapter,
            prepared.task,
            prepared.tokenizer,
            training_data(prepared, sampler_of(settings, prepared.task, prepared.examples["train"])),
            settings.training,
            RunContext(self.checkpoints, bus, self.stop, identity, self.shared_cache),
            dtype=dtype,
            distributed=self.processes,
        )
        meter = RetainedMeter(prepared.retained, adapter, trainer.evaluate, settings.evaluation, identity["base"])
        self.manifest = opening(settings, prepared, adapter, identity["base"], compute_of(trainer))
        self.manifest[KEY] = proof
        if earlier.get("cost"):
            self.manifest |= {name: earlier[name] for name in ("cost", "trunk") if name in earlier}
        self._check_readable(trainer)
        self.processes.barrier()  # all have loaded what they need, before anything is replaced
        if self.processes.is_main:
            bus.listeners.remove(early.append)
            self._open_folder(snapshot)
        with self._logs(snapshot, early) as log_position:
            with self._before_the_first_step(trainer, meter):
                retention = retention_of(settings, prepared, trainer, meter)
            if snapshot is None:
                bus(Event("start", 0, **run_plan(trainer), parameters=self.manifest["parameters"]))
            else:
                trainer.restore(snapshot)
                bus(Event("resume", snapshot.step, path=str(self.checkpoints.path(snapshot.step))))
                if text := environment_warning(snapshot.state["run"], identity):
                    bus(Event("warning", snapshot.step, text=text))
            asked, used = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), str(dtype).removeprefix("torch.")
            if asked != "no" and LAUNCHED_PRECISION.get(asked) != used:
                text = (
                    f"accelerate's mixed precision ({asked}) is not used: training.compute_type decides; it is {used}"
                )
                bus(Event("warning", trainer.state.step, text=text))
            with self._recording_failure(trainer):
                with peak_memory(above=baseline, device=self.processes.device) as peak:
                    trainer.fit(log_position)
                held = self.processes.total_bytes(peak.bytes)
                first = None if trainer.clock.first_step_at is None else trainer.clock.first_step_at - self.started_at
                planned = (
                    planned_cost(plan, settings, prepared, sharing, trainer, held) if self.processes.is_main else {}
                )
                cost: dict[str, Any] = {**planned, "peak_memory_bytes": held, "first_step_seconds": first}
                cost |= {} if retention is None else {"retention": retention.cost()}
                with self.processes.gathered(adapter.model):
                    finish(trainer, prepared, settings, self.folder, self.manifest, cost, meter, trial=self.trial)

    @contextmanager
    def _before_the_first_step(self, trainer: Any, meter: Any) -> Iterator[None]:
        """Measure what is to be retained on the model as it starts, of a resumed run as well, before the block."""
        from graftwerk.training import rng
        from graftwerk.training.validation import StopEvaluation

        for text in meter.notes:
            self.bus(Event("warning", 0, text=text))
        try:
            if meter.entries and not self.trial:
                self.bus(Event("phase", 0, name="measuring what is to be retained"))
                with rng.untouched(self.processes.device):
                    meter.start()
            yield
        except StopEvaluation:
            raise RunInterrupted(
                self.stop.signum or 15,
                "stopped before the first step",
                recovered=self.checkpoints.recoverable(),
                hint="run the same command with --resume to continue",
            ) from None

    def _same_run(self, snapshot: Snapshot | None, identity: Mapping[str, Any], part: str) -> None:
        if snapshot is not None:
            folder = self.checkpoints.path(snapshot.step)
            with understood(folder / STATE):
                known, position = snapshot.state["run"].get(part), snapshot.state["log_position"]
                if type(position) is not int or position < 0:
                    raise TypeError("`log_position` is no number of bytes")
                if type(count := snapshot.state["processes"]) is not int or count < 1:
                    raise TypeError("`processes` is no number of them")
            refuse_changes({part: known}, {part: identity[part]}, folder)

    def _check_readable(self, trainer: Any) -> None:
        """Raise, before anything is trained, for a run whose files could be written but not be read again.

        Raises:
            ConfigError: Settings, labels or names of tensors exceed a limit of the readers.
        """
        from graftwerk.serialization.folder import check_storable
        from graftwerk.serialization.safetensors_header import check_writable
        from graftwerk.training.optim import optimizer_tensors

        for path, values in (
            (self.folder.path / MANIFEST, self.manifest),
            (self.checkpoints.folder / STATE, {"run": trainer.identity}),
        ):
            dump_object(values, path, room=0.5)  # training adds to the other half
        check_storable(trainer.adapter)
        folder = self.checkpoints.folder
        check_writable(trainer.adapter.state_dict(), folder / WEIGHTS)
        check_writable(optimizer_tensors(trainer.optimizer), folder / OPTIMIZER, scale=OPTIMIZER_SCALE)

    def _open_folder(self, snapshot: Snapshot | None) -> None:
        """Make the folder this run's: remove the files of an earlier run unless this one resumes it."""
        if snapshot is None:
            self.folder.clear(augmented=bool(self.settings.data.augment))
        else:
            self.checkpoints.finish_pruning(snapshot)
        self.folder.write_manifest(self.manifest)
        resolved = self.settings.dump()
        if REDACTED in resolved:
            self.bus(Event("warning", 0, text=SECRETS_LEFT_OUT))
        self.folder.write_config(resolved)

    @contextmanager
    def _logs(self, snapshot: Snapshot | None, early: list[Event]) -> Iterator[Callable[[], int]]:
        """Open the log files; yield the function that forces the event log to the disk and returns its size."""
        if not self.processes.is_main:
            yield lambda: 0
            return
        step = 0 if snapshot is None else snapshot.step
        offset = 0 if snapshot is None else int(snapshot.state["log_position"])
        wanted = self.settings.training.report_to

        def warn(text: str) -> None:
            self.bus(Event("warning", step, text=text))

        log = JsonLines(self.folder.log, offset, warn) if "jsonl" in wanted else None
        board = (
            TensorBoard(self.folder.tensorboard, step if snapshot else None, warn) if "tensorboard" in wanted else None
        )
        writers: list[Any] = [writer for writer in (log, board) if writer is not None]
        tree = redacted(self.settings.model_dump(mode="json"))
        writers += [
            Tracking(SERVICES[name](), self.folder.path, tree, resumed=snapshot is not None, on_trouble=warn)
            for name in wanted
            if name in SERVICES
        ]
        self.bus.listeners.extend(writers)
        try:
            if log is not None and log.missing:
                warn(f"{log.path} is {log.missing:,} bytes shorter than it was at the checkpoint")
            for event in early if log is not None and snapshot is None else ():
                log(event)  # type: ignore[misc]  # events from before the folder was this run's
            yield log.sync if log is not None else self._log_bytes
        finally:
            for writer in writers:
                self.bus.listeners.remove(writer)
                writer.close()

    def _log_bytes(self) -> int:
        """Return the size of the existing event log in bytes, 0 if there is none."""
        return self.folder.log.stat().st_size if self.folder.log.is_file() else 0

    @contextmanager
    def _recording_failure(self, trainer: Any) -> Iterator[None]:
        """Write into the manifest how a failed run ended, if it can still be written."""
        try:
            yield
        except BaseException as error:
            if self.processes.is_main:
                status = "diverged" if isinstance(error, DivergedError) else "interrupted"
                content = error.as_dict() if isinstance(error, ErrorReport) else {"error": type(error).__name__}
                if status == "diverged":  # a budget of time counts it
                    self.manifest["cost"] = {**self.manifest["cost"], "training_seconds": trainer.clock.seconds()}
                # The first error is the one to report, not another one on top of it.
                with contextlib.suppress(GraftwerkError, OSError):
                    self.folder.write_manifest({**self.manifest, "status": status, "error": content})
            raise
