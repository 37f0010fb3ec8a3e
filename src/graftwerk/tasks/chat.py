"""Conversations as token ids and labels.

What the assistant says is trained, with the token that ends its turn, and nothing else. Where the text of an answer
stands comes from the template (`template.py`); which tokens that is, from the tokenizer's offsets. What follows the end
token in an assistant turn (a line break, mostly) is not trained. Ends are told by their place: a model whose padding is
its end token learns to end all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graftwerk.errors import UnsupportedError
from graftwerk.tasks.example import IGNORED
from graftwerk.tasks.template import Rendered, Template, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it.

    Attributes:
        ids: Its tokens; for prediction the same as ``prompt``.
        labels: For each token its id if it is trained, else -100; or None for prediction.
        prompt: The tokens before the last answer.
        truncated: Number of tokens that did not fit.
        endless: True if an answer has no trained end token, although none was cut off.
        torn: True if the prompt, tokenized alone, is not a prefix of this conversation's tokens.
        unfit: Why the template does not accept it, or None; the lists are empty then.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] | None = None
    prompt: list[int] = field(default_factory=list)
    truncated: int = 0
    endless: bool = False
    torn: bool = False
    unfit: str | None = None

    @property
    def trained(self) -> int:
        """Return the number of tokens that are trained."""
        return sum(label != IGNORED for label in self.labels or ())


def encode_conversations(
    conversations: Sequence[Sequence[Turn]], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """Tokenize conversations to token ids and labels, in order.

    A long conversation loses tokens at the ends of its longest user turns, so that the template around question and
    answer stays whole; only if that is not enough is its own end cut.

    Args:
        conversations: Turns (role, content). One whose last turn is not the assistant's is for prediction: it has a
            prompt and no labels.
        template: The template that renders them.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of a conversation.

    Raises:
        IntegrityError, ModelError: The template cannot be used.
        UnsupportedError: The tokenizer gives no character offsets of tokens.
    """
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} does not say which characters a token is of, so answers cannot be found",
            where="model",
            hint="a model with a fast tokenizer (tokenizer.json)",
        )
    answered = [at for at, turns in enumerate(conversations) if turns[-1][0] == "assistant"]
    asked = [at for at, turns in enumerate(conversations) if turns[-1][0] != "assistant"]
    found: dict[int, Encoded] = {}
    for places, is_asked in ((answered, False), (asked, True)):
        chosen = [conversations[at] for at in places]
        rendered = template.render(chosen, asked=is_asked)
        tokens = _tokens([one.text for one in rendered], tokenizer)
        # What the model is given when it is asked, tokenized alone.
        heads = (
            None
            if is_asked
            else _ids([one.text[: one.spans[-1][0]] if one.spans else "" for one in rendered], tokenizer)
        )
        for number, at in enumerate(places):
            turns, one = chosen[number], rendered[number]
            if one.unfit is not None:
                found[at] = Encoded(unfit=one.unfit)
                continue
            ids, offsets = tokens[number]
            kept, truncated = _fitting(turns, one, offsets, max_length)
            if heads is None:
                ids = [ids[token] for token in kept]
                found[at] = Encoded(ids, None, ids, truncated)
            else:
                found[at] = _labelled(turns, one, ids, offsets, kept, truncated, heads[number], tokenizer)
    return [found[at] for at in range(len(conversations))]


def end_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a generated answer: the tokenizer's end token, and the one that ends a turn."""
    if template.end_ids is None:
        template.end_ids = [tokenizer.eos_token_id]
        (probe,) = encode_conversations([[("user", "a"), ("assistant", "b")]], template, tokenizer, 1 << 20)
        if probe.labels is not None and not probe.endless:
            template.end_ids.append([label for label in probe.labels if label != IGNORED][-1])
    return sorted({token for token in template.end_ids if token is not None})


def _labelled(
    turns: Sequence[Turn],
    rendered: Rendered,
    ids: list[int],
    offsets: list[Span],
    kept: list[int],
    truncated: int,
    head: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Encoded:
    said = [content.strip() for role, content in turns if role == "assistant"]
    ends = _special(tokenizer)
    labels = [IGNORED] * len(ids)
    endless = False
    for (begin, end), content in zip(rendered.spans, said, strict=True):
        at = rendered.text.find(content, begin, end)
        spoken = end if at < 0 else at + len(content)
        inside = [token for token, (first, last) in enumerate(offsets) if last > begin and first < end]
        stop = next((token for token in inside if ids[token] in ends and offsets[token][0] >= spoken), None)
        if stop is None:
            endless = True
            inside = [token for token in inside if offsets[token][0] < spoken]
        for token in inside:
            if stop is None or token <= stop:
                labels[token] = ids[token]
    begin = rendered.spans[-1][0]
    prompt = [ids[token] for token in kept if offsets[token][1] <= begin]
    return Encoded(
        [ids[token] for token in kept],
        [labels[token] for token in kept],
        prompt,
        truncated,
        endless,
        torn=head != [token for token, (_, last) in zip(ids, offsets, strict=True) if last <= begin],
    )


def _fitting(turns: Sequence[Turn], rendered: Rendered, offsets: list[Span], max_length: int) -> tuple[list[int], int]:
    """Return the indices of the tokens to keep, and the number of the others."""
    excess = len(offsets) - max_length
    everything = list(range(len(offsets)))
    if excess <= 0:
        return everything, 0
    cut: set[int] = set()
    asked = sorted(_asked(turns, rendered, offsets), key=len, reverse=True)
    for tokens in asked:
        # One token of each turn stays: a turn without any is another conversation.
        cut.update(tokens[max(1, len(tokens) - (excess - len(cut))) :])
        if len(cut) == excess:
            break
    kept = [token for token in everything if token not in cut]
    return kept[:max_length], excess


def _asked(turns: Sequence[Turn], rendered: Rendered, offsets: list[Span]) -> list[list[int]]:
    """Return the indices of each user turn's own tokens, without those of the template around it."""
    found = []
    position = 0
    spans = iter(rendered.spans)
    for role, content in turns:
        if role == "assistant":
            position = next(spans)[1]
            continue
        begin = rendered.text.find(content.strip(), position)
        if begin < 0:
            continue
        position = begin + len(content.strip())
        if role == "user":
            found.append(
                [at for at, (first, last) in enumerate(offsets) if first >= begin and last <= position and last > first]
            )
    return found


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[Span]]]:
    if not texts:
        return []
    answer = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    return list(zip(answer["input_ids"], answer["offset_mapping"], strict=True))


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special tokens and of tokens added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
