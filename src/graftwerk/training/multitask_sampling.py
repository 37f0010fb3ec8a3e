"""Runs of several data sets: how often the rows of each are drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwerk.config import RunConfig
from graftwerk.data.mixture import Sampler
from graftwerk.errors import DataError
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.multitask import SET, Multitask

if TYPE_CHECKING:
    from graftwerk.training.trainer import Trainer


def sampler_of(settings: RunConfig, task: Task, examples: Sequence[Example]) -> Sampler | None:
    """Return the sampler of each epoch's rows, or None for a run of one data set.

    Raises:
        DataError: A set has no rows to train on.
    """
    if not isinstance(task, Multitask) or not settings.data.sets:
        return None
    numbers = {name: number for number, name in enumerate(task.tasks)}
    sets = [numbers[set_of(example)] for example in examples]
    for name, number in numbers.items():
        if number not in sets:
            raise DataError(f"the set `{name}` has no training rows", where="data.train")
    temperature = settings.data.temperature
    return Sampler(
        sets,
        [each.weight for each in settings.data.sets],
        math.inf if temperature == "infinity" else float(temperature or 1),
        settings.training.seed,
    )


def set_of(example: Example) -> str:
    """Return the name of the data set that an example is from."""
    return str((example.row or {})[SET])


def drawn(trainer: Trainer) -> dict[str, Any] | None:
    """Return how often the rows of each data set were drawn in the steps so far.

    Returns:
        Of each set its ``rows``, the ``asked`` share and the share ``drawn``; None for a run of one data set.
    """
    sampler, task = trainer.batch_sampler.draw, trainer.task
    if sampler is None or not isinstance(task, Multitask):
        return None
    counted: Counter[str] = Counter()
    for step in range(trainer.state.step):
        counted.update(set_of(trainer.train[row]) for row in trainer.batch_sampler(step))
    return _drawn_shares(task.tasks, sampler, counted)


def _drawn_shares(names: Mapping[str, Any], sampler: Sampler, counted: Counter[str]) -> dict[str, Any]:
    total = sum(counted.values())
    return {
        name: {
            "rows": len(members),
            "asked": share,
            "rows_an_epoch": quota,
            "rows_drawn": counted[name],
            "drawn": counted[name] / total if total else None,
        }
        for name, members, share, quota in zip(names, sampler.members, sampler.shares, sampler.quotas, strict=True)
    }
