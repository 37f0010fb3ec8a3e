"""A digest of every tensor of a base: the proof that training changed nothing but what it was to train.

Unlike a fingerprint, which tells checkpoints apart by samples, a digest covers every byte: one bit changes it.
Tensors are read in pieces, where they lie; as many are hashed at once as torch has threads (`hashlib` lets go of the
interpreter meanwhile), so that a billion parameters cost a few seconds.

A digest is the type of the tensor and the first 128 bits of the SHA-256 of type, shape and bytes: `float32 6f8d...`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwerk.methods.base_weights import is_quantized
from graftwerk.modeling.drawn import unmarked
from graftwerk.modeling.module_index import base_modules, base_parameters
from graftwerk.serialization.fingerprint import loaded_parameter

PIECE = 2**18
"""Values that are read at once: the C library keeps the copies of larger pieces, 50 MB of them."""
DIGITS = 32
"""Hexadecimal digits of a digest."""
KEY = "base_tensors"
"""Key of the digests in a run's manifest."""


def base_digests(model: PreTrainedModel, types: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the digest of every tensor of a base by name: parameters, stored buffers, scales of quantized weights.

    Parameters that train are left out: they are what a training changes.

    Args:
        model: The base; adapters on it do not count.
        types: Types of tensors by name, of a digest to compare with: a tensor in another type is converted first.

    Raises:
        ModelError: A weight has not been loaded.
    """
    tensors = dict(_tensors(model))

    def digest(name: str) -> str:
        tensor = tensors[name]
        if not isinstance(tensor, nn.Parameter):
            return _digest(tensor, types.get(name))
        with loaded_parameter(model, name, tensor) as weight:
            return _digest(weight, types.get(name))

    offloaded = any(tensor.is_meta for tensor in tensors.values())  # a module is loaded by one thread at a time
    with ThreadPoolExecutor(1 if offloaded else max(1, torch.get_num_threads())) as threads:
        return dict(zip(tensors, threads.map(digest, tensors), strict=True))


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest of tensors of any shape, by name."""
    found = "".join(f"{name} {_digest(tensor, None)}\n" for name, tensor in sorted(tensors.items()))
    return hashlib.sha256(found.encode()).hexdigest()[:DIGITS]


def drawn_tensors(model: PreTrainedModel) -> list[str]:
    """Return the names of base tensors that no checkpoint holds: the next load draws others."""
    parameters = base_parameters(model)
    return sorted(name for name in unmarked(model) if not is_quantized(parameters[name]))


def type_of(digest: str) -> str:
    """Return the type that a digest names.

    Example:
        >>> type_of("float32 6f8d")
        'float32'
    """
    return digest.partition(" ")[0]


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a base that do not train, any shape, by name; shared ones once."""
    for name, parameter in base_parameters(model).items():
        if not parameter.requires_grad:
            yield name, parameter
            yield from ((f"{name}.{key}", scale) for key, scale in _scales(parameter))
    seen: set[int] = set()
    for path, module in base_modules(model).items():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen and name not in module._non_persistent_buffers_set:
                seen.add(id(buffer))
                yield f"{path}.{name}".removeprefix("."), buffer
        scales = getattr(
            getattr(module, "state", None), "SCB", None
        )  # where bitsandbytes moves them with the first row
        if isinstance(scales, Tensor):
            yield f"{path}.weight.SCB", scales


def _scales(parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a quantized weight's codes are read with, by name; none for others."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        yield from ((key, value) for key, value in state.as_dict().items() if isinstance(value, Tensor))
    if isinstance(scales := getattr(parameter, "SCB", None), Tensor):
        yield "SCB", scales


@torch.no_grad()
def _digest(tensor: Tensor, as_type: str | None) -> str:
    kind: torch.dtype = getattr(torch, as_type) if as_type is not None else tensor.dtype
    name = str(kind).removeprefix("torch.")
    found = hashlib.sha256(f"{name} {tuple(tensor.shape)}\n".encode())
    values = tensor.detach().reshape(-1)
    for start in range(0, values.numel(), PIECE):
        piece = values[start : start + PIECE].to(kind).contiguous().view(torch.uint8)
        found.update(piece.to("cpu", copy=True).numpy().data)  # numpy pins a storage, which FSDP could not free then
    return f"{name} {found.hexdigest()[:DIGITS]}"
