"""The life of an adapter of each task with a head or vectors: trained, evaluated, asked, stored, merged, in PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwerk.config import RunConfig
from graftwerk.evaluation.error_rows import read_errors
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.evaluation.inference import run_model
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.evaluation.results_io import load_evaluation
from graftwerk.experiments.compare import compare
from graftwerk.modeling.attach import adapters
from graftwerk.reporting.html import write_report
from graftwerk.training.train import Run, train

Row = dict[str, Any]
LONG, RATE = 60, 0.01
HELD = {"validation": 40, "test": 40, "max_length": 48, "max_truncated": 1.0}


@dataclass(frozen=True)
class Life:
    """A task on glosses.

    Attributes:
        task: Value of `task` in the run file.
        row: Function from a gloss to a labelled row.
        answer: Keys of an answer.
        inputs: Columns that a row keeps for prediction.
    """

    task: Any
    row: Callable[[str], Row]
    answer: set[str]
    inputs: tuple[str, ...] = ("text",)


LIVES: dict[str, Life] = {
    "regression": Life("regression", lambda text: {"text": text, "score": 1000 + 3.5 * len(text)}, {"score"}),
    "multilabel": Life(
        {"name": "multilabel", "threshold": "label"},
        lambda text: {
            "text": text,
            "labels": [name for name, has in (("long", len(text) > LONG), ("of", " of " in text)) if has],
        },
        {"labels", "scores"},
    ),
    "token-classification": Life(
        "token-classification",
        lambda text: {
            "tokens": text.split(),
            "tags": ["B-LONG" if len(word) > 6 else "I-LONG" if word == "of" else "O" for word in text.split()],
        },
        {"tags", "entities"},
        ("tokens",),
    ),
    "similarity": Life(
        "similarity",
        lambda text: {"text": text, "text_pair": text[::-1], "score": len(text) / 10},
        {"similarity"},
        ("text", "text_pair"),
    ),
}


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", params=LIVES)
def lived(
    request: pytest.FixtureRequest,
    tiny_encoder: Path,
    gloss_texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Life, Run, list[Row]]:
    life, folder = LIVES[request.param], tmp_path_factory.mktemp(request.param)
    rows = [life.row(text) for text in gloss_texts]
    config = {
        "model": str(tiny_encoder), "task": life.task, "method": {"name": "lora", "r": 2},
        "data": {"train": write(folder / "rows.jsonl", rows), **HELD},
        "training": {"num_train_epochs": 1, "learning_rate": RATE}, "output_dir": str(folder / "run"),
    }  # fmt: skip
    return life, train(RunConfig.build(config)), rows


def test_evaluate_a_run_gives_its_own_metrics_and_keeps_predictions(lived: tuple[Life, Run, list[Row]]) -> None:
    _, run, _ = lived
    result = evaluate(run, store=True)
    assert result["metrics"] == run.manifest["metrics"]["test"]
    assert set(result["metrics"]) >= set(load_adapter_for(run).task.metrics[:1])
    found = load_evaluation(Path(run.folder), Path(run.folder) / "adapter")
    assert found is not None
    assert found[1].rows == result["rows"] == 40
    assert "What it gets wrong" in write_report(run.folder).read_text(encoding="utf-8")


def test_run_keeps_predictions_of_test_and_validation_rows(lived: tuple[Life, Run, list[Row]]) -> None:
    life, run, rows = lived
    for split in ("test", "validation"):
        found = read_errors(run.folder, split=split, everything=life.task == "token-classification")
        assert found["rows"] == 40
        assert found["error"]
        first = found["predictions"][0]
        assert first["where"].startswith(str(run.folder.parent / "rows.jsonl"))
        row = rows[int(first["where"].rpartition(":")[2]) - 1]
        texts = [row[name] for name in life.inputs]
        own = [first["text"].split()] if life.inputs == ("tokens",) else [first[name] for name in life.inputs]
        assert own == texts
        assert [each["error"] for each in found["predictions"]] == sorted(
            (each["error"] for each in found["predictions"]), reverse=True
        )
    assert set(run.manifest["chance"]) == {"test", "validation"}


def test_predict_rows_and_texts_gives_the_answers_of_the_task(
    lived: tuple[Life, Run, list[Row]], tmp_path: Path
) -> None:
    life, run, rows = lived
    given = [{name: row[name] for name in life.inputs} for row in rows[:5]]
    answers = predict(run, data=write(tmp_path / "rows.jsonl", given))["predictions"]
    assert len(answers) == 5
    assert all(life.answer <= set(answer) for answer in answers)
    alone = predict(run, data=write(tmp_path / "one.jsonl", given[2:3]))["predictions"][0]
    for name in life.answer:
        _assert_alike(alone[name], answers[2][name])
    evaluated = evaluate(run, data=write(tmp_path / "labelled.jsonl", rows[:20]))
    assert evaluated["rows"] == 20


def _assert_alike(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert set(one) == set(other)
        for name in one:
            _assert_alike(one[name], other[name])
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    else:
        assert one == other


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model answers, in the types that it has: no autocast."""
    with torch.inference_mode():
        outputs = model(**batch)
    answered: Tensor = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return answered


def test_merged_model_and_peft_answer_as_the_adapter_does(lived: tuple[Life, Run, list[Row]], tmp_path: Path) -> None:
    import peft

    life, run, rows = lived
    opened = load_adapter_for(run)
    examples = opened.encode([{name: row[name] for name in life.inputs} for row in rows[:8]])
    collated = opened.task.collator.collate(examples, opened.tokenizer)
    batch = {name: collated[name] for name in ("input_ids", "attention_mask")}
    ours = logits_of(opened.model, batch)
    if life.answer == {"score"}:  # plain transformers answers in the units of the rows
        predictions = run_model(opened.model, opened.task, examples, opened.tokenizer)
        np.testing.assert_allclose(ours[:, 0].numpy(), predictions.values, rtol=1e-6)  # type: ignore[attr-defined]
        assert 900 < float(ours.mean()) < 1500
    base = opened.task.auto_class().from_pretrained(
        run.manifest["model"], **opened.task.model_kwargs(opened.splits), ignore_mismatched_sizes=True
    )
    theirs = peft.PeftModel.from_pretrained(base, str(Path(run.folder) / "adapter")).eval()
    scale = ours.abs().max().item()
    torch.testing.assert_close(logits_of(theirs, batch), ours, atol=1e-5 * max(scale, 1.0), rtol=1e-5)
    (adapter,) = adapters(opened.model).values()
    adapter.merge()
    opened.model.save_pretrained(tmp_path / "merged")
    plain = opened.task.auto_class().from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(plain, batch), ours, atol=1e-5 * max(scale, 1.0), rtol=1e-5)
    assert plain.config.problem_type == opened.task.model_kwargs(opened.splits).get("problem_type")


@pytest.mark.parametrize(
    "lived",
    [pytest.param(name, marks=pytest.mark.slow if name != "multilabel" else ()) for name in LIVES],
    indirect=True,
)
def test_compare_two_methods_on_the_task_tells_their_difference(
    lived: tuple[Life, Run, list[Row]], tmp_path: Path
) -> None:
    life, run, _ = lived
    config = {
        "model": run.manifest["model"], "task": life.task, "method": "lora",
        "data": {"train": run.manifest["data"]["origin"]["train"], **HELD},
        "training": {"max_steps": 2, "learning_rate": RATE}, "output_dir": str(tmp_path / "compared"),
    }  # fmt: skip
    result = compare(config, methods=["lora", "bitfit"], seeds=[0]).result
    assert [method["failed"] for method in result["methods"]] == [{}, {}]
    assert result["differences"][0]["text"]
