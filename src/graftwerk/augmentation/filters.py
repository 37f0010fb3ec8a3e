"""Filters for generated text: reject empty, truncated, copied and looping answers, and count them by reason."""

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
    """Return a text for comparison: case folded, white space as single spaces."""
    return " ".join(text.casefold().split())


def loops(text: str) -> bool:
    """Return True if a phrase of up to `LOOP_WORDS` words stands `LOOP_TIMES` times or more in immediate succession.

    Degenerate generation ends this way. In real text three repetitions are rhetoric, and four hardly occur.
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
    """Return the reason to reject a generated answer, one of `REASONS`, or None if it can be used.

    Args:
        written: The answer.
        given: The text that the model was asked to translate.
        ended: True if the model ended the answer itself, within its token limit.
    """
    if not written.strip():
        return "empty"
    if not ended:
        return "too_long"
    if normal(written) == normal(given):
        return "copied"
    return "looping" if loops(written) else None
