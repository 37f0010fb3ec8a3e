"""The pictures of an explanation: what is drawn, what is read with the keyboard, and the numbers beneath."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from graftwerk.errors import ConflictError
from graftwerk.reporting.explanation import explanation_sections, plain_names
from graftwerk.reporting.html import write_explanation, write_report
from graftwerk.reporting.matrix_charts import SIZES, Panel, heat_map, row_bars, shortened
from tests.reporting import examples
from tests.reporting.reading import Page

HEADINGS = ["Which words decide", "Where it looks", "What was learnt in each layer"]


def read(folder: Path, **changes: object) -> Page:
    known = {**examples.explanation(), **changes}
    return Page(write_explanation(folder / "page.html", known, "films", overwrite=True).read_text(encoding="utf-8"))


def test_report_shows_an_explanation_that_the_run_has(tmp_path: Path) -> None:
    page = Page(write_report(examples.write_run(tmp_path / "run", explanation_=examples.explanation())).read_text())
    assert [one.text for one in page.all("h2") if one.text in HEADINGS] == HEADINGS
    bare = Page(write_report(examples.write_run(tmp_path / "bare")).read_text())
    assert not [one for one in bare.all("h2") if one.text in HEADINGS]


def test_every_picture_has_two_widths_a_title_and_numbers_for_the_keyboard(tmp_path: Path) -> None:
    page = read(tmp_path)
    pictures = page.all("svg")
    assert [one.text for one in page.all("h2")] == HEADINGS
    widths = [one.attributes["width"] for one in pictures]
    assert widths.count("760") == widths.count("350") == len(pictures) / 2 == 2 + 1 + 2 * 3 + 3
    for picture in pictures:
        assert picture.attributes["tabindex"] == "0"
        assert picture.attributes["role"] == "img"
        track = json.loads(picture.attributes["data-track"] or "")
        width, height = (float(picture.attributes[side] or 0) for side in ("width", "height"))
        assert track
        assert all(0 <= x <= width and 0 <= y <= height for x, y, _ in track)
    inside = [one for one in page.elements if one.name in ("title", "desc") and "svg" in one.inside]
    assert len(inside) == 2 * len(pictures)
    assert all(one.text for one in inside)
    assert len(page.all("table")) == 2 + 1 + 3 + 1
    text = page.one("main").text
    for words in ("<b>quiet</b>", "50.0\N{NARROW NO-BREAK SPACE}%", "eager kernel", "2.0\N{MULTIPLICATION SIGN}"):
        assert words in text


def test_adapter_and_base_stand_side_by_side_on_one_scale(tmp_path: Path) -> None:
    page = read(tmp_path, attention=[], layers=[])
    both, alone = (one for one in page.all("svg") if one.attributes["width"] == "760")
    track = json.loads(both.attributes["data-track"] or "")
    assert track[3][2] == "pleasure\nadapter\t+1.2\nbase\t−0.6"
    assert json.loads(alone.attributes["data-track"] or "")[3][2] == "pleasure\nadapter\t+1.2"
    bars = [one for one in page.all("rect") if (one.attributes["class"] or "").startswith("bar-")]
    widths = {
        kind: [float(one.attributes["width"] or 0) for one in bars[:10] if one.attributes["class"] == f"bar-{kind}"]
        for kind in ("adapter", "base")
    }
    for mine, its in zip(widths["adapter"][1:4], widths["base"][1:4], strict=True):
        assert its == pytest.approx(mine / 2, abs=0.2)


def test_virtual_columns_stand_apart_in_their_own_colour(tmp_path: Path) -> None:
    page = read(tmp_path, attributions=[], layers=[])
    assert page.all("path", "virtual")
    assert "virtual 2 \N{RIGHTWARDS ARROW}" not in page.one("main").text
    assert "encoder.0.attention: 31.0\N{NARROW NO-BREAK SPACE}% to the virtual tokens" in page.one("main").text
    without = examples.explanation(virtual=0)
    page = read(tmp_path, attributions=[], layers=[], attention=without["attention"])
    assert not page.all("path", "virtual")
    chart = heat_map("a map", ["one"], ["v", "a", "b"], [[0.5, 0.5, 0.2]], apart=1)
    edges = [float(x) for x in re.findall(r"M([0-9.]+) ", chart)][:3]
    assert edges[1] - edges[0] == pytest.approx(edges[2] - edges[1] + 6)  # a gap behind the virtual column


def test_damaged_explanations_leave_parts_out() -> None:
    known = examples.explanation()
    assert explanation_sections({}) == []
    odd = copy.deepcopy(known)
    odd["attention"][0]["layers"][0]["maps"][0][0].append(0.5)
    odd["attributions"][0]["adapter"]["scores"].pop()
    odd["attributions"][1]["adapter"] = None
    odd["layers"] = "none"
    (looks,) = explanation_sections(odd)
    assert "encoder.0.attention" not in looks
    assert "cross" in looks


def test_charts_fit_their_width_with_any_number_of_rows_and_names() -> None:
    names = [f"a.very.long.name.of.a.layer.number.{at}" for at in range(60)]
    drawn = row_bars("bars", names, [Panel("one", [float(at) for at in range(60)], str, reach=59.0)] * 2)
    drawn += heat_map("map", names, names, [[0.5, 0.2] * 30] * 60)
    for part in re.findall(r"<svg.*?</svg>", drawn, re.DOTALL):
        width = float(re.search(r'width="([0-9.]+)"', part).group(1))  # type: ignore[union-attr]
        assert width in SIZES.values()
        edges = [
            float(x) + float(across)
            for x, across in re.findall(r'<rect x="([0-9.]+)" y="[0-9.]+" width="([0-9.]+)"', part)
        ]
        edges += [float(x) + float(across) for x, across in re.findall(r"M([0-9.]+) [0-9.]+h([0-9.]+)", part)]
        assert max(edges) <= width
    assert shortened("short", 100) == "short"
    assert shortened(names[-1], 80).startswith("…")
    assert names[-1].endswith(shortened(names[-1], 80)[1:])
    assert plain_names(["one.only"]) == ["one.only"]


def test_a_page_is_replaced_only_if_asked(tmp_path: Path) -> None:
    read(tmp_path)
    with pytest.raises(ConflictError, match="exists"):
        write_explanation(tmp_path / "page.html", {}, "films")
