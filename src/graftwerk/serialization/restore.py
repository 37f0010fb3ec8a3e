"""From the files of an adapter folder to settings and raw tensors that fit a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftwerk.errors import AdapterError
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.methods.prompt_tuning import Prompt
from graftwerk.methods.ptuning import PTuning
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.drawn import within
from graftwerk.modeling.module_index import base_parameters
from graftwerk.modeling.prefix_attention import stacks_of
from graftwerk.serialization.info import TRAINING_FILE, WEIGHTS_FILE, AdapterInfo
from graftwerk.serialization.peft_format import Restored, read_ia3, read_lora, read_own
from graftwerk.serialization.peft_linear import LAYOUTS, read_linear
from graftwerk.serialization.peft_virtual import read_prefix, read_prompt
from graftwerk.serialization.untrusted_files import read_tensors, refuse_pickles

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


def restored(model: PreTrainedModel, view: Architecture, info: AdapterInfo) -> Restored:
    """Settings and raw tensors of the adapter in a folder, for this model; nothing is attached yet.

    Raises:
        AdapterError: tensors are missing, or do not belong to this model.
        IntegrityError: a file is a pickle, damaged or hostile.
        UnsupportedError: PEFT's adapter does what cannot be done here.
    """
    path = info.folder / WEIGHTS_FILE
    if not path.exists():
        refuse_pickles(info.folder, WEIGHTS_FILE)
        raise AdapterError(f"missing: {WEIGHTS_FILE}")
    # An adapter is never larger than its base; twice that, for float64 and heads, is where trying to read it ends.
    weights = base_parameters(model).values()
    bound = 2**26 + 4 * sum(weight.numel() * max(weight.element_size(), 4) for weight in weights)
    tensors = read_tensors(path, max_bytes=bound, written=info.written(WEIGHTS_FILE))
    _check_numbers(tensors)
    reader = _READERS.get(info.peft_type)
    method = info.method
    if reader is None:
        assert method is not None
        return read_own(method, tensors)
    found = reader(model, view, info.config, tensors)
    if method is None:
        return found
    if TRAINING_FILE not in info.own["files"]:
        return Restored(method, found.tensors)
    training = read_tensors(info.folder / TRAINING_FILE, max_bytes=bound, written=info.written(TRAINING_FILE))
    _check_numbers(training)
    saved = found.method.modules_to_save
    assert saved != "auto"
    heads = {
        key: tensor
        for key, tensor in found.tensors.items()
        if any(key == head or key.startswith(head + ".") for head in saved)
    }
    return Restored(method, {**training, **heads})


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    if _all_finite(tensors):
        return
    for key, tensor in tensors.items():
        if key.endswith(INDICES) and tensor.dtype in (torch.int32, torch.int64):
            continue
        if not tensor.is_floating_point():
            raise AdapterError(f"`{key[:200]}` holds {tensor.dtype} where an adapter has floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"`{key[:200]}` holds NaN or infinity: the training that made it had diverged")


def _all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are, for certain, float32 numbers without NaN or infinity; False: each has to be looked at.

    A sum is finite only if all its terms are, and to take one over the block that a file was read into costs a tenth
    of a look at each tensor.
    """
    if not tensors or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        return False
    block = next(iter(tensors.values())).untyped_storage()
    same = all(tensor.untyped_storage().data_ptr() == block.data_ptr() for tensor in tensors.values())
    if not same or block.nbytes() != sum(tensor.nbytes for tensor in tensors.values()):
        return False
    whole = torch.empty(0).set_(block, 0, (block.nbytes() // 4,), (1,))
    return math.isfinite(float(whole.sum()))


def check_size(restored: Restored, view: Architecture) -> None:
    """What the settings ask for must be what the file holds, before memory is reserved for it."""
    method = restored.method
    saved = view.heads if method.modules_to_save == "auto" else method.modules_to_save
    found = sum(
        tensor.numel()
        for key, tensor in restored.tensors.items()
        if not any(key == head or key.startswith(head + ".") for head in saved)
        and START not in key
        and not key.endswith(INDICES)
    )
    if isinstance(method, Prefix):
        chosen = method.filter_layers(view.attentions)
        widths = [place.kv_heads * place.head_dim for place in chosen]
        expected = method.num_vector_parameters(widths, [stack.width for stack in stacks_of(view, chosen)])
    elif isinstance(method, Prompt | PTuning):
        expected = method.num_vector_parameters(view.stacks[0].width) if view.stacks else 0
    elif method.kind == "layer":
        expected = method.num_parameters(
            method.select_targets([place for place in view.targets if not within(place.path, saved)])
        )
    else:
        return  # full: the model itself says how large it is
    if expected != found:
        raise AdapterError(
            f"with these settings the adapter has {expected:,} parameters on this model, but the file holds {found:,}"
        )
