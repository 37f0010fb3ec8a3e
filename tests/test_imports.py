"""Who may import whom (docs/architecture.md), by walking the sources; and what is not imported before it is needed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "graftwerk"
PARSING = {"settings", "settings_parsing"}
BASE = {*PARSING, "errors", "resource_paths", "devices", "machine", "own_files", "sanitize", "yaml_files"}
SETTINGS = {"augmentation.settings", "data.settings", "training.settings", "evaluation.settings"}
BELOW_TASKS = {*BASE, "data.settings", "data"}
BELOW_TRAIN = {*BELOW_TASKS, *SETTINGS, "kernels", "tasks", "models", "methods", "modeling", "serialization", "config"}

# Room -> what it may import besides itself. A room is a package or a single file; settings.py of a room is a room
# of its own, so that the run file can be composed of settings without dragging the rooms in.
ALLOWED: dict[str, set[str]] = {
    "sanitize": set(),
    "errors": {"sanitize"},
    "other_names": set(),
    "settings": set(),
    "settings_parsing": {"errors", "other_names", "settings"},
    "formatting": set(),
    "display": {"formatting", "sanitize"},
    "machine": set(),
    "devices": set(),
    "yaml_files": {"errors", "resource_paths"},
    "absolute_paths": set(),
    "resource_paths": {"errors", "sanitize"},
    "own_files": {"errors"},
    "kernels": {"devices", "errors", "methods"},
    "augmentation.settings": {"errors", *PARSING},
    "data.settings": {"settings", "augmentation.settings"},
    "training.settings": {"settings"},
    "evaluation.settings": {"settings"},
    "methods": {"errors", "other_names", *PARSING},
    "config_keys": {*BASE, "methods", "tasks", *SETTINGS},
    "config_secrets": {"models", "sanitize"},
    "config": {*BASE, "absolute_paths", "config_keys", "config_secrets", "methods", "models", "tasks", *SETTINGS},
    "schema": {"augmentation.settings", "config", "errors", "methods", "models", "other_names", *PARSING, "tasks"},
    "modeling": {"errors", "methods", "kernels"},
    "serialization": {*BASE, "modeling", "methods"},
    "data": {*BASE, "data.settings"},
    "models": {*BASE},
    "tasks": {*BELOW_TASKS, "models", "kernels"},
    "evaluation": {*BELOW_TRAIN, "display"},
    "augmentation": {*BELOW_TRAIN, "evaluation"},
    "training": {*BELOW_TRAIN, "absolute_paths", "display", "formatting", "evaluation", "augmentation"},
    "exports": {*BELOW_TRAIN, "evaluation"},
    "reporting": {"errors", "formatting", "own_files", "sanitize"},
    "inspection": {*BELOW_TRAIN, "evaluation"},
    "experiments": {
        *BELOW_TRAIN,
        "absolute_paths",
        "display",
        "formatting",
        "training",
        "evaluation",
        "augmentation",
        "reporting",
    },
    "cli": {
        *BELOW_TRAIN,
        "display",
        "formatting",
        "schema",
        "training",
        "evaluation",
        "augmentation",
        "experiments",
        "exports",
        "reporting",
        "inspection",
    },
    "api": {"modeling", "serialization"},
    "__main__": {"cli", "machine"},
}


def room_of(module: str, src: Path = SRC) -> str:
    """`graftwerk.training.trainer` -> `train`; `graftwerk.training.settings` -> `train.settings`."""
    parts = module.split(".")[1:]
    if not parts:
        return ""
    two = ".".join(parts[:2])
    return two if two in SETTINGS else parts[0]


def imports_of(path: Path, module: str) -> set[str]:
    """Return every graftwerk module that a file names in an import, at any depth, TYPE_CHECKING included."""
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
                found.update(f"{origin}.{name.name}" for name in node.names)  # `from graftwerk.room import file`
    return {name for name in found if name.split(".")[0] == "graftwerk"}


def named_in(path: Path) -> set[str]:
    """Return every graftwerk module that a file names in a string, as `import_module` and `python -m` take them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in strings if text.startswith("graftwerk.")}


def modules_of(src: Path) -> dict[str, Path]:
    """Return the files of a source tree by the names of their modules."""
    return {
        ".".join(["graftwerk", *path.relative_to(src).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sorted(src.rglob("*.py"))
    }


def circles(src: Path) -> list[list[str]]:
    """Return the groups of files that import each other, directly or through others; counted are all imports."""
    files = modules_of(src)
    imports = {
        module: {name for name in imports_of(path, module) | named_in(path) if name in files and name != module}
        for module, path in files.items()
    }

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in imports[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    below = {module: reached(module) for module in imports}
    groups = {
        tuple(sorted(other for other in below[module] if module in below[other]))
        for module in imports
        if module in below[module]
    }
    return sorted(map(list, groups))


def faults(src: Path) -> list[str]:
    seen = []
    for module, path in modules_of(src).items():
        relative = path.relative_to(src)
        if relative == Path("__init__.py"):
            continue  # the public API, imported lazily, names every room
        room = room_of(module)
        if room not in ALLOWED:
            seen.append(f"{relative}: the room `{room}` has no rule")
            continue
        for name in sorted(imports_of(path, module)):
            other = room_of(name)
            if other in {"", "__version__"} and room == "cli":
                continue  # `graftwerk --version`
            if other in {room, *ALLOWED[room]}:
                continue
            seen.append(f"{relative}: {room} may not import {name}")
    return seen


def test_rooms_import_only_what_lies_below_them() -> None:
    assert len(list(SRC.rglob("*.py"))) > 30, "nothing was walked"
    assert faults(SRC) == []


def test_files_import_in_no_circle() -> None:
    assert circles(SRC) == []


@pytest.mark.parametrize(
    ("lower", "line"),
    [
        ("modeling/adapter_slots.py", "def f():\n    from graftwerk.modeling.attach import attach"),
        ("modeling/adapter_slots.py", "from . import attach"),
        ("modeling/adapter_slots.py", "if TYPE_CHECKING:\n    from graftwerk.modeling.attach import Adapter"),
        ("modeling/adapter.py", "import graftwerk.serialization.folder"),
        ("tasks/base.py", "from importlib import import_module\nimport_module('graftwerk.tasks.registry')"),
    ],
    ids=["in a function", "relative", "for types", "between rooms", "by name"],
)
def test_circles_a_planted_import_is_found(tmp_path: Path, lower: str, line: str) -> None:
    src = tmp_path / "graftwerk"
    shutil.copytree(SRC, src, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    with (src / lower).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    planted = "graftwerk." + lower.removesuffix(".py").replace("/", ".")
    assert [planted in group for group in circles(src)] == [True]


def test_no_two_rooms_import_each_other() -> None:
    pairs = {(room, other) for room, others in ALLOWED.items() for other in others}
    assert [pair for pair in pairs if pair[::-1] in pairs] == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        (
            "methods/broken.py",
            "from graftwerk.modeling.attach import attach",
            "methods may not import graftwerk.modeling.attach",
        ),
        (
            "reporting/broken.py",
            "def f():\n    import graftwerk.training.train",
            "reporting may not import graftwerk.training.train",
        ),
        ("evaluation/broken.py", "from ..training import trainer", "evaluation may not import graftwerk.training"),
        ("modeling/broken.py", "from graftwerk import train", "modeling may not import graftwerk.train"),
        ("serialization/broken.py", "from graftwerk import LoRA", "serialization may not import graftwerk.LoRA"),
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


def test_public_attach_registers_the_file_format_that_save_writes() -> None:
    assert "graftwerk.serialization.folder" in loaded_after("import graftwerk\ngraftwerk.attach")


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


@pytest.mark.parametrize("before", ["import graftwerk.training.train", "pass"])
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
