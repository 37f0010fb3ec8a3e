"""Checks before a training: issues of encoded rows, the first batch as the model sees it, and severe issues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwerk.config import RunConfig
from graftwerk.data.findings import Issue
from graftwerk.errors import ConfigError, DataError, did_you_mean
from graftwerk.tasks.base import Example, Splits, Task
from graftwerk.tasks.example_checks import check_examples, issues_from_notes
from graftwerk.tasks.text import IGNORED, TextTask
from graftwerk.training.batch_sampler import BatchSampler, micro_batches
from graftwerk.training.multitask_sampling import sampler_of
from graftwerk.training.stream import EncodedStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL = "all"
"""In `data.allow`: every severe issue."""
GRAVE_CODES = (
    "label-spelling",
    "rare-classes",
    "leakage",
    "labels-all-masked",
    "end-untrained",
    "answer-limit",
    "label-skew",
    "missing-values",
    "many-classes",
)
"""Issues that may be severe, which `data.allow` can name."""


def check_encoded(
    settings: RunConfig, task: Task, splits: Splits, examples: Mapping[str, Sequence[Example]], positions: int | None
) -> list[Issue]:
    """Return the issues of encoded rows.

    Args:
        settings: Settings of the run.
        task: Task of the run.
        splits: Rows as they were read.
        examples: Encoded rows by split.
        positions: Tokens that the model has positions for, or None for any number.
    """
    findings: list[Issue] = []
    for split, rows in examples.items():
        where = splits.where.get(split)
        if len(rows) != len(getattr(splits, split)):
            where = None  # rows that were cut into several
        if isinstance(rows, EncodedStream):
            findings += issues_from_notes(split, rows.notes, len(rows), where)
        else:
            findings += check_examples(split, rows, where, task)
    if isinstance(task, TextTask) and task.generates and settings.evaluation.generate:
        findings += _answer_limit(settings, task, examples, positions)
    return findings


def _answer_limit(
    settings: RunConfig, task: TextTask, examples: Mapping[str, Sequence[Example]], positions: int | None
) -> list[Issue]:
    """Return an issue for references that the model cannot generate to their end: metrics would measure the limit."""
    findings = []
    limit = settings.evaluation.max_new_tokens
    for split in ("validation", "test"):
        rows = examples[split]
        lengths = [sum(label != IGNORED for label in row.target) for row in rows if row.target is not None]
        longest = max(lengths, default=0)
        room = positions if positions is not None and task.layout == "encoder-decoder" else None
        most = min((each for each in (limit, room) if each is not None), default=None)
        over = 0 if most is None else sum(length > most for length in lengths)
        if not over:
            continue
        findings.append(
            Issue(
                "answer-limit",
                f"{over:,} of {len(rows):,} {split} rows have a right answer of more than the {most} tokens that the "
                "model may write",
                over,
                example=f"the longest has {longest} tokens",
                hint=f"evaluation.max_new_tokens={longest}, or leave it out",
                grave=over > settings.data.max_truncated * len(rows),
            )
        )
    return findings


def check_allowed(allow: Sequence[str]) -> None:
    """Raise unless `data.allow` names only issues that can be severe.

    Raises:
        ConfigError: It names something else.
    """
    for code in allow:
        if code not in (*GRAVE_CODES, ALL):
            listed = f"There are: {', '.join(GRAVE_CODES)}; {ALL} allows every one"
            raise ConfigError(
                f"there is no severe issue `{code}`",
                where="data.allow",
                hint=did_you_mean(code, GRAVE_CODES, listed),
            )


def raise_on_severe(findings: Sequence[Mapping[str, Any]], allow: Sequence[str]) -> None:
    """Raise if rows make a run worthless or its metrics misleading, unless `data.allow` names the issue.

    Raises:
        DataError: The message names each severe issue that is not allowed, or cannot be.
    """
    severe = [
        found
        for found in findings
        if found.get("fatal") or (found["grave"] and found["code"] not in allow and ALL not in allow)
    ]
    if not severe:
        return
    hints = [str(found["hint"]) for found in severe if found["hint"]]
    codes = ", ".join(dict.fromkeys(str(found["code"]) for found in severe if not found.get("fatal")))
    raise DataError(
        "; ".join(str(found["message"]) for found in severe),
        where="; ".join(str(found["example"]) for found in severe if found["example"]) or None,
        hint="; ".join(
            [
                *dict.fromkeys(hints),
                *([f"or continue all the same with --force, or data.allow=[{codes}]"] if codes else ()),
            ]
        ),
    )


def first_batch(
    settings: RunConfig, task: Task, splits: Splits, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the first micro-batch of the first step, as it is collated.

    Returns:
        ``shape`` (rows, tokens) and ``rows``: of each its ``tokens``; ``trained``, whether the model learns to write
        the token; ``padding``, how many tokens of padding stand behind; ``label``, a class's name, or None; and for
        encoder-decoders ``answer``, the tokens that the decoder learns.
    """
    training = settings.training
    rows_of = BatchSampler(
        examples,
        training.global_batch_size(),
        seed=training.seed,
        group=training.length_group,
        draw=sampler_of(settings, task, examples),
    )
    pieces = micro_batches(
        rows_of(0), rows_of.lengths, training.max_micro_batch_size, tokens=training.per_device_train_tokens
    )
    chosen = [examples[row] for row in pieces[0]]
    batch = task.collator.collate(chosen, tokenizer)
    shown = []
    causal = isinstance(task, TextTask) and task.layout == "causal"
    for at, example in enumerate(chosen):
        length = int(batch["attention_mask"][at].sum()) if batch["attention_mask"].dim() == 2 else example.length
        ids = batch["input_ids"][at].tolist()
        target = batch["labels"][at].tolist() if "labels" in batch else None
        row: dict[str, Any] = {
            "tokens": tokenizer.convert_ids_to_tokens(ids[:length]),
            "trained": [False] * length,
            "padding": len(ids) - length,
            "label": None,
            "answer": None,
        }
        if (said := task.target_text(example.target, splits.labels)) is not None:
            row["label"] = said
        elif target is not None and len(target) == len(ids) and (causal or not isinstance(task, TextTask)):
            row["trained"] = [label != IGNORED for label in target[:length]]
        elif target is not None:
            row["answer"] = tokenizer.convert_ids_to_tokens([label for label in target if label != IGNORED])
        shown.append(row)
    return {"shape": list(batch["input_ids"].shape), "rows": shown}
