"""The fingerprint of a base model: which weights an adapter was trained on, whatever its files were called.

It covers the pretrained part alone, so that every class that loads the same checkpoint agrees: no adapters, no task
heads, no output embeddings and no poolers (classes differ in whether they have them, and a class that finds none in the
checkpoint draws them at random), nor anything else that was drawn. What an adapter does not store of these has digests
of its own, `digests_beside`. Values count as bfloat16: a checkpoint has the same fingerprint whether it was loaded
in float32 or in bfloat16. (In float16 it may differ, since rounding twice is not rounding once.)

Weights that are quantized while they are loaded count as they were read (`FullWeights`), so that a base has the same
fingerprint in 4 bits as in 32. Of a model that somebody else has quantized, only the codes are known.

Of each tensor at most `SAMPLES` values, evenly spread, are hashed. Two checkpoints of one shape differ everywhere, so
nothing is gained by reading all of them, and a model that is still lazily on disk stays there.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import ModelError
from graftwerk.methods.placement import onloaded
from graftwerk.modeling.attach import disabled
from graftwerk.modeling.drawn import drawn_modules, within
from graftwerk.modeling.module_index import ModuleIndex, base_parameters, module_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Mapping[str, Sequence[int]]
"""Numbers of rows by the path of their table."""
SAMPLES = 16_384
"""Values hashed of each tensor."""
_FULL = "_graftwerk_full_weights"
"""Attribute of a model with the samples of its full weights, by name."""
_LEFT_OUT = frozenset({"pooler", "lm_head", "classifier", "score", "qa_outputs"})
"""Modules that are no part of the pretrained base, wherever they stand."""


@dataclass(frozen=True)
class _Known:
    """A digest of some parameters, or several, and by what one sees that it still holds."""

    structure: weakref.ref[ModuleIndex]
    parameters: list[tuple[str, Tensor]]
    versions: list[int]
    made: Any


class FullWeights:
    """Samples of the weights that a model was quantized from, for its fingerprint."""

    def __init__(self) -> None:
        self._samples: dict[str, tuple[tuple[int, ...], bytes]] = {}

    def see(self, name: str, weight: Tensor) -> None:
        """Take a sample of a weight (any shape), by its name in the model."""
        self._samples[name] = tuple(weight.shape), _sample(weight)

    def keep(self, model: PreTrainedModel) -> None:
        """Leave the samples with the model that was quantized."""
        vars(model)[_FULL] = self._samples


def _full_weights(model: nn.Module) -> dict[int, tuple[tuple[int, ...], bytes]]:
    """Return shape and sample of each full weight by the identity of its quantized parameter; empty for most models."""
    samples = vars(model).get(_FULL) or {}
    parameters = base_parameters(model) if samples else {}
    return {id(parameters[name]): sample for name, sample in samples.items() if name in parameters}


_Memory = weakref.WeakKeyDictionary[nn.Module, _Known]
_fingerprints: _Memory = weakref.WeakKeyDictionary()
_beside: _Memory = weakref.WeakKeyDictionary()


def _remembered(
    memory: _Memory,
    model: PreTrainedModel,
    of: Callable[[PreTrainedModel], list[tuple[str, Tensor]]],
    make: Callable[[PreTrainedModel, list[tuple[str, Tensor]]], Any],
) -> Any:
    """Return what ``make`` gives for the parameters ``of`` a model, made again only once one of them has changed."""
    now, known = module_index(model), memory.get(model)
    same = known is not None and known.structure() is now
    parameters = known.parameters if known is not None and same else of(model)
    versions = [number for _, parameter in parameters for number in (parameter.data_ptr(), _version(parameter))]
    if known is not None and same and known.versions == versions:
        return known.made
    made = make(model, parameters)
    memory[model] = _Known(weakref.ref(now), parameters, versions, made)
    return made


def fingerprint(model: PreTrainedModel, without: Rows = MappingProxyType({})) -> str:
    """Return a hash of the base's weights, as 32 hexadecimal digits.

    It takes about 0.1 s for 135 M parameters the first time, and is then cached for as long as no parameter of the base
    is replaced or changed in place. (Writing through ``parameter.data`` escapes torch's version counter, and so ours.)

    Args:
        model: The base; adapters on it do not count.
        without: Rows of tables, by path, that do not count: an adapter replaces them.

    Raises:
        ModelError: Weights are on the meta device: nothing has been loaded yet.
        UnsupportedError: All weights were trained and the base's were not stored.
    """
    with disabled(model):  # a merged adapter comes out for the moment, and so do weights that were trained in full
        if without:
            return _fingerprint(model, sorted(_base_parameters(model)), without)
        made: str = _remembered(_fingerprints, model, lambda model: sorted(_base_parameters(model)), _fingerprint)
        return made


def fingerprint_of_codes(model: PreTrainedModel) -> str:
    """Return a hash of the base's weights as they are stored, those that are quantized by their codes."""
    with disabled(model):
        return _fingerprint(model, sorted(_base_parameters(model)), full={})


def _fingerprint(
    model: PreTrainedModel,
    parameters: list[tuple[str, Tensor]],
    without: Rows = MappingProxyType({}),
    full: Mapping[int, tuple[tuple[int, ...], bytes]] | None = None,
) -> str:
    digest, rows = hashlib.blake2b(digest_size=16), _by_parameter(model, without)
    full = _full_weights(model) if full is None else full
    for name, parameter in parameters:
        if id(parameter) in full:
            shape, sample = full[id(parameter)]
            digest.update(f"{name} {shape}\n".encode() + sample)
            continue
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        with loaded_parameter(model.base_model, name, parameter) as weight:
            own = rows.get(id(parameter))
            digest.update(_sample_without(weight, own) if own else _sample(weight))
    return digest.hexdigest()


def _base_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Return the parameters of the base by their names within it; tied ones by the first name."""
    outputs = model.get_output_embeddings()
    drawn = {
        id(parameter) for path in drawn_modules(model) for parameter in module_index(model).modules[path].parameters()
    }
    for name, parameter in ModuleIndex(model.base_model).parameters.items():
        if (
            id(parameter) not in drawn
            and _LEFT_OUT.isdisjoint(name.split("."))
            and not _only_in(outputs, parameter, model)
        ):
            yield name, parameter


def _only_in(outputs: nn.Module | None, parameter: Tensor, model: PreTrainedModel) -> bool:
    """Return True if a parameter is of the output embeddings and is not tied to the input embeddings."""
    if outputs is None or not any(parameter is other for other in outputs.parameters(recurse=False)):
        return False
    inputs = model.get_input_embeddings()
    return not any(parameter is other for other in inputs.parameters(recurse=False))


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version


def digests_beside(
    model: PreTrainedModel, stored: Iterable[str], without: Rows = MappingProxyType({})
) -> dict[str, str]:
    """Return a digest for each weight, by name, that neither the fingerprint covers nor an adapter stores.

    These are output embeddings, poolers and heads. Where one of them was drawn at random, an adapter that was trained
    on top of it gives other answers with another.

    Args:
        model: The base; adapters on it do not count.
        stored: Paths of the modules that the adapter stores whole.
        without: As for `fingerprint`.

    Raises:
        ModelError, UnsupportedError: as `fingerprint`.
    """
    with disabled(model):
        found: dict[str, str] = (
            _digests(model, _parameters_beside(model), without)
            if without
            else _remembered(_beside, model, _parameters_beside, _digests)
        )
        return {name: digest for name, digest in found.items() if not within(name, stored)}


def _parameters_beside(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    covered = {id(parameter) for _, parameter in _base_parameters(model)}
    named = base_parameters(model).items()
    return [(name, one) for name, one in named if id(one) not in covered and one.is_floating_point()]


def _by_parameter(model: PreTrainedModel, rows: Rows) -> dict[int, Sequence[int]]:
    modules = module_index(model).modules
    return {id(modules[path]._parameters["weight"]): numbers for path, numbers in rows.items()}


def _digests(
    model: PreTrainedModel, parameters: list[tuple[str, Tensor]], without: Rows = MappingProxyType({})
) -> dict[str, str]:
    found, rows = {}, _by_parameter(model, without)
    for name, parameter in parameters:
        with loaded_parameter(model, name, parameter) as weight:
            own = rows.get(id(parameter))
            sample = _sample_without(weight, own) if own else _sample(weight)
            found[name] = hashlib.blake2b(sample, digest_size=8).hexdigest()
    return found


@contextmanager
def loaded_parameter(model: nn.Module, name: str, parameter: Tensor) -> Iterator[Tensor]:
    """Give a parameter of a model, any shape, loaded for the moment if accelerate has offloaded it.

    Raises:
        ModelError: it has not been loaded at all.
    """
    if not parameter.is_meta:
        yield parameter
        return
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    with onloaded(module):
        weight = module._parameters[own]
        if weight is None or weight.is_meta:
            raise ModelError(f"the weights of this model are not loaded (`{name}` is on the meta device)")
        yield weight


def _sample(parameter: Tensor) -> bytes:
    return _as_bytes(parameter.detach().reshape(-1)[:: _step(parameter)])


def _sample_without(parameter: Tensor, rows: Sequence[int]) -> bytes:
    """Return the sample of a table (V, d) with zeros in these rows."""
    values = parameter.detach().reshape(-1)[:: _step(parameter)]
    row = torch.arange(0, parameter.numel(), _step(parameter), device="cpu") // parameter.shape[1]
    return _as_bytes(values.masked_fill(torch.isin(row, torch.tensor(rows, device="cpu")).to(values.device), 0))


def _step(parameter: Tensor) -> int:
    return max(1, -(-parameter.numel() // SAMPLES))


def _as_bytes(values: Tensor) -> bytes:
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.contiguous().view(torch.uint8).cpu().numpy().tobytes()
