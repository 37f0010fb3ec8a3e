"""Errors as text, for programs, and across processes."""

from __future__ import annotations

import pickle

import pytest

from graftwerk.errors import ConfigError, ErrorReport, RunInterrupted, did_you_mean


@pytest.mark.parametrize(
    "error",
    [ConfigError("wrong", where="method.r", hint="use 8"), RunInterrupted(15, "stopped", recovered="step 4")],
    ids=lambda error: type(error).__name__,
)
def test_error_pickled_keeps_its_parts(error: ErrorReport) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.as_dict() == error.as_dict()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [("learning_rat", "learning_rate"), ("rate_learning", "learning_rate"), ("lr", ""), ("ranking", "")],
)
def test_did_you_mean_names_a_misspelling_and_nothing_unlike(wrong: str, expected: str) -> None:
    said = did_you_mean(wrong, ["learning_rate", "epochs", "warmup"])
    assert said == (f"did you mean `{expected}`?" if expected else "")
