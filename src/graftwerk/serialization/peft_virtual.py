"""Virtual tokens as PEFT writes them down, and back: prompt tuning, P-tuning, prefix tuning.

PEFT stores one bare key, ``prompt_embeddings``: the vectors themselves, after any network that made them; heads lie
beside it as ``base_model.<path>``. Prompts and P-tuning are (n, d). Prefixes are (n, 2 L G D): for each token the
layers one after the other, each with its key and its value. The network goes into a second file, so that training can
resume.

A prefix of PEFT is the cache of a decoder. What that does elsewhere cannot be had here, or is not worth having: in
encoder-decoder models each vector is used twice, half of them never got a gradient, and the encoder has none; in
encoders it moves the positions of the text; under a sliding window it scrolls out of sight. Such folders are refused
with the reason, and ours of those models are stored as ``GRAFTWERK_PREFIX``.

Legend: n virtual tokens, d model width, L layers, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwerk.errors import AdapterError, UnsupportedError
from graftwerk.methods.prefix_tuning import Prefix, PrefixModule
from graftwerk.methods.prompt_tuning import Prompt, PromptModule
from graftwerk.methods.ptuning import PTuning
from graftwerk.modeling.architectures import Architecture, AttentionLayer, read_architecture
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.drawn import within
from graftwerk.modeling.module_index import base_modules
from graftwerk.serialization.peft_format import Restored, Stored, common_config, head_tensors, write_own
from graftwerk.serialization.peft_reading import read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VECTORS = "prompt_embeddings"
_HEAD_PREFIX = "base_model."


def write_prompt(adapter: Adapter, base_name: str | None) -> Stored:
    """Return the contents of a folder for prompt tuning or P-tuning: the vectors before the text."""
    method = adapter.method
    assert isinstance(method, Prompt | PTuning)
    table = adapter.model.get_input_embeddings()
    if any(module is table and within(path, adapter.heads) for path, module in base_modules(adapter.model).items()):
        return write_own(adapter, base_name)  # PEFT reads the text with the base's table, whatever is saved
    module = next(module for _, module in adapter.modules() if isinstance(module, PromptModule))
    vectors = module.merged_state()[_VECTORS]
    config: dict[str, Any] = {
        **common_config(adapter, str(method.peft_type), base_name),
        "num_virtual_tokens": vectors.shape[0],
        "token_dim": vectors.shape[1],
        "num_transformer_submodules": 1,
        **_sizes(adapter.model),
    }
    if isinstance(method, Prompt):
        config["prompt_tuning_init"] = "RANDOM"  # PEFT would look for a tokenizer to start from the text again
    else:
        network = method.encoder_reparameterization_type
        config["encoder_reparameterization_type"] = "MLP" if network == "NONE" else network
        config["encoder_hidden_size"] = method.encoder_hidden_size or vectors.shape[1]
        config["encoder_num_layers"] = method.encoder_num_layers
        config["encoder_dropout"] = method.encoder_dropout
    return _with_heads(adapter, config, vectors)


def write_prefix(adapter: Adapter, base_name: str | None) -> Stored:
    """Return the contents of the folder of a prefix-tuning adapter, in our own format if PEFT's cannot hold it."""
    method, architecture = adapter.method, read_architecture(adapter.model)
    attentions = _decoder_attentions(architecture)
    assert isinstance(method, Prefix)
    if attentions is None or _window(adapter.model) or method.layers is not None:
        return write_own(adapter, base_name)
    modules = dict(adapter.modules())
    rows = []
    for attention in attentions:
        module = modules[attention.path]
        assert isinstance(module, PrefixModule)
        folded = module.merged_state()
        rows += [folded["prefix_key"].cpu(), folded["prefix_value"].cpu()]  # a layer may be on another device
    width = attentions[0].kv_heads * attentions[0].head_dim
    config = {
        **common_config(adapter, "PREFIX_TUNING", base_name),
        "num_virtual_tokens": method.num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": attentions[0].kv_heads,
        "num_layers": len(attentions),
        "encoder_hidden_size": method.encoder_hidden_size or architecture.stacks[0].width,
        "prefix_projection": method.prefix_projection,
    }
    return _with_heads(adapter, config, torch.cat(rows, dim=1))


def _with_heads(adapter: Adapter, config: dict[str, Any], vectors: Tensor) -> Stored:
    raw = adapter.state_dict()
    heads = head_tensors(adapter, _HEAD_PREFIX)
    own = {key: tensor for key, tensor in raw.items() if not adapter.is_head(key)}
    stored_plainly = all(key.rpartition(".")[2] in (_VECTORS, "prefix_key", "prefix_value") for key in own)
    return Stored(config, {_VECTORS: vectors, **heads}, {} if stored_plainly else own)


def read_prompt(
    model: PreTrainedModel, architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Restored:
    """Read PEFT's prompt tuning or P-tuning.

    Args:
        model: The base.
        architecture: Its architecture.
        config: The checked `adapter_config.json`, with n virtual tokens.
        tensors: By PEFT's keys; ``prompt_embeddings`` (n, D), or (2n, D) for an encoder-decoder, and heads.

    Returns:
        Settings and tensors; the virtual tokens are (n, D).

    Raises:
        UnsupportedError: The input embeddings of this architecture are not known.
        AdapterError: ``prompt_embeddings`` is missing or has another shape.
    """
    vectors, heads, raw = _vectors(model, config, tensors)
    n = config["num_virtual_tokens"]
    if not architecture.stacks:
        raise UnsupportedError(f"where the input embeddings of `{architecture.model_type}` go in is not known")
    stack = architecture.stacks[0]  # of an encoder-decoder: the encoder
    if vectors.shape not in ((n, stack.width), (2 * n, stack.width)):
        raise AdapterError(
            f"mis-shaped: prompt_embeddings has shape {tuple(vectors.shape)}, and {(n, stack.width)} was expected"
        )
    # PEFT keeps a second half for the decoder of an encoder-decoder, and never uses it.
    raw[f"{stack.path}.{_VECTORS}" if stack.path else _VECTORS] = vectors[:n].clone()
    if config["peft_type"] == "PROMPT_TUNING":
        return Restored(Prompt(num_virtual_tokens=n, modules_to_save=tuple(heads)), raw)
    method = PTuning(num_virtual_tokens=n, encoder_reparameterization_type="NONE", modules_to_save=tuple(heads))
    return Restored(method, raw)


def read_prefix(
    model: PreTrainedModel, architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Restored:
    """Read PEFT's prefix tuning of a decoder-only model.

    Args:
        model: The base, with L attention layers of key and value width W.
        architecture: Its architecture.
        config: The checked `adapter_config.json`, with n virtual tokens.
        tensors: By PEFT's keys; ``prompt_embeddings`` (n, L * 2 * W), and heads.

    Returns:
        Settings and tensors; the keys and values of each layer are (n, W).

    Raises:
        UnsupportedError: The model is no decoder with layers all alike, or has a sliding attention window.
        AdapterError: ``prompt_embeddings`` is missing or has another shape.
    """
    vectors, heads, raw = _vectors(model, config, tensors)
    attentions = _decoder_attentions(architecture)
    if attentions is None:
        raise UnsupportedError(
            f"PEFT's prefixes on `{architecture.model_type}` cannot be reproduced: " + _why_not(architecture),
            hint="train the prefix here; decoder-only models' prefixes can be read",
        )
    if _window(model):
        raise UnsupportedError(
            "PEFT's prefixes scroll out of a sliding attention window, so later tokens do not see them; here all do",
            hint="train the prefix here",
        )
    n, width = config["num_virtual_tokens"], attentions[0].kv_heads * attentions[0].head_dim
    if vectors.shape != (n, 2 * len(attentions) * width):
        raise AdapterError(
            f"mis-shaped: prompt_embeddings has shape {tuple(vectors.shape)}, and {(n, 2 * len(attentions) * width)} "
            f"was expected: {n} tokens, {len(attentions)} layers, keys and values of width {width}"
        )
    for attention, pair in zip(attentions, vectors.view(n, len(attentions), 2, width).unbind(1), strict=True):
        raw[f"{attention.path}.prefix_key"] = pair[:, 0].clone()
        raw[f"{attention.path}.prefix_value"] = pair[:, 1].clone()
    return Restored(Prefix(num_virtual_tokens=n, modules_to_save=tuple(heads)), raw)


def _vectors(
    model: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    rest = dict(tensors)
    vectors = rest.pop(_VECTORS, None)
    if vectors is None:
        raise AdapterError(f"missing: {_VECTORS}")
    heads, raw = read_heads(model, config, rest, _HEAD_PREFIX)
    return vectors, heads, raw


def _decoder_attentions(architecture: Architecture) -> list[AttentionLayer] | None:
    """Return the attentions of a decoder-only model by layer, or None for other models or if they are not alike."""
    attentions = sorted(architecture.attentions, key=lambda attention: attention.layer)
    alike = len({(attention.stack, attention.kv_heads, attention.head_dim) for attention in attentions}) == 1
    return attentions if alike and attentions[0].stack == "causal" else None


def _why_not(architecture: Architecture) -> str:
    kinds = {attention.stack for attention in architecture.attentions}
    if not kinds:
        return "where its attention is is not known"
    if "decoder" in kinds:
        return (
            "in an encoder-decoder PEFT uses each vector in two layers, trains only half of them, "
            "and numbers positions as if the prefix were text"
        )
    if "encoder" in kinds:
        return "in an encoder PEFT moves the positions of the text behind the prefix"
    return "its layers have keys and values of different widths"


def _window(model: nn.Module) -> bool:
    """Return True if some layer of a model has a sliding attention window."""
    config: Any = model.config
    if not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", True) is False:
        return False
    kinds = getattr(config, "layer_types", None)
    return kinds is None or "sliding_attention" in kinds


def _sizes(model: nn.Module) -> dict[str, int]:
    config: Any = model.config
    return {"num_attention_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers}
