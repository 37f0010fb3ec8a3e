"""A trained adapter, loaded for use from a run folder or an adapter folder: its base, tokenizer, task and labels."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.config import RunConfig
from graftwerk.devices import best_device
from graftwerk.errors import AdapterError, ConfigError, IntegrityError, UnsupportedError
from graftwerk.evaluation.base_model import load_base
from graftwerk.evaluation.results_io import ANSWERS, EVALUATION, PREDICTIONS, ROWS
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.models.quantization import Quantization
from graftwerk.own_files import refuse_links
from graftwerk.serialization.adapter_config import CONFIG_FILE
from graftwerk.serialization.atomic import recover
from graftwerk.serialization.fit import quantization_words
from graftwerk.serialization.info import AdapterInfo, check_said, read_adapter_config
from graftwerk.serialization.untrusted_files import read_sealed
from graftwerk.serialization.weight_files import read_headers
from graftwerk.tasks.base import Example, Row, Splits, Task
from graftwerk.tasks.regression import Regression

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BATCH, MOST_ROWS = 64, 1024
"""Rows of a forward pass: if nobody says how many, and the most that a foreign folder may ask for."""
MANIFEST, CONFIG, ADAPTER = "manifest.json", "config.yaml", "adapter"
PEFT_TASKS = {"SEQ_CLS": "classification", "TOKEN_CLS": "token-classification"}
"""Tasks of adapters that nothing but PEFT's `task_type` speaks of."""
HEADS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")


@dataclass(frozen=True)
class LoadedAdapter:
    """A loaded adapter with all that evaluation and prediction need.

    Attributes:
        info: Contents of the adapter folder.
        run: The run folder, or None for an adapter folder outside of a run.
        settings: The run's settings, or None as for `run`.
        model: The base with the adapter attached.
        tokenizer: The model's tokenizer.
        task: The task.
        splits: The run's rows and the names of the classes.
        max_length: Longest input in tokens.
        dtype: Compute type.
        columns: Column of the training data for each field.
        data_fingerprint: Fingerprint of the rows of the run, or None if it is unknown.
        evaluation: Settings of evaluation.
        trained_with: ``compute`` in the run's manifest (type, device, batch size), or empty if it has none.
    """

    info: AdapterInfo
    run: Path | None
    settings: RunConfig | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    splits: Splits
    max_length: int
    dtype: torch.dtype
    columns: dict[str, str]
    data_fingerprint: str | None
    evaluation: EvaluationSettings
    trained_with: dict[str, Any]

    @property
    def eval_batch_size(self) -> int:
        """Return the rows per forward pass: as many as in the run itself, so that results round alike."""
        own = self.trained_with.get("eval_batch_size")
        if type(own) is int and 0 < own <= MOST_ROWS:
            return own
        return self.settings.training.eval_batch_size if self.settings else BATCH

    def compute(self, batch_size: int) -> dict[str, Any]:
        """Return what the last bits of answers depend on: as the manifest's ``compute``."""
        return {
            "type": str(self.dtype).removeprefix("torch."),
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "device": next(self.model.parameters()).device.type,
            "eval_batch_size": batch_size,
            "threads": torch.get_num_threads(),
        }

    @property
    def labels(self) -> Sequence[str]:
        """Return the label names, or an empty sequence if the task has none."""
        return self.splits.labels or ()

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Encode rows as in training: same task, tokenizer, labels and maximum length in tokens."""
        return self.task.encode(rows, self.tokenizer, self.splits, self.max_length)

    def method_name(self) -> str:
        """Return the method's name, or PEFT's type in lower case for a folder of PEFT."""
        return self.info.method.name if self.info.method is not None else self.info.peft_type.lower()


@dataclass(frozen=True)
class Target:
    """An adapter that was found at a path, before its model is loaded.

    Attributes:
        info: Contents of the adapter folder.
        run: The run folder, or None for an adapter folder outside of a run.
        settings: The run's settings, or None as for `run`.
        manifest: The run's manifest, or empty.
    """

    info: AdapterInfo
    run: Path | None
    settings: RunConfig | None
    manifest: dict[str, Any]


def find(target: Any) -> Target:
    """Find the adapter of a run folder, an adapter folder, or a `Run` that `train` returned.

    Raises:
        ConfigError: neither, or a run that is not finished.
        IntegrityError, AdapterError, ResourceError: what is there cannot be read.
    """
    path = Path(getattr(target, "folder", target))
    if not path.is_dir():
        what = f"{path} is a file, not a folder" if path.is_file() else f"there is no folder {path}"
        raise ConfigError(what, hint="give a run folder (`output_dir` of a run file) or an adapter folder")
    if not (path / MANIFEST).is_file():
        if not recover(path / CONFIG_FILE).is_file():
            raise ConfigError(
                f"{path} is neither a run folder nor an adapter folder: it has no {MANIFEST} and no {CONFIG_FILE}",
                hint="give a run folder or an adapter folder",
            )
        if path.name != ADAPTER or not (path.parent / MANIFEST).is_file():
            return Target(read_adapter_config(path), None, None, {})
        path = path.parent
    refuse_links(path, (MANIFEST, CONFIG, ADAPTER, EVALUATION, PREDICTIONS, ANSWERS, ROWS))
    manifest = read_sealed(path / MANIFEST)
    check_said(manifest, path / MANIFEST)
    adapter = recover(path / ADAPTER)
    if not adapter.is_dir():
        raise ConfigError(
            f"the run in {path} has no adapter yet (status: {manifest.get('status')})",
            hint="resume it: graftwerk train ... --resume",
        )
    settings = RunConfig.load(path / CONFIG)
    _check_settings(path / CONFIG, manifest.get("config_digest"))
    return Target(read_adapter_config(adapter), path, settings, manifest)


def _check_settings(path: Path, written: Any) -> None:
    """Compare a run's settings with those it was trained with; an older run has no digest of them."""
    if written is not None and f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" != written:
        raise IntegrityError(
            f"{path.name} is not what was written: it was damaged or changed since the run",
            where=str(path),
            hint="take it from a copy; other settings of an evaluation are given with the command",
        )


def load_adapter_for(target: Any, *, model: str | None = None, force: bool = False) -> LoadedAdapter:
    """Load base, tokenizer and adapter; the adapter is active and the model in evaluation mode.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or a `Run`.
        model: The base, where it is not where the adapter says.
        force: Accept a base with other weights than those that the adapter was trained on.

    Raises:
        AdapterError: the adapter does not fit the base, or says too little to be used.
        ConfigError, ModelError, ResourceError, IntegrityError: as loading models and adapters does.
    """
    from graftwerk.modeling.virtual_positions import positions_taken
    from graftwerk.models.hardware import set_threads
    from graftwerk.models.load import load_config, load_tokenizer, newly_initialised
    from graftwerk.models.positions import fix_padding
    from graftwerk.serialization.folder import load_adapter

    found = find(target)
    settings, own, info = found.settings, found.manifest or found.info.own, found.info
    name = model or (settings.model if settings else info.base_name)
    if name is None:
        raise AdapterError(
            "the adapter does not say which model it was made for", where=str(info.folder), hint="name it: model=..."
        )
    revision = settings.revision if settings and model is None else None
    config = load_config(name, revision)
    task = task_of(info, own).for_model(config)
    tokenizer = load_tokenizer(name, revision)
    splits = Splits((), (), (), labels_of(info, own, config), "")
    task = task.with_labels(splits.labels or ())
    set_threads()
    device = best_device()
    dtype = _compute_type(own, settings.compute_type if settings else "auto", device)
    if isinstance(task, Regression):  # answers in the units of the rows: other types would round them
        dtype = torch.float32
    weights = _base_dtype(own, info, dtype, device)
    base = load_base(
        name,
        task,
        splits,
        dtype=weights,
        revision=revision,
        quantization=settings.quantization if settings else _quantization(info),
        compute=dtype,
        device=device,
        method=settings.method if settings else info.method,
        skipped=info.quantization["skip"] if info.quantization else (),
    )
    fix_padding(base, tokenizer)
    load_adapter(base, info.folder, force=force, filled=newly_initialised(base) if found.manifest else ())
    if weights not in (torch.float32, dtype):  # the values that it was trained on, where they cannot be multiplied so
        torch.nn.Module.float(base)  # transformers' own refuses a quantized base, whose codes this leaves as they are
    origin = (own.get("data") or {}).get("origin") or {}
    return LoadedAdapter(
        info=info,
        run=found.run,
        settings=settings,
        model=base.to(device).eval(),
        tokenizer=tokenizer,
        task=task,
        splits=splits,
        max_length=_max_length(own, config, tokenizer, positions_taken(base)),
        dtype=dtype,
        columns=dict(settings.data.columns if settings else origin.get("columns") or {}),
        data_fingerprint=(own.get("data") or {}).get("fingerprint"),
        evaluation=settings.evaluation if settings else EvaluationSettings(),
        trained_with=_trained_with(own),
    )


def _max_length(
    own: Mapping[str, Any], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, virtual: int
) -> int:
    """Return the most tokens of a row: as in training, as far as virtual tokens leave positions for them."""
    from graftwerk.models.positions import max_length_for, position_limit

    if not isinstance(given := own.get("max_length"), int):
        return max_length_for(config, tokenizer, virtual=virtual)
    limit = position_limit(config)  # runs from before virtual tokens were counted may have more
    return given if limit is None else min(given, limit - virtual)


def _trained_with(own: Mapping[str, Any]) -> dict[str, Any]:
    compute = own.get("compute")
    return dict(compute) if isinstance(compute, dict) else {}


def _compute_type(own: Mapping[str, Any], asked: str, device: torch.device) -> torch.dtype:
    """Return the type that the run computed in, if this is a device of the same kind that can; else what is asked for.

    What `auto` finds here may be another type than what it found for the run. The environment variable
    `GRAFTWERK_COMPUTE_TYPE` goes before the run, as it does in training.
    """
    from graftwerk.models.hardware import ENVIRONMENT, TYPES, compute_type

    run = _trained_with(own)
    if (
        asked == "auto"
        and run.get("type") in TYPES
        and run.get("device") == device.type
        and not os.environ.get(ENVIRONMENT)
    ):
        with contextlib.suppress(ConfigError):
            return compute_type(run["type"], device)
    return compute_type(asked, device)


def _base_dtype(own: Mapping[str, Any], info: AdapterInfo, compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type that the adapter's base was loaded in; where nobody says, bfloat16 if it is fast here.

    Another type would round the base to other values, and in float16 to another fingerprint.
    """
    from graftwerk.models.hardware import TYPES, frozen_dtype

    if run := _trained_with(own):
        return TYPES.get(run.get("model_dtype", ""), torch.float32)
    trained_whole = info.method is not None and info.method.kind == "weights"
    dtype = frozen_dtype(compute, device)
    return dtype if dtype == torch.bfloat16 and not trained_whole else torch.float32


def _quantization(info: AdapterInfo) -> Quantization | None:
    """Return how an adapter's base was quantized, None if it was not or a folder of PEFT does not say.

    Raises:
        UnsupportedError: It was quantized in another way than a run file can ask for.
    """
    if (said := info.quantization) is None:
        return None
    try:
        own = {key: said[key] for key in ("name", "double_quant", "compute_type") if said.get(key) is not None}
        return Quantization.model_validate(own)
    except ValueError:
        raise UnsupportedError(
            f"the adapter was trained on a base in {quantization_words(said)}, which is not done here",
            where=str(info.folder),
            hint="load that base by transformers, and the adapter on it by graftwerk.load",
        ) from None


def task_of(info: AdapterInfo, own: Mapping[str, Any]) -> Task:
    """Return the task of an adapter, not yet bound to a model.

    Args:
        info: Contents of the adapter folder.
        own: The run's manifest, or what the adapter says of itself.

    Raises:
        UnsupportedError: Neither says it.
    """
    from graftwerk.tasks.registry import parse_task

    if isinstance(own.get("task_settings"), dict):
        return parse_task(own["task_settings"])
    if isinstance(own.get("task"), str):
        return parse_task(own["task"])
    if (kind := str(info.config.get("task_type"))) in PEFT_TASKS:
        return parse_task(PEFT_TASKS[kind])
    raise UnsupportedError(
        f"the adapter does not say what task it is for (task_type: {json.dumps(info.config.get('task_type'))})",
        where=str(info.folder / CONFIG_FILE),
        hint=f"adapters of {', '.join(f'{kind} ({name})' for kind, name in PEFT_TASKS.items())} can be evaluated",
    )


def labels_of(info: AdapterInfo, own: dict[str, Any], config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the label names of an adapter.

    For a folder of PEFT, which stores none, they are the base's if it has as many classes, else 0, 1, ...
    """
    labels = own.get("labels")
    if labels is not None:
        return tuple(labels)
    named = getattr(config, "id2label", None) or {}
    known = tuple(str(named[index]) for index in sorted(named))
    for key, tensor in read_headers(info).items():
        if key.endswith(HEADS) and "lora_" not in key:
            classes = tensor.shape[0]
            return known if len(known) == classes else tuple(str(index) for index in range(classes))
    return known
