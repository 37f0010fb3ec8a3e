"""The number of tokens that a model can read, and its padding token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftwerk.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 512
"""Tokens of a row where neither the user nor the model asks for fewer."""


def fix_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make model and tokenizer agree on the pad id, in place.

    A decoder's classification head needs it to find a row's last token.

    Raises:
        ModelError: the tokenizer has no pad token, or has more tokens than the model has embeddings.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no pad token", hint="load it with load_tokenizer, which chooses the end token"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings or tokenizer.pad_token_id >= embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {embeddings:,} embeddings",
            hint="use the tokenizer that belongs to the model",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def max_length_for(config: Any, tokenizer: PreTrainedTokenizerBase, wanted: int | None = None, virtual: int = 0) -> int:
    """Return the longest row in tokens, special ones included: as wanted, or the model's limit, at most 512.

    Args:
        config: The model's transformers configuration.
        tokenizer: Its own limit of tokens counts if no length is wanted.
        wanted: `data.max_length` of the run file.
        virtual: Positions that virtual tokens take before the text.

    Raises:
        ConfigError: more is wanted than the model has positions, or virtual tokens leave none.
    """
    limit = position_limit(config)
    if virtual and limit is not None:
        if limit <= virtual:
            raise ConfigError(
                f"{virtual} virtual tokens leave no room in the {limit} positions of the model",
                where="method.num_virtual_tokens",
            )
        if wanted is not None and wanted <= limit < wanted + virtual:
            raise ConfigError(
                f"`max_length: {wanted}` and {virtual} virtual tokens are more than the {limit} positions of the model",
                where="data.max_length",
                hint=f"at most {limit - virtual}, or fewer virtual tokens",
            )
        limit -= virtual
    if wanted is not None:
        if limit is not None and wanted > limit:
            raise ConfigError(
                f"`max_length: {wanted}` is more than the {limit} positions of the model",
                where="data.max_length",
                hint=f"at most {limit}",
            )
        return wanted
    # A tokenizer without a limit of its own says 1e30.
    return int(min(LONGEST, limit or LONGEST, tokenizer.model_max_length))


def position_limit(config: Any) -> int | None:
    """Return the number of positions a model supports, or None if positions are relative and without limit."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is None or getattr(config, "relative_attention_num_buckets", None):
        return None
    # RoBERTa and its family count positions from the pad id upwards, so two places of the table are never reached.
    offset = config.pad_token_id + 1 if config.model_type in ROBERTA_LIKE and config.pad_token_id is not None else 0
    return int(positions) - offset


ROBERTA_LIKE = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "data2vec-text", "mpnet", "ibert", "xmod"}
)
