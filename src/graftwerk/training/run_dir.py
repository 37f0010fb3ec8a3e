"""The run folder: its places, what may be done in it, its manifest, and `Run`, the handle that `train` gives back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, ConflictError, IntegrityError
from graftwerk.evaluation.results_io import ANSWERS, EVALUATION, PREDICTIONS
from graftwerk.own_files import refuse_links
from graftwerk.serialization.atomic import recover, write_file
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import read_sealed

MANIFEST, CONFIG, LOG = "manifest.json", "config.yaml", "metrics.jsonl"
CHECKPOINTS, ADAPTER, TENSORBOARD, REPORT = "checkpoints", "adapter", "tensorboard", "report.html"
TRUNK = "trunk"
"""Hidden states that did not fit into memory; they are gone when a run ends, and a killed one may leave some."""
MADE_BEFORE = ("augmented.jsonl", "augmented.about.json", "augmented.jsonl.unfinished")
"""Augmented rows, which are made before a run begins, by it or by `graftwerk augment`, and checked when it does."""
OURS = (MANIFEST, CONFIG, LOG, CHECKPOINTS, ADAPTER, TENSORBOARD, TRUNK, REPORT, EVALUATION, PREDICTIONS, ANSWERS)
"""All that a run, or the measuring of it, writes; nothing else in its folder is ever touched."""


class Run:
    """A run on disk.

    Attributes:
        folder: Its folder.
        adapter: Where its adapter is, once it is finished.
        manifest: `manifest.json`.

    Raises:
        ConfigError: there is no run in that folder.
        IntegrityError: its manifest is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.adapter = self.folder / ADAPTER
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise ConfigError(f"{folder} is not a run folder: it has no {MANIFEST}")
        self.manifest = manifest

    def to_dict(self) -> dict[str, Any]:
        """What `graftwerk train --json` prints."""
        said = ("status", "metrics", "best", "cost", "parameters", "model", "task", "method", "seed")
        return {"run": str(self.folder), "adapter": str(self.adapter)} | {
            name: self.manifest[name] for name in said if name in self.manifest
        }

    def __repr__(self) -> str:
        return f"<Run {self.folder}: {self.manifest.get('status')}>"


class RunDir:
    """The same folder for the one process that writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.adapter = path / CHECKPOINTS, path / ADAPTER
        self.log, self.tensorboard = path / LOG, path / TENSORBOARD

    def claim(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Whether a run may be begun or gone on with here.

        Returns:
            The manifest of the run that is to be gone on with, None for a new one.

        Raises:
            ConflictError: there is a run, and nobody said what is to become of it.
            ConfigError: both ``resume`` and ``overwrite``.
        """
        if resume and overwrite:
            raise ConfigError("`resume` goes on with a run and `overwrite` replaces it; it can be one of them only")
        if overwrite:
            return None
        found = [name for name in OURS if (self.path / name).exists()]
        manifest = read_manifest(self.path)
        if manifest is None:
            if found:
                raise ConflictError(
                    f"{self.path} has {', '.join(found)}, but no {MANIFEST}, so it is no run that could be gone "
                    f"on with",
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
            hint="--resume (resume=True) goes on with it, --overwrite (overwrite=True) begins anew",
            recovered=str(self.checkpoints) if self.checkpoints.is_dir() else None,
        )

    def clear(self, *, augmented: bool = False) -> None:
        """Remove what an earlier run left. The manifest goes last: until then the folder says what it was.

        Args:
            augmented: Leave augmented rows: they are those of the run that begins.
        """
        names = OURS if augmented else (*MADE_BEFORE, *OURS)
        for name in sorted(names, key=lambda name: name == MANIFEST):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        path = self.path / MANIFEST
        write_file(path, dump_object(manifest, path, seal=True), own=True)

    def write_config(self, content: str) -> None:
        write_file(self.path / CONFIG, content, own=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run folder, None where there is none.

    Raises:
        IntegrityError: it is damaged, or something of the run is a link.
    """
    refuse_links(folder, (*MADE_BEFORE, *OURS))
    path = recover(folder / MANIFEST)
    if not path.is_file():
        return None
    manifest = read_sealed(path)
    if not isinstance(manifest.get("status"), str):
        raise IntegrityError(f"{path} is no manifest of a run")
    return manifest
