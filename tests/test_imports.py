"""Who may import whom (docs/architecture.md), by walking the sources; and what is not imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "graftwerk"
BASE = {"errors", "settings", "locate", "machine", "own_files", "sanitize"}
SETTINGS = {"augment.settings", "data.settings", "train.settings", "evaluate.settings"}
BELOW_TASKS = {*BASE, "data.settings", "data"}
BELOW_TRAIN = {*BELOW_TASKS, *SETTINGS, "fast", "tasks", "models", "methods", "inject", "store", "config"}

# Room -> what it may import besides itself. A room is a package or a single file; settings.py of a room is a room
# of its own, so that the run file can be composed of settings without dragging the rooms in.
ALLOWED: dict[str, set[str]] = {
    "sanitize": set(),
    "errors": {"sanitize"},
    "settings": {"errors"},
    "verbs": set(),
    "figures": set(),
    "machine": set(),
    "locate": {"errors", "sanitize"},
    "own_files": {"errors"},
    "fast": {"errors"},
    "augment.settings": {"errors", "settings"},
    "data.settings": {"settings", "augment.settings"},
    "train.settings": {"settings"},
    "evaluate.settings": {"settings"},
    "methods": {"errors", "settings", "fast"},
    "config": {*BASE, "methods", "models", "tasks", *SETTINGS},
    "schema": {"augment.settings", "config", "methods", "settings", "tasks"},
    "inject": {"errors", "methods", "fast"},
    "store": {*BASE, "inject", "methods"},
    "data": {*BASE, "data.settings"},
    "models": {*BASE},
    "tasks": {*BELOW_TASKS, "models", "fast"},
    "evaluate": {*BELOW_TRAIN, "verbs"},
    "augment": {*BELOW_TRAIN, "evaluate", "verbs"},
    "train": {*BELOW_TRAIN, "evaluate", "augment", "verbs"},
    "report": {"errors", "own_files", "sanitize"},
    "explain": {*BASE, "store"},
    "choose": {*BELOW_TRAIN, "figures", "train", "evaluate", "augment", "report"},
    "cli": {*BELOW_TRAIN, "figures", "schema", "train", "evaluate", "augment", "choose", "report", "explain"},
    "__main__": {"cli"},
}
# Imports inside a function that point back on purpose, each with its reason.
EXCEPTIONS: dict[tuple[str, str], str] = {
    (
        "graftwerk.inject.graft",
        "graftwerk.store.folder",
    ): "people expect `save` on the graft itself; imported when it is called",
}


def room_of(module: str, src: Path = SRC) -> str:
    """`graftwerk.train.loop` -> `train`; `graftwerk.train.settings` -> `train.settings`."""
    parts = module.split(".")[1:]
    if not parts:
        return ""
    two = ".".join(parts[:2])
    return two if two in SETTINGS else parts[0]


def imports_of(path: Path, module: str) -> set[str]:
    """Every graftwerk module that a file names in an import, at any depth, TYPE_CHECKING included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])]
                )
            if origin == "graftwerk":  # `from graftwerk import errors` names a module, `... import LoRA` the public API
                found.update(f"graftwerk.{name.name}" for name in node.names)
            else:
                found.add(origin)
    return {name for name in found if name.split(".")[0] == "graftwerk"}


def faults(src: Path) -> list[str]:
    seen = []
    for path in sorted(src.rglob("*.py")):
        relative = path.relative_to(src)
        if relative == Path("__init__.py"):
            continue  # the public API, imported lazily, names every room
        module = ".".join(["graftwerk", *relative.with_suffix("").parts]).removesuffix(".__init__")
        room = room_of(module)
        if room not in ALLOWED:
            seen.append(f"{relative}: the room `{room}` has no rule")
            continue
        for name in sorted(imports_of(path, module)):
            other = room_of(name)
            if other in {"", "__version__"} and room == "cli":
                continue  # `graftwerk --version`
            if other in {room, *ALLOWED[room]} or (module, name) in EXCEPTIONS:
                continue
            seen.append(f"{relative}: {room} may not import {name}")
    return seen


def test_rooms_import_only_what_lies_below_them() -> None:
    assert len(list(SRC.rglob("*.py"))) > 30, "nothing was walked"
    assert faults(SRC) == []


def test_no_two_rooms_import_each_other() -> None:
    pairs = {(room, other) for room, others in ALLOWED.items() for other in others}
    assert [pair for pair in pairs if pair[::-1] in pairs] == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        (
            "methods/broken.py",
            "from graftwerk.inject.attach import attach",
            "methods may not import graftwerk.inject.attach",
        ),
        ("report/broken.py", "def f():\n    import graftwerk.train.run", "report may not import graftwerk.train.run"),
        ("evaluate/broken.py", "from ..train import loop", "evaluate may not import graftwerk.train"),
        ("inject/broken.py", "from graftwerk import train", "inject may not import graftwerk.train"),
        ("store/broken.py", "from graftwerk import LoRA", "store may not import graftwerk.LoRA"),
        ("data/broken.py", "import graftwerk", "data may not import graftwerk"),
        ("utils/__init__.py", "", "the room `utils` has no rule"),
    ],
)
def test_the_walk_sees_a_wrong_import(tmp_path: Path, file: str, line: str, said: str) -> None:
    target = tmp_path / file
    target.parent.mkdir()
    target.write_text(line + "\n")
    assert any(said in fault for fault in faults(tmp_path)), faults(tmp_path)


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh Python holds after ``code``."""
    script = f"import sys\n{code}\nprint(chr(10).join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    return set(done.stdout.split("\n"))


HEAVY = {"torch", "transformers", "numpy", "accelerate", "sklearn", "datasets", "peft", "yaml", "rich"}


@pytest.mark.parametrize(
    "code",
    [
        "import graftwerk",
        "import graftwerk.cli.main",
        "from graftwerk.cli.main import main\ntry:\n    assert main(['--help']) == 0\nexcept SystemExit: pass",
        "from graftwerk.cli.main import main\nassert main(['train', '--help']) == 0",
    ],
    ids=["import", "command line", "--help", "train --help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    loaded = loaded_after(code)
    assert "graftwerk" in loaded
    assert HEAVY & loaded == set()
    if "'train'" not in code:  # typer itself reads a command's options with pydantic
        assert "pydantic" not in loaded


def test_every_public_name_is_there_and_typed() -> None:
    """The lazy table and the block for type checkers say the same, and every name resolves."""
    import graftwerk

    tree = ast.parse((SRC / "__init__.py").read_text())
    typed = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {
        name: f"graftwerk.{attribute}.run.{attribute}" if module == "graftwerk" else f"{module}.{attribute}"
        for name, (module, attribute) in graftwerk._HOMES.items()
    }
    assert typed == lazy
    assert {*lazy, "errors", "__version__"} == set(graftwerk.__all__)
    for name in graftwerk.__all__:
        assert getattr(graftwerk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        graftwerk.nothing  # noqa: B018


@pytest.mark.parametrize("before", ["import graftwerk.train.run", "pass"])
def test_verbs_that_are_rooms_can_be_called_whatever_was_imported_before(before: str) -> None:
    script = (
        f"{before}\nimport graftwerk as gw, inspect\n"
        "from graftwerk.errors import ConfigError\n"
        "assert 'config' in inspect.signature(gw.train).parameters\n"
        "assert 'target' in inspect.signature(gw.evaluate).parameters\n"
        "try:\n    gw.train('no/such/file.yaml')\nexcept ConfigError as error:\n    print(error.what)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "no/such/file.yaml" in done.stdout


def test_packages_hold_no_code_of_their_own() -> None:
    for path in SRC.glob("*/__init__.py"):
        if path.parent.name in {"train", "evaluate", "augment"}:
            continue  # see verbs.py
        assert not ast.parse(path.read_text()).body or path.read_text().strip().startswith('"""'), path
