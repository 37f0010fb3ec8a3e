"""One run in one process, from the lock on its folder to the finished manifest.

Read `RunDriver._train` first: the rows are read, the model is loaded, and only then is anything of an earlier run
replaced; the training begins or resumes, and what it gave is measured and stored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.config import RunConfig
from graftwerk.errors import DivergedError, ErrorReport, GraftwerkError, ResourceError, RunInterrupted
from graftwerk.sanitize import REDACTED, redacted
from graftwerk.serialization.atomic import FAULTS
from graftwerk.serialization.strict_json import dump_object
from graftwerk.training.checkpoint import OPTIMIZER_SCALE, Checkpoints, Snapshot
from graftwerk.training.events import Event, EventBus
from graftwerk.training.lock import RunLock
from graftwerk.training.resume_check import check_same_run, check_same_settings, environment_warning
from graftwerk.training.run_dir import MANIFEST, OPTIMIZER, STATE, WEIGHTS, RunDir
from graftwerk.training.run_logs import open_logs
from graftwerk.training.signals import StopSignals

if TYPE_CHECKING:
    import torch

    from graftwerk.modeling.attach import Adapter
    from graftwerk.modeling.quantize import QuantizationErrors
    from graftwerk.training.retained import RetainedMeter
    from graftwerk.training.retention.retention import Retention
    from graftwerk.training.setup import Prepared
    from graftwerk.training.trainer import Trainer

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
        self.errors: QuantizationErrors | None = None

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
                check_same_settings(self.settings, self.folder)
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

    def _train(self, resume: bool, earlier: Mapping[str, Any]) -> None:
        """Read the data, load the model, train, and store the results.

        Args:
            resume: Continue from the newest checkpoint.
            earlier: Manifest of the run that is resumed. Once it names a cost its training is done (a trial's, or that
                of an end that was cut short), and what it cost stays true.
        """
        from graftwerk.evaluation.cost import resident
        from graftwerk.machine import give_back
        from graftwerk.models.hardware import set_threads
        from graftwerk.serialization.base_digests import KEY
        from graftwerk.training.finalize import finish
        from graftwerk.training.manifest import compute_of, environment, opening
        from graftwerk.training.mode import agree_on_types
        from graftwerk.training.multitask_sampling import sampler_of
        from graftwerk.training.retained import RetainedMeter
        from graftwerk.training.setup import training_data
        from graftwerk.training.trainer import Trainer
        from graftwerk.training.trainer_inputs import RunContext

        settings, bus = self.settings, self.bus
        set_threads()
        dtype, weights_dtype = agree_on_types(settings, self.processes)
        snapshot = self.checkpoints.load_latest() if resume else None
        identity: dict[str, Any] = {
            "config": redacted(settings.model_dump(mode="json")),
            "environment": environment(weights_dtype, settings.quantization is not None),
        }
        check_same_run(self.checkpoints, snapshot, identity, "config")
        early: list[Event] = []
        bus.listeners.append(early.append)
        prepared, plan = self._read_rows(snapshot, identity)
        bus(Event("phase", 0, name="loading the model"))
        give_back()  # what reading the rows has freed, which would be taken again unseen
        baseline = resident(self.processes.device)
        adapter, prepared, proof = self._load_model(prepared, dtype, weights_dtype, snapshot, identity, earlier)
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
        with self._logs(snapshot, early) as log_position, self._recording_failure(trainer):
            retention = self._begin(trainer, meter, prepared, snapshot)
            cost = self._fit(trainer, prepared, plan, baseline, log_position)
            cost |= {} if retention is None else {"retention": retention.cost()}
            with self.processes.gathered(adapter.model):
                finish(trainer, prepared, settings, self.folder, self.manifest, cost, meter, trial=self.trial)

    def _read_rows(self, snapshot: Snapshot | None, identity: dict[str, Any]) -> tuple[Prepared, Any]:
        """Read, check and encode the rows, augmented ones included, and plan the memory of the run.

        Args:
            snapshot: Checkpoint that is resumed, or None.
            identity: Identity of the run; that of its data is added, and compared with the checkpoint's.

        Returns:
            The rows, and what `check_memory` has planned, None in processes other than the main one.
        """
        from graftwerk.training.augmented import add_augmented
        from graftwerk.training.data_checks import first_batch, raise_on_severe
        from graftwerk.training.manifest import data_identity
        from graftwerk.training.planning.memory_check import check_memory
        from graftwerk.training.setup import prepare
        from graftwerk.training.warm_start import warm_labels

        settings, bus = self.settings, self.bus
        bus(Event("phase", 0, name="reading the data"))
        labels = None if settings.training.new_head else warm_labels(settings.training.warm_start)
        prepared = prepare(settings, bus, labels)
        raise_on_severe(prepared.findings, settings.data.allow)
        if snapshot is None:
            batch = first_batch(
                settings, prepared.task, prepared.splits, prepared.examples["train"], prepared.tokenizer
            )
            bus(Event("first_batch", 0, **batch))
        plan = None
        if self.processes.is_main:
            plan = check_memory(settings, prepared, self.processes.processes_per_device, bus)
        prepared = add_augmented(prepared, settings, self.folder.path, bus, self.processes)
        identity["data"] = data_identity(prepared)
        if settings.training.retain is not None:
            identity["retained"] = "+".join(entry.identity for entry in prepared.retained)
            check_same_run(self.checkpoints, snapshot, identity, "retained")
        check_same_run(self.checkpoints, snapshot, identity, "data")
        return prepared, plan

    def _load_model(
        self,
        prepared: Prepared,
        dtype: torch.dtype,
        weights_dtype: torch.dtype,
        snapshot: Snapshot | None,
        identity: dict[str, Any],
        earlier: Mapping[str, Any],
    ) -> tuple[Adapter, Prepared, dict[str, Any]]:
        """Load the base, attach the adapter, and give it the weights of a warm start.

        Args:
            prepared: Rows of the run.
            dtype: Compute type.
            weights_dtype: Type of the base's weights.
            snapshot: Checkpoint that is resumed, or None.
            identity: Identity of the run; that of base and start is added, and compared with the checkpoint's.
            earlier: Manifest of the run that is resumed.

        Returns:
            The adapter, the rows with their task as it starts, and digests of the base for the manifest.
        """
        from graftwerk.serialization.base_digests import digest_of
        from graftwerk.training.base_proof import digests_before
        from graftwerk.training.head_start import refuse_checkpoint, start_head
        from graftwerk.training.qera_start import errors_for
        from graftwerk.training.setup import load_base_and_attach
        from graftwerk.training.warm_start import warm_start

        settings, warm, new_head = self.settings, self.settings.training.warm_start, self.settings.training.new_head
        self.errors = errors_for(settings, resumed=snapshot is not None)
        adapter, identity["base"] = load_base_and_attach(
            settings, prepared, weights_dtype, dtype, self.processes.device, self.errors
        )
        check_same_run(self.checkpoints, snapshot, identity, "base")
        proof = digests_before(adapter, earlier) if self.processes.is_main else {}
        if warm is not None and warm_start(adapter, warm, new_head=new_head):
            refuse_checkpoint(prepared)
        if settings.training.retain is not None and warm is not None:
            identity["start"] = digest_of(adapter.state_dict())
            check_same_run(self.checkpoints, snapshot, identity, "start")
        return adapter, start_head(adapter, prepared, warm=warm is not None and not new_head), proof

    def _begin(
        self, trainer: Trainer, meter: RetainedMeter, prepared: Prepared, snapshot: Snapshot | None
    ) -> Retention | None:
        """Bring a new training, or a resumed one, to the point where its next step follows; tell the listeners.

        Args:
            trainer: The training, at step 0.
            meter: What is to be retained.
            prepared: Rows of the run.
            snapshot: Checkpoint that is resumed, or None.

        Returns:
            The strategies against forgetting, or None if the run has none.
        """
        from graftwerk.training.manifest import run_plan
        from graftwerk.training.retention.begin import retention_of

        with self._before_the_first_step(trainer, meter):
            retention = retention_of(self.settings, prepared, trainer, meter)
        if snapshot is None:
            self.bus(Event("start", 0, **run_plan(trainer), parameters=self.manifest["parameters"]))
        else:
            trainer.restore(snapshot)
            self.bus(Event("resume", snapshot.step, path=str(self.checkpoints.path(snapshot.step))))
            if text := environment_warning(snapshot.state["run"], trainer.identity):
                self.bus(Event("warning", snapshot.step, text=text))
        asked, used = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), str(trainer.dtype).removeprefix("torch.")
        if asked != "no" and LAUNCHED_PRECISION.get(asked) != used:
            text = f"accelerate's mixed precision ({asked}) is not used: training.compute_type decides; it is {used}"
            self.bus(Event("warning", trainer.state.step, text=text))
        return retention

    def _fit(
        self, trainer: Trainer, prepared: Prepared, plan: Any, baseline: int | None, log_position: Callable[[], int]
    ) -> dict[str, Any]:
        """Train to the end, and return what it cost.

        Args:
            trainer: The training.
            prepared: Rows of the run.
            plan: What `check_memory` has planned.
            baseline: Bytes that the process held before the model was loaded, or None if they are not known.
            log_position: As for `Trainer.fit`.
        """
        from graftwerk.evaluation.cost import peak_memory
        from graftwerk.training.planning.memory_check import planned_cost

        with peak_memory(above=baseline, device=self.processes.device) as peak:
            trainer.fit(log_position)
        held = self.processes.total_bytes(peak.bytes)
        first = None if trainer.clock.first_step_at is None else trainer.clock.first_step_at - self.started_at
        planned: Mapping[str, Any] = {}
        if self.processes.is_main:
            planned = planned_cost(plan, self.settings, prepared, self.processes.processes_per_device, trainer, held)
        return {**planned, "peak_memory_bytes": held, "first_step_seconds": first}

    @contextmanager
    def _before_the_first_step(self, trainer: Trainer, meter: RetainedMeter) -> Iterator[None]:
        """Initialize the adapter and measure the retained tasks before the block, in resumed runs too."""
        from graftwerk.training import rng
        from graftwerk.training.qera_start import start_from_errors
        from graftwerk.training.validation import StopEvaluation

        for text in meter.notes:
            self.bus(Event("warning", 0, text=text))
        try:
            if self.errors is not None:
                start_from_errors(trainer, self.errors)
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

    def _check_readable(self, trainer: Trainer) -> None:
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

    def _logs(self, snapshot: Snapshot | None, early: list[Event]) -> AbstractContextManager[Callable[[], int]]:
        """Open the logs, in the main process; elsewhere there is no event log, of 0 bytes."""
        if not self.processes.is_main:
            return nullcontext(lambda: 0)
        return open_logs(self.settings, self.folder, self.bus, snapshot, early)

    @contextmanager
    def _recording_failure(self, trainer: Trainer) -> Iterator[None]:
        """Write into the manifest how a failed run ended, if it can still be written."""
        try:
            yield
        except BaseException as error:
            if self.processes.is_main:
                status = "diverged" if isinstance(error, DivergedError) else "interrupted"
                content = error.as_dict() if isinstance(error, ErrorReport) else {"error": type(error).__name__}
                if status == "diverged":  # a budget of time counts it
                    cost = self.manifest.get("cost", {})
                    self.manifest["cost"] = {**cost, "training_seconds": trainer.clock.seconds()}
                # The first error is the one to report, not another one on top of it.
                with contextlib.suppress(GraftwerkError, OSError):
                    self.folder.write_manifest({**self.manifest, "status": status, "error": content})
            raise
