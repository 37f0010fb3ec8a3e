"""Jobs of a comparison or a search on the machines of a Ray cluster, behind the interface of `JobRunner`.

A `RayRunner` has an actor on one of the machines, with the resources of one job; the actor has a `JobRunner` of its own
there. So a job is what it is without Ray: a fork of a process that has imported everything, with the same messages and
the same end by a signal. If the actor is lost with its machine or its process, the job is begun again by another one,
and resumes from its last checkpoint if that can be seen there.

Folders: on a machine that sees the folder of the comparison (a shared file system, or the machine itself) a job works
in it. On any other it works under the same path of that machine; before it, what there is of its run folder is sent
there, and after it, whatever its end, the folder is sent back through Ray; it is removed there once it has arrived.
Nothing but JSON text and tar files travels.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, ErrorReport, ResourceError
from graftwerk.experiments.header import own_version
from graftwerk.experiments.job_runner import Crashed, JobRunner, OnEvent, rebuilt, signals_to
from graftwerk.experiments.ray_actor import RayActor, folder_of
from graftwerk.experiments.run_archive import pack, unpack
from graftwerk.training.lock import wait_for
from graftwerk.training.run_dir import LOCK

RETRIES = 3
"""Times that a job whose actor was lost is begun again."""
CONNECT_SECONDS = 5.0
LOOK_SECONDS = 0.5
CLOSE_SECONDS = 60.0
DEFAULT_PORT = 6379
INSTALL = "pip install 'graftwerk[ray]', on every machine of the cluster"


class RayRunner(JobRunner):
    """A job runner whose jobs run on a machine of the cluster.

    Args:
        log: Where what the processes print goes.
        start: Makes an actor of `RayActor` from its arguments.
        ray: The package.
    """

    def __init__(self, log: Path, start: Callable[..., Any], ray: Any, threads: int = 1) -> None:
        super().__init__(log, threads)
        self.folder, self._start, self._ray = log.parent, start, ray
        self._actor: Any = None
        self._heard = False
        self.shared = True

    def run(self, job: Mapping[str, Any], on_event: OnEvent) -> dict[str, Any]:
        """Do a job, on another machine again if the one that does it is lost.

        Raises:
            GraftwerkError: What the job raised.
            Crashed: Its process died, or its machine was lost time after time.
            ResourceError: The cluster is gone, or a machine of it cannot work for this one.
            RunInterrupted: A signal came, or the job was asked to end; what it had is saved.
        """
        lost = 0
        with signals_to([self]), self._ended_at_most_once():
            while True:
                self.check()
                try:
                    result, error = self._once(job, on_event, again=lost > 0)
                    break
                except self._ray.exceptions.RayActorError as died:
                    lost += 1
                    self._begin_again(job, lost, str(died), on_event)
                except self._ray.exceptions.RayError as fault:
                    raise ResourceError(
                        f"the Ray cluster failed: {str(fault).strip().splitlines()[-1][:300]}",
                        hint="look at `ray status`; the same command again resumes",
                    ) from None
            if self.signum is not None:
                raise self._stopped(self.signum, kept=error.recovered if error is not None else None)
            if error is not None:
                raise error
            assert result is not None
            return result

    def _begin_again(self, job: Mapping[str, Any], lost: int, died: str, on_event: OnEvent) -> None:
        """Forget an actor that was lost, unless it is hopeless to make another one."""
        self._actor = None
        self._check_wanted()
        last = died.strip().splitlines()[-1]
        if "creation task" in died:
            hint = INSTALL if "graftwerk" in last else "the folder of the comparison must be writable there, too"
            raise ResourceError(f"a machine of the Ray cluster cannot run for this one: {last[:300]}", hint=hint)
        if lost > RETRIES:
            raise Crashed(f"the Ray workers of this run were lost, {lost} in all: {last[:300]}", where=str(self.log))
        text = f"its Ray worker was lost, and it is begun again on another one ({last[:200]})"
        on_event({"kind": "warning", "step": 0, "text": text})
        if (folder := folder_of(job)) is not None and self.shared:
            wait_for(folder)  # its job may still be saving

    def _once(
        self, job: Mapping[str, Any], on_event: OnEvent, again: bool
    ) -> tuple[dict[str, Any] | None, ErrorReport | None]:
        actor, folder, text = self._ready(on_event), folder_of(job), json.dumps(job, default=str)
        archive = pack(folder) if folder is not None and folder.is_dir() and not self.shared else None
        stream = actor.run.options(num_returns="streaming").remote(text, archive, again)
        result: dict[str, Any] | None = None
        error: ErrorReport | None = None
        content = bytearray()
        self._heard = False
        for reference in stream:
            message = self._ray.get(reference)
            with self._lock:
                first, self._heard = not self._heard, True
                ending = first and self._ending
            if ending:  # it was asked to before there was a job to ask
                actor.end_job.remote()
            if isinstance(message, bytes):
                content += message
                continue
            said = json.loads(message)
            if "event" in said:
                on_event(said["event"])
            elif "done" in said:
                result = said["done"]
            else:
                error = rebuilt(said["error"])
        if content and folder is not None:
            unpack(bytes(content), folder)
            with suppress(self._ray.exceptions.RayError):  # what is lost with the machine need not be removed
                self._ray.get(actor.remove.remote(text))
        return result, error

    def _ready(self, on_event: OnEvent) -> Any:
        """Return the actor, made and asked what machine it is on if there is none."""
        if self._actor is not None:
            return self._actor
        lock = self.folder / LOCK
        actor = self._start(str(self.folder), str(self.log), lock.read_text() if lock.is_file() else "", self.threads)
        reference = actor.facts.remote()
        while not self._ray.wait([reference], timeout=LOOK_SECONDS)[0]:  # the cluster may be busy with other work
            if self.signum is not None or self._ending:
                self._ray.kill(actor)
                self._check_wanted()
        found = json.loads(self._ray.get(reference))
        for name, own in (("graftwerk", own_version()), ("torch", version("torch"))):
            if found[name] != own:
                raise ResourceError(
                    f"the machine {found['host']} has {name} {found[name]}, and this one {own}: runs would differ",
                    hint="install the same version on every machine of the cluster",
                )
        self.shared, self._actor = bool(found["shared"]), actor
        if not self.shared:
            text = (
                f"{found['host']} does not see {self.folder}: run folders come back through Ray; rows and model must "
                "be there under the same paths"
            )
            on_event({"kind": "warning", "step": 0, "text": text})
        return actor

    def end_job(self) -> None:
        """Ask the job to save and end; one that is lost with its worker is not begun again."""
        with self._lock:
            asked, self._ending = self._ending, True
            actor = self._actor if self._heard else None
        if actor is not None and not asked:
            actor.end_job.remote()

    def release(self) -> None:
        """Give the resources back: the cluster may have shrunk, and a runner that lost its machine waits for them."""
        self._close()

    def _pass_on(self, signum: int) -> None:
        if (actor := self._actor) is not None:
            # not from within a handler of a signal, which may have stopped Ray's own code
            threading.Thread(target=lambda: actor.interrupt.remote(signum)).start()

    def _close(self) -> None:
        actor, self._actor = self._actor, None
        if actor is None:
            return
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(actor.close.remote(), timeout=CLOSE_SECONDS)
        self._ray.kill(actor)


class RayCluster:
    """The machines of a Ray cluster. A context manager, which connects and disconnects.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, the address of its head (``10.0.0.1:6379``), or
            ``local`` for a cluster of this machine alone, which ends with the context.
        resources: What one job takes: ``CPU=2,GPU=1``, or a mapping. Default: one CPU, and one GPU if there are any.
        at_once: Jobs at the same time, or None for as many as there is room for.

    Raises:
        ConfigError: The resources cannot be read.
        ResourceError: Ray is not installed.
    """

    def __init__(
        self, address: str, resources: str | Mapping[str, float] | None = None, at_once: int | None = None
    ) -> None:
        self.address, self.resources, self.wanted, self.at_once = address, read_resources(resources), at_once, 1
        try:
            import ray
        except ImportError:
            raise ResourceError("a Ray cluster needs the package ray", hint=INSTALL) from None
        self.ray: Any = ray

    def __enter__(self) -> RayCluster:
        ray, before = self.ray, signal.getsignal(signal.SIGTERM)
        self._ours = not ray.is_initialized()
        if self._ours:
            self._connect()
            if threading.current_thread() is threading.main_thread():
                signal.signal(
                    signal.SIGTERM, before or signal.SIG_DFL
                )  # Ray's own handler would end this process at once
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not self.resources and any(node.get("GPU") for node in nodes):
            self.resources = {"GPU": 1.0}
        self.resources = {"CPU": 1.0, **self.resources}
        takes = {name: amount for name, amount in self.resources.items() if amount}
        room = sum(int(min(node.get(name, 0.0) / amount for name, amount in takes.items())) for node in nodes)
        if not room:
            self.__exit__(None, None, None)
            said = ", ".join(f"{name} {amount:g}" for name, amount in takes.items())
            raise ResourceError(
                f"no machine of the Ray cluster has what one run takes: {said}",
                hint="fewer resources (--resources CPU=1); `ray status` says what there is",
            )
        self.at_once = min(self.wanted or room, room)
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            self.ray.shutdown()

    def runners(self, log: Path, most: int | None = None) -> list[JobRunner]:
        """Return job runners; their actors start with their first jobs."""
        others = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU", "memory")}
        actor = self.ray.remote(RayActor).options(
            num_cpus=self.resources["CPU"], num_gpus=self.resources.get("GPU", 0), resources=others,
            memory=self.resources.get("memory"), max_restarts=0, max_concurrency=3,
        )  # fmt: skip
        threads = max(1, int(self.resources["CPU"]))
        count = min(self.at_once, most or self.at_once)
        return [RayRunner(log, actor.remote, self.ray, threads) for _ in range(count)]

    def _connect(self) -> None:
        """Connect to the cluster, or start one.

        Raises:
            ResourceError: It cannot be reached.
        """
        if self.address.startswith("ray://"):
            hint = "run the command on a machine of the cluster: --ray auto"
            raise ResourceError("Ray's client (`ray://`) cannot stream the events of a run", hint=hint)
        if self.address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        elif self.address != "auto":
            host, _, port = self.address.rpartition(":") if ":" in self.address else (self.address, "", DEFAULT_PORT)
            try:  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            except (OSError, ValueError, OverflowError) as error:
                raise _unreachable(self.address, str(error)) from None
        try:
            self.ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", include_dashboard=False
                          if self.address == "local" else None)  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise _unreachable(self.address, str(error)) from None


def _unreachable(address: str, why: str) -> ResourceError:
    return ResourceError(
        f"there is no Ray cluster at `{address}`: {why.strip().splitlines()[0][:200]}",
        where="ray",
        hint="`ray start --head` starts one, `ray start --address HOST:6379` joins one; --ray local needs none",
    )


def read_resources(given: str | Mapping[str, float] | None) -> dict[str, float]:
    """Parse what one job takes of a cluster.

    Args:
        given: ``CPU=2,GPU=0.5,memory=4e9``, with Ray's names, or a mapping; None is the default.

    Raises:
        ConfigError: Something of it is no name with a number.

    Example:
        >>> read_resources("CPU=2,GPU=1")
        {'CPU': 2.0, 'GPU': 1.0}
    """
    named = [part.partition("=")[::2] for part in given.split(",")] if isinstance(given, str) else (given or {}).items()
    found: dict[str, float] = {}
    for name, amount in named:
        name = name.strip()
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = -1.0
        broken = found[name] > 1 and found[name] % 1  # Ray shares out parts of one alone
        if not name or broken or not 0 <= found[name] < float("inf") or (name == "CPU" and not found[name]):
            raise ConfigError(
                f"`{name}={amount}` is no resource of a run", where="resources", hint="for instance CPU=2,GPU=1"
            )
    return found
