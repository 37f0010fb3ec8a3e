"""Documentation: the code blocks with prompts run and give what they show; links between documents lead somewhere."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "CONTRIBUTING.md", ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>> " in page.read_text("utf-8")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_code_blocks_with_prompts_run(page: Path) -> None:
    blocks = [block for block in FENCE.findall(page.read_text("utf-8")) if ">>> " in block]
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for number, block in enumerate(blocks):
        runner.run(parser.get_doctest(block, {}, f"{page.name} block {number}", str(page), 0))
    assert blocks
    assert runner.summarize(verbose=False).failed == 0


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in PAGES
        for link in LINK.findall(page.read_text("utf-8"))
        if not (page.parent / link).exists()
    ]
    assert broken == []


def test_architecture_names_exist() -> None:
    """Each public name in the table of rooms is defined in its room."""
    table = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## The rooms")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    missing = []
    for rooms, _, names in (row for row in rows if len(row) == 3 and "cli/" not in row[0]):
        places = [ROOT / "src" / "graftwerk" / room for room in re.findall(r"`([\w/.]+)`", rooms)]
        files = [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]
        text = "\n".join(file.read_text("utf-8") for file in files)
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            if not re.search(rf"^ *(def|class) {name}\b|^{name}\b.*=", text, re.MULTILINE):
                missing.append(f"{rooms}: {name}")
    assert missing == []
