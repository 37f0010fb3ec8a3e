"""Checkpoints: folders of safetensors and JSON, written whole or not at all, every file with its SHA-256.

```
checkpoints/
  step-000125/  adapter.safetensors    the trained parameters by raw key (method and heads)
                optimizer.safetensors  AdamW's moments by raw key
                rng.safetensors        states of the random number generators, of every process
                state.json             position, schedule, best so far, identity of the run
                files.json             size and SHA-256 of the others; canonical, so that no bit of it can change unseen
  latest        text: the name of the newest intact one
  best          text: the name of the best evaluated one
```
The two pointers are for people and other programs. A run resumes from the newest folder that proves intact, so that
a lost or wrong pointer costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwerk.errors import DivergedError, GraftwerkError, IntegrityError
from graftwerk.methods.base_weights import all_finite
from graftwerk.serialization.atomic import recover, write_file, write_folder
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import read_json, read_tensors, understood
from graftwerk.training.run_dir import BEST, FILES, LATEST, OPTIMIZER, RNG, STATE, WEIGHTS
from graftwerk.training.tensorfile import write_tensors

FORMAT = 1
OPTIMIZER_SCALE = 8
"""Factor on the largest header of other files: there are three tensors for each trained one."""
_NAME = re.compile(r"step-(\d{6,})")
_DELETED = ".gone-"
"""Prefix of a folder that is being deleted: renamed first, so that a half-deleted checkpoint is never taken for one."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next step depends on.

    Attributes:
        step: Steps done.
        weights: Parameters by raw key.
        optimizer: Tensors as `optim.optimizer_tensors` returns them.
        rng: Tensors as `rng.capture` returns them, with ``<process>.`` before each name.
        state: Everything else, as JSON values. ``state["best"]`` is None or has the ``step`` of the best checkpoint.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: Mapping[str, Any]


class Checkpoints:
    """Checkpoints of one run.

    Args:
        folder: Folder of the checkpoints, made with the first.
        limit: Number of newest checkpoints that are not deleted, beside the best ones that these refer to.
        warn: Function that is told in words when a damaged checkpoint is skipped, or an old one cannot be deleted.
    """

    def __init__(self, folder: Path, *, limit: int = 2, warn: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.limit, self.warn = folder, limit, warn

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of the existing checkpoints, newest last, without verifying them."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> Path | None:
        """Return the newest existing checkpoint without verifying it, or None."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def recoverable(self) -> str | None:
        """Return the path of the newest checkpoint for an error's `recovered`, None if there is none."""
        latest = self.latest()
        return None if latest is None else str(latest)

    def intact(self) -> str | None:
        """Return the path of the newest intact checkpoint for the `recovered` of an error of the disk, or None."""
        for step in reversed(self.steps()):
            with contextlib.suppress(IntegrityError):
                _verify(self.path(step))
                return str(self.path(step))
        return None

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, move the pointers, delete checkpoints that are no longer needed.

        Returns:
            The folder of the checkpoint.

        Raises:
            DivergedError: A weight is not finite; nothing is written.
            ResourceError: The checkpoint cannot be written; the earlier ones are untouched.
        """
        if bad := [key for key, tensor in snapshot.weights.items() if not all_finite(tensor)]:
            raise DivergedError(
                f"after step {snapshot.step} {len(bad)} trained tensors are not finite (the first: {bad[0]}); "
                f"they are not saved",
                hint="a lower training.learning_rate, a longer training.warmup_ratio, or training.max_grad_norm=1",
                recovered=self.recoverable(),
            )
        target = self.path(snapshot.step)
        tensors = [*snapshot.weights.values(), *snapshot.optimizer.values(), *snapshot.rng.values()]
        needed = sum(tensor.nbytes for tensor in tensors) + 65_536
        write_folder(target, lambda folder: _fill(folder, snapshot), bytes_needed=needed, own=True)
        self.finish_pruning(snapshot)
        return target

    def finish_pruning(self, snapshot: Snapshot) -> None:
        """Point at an existing checkpoint, and delete those that are no longer needed.

        A part of saving and of resuming: a writer killed between the two leaves an old checkpoint that no later save
        may come to delete.
        """
        write_file(self.folder / LATEST, f"{self.path(snapshot.step).name}\n", own=True)
        best = snapshot.state.get("best")
        with understood(self.path(snapshot.step) / STATE):
            target = None if best is None else self.path(best["step"])
        if target is not None and target.is_dir():
            write_file(self.folder / BEST, f"{target.name}\n", own=True)
        self._rotate(snapshot.step)

    def load(self, step: int) -> Snapshot:
        """Load a checkpoint and verify every file of it.

        Raises:
            IntegrityError: A file is missing, cut off or changed; the message names it.
        """
        path = recover(self.path(step))
        _verify(path)
        return Snapshot(
            step=step,
            weights=read_tensors(path / WEIGHTS),
            optimizer=read_tensors(path / OPTIMIZER, scale=OPTIMIZER_SCALE),
            rng=read_tensors(path / RNG),
            state={key: value for key, value in read_json(path / STATE).items() if key != "format"},
        )

    def load_latest(self) -> Snapshot | None:
        """Load the newest intact checkpoint, or return None if there is none; damaged ones are skipped with a warning.

        Raises:
            IntegrityError: There are checkpoints, and none is intact.
        """
        faults: list[str] = []
        for step in reversed(self.steps()):
            try:
                snapshot = self.load(step)
            except IntegrityError as error:
                faults.append(error.what)
            else:
                if faults:
                    self.warn(f"{'; '.join(faults)}: resuming from {self.path(step).name}")
                return snapshot
        if faults:
            start = self._with_intact_weights()
            warm = f"; its weights are intact: training.warm_start={start} in another output_dir starts from them"
            raise IntegrityError(
                f"no checkpoint is intact: {'; '.join(faults)}",
                where=str(self.folder),
                hint="restore an undamaged copy, or start anew with --overwrite" + (warm if start else ""),
            )
        return None

    def weights(self, step: int) -> dict[str, Tensor]:
        """Load the trained parameters of a checkpoint and verify them; its other files may be damaged.

        Returns:
            Parameters of any shape by raw key.

        Raises:
            IntegrityError: The weights or the list of files are missing, cut off or changed.
        """
        path = recover(self.path(step))
        _verify(path, only=WEIGHTS)
        return read_tensors(path / WEIGHTS)

    def _with_intact_weights(self) -> Path | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(IntegrityError):
                self.weights(step)
                return self.path(step)
        return None

    def clean(self) -> None:
        """Delete the files that killed writers left; only the holder of the run's lock may."""
        if not self.folder.is_dir():
            return
        for step in self.steps():
            recover(self.path(step))
        for entry in self.folder.iterdir():
            if entry.name.startswith("."):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _rotate(self, intact: int) -> None:
        """Delete old checkpoints, but not that of step ``intact``; newer ones may be damaged."""
        steps = self.steps()
        newest = {*steps[-self.limit :], intact}
        keep = {*newest, *(best for step in newest if (best := self._best_of(step)) is not None)}
        for step in steps:
            if step in keep:
                continue
            deleted = self.folder / f"{_DELETED}{self.path(step).name}"
            try:
                shutil.rmtree(deleted, ignore_errors=True)
                os.rename(self.path(step), deleted)
                shutil.rmtree(deleted)
            except OSError as error:
                self.warn(f"{self.path(step)} is no longer needed but cannot be deleted: {error.strerror}")

    def _best_of(self, step: int) -> int | None:
        with contextlib.suppress(GraftwerkError, KeyError, TypeError):
            best = read_json(self.path(step) / STATE)["best"]
            return None if best is None else int(best["step"])
        return None


def _fill(folder: Path, snapshot: Snapshot) -> None:
    sums = {
        name: write_tensors(folder / name, tensors)
        for name, tensors in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.optimizer), (RNG, snapshot.rng))
    }
    state = dump_object({"format": FORMAT, **snapshot.state}, folder / STATE)
    (folder / STATE).write_bytes(state)
    sums[STATE] = hashlib.sha256(state).hexdigest()
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in sums.items()}
    (folder / FILES).write_text(_canonical({"format": FORMAT, "files": files}))


def _verify(folder: Path, only: str | None = None) -> None:
    """Raise IntegrityError unless every file exists, none is extra, and every byte is as it was written."""
    listing = folder / FILES
    try:
        there = {entry.name for entry in folder.iterdir()}
        if FILES not in there:
            raise IntegrityError(f"{listing} is missing")
        try:
            known = read_json(listing)  # a regular file from here on
        except IntegrityError as error:
            raise IntegrityError(f"{listing} is damaged: {error.what}") from None
        content = listing.read_bytes()
        if known.get("format") != FORMAT:
            raise IntegrityError(
                f"{listing} is of format {known.get('format')!r:.20}; this version reads format {FORMAT}"
            )
        if content != _canonical(known).encode():
            raise IntegrityError(f"{listing} has been changed")
        files = known["files"]
        if (wrong := sorted({FILES, *files} ^ there)) and (only is None or only not in there):
            raise IntegrityError(
                f"{folder / wrong[0]} is {'missing' if wrong[0] in files else 'not part of this checkpoint'}"
            )
        for name in files if only is None else (only,):
            entry = files[name]
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise IntegrityError(f"{folder / name} has {size:,} bytes; {entry['bytes']:,} were written")
            if _sha256(folder / name) != entry["sha256"]:
                raise IntegrityError(f"{folder / name} is damaged: its SHA-256 differs from the one written with it")
    except OSError as error:
        raise IntegrityError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{listing} has been changed") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
