"""Choosing the active adapters of a model, and switching all of them off for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from graftwerk.errors import ConfigError, ConflictError, UnsupportedError
from graftwerk.modeling.adapter_slots import ModelAdapters
from graftwerk.modeling.row_dims import check_rows


def activate(
    model: nn.Module, name: str | Sequence[str] | None = None, *, rows: Sequence[str | None] | None = None
) -> None:
    """Choose who is active: one adapter, several in order, none, or one (or none) for each row of the next batches.

    Args:
        name: An adapter's name, a list of names that apply one after the other, or None for the bare base.
        rows: For each row of a batch a name, or None for the bare base. Stays in force until the next call.

    Raises:
        ConfigError: no such adapter; the names there are are listed.
        UnsupportedError: a kind of adapter that cannot differ by row.
        ConflictError: an adapter is merged into the base.
    """
    record = ModelAdapters.of(model)
    if record is None:
        if name is None and rows is None:
            return
        raise ConfigError("this model has no adapters", hint="attach or load one first")
    if rows is not None and name is not None:
        raise ConfigError("give one name for all rows, or rows, not both")
    chosen = list(rows) if rows is not None else ([name] if isinstance(name, str) else list(name or ()))
    for one in chosen:
        if one is not None and one not in record.adapters:
            raise ConfigError(
                f"there is no adapter `{one}` on this model", hint=f"there are: {', '.join(record.adapters) or 'none'}"
            )
    if rows is not None:
        if not rows:
            raise ConfigError("rows is empty", where="activate(model, rows=...)")
        for one in dict.fromkeys(chosen):
            if one is not None and not record.adapters[one].method.supports_rows:
                raise UnsupportedError(
                    f"`{one}` is {record.adapters[one].method.title}: it replaces the base's weights, so it cannot "
                    f"differ by row",
                    hint="run its rows in a batch of their own",
                )
        check_rows(model, [record.adapters[one] for one in dict.fromkeys(chosen) if one is not None])
        refuse_while_merged(record, "choose adapters by row")
        record.selection.choose_rows(tuple(rows))
    else:
        if set(record.selection.merged) - {one for one in chosen if one}:
            refuse_while_merged(record, "switch adapters")
        record.selection.choose(tuple(one for one in chosen if one is not None))
    record.sync()


def refuse_while_merged(record: ModelAdapters, wish: str) -> None:
    """Raise ConflictError if an adapter is merged into the base; ``wish`` completes "cannot ..."."""
    if record.selection.merged:
        raise ConflictError(
            f"cannot {wish}: `{', '.join(sorted(record.selection.merged))}` is merged into the base",
            hint="unmerge it first",
        )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare base inside the block: no adapter, no head of an adapter; merged weights are taken out and put back.

    Raises:
        UnsupportedError: an adapter was merged with ``keep_base=False``.
    """
    record = ModelAdapters.of(model)
    if record is None:
        yield
        return
    with record.bare():
        yield
