"""The active adapters of a model: one object shared by all adapted layers, so that switching is one assignment."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from graftwerk.errors import ConfigError
from graftwerk.kernels.recompute import ActivationTable

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


@dataclass(frozen=True)
class RowGroup:
    """Rows of a batch that use the same adapter.

    Attributes:
        name: The adapter, or None for the bare base.
        index: Row numbers, (S,) int64.
    """

    name: str | None
    index: Tensor


class ActiveAdapters:
    """The active adapters of one model.

    Attributes:
        names: Adapters applied, in order, to every row. Ignored while ``rows`` is set.
        rows: An adapter, or None for the bare base, for each row of the batch; None when all rows use ``names``.
        merged: Adapters that are merged into the base's weights now; their heads still apply.
        activations: The kernels' table of living activations.
    """

    __slots__ = ("_cache", "activations", "merged", "names", "rows")

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.merged: frozenset[str] = frozenset()
        self.rows: tuple[str | None, ...] | None = None
        self.activations = ActivationTable()
        self._cache: dict[Hashable, Any] = {}

    def choose(self, names: tuple[str, ...]) -> None:
        """Apply these adapters, in order, to every row."""
        self.names, self.rows, self._cache = names, None, {}

    def choose_rows(self, rows: tuple[str | None, ...]) -> None:
        """Apply to each row of the next batches its own adapter, or none."""
        self.rows, self._cache = rows, {}

    def cached(self, key: Key, make: Callable[[Key], Made]) -> Made:
        """Return the value made for this key since adapters were last chosen, made now if there is none."""
        found = self._cache.get(key)
        if found is None:
            with torch.inference_mode(False):  # it may be of use in training too
                found = self._cache[key] = make(key)
        return found

    def clear_cache(self) -> None:
        """Drop the cached values: the tensors that they were made from may be others now."""
        self._cache.clear()  # in place: `disabled` holds on to it

    def used(self) -> tuple[str, ...]:
        """Return every adapter that the next batch involves."""
        if self.rows is None:
            return self.names
        return tuple(dict.fromkeys(name for name in self.rows if name is not None))

    def repeats(self, size: int) -> int:
        """Return the number of consecutive entries of a tensor's row dimension that belong to each named row.

        Beam search repeats every row, and some layers flatten (B, T) to (B·T): both keep a row's entries together.

        Raises:
            ConfigError: the batch is not a multiple of the rows that were named.
        """
        assert self.rows is not None
        if size % len(self.rows):
            raise ConfigError(
                f"adapters were named for {len(self.rows)} rows, but the batch has {size}",
                where="activate(model, rows=...)",
                hint="name one adapter, or None, for each row of the batch",
            )
        return size // len(self.rows)

    def row_numbers(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Return row numbers (S,) on a device, the same tensor for all layers until other adapters are chosen."""
        return self.cached((rows, device), lambda _: torch.tensor(rows, device="cpu").to(device, non_blocking=True))

    def groups(self, size: int, device: torch.device) -> tuple[RowGroup, ...]:
        """Return the rows of a batch of ``size``, grouped by adapter, the bare base included."""
        return self.cached(("groups", size, device), lambda _: self._grouped(size, device))

    def _grouped(self, size: int, device: torch.device) -> tuple[RowGroup, ...]:
        repeats = self.repeats(size)
        members: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.rows or ()):
            members.setdefault(name, []).extend(range(row * repeats, (row + 1) * repeats))
        return tuple(
            RowGroup(name, torch.tensor(index, dtype=torch.long, device="cpu").to(device, non_blocking=True))
            for name, index in members.items()
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Use no adapter inside the block."""
        names, rows, cache = self.names, self.rows, self._cache
        self.names, self.rows = (), None
        try:
            yield
        finally:
            self.names, self.rows, self._cache = names, rows, cache

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without caches, so that copies of a model do not copy batched adapters."""
        return {"names": self.names, "rows": self.rows, "merged": self.merged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.names, self.rows, self.merged = state["names"], state["rows"], state["merged"]
        self.activations, self._cache = ActivationTable(), {}
