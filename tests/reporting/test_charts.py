"""Scales, ticks, names beside points, numbers in words."""

from __future__ import annotations

import json
import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.reporting import numbers, verdicts
from graftwerk.reporting.escape import Markup, tag, text
from graftwerk.reporting.labels import Box, cut, place, text_width
from graftwerk.reporting.line_charts import MOST_POINTS, Chart, Curve, charts
from graftwerk.reporting.scales import Linear, Log, around, clock_ticks, decades, from_zero
from graftwerk.reporting.tables import differences
from graftwerk.reporting.tradeoff import COSTS, Point, tradeoff
from tests.reporting.reading import Page

REASONABLE = st.floats(-1e9, 1e9, allow_nan=False)
POSITIVE = st.floats(1e-6, 1e12)


@given(st.lists(REASONABLE, min_size=1, max_size=6))
def test_around_is_monotonic_and_covers_all_values(values: list[float]) -> None:
    scale = around(values, 400, 20, least=0.01)
    heights = [scale(value) for value in sorted(values)]
    assert heights == sorted(heights, reverse=True)
    assert all(20 <= height <= 400 for height in heights)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(scale.low <= tick <= scale.high or abs(tick - scale.low) < 1e-6 for tick in ticks)


@given(st.lists(POSITIVE, min_size=1, max_size=6))
def test_decades_is_monotonic_and_covers_all_values(values: list[float]) -> None:
    scale = decades(values, 50, 750)
    places = [scale(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(50 <= place <= 750 for place in places)
    assert len(scale.ticks()) <= 6
    assert all(a < b for a, b in pairwise(scale.ticks()))


def test_ticks_are_round_numbers() -> None:
    assert Linear(0.68, 0.83, 0, 1).ticks() == pytest.approx([0.7, 0.75, 0.8])
    assert Linear(0.0, 10.0, 0, 1).ticks() == pytest.approx([0, 2, 4, 6, 8, 10])
    assert Log(300, 5e7, 0, 1).ticks() == pytest.approx([1e3, 1e4, 1e5, 1e6, 1e7])
    assert Log(90, 700, 0, 1).ticks() == pytest.approx([100, 200, 500])
    assert from_zero([0.0], 0, 1).high > 0
    assert clock_ticks(Linear(0, 170, 0, 1)) == [0, 60, 120]
    assert clock_ticks(Log(30, 4000, 0, 1), 6) == [30, 120, 600, 1800]


boxes = st.tuples(st.floats(40, 740), st.floats(30, 370))


@given(st.lists(boxes, min_size=1, max_size=12), st.data())
def test_place_labels_never_overlap_labels_points_or_edge(
    points: list[tuple[float, float]], data: st.DataObject
) -> None:
    sizes = [(data.draw(st.floats(20, 120)), 16.0) for _ in points]
    dots = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    area = Box(30, 20, 750, 380)
    placed = place(points, sizes, dots, area)
    assert all(spot is not None for spot in placed), "a dozen names fit"
    found = [spot.box for spot in placed if spot is not None]
    assert not [pair for pair in combinations(found, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in found if any(box.overlaps(dot) for dot in dots)]
    assert all(box.within(area) for box in found)
    for spot, (x, y) in zip(placed, points, strict=True):
        assert spot is not None
        if not spot.led:
            box = spot.box
            assert max(box.left - x, x - box.right, box.top - y, y - box.bottom) < 12


def test_tradeoff_crowded_chart_notes_missing_labels() -> None:
    assert place([(50, 50)] * 3, [(90, 16)] * 3, [], Box(0, 0, 100, 33)).count(None) >= 1
    costs = {cost.key: 5.0 for cost in COSTS}
    crowd = [Point(f"method-{i}-{'x' * 20}", 0.5, 0.4, 0.6, costs, f"method {i}") for i in range(60)]
    page = Page(tradeoff(crowd, {}, "accuracy"))
    assert "No room for the name of" in page.elements[0].text


def test_tradeoff_labels_do_not_overlap() -> None:
    values = (770, 19_202, 43_010, 301_442, 338_690, 339_000, 22_713_986)
    points = [
        Point(name, 0.7 + place / 200, 0.68 + place / 200, 0.72 + place / 200, {"trained_parameters": value}, name)
        for place, (name, value) in enumerate(zip("abcdefg", values, strict=True))
    ]
    html = tradeoff(points, {"trained_parameters": ["a", "g"]}, "accuracy")
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        names = re.findall(
            r'<text x="([\d.]+)" y="([\d.]+)" class="name"(?: text-anchor="(end)")?>(\w+)</text>', drawing
        )
        assert len(names) == 7
        found = []
        for x, y, end, name in names:
            width = text_width(name, 13)
            left = float(x) - width if end else float(x)
            found.append(Box(left, float(y) - 10, left + width, float(y)))
        assert not [pair for pair in combinations(found, 2) if pair[0].overlaps(pair[1])]


def test_tradeoff_without_interval_draws_a_point() -> None:
    page = Page(tradeoff([Point("a", 0.5, None, None, {"adapter_bytes": 0.0}, "a")], {}, "accuracy"))
    assert len(page.all("circle", "dot")) == 2
    assert not page.all("line", "bar")


def test_charts_long_curve_is_thinned_and_keeps_gaps() -> None:
    points = [(float(step), None if 500 <= step < 600 else 1.0 / (step + 1)) for step in range(5000)]
    page = Page(*charts([Chart([Curve("loss", "train", points)], "Loss", numbers.plain)], steps=5000))
    wide, narrow = page.all("svg")
    assert len(page.all("path", "train")) == 4  # two pieces in each of the two widths
    assert "gap" not in wide.text
    assert wide.attributes["data-track"] is not None
    assert (wide.attributes["data-track"] or "").count("Step") <= MOST_POINTS
    assert narrow.attributes["viewbox"] != wide.attributes["viewbox"]


def test_charts_without_values_states_it() -> None:
    empty = Chart([Curve("a", "train", [(1.0, None)])], "Loss", numbers.plain)
    full = Chart([Curve("b", "train", [(1.0, 0.5)])], "Loss", numbers.plain)
    (alone,) = charts([empty], steps=10)
    beside, _ = charts([empty, full], steps=10)
    assert alone == beside
    assert "no values" in alone


def test_charts_share_the_step_axis() -> None:
    """Whatever stands beside the data: long and short values on the axes, names at the ends of lines."""
    steps = [(float(step), 0.0001234 * (step + 1)) for step in range(0, 101, 10)]
    wanted = [
        Chart([Curve("training loss", "train", steps), Curve("validation loss", "validation", steps)], "Loss", str),
        Chart([Curve("accuracy", "metric", [(0.0, 0.5), (50.0, 0.6), (100.0, 1.0)])], "Accuracy", numbers.percent),
        Chart([Curve("rate", "rate", [(0.0, 0.0), (50.0, 1.0), (100.0, 2.0)])], "Rate", numbers.plain, height=150),
    ]
    pages = [Page(chart) for chart in charts(wanted, steps=100)]
    for size in ("wide", "narrow"):
        ends = set()
        for page in pages:
            (drawn,) = page.all("svg", size)
            places = [x for x, _, _ in json.loads(drawn.attributes["data-track"] or "")]
            ends.add((min(places), max(places)))
        assert len(ends) == 1, size


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (numbers.percent(0.786), "78.6 %"),
        (numbers.percent(None), "–"),
        (numbers.share(0.0), "0.0 %"),
        (numbers.percent(-0.00001), "0.0 %"),
        (numbers.share(0.0000339), "0.0034 %"),
        (numbers.count(770), "770"),
        (numbers.count(338_690), "339 k"),
        (numbers.count(999_600), "1.0 M"),
        (numbers.byte_size(1_370_930), "1.4 MB"),
        (numbers.seconds(59.7), "1 min 00 s"),
        (numbers.seconds(3725), "1 h 02 min"),
        (numbers.milliseconds(6.1), "6.10 ms"),
        (numbers.signed_points(-0.0123), "−1.2"),
        (numbers.signed_points(0.0001), "0.0"),
        (numbers.exact(338_690), "338,690"),
        (numbers.interval({"low": 0.75, "high": 0.82}), "75.0 to 82.0"),
        (numbers.interval({"low": None}), "–"),
        (numbers.listed(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_format_values(said: str, expected: str) -> None:
    assert said.replace("\N{NARROW NO-BREAK SPACE}", " ") == expected


def test_tag_escapes_text_and_rejects_invalid_names() -> None:
    assert tag("p", "<b>&", Markup("<i>"), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;&amp;<i></p>'
    assert text("a\x00b\u202ec\ud800") == "a\ufffdb\ufffdc\ufffd"
    for name in ("p onclick", "p>", ""):
        with pytest.raises(ValueError):
            tag(name)
    with pytest.raises(ValueError):
        tag("p", **{"a b": "c"})


@pytest.mark.parametrize(("count", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (2_000, "2,000 rows")])
def test_plural_adds_s_unless_one(count: int, words: str) -> None:
    assert numbers.plural(count, "row") == words


def test_cut_names_are_at_most_as_long_as_they_may_be() -> None:
    assert [cut("lora-r64", most) for most in (8, 7, 5)] == ["lora-r64", "lora-r…", "lora…"]
    assert cut("of a b", 5) == "of a…"
    assert cut("of a b", 4) == "of…"  # no space before the dots


def test_from_zero_leaves_room_above_the_highest_value() -> None:
    assert from_zero([2.0, 50.0], 0, 100).high == pytest.approx(54.0)


@pytest.mark.parametrize(("p", "said"), [(0.0004, "&lt; 0.001"), (0.004, "0.004"), (None, "–")])
def test_differences_table_prints_small_p_values(p: float | None, said: str) -> None:
    entry = {"a": "lora", "b": "ia3", "value": 0.02, "low": 0.01, "high": 0.03, "p": p, "verdict": "better"}
    result = {"metric": "accuracy", "differences": [entry]}
    assert f">{said}<" in str(differences(verdicts.differences(result), result, "accuracy"))
