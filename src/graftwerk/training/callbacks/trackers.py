"""Weights & Biases and MLflow: settings, curves, final metrics and the adapter of a run, sent as it goes.

What a tracker does happens in a thread of its own with a bounded queue, since a server that does not answer must not
hold up a training: transformers' callbacks log in the training loop, where MLflow retries for minutes. A tracker that
fails, whatever the error, is reported once and left out. Values that a tracker does not take (long settings in MLflow,
more than a hundred at once) are cut or sent in parts here. The libraries read their own variables: WANDB_PROJECT,
WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import queue
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from graftwerk.errors import ConfigError, ResourceError
from graftwerk.own_files import open_own
from graftwerk.sanitize import clean
from graftwerk.serialization.atomic import write_file
from graftwerk.training.events import Event
from graftwerk.training.resume_check import flat
from graftwerk.training.run_dir import ADAPTER, TRACKERS

PROJECT = "graftwerk"
"""Project or experiment if the library's own variable names none."""
WAITING = 10_000
"""Events that wait for a slow tracker; more are left out and counted."""
CLOSE_SECONDS = 60.0
"""At the end of a run; what a tracker has not taken by then is left to it."""
KEY_HINT = "set WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline writes files that `wandb sync` sends later"


class Service(ABC):
    """One tracker, used by one thread. What it raises is reported as a warning."""

    name: ClassVar[str]

    @abstractmethod
    def open(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        """Begin, or continue the run that is known.

        Args:
            folder: The run folder.
            settings: Settings of the run by dotted key, without secrets.
            known: Name of the run at the tracker, or None for a new one.

        Returns:
            Name of the run at the tracker.
        """

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values of a step."""

    @abstractmethod
    def finish(self, values: Mapping[str, float], step: int, adapter: Path) -> None:
        """Send the final metrics and the adapter folder."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """End the run at the tracker."""


class WandB(Service):
    """Weights & Biases: a run, its summary, and an artifact of the type `model`."""

    name = "wandb"

    def open(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        import wandb

        quiet = wandb.Settings(console="off", silent=True, save_code=False, disable_git=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name,
            group=os.environ.get("WANDB_RUN_GROUP", folder.absolute().parent.name), config=dict(settings), id=known,
            resume="allow" if known else None, reinit="create_new", settings=quiet,
        )  # fmt: skip
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, values: Mapping[str, float], step: int, adapter: Path) -> None:
        import wandb

        self._run.summary.update(dict(values))
        artifact = wandb.Artifact(f"adapter-{self._run.id}", type="model")
        artifact.add_dir(str(adapter))
        self._run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow(Service):
    """MLflow, through its client: the active run of the user's own code is left alone."""

    name = "mlflow"

    def open(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        from mlflow.tracking import MlflowClient
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        self._client = MlflowClient()
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        named = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(named)
        experiment = self._client.create_experiment(named) if found is None else found.experiment_id
        self._id = str(self._client.create_run(experiment, run_name=folder.name).info.run_id)
        params = [(_allowed(key), str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in settings.items()]
        for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            self._batch(params=dict(params[start : start + MAX_PARAMS_TAGS_PER_BATCH]))
        return self._id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._batch(metrics={_allowed(key): value for key, value in values.items()}, step=step)

    def finish(self, values: Mapping[str, float], step: int, adapter: Path) -> None:
        self.log(values, step)
        self._client.log_artifacts(self._id, str(adapter), "adapter")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _batch(
        self, *, metrics: Mapping[str, float] | None = None, params: Mapping[str, str] | None = None, step: int = 0
    ) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id,
            metrics=[Metric(key, value, now, step) for key, value in (metrics or {}).items()],
            params=[Param(key, value) for key, value in (params or {}).items()],
        )


SERVICES: Mapping[str, type[Service]] = {service.name: service for service in (WandB, MLflow)}


def check_trackers(wanted: Sequence[str]) -> None:
    """Refuse a run whose trackers lack their package or their key, before anything is done.

    Raises:
        ResourceError: A package is not installed.
        ConfigError: Weights & Biases has no key for this user, and is not offline.
    """
    for name in SERVICES.keys() & set(wanted):
        if not installed(name):
            raise ResourceError(
                f"`training.report_to` names {name}, which is not installed",
                where="training.report_to",
                hint=f"pip install 'graftwerk[{name}]', or leave it out",
            )
    if "wandb" in wanted and os.environ.get("WANDB_MODE", "online") == "online" and not _has_key():
        raise ConfigError("Weights & Biases has no key for this user", where="training.report_to", hint=KEY_HINT)


def installed(package: str) -> bool:
    """Return True if a package can be imported."""
    return importlib.util.find_spec(package) is not None


def _has_key() -> bool:
    """Return True if a variable or the file that `wandb login` writes has a key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


class Tracking:
    """Listener that hands a run's events to one tracker, which works in a thread of its own.

    Args:
        service: The tracker.
        folder: The run folder.
        settings: Settings of the run, as plain values without secrets.
        resumed: The run continues, so its run at the tracker does too.
        on_trouble: Called with a text if the tracker fails; once.
        close_seconds: How long `close` waits for it.
    """

    def __init__(
        self,
        service: Service,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        resumed: bool,
        on_trouble: Callable[[str], None],
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self.service, self.folder, self.resumed = service, folder, resumed
        self._settings, self._on_trouble, self._patience = dict(flat(settings)), on_trouble, close_seconds
        self._waiting: queue.Queue[Event | None] = queue.Queue(WAITING)
        self._lost, self._trouble, self._told = 0, "", False
        self._thread = threading.Thread(target=self._work, name=f"graftwerk-{service.name}", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Hand over what a tracker shows; never waits and never raises."""
        self._tell()
        if event.kind not in ("step", "evaluation", "finish") or self._trouble:
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Wait for the tracker for a while, and end."""
        until = time.monotonic() + self._patience
        if self._thread.is_alive():  # one that failed takes nothing any more
            with suppress(queue.Full):
                self._waiting.put(None, timeout=self._patience)
        self._thread.join(max(until - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._trouble = f"it has not taken everything within {self._patience:g} seconds"
        elif self._lost:
            self._trouble = self._trouble or f"it was too slow, and {self._lost:,} events were left out"
        self._tell()

    def _tell(self) -> None:
        """Report trouble once, in the thread of the training."""
        if self._trouble and not self._told:
            self._told = True
            self._on_trouble(f"the tracker {self.service.name} failed: {self._trouble}; the run continues without it")

    def _work(self) -> None:
        opened = finished = False
        try:
            self._remember(self.service.open(self.folder, self._settings, self._known()))
            opened = True
            while (event := self._waiting.get()) is not None:
                if event.kind == "finish":
                    final = {**event.values["metrics"], "cost": event.values["cost"]}
                    self.service.finish(numbers(final), event.step, self.folder / ADAPTER)
                    finished = True
                else:
                    prefix = "train" if event.kind == "step" else "validation"
                    self.service.log({f"{prefix}/{key}": it for key, it in numbers(event.values).items()}, event.step)
        except Exception as error:  # whatever a library of others raises
            self._trouble = clean(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        if opened:
            with suppress(Exception):
                self.service.close(finished)

    def _known(self) -> str | None:
        if not self.resumed:
            return None
        with suppress(OSError, UnicodeDecodeError), os.fdopen(open_own(self._file, os.O_RDONLY), "rb") as file:
            return file.read(200).decode().strip() or None
        return None

    @property
    def _file(self) -> Path:
        """File with the name of the run at the tracker, by which a resumed run continues there."""
        return self.folder / TRACKERS / f"{self.service.name}.txt"

    def _remember(self, name: str) -> None:
        self._file.parent.mkdir(exist_ok=True)
        write_file(self._file, f"{name}\n", own=True)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a tree by key, with `/` between its levels; a metric's `value` has its name.

    Example:
        >>> numbers({"test": {"accuracy": {"value": 0.8, "low": 0.7, "note": "few rows"}}, "loss": float("nan")})
        {'test/accuracy': 0.8, 'test/accuracy/low': 0.7}
    """
    return {
        key.removesuffix(".value").replace(".", "/"): float(value)
        for key, value in flat(values)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _allowed(key: str) -> str:
    """Return a key with the characters that MLflow takes."""
    return re.sub(r"[^0-9A-Za-z_\-. :/]", "_", key)[:250]
