"""Events of a run, and the bus that passes them to listeners.

Kinds: ``phase`` (name), ``progress`` (total, loss, left_seconds) and ``validated`` (predictions: an evaluation's
own object) are for those who watch and never written down, as is ``unfit`` (needed_bytes, available_bytes), before a
run is refused for its memory; ``finding`` (an issue of the data), ``start`` (the plan),
``step`` (loss, learning_rate, grad_norm, epoch, seconds, left_seconds), ``evaluation`` (metrics, best), ``checkpoint``
(path), ``diagnosis`` (code, text, hint), ``bad_step``, ``memory``, ``early_stopping`` and ``warning`` (text), ``trunk``
(frozen layers that are computed once: `activation_cache`), ``resume`` (path), ``finish``; ``nothing_left`` (text) if a
finished run was to be resumed.
Seconds are of training, counted by a monotonic clock and carried over a resume; order is the order of the lines.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

from graftwerk.sanitize import clean

TRANSIENT = frozenset({"progress", "phase", "validated", "nothing_left", "unfit"})
"""Kinds that are shown and not written down."""


class Event:
    """Something that happened at a step: ``Event("step", 10, loss=0.61)``.

    Args:
        kind: Kind of the event.
        step: Steps done.
        values: Values of the event by name.
    """

    __slots__ = ("kind", "step", "values")

    def __init__(self, kind: str, step: int, /, **values: Any) -> None:
        self.kind, self.step, self.values = kind, step, values

    @property
    def figures(self) -> dict[str, Any]:
        """Return `values` by their earlier name; deprecated."""
        warnings.warn("`figures` is now called `values`", DeprecationWarning, stacklevel=2)
        return self.values

    def as_dict(self) -> dict[str, Any]:
        """Return kind, step and values as the log has them."""
        return {"kind": self.kind, "step": self.step, **self.values}

    def __repr__(self) -> str:
        values = "".join(f", {name}={value!r}" for name, value in self.values.items())
        return f"Event({self.kind!r}, {self.step}{values})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]  # values may be lists


Listener = Callable[[Event], None]
WORTH_A_WARNING = frozenset({"warning", "diagnosis", "bad_step", "memory"})


class EventBus:
    """Pass each event to every listener, in the order in which they were added."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


def to_logging(event: Event) -> None:
    """Log problems as warnings of the logger `graftwerk`; the listener of callers that give none."""
    values = event.values
    if event.kind in WORTH_A_WARNING or (event.kind == "finding" and values.get("grave")):
        hint = f" ({values['hint']})" if values.get("hint") else ""
        logging.getLogger("graftwerk").warning(
            "step %d: %s", event.step, clean(f"{values.get('text') or values.get('message')}{hint}")
        )
