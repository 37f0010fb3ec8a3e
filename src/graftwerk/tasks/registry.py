"""The list of tasks by name, and building them from a run file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from graftwerk.data.settings import SetSettings
from graftwerk.settings_parsing import parse_choice, parse_settings
from graftwerk.tasks.base import Task
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.instruction import Instruction
from graftwerk.tasks.masked import Masked
from graftwerk.tasks.multilabel import Multilabel
from graftwerk.tasks.multitask import Multitask, names_of
from graftwerk.tasks.regression import Regression
from graftwerk.tasks.similarity import Similarity
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.token_classification import TokenClassification
from graftwerk.tasks.translation import Translation

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        task.name: task
        for task in (
            Classification,
            Regression,
            Multilabel,
            TokenClassification,
            Similarity,
            Summarization,
            Translation,
            Instruction,
            Causal,
            Masked,
            Multitask,
        )
    }
)
OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("sentiment", "text-classification", "sequence-classification", "nli", "pairs", "multiclass",
                         "text-pair-classification", "paraphrase"), "classification"),
        **dict.fromkeys(("score", "scores", "rating", "ratings", "regressor"), "regression"),
        **dict.fromkeys(("multi-label", "multi_label", "tags", "multilabel-classification",
                         "multi-label-classification", "multi_label_classification"), "multilabel"),
        **dict.fromkeys(("chat", "sft", "instruct", "instructions", "conversation"), "instruction"),
        **dict.fromkeys(("causal-lm", "clm", "language-modeling", "text-generation", "pretraining"), "causal"),
        **dict.fromkeys(("mlm", "masked-lm", "fill-mask"), "masked"),
        **dict.fromkeys(("summary", "summarisation"), "summarization"),
        **dict.fromkeys(("mt", "translate"), "translation"),
        **dict.fromkeys(("ner", "tagging", "tagger", "pos", "named-entity-recognition", "token_classification",
                         "spans", "chunking", "conll", "iob", "bio"), "token-classification"),
        **dict.fromkeys(("embedding", "embeddings", "sts", "retrieval", "sentence-similarity", "contrastive", "triplet",
                         "semantic-search", "feature-extraction"), "similarity"),
        "multitask": "mixture",
    }
)  # fmt: skip
"""Names of these tasks elsewhere, each with ours: only messages use it."""


def parse_task(value: Any) -> Task:
    """Build a task from a value of a run file.

    Args:
        value: A name (``translation``), settings with ``name`` (``{name: translation, source_lang: de_DE}``), or a task
            that is built already. In the settings of `Multitask`, each of ``tasks`` is such a value.

    Returns:
        The task.

    Raises:
        ConfigError: An unknown task or setting; the nearest name is suggested.
    """
    if isinstance(value, Mapping) and value.get("name") == Multitask.name and isinstance(value.get("tasks"), Mapping):
        value = {**value, "tasks": {str(name): parse_task(each) for name, each in value["tasks"].items()}}
    return parse_choice(value, Task, TASKS, what="a task", where="task", also_called=OTHER_NAMES)


def build_multitask(task: Task, sets: Sequence[SetSettings]) -> Multitask:
    """Build the task of a run with several data sets: each learns the run's task or its own, with its own settings.

    Args:
        task: The run's task, for data sets that name none.
        sets: The settings of the data sets, in order.

    Returns:
        The tasks by the names of their data sets.

    Raises:
        ConfigError: An unknown task or setting, or tasks that cannot be learnt together.
    """
    tasks: dict[str, Any] = {}
    for name, each in zip(names_of(sets), sets, strict=True):
        own = parse_task(each.task) if each.task is not None else task
        given = {
            key: value for key in ("prefix", "source_lang", "target_lang") if (value := getattr(each, key)) is not None
        }
        values = {**{key: getattr(own, key) for key in own.model_fields_set}, **given}
        tasks[name] = parse_settings(type(own), values, what=f"task `{own.name}`", where=f"data.train ({name})")
    return parse_settings(Multitask, {"tasks": tasks}, what="task `mixture`", where="data.train")
