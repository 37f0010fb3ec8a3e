"""Checks before a method is attached: models on which no further adapter, or none at all, would work."""

from __future__ import annotations

from transformers import PreTrainedModel

from graftwerk.errors import ConflictError, UnsupportedError
from graftwerk.methods.placement import OFFLOAD_HOOK, placing_hooks
from graftwerk.modeling.activate import refuse_while_merged
from graftwerk.modeling.adapter_slots import ModelAdapters
from graftwerk.modeling.module_index import module_index
from graftwerk.modeling.quantized_layers import refuse_packed


def check_attachable(model: PreTrainedModel, existing: ModelAdapters | None, name: str) -> None:
    """Raise if no further adapter, or none of this name, can be attached.

    Args:
        model: The model.
        existing: Its adapters, or None if it has none.
        name: Name of the new one.

    Raises:
        ConflictError: The name is taken, or an adapter is merged.
        UnsupportedError: The model has adapter layers of another library, is offloaded by blocks, is packed for
            inference, or was fine-tuned in place.
    """
    _refuse_foreign(model)
    _refuse_block_offload(model)
    if existing is None:
        refuse_packed(module_index(model).modules)
        return
    if name in existing.adapters:
        raise ConflictError(
            f"this model has an adapter `{name}` already", hint="delete it first, or choose another name"
        )
    refuse_while_merged(existing, "attach another adapter")
    if any(adapter.weights is not None and adapter.weights.other is None for adapter in existing.adapters.values()):
        raise UnsupportedError(
            "this model was fine-tuned in place (keep_base=False); an adapter on it would have no base",
            hint="attach with Full(keep_base=True), or load the base again",
        )


def _refuse_block_offload(model: PreTrainedModel) -> None:
    """Raise UnsupportedError if accelerate loads whole blocks at once, and would look for an adapter in its files."""
    for path, module in module_index(model).modules.items():
        if OFFLOAD_HOOK not in module.__dict__:
            continue
        if any(getattr(hook, "offload", False) and hook.place_submodules for hook in placing_hooks(module)):
            raise UnsupportedError(
                f"the weights of this {type(module).__name__} are offloaded as one block (`preload_module_classes`), "
                f"which would take an adapter inside along",
                where=path,
                hint="offload without preload_module_classes, or attach the adapter first",
            )


_FOREIGN = ("peft.", "loralib.", "adapters.methods.")


def _refuse_foreign(model: PreTrainedModel) -> None:
    """Raise UnsupportedError if another library has put adapter layers into the model.

    Theirs would be taken for layers of the base: trained, merged and fingerprinted with it.
    """
    path = module_index(model).cached("foreign", lambda: _foreign(model))
    if path is not None:
        cls = type(module_index(model).modules[path])
        raise UnsupportedError(
            f"this model already has adapter layers of another library ({cls.__module__}.{cls.__name__}), which would "
            f"be taken for the base's own",
            where=path,
            hint="load the base without them and their adapter with `graftwerk.load`, or merge them first (PEFT's "
            "`merge_and_unload`)",
        )


def _foreign(model: PreTrainedModel) -> str | None:
    for path, module in module_index(model).modules.items():
        if any(f"{cls.__module__}.".startswith(_FOREIGN) for cls in type(module).__mro__):
            return path
    return None
