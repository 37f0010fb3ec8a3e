"""Similarity: pairs with scores, anchors with positives, the losses of sentence-transformers, ranks among all texts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from graftwerk.config import RunConfig
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, DataError, UnsupportedError
from graftwerk.evaluation.evaluate import evaluate, predict
from graftwerk.evaluation.metrics import METRICS, metrics_of
from graftwerk.models.load import load_config, load_model, load_tokenizer
from graftwerk.tasks.base import Splits
from graftwerk.tasks.similarity import Similarity, SimilarityObjective, vectors_of
from graftwerk.tasks.vector_predictions import SimilarityPredictions
from graftwerk.training.train import train

TASK = Similarity()
NOWHERE = Splits((), (), (), None, "")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def outputs_of(vectors: torch.Tensor) -> Any:
    """What a model would answer for texts of one token each."""
    return SimpleNamespace(last_hidden_state=vectors[:, None])


def batch_of(vectors: torch.Tensor, rows: int, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.arange(len(vectors))[:, None]
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "rows": torch.tensor(rows), "labels": labels}


# reading


def test_read_kinds_of_rows_are_told_by_their_columns(tmp_path: Path) -> None:
    scored = [{"text": f"a {at}", "text_pair": f"b {at}", "score": at / 4} for at in range(8)]
    anchored = [
        {"anchor": f"a {at}", "positive": f"b {at}", "negative": [f"c {at}", "d"] if at else None} for at in range(8)
    ]
    splits = TASK.read(DataSettings(train=write(tmp_path / "s.jsonl", scored), test=2))
    task = TASK.resolved(splits)
    assert (task.rows, task.main_metric, task.best_metric) == ("scores", "spearman", "spearman")
    splits = TASK.read(DataSettings(train=write(tmp_path / "a.jsonl", anchored), validation=None))
    task = TASK.resolved(splits)
    assert (task.rows, task.main_metric, task.best_metric) == ("anchors", "recall_at_10", "recall_at_10")
    assert [row["negative"] for row in splits.train][:2] == [[], ["c 1", "d"]]
    with pytest.raises(DataError, match=r"are anchors and held-out rows scores"):
        TASK.read(DataSettings(train=str(tmp_path / "a.jsonl"), validation=None, test=str(tmp_path / "s.jsonl")))
    alike = [{**row, "score": 1} for row in scored]
    with pytest.raises(DataError, match=r"have the score 1.0; there is nothing to learn"):
        TASK.read(DataSettings(train=write(tmp_path / "one.jsonl", alike), validation=None))
    with pytest.raises(ConfigError, match="no column `positive`"):
        TASK.read(DataSettings(train=write(tmp_path / "no.jsonl", [{"anchor": "a"}]), validation=None))


def test_for_model_encoder_decoder_raises(text_model: Any) -> None:
    with pytest.raises(UnsupportedError, match="similarity needs an encoder or a decoder"):
        TASK.for_model(load_config(str(text_model("bart"))))


# losses


def test_vectors_of_padded_rows_are_the_means_of_their_tokens(tiny_encoder: Path, gloss_texts: list[str]) -> None:
    tokenizer, model = load_tokenizer(str(tiny_encoder)), load_model(str(tiny_encoder), TASK, NOWHERE)
    rows = [{"text": text} for text in gloss_texts[:6]]
    examples = TASK.encode(rows, tokenizer, NOWHERE, 48)
    batch = TASK.collator.collate(examples, tokenizer)
    with torch.inference_mode():
        together = vectors_of(TASK.objective.forward(model, batch), batch)
        for example, vector in zip(examples, together, strict=True):
            hidden = model(input_ids=torch.tensor([example.inputs["input_ids"]])).last_hidden_state[0]
            torch.testing.assert_close(
                vector, torch.nn.functional.normalize(hidden.mean(0), dim=0), atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("negatives", [0, 3])
def test_loss_of_anchors_equals_multiple_negatives_ranking(negatives: int) -> None:
    vectors = unit(2 * 5 + negatives, 8)
    loss = SimilarityObjective().loss(outputs_of(vectors), batch_of(vectors, 5, torch.zeros(5, dtype=torch.long)))
    scores = 20 * vectors[:5] @ vectors[5:].T
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.arange(5)))


def test_loss_of_anchors_does_not_count_the_same_text_as_wrong() -> None:
    vectors = unit(8, 6)
    vectors[5] = vectors[4]
    batch = batch_of(vectors, 4, torch.zeros(4, dtype=torch.long))
    batch["input_ids"][5] = batch["input_ids"][4]
    scores = 20 * vectors[:4] @ vectors[4:].T
    scores[0, 1] = scores[1, 0] = float("-inf")
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    torch.testing.assert_close(SimilarityObjective().loss(outputs_of(vectors), batch), expected)


def test_loss_of_scores_is_cosent_and_zero_where_all_are_in_order() -> None:
    vectors, scores = unit(12, 8), torch.tensor([0.1, 0.5, 0.5, 3.0, -1.0, 2.0], dtype=torch.float64)
    loss = SimilarityObjective(scale=7.0).loss(outputs_of(vectors), batch_of(vectors, 6, scores))
    cosines = (vectors[:6] * vectors[6:]).sum(-1)
    total = sum(torch.exp(7.0 * (cosines[i] - cosines[j])) for i in range(6) for j in range(6) if scores[i] < scores[j])
    torch.testing.assert_close(loss, torch.log1p(torch.as_tensor(total)))
    alone = SimilarityObjective().loss(outputs_of(vectors[:2]), batch_of(vectors[:2], 1, scores[:1]))
    assert float(alone) == 0


@pytest.mark.slow
def test_losses_equal_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    vectors, scores = unit(12, 8), torch.tensor([0.1, 0.5, 0.5, 3.0, -1.0, 2.0], dtype=torch.float64)
    halves = [vectors[:6], vectors[6:]]
    own = SimilarityObjective()
    theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity()).compute_loss_from_embeddings(halves, None)
    torch.testing.assert_close(own.loss(outputs_of(vectors), batch_of(vectors, 6, torch.zeros(6).long())), theirs)
    theirs = losses.CoSENTLoss(torch.nn.Identity()).compute_loss_from_embeddings(halves, scores)
    torch.testing.assert_close(own.loss(outputs_of(vectors), batch_of(vectors, 6, scores)), theirs.float())


# predictions


def test_ranks_count_nearer_texts_and_not_equal_ones() -> None:
    vectors = unit(40, 6).numpy()
    anchors, others = vectors[:20], vectors[20:].copy()
    others[3] = others[7]
    found = SimilarityPredictions(None, anchors, others, None)
    cosines = anchors.astype(float) @ others.T.astype(float)
    ranks = [1 + sum(cosines[at, other] > cosines[at, at] + 1e-9 for other in range(20)) for at in range(20)]
    assert found.ranks.tolist() == ranks
    figures = metrics_of(found, resamples=100)
    assert set(figures) == {"recall_at_1", "recall_at_10", "reciprocal_rank"}
    assert figures["recall_at_10"]["value"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]))
    assert figures["reciprocal_rank"]["value"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    weights = np.eye(20)[[3, 5]] * 20
    drawn = METRICS["recall_at_1"].statistic(found)(weights)
    assert drawn.tolist() == [float(ranks[3] <= 1), float(ranks[5] <= 1)]
    scored = SimilarityPredictions(None, anchors, others, np.arange(20.0))
    assert set(metrics_of(scored, resamples=100)) >= {"spearman", "pearson"}
    with pytest.raises(DataError, match="no labels"):
        metrics_of(SimilarityPredictions(None, anchors, None, None))


def test_train_anchors_brings_texts_together_and_the_base_is_measured_beside(
    tiny_encoder: Path, gloss_texts: list[str], tmp_path: Path
) -> None:
    rows = [
        {"anchor": text[: len(text) // 2], "positive": text[len(text) // 2 :], "negative": gloss_texts[at - 1][:30]}
        for at, text in enumerate(gloss_texts)
    ]
    config = {
        "model": str(tiny_encoder), "task": "similarity", "method": {"name": "lora", "r": 4},
        "data": {"train": write(tmp_path / "rows.jsonl", rows), "test": 40, "validation": 20, "max_length": 32},
        "training": {"num_train_epochs": 2, "learning_rate": 0.01}, "evaluation": {"baseline": True},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    run = train(RunConfig.build(config))
    assert run.manifest["best"]["metric"] == "recall_at_10"
    assert set(run.manifest["baseline"]["test"]) == {"recall_at_10", "recall_at_1", "reciprocal_rank"}
    assert evaluate(run)["metrics"] == run.manifest["metrics"]["test"]
    vector, other = (answer["embedding"] for answer in predict(run, ["a plant", "to move"])["predictions"])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)
    (pair,) = predict(run, ["a plant\tto move"])["predictions"]
    assert pair["similarity"] == pytest.approx(float(np.dot(vector, other)), abs=1e-3)
    asked = write(tmp_path / "asked.jsonl", [{"anchor": "a plant", "positive": "to move"}])
    (answer,) = predict(run, data=asked)["predictions"]
    assert answer == {
        "similarity": pytest.approx(pair["similarity"], abs=1e-3),
        "anchor": "a plant",
        "positive": "to move",
    }
    with pytest.raises(DataError, match="some rows are pairs of texts and others are single"):
        predict(run, ["a plant", "a\tb"])
