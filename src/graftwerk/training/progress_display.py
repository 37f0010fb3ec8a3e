"""A training told by its events to who watches it."""

from __future__ import annotations

from typing import Any

from graftwerk.display import Display
from graftwerk.formatting import byte_size, count, duration, number, seconds, share
from graftwerk.sanitize import printable
from graftwerk.training.batch_display import show_batch
from graftwerk.training.events import Event

NOT_SHOWN = frozenset({"loss", "seconds", "best", "left_seconds"})


class Progress(Display):
    """A run, told by its events. With ``quiet`` only findings, warnings and diagnoses are written."""

    def __call__(self, event: Event) -> None:
        values = event.values
        match event.kind:
            case "phase":
                self._note(f"{values['name']} ...")
            case "first_batch":
                if not self.quiet and not self.silent:
                    with self.written():
                        show_batch(values, self.stream)
            case "start":
                self._note(describe_start(values))
            case "progress":
                left = values.get("left_seconds")
                loss = f"loss {number(values.get('loss'))}"
                self.move("step", event.step, values["total"], loss, f"{duration(left)} left" if left else "")
            case "evaluation":
                self._note(describe_evaluation(event.step, values))
            case "resume":
                self._note(f"resuming from step {event.step}: {values.get('path', '')}")
            case "nothing_left" | "trunk":
                self._note(values["text"])
            case "early_stopping":
                self._note(f"step {event.step}: stopping early: {values.get('text', '')}")
            case "finding" | "diagnosis" | "bad_step" | "memory" | "warning":
                self.line(describe_trouble(event))
            case "finish":
                self.close_bar()
                if text := describe_planned(values["cost"]):
                    self._note(text)

    def _note(self, text: str) -> None:
        if not self.quiet:
            self.line(text)


def describe_evaluation(step: int, values: dict[str, Any]) -> str:
    """Return a line on an evaluation during training: step, metrics, loss, and whether it is the best so far."""
    shown = ", ".join(
        f"{name} {number(value)}"
        for name, value in values.items()
        if name not in NOT_SHOWN and isinstance(value, int | float) and not isinstance(value, bool)
    )
    best = " (the best so far)" if values.get("best") is True else ""
    return f"step {step}: validation {shown}, loss {number(values.get('loss'))}{best}"


def describe_trouble(event: Event) -> str:
    """Return the text of an issue, a diagnosis or a warning, with its hint."""
    values = event.values
    text = printable(values.get("text") or values.get("message") or "")
    where = f"step {event.step}: " if event.step else ""
    hint = f"\n  hint: {printable(values['hint'])}" if values.get("hint") else ""
    example = f"\n  for instance: {printable(values['example'])}" if values.get("example") else ""
    return f"{where}{event.kind.replace('_', ' ')}: {text}{example}{hint}"


def describe_planned(cost: dict[str, Any]) -> str:
    """Return a line on what a run took beside what was planned, or "" if it was not planned or not measured."""
    shown = [
        f"{name} {text(cost[key])} (planned {text(cost[f'planned_{key}'])})"
        for name, key, text in (("memory", "peak_memory_bytes", byte_size), ("a step", "step_seconds", seconds))
        if cost.get(key) is not None and f"planned_{key}" in cost
    ]
    return ", ".join(shown)


def describe_start(values: dict[str, Any]) -> str:
    """Return a summary of a run before its first step: parameters, steps, learning rate, device."""
    parameters = values["parameters"]
    where = f"{values['device']}, {values['compute_type']}"
    if (base := values["model_dtype"]) != "float32" or values["compute_type"] != base:
        where += f", base in {base}"
    if quantization := values.get("quantization"):
        where += f", base in {quantization['name']}"
    if values["processes"] > 1:
        where += f", {values['processes']} processes"
    steps = f"{values['total_steps']:,} steps of {values['rows_per_step']} rows"
    epochs = f"{values['steps_per_epoch']:,} an epoch"
    leaves = "".join(f"\nleaves out {text}" for text in values.get("left_out", ()))
    return (
        f"{values['method']}: trains {count(parameters['trained'])} of {count(parameters['total'])} parameters"
        f" ({share(parameters['share'])}), {count(parameters['head'])} of them in the head{leaves}\n"
        f"{steps} ({epochs}), learning rate {values['learning_rate']:g}, on {where}"
    )
