"""Several data sets, one model: what each row is told, how often each set is drawn, what is measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, DataError
from graftwerk.evaluation.metrics import metrics_by_set, metrics_of, point
from graftwerk.tasks.multitask import Multitask, _settings_of
from graftwerk.tasks.predictions import TextPredictions
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.translation import Translation
from tests.tiny_text import GNOME, rows_of

DE = {"source": str(GNOME["de"]), "source_lang": "de_DE", "target_lang": "en_XX", "name": "de-en"}
FR = {"source": str(GNOME["fr"]), "source_lang": "fr_XX", "target_lang": "en_XX", "name": "fr-en"}
BACK = {**DE, "columns": {"source": "target", "target": "source"}, "name": "en-de"}
BACK |= {"source_lang": "en_XX", "target_lang": "de_DE"}


@pytest.fixture(scope="session")
def mbart(text_model: Callable[[str], Path]) -> Path:
    return text_model("mbart")


def config(sets: list[dict[str, Any]], **data: Any) -> RunConfig:
    tree = {"model": "m", "task": "translation", "method": "lora", "data": {"train": sets, **data}}
    return RunConfig.model_validate(tree)


def test_multitask_settings_of_sets_roundtrip() -> None:
    run = config([DE, {**FR, "task": {"name": "summarization"}, "source_lang": None, "target_lang": None}])
    assert isinstance(run.task, Multitask)
    assert run.task.tasks["de-en"] == Translation(source_lang="de_DE", target_lang="en_XX")
    assert run.task.tasks["fr-en"].name == "summarization"
    again = RunConfig.model_validate(json.loads(json.dumps(run.model_dump(mode="json"))))
    assert again == run
    assert parse_task(run.task.to_dict()) == run.task


def test_multitask_sets_share_a_number_of_held_out_rows_and_keep_a_share() -> None:
    data = config([DE, FR, {**BACK, "test": 7}], validation=10, test=0.25).data
    held_out = [_settings_of(each, data, 3) for each in data.sets]
    assert [(each.validation, each.test) for each in held_out] == [(3, 0.25), (3, 0.25), (3, 7)]
    assert _settings_of(data.sets[0], config([DE, FR], validation=1).data, 2).validation == 1


def test_multitask_incompatible_sets_raise() -> None:
    with pytest.raises(ConfigError, match="no task in which a model writes text"):
        config([DE, {"source": "a.csv", "task": "classification"}])
    with pytest.raises(ConfigError, match="source_lang"):
        config([{**DE, "task": "causal"}])
    with pytest.raises(ConfigError, match="two sets are called `de-en`"):
        config([DE, DE])


def read(run: RunConfig) -> Any:
    return run.task.read(run.data)


def test_multitask_read_tags_rows_and_avoids_leakage() -> None:
    run = config([DE, BACK, {**FR, "max_rows": 5, "validation": 3, "test": None}], validation=0.2, test=4)
    splits = read(run)
    held = {
        frozenset((row["source"], row["target"])) for split in ("validation", "test") for row in getattr(splits, split)
    }
    assert not any(frozenset((row["source"], row["target"])) in held for row in splits.train)
    counted = Counter(row["set"] for row in splits.train)
    assert counted["fr-en"] == 5
    assert min(counted["de-en"], counted["en-de"]) > 5
    assert Counter(row["set"] for row in splits.validation)["fr-en"] == 3
    said = [finding for finding in splits.issues if finding.code == "held-out-elsewhere"]
    assert {finding.message.split(":")[0] for finding in said} == {"de-en", "en-de"}
    at = next(at for at, row in enumerate(splits.validation) if row["set"] == "fr-en")
    line = int(splits.where["validation"](at).removeprefix(f"{GNOME['fr']}:"))
    assert rows_of(GNOME["fr"])[line - 1]["source"] == splits.validation[at]["source"]


def test_multitask_read_single_set_setting_raises() -> None:
    with pytest.raises(ConfigError, match="max_train_rows"):
        read(config([DE, FR], max_train_rows=3))
    with pytest.raises(ConfigError, match="which set's rows"):
        read(config([DE, FR], validation="a.jsonl"))


def test_multitask_encode_equals_task_of_each_set(mbart: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    architecture, tokenizer = AutoConfig.from_pretrained(mbart), AutoTokenizer.from_pretrained(mbart)
    run = config([DE, FR, BACK], validation=None)
    splits = read(run)
    task = run.task.for_model(architecture).resolved(splits)
    of_set = {name: [row for row in splits.train if row["set"] == name] for name in run.task.tasks}
    rows = [of_set[name][at] for name, at in (("de-en", 0), ("en-de", 2), ("fr-en", 1), ("de-en", 1))]
    for row, example in zip(rows, task.encode(rows, tokenizer, splits, 64), strict=True):
        alone = run.task.tasks[row["set"]].for_model(architecture).encode([row], tokenizer, splits, 64)[0]
        assert (example.inputs, example.target) == (alone.inputs, alone.target)
        assert example.row is not None
        assert example.row["set"] == row["set"]
    with pytest.raises(DataError, match="of the set `x`"):
        task.encode([{**rows[0], "set": "x"}], tokenizer, splits, 64)


def test_multitask_metrics_average_over_sets() -> None:
    found = TextPredictions(
        None,
        np.ones(4),
        np.ones(4, dtype=np.int64),
        texts=("a", "b", "c", "x"),
        references=("a", "b", "c", "d"),
        sources=("", "", "", ""),
        sets=("large", "large", "large", "small"),
    )
    assert point("exact_match", found) == 0.5  # not 0.75: a small set counts as much
    figures = metrics_of(found, names=("exact_match",))["exact_match"]
    assert figures["value"] == 0.5
    each = metrics_by_set(found, names=("exact_match",))
    assert {name: figure["exact_match"]["value"] for name, figure in each.items()} == {"large": 1.0, "small": 0.0}


# a whole run


def test_multitask_run_matches_shares_and_resumes_bit_exact(
    mbart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from graftwerk.cli.output import Output
    from graftwerk.cli.train import show_run
    from graftwerk.reporting.html import write_report
    from graftwerk.training.train import train

    tree: dict[str, Any] = {
        "model": str(mbart),
        "task": "translation",
        "data": {
            "train": [{**DE, "max_rows": 24}, {**FR, "max_rows": 8, "weight": 2}],
            "temperature": "infinity",
            "validation": 4,
            "max_length": 48,
            "max_truncated": 1,
        },
        "method": {"name": "lora", "r": 2},
        "training": {"max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 3, "report_to": ["jsonl"]},
        "evaluation": {"generate": False},
        "output_dir": str(tmp_path / "whole"),
    }
    run = train(tree)
    shares = run.manifest["data"]["sets"]
    assert [shares[name]["asked"] for name in ("de-en", "fr-en")] == pytest.approx([1 / 3, 2 / 3])
    assert [shares[name]["rows_drawn"] for name in ("de-en", "fr-en")] == [11, 21]  # one epoch of 32 rows
    assert set(run.manifest["metrics_by_set"]["validation"]) == {"de-en", "fr-en"}
    page = write_report(run.folder).read_text("utf-8")
    assert "Each data set" in page
    assert all(f'<th scope="row">{name}</th>' in page for name in ("de-en", "fr-en"))
    show_run(Output(as_json=False), run.manifest)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows if row} >= {"set", "de-en", "fr-en"}

    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        if event.kind == "checkpoint" and event.step == 3:
            raise StopError

    halves = {**tree, "output_dir": str(tmp_path / "halves")}
    with pytest.raises(StopError):
        train(halves, listener=stop)
    resumed = train(halves, resume=True)
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (run.adapter / name).read_bytes()
    assert resumed.manifest["data"]["sets"] == shares
