"""Full fine-tuning as an adapter: trained weights and the base's are swapped, the parameter objects stay."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base_weights import is_coded, weight_type


class TrainedWeights:
    """All base parameters of a model that were trainable before (Marian's sinusoids are not), trained.

    Args:
        base: All parameters of the base by name, any shape.
        keep_base: True to keep a copy of the base's values.
        flags: True for each parameter that required gradients before the first adapter, by name.
        hooked: True if accelerate has hooks on the model that load offloaded weights.

    Attributes:
        live: True while the model's parameters hold the trained values.
        other: The values that are not in the model: the base's while live, the trained ones otherwise; None if the
            base's values were not kept.
        trainable: True if they train while live.

    Raises:
        UnsupportedError: a weight is quantized, a tensor of another library, or offloaded.
    """

    def __init__(
        self, base: Mapping[str, nn.Parameter], keep_base: bool, flags: Mapping[str, bool], *, hooked: bool = False
    ) -> None:
        self.parameters = {name: parameter for name, parameter in base.items() if flags.get(name, True)}
        # Codes never required gradients, so that their flags would leave them out, and a part of the base would train.
        coded = next((name for name, parameter in base.items() if is_coded(parameter)), None)
        if coded is not None:
            raise UnsupportedError(
                f"full fine-tuning needs weights in floating point; {coded} is quantized ({weight_type(base[coded])})",
                hint="use lora on a quantized base, or load it in full precision",
            )
        # Without hooks that load them, a model without storage is one that a dry run has built.
        offloaded = [name for name, parameter in self.parameters.items() if hooked and parameter.is_meta]
        if offloaded:
            raise UnsupportedError(
                f"full fine-tuning needs all weights in memory; {offloaded[0]} is offloaded",
                hint="use lora, or load the model without offloading",
            )
        self.other: dict[str, Tensor] | None = None
        if keep_base:
            self.other = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.live = self.trainable = True
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def put(self, live: bool) -> None:
        """Make the model hold the trained (``live``) or the base's values: one pointer a parameter.

        Raises:
            UnsupportedError: the base's values were not kept.
        """
        if live == self.live:
            return
        if self.other is None:
            raise UnsupportedError(
                "the base's weights are lost: full fine-tuning ran with keep_base=False",
                hint="attach with Full(keep_base=True), or load the base again",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.data, self.other[name] = self.other[name], parameter.data
        for parameter in self.parameters.values():
            parameter.requires_grad_(live and self.trainable)
        self.live = live


def warn_of_rounding(weights: TrainedWeights) -> None:
    """Warn the caller of `attach` of the base's own weights that train in 16 bits; what adapters add is float32."""
    low = [parameter.dtype for parameter in weights.parameters.values() if parameter.dtype.itemsize < 4]
    if low:
        name, lost = str(low[0]).removeprefix("torch."), torch.finfo(low[0]).eps / 2
        warnings.warn(
            f"full fine-tuning trains {len(low)} of {len(weights.parameters)} tensors of this base in {name}: steps "
            f"below {lost:.2%} of a weight are lost in its rounding. Load the base with dtype=torch.float32 (autocast "
            f"computes in {name} all the same), or use lora, whose parameters are float32",
            stacklevel=4,
        )
