"""`layers`: the choice of layers that a method adapts, parsed and applied here alone.

A *stack* is a list of layers one on top of the other, counted from 0 at the input. Decoder-only models and encoders
have one; an encoder-decoder has two, and a choice means the same layers of each, unless it begins with ``encoder:`` or
``decoder:``. Modules outside the layers (embeddings, the last norm, a pooler) are left out as soon as layers are
chosen.

Why the highest ones: the layers below the lowest adapted one need no backward pass, and their output is the same in
every epoch, so that it is computed once (`training/activation_cache`). The lower layers of a pretrained model change
least in full fine-tuning (Merchant et al. 2020, arXiv:2004.14448).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from pydantic import AliasChoices, Field, field_validator

from graftwerk.errors import ConfigError
from graftwerk.methods.base import Method

_CHOICE = re.compile(r"(?:(encoder|decoder):)?(?:(top-\d+)|(\d+)-(\d+)|(\d+)|)")
WHERE = "method.layers"


class HasLayer(Protocol):
    """A candidate of a choice: it stands in a layer of a stack, or (None) outside of all layers."""

    @property
    def stack(self) -> str | None:
        """Return the name of the stack, `encoder` or `decoder`, or None outside of all layers."""

    @property
    def layer(self) -> int | None:
        """Return the layer's number within the stack, from 0, or None outside of all layers."""


P = TypeVar("P", bound=HasLayer)


class LayerSelection(Method):
    """Abstract: a method that works inside layers and can be restricted to some of them."""

    layers: str | tuple[int, ...] | None = Field(
        default=None,
        validation_alias=AliasChoices("layers", "layers_to_transform"),
        description="top-4 (the four highest), 8-11 (both included, counted from 0), [8, 10], or null for all; in an "
        "encoder-decoder the same layers of both, or one of them: encoder:top-2, decoder:0-3, decoder:",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _chosen(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("`layers` cannot be true or false")
        if isinstance(value, int):
            value = (value,)
        if isinstance(value, list | tuple | set | range):
            return _numbers(value)
        if isinstance(value, str):
            return _text(value)
        return value

    def filter_layers(self, candidates: Sequence[P], known: Sequence[P] | None = None) -> list[P]:
        """Return the candidates in the chosen layers, or all of them if none were chosen.

        Args:
            candidates: What to choose among.
            known: Everything in the model's layers, which gives their number; the candidates if None.

        Raises:
            ConfigError: the model has no such layer or stack, or the candidates have none in the chosen layers.
        """
        if self.layers is None:
            return list(candidates)
        wanted = self._wanted(_depths(candidates if known is None else known))
        chosen = [
            target for target in candidates if target.layer is not None and target.layer in wanted.get(target.stack, ())
        ]
        if not chosen:
            there = sorted({target.layer for target in candidates if target.layer is not None})
            raise ConfigError(
                f"`{layers_text(self.layers)}`: what this method adapts is in none of the chosen layers",
                where=WHERE,
                hint=f"it is in the layers {ranges(there)}"
                if there
                else "it is in no layer at all; leave `layers` out",
            )
        return chosen

    def _wanted(self, depths: dict[str | None, int]) -> dict[str | None, frozenset[int]]:
        """Return the numbers of the chosen layers, by stack."""
        if not depths:
            raise ConfigError(
                "which layers this model has is not known", where=WHERE, hint="leave `layers` out, or name modules"
            )
        assert self.layers is not None
        side, top, numbers = _parsed(self.layers)
        if side is not None:
            if not {"encoder", "decoder"} <= {*depths}:
                raise ConfigError(
                    f"`{layers_text(self.layers)}`: this model has one stack of layers, not an encoder and a decoder",
                    where=WHERE,
                    hint=f"leave `{side}:` out",
                )
            depths = {side: depths[side]}
        wanted = {}
        for stack, depth in depths.items():
            if (top is not None and top > depth) or (numbers and max(numbers) >= depth):
                called = f"its {stack}" if len(depths) > 1 or side else "this model"
                raise ConfigError(
                    f"`{layers_text(self.layers)}`: {called} has {depth} layers, 0-{depth - 1}",
                    where=WHERE,
                    hint=f"top-1 to top-{depth}, or numbers from 0 to {depth - 1}",
                )
            if top is not None:
                wanted[stack] = frozenset(range(depth - top, depth))
            else:
                wanted[stack] = frozenset(range(depth)) if numbers is None else frozenset(numbers)
        return wanted


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = list(values)
    if not numbers:
        raise ValueError("the list of layers is empty: nothing would be adapted")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("layers are whole numbers from 0")
    return tuple(sorted({*numbers}))


def _text(value: str) -> Any:
    text = "".join(value.split()).lower()
    if text in ("all", "null", "none"):
        return None
    match = _CHOICE.fullmatch(text)
    if match is None or not text:
        raise ValueError("layers are chosen as top-4, 8-11, a list of numbers, or null for all")
    side, top, first, last, one = match.groups()
    if top == "top-0" or (top and int(top[4:]) == 0):
        raise ValueError("top-0 chooses no layer: nothing would be adapted")
    if first is not None and int(first) > int(last):
        raise ValueError(f"{first} is above {last}: ranges go from the lower to the higher layer")
    return (int(one),) if one is not None and side is None else text


def _parsed(layers: str | tuple[int, ...]) -> tuple[str | None, int | None, tuple[int, ...] | None]:
    """Return (side, number of highest layers, layer numbers); all layers if the latter two are None."""
    if isinstance(layers, tuple):
        return None, None, layers
    match = _CHOICE.fullmatch(layers)
    assert match is not None
    side, top, first, last, one = match.groups()
    if top is not None:
        return side, int(top.removeprefix("top-")), None
    if first is not None:
        return side, None, tuple(range(int(first), int(last) + 1))
    return side, None, None if one is None else (int(one),)


def _depths(targets: Sequence[HasLayer]) -> dict[str | None, int]:
    """Return the number of layers of each stack."""
    depths: dict[str | None, int] = {}
    for target in targets:
        if target.layer is not None:
            depths[target.stack] = max(depths.get(target.stack, 0), target.layer + 1)
    return depths


def layers_text(layers: str | Sequence[int]) -> str:
    """Return a choice as it is written in a run file."""
    return f"layers: {layers if isinstance(layers, str) else list(layers)}"


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text, runs joined.

    Example:
        >>> ranges([0, 1, 2, 5])
        '0-2, 5'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
