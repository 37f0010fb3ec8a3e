"""Weights that a method does not reach on a model: matrices outside linear layers, biases out of reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from graftwerk.methods.base import Method
from graftwerk.methods.bitfit import BitFit
from graftwerk.methods.target_modules import endings, linear_layers
from graftwerk.modeling.architectures import Architecture, base_path
from graftwerk.modeling.module_index import module_index

SHOWN = 6


def left_out(model: PreTrainedModel, method: Method, architecture: Architecture) -> list[str]:
    """Return a sentence for each kind of weight that the settings ask for and the method does not reach.

    Weights that the user left out (by `layers`, by naming targets) are not listed.
    """
    if isinstance(method, BitFit):
        missed = [target.path for target in architecture.targets if method.leaves_out(target)]
        biases = len(missed) + len([target for target in architecture.targets if method.reaches(target)])
        if not missed:
            return []
        return [f"{len(missed)} of {biases} biases, out of its reach: {_named(missed)}"]
    if getattr(method, "target_modules", None) == "all-linear":
        return _matrices(model, architecture, method)
    return []


def _matrices(model: PreTrainedModel, architecture: Architecture, method: Method) -> list[str]:
    """Describe weight matrices outside embeddings and heads that no linear layer holds, such as experts."""
    base, within = module_index(model), base_path(model)
    reached = {f"{target.path}.weight" for target in linear_layers(architecture.targets)}
    named = frozenset(getattr(method, "target_parameters", None) or ())
    reached |= {target.path for target in architecture.parameters if not named.isdisjoint(endings(target.path))}
    outputs = model.get_output_embeddings()
    sizes: dict[str, int] = {}
    for name, parameter in base.parameters.items():
        path = name.rpartition(".")[0]
        owner = base.modules[path]
        outside = bool(within) and not name.startswith(f"{within}.")
        if outside or owner is outputs or isinstance(owner, nn.Embedding) or "embed" in name:
            continue
        if name in reached or sum(size > 1 for size in parameter.shape) >= 2:
            sizes[name] = parameter.numel()
    missed = [name for name in sizes if name not in reached]
    if not missed:
        return []
    total, covered = sum(sizes.values()), sum(size for name, size in sizes.items() if name in reached)
    text = f"{len(missed)} of {len(sizes)} weight matrices, which are no linear layers to adapt: {_named(missed)}"
    text = f"{text} (reached: {100 * covered / total:.0f} % of their {total:,} parameters"
    fits = {target.path for target in architecture.parameters if target.unfit is None}
    if "target_parameters" in type(method).model_fields and (open_ones := [name for name in missed if name in fits]):
        return [f"{text}; target_parameters reaches them by name, such as {_ending(open_ones[0])})"]
    return [f"{text})"]


def _named(paths: Sequence[str]) -> str:
    """Return counts by the ends of the paths, the most frequent first: `4 x experts.down_proj, 2 x gate.weight`."""
    counts = Counter(map(_ending, paths)).most_common()
    shown = ", ".join(f"{n} x {name}" for name, n in counts[:SHOWN])
    return shown + (f" and {len(counts) - SHOWN} more kinds" if len(counts) > SHOWN else "")


def _ending(path: str) -> str:
    """Return the last two components of a path."""
    return ".".join(path.split(".")[-2:])
