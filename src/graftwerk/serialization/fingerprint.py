"""The fingerprint of a base model: which weights an adapter was trained on, whatever its files were called.

It covers the pretrained part alone, so that every class that loads the same checkpoint agrees: no adapters, no task
heads, no output embeddings and no poolers (classes differ in whether they have them, and a class that finds none in the
checkpoint draws them at random). Values count as bfloat16: a checkpoint has the same fingerprint whether it was loaded
in float32 or in bfloat16. (In float16 it may differ, since rounding twice is not rounding once.)

Of each tensor at most `SAMPLES` values, evenly spread, are hashed. Two checkpoints of one shape differ everywhere, so
nothing is gained by reading all of them, and a model that is still lazily on disk stays there.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftwerk.errors import ModelError
from graftwerk.modeling.attach import disabled
from graftwerk.modeling.module_index import ModuleIndex, module_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 16_384
"""Values hashed of each tensor."""
_LEFT_OUT = frozenset({"pooler", "lm_head", "classifier", "score", "qa_outputs"})
"""Modules that are no part of the pretrained base, wherever they stand."""


@dataclass(frozen=True)
class _Known:
    """A fingerprint, and by what one sees that it still holds."""

    structure: weakref.ref[ModuleIndex]
    parameters: list[tuple[str, Tensor]]
    versions: list[int]
    digest: str


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """32 hexadecimal digits that stand for the weights of the base.

    About 0.1 s for 135 M parameters the first time; then remembered for as long as no parameter of the base is replaced
    or changed in place. (Writing through ``parameter.data`` escapes torch's own bookkeeping, and so ours.)

    Raises:
        ModelError: weights are on the meta device: nothing has been loaded yet.
        UnsupportedError: the model was trained in full and the base's weights were not kept.
    """
    with disabled(model):  # a merged adapter comes out for the moment, and so do weights that were trained in full
        return _fingerprint(model)


def _fingerprint(model: PreTrainedModel) -> str:
    now, known = module_index(model), _known.get(model)
    same = known is not None and known.structure() is now
    parameters = known.parameters if known is not None and same else sorted(_base_parameters(model))
    versions = [number for _, parameter in parameters for number in (parameter.data_ptr(), _version(parameter))]
    if known is not None and same and known.versions == versions:
        return known.digest
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters:
        if parameter.is_meta:
            raise ModelError(f"the weights of this model are not loaded (`{name}` is on the meta device)")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(_sample(parameter))
    _known[model] = _Known(weakref.ref(now), parameters, versions, digest.hexdigest())
    return digest.hexdigest()


def _base_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the base by their names within it; of tied ones the first name."""
    outputs = model.get_output_embeddings()
    for name, parameter in ModuleIndex(model.base_model).parameters.items():
        if _LEFT_OUT.isdisjoint(name.split(".")) and not _only_in(outputs, parameter, model):
            yield name, parameter


def _only_in(outputs: nn.Module | None, parameter: Tensor, model: PreTrainedModel) -> bool:
    """Whether a parameter belongs to the output embeddings and not, by a tie, to the input embeddings too."""
    if outputs is None or not any(parameter is other for other in outputs.parameters(recurse=False)):
        return False
    inputs = model.get_input_embeddings()
    return not any(parameter is other for other in inputs.parameters(recurse=False))


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    values = flat[:: max(1, -(-flat.numel() // SAMPLES))]
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.contiguous().view(torch.uint8).cpu().numpy().tobytes()
