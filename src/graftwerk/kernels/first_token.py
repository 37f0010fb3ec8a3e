"""The last layer of an encoder at the first token alone, if the head reads nothing else of it.

BERT and its kin classify a row by what the last layer says of its first token. Attention there reads all tokens, but
what follows it (output projection, feed-forward block, norms, adapters on any of these) works on each token by itself:

    y_0 = FFN(Attention(x)_0 + x_0)        instead of y_t for each t, of which the head reads y_0

A hook cuts both inputs of the attention's output module to their first token; the model's own forward does the rest. Of
a layer's 12 d² products a token, 9 fall away for all tokens but one, forward and backward.

Legend: B rows, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from graftwerk.kernels import flags
from graftwerk.kernels.memory_efficient import own_base

TRANSFORMERS = "transformers.models."

READERS = {
    f"{family}ForSequenceClassification": reader
    for family, reader in {
        "Bert": "bert.pooler",
        "Camembert": "classifier",
        "Data2VecText": "classifier",
        "DebertaV2": "pooler",
        "Electra": "classifier",
        "Ernie": "ernie.pooler",
        "Roberta": "classifier",
        "XLMRoberta": "classifier",
    }.items()
}
"""For each class of transformers whose head reads the first token alone, the module that reads it."""


@contextmanager
def first_token_alone(model: nn.Module, *, backward: bool = False) -> Iterator[None]:
    """Compute the last layer for the first token alone inside the block, if nothing else of it is read.

    Hidden states that the outputs hold are (B, 1, d) then. Logits are those of the plain path; with dropout, this layer
    draws masks for one token, so that a seed gives others.

    Args:
        model: Any model, perhaps wrapped for several processes.
        backward: True if the backward pass is in the block too, which gradient checkpointing needs: it runs the layer
            again there.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)).eval()
        >>> tokens = torch.tensor([[2, 5, 7], [2, 9, 4]])
        >>> with torch.no_grad(), first_token_alone(model):
        ...     alone = model(tokens).logits
        >>> bool(torch.allclose(alone, model(tokens).logits, atol=1e-6))
        True
    """
    module = _end_of_attention(getattr(model, "module", model), backward) if flags.enabled("first") else None
    if module is None:
        yield
        return
    handle = module.register_forward_pre_hook(_first_token)
    try:
        yield
    finally:
        handle.remove()


def _first_token(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the first token (B, 1, d) of the attention's result and of the residual, each (B, T, d)."""
    return tuple(x[:, :1] for x in inputs)


def _end_of_attention(model: Any, backward: bool) -> nn.Module | None:
    """Return the module after the last layer's attention, or None if more than the first token may be read."""
    bases = (each for each in type(model).__mro__ if each.__module__.startswith(TRANSFORMERS))
    known: Any = next((each for each in bases if each.__name__ in READERS), None)
    if known is None or type(model).forward is not known.forward or "forward" in vars(model):
        return None
    config, stack = model.config, model.base_model
    if config.output_hidden_states or config.output_attentions or getattr(config, "chunk_size_feed_forward", 0):
        return None
    layers = getattr(getattr(stack, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return None
    layer, reader = layers[-1], model.get_submodule(READERS[known.__name__])
    attention = getattr(layer, "attention", None)
    end = getattr(attention, "output", None)
    if layer.training and getattr(layer, "gradient_checkpointing", False) and not backward:
        return None
    block = (getattr(layer, "intermediate", None), getattr(layer, "output", None))
    seen = (stack, stack.encoder, layer, attention, end, *block, reader)
    return end if all(_is_as_published(module) for module in seen) else None


def _is_as_published(module: nn.Module | None) -> bool:
    """Return True if a module is one of transformers' own, with nothing that would see or change its tokens.

    Prompts and prefixes work by hooks, offloaded modules have another forward, and the block may be within another one.
    """
    if module is None or not own_base(type(module)).__module__.startswith(TRANSFORMERS):
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return not hooks and "forward" not in vars(module)
