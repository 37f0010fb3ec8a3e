"""Docstrings: the counts of `make docstrings` never rise, and every example in src runs."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from tools.docstrings import KINDS, SRC, ceilings, lowered, survey

MODULES = sorted(
    ".".join(["graftwerk", *path.relative_to(SRC).with_suffix("").parts]).removesuffix(".__init__")
    for path in SRC.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_docstrings_of_each_room_stay_within_their_ceilings() -> None:
    found, held = survey(), ceilings()
    assert all(found.looked_at[kind] > 20 for kind in KINDS), "the walk found too little"
    counts = found.counts()
    above = [
        f"{one.file}:{one.line}: {one.kind}: {one.name}"
        for one in found.shortfalls
        if counts[one.room][one.kind] > held.get(one.room, {}).get(one.kind, 0)
    ]
    assert above == [], "more docstrings fall short than tests/docstrings.json allows; mend the new ones among these"


BROKEN = '''
from torch import Tensor
from graftwerk.errors import ConfigError

def widen(x: Tensor) -> list[int]:
    """{first}{shape}."""
    def inner():
        raise ValueError
    raise ConfigError("too wide")

class Wide:
    def widen(self, x: Tensor) -> None:
        """Widen ``x`` (B, T)."""

class Wider(Wide):
    def widen(self, x: Tensor) -> None: ...
'''


@pytest.mark.parametrize(
    ("first", "shape", "expected"),
    [
        ("Widen ``x``", "", {"shapes": 1, "raises": 1}),
        ("Widen ``x``", " (B, T, D)", {"raises": 1}),
        ("What is wide", " (...)", {"raises": 1, "opening": 1}),
        ("Widen a scalar", "; None: nothing", {"raises": 1, "none": 1}),
        ("Widen ``x`` (see above, please)", "", {"raises": 1, "shapes": 1}),
    ],
)
def test_survey_planted_shortfalls_are_counted(
    tmp_path: Path, first: str, shape: str, expected: dict[str, int]
) -> None:
    (tmp_path / "__init__.py").write_text("_HOMES = {}\n")
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "wide.py").write_text(BROKEN.format(first=first, shape=shape))
    counts = survey(tmp_path).counts()
    assert counts == {"room": dict.fromkeys(KINDS, 0) | expected}


def test_lowered_never_raises_a_ceiling() -> None:
    held = {"data": {"shapes": 2, "none": 1}, "tasks": {"none": 3}}
    now = {"data": {"shapes": 5, "none": 0}, "models": {"none": 7}}
    assert lowered(held, now) == {"data": {"shapes": 2}}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
