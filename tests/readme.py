"""The README as tests see it: its code blocks, its commands, its table. `python -m tests.readme` writes the table."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- capabilities:begin -->", "<!-- capabilities:end -->"


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of one language; "" for those without."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [content for said, content in fences if said == language]


def commands(program: str) -> list[str]:
    """Lines of the blocks without a language that call ``program``, without their remarks."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(f"{program} ")]


def session() -> list[tuple[str, str]]:
    """The commands of the console block, each with what it prints on stdout."""
    (block,) = blocks("console")
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(command, printed) for command, _, printed in (part.partition("\n") for part in parts)]


def between_markers() -> str:
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def write_table() -> None:
    from tests.contract.cases import table

    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text(f"{before}\n{table()}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    write_table()
