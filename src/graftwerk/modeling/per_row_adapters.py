"""Forward pass of one layer for a batch whose rows use different adapters.

Adapter modules of one kind run in one batched product (`kernels.batched_adapters`); if few adapters serve many rows,
each works on its own rows in turn, which reads its weights once and not once for every row. Rows without an adapter are
not touched: their bits are the base's.

Batched adapters are copies. Outside training they are cached until other rows are chosen, and made again if a tensor
that they came from has changed. In training they are made in every forward pass, since gradients go through them.

Legend: R named rows, S of them that a group serves, M vectors of each (its beams and tokens), i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from graftwerk.kernels import flags
from graftwerk.kernels.batched_adapters import BatchedAdapter, changes_input, changes_output, per_entry
from graftwerk.kernels.dispatch import BATCHED
from graftwerk.kernels.versioned_cache import VersionedCache
from graftwerk.methods.base import AdapterModule
from graftwerk.modeling.active_adapters import ActiveAdapters
from graftwerk.modeling.adapter_slots import AdapterSlots

Made = TypeVar("Made")
Where = slice | Tensor | None
"""Rows of a batch: those of a slice, those with these numbers (S,), or all."""
MAX_PADDING_RATIO = 4
"""Ranks further apart than this are batched apart, not padded to each other."""
SEQUENTIAL_ROWS = 16
"""From this many rows per adapter on (on average) adapters run in turn. Measured on SmolLM2-135M, 32 to 256 rows:
batching is faster up to here, equal beyond, and slower only with one adapter for all; but it copies an adapter per row.
"""


def forward_rows(slots: AdapterSlots, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``layer(x)`` with each row's own adapter.

    Args:
        slots: The layer's slots.
        layer: Its own forward.
        x: (R·k, ..., i), a row's k entries together, or (T, R·k, ..., i) if ``slots.row_dim`` is 1.

    Returns:
        (R·k, ..., o) or (T, R·k, ..., o).
    """
    selection = slots.selection
    selection.repeats(x.shape[slots.row_dim])  # raises for a batch of another size
    groups = selection.cached((slots, slots.training, flags.enabled("rows")), row_groups)
    working = [(group, group.adapters()) for group in groups]
    rows_second = bool(slots.row_dim)
    if rows_second:
        x = x.transpose(0, 1).contiguous()  # (R·k, T, ..., i)
    for group, batched in working:
        x = group.pre_forward(batched, x)
    y = layer(x.transpose(0, 1)).transpose(0, 1).contiguous() if rows_second else layer(x)
    for group, batched in working:
        y = group.post_forward(batched, x, y)
    return y.transpose(0, 1) if rows_second else y


def row_groups(key: tuple[AdapterSlots, bool, bool]) -> tuple[Group, ...]:
    """Return the rows of a layer's batch by the adapters they use there: groups with disjoint rows."""
    slots, _, may_stack = key
    rows = slots.selection.rows or ()
    kinds: dict[Hashable, dict[int, AdapterModule]] = {}
    alone: dict[int, AdapterModule] = {}
    for row, name in enumerate(rows):
        if isinstance(module := slots.get(name), AdapterModule):
            kernel = BATCHED.get(type(module)) if may_stack else None
            kind = None if kernel is None else kernel.batch_key(module)
            (alone if kind is None else kinds.setdefault((kernel, kind), {}))[row] = module
    groups: list[Group] = []
    for members in kinds.values():
        if len(members) < SEQUENTIAL_ROWS * len({id(module) for module in members.values()}):
            groups.extend(BatchedGroup(alike, slots.selection) for alike in _by_padded_dim(members))
        else:
            alone.update(members)
    if alone:
        groups.append(SequentialGroups(alone, slots.selection))
    return tuple(groups)


def _by_padded_dim(members: dict[int, AdapterModule]) -> list[dict[int, AdapterModule]]:
    dims = {row: BATCHED[type(module)].padded_dim(module) for row, module in members.items()}
    ordered = sorted(members.items(), key=lambda item: dims[item[0]])
    found: list[dict[int, AdapterModule]] = []
    least = 0
    for row, module in ordered:
        if not found or dims[row] > MAX_PADDING_RATIO * least:
            found.append({})
            least = dims[row]
        found[-1][row] = module
    return [dict(sorted(alike.items())) for alike in found]


_ALONE = BatchedAdapter((), torch.empty(0, device="cpu"))


class SequentialGroups:
    """Rows whose adapters run one after the other, each on its own rows.

    Args:
        members: The adapter module of each row served here.
        selection: The active adapters, of R rows.
    """

    def __init__(self, members: dict[int, AdapterModule], selection: ActiveAdapters) -> None:
        self.entries = len(selection.rows or ())
        by_module: dict[AdapterModule, list[int]] = {}
        for row, module in sorted(members.items()):
            by_module.setdefault(module, []).append(row)
        self.groups = [(_RowIndex(rows, selection), module) for module, rows in by_module.items()]

    def adapters(self) -> BatchedAdapter:
        """Return a batched adapter that does nothing: the modules run one by one."""
        return _ALONE

    def pre_forward(self, batched: BatchedAdapter, x: Tensor) -> Tensor:
        """Return x (R·k, ..., i) with the served rows changed."""
        for row_index, module in self.groups:
            if changes_input(type(module)):
                rows = _by_entry(x, self.entries)
                own = row_index.of(rows)
                x = row_index.put(rows, own, module.pre_forward(own), fresh=False).view(x.shape)
        return x

    def post_forward(self, batched: BatchedAdapter, x: Tensor, y: Tensor) -> Tensor:
        """Return y (R·k, ..., o) with the served rows changed; x (R·k, ..., i) is the input."""
        given, made = _by_entry(x, self.entries), _by_entry(y, self.entries)
        for row_index, module in self.groups:
            if changes_output(type(module)):
                own = row_index.of(made)
                made = row_index.put(made, own, module.post_forward(row_index.of(given), own), fresh=True)
        return made.view(y.shape)


class BatchedGroup:
    """Rows whose adapters run in one batched product; all have one `batch_key`.

    Args:
        members: The adapter module of each row served here.
        selection: The active adapters, of R rows.
    """

    def __init__(self, members: dict[int, AdapterModule], selection: ActiveAdapters) -> None:
        self.entries, self.modules = len(selection.rows or ()), list(members.values())
        self.row_index = _RowIndex(list(members), selection)
        self.kernel = BATCHED[type(self.modules[0])]
        distinct = list(dict.fromkeys(self.modules))
        self._scales: Tensor | None = None
        self.cache: VersionedCache[BatchedAdapter] = VersionedCache(
            [tensor for module in distinct for tensor in self.kernel.source_tensors(module)],
            [parameter for module in distinct for parameter in module.parameters()],
        )

    def adapters(self) -> BatchedAdapter:
        """Return the batched adapter, cached while its tensors do not change."""
        return self.cache.get(lambda: self.kernel(self.modules, self._scales_on_device()))

    def _scales_on_device(self) -> Tensor:
        """Return the scales (S, 1, 1), moved once, though training builds the batched adapter in every pass."""
        scales = [scale for module in self.modules if (scale := self.kernel.scale_of(module)) is not None]
        like = next(self.modules[0].parameters(), None)
        if self._scales is None or (like is not None and self._scales.device != like.device):
            with torch.inference_mode(False):
                self._scales = torch.empty(0, device="cpu") if like is None else per_entry(scales, like)
        return self._scales

    def pre_forward(self, batched: BatchedAdapter, x: Tensor) -> Tensor:
        """Return x (R·k, ..., i) with the served rows changed."""
        if not changes_input(self.kernel):
            return x
        if self.row_index.all_rows:
            return _as(batched.pre_forward(_by_entry(x, self.entries)), x)
        rows = _by_entry(x, self.entries)
        own = self.row_index.of(rows)
        return self.row_index.put(rows, own, batched.pre_forward(own), fresh=False).view(x.shape)

    def post_forward(self, batched: BatchedAdapter, x: Tensor, y: Tensor) -> Tensor:
        """Return y (R·k, ..., o) with the served rows changed; x (R·k, ..., i) is the input."""
        if not changes_output(self.kernel):
            return y
        if self.row_index.all_rows:
            return _as(batched.post_forward(_by_entry(x, self.entries), _by_entry(y, self.entries)), y)
        given, made = _by_entry(x, self.entries), _by_entry(y, self.entries)
        own = self.row_index.of(made)
        return self.row_index.put(made, own, batched.post_forward(self.row_index.of(given), own), fresh=True).view(
            y.shape
        )


Group = SequentialGroups | BatchedGroup


class _RowIndex:
    """Rows of a batch among its R entries: how they are gathered and put back."""

    def __init__(self, rows: Sequence[int], selection: ActiveAdapters) -> None:
        self.rows, self.selection = tuple(rows), selection
        self.where: Where = None
        self._apart = len(rows) < rows[-1] - rows[0] + 1
        if not self._apart and len(rows) < len(selection.rows or ()):
            self.where = slice(rows[0], rows[-1] + 1)

    @property
    def all_rows(self) -> bool:
        """True if every row of the batch is served."""
        return self.where is None and not self._apart

    def of(self, tensor: Tensor) -> Tensor:
        """Return the served rows (S, M, w) of a tensor (R, M, w): a view if they stand together."""
        where = self._on(tensor.device)
        return tensor if where is None else tensor[where]

    def put(self, tensor: Tensor, own: Tensor, new: Tensor, *, fresh: bool) -> Tensor:
        """Return ``tensor`` (R, M, w) with ``new`` in place of ``own``, which was taken from it.

        Args:
            tensor: (R, M, w).
            own: (S, M, w), the rows of ``tensor`` as `of` returned them.
            new: (S, M, w), their new values.
            fresh: True if nobody else has this tensor, so that outside autograd it can be changed in place.
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
        if self._apart and (self.where is None or self.where.device != device):  # type: ignore[union-attr]
            self.where = self.selection.row_numbers(self.rows, device)
        return self.where


def _by_entry(tensor: Tensor, entries: int) -> Tensor:
    """Reshape (R·k, ..., w) to (R, M, w)."""
    if tensor.dim() == 3 and tensor.shape[0] == entries:
        return tensor
    return tensor.reshape(entries, -1, tensor.shape[-1])


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """Reshape (R, M, w) to (R·k, ..., w)."""
    return tensor if tensor.dim() == like.dim() == 3 and tensor.shape[0] == like.shape[0] else tensor.view(like.shape)
