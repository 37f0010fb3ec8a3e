"""Trained rows of embeddings (`trainable_token_indices`) in PEFT's container, and back.

PEFT stores the rows themselves, under each module that it wraps, once for modules that share a weight:

    X.token_adapter.trainable_tokens_delta   (n, d), in the order of the indices
    X.token_adapter.base_layer.weight        the whole table, where the vocabulary was resized; then the rows are
                                             stored for the modules tied to X as well

PEFT finds the modules by letters, as those to save, and in a linear layer with trained rows it leaves out the bias.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import AdapterError, ConfigError, UnsupportedError
from graftwerk.methods.base import Role
from graftwerk.methods.trainable_tokens import ROWS, SETTING, TokenIndices, checked_indices, rows_by_table
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.module_index import base_modules
from graftwerk.serialization.vocabulary import check_rows, same_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BASE = "token_adapter.base_layer.weight"


@dataclass(frozen=True)
class StoredTokens:
    """The trained rows of a folder.

    Attributes:
        setting: The rows by table, for our settings, or None if there are none.
        rows: R (n, d) by raw key.
        tables: Whole tables (V, d) by path and parameter, trained rows included: the folder's base has others there.
    """

    setting: TokenIndices | None
    rows: dict[str, Tensor]
    tables: dict[str, dict[str, Tensor]]


def token_config(adapter: Adapter) -> dict[str, Any]:
    """Return the setting as PEFT takes it; empty if no rows are trained.

    Raises:
        UnsupportedError: the letters of an embedding's path are the end of another module's, which PEFT would wrap.
    """
    tables = [target for target in adapter.targets if target.is_table]
    if not tables:
        return {}
    rows: dict[str, tuple[int, ...]] = {}
    found = rows_of(adapter)
    for table in tables:
        # PEFT follows ties of the input embedding alone, and asks the configuration for them.
        if table.tied_to is None or table.path in _apart(adapter):
            rows[table.path] = found[table.tied_to or table.path]
    modules = base_modules(adapter.model)
    for name in rows:
        if others := [path for path in modules if path.endswith(name) and path != name]:
            raise UnsupportedError(
                f"PEFT would take `{others[0]}` for `{name}`, since its name ends in the same letters, so that rows of "
                f"it cannot be stored",
                where=f"method.{SETTING}",
                hint="train the embedding whole, with modules_to_save",
            )
    if len(rows) == 1 and next(table for table in tables if table.path in rows).is_input:
        return {SETTING: list(next(iter(rows.values())))}
    return {SETTING: {name: list(numbers) for name, numbers in rows.items()}}


def tokens_apart(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    """Return copies of trained rows (n, d), by PEFT's keys, for tied modules that PEFT does not know to be tied."""
    raw = adapter.state_dict()
    leaders = {table.path: table.tied_to for table in adapter.targets if table.tied_to is not None}
    return {f"{prefix}{path}.{ROWS}": raw[f"{leaders[path]}.{ROWS}"] for path in _apart(adapter)}


def _apart(adapter: Adapter) -> list[str]:
    inputs = [target.path for target in adapter.targets if target.is_input]
    known = inputs if getattr(adapter.model.config, "tie_word_embeddings", False) else []
    return [table.path for table in adapter.targets if table.tied_to is not None and table.tied_to not in known]


def rows_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the trained rows of an adapter, by the path of their table."""
    return adapter.method.trained_rows([target for target in adapter.targets if target.is_table])


def split_tokens(
    model: PreTrainedModel,
    architecture: Architecture,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prefix: str,
) -> tuple[Mapping[str, Tensor], StoredTokens]:
    """Take trained rows out of an adapter's tensors.

    Args:
        model: The model that it is for.
        architecture: Its architecture.
        config: The adapter's configuration in PEFT's terms.
        tensors: By PEFT's keys, any shape.
        prefix: Prefix of the keys.

    Returns:
        All other tensors, and the rows.

    Raises:
        AdapterError: rows are missing, have another shape, or were stored for another vocabulary.
        ConfigError: the setting names a row or an embedding that the model does not have.
        UnsupportedError: rows of modules that share a weight differ.
    """
    setting = config.get(SETTING)
    if not setting:
        return tensors, StoredTokens(None, {}, {})
    modules = base_modules(model)
    if isinstance(setting, dict):  # by letters, as PEFT does
        named = {path: rows for name, rows in setting.items() for path in modules if path and path.endswith(name)}
        setting = named or setting
    rest, rows, bases = _sorted_by_part(tensors, prefix)
    for path, table in bases.items():
        if path in modules:  # first: a vocabulary of another size says how to resize the model
            check_rows(path, table, modules[path]._parameters.get("weight"))
    try:
        wanted = rows_by_table(architecture.tables, checked_indices(setting))
    except ValueError as error:
        raise ConfigError(f"`{SETTING}`: {error}", where="adapter_config.json") from None
    _check_stored_rows(architecture, modules, wanted, rows)
    _warn_of_bias(architecture, wanted, modules)
    replaced = {}
    for path, numbers in wanted.items():
        if path in bases and not _same_but(bases[path], modules[path]._parameters["weight"], numbers):
            table = bases[path].float().clone()
            table[list(numbers)] = rows[path].float()
            replaced[path] = {"weight": table}
    left = {path: numbers for path, numbers in wanted.items() if path not in replaced}
    kept: TokenIndices | None = left or None
    if not isinstance(setting, dict) and left:
        kept = next(iter(left.values()))
    return rest, StoredTokens(kept, {f"{path}.{ROWS}": rows[path] for path in left}, replaced)


def _sorted_by_part(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the other tensors by key, and trained rows (n, d) and whole tables (V, d) by path."""
    rest: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(prefix)
        if path.endswith(f".{ROWS}"):
            rows[path.removesuffix(f".{ROWS}")] = tensor
        elif path.endswith(f".{_BASE}"):
            bases[path.removesuffix(f".{_BASE}")] = tensor
        else:
            rest[key] = tensor
    return rest, rows, bases


def _check_stored_rows(
    architecture: Architecture,
    modules: Mapping[str, nn.Module],
    wanted: Mapping[str, tuple[int, ...]],
    rows: Mapping[str, Tensor],
) -> None:
    """Raise unless exactly the wanted rows (n, d) are there, of the right shape, and the same at tied modules."""
    leaders = {table.path: table.tied_to or table.path for table in architecture.tables}
    if missing := [f"{path}.{ROWS}" for path in wanted if path not in rows]:
        raise AdapterError(f"missing {', '.join(missing)}")
    for path, own in rows.items():
        leader = leaders.get(path)
        if leader is None or leader not in wanted:
            raise AdapterError(f"not known here {path[:200]}.{ROWS}")
        width = modules[leader]._parameters["weight"].shape[1]  # type: ignore[union-attr]
        if own.shape != (len(wanted[leader]), width):
            raise AdapterError(
                f"mis-shaped: {path}.{ROWS} has shape {tuple(own.shape)} for {len(wanted[leader])} rows of {width}"
            )
        if not same_values(own, rows[leader]):
            raise UnsupportedError(
                f"`{SETTING}`: `{path}` shares its weight with `{leader}`, and their trained rows differ",
                hint="load it on a base whose weights are not tied (tie_word_embeddings=False)",
            )


def _same_but(stored: Tensor, own: Tensor | None, rows: tuple[int, ...]) -> bool:
    """Return True if two tables (V, d) agree in all rows but these."""
    assert own is not None
    others = torch.ones(stored.shape[0], dtype=torch.bool, device="cpu")
    others[list(rows)] = False
    return same_values(stored[others], own.detach().cpu()[others])


def _warn_of_bias(architecture: Architecture, wanted: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    for table in architecture.tables:
        if table.role is Role.VOCABULARY and table.has_bias and (table.tied_to or table.path) in wanted:
            bias = modules[table.path]._parameters["bias"]
            if bias.is_meta or bool(bias.detach().any()):
                warnings.warn(
                    f"PEFT leaves the bias of `{table.path}` out while rows of its weight are trained; here it is "
                    f"added, as in the base, so that scores differ from PEFT's by it",
                    stacklevel=2,
                )
