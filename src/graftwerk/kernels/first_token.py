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

READ_FIRST = frozenset(
    f"{family}ForSequenceClassification"
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie", "Data2VecText", "DebertaV2")
)
"""Classes of transformers whose head reads the first token alone; their base model has ``encoder.layer``."""


@contextmanager
def first_token_alone(model: nn.Module, *, backward: bool = False) -> Iterator[None]:
    """Compute the last layer for the first token alone inside the block, if nothing else of it is read.

    Hidden states that the outputs hold are (B, 1, d) then; logits are those of the plain path.

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
    bases = (each for each in type(model).__mro__ if each.__module__.startswith("transformers.models."))
    known: Any = next((each for each in bases if each.__name__ in READ_FIRST), None)
    if known is None or type(model).forward is not known.forward:
        return None
    config, stack = model.config, model.base_model
    if config.output_hidden_states or config.output_attentions or getattr(config, "chunk_size_feed_forward", 0):
        return None
    layer = stack.encoder.layer[-1]
    if layer.training and getattr(layer, "gradient_checkpointing", False) and not backward:
        return None
    # Prompts and prefixes work by hooks, and the block may be within another one; offloaded modules have another call.
    seen = (stack, stack.encoder, layer, layer.attention, layer.attention.output)
    if any(_is_changed(module) for module in seen):
        return None
    end: nn.Module = layer.attention.output
    return end


def _is_changed(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in vars(module)
