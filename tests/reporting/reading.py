"""A page read as a browser reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "input", "br", "link", "img"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    text: str = ""
    inside: list[str] = field(default_factory=list)
    """Names of the elements around it."""


class Page(HTMLParser):
    """Elements in order, each with the text below it; elements that are not closed in order are an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, [element.name for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), inside=[parent.name for parent in self._open])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), inside=[parent.name for parent in self._open]))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].name == tag, f"</{tag}> closes <{self._open[-1].name}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, name: str, class_: str | None = None) -> list[Element]:
        return [
            element
            for element in self.elements
            if element.name == name and (class_ is None or class_ in (element.attributes.get("class") or "").split())
        ]

    def one(self, name: str) -> Element:
        (found,) = self.all(name)
        return found

    @property
    def text(self) -> str:
        """All that can be seen, without style and script."""
        return self.one("header").text + self.one("main").text + self.one("footer").text
