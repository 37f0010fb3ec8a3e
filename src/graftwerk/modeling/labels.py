"""The label names in a model's configuration: those of the adapter whose head is active.

`pipeline` names classes by them, and the model's own loss counts them. The base's own come back when no adapter with
names of its own is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class _Shown:
    """The label settings of a configuration."""

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None


class LabelNames:
    """The label names of a base, and those that its configuration shows now."""

    def __init__(self) -> None:
        self._base: _Shown | None = None  # kept while an adapter's names are shown
        self._now: tuple[str, ...] | None = None

    def of_base(self, model: nn.Module) -> list[str]:
        """Return the base's own label names, by index."""
        named = self._base.id2label if self._base is not None else getattr(model.config, "id2label", None) or {}
        return [str(named[index]) for index in sorted(named)]

    def show(self, model: nn.Module, labels: Sequence[str] | None) -> None:
        """Put these label names into the configuration, or the base's own if ``labels`` is None."""
        wanted = None if labels is None else tuple(labels)
        if wanted == self._now:
            return
        config: Any = model.config
        if self._base is None:
            self._base = _Shown(dict(config.id2label), dict(config.label2id), getattr(config, "problem_type", None))
        base, self._now = self._base, wanted
        if wanted is None:
            _set(model, base)
            self._base = None
            return
        # The loss is chosen by the number of labels; one that was chosen for another number does not count.
        same = (len(wanted) == 1) == (len(base.id2label) == 1)
        _set(
            model,
            _Shown(
                dict(enumerate(wanted)),
                {name: index for index, name in enumerate(wanted)},
                base.problem_type if same else None,
            ),
        )


def _set(model: nn.Module, shown: _Shown) -> None:
    config: Any = model.config
    config.id2label, config.label2id = dict(shown.id2label), dict(shown.label2id)
    if hasattr(config, "problem_type"):
        config.problem_type = shown.problem_type
    if "num_labels" in model.__dict__:  # which most classifiers keep beside the configuration
        model.__dict__["num_labels"] = len(shown.id2label)
