"""The pictures of an explanation: what is drawn, what is read with the keyboard, and the numbers beneath."""

from __future__ import annotations

import copy
import re
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from graftwerk.errors import ConflictError
from graftwerk.reporting.explanation import explanation_sections, numbers_of, plain_names
from graftwerk.reporting.html import write_explanation, write_report
from graftwerk.reporting.matrix_charts import SIZES, Panel, heat_map, row_bars, shared, shortened
from tests.reporting import examples
from tests.reporting.reading import Element, Page

HEADINGS = ["Which words decide", "Where it looks", "What was learnt in each layer"]


def read(folder: Path, **changes: object) -> Page:
    known = {**examples.explanation(), **changes}
    return Page(write_explanation(folder / "page.html", known, "films", overwrite=True).read_text(encoding="utf-8"))


def track_of(page: Page, picture: Element) -> list[tuple[float, float, str]]:
    """Places and texts that the script reads out, found as it finds them (`cells` and `words` in page.js)."""
    said = {key.removeprefix("data-"): value or "" for key, value in picture.attributes.items()}
    if "places" in said:
        (told,) = [said["told"]] if "told" in said else [by_id(page, said["of"]).attributes["data-told"] or ""]
        places = [float(place) for place in said["places"].split()]
        return list(zip(places[::2], places[1::2], told.split("\n\n"), strict=True))
    left, top, across, down, gap, apart = map(float, said["grid"].split())
    start = page.elements.index(by_id(page, said["table"]))
    parts = list(takewhile(lambda one: one.name != "table", page.elements[start + 1 :]))
    found, row, column, name = [], -1, 0, ""
    above = [one.text for one in parts if one.attributes.get("scope") == "col"][1:]
    for one in parts:
        if one.attributes.get("scope") == "row":
            row, column, name = row + 1, 0, one.text
        elif one.name == "td":
            if float(one.text) >= float(said["least"]):
                x = left + across * (column + 0.5) + (0 if column < apart else gap)
                found.append((x, top + down * (row + 0.5), f"{name}\n{above[column]}\t{one.text}{said['unit']}"))
            column += 1
    return found


def by_id(page: Page, wanted: str) -> Element:
    (found,) = (one for one in page.elements if one.attributes.get("id") == wanted)
    return found


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
        track = track_of(page, picture)
        width, height = (float(picture.attributes[side] or 0) for side in ("width", "height"))
        assert track
        assert all(0 <= x <= width and 0 <= y <= height for x, y, _ in track)
    drawn = {one.attributes["id"] for one in page.all("g") if (one.attributes.get("id") or "n")[0] == "m"}
    used = {(one.attributes["href"] or "")[1:] for one in page.all("use")}
    assert {one for one in used if one[0] == "m"} == drawn
    assert all(by_id(page, one).name == "g" for one in used)
    inside = [one for one in page.elements if one.name in ("title", "desc") and "svg" in one.inside]
    assert len(inside) == 2 * len(pictures)
    assert all(one.text for one in inside)
    assert len(page.all("table")) == 2 + 1 + 3 + 2
    text = page.one("main").text
    for words in ("<b>quiet</b>", "50.0\N{NARROW NO-BREAK SPACE}%", "eager kernel", "2.0\N{MULTIPLICATION SIGN}"):
        assert words in text


def test_adapter_and_base_stand_side_by_side_on_one_scale(tmp_path: Path) -> None:
    page = read(tmp_path, attention=[], layers=[])
    both, alone = (one for one in page.all("svg") if one.attributes["width"] == "760")
    track = track_of(page, both)
    assert track[3][2] == "pleasure\nadapter\t+1.2\nbase\t−0.6"
    assert track_of(page, alone)[3][2] == "pleasure\nadapter\t+1.2"
    widths = {
        kind: [float(x) for x in re.findall(r"h([0-9.]+)", page.all("path", f"bar-{kind}")[0].attributes["d"] or "")]
        for kind in ("adapter", "base")
    }
    for mine, its in zip(widths["adapter"][1:4], widths["base"][1:4], strict=True):
        assert its == pytest.approx(mine / 2, abs=0.2)


def test_virtual_columns_stand_apart_in_their_own_colour(tmp_path: Path) -> None:
    page = read(tmp_path, attributions=[], layers=[])
    assert page.all("g", "virtual")
    assert "virtual 2 \N{RIGHTWARDS ARROW}" not in page.one("main").text
    assert "encoder.0.attention: 31.0\N{NARROW NO-BREAK SPACE}% to the virtual tokens" in page.one("main").text
    without = examples.explanation(virtual=0)
    page = read(tmp_path, attributions=[], layers=[], attention=without["attention"])
    assert not page.all("g", "virtual")
    table, numbered = numbers_of("a map", ["one"], ["v", "a", "b"], [[0.5, 0.5, 0.2]])
    page = Page(heat_map("a map", ["one"], ["v", "a", "b"], [[0.5, 0.5, 0.2]], table, apart=1) + numbered)
    for picture in page.all("svg"):
        one, two, three = (x for x, _, _ in track_of(page, picture))
        assert two - one == pytest.approx(three - two + 6)  # a gap behind the virtual column
    wide = [one for one in page.elements if one.name == "use"][:2]
    (scale,) = {
        one.attributes["transform"] for one in page.all("g") if "scale" in (one.attributes.get("transform") or "")
    }
    across = float(re.search(r"[0-9.]+", scale or "").group())  # type: ignore[union-attr]
    first, second = (float(one.attributes["x"] or 0) for one in wide)
    assert (second - first) * across == pytest.approx(across + 6, abs=0.3)


def test_cells_of_a_map_are_lines_of_their_shade_or_a_darker_one() -> None:
    key, (text,) = shared("a map", [[0.7, 0.0], [0.02, 0.0], [0.0, 0.2]], 0)
    paths = {one.attributes["class"]: one.attributes["d"] for one in Page(text).all("path")}
    assert paths["shade-1"] == "m0 0v2m1 0v1"  # each begins where the one before it has ended
    assert paths["shade-3"] == "m0 0v1m1 1v1"
    assert paths["shade-5"] == "m0 0v1"
    assert key != shared("another map", [[0.7, 0.0], [0.02, 0.0], [0.0, 0.2]], 0)[0]


def test_page_with_attention_of_many_heads_stays_small(tmp_path: Path) -> None:
    """Two texts of 24 tokens in six layers of twelve heads: the numbers alone are 300 kB as JSON."""
    rng = np.random.default_rng(0)
    known = examples.explanation(virtual=0)
    layer = known["attention"][0]["layers"][0]
    tokens = [f"token{at}" for at in range(24)]
    looks = []
    for _ in range(2):
        weights = rng.dirichlet(np.full(24, 0.15), size=(6, 12, 24)).round(4).tolist()
        layers = [{**layer, "name": f"layer.{at}.attention", "maps": maps} for at, maps in enumerate(weights)]
        looks.append({**known["attention"][0], "tokens": tokens, "decoder_tokens": None, "layers": layers})
    page = write_explanation(tmp_path / "page.html", {**known, "attention": looks}, "films")
    assert page.stat().st_size < 600_000


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
    drawn += heat_map("map", names, names, [[0.5, 0.2] * 30] * 60, "table")
    for part in re.findall(r"<svg.*?</svg>", drawn, re.DOTALL):
        width = float(re.search(r'width="([0-9.]+)"', part).group(1))  # type: ignore[union-attr]
        assert width in SIZES.values()
        edges = [float(x) + float(across) for x, across in re.findall(r"M([0-9.]+) [0-9.]+h([0-9.]+)", part)]
        for scale, x in re.findall(r'<g transform="scale\(([0-9.]+) [0-9.]+\)"><use [^>]* x="([0-9.]+)"', part):
            edges.append(float(scale) * (float(x) - 0.5 + len(names)))
        assert max(edges) <= width
    assert shortened("short", 100) == "short"
    assert shortened(names[-1], 80).startswith("…")
    assert names[-1].endswith(shortened(names[-1], 80)[1:])
    assert plain_names(["one.only"]) == ["one.only"]


def test_a_page_is_replaced_only_if_asked(tmp_path: Path) -> None:
    read(tmp_path)
    with pytest.raises(ConflictError, match="exists"):
        write_explanation(tmp_path / "page.html", {}, "films")
