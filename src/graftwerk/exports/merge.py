"""`merge`: the adapter in the base's weights, as a folder that plain transformers loads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from graftwerk.errors import ConfigError, GraftwerkError, IntegrityError, ModelError
from graftwerk.evaluation.loading import LoadedAdapter
from graftwerk.evaluation.search import own_search
from graftwerk.exports.parity import ROWS, Parity
from graftwerk.exports.source import (
    Source,
    check_out,
    facts_of,
    free,
    read_source,
    to_full_weights,
    tolerance_of,
    write_export,
)
from graftwerk.models.hf_logging import quiet
from graftwerk.models.load import load_config
from graftwerk.serialization.card import merged_card
from graftwerk.tasks.base import Example
from graftwerk.tasks.text import TextTask

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def merge(
    target: Any,
    out: str | Path,
    *,
    dtype: Dtype = "auto",
    model: str | None = None,
    force: bool = False,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    rows: int = ROWS,
    max_difference: float | None = None,
    allow_forgetting: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into its base and write the model as a folder of transformers.

    A quantized base is given the full weights that its codes stand for first, since codes would round the adapter away.
    The folder has the merged weights, the head with the names of its classes, the tokenizer with its chat template and
    the generation settings. It is loaded again by plain transformers and compared with the adapter on real rows before
    it appears at ``out``.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` returned.
        out: The folder: new, empty, or with ``overwrite`` an earlier export.
        dtype: Type of the stored weights; ``auto`` is that of the base's checkpoint.
        model: The base model, if it is not where the adapter says.
        force: Accept a base whose weights differ from those the adapter was trained on.
        data: Rows to compare on. Default: the rows that the run held out, or a few sentences for an adapter alone.
        columns: Column of ``data`` for each field of the task. Default: as in training.
        rows: How many rows to compare.
        max_difference: Largest difference of probabilities that is accepted. Default: what rounding explains, 1e-4 in
            float32.
        allow_forgetting: Accept an adapter that has forgotten more than `evaluation.max_forgetting` of its run allows.
        overwrite: Replace an earlier export at ``out``.

    Returns:
        ``out``, ``parity`` (``rows``, ``max_abs_difference``, ``agreement`` and more), ``dtype``, ``bytes``, ``notes``.

    Raises:
        UnsupportedError: The method cannot be merged, or the base is offloaded.
        IntegrityError: The merged model answers otherwise; nothing is written.
        ConflictError: There is something else at ``out``.
        ForgettingError: The adapter has forgotten too much.
        ConfigError, DataError, AdapterError, ModelError, ResourceError: As for `evaluate`.

    Example:
        >>> import graftwerk as gw
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        >>> base, sizes = Path(mkdtemp()), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes))
        >>> model.save_pretrained(base)
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> metadata = {"model": str(base), "labels": ["negative", "positive"]}
        >>> folder = gw.save(gw.attach(model, gw.LoRA(r=2)), mkdtemp(), metadata=metadata)
        >>> result = gw.merge(folder, Path(mkdtemp(), "merged"))
        >>> result["parity"]["max_abs_difference"] < 1e-5
        True
        >>> pipeline("text-classification", str(result["out"]))("good")[0]["label"] in ("negative", "positive")
        True
    """
    check_out(out, overwrite=overwrite)
    if dtype != "auto" and dtype not in TYPES:
        raise ConfigError(f"`{dtype}` is no type that weights are stored in", where="dtype", hint=", ".join(TYPES))
    source = read_source(
        target, model=model, force=force, data=data, columns=columns, rows=rows, allow_forgetting=allow_forgetting
    )
    note = to_full_weights(source)
    stored = TYPES[dtype] if dtype != "auto" else _stored_type(source, model)
    own = source.loaded.model.dtype
    if (finer := torch.promote_types(stored, own)) != own:  # merged in the type that is stored, and rounded there alone
        source.loaded.model.to(finer)
    if source.adapter.hosts:
        source.adapter.merge(keep_base=False)
    found: list[Parity] = []

    def fill(partial: Path) -> dict[str, Any]:
        found.append(_write(source, partial, stored, max_difference))
        return facts_of(source, "merged", found[0], "transformers")

    needed = sum(p.numel() for p in source.loaded.model.parameters()) * stored.itemsize
    folder = write_export(out, fill, overwrite=overwrite, bytes_needed=needed + (16 << 20))
    return {
        "out": folder,
        "parity": found[0].to_dict(),
        "dtype": str(stored).removeprefix("torch."),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "notes": [f"compared on {found[0].rows} {source.origin}", *([note] if note else [])],
    }


def _stored_type(source: Source, model: str | None) -> torch.dtype:
    """Return the type of the base's checkpoint, float32 if it does not say."""
    settings = source.loaded.settings
    name = model or (settings.model if settings else source.loaded.info.base_name)
    assert name is not None  # the base has been loaded from there
    named = getattr(load_config(name, settings.revision if settings and model is None else None), "dtype", None)
    return next((dtype for dtype in TYPES.values() if dtype == named), torch.float32)


def _write(source: Source, partial: Path, stored: torch.dtype, max_difference: float | None) -> Parity:
    """Write the merged model, load it as anybody would, and compare."""
    loaded = source.loaded
    _set_generation(loaded)
    with quiet():
        loaded.model.to(stored).save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
    free(loaded)
    tolerance = tolerance_of(stored, source.dtype, max_difference)
    merged, tokenizer = _load_plain(loaded.task.auto_class(), partial)
    _check_tokens(source, loaded.task.encode(source.rows, tokenizer, loaded.splits, loaded.max_length))
    dtype = source.dtype if stored == torch.float32 else torch.float32  # a 16-bit model computes in its own type
    parity = source.compared(merged, tokenizer, "the merged model", tolerance, dtype=dtype)
    text = merged_card(
        loaded.info.own,
        task=loaded.task.name,
        architecture=type(merged).__name__,
        parity=parity.to_dict(),
        prompt=_sample_prompt(loaded),
        pairs=bool(getattr(loaded.task, "pairs", False)),
    )
    (partial / "README.md").write_text(text, encoding="utf-8")
    return parity


def _set_generation(loaded: LoadedAdapter) -> None:
    """Let the merged model write as `evaluate` measured it: without the base's own settings, in the task's language."""
    task, model = loaded.task, loaded.model
    if not isinstance(task, TextTask) or not task.generates or getattr(model, "generation_config", None) is None:
        return
    with own_search(model, task, loaded.tokenizer):
        searched = model.generation_config
    model.generation_config = searched
    with contextlib.suppress(ConfigError):  # rows of several languages: none is forced
        for name, value in task.generation.options(model, loaded.tokenizer, Example({}, None)).items():
            setattr(searched, name, value)


def _sample_prompt(loaded: LoadedAdapter) -> str | None:
    """Return a prompt as the task makes it from a text, special tokens included, or None if it generates nothing."""
    if not isinstance(loaded.task, TextTask) or not loaded.task.generates:
        return None
    try:
        (example,) = loaded.encode([loaded.task.example_from_text("An example text.")])
    except GraftwerkError:  # rows name their languages, which a text does not
        return None
    return None if example.prompt is None else str(loaded.tokenizer.decode(example.prompt))


def _load_plain(auto: Any, folder: Path) -> tuple[Any, Any]:
    """Load a folder by transformers alone.

    Raises:
        ModelError: It cannot.
        IntegrityError: It draws weights at random, which the folder therefore lacks.
    """
    from transformers import AutoTokenizer

    with quiet():
        try:
            model, report = auto.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever transformers stumbles over
            raise ModelError(f"transformers cannot load the merged model: {error}") from error
    if missing := sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"]):
        raise IntegrityError(f"the merged model lacks {len(missing)} weights, among them `{missing[0]}`")
    return model.eval(), tokenizer


def _check_tokens(source: Source, examples: Sequence[Any]) -> None:
    for row, (ours, theirs) in enumerate(zip(source.examples, examples, strict=True), start=1):
        if ours.inputs != theirs.inputs:
            raise IntegrityError(f"the saved tokenizer splits row {row} into other tokens than the base's")
