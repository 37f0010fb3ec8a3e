"""Checks that a base fits a stored adapter: the randomly initialised weights it was trained on, and label names."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from graftwerk.errors import AdapterError
from graftwerk.methods.trainable_tokens import SETTING
from graftwerk.modeling.architectures import read_architecture
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.drawn import drawn_modules, within
from graftwerk.modeling.module_index import base_parameters
from graftwerk.modeling.task_heads import head_paths
from graftwerk.serialization.fingerprint import digests_beside
from graftwerk.serialization.info import AdapterInfo
from graftwerk.serialization.peft_format import Restored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def replaced_rows(model: PreTrainedModel, info: AdapterInfo) -> dict[str, tuple[int, ...]]:
    """Return the rows of a base's tables that a stored adapter replaces, by path of the table.

    Raises:
        ConfigError, UnsupportedError: the base does not have them.
    """
    if not info.own or not info.own["method"].get(SETTING):  # reading the settings takes longer than this look
        return {}
    method = info.method
    assert method is not None
    return method.trained_rows(read_architecture(model).tables)


def check_beside(model: PreTrainedModel, info: AdapterInfo) -> None:
    """Refuse a base whose weights beside the pretrained part are others than those that the adapter was trained with.

    Raises:
        AdapterError: a pooler, an output embedding or a head that the adapter does not store has other values.
    """
    wanted = info.digests_beside
    if wanted.keys().isdisjoint(base_parameters(model)):
        return
    found = digests_beside(model, (), replaced_rows(model, info))
    other = [name for name, digest in wanted.items() if found.get(name, digest) != digest]
    if other:
        raise AdapterError(
            f"`{other[0]}` of this base has other values than where the adapter was trained, and the adapter does not "
            f"store it ({len(other)} weights in all)",
            where=str(info.folder),
            hint="load the same base, weights that its checkpoint lacks included (save_pretrained stores them), or "
            "force it (force=True, --force)",
        )


def check_drawn(model: PreTrainedModel, info: AdapterInfo, found: Restored, filled: Collection[str]) -> None:
    """Refuse an adapter with a head on a base where another part that it does not store was drawn at random.

    Raises:
        AdapterError: there is such a part.

    Warns:
        UserWarning: there is such a part, and the adapter has no head: whoever loads it brings his own.
    """
    if found.method.kind == "weights":
        return  # which stores everything
    heads = head_paths(model, found.method, read_architecture(model))
    drawn = [path for path in drawn_modules(model) if not within(path, heads)]
    drawn = [path for path in drawn if not any(within(name, [path]) for name in filled)]
    if not drawn:
        return
    words = (
        f"{', '.join(f'`{path}`' for path in drawn)} of this base was drawn at random when it was loaded, because its "
        f"checkpoint lacks it, and the adapter does not store it: its answers differ from load to load"
    )
    if not heads:
        warnings.warn(words, stacklevel=5)
        return
    raise AdapterError(
        words,
        where=str(info.folder),
        hint="load a base whose checkpoint has it, or force it (force=True, --force) if it is not used",
    )


def quantization_differs(stored: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> str:
    """Return words on how the base that an adapter was trained on and this one are quantized, "" if alike.

    Args:
        stored: What the adapter's folder says, or None for full precision.
        here: What `quantization_of` says of the model, or None.
    """
    then, now = quantization_words(stored), quantization_words(here)
    return "" if then == now else f"the adapter was trained on a base in {then}, and this one is in {now}"


def quantization_words(said: Mapping[str, Any] | None) -> str:
    """Return a few words on how a base is quantized.

    Args:
        said: What `quantization_of` or an adapter's folder says, or None for full precision.
    """
    if said is None:
        return "full precision"
    return f"{said['name']}{' with double quantization' if said['double_quant'] else ''}"


def labels_of(adapter: Adapter, info: AdapterInfo) -> list[str] | None:
    """Return the class names of a loaded adapter's head, or None if those of the base apply.

    An adapter without names (PEFT stores none) uses the base's if the base has as many, else numbered ones.

    Raises:
        AdapterError: The number of names differs from the number of classes of the head.
    """
    if not adapter.answers:
        return None
    classes = adapter.classes
    if info.labels is not None:
        if classes is not None and len(info.labels) != classes:
            raise AdapterError(f"the adapter names {len(info.labels)} labels, and its head tells {classes} apart")
        return info.labels if classes is not None or adapter.weights is not None else None
    if classes is None or classes == len(adapter.label_names):
        return None
    return [f"LABEL_{index}" for index in range(classes)]
