"""`graftwerk methods`: what there is to choose from, told by the methods themselves."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

from graftwerk.cli.command import Result
from graftwerk.cli.output import Output, table

if TYPE_CHECKING:
    from graftwerk.methods.base import Method


def methods(out: Output) -> Result:
    """List the methods: paper, tasks, what they train, whether they merge, their learning rate."""
    rows = describe_methods()
    shown = table(
        "name",
        "method",
        "learning rate",
        "merges",
        "mixed rows",
        "quantized base",
        "PEFT type",
        "trained parameters",
        numbers=("learning rate",),
    )
    for row in rows:
        shown.add_row(
            row["name"],
            f"{row['title']}\n{row['paper']}",
            f"{row['learning_rate']:g}",
            "yes" if row["mergeable"] else "no",
            "yes" if row["rows"] else "no",
            "yes" if row["quantized"] else "no",
            row["peft_type"] or "none",
            row["parameters"],
        )
    out.show(shown)
    for row in rows:
        for shorthand, values in row["shorthands"].items():
            meaning = ", ".join(f"{key}: {value}" for key, value in values.items())
            out.line(f"{shorthand} is short for {{name: {row['name']}, {meaning}}}")
    return {"methods": rows}


def describe_methods() -> list[dict[str, Any]]:
    """Return every method as plain values; the texts come from the docstring of its module."""
    from graftwerk.methods.registry import METHODS, SHORTHANDS
    from graftwerk.tasks.registry import TASKS

    rows = []
    for name, method in METHODS.items():
        rows.append(
            {
                "name": name,
                "title": method.title,
                "paper": method.paper,
                "tasks": [task for task, kind in TASKS.items() if kind.has_head or name != "probe"],
                "kind": method.kind,
                "mergeable": method.mergeable,
                "identity_at_start": method.identity_at_start,
                "rows": method.supports_rows,
                "quantized": method.kind != "weights",
                "peft_type": method.peft_type,
                "learning_rate": method.default_learning_rate,
                "head_learning_rate": method.default_head_learning_rate or method.default_learning_rate,
                "parameters": notes_on(method, "Parameters"),
                "trade_off": notes_on(method, "Trade-off"),
                "settings": list(method.model_fields),
                "shorthands": {
                    short: {key: value for key, value in values.items() if key != "name"}
                    for short, values in SHORTHANDS.items()
                    if values["name"] == name
                },
            }
        )
    return rows


def notes_on(method: type[Method], subject: str) -> str:
    """Return what the docstring of the method's module says after ``subject``, on one line, or "" if it says nothing.

    Args:
        method: The method's class.
        subject: First word of the line that is looked for; a qualifier before its colon ("for each layer") is kept.
    """
    head = inspect.getdoc(sys.modules[method.__module__]) or ""
    pattern = rf"^{re.escape(subject)}([^:\n]*): (.+?)(?=\n\n|\n[A-Z][\w-]*[^:\n]*: |\Z)"
    found = re.search(pattern, head, re.DOTALL | re.MULTILINE)
    if found is None:
        return ""
    qualifier = f"{found[1].strip(' ,')}: " if found[1].strip(" ,") else ""
    return qualifier + " ".join(found[2].split())
