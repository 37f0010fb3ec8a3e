"""The shell of every page: one file, nothing fetched, a content security policy that allows only what stands in it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from graftwerk.reporting.escape import Markup, join, tag, text
from graftwerk.sanitize import clean

_CODE, _BREAKS = re.compile(r"`([^`\n]+)`"), re.compile(r"(?<=[._/-])(?=\w)")


def document(
    *, title: str, kicker: str, headline: Any, deck: Sequence[Any], sections: Iterable[Markup], footer: Any
) -> str:
    """Return a whole page.

    Args:
        title: Title for the browser's tab.
        kicker: Line above the headline with the topic.
        headline: The result in a sentence.
        deck: Paragraphs below it with its conditions.
        sections: Results of `section`.
        footer: Origin of the page.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_hash(style)}'",
            f"script-src 'sha256-{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    head = join(
        [
            tag("meta/", charset="utf-8"),
            tag("meta/", http_equiv="Content-Security-Policy", content=policy),
            tag("meta/", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta/", name="referrer", content="no-referrer"),
            tag("meta/", name="color-scheme", content="light dark"),
            tag("title", title),
            Markup(f"<style>{style}</style>"),
        ],
        "\n",
    )
    body = join(
        [
            tag(
                "header",
                tag("p", kicker, class_="kicker"),
                tag("h1", headline),
                *(tag("p", paragraph, class_="deck") for paragraph in deck if paragraph),
            ),
            tag("main", join(sections, "\n")),
            tag("footer", tag("p", footer, class_="note")),
            tag("div", id="tip", role="tooltip"),
            Markup(f"<script>{script}</script>"),
        ],
        "\n",
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def section(heading: str, *content: Any) -> Markup:
    """Return a section with its heading."""
    return tag("section", tag("h2", heading), *content)


def prose(said: Any) -> Markup:
    """Return a text in which what stands between backticks is code."""
    if isinstance(said, Markup):
        return said
    parts = _CODE.split(clean(str(said)))
    return join(tag("code", part) if at % 2 else part for at, part in enumerate(parts))


def breakable(name: str) -> Markup:
    """Return a name that may be broken after its dots, hyphens and underscores."""
    parts = _BREAKS.split(name)
    return join(parts, Markup("<wbr/>"))


def paragraph(*content: Any, class_: str | None = None) -> Markup:
    """Return a paragraph."""
    return tag("p", *content, class_=class_)


def figure(drawing: Any, caption: Any = None) -> Markup:
    """Return a drawing with its caption, if there is one."""
    return tag("figure", drawing, tag("figcaption", caption) if caption else None)


def facts(rows: Iterable[tuple[str, Any]]) -> Markup:
    """Return a list of names with their values; empty ones are left out."""
    return tag(
        "dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in rows if text(value)), class_="facts"
    )


def big_figures(rows: Iterable[tuple[str, Any, Any]]) -> Markup:
    """Return the headline figures: name, value, remark."""
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", tag("strong", value), remark)) for name, value, remark in rows),
        class_="figures",
    )


def command(line: str) -> Markup:
    """Return a command line in a block of code."""
    return tag("pre", tag("code", line))


def repeat(line: str, note: str = "") -> Markup:
    """Return the section with the command that does the same again."""
    if not line:
        return section("Repeat it", paragraph("The command is not stored.", class_="missing"))
    return section("Repeat it", command(line), paragraph(note, class_="note") if note else None)


def message(lead: str, said: Any, hint: Any = None, *, grave: bool = False) -> Markup:
    """Return a message with its hint."""
    return tag(
        "li",
        tag("b", lead) if lead else None,
        " " if lead else None,
        prose(said),
        tag("span", prose(hint), class_="hint") if hint else None,
        class_="grave" if grave else None,
    )


def messages(entries: Sequence[Markup]) -> Markup:
    """Return a list of messages."""
    return tag("ul", *entries, class_="messages")


def table(
    caption: str,
    headings: Sequence[tuple[str, str]],
    rows: Iterable[tuple[str, Sequence[Any]]],
    *,
    class_: str | None = None,
    id_: str | None = None,
) -> Markup:
    """Return a table that scrolls by itself on a narrow screen.

    Args:
        caption: What it shows, for those who do not see it.
        headings: The text of each column and its class (``number`` is flush right).
        rows: The class of each row and its cells; the first cell heads the row.
        class_: Class of the table for the style sheet, or None for none.
        id_: Id of the table, or None for none.
    """
    head = tag("tr", *(tag("th", name, scope="col", class_=kind or None) for name, kind in headings))
    body = [
        tag(
            "tr",
            tag("th", cells[0], scope="row"),
            *(tag("td", cell, class_=kind or None) for cell, (_, kind) in zip(cells[1:], headings[1:], strict=True)),
            class_=row_class or None,
        )
        for row_class, cells in rows
    ]
    return tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", *body), class_=class_, id=id_),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex="0",
    )


@cache
def _asset(name: str) -> str:
    """Return a style sheet or script of ours, with the line ends that are hashed."""
    return (files("graftwerk.reporting") / "assets" / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
