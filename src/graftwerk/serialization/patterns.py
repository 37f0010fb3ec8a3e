"""Regular expressions from files, matched without backtracking.

An expression is matched from a *set* of positions and gives the set of positions where it can end, so that ways that
meet at one position are followed once: time grows with the expression and the text, never exponentially. What such an
engine cannot do (look around, refer back) is refused by name, and so is an expression that takes too many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from graftwerk.errors import UnsupportedError

MAX_LENGTH = 512
MAX_DEPTH = 32
MAX_REPEATS = 1_000
MAX_STEPS = 4_000_000
"""Steps for all expressions of a folder, about two seconds. One that names layers takes about a hundred for a path."""

_SPECIAL = frozenset("()[]{}*+?|^$.\\")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}
Test = Callable[[str], bool]


class Steps:
    """Count down from `MAX_STEPS`, for all expressions of a folder and all paths that they are matched to."""

    def __init__(self) -> None:
        self.left = MAX_STEPS


class Expression:
    """A regular expression, in Python's syntax.

    Raises:
        UnsupportedError: it is malformed, too long or too deep, or uses what cannot be matched without backtracking.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_LENGTH:
            self.refuse(f"is longer than {MAX_LENGTH} characters")
        self._at = self._depth = 0
        self._root = self._alternatives()
        if self._at < len(text):
            self.refuse("has a `)` too many")

    def matches(self, text: str, starts: set[int], steps: Steps | None = None) -> bool:
        """Return whether it matches ``text`` from one of these positions up to the end.

        Raises:
            UnsupportedError: no steps are left.
        """
        return len(text) in _Run(self, text, steps or Steps()).ends(self._root, starts)

    def refuse(self, why: str) -> NoReturn:
        """Raise the error of this expression.

        Args:
            why: The reason, to follow the expression in the message.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"the regular expression {self.text!a:.80} {why}, so it is not evaluated",
            where="adapter_config.json",
            hint="write out the names of the layers in its place",
        )

    # -- parsing -------------------------------------------------------------------------------------------------

    def _peek(self) -> str:
        return self.text[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char:
            self.refuse("ends too early")
        self._at += 1
        return char

    def _alternatives(self) -> _Node:
        ways = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            ways.append(self._sequence())
        return ways[0] if len(ways) == 1 else _Node("any of", parts=tuple(ways))

    def _sequence(self) -> _Node:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return _Node("sequence", parts=tuple(parts))

    def _repeated(self, node: _Node) -> _Node:
        char = self._peek()
        if char not in ("*", "+", "?", "{"):
            return node
        if node.kind in ("start", "end"):
            self.refuse(f"repeats a `{'^' if node.kind == 'start' else '$'}`")
        self._at += 1
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(char) or self._bounds()
        if self._peek() == "?":  # lazy or greedy: the same paths match
            self._at += 1
        if self._peek() in ("*", "+", "?", "{"):
            self.refuse("has two repetitions in a row")
        return _Node("repeat", parts=(node,), low=low, high=high)

    def _bounds(self) -> tuple[int, int | None]:
        closing = self.text.find("}", self._at)
        low, comma, high = self.text[self._at : max(closing, self._at)].partition(",")
        numbers = [number for number in (low, high) if number]
        if closing < 0 or not numbers or not all(number.isdecimal() and len(number) < 6 for number in numbers):
            self.refuse("has braces that are no number of repetitions")
        self._at = closing + 1
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
            self.refuse("has an impossible number of repetitions")
        return least, most

    def _atom(self) -> _Node:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return _Node("char", test=self._class())
        if char == "\\":
            return _Node("char", test=self._escaped())
        if char in ("^", "$"):
            return _Node("start" if char == "^" else "end")
        if char == ".":
            return _Node("char", test=lambda found: found != "\n")
        if char in _SPECIAL and char not in ("]", "}"):
            self.refuse(f"has a `{char}` with nothing before it")
        return _Node("char", test=lambda found: found == char)

    def _group(self) -> _Node:
        if self._peek() == "?":
            if self.text.startswith("?:", self._at):
                self._at += 2
            else:
                self.refuse("uses `(?`: names, flags or looking around")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.refuse(f"is nested deeper than {MAX_DEPTH} groups")
        inner = self._alternatives()
        if self._take() != ")":
            self.refuse("has a group that is not closed")
        self._depth -= 1
        return inner

    def _escaped(self) -> Test:
        char = self._take()
        if char.lower() in _CLASSES:
            test = _CLASSES[char.lower()]
            return test if char.islower() else lambda found: not test(found)
        if char.isalnum():
            self.refuse(f"uses `\\{char}`")
        return lambda found: found == char

    def _class(self) -> Test:
        negated = self._peek() == "^"
        self._at += negated
        tests: list[Test] = []
        first = True
        while first or self._peek() != "]":
            first = False
            char = self._take()
            if char == "\\":
                following = self._peek()
                tests.append(self._escaped())
                if following.isalnum() or self._peek() != "-":
                    continue
                char = following
                tests.pop()
            if self._peek() == "-" and self.text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._take()
                if last == "\\":
                    last = self._take()
                    if last.isalnum():
                        self.refuse("has a range that ends in a class")
                if last < char:
                    self.refuse("has a range that runs backwards")
                tests.append(lambda found, low=char, high=last: low <= found <= high)  # type: ignore[misc]
            else:
                tests.append(lambda found, own=char: found == own)  # type: ignore[misc]
        self._at += 1
        return lambda found: any(test(found) for test in tests) != negated


@dataclass(frozen=True)
class _Node:
    """A part of an expression: ``char``, ``start``, ``end``, ``sequence``, ``any of`` or ``repeat``."""

    kind: str
    parts: tuple[_Node, ...] = ()
    test: Test | None = None
    low: int = 0
    high: int | None = None


class _Run:
    """One text being matched."""

    def __init__(self, expression: Expression, text: str, steps: Steps) -> None:
        self.expression, self.text, self.steps = expression, text, steps

    def ends(self, node: _Node, starts: set[int]) -> set[int]:
        """Return where a part can end if it begins at one of these positions."""
        self.steps.left -= 1 + len(starts)
        if self.steps.left < 0:
            self.expression.refuse(f"and those before it take more than {MAX_STEPS:,} steps")
        if node.kind == "char":
            assert node.test is not None
            return {at + 1 for at in starts if at < len(self.text) and node.test(self.text[at])}
        if node.kind == "start":
            return starts & {0}
        if node.kind == "end":
            return starts & {len(self.text)}
        if node.kind == "any of":
            return set().union(*(self.ends(part, starts) for part in node.parts))
        if node.kind == "repeat":
            return self._repeated(node, starts)
        for part in node.parts:
            if not starts:
                return starts
            starts = self.ends(part, starts)
        return starts

    def _repeated(self, node: _Node, starts: set[int]) -> set[int]:
        (part,) = node.parts
        for _ in range(node.low):
            if not starts:
                return starts
            starts = self.ends(part, starts)
        found, new, count = set(starts), starts, node.low
        while new and (node.high is None or count < node.high):
            new = self.ends(part, new) - found
            found |= new
            count += 1
        return found
