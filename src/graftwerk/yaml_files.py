"""Read YAML as data alone: no tags, no aliases, bounded in size, depth and items."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from graftwerk.errors import ConfigError
from graftwerk.resource_paths import open_regular

MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 32
MAX_YAML_ITEMS = 50_000
MAX_NUMBER_CHARACTERS = 200
"""Of a value that begins like a number and is not quoted. (`1:30:00` is one too, to the base of 60, and the time to
read it grows with the square of its length.)"""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast where PyYAML was built with its C parser."""


_ROWS = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt"})


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping without tags, aliases or deep nesting.

    Raises:
        ConfigError: The file is missing, cannot be read, is no such YAML, or is not a mapping with text keys.
    """
    if path.suffix.lower() in _ROWS and path.is_file():
        raise ConfigError(
            f"{path} is a file of rows, not a run file", hint=f"`graftwerk init {path}` writes one for it"
        )
    try:
        with open_regular(path) as stream:
            raw = stream.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no run file {path}", hint="give the path of a .yaml file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", hint="give the path of a .yaml file"
        ) from None
    tree = parse_yaml(raw, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(
            "a run file is a mapping with `model`, `data` and `method`",
            where=str(path),
            hint="`graftwerk init DATA` writes one for a file of rows",
        )
    return tree


class _UniqueKeys(_Loader):  # type: ignore[misc]
    """Like `yaml.SafeLoader`, but refuses a mapping that has a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # said below
            if key in lines:
                problem = f"the key `{key}` stands twice, first in line {lines[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[key] = key_node.start_mark.line + 1
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class _OverrideValues(_UniqueKeys):
    """Read `1e-3` as the number that it is in YAML 1.2; the loader's YAML 1.1 wants a dot and a sign."""


def _float_or_text(loader: Any, node: yaml.ScalarNode) -> float | str:
    """Construct a float; digits beyond its range (`85e2415`, a short commit) stay text."""
    value: float = loader.construct_yaml_float(node)
    return node.value if math.isinf(value) and any(sign.isdigit() for sign in node.value) else value


_NO_YAML = frozenset(",|\t&*!%@`")
"""Characters that alone are no value of YAML, or an empty one: a delimiter."""
_FLOAT = "tag:yaml.org,2002:float"
_OverrideValues.add_constructor(_FLOAT, _float_or_text)
_OverrideValues.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def parse_override_value(text: str, key: str) -> Any:
    """Parse the value of an override `key=value`: YAML with the floats of YAML 1.2.

    Run files keep those of YAML 1.1: the ones in folders of earlier versions hold texts like `1e3` without quotes.

    Raises:
        ConfigError: As `parse_yaml`.
    """
    if text in _NO_YAML:
        return text
    try:
        return parse_yaml(text.encode(), key, loader=_OverrideValues)
    except UnicodeEncodeError:
        raise ConfigError("half a character (a lone surrogate)", where=key) from None


def parse_yaml(raw: bytes, where: str, *, loader: type[_UniqueKeys] = _UniqueKeys) -> Any:
    """Parse YAML without tags, aliases, duplicate keys or deep nesting, in time bounded by its length.

    Args:
        raw: The text.
        where: The file or key, for messages.
        loader: Loader class, which decides what text is a number.

    Raises:
        ConfigError: It is not valid YAML, or exceeds a limit.
    """
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"more than {MAX_YAML_BYTES:,} bytes, which is the most that a run file has", where=where)
    try:
        text = raw.decode("utf-8")
        _check_events(text, where)
        return yaml.load(text, Loader=loader)  # a child of SafeLoader
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: byte {error.start}", where=where) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"not valid YAML: {error.problem}", where=f"{where}:{line}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError) as error:
        raise ConfigError(f"not valid YAML: {str(error)[:200]}", where=where) from None


def _check_events(text: str, where: str) -> None:
    """Refuse, before anything is built, what would take long to build."""
    depth = 0
    for items, event in enumerate(yaml.parse(text, Loader=_Loader)):
        line = f"{where}:{event.start_mark.line + 1}" if event.start_mark else where
        if items > MAX_YAML_ITEMS:
            raise ConfigError(f"more than {MAX_YAML_ITEMS:,} items", where=line)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError("YAML aliases (*name) are not accepted in a run file", where=line)
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > MAX_NUMBER_CHARACTERS:
            if event.value[0] in "0123456789+-.":
                raise ConfigError(f"a number of {len(event.value):,} characters", where=line, hint="quote what is text")
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_YAML_DEPTH:
                raise ConfigError(f"nested deeper than {MAX_YAML_DEPTH} levels", where=line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
