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
from typing import TypeVar

import torch
from torch import Tensor

from graftwerk.kernels import flags as fast
from graftwerk.kernels.batched_adapters import BatchedAdapter, changes_input, changes_output
from graftwerk.kernels.dispatch import BATCHED
from graftwerk.kernels.versioned_cache import VersionedCache
from graftwerk.methods.base import AdapterModule
from graftwerk.modeling.adapter_slots import AdapterSlots

Made = TypeVar("Made")
Where = slice | Tensor | None
"""Rows of a batch: those of a slice, those with these numbers (S,), or all."""
MAX_PADDING_RATIO = 4
"""Ranks further apart than this are not filled up to each other but stacked apart."""
SEQUENTIAL_ROWS = 16
"""From so many rows an adapter on (on average) they work in turn. Measured on SmolLM2-135M, 32 to 256 rows: stacks are
faster up to here, even from there on, and slower only with one adapter for all; but they hold an adapter once a row.
"""


def forward_rows(box: AdapterSlots, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` with each row's own adapter; x (R·k, ..., i) -> (R·k, ..., o), a row's k entries together, or
    (T, R·k, ..., i) -> (T, R·k, ..., o) where ``box.row_dim`` is 1.
    """
    selection = box.selection
    selection.repeats(x.shape[box.row_dim])
    working = [
        (part, part.adapters()) for part in selection.cached((box, box.training, fast.enabled("rows")), row_groups)
    ]
    if box.row_dim:
        return _rows_last(working, layer, x)
    for part, deltas in working:
        x = part.pre_forward(deltas, x)
    y = layer(x)
    for part, deltas in working:
        y = part.post_forward(deltas, x, y)
    return y


def _rows_last(working: Sequence[tuple[Group, BatchedAdapter]], layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`through_rows` on (T, R·k, ..., i)."""
    x = x.transpose(0, 1).contiguous()
    for part, deltas in working:
        x = part.pre_forward(deltas, x)
    y = layer(x.transpose(0, 1)).transpose(0, 1).contiguous()
    for part, deltas in working:
        y = part.post_forward(deltas, x, y)
    return y.transpose(0, 1)


def row_groups(key: tuple[AdapterSlots, bool, bool]) -> tuple[Group, ...]:
    """The rows of a layer's batch by what they use there: parts whose rows are disjoint."""
    box, _, may_stack = key
    rows = box.selection.rows or ()
    kinds: dict[Hashable, dict[int, AdapterModule]] = {}
    alone: dict[int, AdapterModule] = {}
    for row, name in enumerate(rows):
        if isinstance(delta := box.get(name), AdapterModule):
            kernel = BATCHED.get(type(delta)) if may_stack else None
            kind = None if kernel is None else kernel.batch_key(delta)
            (alone if kind is None else kinds.setdefault((kernel, kind), {}))[row] = delta
    parts: list[Group] = []
    for members in kinds.values():
        if len(members) < SEQUENTIAL_ROWS * len({id(delta) for delta in members.values()}):
            parts.extend(BatchedGroup(alike, len(rows)) for alike in _by_padded_dim(members))
        else:
            alone.update(members)
    if alone:
        parts.append(SequentialGroups(alone, len(rows)))
    return tuple(parts)


def _by_padded_dim(members: dict[int, AdapterModule]) -> list[dict[int, AdapterModule]]:
    dims = {row: BATCHED[type(delta)].padded_dim(delta) for row, delta in members.items()}
    ordered = sorted(members.items(), key=lambda item: dims[item[0]])
    found: list[dict[int, AdapterModule]] = []
    least = 0
    for row, delta in ordered:
        if not found or dims[row] > MAX_PADDING_RATIO * least:
            found.append({})
            least = dims[row]
        found[-1][row] = delta
    return [dict(sorted(alike.items())) for alike in found]


_ALONE = BatchedAdapter(())


class SequentialGroups:
    """Rows whose deltas work one after the other, each on its own rows."""

    def __init__(self, members: dict[int, AdapterModule], entries: int) -> None:
        """``members``: the delta of each row that this part serves; ``entries``: R."""
        self.entries = entries
        by_delta: dict[AdapterModule, list[int]] = {}
        for row, delta in sorted(members.items()):
            by_delta.setdefault(delta, []).append(row)
        self.groups = [(_RowIndex(rows, entries), delta) for delta, rows in by_delta.items()]

    def adapters(self) -> BatchedAdapter:
        return _ALONE

    def pre_forward(self, deltas: BatchedAdapter, x: Tensor) -> Tensor:
        for places, delta in self.groups:
            if changes_input(type(delta)):
                rows = _by_entry(x, self.entries)
                own = places.of(rows)
                x = places.put(rows, own, delta.pre_forward(own), fresh=False).view(x.shape)
        return x

    def post_forward(self, deltas: BatchedAdapter, x: Tensor, y: Tensor) -> Tensor:
        given, made = _by_entry(x, self.entries), _by_entry(y, self.entries)
        for places, delta in self.groups:
            if changes_output(type(delta)):
                own = places.of(made)
                made = places.put(made, own, delta.post_forward(places.of(given), own), fresh=True)
        return made.view(y.shape)


class BatchedGroup:
    """Rows whose deltas are stacked."""

    def __init__(self, members: dict[int, AdapterModule], entries: int) -> None:
        """As `SequentialGroups`; all adapters have one `batch_key`."""
        self.entries, self.deltas = entries, list(members.values())
        self.places = _RowIndex(list(members), entries)
        self.kernel = BATCHED[type(self.deltas[0])]
        distinct = list(dict.fromkeys(self.deltas))
        self.cache: VersionedCache[BatchedAdapter] = VersionedCache(
            [tensor for delta in distinct for tensor in self.kernel.source_tensors(delta)],
            [parameter for delta in distinct for parameter in delta.parameters()],
        )

    def adapters(self) -> BatchedAdapter:
        return self.cache.get(lambda: self.kernel(self.deltas))

    def pre_forward(self, deltas: BatchedAdapter, x: Tensor) -> Tensor:
        if not changes_input(self.kernel):
            return x
        if self.places.where is None:
            return _as(deltas.pre_forward(_by_entry(x, self.entries)), x)
        rows = _by_entry(x, self.entries)
        own = self.places.of(rows)
        return self.places.put(rows, own, deltas.pre_forward(own), fresh=False).view(x.shape)

    def post_forward(self, deltas: BatchedAdapter, x: Tensor, y: Tensor) -> Tensor:
        if not changes_output(self.kernel):
            return y
        if self.places.where is None:
            return _as(deltas.post_forward(_by_entry(x, self.entries), _by_entry(y, self.entries)), y)
        given, made = _by_entry(x, self.entries), _by_entry(y, self.entries)
        own = self.places.of(made)
        return self.places.put(made, own, deltas.post_forward(self.places.of(given), own), fresh=True).view(y.shape)


Group = SequentialGroups | BatchedGroup


class _RowIndex:
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
