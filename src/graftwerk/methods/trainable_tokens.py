"""Trained rows: single rows of a vocabulary's tables, such as those of new special tokens, trained beside a method.

As `trainable_token_indices` of PEFT. With the rows R (n, d) for the tokens I (n,), which start as the base's W[I]:

    input side     e(t) = s R[i]           if t = I[i], else s W[t]           s the embedding's own factor, often 1
    output side    z_t  = R[i] h + b_t     if t = I[i], else W[t] h + b_t

A row is replaced, not shifted: what the base has there is not read, since new rows of a resized vocabulary are drawn
anew at each load. Modules that share one table (a tied head) share the trained rows.

Parameters: n d for each table, however many modules share it.

Legend: V tokens of the vocabulary, d width, n trained rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import ConfigError, UnsupportedError, did_you_mean
from graftwerk.methods.base import AdapterModule, Role, TargetModule
from graftwerk.methods.base_weights import base_weight
from graftwerk.methods.layer_selection import LayerSelection
from graftwerk.methods.placement import module_device
from graftwerk.methods.target_modules import endings

ROWS = "token_adapter.trainable_tokens_delta"
"""Name of the trained rows in a module's state dict. They are the rows themselves, in spite of the name."""
SETTING = "trainable_token_indices"
WHERE = f"method.{SETTING}"

TokenIndices = tuple[int, ...] | dict[str, tuple[int, ...]]
"""Rows of the input embedding, or of the tables that are named."""


class _Rows(nn.Module):
    """The parameter under the names of PEFT's files."""

    def __init__(self, rows: nn.Parameter) -> None:
        super().__init__()
        self.trainable_tokens_delta = rows


class TokenRows(AdapterModule):
    """Abstract: trained rows at one module of a table.

    Args:
        base: The module of the base. It is never registered as a child.
        indices: The rows' numbers, (n,) int64, all different.
        rows: R, (n, d), or None if the module shares the rows of another, which `follow` names.
    """

    token_indices: Tensor

    def __init__(self, base: nn.Module, indices: Tensor, rows: nn.Parameter | None) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, so that it is no child
        self._leader: tuple[TokenRows, ...] = ()
        if rows is not None:
            self.token_adapter = _Rows(rows)
        self.register_buffer("token_indices", indices, persistent=False)

    def follow(self, leader: TokenRows) -> None:
        """Use the rows of the module whose table this one shares."""
        self._leader = (leader,)

    @property
    def shares_weight(self) -> bool:
        return bool(self._leader)

    @property
    def rows(self) -> nn.Parameter:
        """R, (n, d)."""
        return (self._leader[0] if self._leader else self).token_adapter.trainable_tokens_delta

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.token_indices, self.rows.to(weight.dtype)), bias


class EmbeddedRows(TokenRows):
    """Trained rows at an embedding: s R[i] in place of s W[t] where the token t is I[i].

    Example:
        >>> table = nn.Embedding(4, 2)
        >>> rows = EmbeddedRows(table, torch.tensor([3, 1]), nn.Parameter(torch.tensor([[5.0, 6.0], [7.0, 8.0]])))
        >>> rows.post_forward(torch.tensor([0, 1, 3]), torch.zeros(3, 2)).tolist()
        [[0.0, 0.0], [7.0, 8.0], [5.0, 6.0]]
    """

    ordered: Tensor
    order: Tensor

    def __init__(self, base: nn.Module, indices: Tensor, rows: nn.Parameter | None) -> None:
        super().__init__(base, indices, rows)
        ordered, order = indices.sort()
        self.register_buffer("ordered", ordered, persistent=False)
        self.register_buffer("order", order, persistent=False)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("weight",)  # an embedding has no bias

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Replace the embeddings of the trained tokens.

        Args:
            x: Token ids, as many as ``y`` has vectors.
            y: Their embeddings, (..., d).

        Returns:
            (..., d), in the dtype of ``y``.
        """
        ids = x.reshape(y.shape[:-1])
        at = torch.searchsorted(self.ordered, ids).clamp_max(len(self.ordered) - 1)  # (...)
        trained = self.ordered[at] == ids
        rows = F.embedding(self.order[at], self.rows.to(y.dtype))  # (..., d)
        factor = getattr(self._base[0], "embed_scale", None)
        if factor is not None:
            rows = rows * (factor.to(y.dtype) if isinstance(factor, Tensor) else factor)
        return torch.where(trained[..., None], rows, y)


class ScoredRows(TokenRows):
    """Trained rows at a linear layer that scores the vocabulary: R[i] h + b_t in place of the score of t = I[i].

    Example:
        >>> head = nn.Linear(2, 3, bias=False)
        >>> rows = ScoredRows(head, torch.tensor([1]), nn.Parameter(torch.tensor([[5.0, 6.0]])))
        >>> rows.post_forward(torch.ones(2), torch.zeros(3)).tolist()
        [0.0, 11.0, 0.0]
    """

    def post_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Replace the scores of the trained tokens.

        Args:
            x: Hidden states, (..., d).
            y: Their scores, (..., V).

        Returns:
            (..., V), in the dtype of ``y``.
        """
        bias = self._base[0]._parameters.get("bias")
        own = None if bias is None else bias[self.token_indices].to(x.dtype)  # (n,)
        scores = F.linear(x, self.rows.to(x.dtype), own)  # (..., d) -> (..., n)
        return y.index_copy(-1, self.token_indices, scores.to(y.dtype))


# -- settings ---------------------------------------------------------------------------------------------------------


class TokenSelection(LayerSelection):
    """Abstract: a method that can train single rows of embeddings beside layers."""

    trainable_token_indices: TokenIndices | None = Field(
        None,
        description="token ids whose rows of the input embedding train too (of new special tokens, say), or lists of "
        "them by the names of embeddings",
    )

    @field_validator("trainable_token_indices", mode="before")
    @classmethod
    def _token_indices(cls, value: Any) -> Any:
        return checked_indices(value)

    def trained_rows(self, tables: Sequence[TargetModule]) -> dict[str, tuple[int, ...]]:
        return rows_by_table(tables, self.trainable_token_indices)

    def build_rows(self, table: TargetModule, module: nn.Module) -> TokenRows:
        """Build the module for one table, which starts as the base's rows."""
        return build_rows(table, module, token_indices(table, self.trainable_token_indices))

    def build_rows_from(
        self, table: TargetModule, module: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> TokenRows | None:
        """Build the module for one table around stored rows (n, d), or return None if they are not those it needs."""
        return stored_rows(table, module, token_indices(table, self.trainable_token_indices), parameters)

    def num_row_parameters(self, table: TargetModule) -> int:
        """Return n d for a table, 0 for one that shares another's."""
        if table.tied_to is not None:
            return 0
        return len(token_indices(table, self.trainable_token_indices)) * width(table)

    def connect(self, targets: Sequence[TargetModule], built: Mapping[str, AdapterModule]) -> None:
        """Let the modules that share a table share its trained rows."""
        for target in targets:
            if target.tied_to is not None:
                follower, leader = built[target.path], built[target.tied_to]
                assert isinstance(follower, TokenRows)
                assert isinstance(leader, TokenRows)
                follower.follow(leader)


def checked_indices(value: Any) -> TokenIndices | None:
    """Return the setting as tuples.

    Raises:
        ValueError: it is empty, or an index is no whole number from 0 or stands twice.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError("give the names of embeddings, each with a list of rows")
        return {name: _numbers(rows) for name, rows in value.items()}
    return _numbers(value)


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | range) or not value:
        raise ValueError("give at least one row of the embedding, as a list of token ids")
    seen: set[int] = set()
    for number in value:
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no row of an embedding: rows are whole numbers from 0")
        if number in seen:
            raise ValueError(f"row {number} stands twice")
        seen.add(number)
    return tuple(value)


# -- tables of a model ------------------------------------------------------------------------------------------------


def num_rows(table: TargetModule) -> int:
    """Return V of a table."""
    return table.in_features if table.role is Role.EMBEDDING else table.out_features


def width(table: TargetModule) -> int:
    """Return d of a table."""
    return table.out_features if table.role is Role.EMBEDDING else table.in_features


def rows_by_table(tables: Sequence[TargetModule], wanted: TokenIndices | None) -> dict[str, tuple[int, ...]]:
    """Return the rows to train by the path of their table, each table under the module that the others share it with.

    Raises:
        ConfigError: a name matches no table, or one that shares another's; or a row is out of range.
        UnsupportedError: the model has no input embedding, or rows of a table cannot be trained; the reason is given.
    """
    if wanted is None:
        return {}
    if isinstance(wanted, tuple):
        found = {table.path: wanted for table in tables if table.is_input}
        if not found:
            raise UnsupportedError(
                f"{SETTING}: this model has no embedding of tokens", where=WHERE, hint=f"leave {SETTING} out"
            )
    else:
        found = _named(tables, wanted)
    for table in tables:
        rows = found.get(table.tied_to or table.path)
        if rows is None:
            continue
        if table.unfit is not None:
            raise UnsupportedError(
                f"{SETTING}: rows of `{table.path}` cannot be trained: {table.unfit}",
                where=WHERE,
                hint="train the embedding whole, with modules_to_save, or leave the rows out",
            )
        if max(rows) >= num_rows(table):
            raise ConfigError(
                f"{SETTING}: row {max(rows):,} is out of range: `{table.path}` has {num_rows(table):,} rows",
                where=WHERE,
                hint="for new tokens: model.resize_token_embeddings(len(tokenizer)) first",
            )
    return found


def _named(tables: Sequence[TargetModule], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in wanted.items():
        matched = [table for table in tables if name in endings(table.path)]
        if not matched:
            there = [table.path for table in tables]
            known = sorted({ending for path in there for ending in endings(path)})
            raise ConfigError(
                f"{SETTING}: `{name}` is no embedding of this model",
                where=WHERE,
                hint=did_you_mean(name, known, f"The embeddings are: {', '.join(there[:20]) or 'none'}"),
            )
        for table in matched:
            if found.setdefault(table.path, rows) != rows:
                raise ConfigError(
                    f"{SETTING}: `{table.path}` is named twice, with different rows",
                    where=WHERE,
                    hint="give each embedding one list",
                )
    for table in tables:
        if table.path in found and table.tied_to is not None and found.get(table.tied_to) != found.pop(table.path):
            raise ConfigError(
                f"{SETTING}: `{table.path}` shares its weights with `{table.tied_to}`, whose rows would stay or differ",
                where=WHERE,
                hint=f"name `{table.tied_to}` alone: the trained rows count in both",
            )
    return found


def token_indices(table: TargetModule, wanted: TokenIndices | None) -> tuple[int, ...]:
    """Return the rows of a table that train, after `rows_by_table` has found them valid."""
    assert wanted is not None
    if isinstance(wanted, tuple):
        return wanted
    path = table.tied_to or table.path
    return next(rows for name, rows in wanted.items() if name in endings(path))


def build_rows(
    table: TargetModule, module: nn.Module, indices: Sequence[int], rows: nn.Parameter | None = None
) -> TokenRows:
    """Build the module for one table.

    Args:
        table: The table.
        module: The base module.
        indices: The rows' numbers, n of them.
        rows: R, (n, d), or None to start as the base's rows.
    """
    numbers = torch.tensor(indices, dtype=torch.long, device=module_device(module))
    if rows is None and table.tied_to is None:
        weight = base_weight(module)  # (V, d)
        fine = torch.promote_types(weight.dtype, torch.get_default_dtype())
        start = torch.zeros(len(indices), width(table)) if weight.is_meta else weight[numbers]
        rows = nn.Parameter(start.to(fine, copy=True))
    cls = EmbeddedRows if table.role is Role.EMBEDDING else ScoredRows
    return cls(module, numbers, rows)


def stored_rows(
    table: TargetModule, module: nn.Module, indices: Sequence[int], parameters: Mapping[str, nn.Parameter]
) -> TokenRows | None:
    """Build the module for one table around stored rows.

    Args:
        table: The table.
        module: The base module.
        indices: The rows' numbers, n of them.
        parameters: By name; the rows are (n, d).

    Returns:
        None if the parameters are not those it needs.
    """
    if table.tied_to is not None:
        return None if parameters else build_rows(table, module, indices)
    if parameters.keys() != {ROWS} or parameters[ROWS].shape != (len(indices), width(table)):
        return None
    return build_rows(table, module, indices, parameters[ROWS])
