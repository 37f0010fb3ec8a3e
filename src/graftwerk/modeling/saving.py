"""`save_pretrained` of a model with adapters: a folder that plain transformers loads with the same outputs.

A merged adapter (or one that trained all weights, or a head alone) is part of the model: the folder has the merged
weights, the adapter's head under the base's keys, and its labels. An adapter that is only attached cannot be expressed
in such a folder: it gets the bare base, each adapter its own folder below it, and a warning. Raising an error would
lose the training of a script that saves at its end.

transformers' Trainer saves its state by the same method and reads it back by `load_state_dict`. In its
``checkpoint-N`` folders the adapters' tensors therefore stay among the weights.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftwerk.kernels.memory_efficient import own_base
from graftwerk.modeling.accelerate_compat import change_class, swapped_class
from graftwerk.modeling.adapter_slots import CHILD, ModelAdapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

ADAPTERS = "adapters"
"""Folder of the adapters within that of a saved model."""
_OF_THE_TRAINER = re.compile(r"checkpoint-\d+")


class AdaptedModel(_Model):  # type: ignore[misc]
    """Mixin before the class of a model that has adapters."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as `PreTrainedModel.save_pretrained` does: the merged model, or the bare base beside its adapters.

        Args:
            save_directory: The folder. Adapters that are not merged are saved in ``adapters/<name>`` below it.
            is_main_process: As `PreTrainedModel.save_pretrained` takes it.
            state_dict: As `PreTrainedModel.save_pretrained` takes it.
            **kwargs: As `PreTrainedModel.save_pretrained` takes them.

        Raises:
            DivergedError: an adapter holds NaN or infinity and is not saved; the base is.

        Warns:
            UserWarning: adapters are attached that are not part of the saved model.
        """
        folder, model_adapters = Path(save_directory), ModelAdapters.of(self)
        assert model_adapters is not None
        resumable = not model_adapters.selection.merged and _OF_THE_TRAINER.fullmatch(folder.name) is not None
        if resumable:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            apart = [adapter for adapter in model_adapters.adapters.values() if adapter.weights is None]
        else:
            inside = _inside(model_adapters)
            with _as_plain_model(self, model_adapters, inside):
                state_dict = None if state_dict is None else _plain(state_dict, model_adapters, inside)
                super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            apart = [adapter for name, adapter in model_adapters.adapters.items() if name not in inside]
        if not apart or not is_main_process:
            return
        for adapter in apart:
            adapter.save(folder / ADAPTERS / adapter.name)
        names = ", ".join(f"`{adapter.name}`" for adapter in apart)
        what = "the base and, for the Trainer alone, adapters' tensors" if resumable else "the model without"
        warnings.warn(
            f"{folder} holds {what} {names}: plain transformers does not use an adapter that is not merged. "
            f"Each is saved in {folder / ADAPTERS}/<name>, for graftwerk.load and PEFT; merge() before saving gives "
            f"one model.",
            stacklevel=2,
        )


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class, without what adapters and FSDP have put before it."""
    return own_base(type(model)).__name__


def adopt(model: nn.Module) -> None:
    """Give a model the class whose `save_pretrained` knows of adapters. A second call changes nothing."""
    if not isinstance(model, AdaptedModel):
        mixin: Any = AdaptedModel
        own: Any = type(model)
        change_class(model, swapped_class(mixin, own))


def _inside(model_adapters: ModelAdapters) -> tuple[str, ...]:
    """Return the active adapters if a plain model can contain all of them: merged, or nothing to merge.

    The latter are those that trained the weights in place, and those that are a head alone.
    """
    selection = model_adapters.selection
    names = () if selection.rows is not None else selection.names
    return names if all(name in selection.merged or not model_adapters.adapters[name].hosts for name in names) else ()


@contextmanager
def _as_plain_model(model: nn.Module, model_adapters: ModelAdapters, inside: tuple[str, ...]) -> Iterator[None]:
    """Give the state dict of a model without adapters inside the block, and the configuration that belongs to it."""

    def plain(module: nn.Module, state: dict[str, Any], *_: Any) -> dict[str, Any]:
        return _plain(state, model_adapters, inside)

    with ExitStack() as stack:
        if not inside:
            stack.enter_context(model_adapters.bare())
        stack.callback(model._register_state_dict_hook(plain).remove)  # type: ignore[no-untyped-call]
        yield


def _plain(state: Mapping[str, Tensor], model_adapters: ModelAdapters, inside: tuple[str, ...]) -> dict[str, Any]:
    """Return a state dict without adapters' keys; the heads of those ``inside`` take the place of the base's."""
    marks = {f"{path}.{CHILD}.{name}.": path for name in inside for path in model_adapters.adapters[name].heads}
    found = {key: value for key, value in state.items() if CHILD not in key.split(".")}
    for key, value in state.items():
        for mark, path in marks.items():
            if key.startswith(mark):
                found[f"{path}.{key.removeprefix(mark)}"] = value
    return found
