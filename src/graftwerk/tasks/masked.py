"""Masked language modelling on plain text (BERT, Devlin et al. 2019, arXiv:1810.04805).

An encoder learns to predict tokens that were hidden from it. A share of the tokens, special ones excepted, is chosen
and has to be predicted; of the chosen, 80 % become the mask token, 10 % a random token and 10 % stay. In training every
pass over a row chooses anew, from torch's generator, whose state is part of a checkpoint. In evaluation the choice
depends on the row's tokens alone, so that perplexities of two models, or at two steps, are of the same tokens.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field
from torch import Tensor

from graftwerk.errors import ModelError, UnsupportedError
from graftwerk.tasks.collator import TextCollator
from graftwerk.tasks.example import IGNORED, Example
from graftwerk.tasks.lm_base import LanguageModelingTask
from graftwerk.tasks.token_objective import SameTokenObjective, TokenObjective
from graftwerk.tasks.tokenization import pad

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MASK, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token, and a random one."""


class Masked(LanguageModelingTask):
    """Masked language modelling: an encoder is trained to predict tokens that were hidden from it."""

    name = "masked"
    title = "Masked language modelling"
    eos_after_every_block = True

    mask_probability: float = Field(
        default=0.15, gt=0, lt=1, description="share of tokens that are hidden and predicted"
    )

    def for_model(self, config: PreTrainedConfig) -> Self:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        if config.is_encoder_decoder or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise UnsupportedError(
                f"{self.title.lower()} needs an encoder that was trained so, and `{config.model_type}` is none",
                where="task",
                hint="task=causal for a model that writes",
            )
        return self

    @property
    def can_pack(self) -> bool:
        return False

    def auto_class(self) -> Any:
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        whole = tokenizer("a b", verbose=False)["input_ids"]
        text = tokenizer("a b", add_special_tokens=False, verbose=False)["input_ids"]
        begin = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
        return list(whole[:begin]), list(whole[begin + len(text) :])

    def inputs_and_labels(self, block: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        """Hide the tokens of a block that evaluation hides."""
        digest = hashlib.blake2b(torch.tensor(block, device="cpu").numpy().tobytes(), digest_size=7).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
        hidden, labels = self.collator.hide(torch.tensor([block], device="cpu"), tokenizer, generator)
        return hidden[0].tolist(), labels[0].tolist()

    @property
    def collator(self) -> MaskingCollator:
        return MaskingCollator(self.mask_probability)

    @property
    def objective(self) -> TokenObjective:
        return SameTokenObjective()


@dataclass(frozen=True)
class MaskingCollator(TextCollator):
    """Batches with places hidden; those of training hide other places each time.

    Attributes:
        mask_probability: Share of the text's tokens that are to be predicted, 0 to 1.
    """

    redraws = True

    mask_probability: float

    def collate_training(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return the batch of some examples with tokens hidden anew.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each (B, T).

        Raises:
            ModelError: The tokenizer has no mask token.
        """
        batch = pad([{"input_ids": _shown(example)} for example in examples], tokenizer)
        batch["input_ids"], batch["labels"] = self.hide(batch["input_ids"], tokenizer, None, batch["attention_mask"])
        return batch

    def hide(
        self,
        ids: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        generator: torch.Generator | None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hide tokens; every row with a token of text has at least one to predict.

        Args:
            ids: Token ids, (B, T).
            tokenizer: It names the mask token and the special tokens, which are never hidden.
            generator: Source of random numbers, or None for torch's global one.
            seen: (B, T), 0 for padding; None if there is no padding.

        Returns:
            The ids with some hidden, and the labels, each (B, T).

        Raises:
            ModelError: The tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ModelError("the tokenizer has no mask token, so nothing can be hidden", where="model")
        special = [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]
        eligible = ~torch.isin(ids, torch.tensor(special, device="cpu"))  # (B, T)
        if seen is not None:
            eligible &= seen.bool()
        drawn = torch.rand(ids.shape, generator=generator, device="cpu").masked_fill(~eligible, 2.0)
        least = drawn == drawn.min(dim=1, keepdim=True).values
        chosen = ((drawn < self.mask_probability) | least) & eligible
        labels = ids.masked_fill(~chosen, IGNORED)
        action = torch.rand(ids.shape, generator=generator, device="cpu")
        replaced = torch.randint(len(tokenizer), ids.shape, generator=generator, device="cpu")
        hidden = torch.where(chosen & (action < MASK), torch.full_like(ids, tokenizer.mask_token_id), ids)
        return torch.where(chosen & (action >= MASK) & (action < MASK + RANDOM), replaced, hidden), labels


def _shown(example: Example) -> list[int]:
    """Return the tokens as they were before some were hidden for evaluation."""
    return [
        token if label == IGNORED else label
        for token, label in zip(example.inputs["input_ids"], example.target, strict=True)
    ]
