"""Preparation of a training: rows are read, checked and encoded, and the model is loaded with an adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from graftwerk.config import RunConfig
from graftwerk.data.mixture import Sampler
from graftwerk.data.stream import StreamedRows
from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import Method
from graftwerk.modeling.attach import Adapter, attach_from_tensors
from graftwerk.tasks.base import Example, Splits, Task
from graftwerk.tasks.classification import Classification
from graftwerk.training import rng
from graftwerk.training.class_weights import weighted_task
from graftwerk.training.events import Event, Listener
from graftwerk.training.retained_rows import Retained, check_retained, read_retained
from graftwerk.training.stream import EncodedStream
from graftwerk.training.trainer_inputs import TrainingData
from graftwerk.training.validation import check_settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from graftwerk.modeling.quantize import QuantizationErrors

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """Rows ready for the loop.

    Attributes:
        task: The task, resolved for the model and the data.
        method: The configured method, with its initial text tokenized.
        splits: The rows as they were read.
        tokenizer: Tokenizer of the model.
        examples: Encoded rows (streamed: an `EncodedStream`) of ``train``, ``validation`` and ``test``.
        max_length: Most tokens of a row.
        findings: Issues of the data, as plain values.
        prior_loss: Loss of a model that knows only the frequency of each label, or None if there are no labels.
        retained: Rows of `evaluation.retained`.
        augmented: Facts about augmented rows, which follow the real training rows: ``rows`` (their number),
            ``fingerprint``, ``files``, ``made`` (by which augmenter). None without augmentation.
    """

    task: Task
    method: Method
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    examples: dict[str, Sequence[Example]]
    max_length: int
    findings: list[dict[str, Any]]
    prior_loss: float | None
    augmented: dict[str, Any] | None = None
    retained: tuple[Retained, ...] = ()


def prepare(settings: RunConfig, emit: Listener, labels: Sequence[str] | None = None) -> Prepared:
    """Read, check and encode the rows; of the model, only configuration and tokenizer are loaded.

    Args:
        settings: Settings of the run.
        emit: Listener of events.
        labels: Label names that existing weights were trained with, and that must stay in this order.

    Raises:
        DataError, ConfigError, ModelError, ResourceError: As the functions of data and models raise them.
    """
    from graftwerk.data.checks import check_cut, check_truncation
    from graftwerk.models.load import load_config, load_tokenizer, model_folder
    from graftwerk.models.positions import position_limit
    from graftwerk.tasks import dataset_cache
    from graftwerk.training.data_checks import check_allowed, check_encoded

    check_allowed(settings.data.allow)
    check_settings(settings.training, settings.data.validation is not None, settings.task)
    if settings.training.packing and settings.method.kind == "embedding":
        raise UnsupportedError(
            "several texts packed into one row cannot each have virtual tokens",
            where=f"training.packing, method `{settings.method.name}`",
            hint="training.packing=false, or method=prefix",
        )
    _check_evaluation(settings)
    splits = dataset_cache.read(settings.task, settings.data, labels)
    architecture = load_config(settings.model, settings.revision)
    task = settings.task.for_model(architecture).resolved(splits).with_labels(splits.labels or ())
    tokenizer = load_tokenizer(settings.model, settings.revision)
    max_length = max_length_of(settings, architecture, tokenizer)
    folder = model_folder(settings.model, settings.revision, weights=False)
    findings = list(splits.issues)
    examples: dict[str, Sequence[Example]] = {}
    for name in SPLITS:
        rows, most = getattr(splits, name), settings.data.max_truncated
        if isinstance(rows, StreamedRows):
            emit(Event("phase", 0, name=f"encoding {len(rows):,} streamed rows once, to count them"))
            stream = EncodedStream(task, rows, tokenizer, splits, max_length, settings.data.buffer_rows)
            findings += check_cut(stream.cut, stream.tokens_cut, len(stream), max_length, most, name)
            examples[name] = stream
            continue
        examples[name] = dataset_cache.encode(task, splits, name, tokenizer, max_length, folder)
        lost = [example.truncated for example in examples[name]]
        findings += check_truncation(lost, max_length, most, name)
    findings += check_encoded(settings, task, splits, examples, position_limit(architecture))
    retained = read_retained(settings, task, architecture, tokenizer, max_length)
    findings += check_retained(splits.train, retained)
    found = [asdict(issue) for issue in findings]
    for finding in found:
        emit(Event("finding", 0, **finding))
    prior_loss = None
    if splits.labels is not None and isinstance(task, Classification):
        train = examples["train"]
        targets = train.classes if isinstance(train, EncodedStream) else Counter(example.target for example in train)
        learnt = weighted_task(settings.training, task, splits.labels, train)
        counts: dict[Any, float] = dict(targets)
        if isinstance(learnt, Classification):  # the loss that it is compared with is weighted too
            counts = {label: count * learnt.weight_of(label) for label, count in targets.items() if label is not None}
        prior_loss = _prior_loss(counts, len(splits.labels), settings.training.label_smoothing)
    method = with_initial_text(settings.method, tokenizer)
    return Prepared(task, method, splits, tokenizer, examples, max_length, found, prior_loss, retained=retained)


def _check_evaluation(settings: RunConfig) -> None:
    """Raise for anything that evaluation would miss only after the training.

    Raises:
        ResourceError: A metric's package is not installed.
        ConfigError: The base model has no metrics to compute.
    """
    from graftwerk.evaluation.metrics import require_packages
    from graftwerk.evaluation.sample_outputs import check_baseline

    if settings.task.generates and settings.evaluation.generate:
        require_packages(settings.task.metrics)
    if settings.evaluation.baseline:
        check_baseline(settings.task)


def load_base_and_attach(
    settings: RunConfig,
    prepared: Prepared,
    dtype: torch.dtype,
    compute: torch.dtype | None = None,
    device: torch.device | None = None,
    errors: QuantizationErrors | None = None,
) -> tuple[Adapter, str]:
    """Load the base model and attach a new adapter, drawing all random values from the seed.

    Args:
        settings: Settings of the run.
        prepared: Rows, task and method.
        dtype: Type of the base's weights.
        compute: Compute type, or None for ``dtype``.
        device: Where a quantized base is loaded, or None for the machine's memory.
        errors: Collects the quantization error of each weight, or None.

    Returns:
        The adapter, and the fingerprint of the base model.
    """
    import torch

    from graftwerk.evaluation.base_model import load_base
    from graftwerk.models.positions import fix_padding
    from graftwerk.serialization.fingerprint import fingerprint

    rng.seed(settings.training.seed)
    model = load_base(
        settings.model,
        prepared.task,
        prepared.splits,
        dtype=dtype,
        revision=settings.revision,
        quantization=settings.quantization,
        compute=compute or dtype,
        device=device or torch.device("cpu"),
        method=settings.method,
        errors=errors,
    )
    fix_padding(model, prepared.tokenizer)
    base = fingerprint(model)
    return attach_from_tensors(model, prepared.method, "default", None), base


def training_data(prepared: Prepared, sampler: Sampler | None = None) -> TrainingData:
    """Return the training and validation rows, as a `Trainer` takes them.

    Args:
        prepared: The rows of a run.
        sampler: Sampler of each epoch's rows, for several data sets; None takes every row once.
    """
    return TrainingData(
        prepared.examples["train"],
        prepared.examples["validation"],
        labels=prepared.splits.labels or (),
        max_length=prepared.max_length,
        prior_loss=prepared.prior_loss,
        sampler=sampler,
    )


def max_length_of(settings: RunConfig, config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens of a row; virtual tokens take positions of the model, which text then cannot use.

    Raises:
        ConfigError: As `max_length_for` raises it.
    """
    from graftwerk.modeling.module_names import is_causal
    from graftwerk.models.positions import max_length_for

    return max_length_for(config, tokenizer, settings.data.max_length, settings.method.positions(is_causal(config)))


def with_initial_text(method: Method, tokenizer: PreTrainedTokenizerBase) -> Method:
    """Return the method with the token ids of its initial text."""
    text = getattr(method, "init_text", None)
    if text is None or getattr(method, "init_token_ids", None) is not None:
        return method
    with_ids: Method = method.with_token_ids(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[attr-defined]
    return with_ids


def _prior_loss(counts: Mapping[Any, float], classes: int, smoothing: float) -> float | None:
    """Return the entropy of the label frequencies in nats: the least loss of a model that reads no row."""
    total = sum(counts.values())
    shares = [(1 - smoothing) * counts.get(label, 0) / total + smoothing / classes for label in range(classes)]
    return -sum(share * math.log(share) for share in shares if share > 0) if total else None
