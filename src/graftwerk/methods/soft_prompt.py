"""Settings shared by prefix, prompt and P-tuning: n virtual tokens, and their start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from graftwerk.errors import ConfigError
from graftwerk.methods.base import Method


class VirtualTokens(Method):
    """Abstract: a method that puts n learned positions in front of the text."""

    num_virtual_tokens: int = Field(default=20, ge=1, description="number n of virtual tokens")

    def positions(self, causal: bool) -> int:
        return self.num_virtual_tokens


class FromText(VirtualTokens):
    """Abstract: virtual tokens that may start as the words of a text.

    A method knows no tokenizer, so `init_text` has to be turned into ids before it is attached: `with_token_ids`.
    """

    init: Literal["random", "text"] = Field(
        default="random",
        validation_alias=AliasChoices("init", "prompt_tuning_init"),
        description="where the virtual tokens start; `text` is implied by `init_text` and `init_token_ids`",
    )
    init_text: str | None = Field(
        default=None,
        min_length=1,
        validation_alias=AliasChoices("init_text", "prompt_tuning_init_text"),
        description="text that the virtual tokens start as; its tokens are repeated or cut to `num_virtual_tokens`",
    )
    init_token_ids: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="token ids that the virtual tokens start as, instead of a text"
    )

    @model_validator(mode="before")
    @classmethod
    def _imply_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for key in ("init", "prompt_tuning_init"):
            if isinstance(values.get(key), str):
                values[key] = values[key].lower()
        given = any(values.get(key) is not None for key in ("init_text", "prompt_tuning_init_text", "init_token_ids"))
        if given and "init" not in values and "prompt_tuning_init" not in values:
            values["init"] = "text"
        return values

    @model_validator(mode="after")
    def _text_where_it_is_wanted(self) -> Self:
        given = self.init_text is not None or self.init_token_ids is not None
        if self.init == "text" and not given:
            raise ValueError("`init: text` needs `init_text` or `init_token_ids`")
        if self.init == "random" and given:
            raise ValueError("a text to start from was given, but `init` is `random`")
        return self

    @property
    def wants_token_ids(self) -> bool:
        """Return True if there is a text that still has to be turned into token ids."""
        return self.init_text is not None and self.init_token_ids is None

    def with_token_ids(self, ids: Sequence[int]) -> Self:
        """Return these settings with the text turned into ids (without special tokens)."""
        return self.model_copy(update={"init": "text", "init_token_ids": tuple(int(token) for token in ids)})

    def start_ids(self, vocabulary: int) -> tuple[int, ...] | None:
        """Return exactly `num_virtual_tokens` ids to start from, or None for a random start.

        Args:
            vocabulary: Rows of the model's embedding table.

        Raises:
            ConfigError: the text is not tokenized yet, or an id is not in the vocabulary.
        """
        if self.init == "random":
            return None
        if self.init_token_ids is None:
            raise ConfigError(
                f"`init_text` is not yet tokenized: {self.init_text!r:.60}",
                where=f"method.init_text of `{self.name}`",
                hint="attach `method.with_token_ids(tokenizer(text, add_special_tokens=False).input_ids)`",
            )
        if wrong := [token for token in self.init_token_ids if not 0 <= token < vocabulary]:
            raise ConfigError(
                f"token id {wrong[0]} is not in the model's vocabulary of {vocabulary}",
                where=f"method.init_token_ids of `{self.name}`",
                hint="tokenize the text with this model's own tokenizer",
            )
        times = -(-self.num_virtual_tokens // len(self.init_token_ids))
        return (self.init_token_ids * times)[: self.num_virtual_tokens]
