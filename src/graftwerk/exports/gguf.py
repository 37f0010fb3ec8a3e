"""GGUF files of LoRA adapters, as llama.cpp reads them.

The names of tensors are those of the `gguf` package. llama.cpp stores the query and key projections of Llama and
Mistral with the rows of each head in another order (its rotary embedding turns neighbouring pairs, transformers' turns
halves), so the rows of B follow. It scales an update by alpha / r, with one alpha for the whole file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graftwerk.errors import ResourceError, UnsupportedError
from graftwerk.exports.lora_factors import Factors

ADAPTER_FILE = "adapter.gguf"
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
}
"""transformers' kinds of models whose layers map one to one, and llama.cpp's names of them."""
_REORDERED = ("llama", "mistral")


def check_gguf(config: Any) -> None:
    """Check that an adapter for such a model can be written.

    Raises:
        UnsupportedError: llama.cpp has no such model, or one whose layers are laid out otherwise.
        ResourceError: The `gguf` package is missing.
    """
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"adapters for `{config.model_type}` are not written as GGUF",
            hint=f"there are: {', '.join(ARCHITECTURES)}; --to merged writes a model for its converter",
        )
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ResourceError("writing GGUF needs the package gguf", hint="pip install 'graftwerk[gguf]'") from None


def write_gguf(factors: Factors, config: Any, path: Path) -> None:
    """Write a LoRA as one GGUF file.

    Args:
        factors: By path of a layer: A (r, in) and B (out, r), the scale included in B.
        config: The model's configuration.
        path: The file.

    Raises:
        UnsupportedError: llama.cpp has no tensor for a layer.
    """
    import gguf

    names = _tensor_names(factors, config)
    alpha = float(max(len(a) for a, _ in factors.values()))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer, (a, b) in factors.items():
        heads = _heads(layer, config)
        rows = b if heads is None else b[_llama_order(len(b), heads)]
        writer.add_tensor(f"{names[layer]}.lora_a", a.numpy())
        writer.add_tensor(f"{names[layer]}.lora_b", (rows * (len(a) / alpha)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def apply_gguf(model: nn.Module, path: Path) -> None:
    """Add the updates of a GGUF file to a model's weights in place, as llama.cpp adds them."""
    import gguf

    reader = gguf.GGUFReader(path)
    config: Any = model.config
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors: dict[str, NDArray[np.float32]] = {tensor.name: tensor.data for tensor in reader.tensors}
    layers = {layer: None for layer, module in model.named_modules() if isinstance(module, nn.Linear)}
    for layer, name in _tensor_names(layers, config).items():
        if f"{name}.lora_a" not in tensors:
            continue
        a = torch.from_numpy(tensors[f"{name}.lora_a"].copy())  # (r, in)
        b = torch.from_numpy(tensors[f"{name}.lora_b"].copy())  # (out, r)
        heads = _heads(layer, config)
        if heads is not None:
            b = b[_llama_order(len(b), heads).argsort()]
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        weight += (b @ a * (alpha / len(a))).to(weight)


def _tensor_names(layers: Any, config: Any) -> dict[str, str]:
    """Return llama.cpp's name of each layer's weight.

    Raises:
        UnsupportedError: It has none for a layer.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {}
    for layer in layers:
        name = table.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UnsupportedError(f"llama.cpp has no tensor for `{layer}`", hint="--to merged")
        names[layer] = name
    return names


def _heads(layer: str, config: Any) -> int | None:
    """Return the number of heads whose rows llama.cpp reorders in a layer, or None if it reorders nothing there."""
    if config.model_type not in _REORDERED:
        return None
    if layer.endswith("q_proj"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if layer.endswith("k_proj") else None


def _llama_order(rows: int, heads: int) -> Tensor:
    """Return the row of transformers' projection that stands at each row of llama.cpp's, (rows,)."""
    return torch.arange(rows, device="cpu").view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
