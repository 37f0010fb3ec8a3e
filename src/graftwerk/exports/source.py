"""The start of every export: the adapter on its base, rows to compare on, and its answers to them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.errors import ConfigError, ConflictError
from graftwerk.evaluation.forgetting import refuse_to_hand_over
from graftwerk.evaluation.held_out import check_columns, held_out, labelled_rows
from graftwerk.evaluation.loading import LoadedAdapter, find, load_adapter_for
from graftwerk.exports.parity import ROWS, TOLERANCE, Parity, compare, probabilities, require
from graftwerk.modeling.attach import adapters, detach
from graftwerk.modeling.quantized_layers import dequantize, quantization_of
from graftwerk.serialization.atomic import write_folder
from graftwerk.serialization.folder import load_adapter
from graftwerk.serialization.strict_json import dump_object
from graftwerk.tasks.base import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FACTS = "graftwerk_export.json"
"""File in each exported folder: what it was made from, and how it was compared."""
_SENTENCES = (
    "The film is a quiet pleasure from its first minute to its last.",
    "Nobody at the office could say when the delivery would arrive.",
    "Please send the signed contract back before the end of the week.",
    "Rain fell all night, and the river had risen by the morning.",
    "The new release fixes two crashes and starts in half of the time.",
    "It was the worst meal that I have had in years.",
)
"""Rows to compare on if an adapter comes alone and no data is given."""


@dataclass
class Source:
    """An adapter that is to be exported.

    Attributes:
        loaded: The adapter on its base.
        adapter: Its handle.
        rows: The rows that answers are compared on.
        origin: Where the rows are from, in words.
        examples: The rows, encoded.
        answers: The adapter's probabilities for each row, (P, C).
        dtype: Compute type of the comparison: float32 wherever the weights are, whatever the run computed in. Autocast
            rounds the adapter and its export differently (SmolLM2: by .075 at one of 256 positions).
    """

    loaded: LoadedAdapter
    adapter: Any
    rows: Sequence[Row]
    origin: str
    examples: Sequence[Example]
    answers: Sequence[Tensor]
    dtype: torch.dtype

    def compared(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        what: str,
        tolerance: float,
        *,
        dtype: torch.dtype | None = None,
    ) -> Parity:
        """Compare another model with the adapter.

        Args:
            model: The exported model, loaded.
            tokenizer: Its tokenizer.
            what: What it is, for the error.
            tolerance: Largest difference of probabilities that is accepted.
            dtype: Compute type, if it is another than the comparison's.

        Raises:
            IntegrityError: The answers, or the tokens of the rows, differ.
        """
        answers = probabilities(model, self.loaded.task, self.examples, tokenizer, dtype=dtype or self.dtype)
        return require(compare(self.answers, answers, tolerance), what)


def read_source(
    target: Any,
    *,
    model: str | None = None,
    force: bool = False,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    rows: int = ROWS,
    allow_forgetting: bool = False,
) -> Source:
    """Load an adapter and answer the rows that its export will be compared on.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` returned.
        model: The base model, if it is not where the adapter says.
        force: Accept a base whose weights differ from those the adapter was trained on.
        data: Rows to compare on. Default: the rows that the run held out, or a few sentences for an adapter alone.
        columns: Column of ``data`` for each field of the task. Default: as in training.
        rows: How many of them.
        allow_forgetting: Accept an adapter that has forgotten more than its run allows.

    Raises:
        ForgettingError: It has, and that is not accepted.
        ConfigError, DataError, AdapterError, ModelError, IntegrityError, ResourceError: As for `evaluate`.
    """
    if rows < 1:
        raise ConfigError("there is no comparison without rows", where="rows", hint="give at least 1")
    check_columns(data, columns)
    info = find(target).info
    refuse_to_hand_over(info.own, info.folder, allow_forgetting)
    loaded = load_adapter_for(target, model=model, force=force)
    chosen: Sequence[Row]
    if data is not None:
        origin, chosen = data, labelled_rows(loaded, data, None if columns is None else dict(columns))
    elif loaded.run is None:
        origin, chosen = "sentences of graftwerk's own", [loaded.task.example_from_text(text) for text in _SENTENCES]
    else:
        split, chosen = held_out(loaded)
        origin = f"{split} rows of {loaded.run}"
    chosen = [chosen[place * len(chosen) // min(rows, len(chosen))] for place in range(min(rows, len(chosen)))]
    examples = loaded.encode(chosen)
    whole = loaded.model.dtype == torch.float32 and quantization_of(loaded.model) is None
    dtype = torch.float32 if whole else loaded.dtype
    answers = probabilities(loaded.model, loaded.task, examples, loaded.tokenizer, dtype=dtype)
    (adapter,) = adapters(loaded.model).values()
    return Source(loaded, adapter, chosen, origin, examples, answers, dtype)


def to_full_weights(source: Source) -> str | None:
    """Give a quantized base the full weights that its codes stand for, with the adapter attached to it again.

    Args:
        source: The adapter; its handle is replaced.

    Returns:
        A note for the user, or None if the base is not quantized.
    """
    model, folder = source.loaded.model, source.loaded.info.folder
    if (said := quantization_of(model)) is None:
        return None
    dequantize(detach(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the base is not quantized is what the note says
        source.adapter = load_adapter(model, folder, force=True)
    return f"merged into the full weights that the base's {said['name']} stands for: the model is not quantized"


def tolerance_of(dtype: torch.dtype, compute: torch.dtype, asked: float | None) -> float:
    """Return the largest difference that is accepted: as asked, or what the coarser of two types explains."""
    return max(TOLERANCE[dtype], TOLERANCE[compute]) if asked is None else asked


def write_export(
    out: str | Path, fill: Callable[[Path], dict[str, Any]], *, overwrite: bool, bytes_needed: int
) -> Path:
    """Write an exported folder, whole or not at all.

    Args:
        out: The folder: new, empty, or with ``overwrite`` an earlier export.
        fill: Writes into an empty folder, and returns what `FACTS` says of it.
        overwrite: Replace an earlier export.
        bytes_needed: Estimated bytes to write.

    Raises:
        ConflictError: The folder holds something else.
        ResourceError: As for `write_folder`.
    """
    target = check_out(out, overwrite=overwrite)

    def filled(partial: Path) -> None:
        facts = fill(partial)
        (partial / FACTS).write_bytes(dump_object(facts, Path(FACTS), indent=2, seal=True))
        mode = partial.stat().st_mode & 0o666
        for file in partial.iterdir():
            if file.is_file():
                file.chmod(mode)  # safetensors' files are for their owner alone

    return write_folder(target, filled, bytes_needed=bytes_needed)


def check_out(out: str | Path, *, overwrite: bool) -> Path:
    """Return the folder to write, checked before any work is done.

    Raises:
        ConflictError: It is a file, or holds something that is not an earlier export.
    """
    target = Path(out)
    if target.is_file():
        raise ConflictError(f"{target} is a file, and a folder is to be written there", hint="choose another place")
    if not target.is_dir() or not any(target.iterdir()):
        return target
    if not (target / FACTS).is_file():
        raise ConflictError(
            f"{target} is not empty and holds no export of graftwerk's, so nothing is written there",
            where=str(target),
            hint="name a new or empty folder",
        )
    if not overwrite:
        raise ConflictError(f"{target} holds an export already", where=str(target), hint="--overwrite replaces it")
    return target


def facts_of(source: Source, kind: str, parity: Parity, checked_by: str) -> dict[str, Any]:
    """Return what `FACTS` says of an export.

    Args:
        source: The adapter.
        kind: ``merged``, ``peft``, ``vllm`` or ``gguf``.
        parity: The comparison.
        checked_by: The library that loaded the export for it.
    """
    loaded = source.loaded
    own = loaded.info.own
    return {
        "format": 1,
        "kind": kind,
        "adapter": {"name": source.adapter.name, "method": loaded.method_name(), "files": own.get("files")},
        "base": {"name": loaded.info.base_name, "fingerprint": loaded.info.base_fingerprint},
        "task": loaded.task.name,
        "labels": list(loaded.labels) or None,
        "max_length": loaded.max_length,
        "parity": {**parity.to_dict(), "origin": source.origin, "checked_by": checked_by},
        "versions": own.get("versions"),
    }


def free(loaded: LoadedAdapter) -> None:
    """Release a loaded model's weights, so that the export can be loaded in their place."""
    loaded.model.to("meta")
    gc.collect()
