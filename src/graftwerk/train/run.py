"""`train`: from a run file to a run folder. What can be wrong is found in the order of what it costs to find it.

First the settings, then the folder, the data, the model; only then is anything of an earlier run replaced.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import DivergedError, EnvironmentFault, Explained, GraftwerkError
from graftwerk.own_files import refuse_links
from graftwerk.sanitize import REDACTED, redacted
from graftwerk.store.atomic import FAULTS
from graftwerk.store.safety import understood
from graftwerk.store.strict_json import dump_object
from graftwerk.train.checkpoint import OPTIMIZER, OPTIMIZER_SCALE, STATE, WEIGHTS, Checkpoints, Snapshot
from graftwerk.train.clock import seconds_since_process_start
from graftwerk.train.events import Event, Hub, JsonLines, Listener, TensorBoard, to_logging
from graftwerk.train.folder import CONFIG, MADE_BEFORE, MANIFEST, OURS, Run, RunFolder
from graftwerk.train.identity import environment_warning, refuse_changes
from graftwerk.train.lock import LOCK_FILE, RunLock
from graftwerk.train.signals import StopSignals

__all__ = ["Run", "train"]

SECRETS_LEFT_OUT = (
    f"a place in the run file holds a secret: no file of the run shows it (it says {REDACTED} there), and this user's "
    "cache remembers it for evaluating and going on here; elsewhere give the place again"
)
LAUNCHED_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}

_trained_before = False
"""Whether this process has trained already: then a run's clock starts with its call, not with the process."""


def train(
    config: RunConfig | str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
    **overrides: Any,
) -> Run:
    """Train an adapter as a run file says, and leave a run folder.

    Args:
        config: A run file, its content as a mapping, or a `RunConfig`.
        resume: Go on with the run in `output_dir`, bit for bit as if it had never stopped; begin it if there is none. A
            finished run is given back as it is.
        overwrite: Replace the run in `output_dir`.
        listener: Told every event as it happens (`train.events`); without one, what goes wrong goes to `logging`.
        overrides: Settings by name, over those of the run file: ``learning_rate=1e-3``, ``method="prefix"``; dotted
        keys as
            ``**{"data.max_train_rows": 100}``.

    Raises:
        ConfigError, DataError, ModelError, EnvironmentFault: found before anything is trained or replaced.
        UnsupportedError: several processes were asked for, and this one cannot be forked.
        ConflictError: another process trains there; there is a run already; or what is resumed is another run.
        Interrupted: SIGINT or SIGTERM, after the state was saved.
        DivergedError: loss or gradients were not finite again and again.
        IntegrityError: no checkpoint is whole; a file of the run is a link.
    """
    global _trained_before
    began = time.monotonic() - (0.0 if _trained_before else seconds_since_process_start())
    _trained_before = True
    settings = _read_config(config, overrides).anchored()
    settings.dump()  # what could not be written, or not be read again, is refused before anything is done
    folder = RunFolder(settings.output_dir)
    refuse_links(folder.path, (LOCK_FILE, *MADE_BEFORE, *OURS))
    from graftwerk.train import helpers
    from graftwerk.train.how_many import wanted
    from graftwerk.train.launch import Processes, is_main_process

    checkpoints = Checkpoints(folder.checkpoints, limit=settings.training.save_total_limit)
    count = wanted(settings, checkpoints, resume)
    with helpers.sharing(count, checkpoints.latest_said):
        main = is_main_process()
        hub = Hub(*([listener or to_logging] if main else []))
        checkpoints.warn = lambda text: hub(Event("warning", 0, text=text))
        stop = StopSignals(kept=checkpoints.latest_said)
        with stop.installed(), RunLock(folder.path) if main else nullcontext():
            hub.listeners.insert(0, lambda event: stop.check())
            earlier = folder.settle(resume=resume, overwrite=overwrite) if main else None
            finished = earlier is not None and earlier["status"] == "finished"
            if finished:
                _refuse_other_settings(settings, folder)
            if main:
                checkpoints.clean()
            processes = Processes(sharing=count > 1)
            if not processes.agree(finished):  # the main process has looked at the folder; the others do as it does
                with _saved_said(checkpoints):
                    _Work(settings, folder, checkpoints, stop, hub, processes, began).do(resume)
            elif main:
                hub(Event("nothing_left", 0, text=f"the run in {folder.path} is finished; nothing was left to do"))
            processes.wait()
    return Run(folder.path)


@contextmanager
def _saved_said(checkpoints: Checkpoints) -> Iterator[None]:
    """Errors of disk and memory say what is whole on the disk, whatever it was that could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        what, mend = FAULTS[error.errno]
        where = str(error.filename) if error.filename else None
        raise EnvironmentFault(what, where=where, mend=mend, kept=checkpoints.whole_said()) from error
    except EnvironmentFault as error:
        error.kept = checkpoints.whole_said() or error.kept
        raise


def _read_config(config: RunConfig | str | Path | Mapping[str, Any], overrides: dict[str, Any]) -> RunConfig:
    if isinstance(config, RunConfig):
        return RunConfig.build(config.model_dump(mode="json"), overrides) if overrides else config
    if isinstance(config, Mapping):
        return RunConfig.build(copy.deepcopy(dict(config)), overrides)  # overrides are put into it
    return RunConfig.load(config, overrides)


def _refuse_other_settings(settings: RunConfig, folder: RunFolder) -> None:
    """A finished run is given back only to who asks for that very run."""
    written = folder.path / CONFIG
    if written.is_file():
        before = RunConfig.load(written).model_dump(mode="json")
        refuse_changes({"config": before}, {"config": settings.model_dump(mode="json")}, folder.adapter)


class _Work:
    """One call of `train` inside its locked folder."""

    def __init__(
        self,
        settings: RunConfig,
        folder: RunFolder,
        checkpoints: Checkpoints,
        stop: StopSignals,
        hub: Hub,
        processes: Any,
        began: float,
    ) -> None:
        self.settings, self.folder, self.checkpoints, self.stop = settings, folder, checkpoints, stop
        self.hub, self.processes, self.began = hub, processes, began
        self.manifest: dict[str, Any] = {}

    def do(self, resume: bool) -> None:
        from graftwerk.evaluate.cost import peak_memory, resident
        from graftwerk.models.hardware import TYPES, compute_type, set_threads
        from graftwerk.train.augmented import add_augmented
        from graftwerk.train.finish import finish
        from graftwerk.train.gate import first_batch, refuse_grave
        from graftwerk.train.loop import Trainer
        from graftwerk.train.manifest import compute_of, data_identity, environment, opening
        from graftwerk.train.mode import check_compute_type
        from graftwerk.train.prepare import load_graft, prepare
        from graftwerk.train.sets import sampler_of
        from graftwerk.train.warm import warm_labels, warm_start

        settings, hub = self.settings, self.hub
        set_threads()
        dtype = compute_type(settings.training.compute_type, self.processes.device)
        types = list(TYPES.values())  # each process has tried for itself what is fast
        dtype = types[self.processes.of_main(types.index(dtype))]
        check_compute_type(dtype, self.processes.device)
        snapshot = self.checkpoints.load_latest() if resume else None
        identity: dict[str, Any] = {
            "config": redacted(settings.model_dump(mode="json")),
            "environment": environment(),
        }
        self._same_run(snapshot, identity, "config")
        early: list[Event] = []
        hub.listeners.append(early.append)
        hub(Event("phase", 0, name="reading the data"))
        prepared = prepare(settings, hub, warm_labels(settings.training.warm_start))
        refuse_grave(prepared.findings, settings.data.allow)
        if snapshot is None:
            batch = first_batch(
                settings, prepared.task, prepared.splits, prepared.examples["train"], prepared.tokenizer
            )
            hub(Event("first_batch", 0, **batch))
        prepared = add_augmented(prepared, settings, self.folder.path, hub, self.processes)
        identity["data"] = data_identity(prepared)
        self._same_run(snapshot, identity, "data")
        hub(Event("phase", 0, name="loading the model"))
        baseline = resident(self.processes.device)
        graft, identity["base"] = load_graft(settings, prepared)
        self._same_run(snapshot, identity, "base")
        if settings.training.warm_start is not None:
            warm_start(graft, settings.training.warm_start)
        trainer = Trainer(
            graft,
            prepared.task,
            prepared.tokenizer,
            prepared.examples["train"],
            prepared.examples["validation"],
            settings.training,
            checkpoints=self.checkpoints,
            emit=hub,
            stop=self.stop,
            identity=identity,
            dtype=dtype,
            prior_loss=prepared.prior_loss,
            processes=self.processes,
            max_length=prepared.max_length,
            draw=sampler_of(settings, prepared.task, prepared.examples["train"]),
            labels=prepared.splits.labels or (),
        )
        self.manifest = opening(settings, prepared, graft, identity["base"], compute_of(trainer))
        self._check_readable(trainer)
        self.processes.wait()  # all have loaded what they need, before anything is replaced
        if self.processes.main:
            hub.listeners.remove(early.append)
            self._open_folder(snapshot)
        with self._logs(snapshot, early) as log_position:
            trainer.log_position = log_position
            if snapshot is None:
                hub(Event("start", 0, **trainer.plan(), parameters=self.manifest["parameters"]))
            else:
                trainer.restore(snapshot)
                hub(Event("resume", snapshot.step, path=str(self.checkpoints.path(snapshot.step))))
                if text := environment_warning(snapshot.state["run"], identity):
                    hub(Event("warning", snapshot.step, text=text))
            asked, used = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), str(dtype).removeprefix("torch.")
            if asked != "no" and LAUNCHED_PRECISION.get(asked) != used:
                text = (
                    f"accelerate's mixed precision ({asked}) is not used: training.compute_type decides; it is {used}"
                )
                hub(Event("warning", trainer.state.step, text=text))
            with self._failure_noted():
                with peak_memory(above=baseline, device=self.processes.device) as peak:
                    trainer.fit()
                held = self.processes.held(peak.bytes)
                first = None if trainer.first_step_at is None else trainer.first_step_at - self.began
                finish(trainer, prepared, settings, self.folder, self.manifest, peak=held, first_step=first)

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
        """Refuse a run whose files could be written but not be read again, before anything is trained.

        Raises:
            ConfigError: settings, labels or the names of tensors exceed a limit of the readers.
        """
        from graftwerk.store.folder import check_storable
        from graftwerk.store.header import check_writable
        from graftwerk.train.optim import optimizer_tensors

        for path, values in (
            (self.folder.path / MANIFEST, self.manifest),
            (self.checkpoints.folder / STATE, {"run": trainer.identity}),
        ):
            dump_object(values, path, room=0.5)  # the other half is for what training adds
        check_storable(trainer.graft)
        folder = self.checkpoints.folder
        check_writable(trainer.graft.state_dict(), folder / WEIGHTS)
        check_writable(optimizer_tensors(trainer.optimizer), folder / OPTIMIZER, scale=OPTIMIZER_SCALE)

    def _open_folder(self, snapshot: Snapshot | None) -> None:
        """From here on the folder is this run's; what an earlier one left goes, unless this one goes on with it."""
        if snapshot is None:
            self.folder.clear(augmented=bool(self.settings.data.augment))
        else:
            self.checkpoints.settle(snapshot)
        self.folder.write_manifest(self.manifest)
        resolved = self.settings.dump()
        if REDACTED in resolved:
            self.hub(Event("warning", 0, text=SECRETS_LEFT_OUT))
        self.folder.write_config(resolved)

    @contextmanager
    def _logs(self, snapshot: Snapshot | None, early: list[Event]) -> Iterator[Callable[[], int]]:
        """The log files, open; gives what forces the event log to the disk and says how long it is."""
        if not self.processes.main:
            yield lambda: 0
            return
        step = 0 if snapshot is None else snapshot.step
        offset = 0 if snapshot is None else int(snapshot.state["log_position"])
        wanted = self.settings.training.report_to

        def trouble(text: str) -> None:
            self.hub(Event("warning", step, text=text))

        log = JsonLines(self.folder.log, offset, trouble) if "jsonl" in wanted else None
        board = (
            TensorBoard(self.folder.tensorboard, step if snapshot else None, trouble)
            if "tensorboard" in wanted
            else None
        )
        writers = [writer for writer in (log, board) if writer is not None]
        self.hub.listeners.extend(writers)
        try:
            if log is not None and log.missing:
                trouble(f"{log.path} is {log.missing:,} bytes shorter than it was at the checkpoint")
            for event in early if log is not None and snapshot is None else ():
                log(event)  # type: ignore[misc]  # what was said before there was a folder to say it in
            yield log.sync if log is not None else self._log_bytes
        finally:
            for writer in writers:
                self.hub.listeners.remove(writer)
                writer.close()

    def _log_bytes(self) -> int:
        """Of a log that is not written now, but may have been, and may be again."""
        return self.folder.log.stat().st_size if self.folder.log.is_file() else 0

    @contextmanager
    def _failure_noted(self) -> Iterator[None]:
        """The manifest says how it ended, if it can still be written."""
        try:
            yield
        except BaseException as error:
            if self.processes.main:
                status = "diverged" if isinstance(error, DivergedError) else "interrupted"
                said = error.as_dict() if isinstance(error, Explained) else {"error": type(error).__name__}
                # The error that brought us here is the one to report, not one on top of it.
                with contextlib.suppress(GraftwerkError, OSError):
                    self.folder.write_manifest({**self.manifest, "status": status, "error": said})
            raise
