"""The forgetting of a run in words, and the refusal to hand it over; its numbers are `retained` in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.errors import ForgettingError
from graftwerk.evaluation.metrics import METRICS


def describe_losses(retained: Mapping[str, Any]) -> str:
    """Return what was lost of the entries that exceed the limit, or of all if none does."""
    entries = retained["entries"]
    return "; ".join(_describe_loss(name, entries[name]) for name in retained["exceeded"] or entries)


def _describe_loss(name: str, entry: Mapping[str, Any]) -> str:
    if entry.get("forgetting") is None:
        return f"`{name}` could not be measured ({entry.get('note')})"
    metric, lost = METRICS[entry["metric"]], entry["forgetting"]
    before, after = (metric.text(entry[part]["value"]) for part in ("before", "after"))
    unit = "points" if metric.words == " points" else "%"
    return (
        f"`{name}` {metric.title} {before} -> {after}: {lost['value']:.1f} {unit} lost "
        f"[{lost['low']:.1f}, {lost['high']:.1f}]"
    )


def refuse_to_hand_over(own: Mapping[str, Any], folder: Path, allow: bool) -> None:
    """Raise for an adapter that lost more than its run allowed, unless the user says that it may.

    Args:
        own: Content of its `graftwerk.json`, empty for a folder of PEFT.
        folder: The adapter folder.
        allow: True to hand it over all the same.

    Raises:
        ForgettingError: It has forgotten too much.
    """
    retained = own.get("retained")
    if not allow and isinstance(retained, Mapping) and retained.get("exceeded"):
        raise ForgettingError(
            f"this adapter has forgotten more than the {retained['limit']} that its run allows: "
            f"{describe_losses(retained)}",
            where=str(folder),
            hint="--allow-forgetting (allow_forgetting=True) hands it over all the same",
        )
