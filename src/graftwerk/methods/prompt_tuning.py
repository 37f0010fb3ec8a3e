"""Prompt tuning: learned input embeddings in front of the text.

Paper: Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
arXiv:2104.08691, section 2:

    model([P; E(x)])        P: (n, d) trained

In an encoder-decoder model P stands in front of the encoder's text, and the decoder attends to it there.

Start (section 2.1): the embeddings of random tokens of the vocabulary, or of a text. (PEFT's `RANDOM` is noise of
variance one, many times larger than the embeddings of most models.)

Parameters: n·d.
Trade-off: the smallest of all, a single vector sequence for a whole task; it reaches the other methods only on large
models, learns slowly, and costs n positions of the context.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwerk.methods.placement import module_device
from graftwerk.methods.soft_prompt import FromText


class Prompt(FromText):
    """Settings of prompt tuning: the number of virtual tokens and their start.

    Example:
        >>> Prompt(num_virtual_tokens=8).num_vector_parameters(width=64)
        512
    """

    name = "prompt"
    title = "Prompt tuning"
    paper = "Lester et al. 2021, arXiv:2104.08691"
    kind = "embedding"
    peft_type = "PROMPT_TUNING"
    default_learning_rate = 3e-2
    default_head_learning_rate = 1e-2

    def num_vector_parameters(self, width: int) -> int:
        """Return the number of trained parameters, by formula; ``width`` is d."""
        return self.num_virtual_tokens * width

    def build_prompt(self, embedding: nn.Module, width: int) -> PromptVectors:
        """Build the prompt of one adapter.

        Args:
            embedding: The model's own embedding (read only), called to look up the start: some scale their output.
            width: d, its width.
        """
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        ids = self.start_ids(weight.shape[0])
        drawn = torch.randint(weight.shape[0], (self.num_virtual_tokens,)) if ids is None else torch.tensor(ids)
        with torch.no_grad():
            start = embedding(drawn.to(module_device(embedding)))
        return PromptVectors(start)


class PromptModule(nn.Module):
    """Abstract: the prompt of one stack. Final subclasses: `PromptVectors`, `ptuning.PromptEncoder`."""

    n: int
    """Number of virtual tokens."""

    def vectors(self) -> Tensor:
        """Return the input embeddings of the virtual tokens, (n, d)."""
        raise NotImplementedError

    def merged_state(self) -> dict[str, Tensor]:
        """Return the vectors (n, d), as in evaluation, by the name they are stored under without a network; a copy."""
        training = self.training
        self.eval()
        with torch.no_grad():
            values = self.vectors().detach().clone()
        self.train(training)
        return {"prompt_embeddings": values}


class PromptVectors(PromptModule):
    """Embeddings trained directly.

    Args:
        start: Initial values, (n, d).
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.n = start.shape[0]
        self.prompt_embeddings = nn.Parameter(start.detach().float().clone())

    def vectors(self) -> Tensor:
        return self.prompt_embeddings
