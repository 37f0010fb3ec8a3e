"""Name -> task: the only list of tasks there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.settings import parse_settings
from graftwerk.tasks.base import Task
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.instruction import Instruction
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.mixture import Mixture
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, Summarization, Translation, Instruction, Causal, Masked, Mixture)
}


def parse_task(value: Any) -> Task:
    """`translation`, `{name: translation, source_lang: de_DE}`, or a task already built.

    Raises:
        ConfigError: there is no such task or setting; the nearest is named.
    """
    if isinstance(value, Task):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"a task is a name or a mapping with `name`, not {value!r:.80}", where="task")
    values = dict(value)
    name = str(values.pop("name"))
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ConfigError(f"there is no task `{name}`", where="task", mend=f"{hint}There are: {', '.join(TASKS)}")
    return parse_settings(TASKS[name], values, what=f"task `{name}`", where="task")
