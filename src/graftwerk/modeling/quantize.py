"""A base whose linear layers hold 4 or 8 bits a weight: bitsandbytes' layers, filled while files are read.

`quantizer(...)` is passed to `from_pretrained`, which gives each weight to it as soon as it is read: the full model is
never in memory. Afterwards the model is one that transformers has quantized itself, as far as anybody can see.

Three things differ from transformers' own way, so that training and evaluation compute the same numbers for a row on
every machine, whatever rows are beside it:

* layers of 8 bits multiply their input with the dequantized weight. LLM.int8() rounds the input too, with scales that
  depend on the batch, and on a CPU in evaluation alone;
* 4-bit layers are not repacked for AVX-512 in evaluation, which rounds to bfloat16 and has no gradients;
* their biases keep their precision. bitsandbytes casts them to the compute type in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.methods.base_weights import base_weight
from graftwerk.modeling.architectures import base_path
from graftwerk.modeling.layer_checks import is_weight_only

_METHOD = "graftwerk"
"""Name by which transformers finds the quantizer; no file ever holds it."""
Seen = Callable[[str, Tensor], None]
"""Function that is given each weight, by its name in the model, before it is quantized."""


class QuantizationErrors:
    """Quantization errors of a base's weights, themselves stored in nf4: an eighth of the weights' float32 bytes."""

    def __init__(self) -> None:
        self._codes: dict[str, tuple[Tensor, Any, torch.Size]] = {}

    def keep(self, path: str, weight: Tensor, codes: Any) -> None:
        """Keep the error of a layer that has just been quantized.

        Args:
            path: Its path.
            weight: The full weight, (out, in).
            codes: The same weight as bitsandbytes' `Params4bit`.
        """
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        error = weight.float() - dequantize_4bit(codes.data, codes.quant_state).float()  # (out, in)
        # In one row: bitsandbytes' CPU kernel (0.50) misreads the scales of rows whose length is no multiple of 64.
        stored = quantize_4bit(error.reshape(1, -1), compress_statistics=True, quant_type="nf4")
        self._codes[path] = *stored, error.shape

    def __contains__(self, path: str) -> bool:
        return path in self._codes

    def take(self, path: str) -> Tensor:
        """Return the error of a layer, (out, in) in float32, and release it."""
        from bitsandbytes.functional import dequantize_4bit

        codes, state, shape = self._codes.pop(path)
        error: Tensor = dequantize_4bit(codes, state).reshape(shape)
        return error

    def __len__(self) -> int:
        return len(self._codes)

    def clear(self) -> None:
        """Drop the remaining errors."""
        self._codes.clear()


class _Request(BitsAndBytesConfig):  # type: ignore[misc]
    """Settings that `from_pretrained` is given, as `quantizer` takes them."""

    def __init__(
        self,
        name: str,
        double_quant: bool,
        compute: torch.dtype,
        skip: Collection[str],
        whole: Collection[str],
        seen: Seen | None,
        errors: QuantizationErrors | None,
    ) -> None:
        super().__init__(
            load_in_4bit=name == "nf4",
            load_in_8bit=name == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=compute,
        )
        self.quant_method = _METHOD
        self.skip, self.whole, self.seen, self.errors = skip, whole, seen, errors

    def __deepcopy__(self, memo: Any) -> _Request:
        return self  # transformers copies what it is given, and a copied listener would hear nothing

    def plain(self, skipped: list[str]) -> BitsAndBytesConfig:
        """Return transformers' own settings for the same layers."""
        return BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype,
            llm_int8_skip_modules=skipped,
        )


def quantizer(
    name: str,
    *,
    double_quant: bool,
    compute: torch.dtype,
    skip: Collection[str] = (),
    whole: Collection[str] = (),
    seen: Seen | None = None,
    errors: QuantizationErrors | None = None,
) -> BitsAndBytesConfig:
    """Return what `from_pretrained` takes as ``quantization_config`` to quantize a base's linear layers.

    Args:
        name: ``nf4`` or ``int8``.
        double_quant: Store the scales of nf4 in 8 bits as well.
        compute: Type that layers of 4 bits multiply in.
        skip: Modules whose layers stay as they are, by path or a part of it; each must match a layer.
        whole: The same, but some may match nothing: modules that adapters save whole, paths of another head.
        seen: Listener of the full weights, as they were read.
        errors: Collects the quantization error of each weight, or None.
    """
    return _Request(name, double_quant, compute, skip, whole, seen, errors)


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Transformers' side of `quantizer`."""

    quantization_config: _Request

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put bitsandbytes' layers, without values, in place of the linear ones."""
        config = self.quantization_config
        self.chosen, self.skipped = choose_layers(model, config.skip, config.whole)
        for path in self.chosen:
            with torch.device("meta"):
                model.set_submodule(path, empty_layer(model.get_submodule(path), config))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Make the model one that transformers has quantized itself."""
        config = self.quantization_config.plain(self.skipped)
        model.config.quantization_config = config
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        own = Bnb4BitHfQuantizer if config.load_in_4bit else Bnb8BitHfQuantizer
        model.hf_quantizer = own(config, pre_quantized=False)
        setattr(model, "is_loaded_in_4bit" if config.load_in_4bit else "is_loaded_in_8bit", True)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Quantize one weight, after it was shown to the listener, and store its error if requested."""

    def __init__(self, owner: _Quantizer) -> None:
        self.seen, self.errors = owner.quantization_config.seen, owner.quantization_config.errors
        from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize

        self.op = (Bnb4bitQuantize if owner.quantization_config.load_in_4bit else Bnb8bitQuantize)(owner)

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        full = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if self.seen is not None:
            for name, weight in full.items():
                self.seen(name, weight)
        converted: dict[str, Any] = self.op.convert(input_dict, *args, model=model, **kwargs)
        if self.errors is not None:
            for name, weight in full.items():
                path = name.rpartition(".")[0]
                transposed = issubclass(model.get_submodule(path).source_cls, Conv1D)
                self.errors.keep(path, weight.T if transposed else weight, converted[name])
        return converted


def empty_layer(layer: nn.Linear | Conv1D, config: BitsAndBytesConfig) -> nn.Linear:
    """Return bitsandbytes' layer for a linear one, without values, on the current device.

    Args:
        layer: The linear layer.
        config: Settings as `quantizer` returns them.
    """
    sizes = tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    bias = layer.bias is not None
    if config.load_in_8bit:
        made: nn.Linear = int8_layer()(*sizes, bias, has_fp16_weights=False)
    else:
        made = nf4_layer()(*sizes, bias, config.bnb_4bit_compute_dtype, config.bnb_4bit_use_double_quant, "nf4")
        made.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    made.source_cls = type(layer)  # type: ignore[assignment]  # whether the stored weight is transposed
    return made.requires_grad_(False)


@cache
def nf4_layer() -> Any:
    """Return bitsandbytes' layer of 4 bits, with a forward pass that leaves its bias as it is.

    The original casts the bias to the compute type in place, which permanently changes the base.
    """
    from bitsandbytes.nn import Linear4bit as Layer

    class Linear4bit(Layer):  # type: ignore[misc]
        """A frozen linear layer of 4 bits a weight and one scale for 64 of them."""

        def forward(self, x: Tensor) -> Tensor:
            """Return W x + bias, (..., out), for x (..., in)."""
            bias = self._parameters["bias"]
            self._parameters["bias"] = None
            try:
                y: Tensor = super().forward(x)
            finally:
                self._parameters["bias"] = bias
            return y if bias is None else y + bias.to(y.dtype)

    return Linear4bit


@cache
def int8_layer() -> Any:
    """Return bitsandbytes' layer of 8 bits, with a forward pass that leaves its input as it is."""
    from bitsandbytes.nn import Linear8bitLt

    class Linear8bit(Linear8bitLt):  # type: ignore[misc]
        """A frozen linear layer of one byte a weight and one scale for each row."""

        def forward(self, x: Tensor) -> Tensor:
            """Return W x + bias, (..., out), for x (..., in)."""
            y: Tensor = _Int8Product.apply(x, self)  # type: ignore[no-untyped-call]
            return y

    return Linear8bit


class _Int8Product(torch.autograd.Function):
    """Product with a frozen weight of 8 bits, plus the bias; the full weight lives during the product alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, base_weight(layer).to(x.dtype), bias)  # (..., in) -> (..., out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ base_weight(ctx.layer).to(grad.dtype), None


def choose_layers(model: PreTrainedModel, skip: Collection[str], whole: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the paths of the linear layers that are quantized, and of those that are not.

    Raises:
        ConfigError: A name of ``skip`` matches no layer.
        UnsupportedError: No layer is left.
    """
    base, outputs, tied = base_path(model), model.get_output_embeddings(), _tied(model)
    whole = {*whole, *(model._keep_in_fp32_modules or ()), "pooler"}
    chosen: list[str] = []
    skipped: list[str] = []
    layers: list[str] = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if type(module) not in (nn.Linear, Conv1D):
            continue
        layers.append(path)
        parent, _, name = path.rpartition(".")
        inside = not base or path.startswith(f"{base}.")
        kept = module is outputs or path in tied or is_weight_only(modules[parent], name)
        (skipped if kept or not inside or _matches(path, {*skip, *whole}) else chosen).append(path)
    for name in skip:
        if not any(_matches(path, [name]) for path in layers):
            names = sorted({path.rpartition(".")[2] for path in layers})
            raise ConfigError(
                f"`{name}` matches no linear layer of {type(model).__name__}",
                where="quantization.skip",
                hint=f"its layers end in: {', '.join(names[:20])}",
            )
    if not chosen:
        raise UnsupportedError(
            f"{type(model).__name__} has no linear layer that could be quantized",
            where="quantization",
            hint="leave `quantization` out" if not skip else "skip fewer modules",
        )
    return chosen, skipped


def _matches(path: str, names: Collection[str]) -> bool:
    """Return True if one of the names is a path, or a part of it between dots."""
    return any(f".{name}." in f".{path}." for name in names)


def _tied(model: PreTrainedModel) -> set[str]:
    """Return the paths of modules whose weight is another's."""
    pairs = model.all_tied_weights_keys or {}
    return {re.sub(r"\.weight$", "", key) for pair in pairs.items() for key in pair}
