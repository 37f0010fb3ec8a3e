r"""Matching of layer names in PEFT's files: endings, sometimes patterns. Python's `re` runs no expression from a file.

PEFT adapts a layer if its path is an entry of ``target_modules`` or ends with ``.<entry>``, and takes a rank or alpha
from the first key of a pattern table for which ``(.*\.)?(<key>)$`` matches the path. What such keys are in practice
(names, dotted paths, paths with escaped dots) is matched here character by character, in time linear in the path; other
expressions by the engine that pydantic matches its patterns with, Rust's `regex`, which does not backtrack: it takes
time linear in the path, and refuses what it cannot match so (looking around, referring back).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NoReturn

from pydantic_core import SchemaError, SchemaValidator, core_schema

from graftwerk.errors import UnsupportedError

MAX_LENGTH = 512
SECONDS = 2.0
"""Processor time for the expressions of a folder. A hostile one takes 60 ms at most; one that names layers 0.1 ms."""
_FOREIGN = re.compile(r"\(\?(?!:)|\\(?:[^\W_dwsDWS]|[<>])|\[\^?\]?(?:\\.|[^\]\\])*\[|&&|--|~~|[*+?}][*+{]|\{[^}]*\s")
"""Syntax that Rust reads otherwise than Python: flags and names, escapes, sets within sets, possessive repetitions, and
spaces in the bounds of a repetition."""
_PLAIN = re.compile(r"(\^)?(\.\*\\?\.)?((?:[\w.-]|\\[.-])+)\$?", re.ASCII)


def endings(chosen: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Return few and short endings, sorted, that together match exactly ``chosen`` among the paths of ``modules``."""
    wanted = set(chosen)
    others = [path for path in modules if path not in wanted]
    taken: set[str] = set()
    for path in others:
        taken.update(_endings_of(path))
    found = set()
    for path in chosen:
        # The longest ending is the path itself; nothing else ends with it, or PEFT could not tell the two apart either.
        found.add(next((ending for ending in _endings_of(path) if ending not in taken), path))
    return sorted(found)


def _endings_of(path: str) -> list[str]:
    """Convert `a.b.c` to `c`, `b.c`, `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def ends_with(path: str, entries: Iterable[str]) -> bool:
    """Return True if an entry equals the path or is its ending after a dot, as PEFT matches its lists."""
    return ("." + path).endswith(dotted(entries))


def dotted(entries: Iterable[str]) -> tuple[str, ...]:
    """Return the endings that a path with a dot before it has where one of these entries matches it."""
    return tuple("." + entry for entry in entries)


class Budget:
    """Processor time that matching may still take, for all expressions of a folder and all paths."""

    def __init__(self) -> None:
        self.seconds = SECONDS


def named_by(key: str, path: str, budget: Budget | None = None) -> bool:
    """Return whether a key of a rank or alpha pattern names a path, as PEFT's expression would find.

    Args:
        key: A key of a rank or alpha pattern.
        path: The path of a module.
        budget: What matching may cost, shared by all keys of a folder.

    Raises:
        UnsupportedError: the key is an expression that is malformed, cannot be matched without backtracking, or takes
            too long.
    """
    plain = _PLAIN.fullmatch(key) if len(key) <= MAX_LENGTH else None
    if plain is None:
        return _matches(key, path, budget or Budget())
    anchor, prefix, name = plain.groups()
    # A dot that is not escaped stands for any character; all other characters for themselves.
    text = re.sub(r"\\([.-])", lambda match: "\0" if match[1] == "." else match[1], name)
    before = len(path) - len(text)
    if before < 0 or not all(
        b == "." if a == "\0" else (a in (".", b)) for a, b in zip(text, path[before:], strict=True)
    ):
        return False
    if prefix:  # `.*\.` and `.*.` need a character in front of the name, so a path of the name alone has no match
        return before > 0 and (prefix == ".*." or path[before - 1] == ".")
    return before == 0 or (anchor is None and path[before - 1] == ".")


def _matches(key: str, path: str, budget: Budget) -> bool:
    if budget.seconds < 0:
        _refuse(key, f"comes after others that took more than {SECONDS:g} seconds")
    begun = time.thread_time()
    try:
        return _expression(key).isinstance_python(path)
    finally:  # a refusal takes time too, and some callers go on after it
        budget.seconds -= time.thread_time() - begun


@lru_cache(maxsize=32)  # one may take 8 MB
def _expression(key: str) -> SchemaValidator:
    if len(key) > MAX_LENGTH:
        _refuse(key, f"is longer than {MAX_LENGTH} characters")
    if foreign := _FOREIGN.search(key):
        _refuse(key, f"uses `{foreign[0]}`")
    whole = rf"(.*\.)?({key})$"
    try:
        re.compile(whole)  # what is malformed there, as `$+` is, Rust may accept
        return SchemaValidator(core_schema.str_schema(pattern=f"^(?:{whole})", regex_engine="rust-regex"))
    except (re.error, RecursionError, OverflowError) as error:
        _refuse(key, f"is malformed ({error})")
    except SchemaError as error:
        why = str(error).rpartition("rror: ")[2].rstrip(".")
        _refuse(key, f"cannot be matched without backtracking ({why})")


def _refuse(key: str, why: str) -> NoReturn:
    raise UnsupportedError(
        f"the regular expression {key!a:.80} {why}, so it is not evaluated",
        where="adapter_config.json",
        hint="write out the names of the layers in its place",
    )


def layer_number(path: str, names: Sequence[str] | None) -> int | None:
    """Return the number of a module's layer, as PEFT's ``layers_to_transform`` counts, or None if it is in no layer.

    Args:
        path: Path of the module.
        names: Names that the list of layers may have (``layers_pattern``), or None for any name.
    """
    parts = path.split(".")
    for position in range(1, len(parts) - 1):
        if not parts[position].isdecimal():
            continue
        if names is None:
            if position >= 2:
                return int(parts[position])
        elif any(ends_with(".".join(parts[:position]), [name]) for name in names):
            return int(parts[position])
    return None
