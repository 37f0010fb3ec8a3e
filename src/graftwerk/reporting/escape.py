"""The only way text gets into a page: everything from a file is escaped, everything of our own is marked as markup.

`Markup` is text that is HTML already. Whatever is no `Markup` is escaped when it is put into some, so that forgetting
to escape is not possible: a label called ``<script>`` is shown as such.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from graftwerk.sanitize import clean

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*\Z")


class Markup(str):
    """HTML that was made here."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Return an untrusted value as HTML: cleaned (no secrets, no invisible control characters) and escaped."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(clean(str(value)), quote=True))


def join(parts: Iterable[Any], between: str = "") -> Markup:
    """Join parts, each escaped unless it is markup, as is the separator."""
    return Markup(text(between).join(text(part) for part in parts))


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """Return an element: ``tag("p", "a < b", class_="note")``.

    Args:
        name: Name of the element.
        content: Escaped unless it is markup. None is left out.
        attributes: Underscores become hyphens, a last one is dropped; True gives a bare attribute; None and False none.
    """
    name_ = name.removesuffix("/")
    if not _NAME.match(name_):
        raise ValueError(f"{name!r} is no element")
    said = "".join(_attribute(key, value) for key, value in attributes.items())
    if name != name_:
        return Markup(f"<{name_}{said}/>")
    return Markup(f"<{name}{said}>{join(part for part in content if part is not None)}</{name}>")


def _attribute(key: str, value: Any) -> str:
    key = key.removesuffix("_").replace("_", "-")
    if not _NAME.match(key):
        raise ValueError(f"{key!r} is no attribute")
    if value is None or value is False:
        return ""
    return f" {key}" if value is True else f' {key}="{text(value)}"'
