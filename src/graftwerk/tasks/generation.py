"""Generation: prompts of a batch in, texts out. The search itself is of `evaluation.generation`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from graftwerk.tasks.example import Example
from graftwerk.tasks.tokenization import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Layout = Literal["causal", "encoder-decoder"]
"""A causal model reads prompt and answer in one row; of an encoder-decoder, the decoder alone sees the answer."""


@dataclass(frozen=True)
class Generation:
    """Batch prompts, set up ``model.generate`` and read what it wrote.

    Legend: B rows, P tokens of the longest prompt, A tokens of the longest answer.

    Attributes:
        layout: The kind of model.
    """

    layout: Layout

    def collate_prompts(self, prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, each (B, P).

        Padded on the left for causal models, which continue a prompt at its end, and on the right for encoders.

        Args:
            prompts: Token ids, at least one prompt.
            tokenizer: It names the padding token.
        """
        batch = pad([{"input_ids": prompt} for prompt in prompts], tokenizer)
        if self.layout == "causal":
            width = batch["input_ids"].shape[1]
            for row, prompt in enumerate(prompts):
                for tensor in batch.values():
                    tensor[row] = tensor[row].roll(width - len(prompt))
        return batch

    def group(self, example: Example) -> Hashable:
        """Return a key that rows of one batch share; rows with the same key have the same `options`."""
        return None

    def options(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> dict[str, Any]:
        """Return the arguments of ``model.generate`` that depend on the task and not on the search."""
        return {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}

    def new_tokens(self, written: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the tokens without the prompt, (B, A).

        Args:
            written: The result of ``model.generate``: (B, P + A) of a causal model, else (B, A).
            batch: The prompts.
        """
        return written[:, batch["input_ids"].shape[1] :] if self.layout == "causal" else written

    def decode(self, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text of one answer without special tokens and white space around it."""
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()
