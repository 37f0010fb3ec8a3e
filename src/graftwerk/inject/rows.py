"""What one layer does for a batch whose rows use different adapters.

Deltas of one kind are stacked and answer in one batched product (`methods.stacked`); where few adapters serve many
rows, each works on its own rows in turn, which reads its weights once and not once for every row. Rows without an
adapter are not touched: theirs are the base's bits.

Stacks are copies. Outside training they are kept until other rows are chosen, and made again where a tensor that they
came from has changed since. In training they are made in every forward pass, since gradients go through them.

Legend: R named rows, S of them that a part serves, M vectors of each (its beams and tokens), i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Generic, TypeVar

import torch
from torch import Tensor

from graftwerk import fast
from graftwerk.inject.record import Box
from graftwerk.methods.base import Delta
from graftwerk.methods.stacked import StackedDelta

Made = TypeVar("Made")
Where = slice | Tensor | None
"""Rows of a batch: those of a slice, those with these numbers (S,), or all."""
SPREAD = 4
"""Ranks further apart than this are not filled up to each other but stacked apart."""
ROWS_IN_TURN = 16
"""From so many rows an adapter on (on average) they work in turn. Measured on SmolLM2-135M, 32 to 256 rows: stacks are
faster up to here, even from there on, and slower only with one adapter for all; but they hold an adapter once a row.
"""


def through_rows(box: Box, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` with each row's own adapter; x (R·k, ..., i) -> (R·k, ..., o), a row's k entries together, or
    (T, R·k, ..., i) -> (T, R·k, ..., o) where ``box.row_dim`` is 1.
    """
    selection = box.selection
    selection.repeats(x.shape[box.row_dim])
    working = [(part, part.now()) for part in selection.kept((box, box.training, fast.enabled("rows")), parts_of)]
    if box.row_dim:
        return _rows_last(working, layer, x)
    for part, deltas in working:
        x = part.enter(deltas, x)
    y = layer(x)
    for part, deltas in working:
        y = part.leave(deltas, x, y)
    return y


def _rows_last(working: Sequence[tuple[Part, StackedDelta]], layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`through_rows` on (T, R·k, ..., i)."""
    x = x.transpose(0, 1).contiguous()
    for part, deltas in working:
        x = part.enter(deltas, x)
    y = layer(x.transpose(0, 1)).transpose(0, 1).contiguous()
    for part, deltas in working:
        y = part.leave(deltas, x, y)
    return y.transpose(0, 1)


def parts_of(key: tuple[Box, bool, bool]) -> tuple[Part, ...]:
    """The rows of a layer's batch by what they use there: parts whose rows are disjoint."""
    box, _, may_stack = key
    rows = box.selection.rows or ()
    kinds: dict[Hashable, dict[int, Delta]] = {}
    alone: dict[int, Delta] = {}
    for row, name in enumerate(rows):
        if isinstance(delta := box.get(name), Delta):
            kin = delta.kin() if may_stack else None
            (alone if kin is None else kinds.setdefault((type(delta), kin), {}))[row] = delta
    parts: list[Part] = []
    for members in kinds.values():
        if len(members) < ROWS_IN_TURN * len({id(delta) for delta in members.values()}):
            parts.extend(Gathered(alike, len(rows)) for alike in _of_like_breadth(members))
        else:
            alone.update(members)
    if alone:
        parts.append(InTurn(alone, len(rows)))
    return tuple(parts)


def _of_like_breadth(members: dict[int, Delta]) -> list[dict[int, Delta]]:
    ordered = sorted(members.items(), key=lambda item: item[1].breadth)
    found: list[dict[int, Delta]] = []
    least = 0
    for row, delta in ordered:
        if not found or delta.breadth > SPREAD * least:
            found.append({})
            least = delta.breadth
        found[-1][row] = delta
    return [dict(sorted(alike.items())) for alike in found]


_ALONE = StackedDelta()


class InTurn:
    """Rows whose deltas work one after the other, each on its own rows."""

    def __init__(self, members: dict[int, Delta], entries: int) -> None:
        """``members``: the delta of each row that this part serves; ``entries``: R."""
        self.entries = entries
        by_delta: dict[Delta, list[int]] = {}
        for row, delta in sorted(members.items()):
            by_delta.setdefault(delta, []).append(row)
        self.groups = [(_Places(rows, entries), delta) for delta, rows in by_delta.items()]

    def now(self) -> StackedDelta:
        return _ALONE

    def enter(self, deltas: StackedDelta, x: Tensor) -> Tensor:
        for places, delta in self.groups:
            if type(delta).enter is not Delta.enter:
                rows = _by_entry(x, self.entries)
                own = places.of(rows)
                x = places.put(rows, own, delta.enter(own), fresh=False).view(x.shape)
        return x

    def leave(self, deltas: StackedDelta, x: Tensor, y: Tensor) -> Tensor:
        given, made = _by_entry(x, self.entries), _by_entry(y, self.entries)
        for places, delta in self.groups:
            if type(delta).leave is not Delta.leave:
                own = places.of(made)
                made = places.put(made, own, delta.leave(places.of(given), own), fresh=True)
        return made.view(y.shape)


class Gathered:
    """Rows whose deltas are stacked."""

    def __init__(self, members: dict[int, Delta], entries: int) -> None:
        """As `InTurn`; all deltas are of one kin."""
        self.entries, self.deltas = entries, list(members.values())
        self.places = _Places(list(members), entries)
        kind = type(self.deltas[0])
        self.enters, self.leaves = kind.enter is not Delta.enter, kind.leave is not Delta.leave
        distinct = list(dict.fromkeys(self.deltas))
        self.kept: Kept[StackedDelta] = Kept(
            [tensor for delta in distinct for tensor in delta.sources()],
            [parameter for delta in distinct for parameter in delta.parameters()],
        )

    def now(self) -> StackedDelta:
        return self.kept.now(lambda: self.deltas[0].stacked(self.deltas))

    def enter(self, deltas: StackedDelta, x: Tensor) -> Tensor:
        if not self.enters:
            return x
        if self.places.where is None:
            return _as(deltas.enter(_by_entry(x, self.entries)), x)
        rows = _by_entry(x, self.entries)
        own = self.places.of(rows)
        return self.places.put(rows, own, deltas.enter(own), fresh=False).view(x.shape)

    def leave(self, deltas: StackedDelta, x: Tensor, y: Tensor) -> Tensor:
        if not self.leaves:
            return y
        if self.places.where is None:
            return _as(deltas.leave(_by_entry(x, self.entries), _by_entry(y, self.entries)), y)
        given, made = _by_entry(x, self.entries), _by_entry(y, self.entries)
        own = self.places.of(made)
        return self.places.put(made, own, deltas.leave(self.places.of(given), own), fresh=True).view(y.shape)


Part = InTurn | Gathered


class Kept(Generic[Made]):
    """Something made from tensors: kept outside autograd, and made again when one of the tensors has changed."""

    def __init__(self, sources: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """``sources``: tensors whose versions tell of changes; ``parameters``: those that gradients may go to."""
        self.sources, self.parameters = sources, parameters
        self.stamp: object = None
        self.made: Made | None = None

    def now(self, make: Callable[[], Made]) -> Made:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters):
            return make()
        # A model that was moved or converted has its values elsewhere: one parameter tells of all.
        stamp = stamp_of([*self.sources, *self.parameters[:1]])
        if self.made is None or stamp is None or stamp != self.stamp:
            # Not as inference tensors: what is kept may be used where gradients are wanted for the input.
            with torch.inference_mode(False), torch.no_grad():
                self.made, self.stamp = make(), stamp
        return self.made


_version = attrgetter("_version")


def stamp_of(tensors: Sequence[Tensor]) -> object:
    """Changes with every change of a tensor that torch knows of; None where torch does not keep count."""
    try:
        return [*map(_version, tensors), *map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # inference tensors have no version
        return None


class _Places:
    """Rows of a batch among its R entries, and how theirs are taken out and put back."""

    def __init__(self, rows: Sequence[int], entries: int) -> None:
        self.rows = rows
        self.where: Where = None
        if len(rows) < entries:
            together = rows[-1] - rows[0] + 1 == len(rows)
            self.where = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows)

    def of(self, tensor: Tensor) -> Tensor:
        """(R, M, w) -> (S, M, w): a view where the rows stand together."""
        return tensor if self.where is None else tensor[self._on(tensor.device)]

    def put(self, tensor: Tensor, own: Tensor, new: Tensor, *, fresh: bool) -> Tensor:
        """``tensor`` with ``new`` in place of ``own``, which was taken from it.

        Args:
            fresh: Nobody else has this tensor, so that outside autograd it can be changed in place.
        """
        where = self._on(tensor.device)
        if where is None or (new is own and isinstance(where, slice)):
            return new if where is None else tensor
        if isinstance(where, slice):
            if fresh and not torch.is_grad_enabled():
                own.copy_(new)
                return tensor
            return torch.slice_scatter(tensor, new, 0, where.start, where.stop)
        if fresh and not torch.is_grad_enabled():
            return tensor.index_copy_(0, where, new)
        return tensor.index_copy(0, where, new)

    def _on(self, device: torch.device) -> Where:
        if isinstance(self.where, Tensor) and self.where.device != device:
            with torch.inference_mode(False):
                self.where = self.where.to(device)
        return self.where


def _by_entry(tensor: Tensor, entries: int) -> Tensor:
    """(R·k, ..., w) -> (R, M, w)."""
    if tensor.dim() == 3 and tensor.shape[0] == entries:
        return tensor
    return tensor.reshape(entries, -1, tensor.shape[-1])


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """(R, M, w) -> (R·k, ..., w)."""
    return tensor if tensor.dim() == like.dim() == 3 and tensor.shape[0] == like.shape[0] else tensor.view(like.shape)
