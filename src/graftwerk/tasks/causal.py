"""Causal language modelling: a decoder learns to predict each next token of plain text (continued pretraining).

    row      {"text": "The cat sat."}
    block    [BOS] The cat sat . [EOS]    BOS if the tokenizer adds one; a text above data.max_length gives several
                                          blocks, each with BOS, the last with EOS
    loss     -1/N sum log p(x_t | x_<t)   over the N tokens of all blocks but the first of each block, EOS included

`LanguageModelingTask` reads the rows and cuts the blocks, `NextTokenObjective` shifts the labels and computes the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftwerk.tasks.lm_base import LanguageModelingTask
from graftwerk.tasks.template import adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Causal(LanguageModelingTask):
    """Causal language modelling; rows have one field, the text."""

    name = "causal"
    title = "Causal language modelling"
    layouts = ("causal",)

    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return bos, eos

    def inputs_and_labels(self, block: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        return block, list(block)  # not shifted yet
