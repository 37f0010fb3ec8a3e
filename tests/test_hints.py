"""Hints name keys and options that there are: found by walking the sources, so that none is forgotten."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from graftwerk.cli.main import app
from graftwerk.schema import run_keys
from graftwerk.settings_parsing import known_keys
from graftwerk.training.settings import TrainingSettings

SRC = Path(__file__).parents[1] / "src" / "graftwerk"
KEY = re.compile(r"(?<![\w./])(?:data|training|evaluation|task|method)\.[a-z][a-z_]*(?![\w(])")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
NOT_OURS = {"--multi", "--fsdp", "--head", "--address"}
"""Options of accelerate launch and of ray start."""
FILES = {"data.csv", "data.jsonl"}


def texts(kind: ast.expr) -> Iterator[str]:
    for node in ast.walk(kind):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def hints() -> Iterator[tuple[str, str]]:
    """Each ``hint=`` and ``where=`` of the sources, and each text assigned to a name ``hint``, with its place."""
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            said: list[ast.expr] = []
            if isinstance(node, ast.Call):
                said = [word.value for word in node.keywords if word.arg in ("hint", "where")]
            elif isinstance(node, ast.Assign) and any(
                getattr(it, "id", "") in ("hint", "KEY", "WHERE") for it in node.targets
            ):
                said = [node.value]
            for expression in said:
                for text in texts(expression):
                    yield f"{path.relative_to(SRC)}:{node.lineno}", text


@pytest.fixture(scope="module")
def keys() -> set[str]:
    found = {re.sub(r"\(.*?\)", "", entry["key"]) for entry in run_keys()}
    return found | {f"training.{key}" for key in known_keys(TrainingSettings)}


def test_every_key_named_in_a_hint_is_a_key_of_the_run_file(keys: set[str]) -> None:
    named = [(place, key) for place, text in hints() for key in KEY.findall(text) if key not in FILES]
    assert len(named) > 60, "nothing was walked"
    assert [(place, key) for place, key in named if key not in keys] == []


def test_every_option_named_in_a_hint_is_one_of_a_command() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name for command in commands.values() for parameter in command.params for name in parameter.opts}
    named = [(place, option) for place, text in hints() for option in OPTION.findall(text)]
    assert len(named) > 10, "nothing was walked"
    assert [(place, option) for place, option in named if option not in {*options, "--help", *NOT_OURS}] == []
