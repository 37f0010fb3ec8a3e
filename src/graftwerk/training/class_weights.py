"""`training.class_weights`: the weight of a row of each class in the training loss.

Balanced weights are rows / (classes x rows of the class), so that they are 1 on average over the rows (King and Zeng
2001, as scikit-learn has it). Evaluation does not use them: its loss stays comparable between runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.classification import Classification
from graftwerk.training.settings import TrainingSettings
from graftwerk.training.stream import EncodedStream

WHERE = "training.class_weights"


def check_class_weights(settings: TrainingSettings, task: Task) -> None:
    """Raise for class weights of a task without classes.

    Raises:
        ConfigError: The task has no classes.
    """
    if settings.class_weights is not None and not isinstance(task, Classification):
        raise ConfigError(f"{task.name} has no classes that could be weighted", where=WHERE, hint="leave it out")


def weighted_task(settings: TrainingSettings, task: Task, labels: Sequence[str], examples: Sequence[Example]) -> Task:
    """Return the task with the class weights of the settings; without any, the task itself.

    Args:
        settings: Training settings.
        task: Task of the run.
        labels: Class names, in the order of their ids.
        examples: Encoded training rows, which `balanced` counts.

    Raises:
        ConfigError: A name belongs to no class, or the task has no classes.
    """
    check_class_weights(settings, task)
    given = settings.class_weights
    if given is None or not isinstance(task, Classification):
        return task
    if isinstance(given, Mapping):
        return task.weighted(_named(given, labels))
    counts = (
        examples.classes if isinstance(examples, EncodedStream) else Counter(example.target for example in examples)
    )
    total = sum(counts.values())
    # a class that no training row has is never looked up, and counts as if it had one
    return task.weighted([total / (len(labels) * max(1, counts.get(at, 0))) for at in range(len(labels))])


def _named(given: Mapping[str, float], labels: Sequence[str]) -> list[float]:
    for name in given:
        if name not in labels:
            raise ConfigError(
                f"there is no class `{name}`",
                where=f"{WHERE}.{name}",
                hint=did_you_mean(name, labels, f"The classes are: {', '.join(labels)}"),
            )
    return [given.get(name, 1.0) for name in labels]
