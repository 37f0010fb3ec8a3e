"""docs/performance.md is what the committed results give."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import page
from benchmarks.harness import RESULTS, ROOT

ROW: dict[str, Any] = {
    "goal": "P2", "what": "MiniLM 16x32", "ours": 0.101, "peer": 0.1, "unit": "s/step", "ratio": 1.01,
    "target": "at most 1.05", "reached": True, "worst": {"ours": 0.12, "peer": 0.11}, "note": "", "date": "2026-01-01",
    "settings": {"peer": "the frozen model"}, "commit": "abc",
}  # fmt: skip
MACHINE = {"cpu": "A", "cores": 2, "threads": 2, "torch": "2.0"}


def put(folder: Path, *rows: dict[str, Any], goal: str = "P2") -> None:
    (folder / f"{goal}.json").write_text(json.dumps({"goal": goal, "machine": MACHINE, "rows": rows}))


def test_page_is_up_to_date_with_committed_results() -> None:
    found = page.results()
    assert {result["goal"] for result in found} == {file.stem for file in RESULTS.glob("*.json")}
    assert page.stale(page.pages(found)) == [], "make bench-page"


def test_committed_results_are_complete() -> None:
    for result in page.results():
        names = [row["what"] for row in result["rows"]]
        assert len(set(names)) == len(names)
        for row in result["rows"]:
            assert row["goal"] == result["goal"]
            assert set(ROW) <= set(row)
            assert isinstance(row["reached"], bool)
            assert row["ours"] > 0


def test_stale_changed_value_is_detected(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    (docs / "performance").mkdir(parents=True)
    put(results, ROW)
    made = page.pages(page.results(results))
    for name, text in made.items():
        (docs / name).write_text(text)
    assert page.stale(page.pages(page.results(results)), docs) == []
    put(results, {**ROW, "ours": 0.2, "ratio": 2.0, "reached": False})
    assert page.stale(page.pages(page.results(results)), docs) == ["performance.md", "performance/P2.svg"]
    put(results, ROW)
    (docs / "performance" / "P9.svg").write_text("")
    assert page.stale(page.pages(page.results(results)), docs) == ["performance/P9.svg"]


def test_pages_sort_goals_and_list_misses(tmp_path: Path) -> None:
    put(tmp_path, {**ROW, "goal": "P10", "peer": None, "ratio": None, "note": "not run whole"}, goal="P10")
    put(tmp_path, {**ROW, "reached": False}, {**ROW, "what": "a | b"})
    made = page.pages(page.results(tmp_path))
    text = made["performance.md"]
    assert re.findall(r"^## (P\d+)", text, re.MULTILINE) == ["P2", "P10"]
    assert "| P2 | MiniLM 16x32 | 0.101 (0.120) s/step | 0.100 (0.110) s/step | 1.01 | at most 1.05 | **no** |" in text
    assert "a \\| b" in text
    assert "not run whole" in text
    assert "the frozen model" in text
    assert set(made) == {"performance.md", "performance/P2.svg"}
    assert text.count("| goal |") == 1, "one table for all goals"
    assert "Measured on A, 2 cores, 2 threads; torch 2.0: P2, P10." in text
    assert "## Missed" in text
    assert [line for line in text.splitlines() if "1 of 2" in line] == [
        "- P2, 1 of 2: MiniLM 16x32 1.01 (at most 1.05)."
    ]


def test_pages_without_miss_states_it(tmp_path: Path) -> None:
    put(tmp_path, ROW)
    text = page.pages(page.results(tmp_path))["performance.md"]
    assert "## Missed" not in text
    assert "Every goal that was measured is reached." in text
    assert "Not measured yet, though there is a benchmark: P1 (time to the same held-out score); P3" in text


@pytest.mark.parametrize("content", ['{"goal": "P3", "machine": {"cpu": "A"}, "rows": [1]}', '{"goal": "P2"}', "{"])
def test_results_invalid_file_raises(content: str, tmp_path: Path) -> None:
    (tmp_path / "P2.json").write_text(content)
    with pytest.raises((ValueError, AttributeError)):
        page.results(tmp_path)


@pytest.mark.parametrize("ratios", [[1.0], [0.5, 1.2], [0.3, 4.8, 240.0]], ids=["one", "near", "a wide span"])
def test_bars_are_proportional_to_ratios(ratios: list[float]) -> None:
    tree = ElementTree.fromstring(page.bars([(f"case <{at}>", ratio, ratio < 1) for at, ratio in enumerate(ratios)]))
    rectangles = [each for each in tree.iter() if each.tag.endswith("rect")][1:]
    widths = [float(each.attrib["width"]) for each in rectangles]
    assert len(widths) == len(ratios)
    if max(ratios) / min(ratios) < 20:
        assert [w / widths[0] for w in widths] == pytest.approx([r / ratios[0] for r in ratios], rel=0.01)
    else:
        begins = [float(each.attrib["x"]) for each in rectangles]
        assert begins[0] + widths[0] == pytest.approx(
            begins[1], abs=0.2
        )  # below 1 to the left of it, above to the right
        assert widths[1] < widths[2]
    texts = [each.text for each in tree.iter() if each.tag.endswith("text")]
    assert "case <0>" in texts


def test_makefile_has_target_for_every_benchmark() -> None:
    files = sorted(file.stem for file in (ROOT / "benchmarks").glob("p[0-9]*_*.py"))
    assert files
    for file in files:
        goal = file.split("_")[0]
        said = subprocess.run(["make", "-n", f"bench-{goal}"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"benchmarks/{file}.py" in said.stdout
        assert f"benchmarks/{file}.py" in subprocess.run(
            ["make", "-n", "bench-quick"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
