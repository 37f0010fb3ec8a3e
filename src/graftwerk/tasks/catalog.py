"""Name -> task: the only list of tasks there is."""

from __future__ import annotations

from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.tasks.base import Task
from graftwerk.tasks.classification import Classification

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification,)}


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ConfigError(f"there is no task `{name}`", where="task", mend=f"{hint}There are: {', '.join(TASKS)}")
    return TASKS[name]()
