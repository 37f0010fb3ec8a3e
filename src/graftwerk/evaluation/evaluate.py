"""`evaluate` and `predict`: what training left on disk, measured and used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwerk.data.splits_reader import read_unanswered
from graftwerk.errors import ConfigError, DataError, ModelError
from graftwerk.evaluation.finite import refuse_broken_base
from graftwerk.evaluation.inference import Progress
from graftwerk.evaluation.inference import run_model as run_model
from graftwerk.evaluation.loading import LoadedAdapter, held_out, labelled_rows, load_adapter_for
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.settings import parse_settings
from graftwerk.tasks.base import Example, Predictions, Row, Task
from graftwerk.tasks.text import TextTask


def evaluate(
    target: Any,
    data: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    model: str | None = None,
    force: bool = False,
    batch_size: int | None = None,
    confidence: float | None = None,
    resamples: int | None = None,
    store: bool = False,
    baseline: bool | None = None,
    evaluation: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a trained adapter.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` gave back.
        data: Labelled rows: a file, `pkg://...` or a hub id. Default: the rows that the run itself held out, test
            before validation.
        columns: Which column of `data` plays which part; default: as in training.
        model: The base model, where it is not where the adapter says.
        force: Accept a base with other weights than those the adapter was trained on.
        batch_size: Rows a forward pass. None means as many as the run itself took in evaluation.
        confidence, resamples: Of the intervals; default: as the run file says.
        store: Leave `evaluation.json` and the predictions, row by row, in the run folder.
        baseline: Measure the unadapted base on the same rows too; default: as the run file says.
        evaluation: Settings in place of the run file's: ``{"num_beams": 4}``.
        on_progress: Told (rows done, rows in all).

    Returns:
        ``metrics`` (each with value, low, high, and a note where something needs saying; for several data sets their
        macro means), ``metrics_by_set``, ``rows``, ``split`` (test,
        validation, or data), ``loss``, ``labels``, ``compute`` (type, device, rows of a forward pass and threads, by
        default the run's), ``cost`` (milliseconds a row by batch size, bytes of the adapter,
        bytes of memory that loading and evaluating took at most), ``notes``. For tasks that write: ``examples``
        (source, reference, the base's answer before, the adapter's after). With a baseline: its ``metrics``, ``loss``.

    Raises:
        ConfigError: there is nothing to evaluate, or no rows to do it on.
        DataError, AdapterError, ModelError, IntegrityError, EnvironmentFault: as reading and loading say.
    """
    from graftwerk.evaluation.cost import latency, peak_memory, size_on_disk
    from graftwerk.evaluation.metrics import metrics_of, require_packages
    from graftwerk.evaluation.per_dataset import metrics_by_set
    from graftwerk.evaluation.results_io import store_evaluation
    from graftwerk.evaluation.sample_outputs import before_and_after, check_baseline, of_base

    with peak_memory() as peak:
        opened = _with_settings(load_adapter_for(target, model=model, force=force), evaluation)
        if data is None:
            if columns is not None:
                raise ConfigError("`columns` says how the columns of `data` are called, and no data is given")
            split, rows = held_out(opened)
        else:
            with said_of(str(data)):
                split, rows = "data", labelled_rows(opened, str(data), None if columns is None else dict(columns))
        if store and (opened.run is None or data is not None or evaluation):
            raise ConfigError(
                "only what a run measured on its own held-out rows, with its own settings, can be stored with it"
            )
        settings = opened.evaluation
        wants_base = settings.baseline if baseline is None else baseline
        if settings.generate:
            require_packages(opened.task.metrics)
        if wants_base:
            check_baseline(opened.task)
        with said_of(None if data is None else str(data)):
            examples = opened.encode(rows)
        rows_a_pass = batch_size or opened.eval_batch_size
        said: list[str] = []

        def measured() -> Predictions:
            return run_model(
                opened.model,
                opened.task,
                examples,
                opened.tokenizer,
                batch_size=rows_a_pass,
                dtype=opened.dtype,
                on_progress=on_progress,
                texts=_texts(opened, examples, on_progress, said.append) if settings.generate else None,
            )

        predictions = measured()
    if not predictions.finite:
        refuse_broken_base(opened.model, trained=True)  # the adapter's own weights were found finite when it was read
    options: dict[str, Any] = {
        "labels": opened.labels or None,
        "names": opened.task.metrics,
        "confidence": confidence or settings.confidence,
        "resamples": resamples or settings.resamples,
    }
    metrics = metrics_of(predictions, **options)
    timed = latency(
        opened.model,
        opened.task,
        examples,
        opened.tokenizer,
        batches=settings.latency_batches,
        dtype=opened.dtype,
    )
    result: dict[str, Any] = {
        "metrics": metrics,
        "metrics_by_set": metrics_by_set(predictions, **options),
        "rows": len(examples),
        "split": split,
        "loss": predictions.loss,
        "labels": list(opened.labels),
        "compute": opened.compute(rows_a_pass),
        "cost": {
            **{f"latency_ms_batch_{size}": round(value, 4) for size, value in timed.items()},
            "adapter_bytes": size_on_disk(opened.info.folder),
            "peak_memory_bytes": peak.bytes,
        },
        "notes": said + _notes(opened, examples),
    }
    if data is None:
        result["notes"] += _other_bits(opened, result["compute"])
    base = of_base(opened.model, measured) if wants_base else None
    if base is not None:
        result["baseline"] = {"metrics": metrics_of(base, **options), "loss": base.loss}
    if shown := before_and_after(
        opened.model, opened.task, examples, opened.tokenizer, settings, predictions, dtype=opened.dtype, base=base
    ):
        result["examples"] = shown
    if split == "validation":
        result["notes"].append(
            "these rows also chose the checkpoint, so the figures are a little too good; set data.test"
        )
    if store and opened.run is not None:
        store_evaluation(opened.run, opened.info.folder, result, predictions)
    return result


def predict(
    target: Any,
    texts: str | Sequence[str] | None = None,
    data: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    model: str | None = None,
    force: bool = False,
    batch_size: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Label or answer texts, or the rows of a file (which need no labels), with a trained adapter.

    Args:
        texts: One text or several.
        data: In place of texts: a file, `pkg://...` or a hub id.
        The others: as for `evaluate`.

    Returns:
        ``predictions``: for each row, in order, ``label``, ``scores`` by label (they add up to one), and with `data`
        its ``text``; for tasks that write ``output``, and with `data` its ``source``; ``notes``: what was cut or left
        out, counted.

    Raises:
        ConfigError: neither texts nor data, or both; an empty text.
        DataError, AdapterError, ModelError, IntegrityError, EnvironmentFault: as reading and loading say.
    """
    if (texts is None) == (data is None):
        raise ConfigError("give texts or data" + ("" if texts is None else ", not both"))
    if data is None and columns is not None:
        raise ConfigError("`columns` says how the columns of `data` are called, and no data is given")
    listed = [texts] if isinstance(texts, str) else list(texts or ())
    for place, text in enumerate(listed):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"text {place + 1} of {len(listed)} is {'empty' if isinstance(text, str) else 'no text'}")
    if data is None and not listed:
        return {"predictions": [], "notes": []}
    opened = _with_settings(load_adapter_for(target, model=model, force=force), evaluation)
    said: list[str] = []
    rows = [opened.task.example_from_text(text) for text in listed]
    if data is not None:
        on_bad_row = opened.settings.data.on_bad_row if opened.settings else "fail"
        named = opened.columns if columns is None else dict(columns)
        with said_of(str(data)):
            table, findings = read_unanswered(str(data), opened.task.row_format, named, on_bad_row)
        rows = list(table.rows)
        said = [finding.message for finding in findings]
    with said_of(None if data is None else str(data)):
        examples = opened.encode(rows)
    found = run_model(
        opened.model,
        opened.task,
        examples,
        opened.tokenizer,
        batch_size=batch_size or opened.eval_batch_size,
        dtype=opened.dtype,
        on_progress=on_progress,
        texts=_texts(opened, examples, on_progress, said.append),
    )
    if not found.finite:
        refuse_broken_base(opened.model, trained=True)
    predictions = opened.task.format_predictions(found, opened.labels or None)
    if data is not None:
        sources = [_shown_of(opened.task, row, example) for row, example in zip(rows, examples, strict=True)]
        predictions = [{**answer, **source} for answer, source in zip(predictions, sources, strict=True)]
    return {"predictions": predictions, "notes": said + _notes(opened, examples)}


_SETTLED = re.compile(r"\b(?:data|task|training|method|model)\.[a-z_]+")
"""Keys of a run file that neither command takes."""


@contextmanager
def said_of(data: str | None) -> Iterator[None]:
    """Let errors about rows that were given speak of them, and advise nothing that these commands cannot take.

    Reading speaks of a run file, for which it was made: of its train rows and of its keys.

    Args:
        data: Where the rows come from, or None for texts or the run's own rows.
    """
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        if data is not None:
            error.what = error.what.replace("the train rows", f"the rows of {data}")
            if error.where and _SETTLED.fullmatch(error.where):
                error.where = data
        if error.hint and _SETTLED.search(error.hint):
            error.hint = _taken(error.hint, data)
        raise


def _taken(hint: str, data: str | None) -> str:
    if data is None:
        return "shorten or leave out what does not fit; how rows are read was settled by the training"
    if "data.columns" in hint:
        near = hint.partition("? ")[0] + "? " if hint.startswith("did you mean") else ""
        return f"{near}`--column PART=NAME` (columns={{part: name}}) says which column plays which part"
    return f"mend these rows, or leave them out of {data}; how rows are read was settled by the training"


def _with_settings(opened: LoadedAdapter, changes: Mapping[str, Any] | None) -> LoadedAdapter:
    """With other settings of evaluation.

    Raises:
        ConfigError: one that there is not, or that does nothing for this task.
    """
    if not changes:
        return opened
    if not opened.task.generates:
        for name in ("generate", "max_new_tokens", "num_beams", "length_penalty", "generation_batch_size"):
            if name in changes:
                raise ConfigError(f"`{name}` does nothing for {opened.task.name}: nothing is written", where=name)
    settings = {**opened.evaluation.model_dump(), **changes}
    return replace(
        opened, evaluation=parse_settings(EvaluationSettings, settings, what="an evaluation", where="evaluation")
    )


def _shown_of(task: Task, row: Row, example: Example) -> dict[str, str | None]:
    """What an answer of a file's row stands beside."""
    return {"source": task.source(example)} if isinstance(task, TextTask) else {"text": str(row["text"])}


def _texts(
    opened: LoadedAdapter, examples: Sequence[Example], on_progress: Progress | None, say: Callable[[str], None]
) -> list[str] | None:
    """The model's own answers, for tasks that have any."""
    from graftwerk.evaluation.generation import generate

    task = opened.task
    if not isinstance(task, TextTask) or not task.generates:
        return None
    return generate(
        opened.model,
        task,
        examples,
        opened.tokenizer,
        opened.evaluation,
        dtype=opened.dtype,
        on_progress=on_progress,
        say=say,
    )


def _other_bits(opened: LoadedAdapter, compute: Mapping[str, Any]) -> list[str]:
    """Say what differs from the run's own evaluation: a row that hangs in the balance may be answered otherwise."""
    names = {"type": "compute type", "device": "device", "eval_batch_size": "rows a forward pass", "threads": "threads"}
    changed = [
        f"{said} {compute[name]} (in training: {opened.trained_with[name]})"
        for name, said in names.items()
        if name in opened.trained_with and compute[name] != opened.trained_with[name]
    ]
    if not changed:
        return []
    return [f"answers round otherwise than in training, and single rows may change: {', '.join(changed)}"]


def _notes(opened: LoadedAdapter, examples: Sequence[Example]) -> list[str]:
    cut = sum(example.truncated > 0 for example in examples)
    if not cut:
        return []
    return [f"{cut:,} of {len(examples):,} rows were cut to {opened.max_length} tokens"]
