"""What is wrong with a text that a model wrote: each answer that is not used is counted under one of these words."""

from __future__ import annotations

REASONS = {
    "unchanged": "is the same as the row's own",
    "repeated": "is the same as an earlier variant of its row",
    "empty": "is empty",
    "too_long": "did not end, or is far longer than what it was made from",
    "copied": "is what the model was given",
    "looping": "says the same words again and again",
    "cut": "was made from a text that the model could not read whole",
}
"""Word -> what it says of a variant that was left out."""

LOOP_WORDS, LOOP_TIMES = 4, 4


def normal(text: str) -> str:
    """For comparing: letters without case, white space as single spaces."""
    return " ".join(text.casefold().split())


def loops(text: str) -> bool:
    """Whether up to `LOOP_WORDS` words follow upon themselves `LOOP_TIMES` times or more.

    The usual end of a model that has lost its way; in real text three times is rhetoric, four hardly happens.
    """
    words = normal(text).split()
    for size in range(1, LOOP_WORDS + 1):
        same = 0  # words in a row that equal the one `size` places before
        for place in range(size, len(words)):
            same = same + 1 if words[place] == words[place - size] else 0
            if same >= size * (LOOP_TIMES - 1):
                return True
    return False


def fault(written: str, given: str, *, ended: bool) -> str | None:
    """Why an answer cannot be used, as one of `REASONS`; None where it can.

    Args:
        given: What the model was asked to translate.
        ended: Whether the model ended the answer itself, within its limit.
    """
    if not written.strip():
        return "empty"
    if not ended:
        return "too_long"
    if normal(written) == normal(given):
        return "copied"
    return "looping" if loops(written) else None
