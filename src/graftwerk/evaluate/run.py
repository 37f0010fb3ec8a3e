"""Evaluation and prediction with what training left on disk."""

from __future__ import annotations

from graftwerk.evaluate.forward import run_model as run_model
