"""What a run says while it runs: events, and the listeners that write them down.

Kinds: ``phase`` (name) and ``progress`` (total, loss, left_seconds) are for people watching and never written down;
``finding`` (about the data), ``start`` (what will be done), ``step`` (loss, learning_rate, grad_norm, epoch, seconds,
left_seconds), ``evaluation`` (metrics, best), ``checkpoint`` (path), ``diagnosis`` (code, text, hint), ``bad_step``,
``memory``, ``early_stopping`` and ``warning`` (text), ``trunk`` (frozen layers that are computed once: `train.trunk`),
``resume`` (path), ``finish``; ``nothing_left`` (text) where
a finished run was to be gone on with. Seconds are of training, counted by a monotonic clock and carried over a resume;
order is the order of the lines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from graftwerk.sanitize import clean

TRANSIENT = frozenset({"progress", "phase", "nothing_left"})
"""Kinds that are shown and forgotten."""


class Event:
    """Something that happened at a step: ``Event("step", 10, loss=0.61)``."""

    __slots__ = ("figures", "kind", "step")

    def __init__(self, kind: str, step: int, /, **figures: Any) -> None:
        self.kind, self.step, self.figures = kind, step, figures

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, **self.figures}

    def __repr__(self) -> str:
        figures = "".join(f", {name}={value!r}" for name, value in self.figures.items())
        return f"Event({self.kind!r}, {self.step}{figures})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]  # figures may be lists


Listener = Callable[[Event], None]
WORTH_A_WARNING = frozenset({"warning", "diagnosis", "bad_step", "memory"})


class EventBus:
    """Passes each event on to every listener, in the order in which they were added."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


def to_logging(event: Event) -> None:
    """Where nobody listens: what goes wrong is a warning of the logger `graftwerk`."""
    figures = event.figures
    if event.kind in WORTH_A_WARNING or (event.kind == "finding" and figures.get("grave")):
        hint = f" ({figures['hint']})" if figures.get("hint") else ""
        logging.getLogger("graftwerk").warning(
            "step %d: %s", event.step, clean(f"{figures.get('text') or figures.get('message')}{hint}")
        )
