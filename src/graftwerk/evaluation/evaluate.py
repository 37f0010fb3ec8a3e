"""`evaluate` and `predict`: what training left on disk, measured and used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwerk.data.splits_reader import read_unanswered
from graftwerk.display import RowsDone, shown_rows
from graftwerk.errors import ConfigError
from graftwerk.evaluation.finite import refuse_broken_base
from graftwerk.evaluation.held_out import check_columns, held_out, labelled_rows
from graftwerk.evaluation.inference import Progress
from graftwerk.evaluation.inference import run_model as run_model
from graftwerk.evaluation.loading import LoadedAdapter, load_adapter_for
from graftwerk.evaluation.row_errors import naming_source
from graftwerk.evaluation.settings import WRITTEN, EvaluationSettings
from graftwerk.settings_parsing import parse_settings
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
    on_progress: RowsDone | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    r"""Evaluate a trained adapter on labelled rows.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` returned.
        data: Labelled rows: a file, `pkg://...` or a hub id. Default: the rows that the run held out, test before
            validation.
        columns: Column of `data` for each field of the task. Default: as in training.
        model: The base model, if it is not where the adapter says.
        force: Accept a base whose weights differ from those the adapter was trained on.
        batch_size: Rows per forward pass. Default: as in the run's own evaluation.
        confidence: Level of the intervals, 0 to 1. Default: as in the run file.
        resamples: Number of bootstrap resamples. Default: as in the run file.
        store: Write `evaluation.json` and the predictions of each row into the run folder.
        baseline: Evaluate the base without adapter on the same rows too. Default: as in the run file.
        evaluation: Settings in place of the run file's: ``{"num_beams": 4}``.
        on_progress: Called with (rows done, rows in all), in place of the progress display.
        quiet: Show no progress.

    Returns:
        A mapping with ``metrics`` (each with ``value``, ``low``, ``high``, and a ``note`` if needed; macro means for
        several data sets), ``metrics_by_set``, ``rows``, ``split`` (test, validation or data), ``loss``, ``labels``,
        ``compute`` (type, device, rows per forward pass, threads), ``cost`` (milliseconds per row by batch size, bytes
        of the adapter, peak memory in bytes) and ``notes``. Tasks that generate text add ``examples`` (source,
        reference, and the answers before and after adaptation), and a baseline its ``metrics`` and ``loss``.

    Raises:
        ConfigError: There is no adapter, or there are no rows to evaluate on.
        DataError, AdapterError, ModelError, IntegrityError, ResourceError: As for reading data and loading models.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertModel, BertTokenizer
        >>> from graftwerk import evaluate, train
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *"0123456789"]
        >>> base, rows = Path(mkdtemp()), Path(mkdtemp(), "rows.csv")
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(base)
        >>> _ = rows.write_text("text,label\n" + "".join(f"good {n},1\nbad {n},0\n" for n in range(10)))
        >>> config = {"model": str(base), "data": {"train": str(rows), "test": 0.2}, "method": "lora"}
        >>> run = train(config, output_dir=mkdtemp(), quiet=True, **{"training.max_steps": 2})
        >>> results = evaluate(run)
        >>> results["split"], results["rows"], list(results["metrics"]["accuracy"])
        ('test', 4, ['value', 'low', 'high'])
    """
    from graftwerk.evaluation.cost import latency, peak_memory, size_on_disk
    from graftwerk.evaluation.metrics import metrics_of, require_packages
    from graftwerk.evaluation.per_dataset import metrics_by_set
    from graftwerk.evaluation.results_io import store_evaluation
    from graftwerk.evaluation.sample_outputs import before_and_after, check_baseline, of_base

    with shown_rows("evaluating", on_progress, quiet) as on_progress, peak_memory() as peak:
        opened = with_settings(load_adapter_for(target, model=model, force=force), evaluation)
        check_columns(data, columns)
        if data is None:
            split, rows = held_out(opened)
        else:
            with naming_source(str(data)):
                split, rows = "data", labelled_rows(opened, str(data), None if columns is None else dict(columns))
        if store and (opened.run is None or data is not None or evaluation):
            raise ConfigError(
                "only what a run measured on its own held-out rows, with its own settings, can be stored with it"
            )
        settings = opened.evaluation
        _check_one_answer(settings)
        wants_base = settings.baseline if baseline is None else baseline
        if settings.generate:
            require_packages(opened.task.metrics)
        if wants_base:
            check_baseline(opened.task)
        with naming_source(None if data is None else str(data)):
            examples = opened.encode(rows)
        rows_per_pass = batch_size or opened.eval_batch_size
        notes: list[str] = []

        def measured() -> Predictions:
            return _predicted(opened, examples, rows_per_pass, on_progress, notes.append, settings.generate)[0]

        predictions = measured()
    _refuse_broken_base(opened, predictions)
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
        "rows": predictions.rows,
        "split": split,
        "loss": predictions.loss,
        "labels": list(opened.labels),
        "compute": opened.compute(rows_per_pass),
        "cost": {
            **{f"latency_ms_batch_{size}": round(value, 4) for size, value in timed.items()},
            "adapter_bytes": size_on_disk(opened.info.folder),
            "peak_memory_bytes": peak.bytes,
        },
        "notes": notes + truncation_notes(opened, examples),
    }
    if data is None:
        result["notes"] += _rounding_notes(opened, result["compute"])
    base = of_base(opened.model, measured) if wants_base else None
    if base is not None:
        result["baseline"] = {"metrics": metrics_of(base, **options), "loss": base.loss}
    if shown := before_and_after(
        opened.model, opened.task, examples, opened.tokenizer, settings, predictions, dtype=opened.dtype, base=base
    ):
        result["examples"] = shown
    if split == "validation":
        result["notes"].append(
            "these rows also chose the checkpoint, so the metrics are a little too good; set data.test"
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
    on_progress: RowsDone | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Predict labels or generate answers for texts, or for the rows of a file, with a trained adapter.

    Args:
        target: As for `evaluate`.
        texts: One text or several.
        data: In place of texts: a file, `pkg://...` or a hub id; its rows need no labels.
        columns: As for `evaluate`.
        model: As for `evaluate`.
        force: As for `evaluate`.
        batch_size: As for `evaluate`.
        evaluation: As for `evaluate`.
        on_progress: As for `evaluate`.
        quiet: As for `evaluate`.

    Returns:
        ``predictions``, one per row in order: ``label`` and ``scores`` by label, which add up to one, or ``output``
        for tasks that generate text (a list, for several `num_return_sequences`); with `data` also the ``text`` or
        ``source``. And ``notes`` with the numbers of truncated and skipped rows.

    Raises:
        ConfigError: Neither texts nor data, or both; or a text is empty.
        DataError, AdapterError, ModelError, IntegrityError, ResourceError: As for reading data and loading models.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
        >>> from graftwerk import LoRA, attach, predict, save
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
        >>> base, sizes = Path(mkdtemp()), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=len(words), intermediate_size=16, **sizes))
        >>> model.save_pretrained(base)
        >>> _ = BertTokenizer(vocab={word: token for token, word in enumerate(words)}).save_pretrained(base)
        >>> metadata = {"model": str(base), "labels": ["negative", "positive"]}
        >>> folder = save(attach(model, LoRA(r=2)), mkdtemp(), metadata=metadata)
        >>> answers = predict(folder, ["good", "bad"])["predictions"]
        >>> [sorted(answer["scores"]) for answer in answers]
        [['negative', 'positive'], ['negative', 'positive']]
    """
    if (texts is None) == (data is None):
        raise ConfigError("give texts or data" + ("" if texts is None else ", not both"))
    check_columns(data, columns)
    listed = [texts] if isinstance(texts, str) else list(texts or ())
    for place, text in enumerate(listed):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f"text {place + 1} of {len(listed)} is {'empty' if isinstance(text, str) else 'no text'}",
                hint="leave it out; rows of a file (--data, data=) may be empty, and are counted",
            )
    if data is None and not listed:
        return {"predictions": [], "notes": []}
    opened = with_settings(load_adapter_for(target, model=model, force=force), evaluation)
    notes: list[str] = []
    rows = [opened.task.example_from_text(text) for text in listed]
    if data is not None:
        on_bad_row = opened.settings.data.on_bad_row if opened.settings else "fail"
        named = opened.columns if columns is None else dict(columns)
        with naming_source(str(data)):
            table, findings = read_unanswered(str(data), opened.task.row_format, named, on_bad_row)
        rows = list(table.rows)
        notes = [finding.message for finding in findings]
    with naming_source(None if data is None else str(data)):
        examples = opened.encode(rows)
    size = batch_size or opened.eval_batch_size
    with shown_rows("predicting", on_progress, quiet) as rows_done:
        predictions = answer_examples(opened, examples, rows, batch_size=size, on_progress=rows_done, say=notes.append)
    if data is not None and len(examples) == len(rows):
        sources = [shown_input(opened.task, row, example) for row, example in zip(rows, examples, strict=True)]
        predictions = [{**answer, **source} for answer, source in zip(predictions, sources, strict=True)]
    return {"predictions": predictions, "notes": notes + truncation_notes(opened, examples)}


def _check_one_answer(settings: EvaluationSettings) -> None:
    if settings.num_return_sequences > 1:
        raise ConfigError(
            "one answer to a row is measured, not several",
            where="num_return_sequences",
            hint="`predict` gives several: --set num_return_sequences=3",
        )


def with_settings(opened: LoadedAdapter, changes: Mapping[str, Any] | None) -> LoadedAdapter:
    """Return a loaded adapter with other settings of evaluation.

    Raises:
        ConfigError: one that there is not, or that does nothing for this task.
    """
    if not changes:
        return opened
    if not opened.task.generates:
        for name in WRITTEN:
            if name in changes:
                raise ConfigError(
                    f"`{name}` does nothing for {opened.task.name}: nothing is written",
                    where=name,
                    hint="leave it out; it acts on the answers of tasks in which a model writes",
                )
    settings = {**opened.evaluation.model_dump(), **changes}
    return replace(
        opened, evaluation=parse_settings(EvaluationSettings, settings, what="an evaluation", where="evaluation")
    )


def answer_examples(
    opened: LoadedAdapter,
    examples: Sequence[Example],
    rows: Sequence[Row],
    *,
    batch_size: int,
    on_progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Run the model on encoded rows, and return the answer to each as `predict` gives it.

    Args:
        opened: The loaded adapter.
        examples: Encoded rows, perhaps several of a row.
        rows: The rows.
        batch_size: Rows per forward pass.
        on_progress: Called with (rows done, rows in all).
        say: Called with each note on how answers were generated.

    Raises:
        ModelError: The base's weights are not finite.
        UnsupportedError: The task gives no answers.
    """
    predictions, written = _predicted(opened, examples, batch_size, on_progress, say)
    _refuse_broken_base(opened, predictions)
    answers = opened.task.decoder.format_predictions(predictions, opened.labels or None)
    if written is not None and opened.evaluation.num_return_sequences > 1:
        answers = [{**answer, "output": texts} for answer, texts in zip(answers, written, strict=True)]
    return [opened.task.completed(answer, row) for answer, row in zip(answers, rows, strict=True)]


def _predicted(
    opened: LoadedAdapter,
    examples: Sequence[Example],
    batch_size: int,
    on_progress: Progress | None,
    say: Callable[[str], None],
    generate: bool = True,
) -> tuple[Predictions, list[list[str]] | None]:
    """Run the model on encoded rows; return its predictions, and the texts it wrote for each row, or None."""
    written = generated_texts(opened, examples, on_progress, say) if generate else None
    predictions = run_model(
        opened.model,
        opened.task,
        examples,
        opened.tokenizer,
        batch_size=batch_size,
        dtype=opened.dtype,
        on_progress=on_progress,
        texts=None if written is None else [texts[0] for texts in written],
    )
    return predictions, written


def _refuse_broken_base(opened: LoadedAdapter, predictions: Predictions) -> None:
    if not predictions.finite:
        refuse_broken_base(opened.model, trained=True)  # the adapter's own weights were found finite when it was read


def shown_input(task: Task, row: Row, example: Example) -> dict[str, str | None]:
    """Return the input that is shown beside the answer to a file's row: its source, or its text."""
    if isinstance(task, TextTask):
        return {"source": task.decoder.source(example)}
    return {part: str(row[part]) for part in ("text", "text_pair", "anchor", "positive") if part in row}


def generated_texts(
    opened: LoadedAdapter, examples: Sequence[Example], on_progress: Progress | None, say: Callable[[str], None]
) -> list[list[str]] | None:
    """Generate the model's answers to each row, or return None for tasks that do not generate text.

    Args:
        opened: The adapter, loaded.
        examples: The rows, encoded.
        on_progress: Called with (rows done, rows in all).
        say: Told what is to be said beside the answers.
    """
    from graftwerk.evaluation.generation import generate_all

    task = opened.task
    if not isinstance(task, TextTask) or not task.generates:
        return None
    return generate_all(
        opened.model,
        task,
        examples,
        opened.tokenizer,
        opened.evaluation,
        dtype=opened.dtype,
        on_progress=on_progress,
        say=say,
    )


def _rounding_notes(opened: LoadedAdapter, compute: Mapping[str, Any]) -> list[str]:
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


def truncation_notes(opened: LoadedAdapter, examples: Sequence[Example]) -> list[str]:
    """Return a note on the rows that were cut to the longest input, or none."""
    cut = sum(example.truncated > 0 for example in examples)
    if not cut:
        return []
    return [f"{cut:,} of {len(examples):,} rows were cut to {opened.max_length} tokens"]
