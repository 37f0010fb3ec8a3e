"""The run folder: every name in it, its manifest, and `Run`, the handle that `train` returns."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, ConflictError, IntegrityError
from graftwerk.evaluation.results_io import ANSWERS, EVALUATION, EXPLANATION, PREDICTIONS, ROWS
from graftwerk.own_files import refuse_links
from graftwerk.serialization.atomic import recover, write_file
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import read_sealed

MANIFEST, CONFIG, LOG, LOCK = "manifest.json", "config.yaml", "metrics.jsonl", ".lock"
CHECKPOINTS, ADAPTER, TENSORBOARD, REPORT = "checkpoints", "adapter", "tensorboard", "report.html"
TRACKERS = "trackers"
"""Folder with the name of the run at each tracker."""
TRUNK = "trunk"
"""Hidden states that did not fit into memory; removed when a run ends, and a killed one may leave some."""
WEIGHTS, OPTIMIZER, RNG = "adapter.safetensors", "optimizer.safetensors", "rng.safetensors"
STATE, FILES = "state.json", "files.json"
"""With `WEIGHTS`, `OPTIMIZER` and `RNG`, the files of a checkpoint."""
LATEST, BEST = "latest", "best"
"""Text files in `CHECKPOINTS` that name the newest and the best checkpoint."""
MADE_BEFORE = ("augmented.jsonl", "augmented.about.json", "augmented.jsonl.unfinished")
"""Augmented rows, which are made before a run starts, by it or by `graftwerk augment`, and checked when it starts."""
RUN_FILES = (
    MANIFEST,
    CONFIG,
    LOG,
    CHECKPOINTS,
    ADAPTER,
    TENSORBOARD,
    TRUNK,
    REPORT,
    EVALUATION,
    EXPLANATION,
    PREDICTIONS,
    ANSWERS,
    ROWS,
    TRACKERS,
)
"""All that a run, or its evaluation, writes; nothing else in its folder is ever touched."""
TRIAL = "trial"
"""Status of a trained run whose test rows are not measured, since its settings may not be chosen; resuming does it."""


class Run:
    """A run on disk.

    Args:
        folder: The run folder.

    Attributes:
        folder: The run folder.
        adapter: Folder of its adapter, once it is finished.
        manifest: Content of `manifest.json`.

    Raises:
        ConfigError: There is no run in that folder.
        IntegrityError: Its manifest is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.adapter = self.folder / ADAPTER
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise ConfigError(f"{folder} is not a run folder: it has no {MANIFEST}")
        self.manifest = manifest

    def to_dict(self) -> dict[str, Any]:
        """Return what `graftwerk train --json` prints."""
        names = ("status", "metrics", "best", "cost", "parameters", "model", "task", "method", "seed", "retained")
        return {"run": str(self.folder), "adapter": str(self.adapter)} | {
            name: self.manifest[name] for name in names if name in self.manifest
        }

    def __repr__(self) -> str:
        return f"<Run {self.folder}: {self.manifest.get('status')}>"


class RunDir:
    """A run folder for the one process that writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.adapter = path / CHECKPOINTS, path / ADAPTER
        self.log, self.tensorboard = path / LOG, path / TENSORBOARD

    def claim(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Check that a run may be started or resumed here.

        Returns:
            The manifest of the run to resume, or None for a new one.

        Raises:
            ConflictError: There is a run, and neither ``resume`` nor ``overwrite`` is set.
            ConfigError: Both ``resume`` and ``overwrite`` are set.
        """
        if resume and overwrite:
            raise ConfigError("`resume` continues a run and `overwrite` replaces it; only one of them can be set")
        if overwrite:
            return None
        found = [name for name in RUN_FILES if (self.path / name).exists()]
        manifest = read_manifest(self.path)
        if manifest is None:
            if found:
                raise ConflictError(
                    f"{self.path} has {', '.join(found)}, but no {MANIFEST}, so it is not a run that could be resumed",
                    hint="choose another output_dir, or replace these with --overwrite",
                )
            return None
        if resume:
            return manifest
        if manifest.get("status") == "finished":
            raise ConflictError(
                f"{self.path} holds a finished run",
                hint="choose another output_dir to keep it, or replace it with --overwrite (overwrite=True)",
            )
        raise ConflictError(
            f"{self.path} holds a run that is not finished (status: {manifest.get('status')})",
            hint="--resume (resume=True) continues it, --overwrite (overwrite=True) starts anew",
            recovered=str(self.checkpoints) if self.checkpoints.is_dir() else None,
        )

    def clear(self, *, augmented: bool = False) -> None:
        """Remove the files of an earlier run. The manifest goes last: until then the folder tells what it was.

        Args:
            augmented: Leave augmented rows: they belong to the run that starts.
        """
        names = RUN_FILES if augmented else (*MADE_BEFORE, *RUN_FILES)
        for name in sorted(names, key=lambda name: name == MANIFEST):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write `manifest.json` atomically, sealed with a checksum."""
        path = self.path / MANIFEST
        write_file(path, dump_object(manifest, path, seal=True), own=True)

    def write_config(self, content: str) -> None:
        """Write the resolved run file atomically."""
        write_file(self.path / CONFIG, content, own=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a run folder, or None if it has none.

    Raises:
        IntegrityError: The manifest is damaged, or a file of the run is a link.
    """
    refuse_links(folder, (*MADE_BEFORE, *RUN_FILES))
    path = recover(folder / MANIFEST)
    if not path.is_file():
        return None
    manifest = read_sealed(path)
    if not isinstance(manifest.get("status"), str):
        raise IntegrityError(f"{path} is not the manifest of a run")
    return manifest
