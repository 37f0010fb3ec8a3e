"""Errors as text, for programs, and across processes."""

from __future__ import annotations

import pickle

import pytest

from graftwerk.errors import ConfigError, ErrorReport, RunInterrupted


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
