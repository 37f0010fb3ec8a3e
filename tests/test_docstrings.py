"""Docstrings: the counts of `make docstrings` are 0, and every example in src runs."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from tools import docstrings
from tools.docstrings import KINDS, SRC, main, survey

MODULES = sorted(
    ".".join(["graftwerk", *path.relative_to(SRC).with_suffix("").parts]).removesuffix(".__init__")
    for path in SRC.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_docstrings_of_src_none_falls_short() -> None:
    found = survey()
    assert all(found.looked_at[kind] > 20 for kind in KINDS), "the walk found too little"
    assert [f"{one.file}:{one.line}: {one.kind}: {one.name}" for one in found.shortfalls] == []


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
    def _narrow(self) -> None: ...
    def __len__(self) -> int: ...
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


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("def narrow(): ...", ["narrow"]),
        ("def _narrow(): ...", []),
        ("def narrow():\n    'Narrow.'\n    def inner(): ...", []),
        (
            "class Narrow:\n    def narrow(self): ...\n    def __len__(self): ...\n    def _cut(self): ...",
            ["Narrow.narrow"],
        ),
        ("class _Narrow:\n    def narrow(self): ...", []),
        ("class Narrow:\n    def __call__(self): ...\n    @property\n    def width(self): ...", ["Narrow.width"]),
        ("from graftwerk.base import Base\nclass Narrow(Base[int]):\n    def narrow(self): ...", []),
        ("from graftwerk.base import Base\nclass Narrow(Base):\n    def other(self): ...", ["Narrow.other"]),
        ("import torch\nclass Narrow(torch.nn.Module):\n    def narrow(self): ...", ["Narrow.narrow"]),
    ],
)
def test_survey_public_callable_without_docstring_is_missing(tmp_path: Path, code: str, missing: list[str]) -> None:
    (tmp_path / "__init__.py").write_text("_HOMES = {}\n")
    (tmp_path / "base.py").write_text("class Base:\n    def narrow(self):\n        'Narrow.'\n")
    (tmp_path / "narrow.py").write_text(code)
    assert [one.name for one in survey(tmp_path).shortfalls if one.kind == "missing"] == missing


@pytest.mark.parametrize("short", [True, False])
def test_main_shortfall_decides_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], short: bool
) -> None:
    (tmp_path / "__init__.py").write_text("_HOMES = {}\n")
    (tmp_path / "narrow.py").write_text("def narrow(): ...\n" if short else "")
    found = survey(tmp_path)
    monkeypatch.setattr(docstrings, "survey", lambda: found)
    if short:
        with pytest.raises(SystemExit) as caught:
            main(["--list"])
        assert caught.value.code == 1
    else:
        main(["--list"])
    assert ("src/graftwerk/narrow.py:1: missing: narrow" in capsys.readouterr().out) is short


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
