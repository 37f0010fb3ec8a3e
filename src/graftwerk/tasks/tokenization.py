"""Texts to token ids, and token ids to a padded batch; for every task that reads text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.errors import ConfigError, ModelError
from graftwerk.tasks.example import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MULTIPLE = 8
"""Multiple that sequence lengths are rounded up to in 16-bit precision. It fills tensor cores, and on a CPU oneDNN,
which compiles and caches a kernel for each shape (about 0.7 MB each), sees few shapes."""
MODEL_INPUTS = ("input_ids", "token_type_ids")
"""What is kept of a tokenizer's answer. The mask is not: `pad` makes it from positions."""


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, *, as_target: bool = False
) -> list[tuple[dict[str, list[int]], int]]:
    """Tokenize all texts in one call.

    Args:
        texts: The texts.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of a text, its special tokens included.
        as_target: True for texts that a decoder is to write, which some tokenizers encode differently.

    Returns:
        For each text its inputs (lists of equal length), and the number of its tokens that did not fit.

    Raises:
        ConfigError: `max_length` leaves no room for text beside the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise ConfigError(
            f"`max_length: {max_length}` leaves no room for text beside {special} special tokens",
            where="data.max_length",
        )
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [_encode_slowly(text, tokenizer, max_length, as_target) for text in texts]
    answer = tokenizer(
        **_as(list(texts), as_target),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_overflowing_tokens=True,
    )
    names = [name for name in MODEL_INPUTS if name in answer]
    encoded: list[tuple[dict[str, list[int]], int]] = []
    lost = [0] * len(texts)
    # A text that does not fit comes as several pieces, one after another: the first is kept, the others are counted.
    for piece, text in enumerate(answer["overflow_to_sample_mapping"]):
        if text == len(encoded):
            encoded.append(({name: answer[name][piece] for name in names}, 0))
        else:
            lost[text] += len(answer["input_ids"][piece]) - special
    return [(inputs, lost[text]) for text, (inputs, _) in enumerate(encoded)]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[dict[str, list[int]], int]]:
    """Tokenize pairs of texts; of one that is too long, tokens are cut from the longer text first.

    Args:
        pairs: First and second text of each.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of a pair, its special tokens included.

    Returns:
        For each pair its inputs (lists of equal length), and the number of its tokens that did not fit.

    Raises:
        ConfigError: `max_length` leaves no room for both texts beside the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length < special + 2:
        raise ConfigError(
            f"`max_length: {max_length}` leaves no room for two texts beside {special} special tokens",
            where="data.max_length",
        )
    if not pairs:
        return []
    whole = _encode_pairs(pairs, tokenizer, {"verbose": False})
    long = [at for at, inputs in enumerate(whole) if len(inputs["input_ids"]) > max_length]
    options = {"truncation": "longest_first", "max_length": max_length}
    cut = _encode_pairs([pairs[at] for at in long], tokenizer, options)
    kept = {**dict(enumerate(whole)), **dict(zip(long, cut, strict=True))}
    return [(kept[at], len(inputs["input_ids"]) - len(kept[at]["input_ids"])) for at, inputs in enumerate(whole)]


def _encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> list[dict[str, list[int]]]:
    if not pairs:
        return []
    first, second = (list(texts) for texts in zip(*pairs, strict=True))
    answer = tokenizer(first, second, return_attention_mask=False, **options)
    names = [name for name in MODEL_INPUTS if name in answer]
    return [{name: list(answer[name][at]) for name in names} for at in range(len(pairs))]


def separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer puts more special tokens around a pair of texts than around one text."""
    return bool(tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False))


def _as(texts: str | list[str], as_target: bool) -> dict[str, Any]:
    return {"text_target" if as_target else "text": texts}


def _encode_slowly(
    text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, as_target: bool
) -> tuple[dict[str, list[int]], int]:
    """Tokenize one text with a tokenizer in Python, which does not report truncation for a batch."""
    said = _as(text, as_target)
    answer = tokenizer(**said, truncation=True, max_length=max_length, return_attention_mask=False)
    whole = len(tokenizer(**said, return_attention_mask=False, verbose=False)["input_ids"])
    inputs = {name: list(answer[name]) for name in MODEL_INPUTS if name in answer}
    return inputs, whole - len(inputs["input_ids"])


def pad(inputs: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Pad rows on the right to the longest one, and return the batch with its mask.

    The mask comes from the rows' lengths and never from comparing with the pad id: where padding is the end token, a
    row's own end token stays visible and trained. Padding is always on the right, whatever side a tokenizer prefers for
    generating: models with learnt positions count them from the left.

    Returns:
        int64 tensors (rows, longest): the inputs' names and `attention_mask`, 1 for a token and 0 for padding.

    Raises:
        ModelError: the tokenizer has no pad token.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no pad token", hint="load it with load_tokenizer, which chooses the end token"
        )
    lengths = [len(row["input_ids"]) for row in inputs]
    shape = (len(inputs), max(lengths))
    mask = torch.zeros(shape, dtype=torch.long, device="cpu")
    batch = {name: torch.full(shape, _filler(name, tokenizer), dtype=torch.long, device="cpu") for name in inputs[0]}
    for at, (row, length) in enumerate(zip(inputs, lengths, strict=True)):
        mask[at, :length] = 1
        for name, values in row.items():
            batch[name][at, :length] = torch.tensor(values, dtype=torch.long, device="cpu")
    batch["attention_mask"] = mask
    return batch


def padded_length(length: int, longest: int) -> int:
    """Return the length that `pad_further` gives to a batch.

    Args:
        length: Tokens of the batch's longest row.
        longest: Length of the longest row in any batch; padding never exceeds it, since the model may have no further
            positions.

    Example:
        >>> [padded_length(length, longest=30) for length in (8, 9, 27, 35)]
        [8, 16, 30, 35]
    """
    return max(length, min(-(-length // MULTIPLE) * MULTIPLE, longest))


def pad_further(batch: Mapping[str, Tensor], longest: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Pad a collated batch on the right to a multiple of eight tokens (`padded_length`).

    Args:
        batch: As `pad` returned it, (B, T) each, and ``labels``; per-token labels (B, A) are padded with `IGNORED`.
        longest: Length of the longest row in any batch.
        tokenizer: The tokenizer that the batch was padded with.

    Returns:
        The batch with a larger T and A.
    """
    longer = dict(batch)
    for name, tensor in batch.items():
        if tensor.dim() == 2 and not tensor.is_floating_point():  # others are labels per row or per class
            filler = {"labels": IGNORED, "attention_mask": 0}.get(name)
            more = padded_length(tensor.shape[1], longest) - tensor.shape[1]
            value = _filler(name, tokenizer) if filler is None else filler
            longer[name] = torch.nn.functional.pad(tensor, (0, more), value=value)
    return longer


def _filler(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id if name == "input_ids" else tokenizer.pad_token_type_id)
