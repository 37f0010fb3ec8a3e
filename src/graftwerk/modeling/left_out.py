"""What a method that promises "all" leaves out on a model: matrices outside linear layers, biases out of its reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from graftwerk.methods.base import Method
from graftwerk.methods.bitfit import BitFit
from graftwerk.methods.target_modules import linear_layers
from graftwerk.modeling.architectures import Architecture, base_path
from graftwerk.modeling.module_index import module_index

SHOWN = 6


def left_out(model: PreTrainedModel, method: Method, view: Architecture) -> list[str]:
    """Return a sentence for each kind of weight that the settings ask for and the method does not reach.

    What the user left out (by `layers`, by naming targets) is not told.
    """
    if isinstance(method, BitFit):
        missed = [place.path for place in view.targets if method.leaves_out(place)]
        biases = len(missed) + len([place for place in view.targets if method.reaches(place)])
        if not missed:
            return []
        return [f"{len(missed)} of {biases} biases, out of its reach: {_named(missed)}"]
    if getattr(method, "target_modules", None) == "all-linear":
        return _matrices(model, view)
    return []


def _matrices(model: PreTrainedModel, view: Architecture) -> list[str]:
    """Weight matrices outside embeddings and heads that no linear layer holds, such as experts in one 3-d parameter."""
    base, within = module_index(model), base_path(model)
    reached = {f"{place.path}.weight" for place in linear_layers(view.targets)}
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
    return [f"{text} (reached: {100 * covered / total:.0f} % of their {total:,} parameters)"]


def _named(paths: Sequence[str]) -> str:
    """`4 x experts.down_proj, 2 x gate.weight`: by the ends of their paths, the most frequent first."""
    counts = Counter(".".join(path.split(".")[-2:]) for path in paths).most_common()
    shown = ", ".join(f"{n} x {name}" for name, n in counts[:SHOWN])
    return shown + (f" and {len(counts) - SHOWN} more kinds" if len(counts) > SHOWN else "")
