"""One score for each held-out row, by which two models are compared row by row."""

from __future__ import annotations

import numpy as np

from graftwerk.tasks.predictions import ClassPredictions, Predictions, ScorePredictions, TextPredictions


def row_scores(predictions: Predictions) -> list[float] | None:
    """Return a score of each row, higher is better, or None for answers that have none.

    Classes: 1 for the right one, else 0. Numbers: minus the distance from the target. Texts: minus the nats of a token.

    Example:
        >>> row_scores(ClassPredictions(None, np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([0, 1])))
        [1.0, 0.0]
    """
    if isinstance(predictions, ClassPredictions) and predictions.targets is not None:
        scores = (predictions.scores.argmax(axis=1) == predictions.targets).astype(float)
    elif isinstance(predictions, ScorePredictions) and predictions.targets is not None:
        scores = -np.abs(predictions.values - predictions.targets)
    elif isinstance(predictions, TextPredictions):
        scores = -predictions.nll / np.maximum(predictions.tokens, 1)
    else:
        return None
    return [float(f"{score:.4g}") for score in scores]
