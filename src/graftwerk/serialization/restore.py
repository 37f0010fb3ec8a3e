"""From the files of an adapter folder to settings and raw tensors that fit a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftwerk.errors import AdapterError
from graftwerk.methods.base import Method
from graftwerk.methods.base_weights import all_finite
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.methods.prompt_tuning import Prompt
from graftwerk.methods.ptuning import PTuning
from graftwerk.modeling.adapter_slots import CHILD
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.drawn import within
from graftwerk.modeling.module_index import base_modules, base_parameters
from graftwerk.modeling.prefix_install import stacks_of
from graftwerk.modeling.task_heads import head_paths, open_targets
from graftwerk.serialization.info import TRAINING_FILE, AdapterInfo
from graftwerk.serialization.peft_format import PREFIX, Restored
from graftwerk.serialization.peft_linear import LAYOUTS, read_linear
from graftwerk.serialization.peft_reading import read_ia3, read_lora, read_own
from graftwerk.serialization.peft_virtual import read_prefix, read_prompt
from graftwerk.serialization.untrusted_files import read_tensors
from graftwerk.serialization.vocabulary import saved_by_letters
from graftwerk.serialization.weight_files import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

START = ".start_"
"""PiSSA keeps what it started from in tensors of these names."""
INDICES = ".shira_indices"
"""SHiRA's places, the only integers that an adapter has."""
_READERS = {
    "LORA": read_lora,
    "IA3": read_ia3,
    **dict.fromkeys(LAYOUTS, read_linear),
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_prompt,
    "PREFIX_TUNING": read_prefix,
}


def restored(model: PreTrainedModel, architecture: Architecture, info: AdapterInfo) -> Restored:
    """Read the settings and raw tensors of an adapter for a model, without attaching it.

    Raises:
        AdapterError: Tensors are missing, or do not belong to this model.
        IntegrityError: A file is a pickle, damaged or hostile.
        UnsupportedError: PEFT's adapter uses a feature that is not supported here.
    """
    # An adapter is never larger than its base; twice that, for float64 and heads, is where trying to read it ends.
    weights = base_parameters(model).values()
    bound = 2**26 + 4 * sum(weight.numel() * max(weight.element_size(), 4) for weight in weights)
    tensors = read_weights(info, max_bytes=bound)
    _check_numbers(tensors)
    reader = _READERS.get(info.peft_type)
    method = info.method
    if method is not None:
        tensors = _without_unread(model, architecture, info, method, tensors)
    if reader is None:
        assert method is not None
        return read_own(method, tensors)
    found = reader(model, architecture, info.config, tensors)
    if method is None:
        return found
    heads = head_paths(model, method, architecture)
    beside = [path for path in saved_by_letters(base_modules(model), heads) if not within(path, heads)]
    own = {key: tensor for key, tensor in found.tensors.items() if not (beside and within(key, beside))}
    if TRAINING_FILE not in info.own["files"]:
        return Restored(method, own)
    training = read_tensors(info.folder / TRAINING_FILE, max_bytes=bound, written=info.written(TRAINING_FILE))
    _check_numbers(training)
    saved = {key: tensor for key, tensor in own.items() if within(key, heads)}
    return Restored(method, {**training, **saved})


def _without_unread(
    model: PreTrainedModel, architecture: Architecture, info: AdapterInfo, method: Method, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Leave out what 0.1.0 stored of adapted layers inside saved modules, which no forward pass had read.

    It adapted such layers although the module's own copy answers, and copied the adapters that were on them with it.

    Raises:
        AdapterError: the copy held another adapter that was active then, whose settings are not in the folder.
    """
    heads = head_paths(model, method, architecture)
    if not heads or method.kind == "weights":
        return tensors
    targets = method.select_targets(architecture.candidates(method)) if method.kind == "layer" else []
    unread = [target.host for target in targets if within(target.path, heads)]
    modules = base_modules(model)
    known = {f"{path}.{name}" for path in unread for name in modules[path]._parameters}
    kept = {}
    for key, tensor in tensors.items():
        raw = key.removeprefix(PREFIX)
        other = raw.partition(f".{CHILD}.")[2].partition(".")[0]
        if other and other != info.name:
            raise AdapterError(
                f"the saved module of `{raw[:200]}` holds a copy of another adapter, `{other[:64]}`, which was active "
                f"when this one was attached",
                hint="train it again on a model without that adapter",
            )
        if not other and (raw in known or not within(raw, unread)):
            kept[key] = tensor
    return kept


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    if _all_finite(tensors):
        return
    for key, tensor in tensors.items():
        if key.endswith(INDICES) and tensor.dtype in (torch.int32, torch.int64):
            continue
        if not tensor.is_floating_point():
            raise AdapterError(f"`{key[:200]}` holds {tensor.dtype} where an adapter has floating-point numbers")
        if not all_finite(tensor):
            raise AdapterError(f"`{key[:200]}` holds NaN or infinity: the training that made it had diverged")


def _all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if all tensors are certainly finite float32; False means that each must be checked by itself.

    A finite sum has only finite terms, and one sum over the block that a file was read into costs a tenth of checking
    each tensor.
    """
    if not tensors or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        return False
    block = next(iter(tensors.values())).untyped_storage()
    same = all(tensor.untyped_storage().data_ptr() == block.data_ptr() for tensor in tensors.values())
    if not same or block.nbytes() != sum(tensor.nbytes for tensor in tensors.values()):
        return False
    whole = torch.empty(0, device=block.device).set_(block, 0, (block.nbytes() // 4,), (1,))
    return math.isfinite(float(whole.sum()))


def check_size(model: PreTrainedModel, restored: Restored, architecture: Architecture) -> None:
    """Check the number of stored parameters against the settings, before memory is allocated for the adapter.

    Raises:
        AdapterError: The file holds more or fewer parameters than the settings give on this model.
    """
    method = restored.method
    heads = head_paths(model, method, architecture)
    found = sum(
        tensor.numel()
        for key, tensor in restored.tensors.items()
        if not (heads and within(key, heads)) and START not in key and not key.endswith(INDICES)
    )
    if isinstance(method, Prefix):
        chosen = method.filter_layers(architecture.attentions)
        widths = [attention.kv_heads * attention.head_dim for attention in chosen]
        expected = method.num_vector_parameters(widths, [stack.width for stack in stacks_of(architecture, chosen)])
    elif isinstance(method, Prompt | PTuning):
        expected = method.num_vector_parameters(architecture.stacks[0].width) if architecture.stacks else 0
    elif method.kind == "layer":
        expected = method.num_parameters(open_targets(method, architecture, heads))
    else:
        return  # full: the model itself says how large it is
    if expected != found:
        raise AdapterError(
            f"with these settings the adapter has {expected:,} parameters on this model, but the file holds {found:,}"
        )
