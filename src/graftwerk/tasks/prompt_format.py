"""One request, one answer, for causal models: as plain text, or as a user's turn in the model's own chat template.

The template is code from outside and runs in a process with limits (`template.py`). A text that is too long is cut, in
characters, and the request made again, so that what stands around it stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftwerk.errors import ConfigError, IntegrityError, ModelError
from graftwerk.tasks.chat import Encoded, encode_conversations, end_ids
from graftwerk.tasks.example import IGNORED
from graftwerk.tasks.template import ModelTemplate, template_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_SHARE = 4
"""Of the tokens of a row, one in so many is left for an answer that is not known yet."""
UNLIMITED = 1 << 30
WITHOUT = "task.chat=false does without a chat template"
Fill = Callable[[str], str]
"""A text in its request."""


class PromptFormat:
    """Format of requests and answers for a model: turns of its chat template, or plain text.

    Args:
        tokenizer: The model's tokenizer.
        chat: True to use its chat template if it has one.

    Raises:
        ModelError: The tokenizer has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.template = template_for(tokenizer, "auto" if chat else "plain")

    @property
    def as_turn(self) -> bool:
        """Return True if requests are turns of a conversation, False if they are plain texts."""
        return isinstance(self.template, ModelTemplate)

    def end_ids(self) -> list[int]:
        """Return the token ids that end an answer.

        Raises:
            As `encode`.
        """
        if not self.as_turn:
            return [self.tokenizer.eos_token_id]
        with _mended():
            return end_ids(self.template, self.tokenizer)

    def encode(self, requests: Sequence[str], answers: Sequence[str | None]) -> list[Encoded]:
        """Tokenize each request with its answer and the end token that is learnt after it.

        Args:
            requests: The requests.
            answers: The answer to each, or None for a request to be answered by the model.

        Raises:
            IntegrityError, ModelError: The chat template cannot be used.
            UnsupportedError: The tokenizer gives no character offsets of tokens.
        """
        if self.as_turn:
            turns = [
                [("user", request), *([] if answer is None else [("assistant", answer)])]
                for request, answer in zip(requests, answers, strict=True)
            ]
            with _mended():
                return encode_conversations(turns, self.template, self.tokenizer, UNLIMITED)
        end = self.tokenizer.eos_token_id
        encoded = []
        for request, answer in zip(requests, answers, strict=True):
            prompt = list(self.tokenizer(request, verbose=False)["input_ids"])
            prompt = prompt[:-1] if prompt and prompt[-1] == end else prompt  # what ends here is not the answer
            if answer is None:
                encoded.append(Encoded(prompt, None, prompt))
                continue
            said = [*self.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], end]
            encoded.append(Encoded(prompt + said, [IGNORED] * len(prompt) + said, prompt))
        return encoded

    def shortened(
        self, whole: Encoded, text: str, fill: Fill, answer: str | None, frame: int, max_length: int
    ) -> tuple[Encoded, int]:
        """Truncate the text of a request to the room there is; return the row and the number of tokens lost.

        An answer that takes more than half of the room loses its end too, and with it the end token.

        Args:
            whole: The row with its whole text.
            text: The text.
            fill: Function from a text to the request with it.
            answer: The answer, or None if the model is to give it.
            frame: Tokens of the request without any text.
            max_length: Most tokens of the row.
        """
        wanted = len(whole.ids) + (max_length // ANSWER_SHARE if answer is None else 0)
        if wanted <= max_length:
            return whole, 0
        half = max((max_length - frame) // 2, 1)
        if answer is None:
            room = max_length - min(max_length // ANSWER_SHARE, half)
        else:
            said = len(whole.ids) - len(whole.prompt)
            room = max_length - min(said, max(half, max_length - len(whole.prompt)))
        kept = self._fitting(whole.prompt, text, fill, room)
        made = whole if kept == text else self.encode([fill(kept)], [answer])[0]
        if made.unfit is not None:
            return made, 0
        ids, labels = made.ids[:max_length], made.labels
        cut = Encoded(
            ids, None if labels is None else labels[:max_length], made.prompt, endless=made.endless, torn=made.torn
        )
        return cut, len(whole.ids) - len(ids)

    def _fitting(self, prompt: list[int], text: str, fill: Fill, room: int) -> str:
        """Return as much of the text as makes a prompt of at most `room` tokens."""
        tokens = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=self.tokenizer.is_fast
        )
        keep = len(tokens["input_ids"])
        while len(prompt) > room and keep > 0:
            keep = max(keep - (len(prompt) - room), 0)
            if not keep:
                text = ""
            elif self.tokenizer.is_fast:
                text = text[: tokens["offset_mapping"][keep - 1][1]]
            else:
                text = self.tokenizer.decode(tokens["input_ids"][:keep])
            (made,) = self.encode([fill(text)], [None])
            prompt = made.prompt
        return text


def check_frame(frame: int, max_length: int) -> None:
    """Check that a request leaves room for a text and an answer.

    Raises:
        ConfigError: It does not.
    """
    if frame + 2 > max_length:
        raise ConfigError(
            f"the template alone takes {frame} of {max_length} tokens",
            where="task.template",
            hint="a shorter template, or a longer data.max_length",
        )


@contextmanager
def _mended() -> Iterator[None]:
    """Return an error about a chat template that says how these tasks do without: by a setting of their own."""
    try:
        yield
    except (IntegrityError, ModelError) as error:
        if error.where == "chat_template":
            error.hint = f"if the model came from somebody else, do not trust it; {WITHOUT}"
        raise
