"""Warm start: training starts from the weights of another run, with a new optimizer and row order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from graftwerk.errors import AdapterError, ConfigError
from graftwerk.modeling.attach import Adapter
from graftwerk.training.checkpoint import Checkpoints
from graftwerk.training.run_dir import ADAPTER, CHECKPOINTS, WEIGHTS, read_manifest

KEY = "training.warm_start"


def warm_labels(source: str | None) -> list[str] | None:
    """Return the label names that the weights were trained with, in order, or None if they are not known."""
    if source is None:
        return None
    folder = _existing(source)
    if (manifest := _manifest(folder)) is not None:
        labels = manifest.get("labels")
    else:
        from graftwerk.serialization.folder import read_adapter_config

        labels = read_adapter_config(folder).labels
    return None if labels is None else [str(label) for label in labels]


def warm_start(adapter: Adapter, source: str, *, new_head: bool = False) -> bool:
    """Load the weights of a run, a checkpoint or an adapter folder into an adapter of the same method.

    Args:
        adapter: Adapter to load into.
        source: Value of `training.warm_start`.
        new_head: Leave the adapter's head as it is.

    Returns:
        True if they are those of a checkpoint, and not of a finished adapter.

    Raises:
        ConfigError: There is nothing at ``source``.
        AdapterError: The weights do not fit: another method, other settings, other labels, another base.
        IntegrityError: The weights are damaged.
    """
    folder = _existing(source)
    of_checkpoint = tensors = _checkpoint_weights(folder)
    if tensors is None:
        finished = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
        tensors = _method_weights(adapter, finished) if new_head else _adapter_weights(adapter, finished)
    own = adapter.state_dict()
    if new_head:
        head = {key: tensor.clone() for key, tensor in own.items() if adapter.is_head(key)}
        tensors = {key: tensor for key, tensor in tensors.items() if not adapter.is_head(key)} | head
    if wrong := [key for key in own if key in tensors and own[key].shape != tensors[key].shape]:
        raise AdapterError(
            f"`{wrong[0]}` is {tuple(tensors[wrong[0]].shape)} there and {tuple(own[wrong[0]].shape)} here",
            where=f"{KEY}: {source}",
            hint="start from weights of the same method with the same settings and labels",
        )
    adapter.load_state_dict(tensors)
    return of_checkpoint is not None


def _checkpoint_weights(folder: Path) -> dict[str, Tensor] | None:
    """Return the weights of a checkpoint, or of an unfinished run's newest one, or None if it is neither."""
    if (folder / WEIGHTS).is_file():
        checkpoints = Checkpoints(folder.parent)
        step = next((step for step in checkpoints.steps() if checkpoints.path(step).name == folder.name), None)
        if step is None:
            raise ConfigError(f"{folder} is not named as a checkpoint is (step-000000)", where=KEY)
        return checkpoints.weights(step)
    if (folder / ADAPTER).is_dir() or not (folder / CHECKPOINTS).is_dir():
        return None
    snapshot = Checkpoints(folder / CHECKPOINTS).load_latest()
    return None if snapshot is None else dict(snapshot.weights)


def _method_weights(adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    """Read weights whose head may be as wide as other labels need, which an adapter on this model could not have.

    Raises:
        AdapterError: They are of another method.
    """
    from graftwerk.serialization.folder import stored_tensors

    found = stored_tensors(adapter.model, folder)
    if found.method.name != adapter.method.name:
        raise AdapterError(
            f"the weights are those of {found.method.title}, and this run trains {adapter.method.title}",
            where=f"{KEY}: {folder}",
        )
    return dict(found.tensors)


def _adapter_weights(adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    """Read weights by attaching a second adapter for a moment: loading knows how tensors are named on this model."""
    from graftwerk.modeling.attach import activate
    from graftwerk.serialization.folder import load_adapter

    other = load_adapter(adapter.model, folder, name="warm-start")
    try:
        return {key: tensor.clone() for key, tensor in other.state_dict().items()}
    finally:
        other.delete()
        activate(adapter.model, adapter.name)


def _existing(source: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {source}", where=KEY, hint="give a run, a checkpoint or an adapter folder"
        )
    return folder


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run that a folder is, or is a part of, or None."""
    for candidate in (folder, folder.parent, folder.parent.parent):
        if (manifest := read_manifest(candidate)) is not None:
            return manifest
    return None
