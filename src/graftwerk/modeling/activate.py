"""Choose the active adapters of a model, or switch all of them off for a while."""

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
    """Choose the active adapters: one, several in order, none, or one (or none) for each row of the next batches.

    Parameters of the others require no gradient until their adapter is chosen again; an optimizer may hold them all.

    Args:
        model: A model with adapters.
        name: An adapter's name, a list of names that apply one after the other, or None for the bare base.
        rows: For each row of a batch a name, or None for the bare base. Stays in force until the next call.

    Raises:
        ConfigError: no such adapter; the message lists those on the model.
        UnsupportedError: a kind of adapter that cannot differ by row.
        ConflictError: an adapter is merged into the base.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, activate, attach
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> news, legal = attach(model, LoRA(r=2), "news"), attach(model, LoRA(r=4), "legal")
        >>> activate(model, "news")
        >>> news.active, legal.active
        (True, False)
        >>> activate(model, rows=["news", None, "legal"])  # a batch of three rows
    """
    model_adapters = ModelAdapters.of(model)
    if model_adapters is None:
        if name is None and rows is None:
            return
        raise ConfigError("this model has no adapters", hint="attach or load one first")
    if rows is not None and name is not None:
        raise ConfigError("give one name for all rows, or rows, not both")
    chosen = list(rows) if rows is not None else ([name] if isinstance(name, str) else list(name or ()))
    for one in chosen:
        if one is not None and one not in model_adapters.adapters:
            raise ConfigError(
                f"there is no adapter `{one}` on this model",
                hint=f"there are: {', '.join(model_adapters.adapters) or 'none'}",
            )
    if rows is not None:
        if not rows:
            raise ConfigError("rows is empty", where="activate(model, rows=...)")
        for one in dict.fromkeys(chosen):
            if one is not None and not model_adapters.adapters[one].method.supports_rows:
                raise UnsupportedError(
                    f"`{one}` is {model_adapters.adapters[one].method.title}: it replaces the base's weights, so it "
                    f"cannot differ by row",
                    hint="run its rows in a batch of their own",
                )
        check_rows(model, [model_adapters.adapters[one] for one in dict.fromkeys(chosen) if one is not None])
        refuse_while_merged(model_adapters, "choose adapters by row")
        model_adapters.selection.choose_rows(tuple(rows))
    else:
        if model_adapters.selection.merged.difference(chosen):
            refuse_while_merged(model_adapters, "switch adapters")
        model_adapters.selection.choose(tuple(one for one in chosen if one is not None))
    model_adapters.train_used()
    model_adapters.sync()


def refuse_while_merged(model_adapters: ModelAdapters, wish: str) -> None:
    """Check that no adapter is merged into the base.

    Args:
        model_adapters: The model's adapters.
        wish: The action that needs this; completes "cannot ...".

    Raises:
        ConflictError: An adapter is merged.
    """
    if model_adapters.selection.merged:
        raise ConflictError(
            f"cannot {wish}: `{', '.join(sorted(model_adapters.selection.merged))}` is merged into the base",
            hint="unmerge it first",
        )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Use the bare base inside the block: no adapter and no adapter's head; merged weights are taken out and put back.

    Args:
        model: A model with or without adapters.

    Raises:
        UnsupportedError: an adapter was merged with ``keep_base=False``.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftwerk import LoRA, attach, disabled
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
        >>> adapter = attach(model, LoRA(r=2))
        >>> with disabled(model):
        ...     adapter.active
        False
        >>> adapter.active
        True
    """
    model_adapters = ModelAdapters.of(model)
    if model_adapters is None:
        yield
        return
    with model_adapters.bare():
        yield
