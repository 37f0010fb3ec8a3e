"""A job runner on a machine of a Ray cluster: the actor that `ray_cluster.RayRunner` sends its jobs to."""

from __future__ import annotations

import json
import platform
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftwerk.errors import ErrorReport
from graftwerk.experiments.header import own_version
from graftwerk.experiments.job_runner import JobRunner
from graftwerk.experiments.run_archive import pack, unpack
from graftwerk.training.run_dir import LOCK, TRUNK

CHUNK = 8 << 20
"""Bytes of a folder in one message."""


class RayActor:
    """Job runner on a machine of the cluster; the class of the actors.

    Args:
        folder: Folder of the comparison or search.
        log: Where what the processes print goes, if this machine sees the folder.
        lock: Content of the folder's lock file, by which it is recognised.
        threads: Threads of a job.
    """

    def __init__(self, folder: str, log: str, lock: str, threads: int) -> None:
        self.folder = Path(folder)
        try:
            self.shared = (self.folder / LOCK).read_text() == lock
        except OSError:
            self.shared = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runner = JobRunner(Path(log), threads)
        self.at_work = False

    def facts(self) -> str:
        """Return what the driver must know of this machine, as JSON."""
        return json.dumps({"shared": self.shared, "host": socket.gethostname(), "graftwerk": own_version(),
                           "torch": version("torch"), "python": platform.python_version()})  # fmt: skip

    def run(self, job: str, archive: bytes | None, again: bool = False) -> Iterator[str | bytes]:
        """Do a job, and yield its messages: JSON lines, and the bytes of its folder where that is not shared.

        Args:
            job: The job, as JSON.
            archive: What there is of its folder, or None.
            again: True if it was lost before: what it has left on this machine is ahead of the archive.
        """
        messages: queue.SimpleQueue[str | bytes | None] = queue.SimpleQueue()
        self.at_work = True
        threading.Thread(target=self._work, args=(json.loads(job), archive, again, messages.put), daemon=True).start()
        while (message := messages.get()) is not None:
            yield message

    def interrupt(self, signum: int) -> None:
        """Pass a signal on to the job at work."""
        self.runner.interrupt(signum)

    def end_job(self) -> None:
        """Ask the job at work to save and end; one that has ended already is not the next one."""
        if self.at_work:
            self.runner.end_job()

    def remove(self, job: str) -> None:
        """Remove the folder of a job: it has arrived where it was sent."""
        if (folder := folder_of(json.loads(job))) is not None:
            shutil.rmtree(_sent(folder), ignore_errors=True)

    def close(self) -> None:
        """End the processes, and leave nothing on a machine that does not share the folder."""
        self.runner.__exit__(None, None, None)
        if not self.shared:
            shutil.rmtree(self.folder / TRUNK, ignore_errors=True)
            self.runner.log.unlink(missing_ok=True)
            for folder in sorted((self.folder, *self.folder.rglob("*/")), reverse=True):
                with suppress(OSError):  # it is not empty
                    folder.rmdir()

    def _work(
        self, job: dict[str, Any], archive: bytes | None, again: bool, send: Callable[[str | bytes | None], None]
    ) -> None:
        folder = folder_of(job)
        try:
            if folder is not None and not self.shared:
                if again and not folder.exists() and _sent(folder).exists():
                    _sent(folder).rename(folder)  # it was lost on its way
                if archive is not None and not folder.exists():
                    unpack(archive, folder)  # one that is there was left by a job that was lost, and is ahead of it
            done = self.runner.run(job, lambda event: send(json.dumps({"event": event})))
            said = {"done": done}
        except ErrorReport as error:
            said = {"error": error.as_dict()}
        except BaseException as error:  # a defect must reach whoever waits
            said = _defect(error)
        try:
            if folder is not None and folder.is_dir() and not self.shared:
                content = pack(folder)
                shutil.rmtree(_sent(folder), ignore_errors=True)
                folder.rename(_sent(folder))  # not left in place, which may be where it arrives, unrecognised
                for at in range(0, len(content), CHUNK):
                    send(content[at : at + CHUNK])
        except BaseException as error:  # as above: without an end the driver would wait for ever
            said = _defect(error)
        finally:
            self.at_work = False
            send(json.dumps(said, default=str))
            send(None)


def _defect(error: BaseException) -> dict[str, Any]:
    return {"error": {"error": "error", "exit_code": 1, "what": f"{type(error).__name__}: {error}"}}


def _sent(folder: Path) -> Path:
    """Return where a run folder is kept until it has arrived."""
    return folder.with_name(f".{folder.name}.sent")


def folder_of(job: Mapping[str, Any]) -> Path | None:
    """Return the run folder of a job, or None if it has none."""
    return Path(job["config"]["output_dir"]) if "config" in job else None
