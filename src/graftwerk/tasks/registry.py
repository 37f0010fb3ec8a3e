"""Name -> task: the only list of tasks there is."""

from __future__ import annotations

from typing import Any

from graftwerk.settings import parse_choice
from graftwerk.tasks.base import Task
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.instruction import Instruction
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.multitask import Multitask
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.translation import Translation

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, Summarization, Translation, Instruction, Causal, Masked, Multitask)
}


def parse_task(value: Any) -> Task:
    """`translation`, `{name: translation, source_lang: de_DE}`, or a task already built.

    Raises:
        ConfigError: there is no such task or setting; the nearest is named.
    """
    return parse_choice(value, Task, TASKS, what="a task", where="task")
