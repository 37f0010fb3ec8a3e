"""docs/tasks.md: a section for each task, with every setting and figure it has, and a run file that can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from graftwerk.config import RunConfig
from graftwerk.evaluation.metrics import METRICS
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.tasks.registry import TASKS

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
SECTIONS = {
    part.partition("\n")[0].strip(): part for part in re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.M)
}


def test_tasks_page_has_section_for_every_task() -> None:
    assert [name for name in SECTIONS if name in TASKS] == list(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_page_section_names_settings_fields_and_metrics(name: str) -> None:
    section, task = SECTIONS[name], TASKS[name]
    for setting in task.model_fields:
        assert f"`{setting}`" in section, setting
    if name != "mixture":
        for part in task.fields:
            assert f"`{part}`" in section or part == "turns", part
        for metric in task.metrics:
            assert METRICS[metric].title in section, metric
        decides = METRICS[task.metrics[0]].title
        assert len(task.metrics) == 1 or re.search(rf"{decides} \(decides\)", section), decides
    (example,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    config = RunConfig.build(yaml.safe_load(example))
    assert config.task.name == name


def test_tasks_page_lists_generation_settings() -> None:
    beginning = next(iter(SECTIONS.values()))
    quiet = {"confidence", "resamples", "latency_batches", "generation_batch_size"}
    for setting in set(EvaluationSettings.model_fields) - quiet:
        assert f"`{setting}`" in beginning, setting
