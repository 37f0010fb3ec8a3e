"""Charts of a search: the importance of each setting, its slices, and all trials as parallel coordinates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwerk.reporting import numbers
from graftwerk.reporting.escape import Markup, join, tag
from graftwerk.reporting.files import items, mapping, number, words
from graftwerk.reporting.frame import BOTTOM, TICK_SIZE, TOP, Frame, label, line, path, point, svg
from graftwerk.reporting.labels import Box, cut, text_width
from graftwerk.reporting.scales import Linear, Log, around

SIZES = {"wide": 760.0, "narrow": 350.0}
LONGEST = 16
"""Letters of a choice on an axis."""


@dataclass(frozen=True)
class Trial:
    """One finished trial: its name and details for people, its value, its settings by key, and if it is the best."""

    name: str
    details: str
    value: float
    settings: Mapping[str, Any]
    best: bool


@dataclass(frozen=True)
class Setting:
    """One setting that was searched.

    Attributes:
        key: Dotted key of the run file.
        choices: The choices, or [] for a range.
        low, high: The range.
        log: True for a logarithmic one.
    """

    key: str
    choices: Sequence[Any]
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, axis: Mapping[str, Any]) -> Setting | None:
        """Return the setting that a file describes, or None if it describes none."""
        low, high, choices = number(axis, "low"), number(axis, "high"), items(axis, "choices")
        log = axis.get("log") is True
        if choices:
            return cls(words(axis, "key"), choices, 0.0, 1.0, False)
        if low is None or high is None or low >= high or (log and low <= 0):
            return None
        return cls(words(axis, "key"), [], low, high, log)

    @property
    def name(self) -> str:
        """Return the key without its section."""
        return self.key.rpartition(".")[2]

    def places(self, start: float, end: float) -> list[tuple[float, str]]:
        """Return the ticks between two pixels: each with its text."""
        if self.choices:
            return [
                (self._of_choice(at, start, end), cut(format_value(one), LONGEST))
                for at, one in enumerate(self.choices)
            ]
        scale = self._scale(start, end)
        return [(scale(tick), numbers.plain(tick)) for tick in scale.ticks(5)]

    def place(self, value: Any, start: float, end: float) -> float | None:
        """Return the pixel of a value, or None if it is not on the axis."""
        if self.choices:
            return self._of_choice(self.choices.index(value), start, end) if value in self.choices else None
        found = number({"value": value}, "value")
        if found is None or not self.low <= found <= self.high:
            return None
        return self._scale(start, end)(found)

    def _scale(self, start: float, end: float) -> Linear | Log:
        return (Log if self.log else Linear)(self.low, self.high, start, end)

    def _of_choice(self, at: int, start: float, end: float) -> float:
        return start + (at + 0.5) / len(self.choices) * (end - start)


def format_value(value: Any) -> str:
    """Return a setting's value for people."""
    if isinstance(value, float):
        return numbers.plain(value)
    return value if isinstance(value, str) else json.dumps(value)


def importance(shares: Sequence[tuple[str, float]]) -> Markup:
    """Draw the share of each setting in what makes a trial good, the most important first."""
    drawn = []
    for size, width in SIZES.items():
        left = 10 + max(text_width(name, TICK_SIZE) for name, _ in shares)
        frame = Frame(width, 26.0 * len(shares) + 8, Box(left, 4, width - 48, 26.0 * len(shares) + 4))
        scale = Linear(0.0, max(max(share for _, share in shares), 1e-9), frame.inner.left, frame.inner.right)
        parts = []
        for at, (name, share) in enumerate(shares):
            y = 4 + 26.0 * at
            parts.append(label(name, left - 8, y + 17, "tick", "end"))
            parts.append(
                tag(
                    "rect/", x=f"{left:.1f}", y=f"{y + 4:.1f}", width=f"{max(scale(share) - left, 1.0):.1f}",
                    height="16", class_="share",
                )
            )  # fmt: skip
            parts.append(label(f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%", scale(share) + 6, y + 17, "tick"))
        said = "; ".join(f"{name}: {100 * share:.0f} %" for name, share in shares)
        drawn.append(svg(frame, *parts, class_=f"chart {size}", role="img", aria_label=f"Importance: {said}"))
    return join(drawn)


def slices(trials: Sequence[Trial], setting: Setting, metric: str) -> Markup:
    """Draw the value of each trial against one setting."""
    drawn = []
    for size, width in SIZES.items():
        y = around([trial.value for trial in trials], 0, 1, least=numbers.least_span(metric))
        frame = Frame.around(width, 230.0, [numbers.bare(metric, tick) for tick in y.ticks(5)])
        inner = frame.inner
        y = Linear(y.low, y.high, inner.bottom, inner.top)
        parts = [label(f"\N{UPWARDS ARROW} {numbers.heading(metric)}", 0, 14, "axis-title")]
        for tick in y.ticks(5):
            parts.append(line(inner.left, y(tick), inner.right, y(tick), "grid"))
            parts.append(label(numbers.bare(metric, tick), inner.left - 6, y(tick) + 4, "tick", "end"))
        parts.append(line(inner.left, inner.bottom, inner.right, inner.bottom, "base"))
        for place, text in setting.places(inner.left + 8, inner.right - 8):
            parts.append(line(place, inner.bottom, place, inner.bottom + 4, "base"))
            parts.append(label(text, place, inner.bottom + 18, "tick", "middle"))
        parts.append(label(f"{setting.name} \N{RIGHTWARDS ARROW}", inner.right, frame.height - 6, "axis-title", "end"))
        for trial in trials:
            x = setting.place(trial.settings.get(setting.key), inner.left + 8, inner.right - 8)
            if x is not None:
                parts.append(_point(trial, x, y(trial.value)))
        title = f"{numbers.metric_name(metric)} against {setting.name}"
        drawn.append(svg(frame, *parts, class_=f"chart {size}", role="group", aria_label=title))
    return join(drawn)


def parallel(trials: Sequence[Trial], settings: Sequence[Setting], metric: str, less_is_better: bool) -> Markup:
    """Draw every trial as a line through its settings to its value; the better half is darker."""
    order = sorted(trials, key=lambda trial: trial.value, reverse=less_is_better)
    drawn = []
    for size, width in SIZES.items():
        frame = Frame(width, 330.0, Box(64, TOP, width - 46, 330.0 - BOTTOM))
        inner = frame.inner
        y = around([trial.value for trial in trials], inner.bottom, inner.top, least=numbers.least_span(metric))
        columns = [inner.left + at * (inner.right - inner.left) / len(settings) for at in range(len(settings) + 1)]
        parts = []
        for at, trial in enumerate(order):
            points = [
                (x, place)
                for x, setting in zip(columns, settings, strict=False)
                if (place := setting.place(trial.settings.get(setting.key), inner.bottom, inner.top)) is not None
            ]
            kind = "best" if trial.best else "good" if 2 * at >= len(order) else "poor"
            parts.append(path([*points, (columns[-1], y(trial.value))], f"line trial {kind}"))
        for at, (x, setting) in enumerate(zip(columns, settings, strict=False)):
            parts.append(line(x, inner.top, x, inner.bottom, "base"))
            room = 18 if at % 2 == 0 or size == "wide" else 34
            parts.append(label(cut(setting.name, LONGEST), x, inner.bottom + room, "axis-title", "middle"))
            for place, text in setting.places(inner.bottom, inner.top):
                parts.append(label(text, x - 5, place + 4, "tick name", "end"))
        parts.append(line(columns[-1], inner.top, columns[-1], inner.bottom, "base"))
        parts.append(label(numbers.heading(metric), width - 4, 14, "axis-title", "end"))
        for tick in y.ticks(6):
            parts.append(label(numbers.bare(metric, tick), columns[-1] + 6, y(tick) + 4, "tick"))
        said = f"All {len(trials)} trials through their settings to {numbers.metric_name(metric)}"
        drawn.append(svg(frame, *parts, class_=f"chart {size}", role="img", aria_label=said))
    return join(drawn)


def _point(trial: Trial, x: float, y: float) -> Markup:
    kind, radius = ("recommended", 6.5) if trial.best else ("on-front", 4.5)
    return point(x, y, trial.details, kind, radius=radius)


def settings_of(result: Mapping[str, Any]) -> list[Setting]:
    """Return the settings that were searched, as far as the file describes them."""
    return [setting for axis in items(result, "space") if isinstance(axis, Mapping) and (setting := Setting.of(axis))]


def trials_of(result: Mapping[str, Any], metric: str) -> list[Trial]:
    """Return the trials that came to an end."""
    best = number(result, "best", "trial")
    found = []
    for trial in items(result, "trials"):
        value, place = number(trial, "value"), number(trial, "number")
        if value is None or place is None:
            continue
        settings = mapping(trial, "settings")
        lines = [
            f"Trial {place:.0f}",
            f"{numbers.title(numbers.metric_name(metric))}\t{numbers.value_of(metric, value)}",
        ]
        lines += [f"{key.rpartition('.')[2]}\t{format_value(one)}" for key, one in settings.items()]
        found.append(Trial(f"{place:.0f}", "\n".join(lines), value, settings, place == best))
    return found
