"""The factors of a LoRA with everything folded in, for programs that know one rank and one scale only."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graftwerk.errors import UnsupportedError
from graftwerk.methods.lora import LoRA
from graftwerk.modeling.attach import Adapter
from graftwerk.serialization.peft_format import PREFIX, write_lora

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By path of a layer: A (r, in) and B (out, r) float32; the layer's update is B A, its scale included in B."""


def lora_factors(adapter: Adapter, program: str) -> Factors:
    """Return a LoRA's factors.

    Args:
        adapter: The adapter. PiSSA's start is part of its factors.
        program: Who is to read them, for errors.

    Raises:
        UnsupportedError: The adapter is no LoRA, or has more than factors of linear layers: DoRA's magnitudes, a head,
            rows of the embedding, or parameters that are no layers; or it is on no causal language model.
    """
    method = adapter.method
    model_type = type(adapter.model)
    name = getattr(model_type, "_graftwerk_base", model_type).__name__
    if not isinstance(method, LoRA):
        raise UnsupportedError(
            f"{program} reads LoRA adapters only, and this is {method.title}",
            hint="methods that can be merged go --to merged",
        )
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedError(
            f"{program} reads adapters of causal language models, and this one is on {name}", hint="--to merged"
        )
    if method.use_dora:
        raise UnsupportedError(f"{program} does not read DoRA's magnitudes", hint="--to merged")
    stored = write_lora(adapter, None).tensors
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for key, tensor in stored.items():
        path, mark, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not mark or part not in ("A.weight", "B.weight") or ".base_layer" in path:
            raise UnsupportedError(
                f"{program} reads no more than factors of linear layers, and this adapter has `{key}`",
                hint="--to merged",
            )
        if part == "A.weight":
            b = stored[f"{PREFIX}{path}.lora_B.weight"]
            factors[path] = (tensor.detach().float().cpu(), (b.detach().float() * method.scale_at(path)).cpu())
    return factors
