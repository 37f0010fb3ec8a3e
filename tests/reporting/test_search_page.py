"""The page of a search, from its result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftwerk.reporting.search import search_page
from graftwerk.reporting.search_charts import Setting
from tests.reporting.reading import Page


def result_of(metric: str, best: int | None, verdict: str | None, **changes: Any) -> dict[str, Any]:
    """A search over r of four trials that ended, the first the least by value, and one that was given up."""
    trials: list[dict[str, Any]] = [
        {"number": number, "state": "complete", "value": value, "settings": {"method.r": 2 + number}, "seconds": 3.0}
        for number, value in enumerate((0.61, 0.62, 0.63, 0.64))
    ]
    trials.append({"number": 4, "state": "pruned", "value": None, "settings": {"method.r": 9}, "seconds": 1.0})
    figure = {metric: {"value": 0.65, "low": 0.6, "high": 0.7}}
    default = {"settings": {"method.r": 8}, "metrics": figure}
    chosen = {"settings": {"method.r": 2}, "metrics": figure} if best is not None else default
    finalists = [{"name": f"trial-00{number}", "mean": 0.6, "validation": {}} for number in (0, 1)]
    return {
        "metric": metric, "status": "finished", "trials": trials, "finalists": finalists, "seeds": [1, 2, 3],
        "space": [{"key": "method.r", "low": 2, "high": 9, "log": False, "integer": True}],
        "best": {**chosen, "trial": best}, "default": default, "rows": 400, "split": "test",
        "difference": None if verdict is None else {"verdict": verdict}, "importance": {"method.r": 0.75}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(("metric", "best", "order"), [("rmse", 0, [0, 1, 2, 3, 4]), ("accuracy", 3, [3, 2, 1, 0, 4])])
def test_search_page_has_the_best_trial_first_and_darkest(
    tmp_path: Path, metric: str, best: int, order: list[int]
) -> None:
    page = Page(search_page(tmp_path, result_of(metric, best, "better")))
    rows = [row for row in page.all("tr") if "details" in row.inside and "tbody" in row.inside]
    assert [int(row.text.split()[0][0]) for row in rows] == order
    assert [row.attributes.get("class") == "recommended" for row in rows] == [True] + [False] * 4
    assert "given up early" in rows[-1].text
    lines = [path.attributes["class"] for path in page.all("path", "trial")]
    assert lines == ["line trial poor", "line trial poor", "line trial good", "line trial best"] * 2
    assert any("5 trials, of them 1 given up early" in part.text for part in page.all("p"))


@pytest.mark.parametrize(
    ("best", "verdict", "headline", "names"),
    [
        (0, "better", "The settings found beat the defaults", ["The settings found", "The defaults"]),
        (0, "no difference shown", "No difference shown from the defaults", ["The settings found", "The defaults"]),
        (None, "worse", "The defaults stand", ["The defaults"]),
        (None, None, "The defaults stand", ["The defaults"]),
    ],
)
def test_search_page_opens_with_the_verdict_and_measures_what_stands(
    tmp_path: Path, best: int | None, verdict: str | None, headline: str, names: list[str]
) -> None:
    page = Page(search_page(tmp_path, result_of("accuracy", best, verdict)))
    assert page.one("h1").text == headline
    tables = page.all("table")
    assert [name for name in ("The settings found", "The defaults") if name in tables[0].text] == names
    assert any("On 400 test rows that no trial has seen, mean of 3 fresh seeds." in part.text for part in page.all("p"))


def test_setting_places_choices_in_the_middle_of_their_parts_and_ranges_to_scale() -> None:
    choices = Setting.of({"key": "method.r", "choices": [4, 8]})
    assert choices is not None
    assert choices.places(0, 100) == [(25.0, "4"), (75.0, "8")]
    assert [choices.place(value, 0, 100) for value in (8, 5)] == [75.0, None]
    rate = Setting.of({"key": "training.learning_rate", "low": 1e-4, "high": 1e-2, "log": True})
    assert rate is not None
    assert [rate.place(value, 0, 100) for value in (1e-3, 1e-4, 0.5)] == [pytest.approx(50.0), 0.0, None]
    assert Setting.of({"key": "method.r", "low": 2, "high": 2}) is None
