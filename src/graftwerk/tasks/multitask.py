"""Several data sets learnt by one model, each with a task of its own: rows know their set, and the set knows the rest.

What is learnt must be the same kind of thing: the sets' tasks read and encode in their own ways, and one loss over
tokens, one padding and one model serve them all.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_serializer, model_validator
from torch import Tensor

from graftwerk.data.fields import text_part
from graftwerk.data.findings import Issue
from graftwerk.data.settings import DataSettings, SetSettings, plain, source_name
from graftwerk.data.split import fold
from graftwerk.data.splits_reader import RowFormat, fingerprint_of
from graftwerk.errors import ConfigError, DataError
from graftwerk.tasks.base import Task
from graftwerk.tasks.collator import Collator
from graftwerk.tasks.decoder import TextDecoder
from graftwerk.tasks.example import Example, Row
from graftwerk.tasks.generation import Generation
from graftwerk.tasks.predictions import Predictions, TextPredictions
from graftwerk.tasks.splits import Splits
from graftwerk.tasks.text import TextTask
from graftwerk.tasks.token_objective import TokenObjective

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SET = "set"
"""The part of a row that names its set."""
SPLITS = ("train", "validation", "test")
SHARED = ("collator", "objective")
"""The parts that one step uses for all its rows: tasks in which they differ cannot be learnt together."""


class Multitask(TextTask):
    """The tasks of several sets, by the sets' names; a row without a set is taken to be of the first."""

    name = "mixture"
    title = "Several tasks in one model"

    tasks: dict[str, Task] = Field(min_length=1, description="the task of each set of `data.train`, by its name")

    @field_serializer("tasks")
    def _dump(self, tasks: dict[str, Task]) -> dict[str, Any]:
        return {name: task.to_dict() for name, task in tasks.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        first = self.first
        for task in self.tasks.values():
            if not isinstance(task, TextTask) or isinstance(task, Multitask):
                raise ValueError(f"`{task.name}` is no task in which a model writes text, so it cannot be mixed")
            differ = [part for part in SHARED if getattr(task, part) != getattr(first, part)]
            if differ:
                raise ValueError(f"`{task.name}` and `{first.name}` are trained in different ways ({differ[0]})")
        return self

    @property
    def first(self) -> TextTask:
        """Return the first task; the others are trained in the same way."""
        task = next(iter(self.tasks.values()))
        assert isinstance(task, TextTask)
        return task

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the fields of all tasks and the one that names the set."""
        return (*dict.fromkeys(field for task in self.tasks.values() for field in task.fields), SET)

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the metrics of all tasks, those that every task has first; values are macro means over the sets."""
        every = dict.fromkeys(name for task in self.tasks.values() for name in task.metrics)
        return tuple(sorted(every, key=lambda name: not all(name in task.metrics for task in self.tasks.values())))

    @property
    def generates(self) -> bool:  # type: ignore[override]
        """Return True if any of the tasks generates text."""
        return any(task.generates for task in self.tasks.values())

    def for_model(self, config: PreTrainedConfig) -> Self:
        bound = super().for_model(config)
        return bound._with({name: task.for_model(config) for name, task in self.tasks.items()})

    def resolved(self, splits: Splits) -> Self:
        """Return the task with each of its tasks resolved from its own rows."""
        mine = {name: [row for row in splits.train if row[SET] == name] for name in self.tasks}
        return self._with({name: task.resolved(replace(splits, train=mine[name])) for name, task in self.tasks.items()})

    def _with(self, tasks: dict[str, Task]) -> Self:
        return self.model_copy(update={"tasks": tasks})

    def _text_tasks(self) -> dict[str, TextTask]:
        return {name: task for name, task in self.tasks.items() if isinstance(task, TextTask)}

    # -- rows ------------------------------------------------------------------------------------------------------

    def row_format(self, columns: Sequence[str]) -> RowFormat:
        """Return the format of rows that are not of the run: those of the first set, or of the set that they name."""
        usual = self.first.row_format([column for column in columns if column != SET])
        shape, ask = usual.shape, usual.ask

        def keeping(make: Any) -> Any:
            return lambda row: {**make({part: row[part] for part in row if part != SET}), **_set(row)}

        return replace(
            usual,
            optional={**usual.optional, SET: text_part},
            shape=None if shape is None else keeping(shape),
            ask=None if ask is None else keeping(ask),
        )

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        """Read, check and split each set by its own task; leave out training rows that another set holds out.

        Raises:
            ConfigError: settings that have no meaning for several sets.
        """
        if not data.sets:
            return super().read(data, labels)
        names = names_of(data.sets)
        if list(names) != list(self.tasks):
            raise ConfigError(
                f"`task` names the sets {', '.join(self.tasks)}, and `data.train` has {', '.join(names)}",
                where="task.tasks",
                hint="leave `task` to the settings of the sets in `data.train`",
            )
        if data.max_train_rows is not None:
            raise ConfigError(
                "`max_train_rows` does not say of which set", where="data.max_train_rows", hint="give sets `max_rows`"
            )
        read = {
            name: self.tasks[name].read(_settings_of(each, data, len(names)), labels)
            for name, each in zip(names, data.sets, strict=True)
        }
        rows: dict[str, Any] = {split: [] for split in SPLITS}
        places: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
        findings = [replace(said, message=f"{name}: {said.message}") for name in names for said in read[name].issues]
        held = {_content(row) for part in read.values() for split in SPLITS[1:] for row in getattr(part, split)}
        for name in names:
            own = {_content(row) for split in SPLITS[1:] for row in getattr(read[name], split)}
            dropped: list[int] = []
            for split in SPLITS:
                for at, row in enumerate(getattr(read[name], split)):
                    if split == "train" and (content := _content(row)) in held and content not in own:
                        dropped.append(at)
                        continue
                    rows[split].append({**row, SET: name})
                    places[split].append((name, at))
            findings += _left_out(name, dropped, read[name])
            if len(dropped) == len(read[name].train):
                raise DataError(f"all training rows of the set `{name}` are held out by another set", where=name)
        wheres = {name: read[name].where for name in names}
        origin: dict[str, Any] = {name: {**read[name].origin, "task": self.tasks[name].to_dict()} for name in names}
        return Splits(
            **rows,
            labels=None,
            fingerprint=fingerprint_of(rows, self.fields),
            issues=tuple(findings),
            origin={
                "train": [plain(each.rows_from) for each in data.sets],
                "sets": origin,
                "rows": {split: len(part) for split, part in rows.items()},
            },
            where={split: _finder(wheres, split, listed) for split, listed in places.items()},
        )

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, splits: Splits, max_length: int
    ) -> list[Example]:
        """Encode each set's rows by its task, in the order of the rows.

        Where a task makes other examples than one a row (blocks of text), the sets follow one another.
        """
        where: dict[str, list[int]] = {}
        for at, row in enumerate(rows):
            where.setdefault(set_of(row, self.tasks), []).append(at)
        placed: list[tuple[int, Example]] = []
        for name, places in where.items():
            made = self.tasks[name].encode([rows[at] for at in places], tokenizer, splits, max_length)
            order = places if len(made) == len(places) else [len(rows)] * len(made)
            placed += [
                (at, replace(example, row={**(example.row or {}), SET: name}))
                for at, example in zip(order, made, strict=True)
            ]
        return [example for _, example in sorted(placed, key=lambda pair: pair[0])]

    # -- components: the first task's, which all share, and those that choose by row -------------------------------

    @property
    def collator(self) -> Collator:
        return self.first.collator

    @property
    def objective(self) -> TokenObjective:
        return self.first.objective

    @property
    def decoder(self) -> TextDecoder:
        return MultitaskDecoder({name: task.decoder for name, task in self._text_tasks().items()})

    @property
    def generation(self) -> Generation:
        return MultitaskGeneration(self._layout, {name: task.generation for name, task in self._text_tasks().items()})


@dataclass(frozen=True)
class MultitaskDecoder(TextDecoder):
    """Each row by the decoder of its data set.

    Attributes:
        decoders: Decoders by the names of their data sets.
    """

    decoders: Mapping[str, TextDecoder]

    def reference(self, example: Example) -> str | None:
        return self._of(example).reference(example)

    def source(self, example: Example) -> str | None:
        return self._of(example).source(example)

    def language(self, example: Example) -> str | None:
        return self._of(example).language(example)

    def predictions(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], loss: float | None, texts: Sequence[str] | None
    ) -> TextPredictions:
        found = super().predictions(outputs, examples, loss, texts)
        return replace(found, sets=tuple(set_of(example.row, self.decoders) for example in examples))

    def format_predictions(self, predictions: Predictions, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        return next(iter(self.decoders.values())).format_predictions(predictions, labels)

    def _of(self, example: Example) -> TextDecoder:
        return self.decoders[set_of(example.row, self.decoders)]


@dataclass(frozen=True)
class MultitaskGeneration(Generation):
    """Each row by the generation settings of its data set.

    Attributes:
        generations: Generation settings by the names of their data sets.
    """

    generations: Mapping[str, Generation]

    def group(self, example: Example) -> Hashable:
        """Return the data set and its own group: other data sets may end answers or start them otherwise."""
        name = set_of(example.row, self.generations)
        return name, self.generations[name].group(example)

    def options(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, Any]:
        return self.generations[set_of(example.row, self.generations)].options(model, tokenizer, example)


def set_of(row: Mapping[str, Any] | None, names: Mapping[str, Any]) -> str:
    """Return the name of a row's data set; a row without one is taken to be of the first.

    Args:
        row: The row, or None if it is not known.
        names: Anything by the names of the data sets.

    Raises:
        DataError: The row names a data set that there is not.
    """
    name = str((row or {}).get(SET) or next(iter(names)))
    if name not in names:
        raise DataError(f"a row is of the set `{name}`, and there are: {', '.join(names)}", where=SET)
    return name


def names_of(sets: Sequence[SetSettings]) -> tuple[str, ...]:
    """Return a unique name for each set: its own, or that of its file, with a number if it is taken.

    Raises:
        ConfigError: Two sets are given the same name.
    """
    names: list[str] = []
    for each in sets:
        source = each.source if isinstance(each.source, str) else each.source[0]
        usual = each.name or Path(source.rpartition("://")[2]).name.partition(".")[0] or source
        if each.name is None and each.source_lang and each.target_lang:
            usual = f"{usual} {each.source_lang}-{each.target_lang}"
        if each.name is not None and each.name in names:
            raise ConfigError(f"two sets are called `{each.name}`", where="data.train", hint="name them differently")
        number = 2
        name = usual
        while name in names:
            name, number = f"{usual} {number}", number + 1
        names.append(name)
    return tuple(names)


def _settings_of(each: SetSettings, data: DataSettings, count: int) -> DataSettings:
    changed: dict[str, Any] = {"train": each.rows_from, "temperature": None, "max_train_rows": each.max_rows}
    for key in ("columns", "filter"):
        if getattr(each, key) is not None:
            changed[key] = getattr(each, key)
    for split in SPLITS[1:]:
        wanted, usual = getattr(each, split), getattr(data, split)
        if wanted is None and usual is not None and not isinstance(usual, int | float):
            raise ConfigError(
                f"`{split}: {source_name(usual)}` does not say which set's rows these are",
                where=f"data.{split}",
                hint=f"give each set its `{split}`, or a number or share of rows for all",
            )
        # a number is of all sets together
        shared = max(1, usual // count) if isinstance(usual, int) else usual
        changed[split] = shared if wanted is None else wanted
    return data.model_copy(update=changed)


def _content(row: Row) -> tuple[str, ...]:
    """Return the folded texts of a row in sorted order, the same for both directions of a translation."""
    texts = [str(value) for part, value in row.items() if part != SET and not part.endswith("_lang")]
    return tuple(sorted(fold(text) for text in texts))


def _set(row: Row) -> Row:
    return {SET: row[SET]} if SET in row else {}


def _left_out(name: str, dropped: Sequence[int], splits: Splits) -> list[Issue]:
    if not dropped:
        return []
    message = f"{name}: {len(dropped):,} training rows are held out by another set, and were left out"
    where = splits.where.get("train")
    return [
        Issue(
            "held-out-elsewhere",
            message,
            len(dropped),
            example=None if where is None else where(dropped[0]),
            hint="`both_directions` of a translation splits both directions alike",
        )
    ]


def _finder(wheres: Mapping[str, Mapping[str, Any]], split: str, listed: Sequence[tuple[str, int]]) -> Any:
    def where(index: int) -> str:
        name, at = listed[index]
        return str(wheres[name][split](at))

    return where
