"""Count the docstrings of src that fall short, room by room: `make docstrings`, or `python -m tools.docstrings --list`.

The sources are read with `ast`; nothing is imported. Six counts, each of the places that still fall short:

* ``missing``: public functions, and public methods of public classes, without a docstring;
* ``shapes``: public callables with a tensor among parameters or results whose docstring gives no shape, such as
  ``(B, T, D)``, ``(...)``, ``scalar`` or ``any shape``;
* ``raises``: public callables that raise one of ``graftwerk.errors`` themselves, without a ``Raises:`` section;
* ``doctest``: names of ``graftwerk.__all__`` without an example (``>>>``);
* ``opening``: docstrings that open with What, Whether, How, Where, Who or Which in place of a verb;
* ``none``: docstrings that say ``None where ...`` or ``; None: ...`` in place of "or None if ...".

A method without a docstring has that of the method which it overrides, in any class of src. ``__init__`` and
``__call__`` are documented by their class. The exit code is 1 if a count is not 0.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "graftwerk"
KINDS = ("missing", "shapes", "raises", "doctest", "opening", "none")

_TENSORS = frozenset({"Tensor", "Parameter", "LongTensor", "FloatTensor"})
_SIZE = r"(?:\.\.\.|[\w.·]+(?: ?[-+*/×·] ?[\w.]+)*)"
_SHAPE = re.compile(rf"\({_SIZE}(?:, ?{_SIZE})+\)|\({_SIZE},\)|\(\.\.\.\)|\bscalars?\b|\bany shape\b", re.IGNORECASE)
_OPENING = re.compile(r"(What|Whether|How|Where|Who|Which)\b")
_NONE = re.compile(r"\bNone where\b|; None:")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Shortfall:
    """One place whose docstring falls short.

    Attributes:
        kind: One of ``KINDS``.
        room: First part of the file's path within src.
        file: The file's path within src.
        line: Line of the definition, from 1.
        name: Its qualified name within the file.
    """

    kind: str
    room: str
    file: str
    line: int
    name: str


@dataclass
class Survey:
    """Everything that was looked at, and the shortfalls among it.

    Attributes:
        looked_at: Number of places per kind.
        shortfalls: Those that fall short.
    """

    looked_at: Counter[str] = field(default_factory=Counter)
    shortfalls: list[Shortfall] = field(default_factory=list)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of shortfalls by room and kind, rooms without any included as zeros where walked."""
        rooms: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(KINDS, 0))
        for shortfall in self.shortfalls:
            rooms[shortfall.room][shortfall.kind] += 1
        return dict(sorted(rooms.items()))


@dataclass(frozen=True)
class _Callable:
    """A function or method as it stands in a file, with its class if it has one."""

    file: str
    name: str
    node: Function
    owner: ast.ClassDef | None


def survey(src: Path = SRC) -> Survey:
    """Walk all files of a package and count.

    Args:
        src: Folder of the package; its ``__init__.py`` names the public API in ``_HOMES``.
    """
    files = {str(path.relative_to(src)): ast.parse(path.read_text("utf-8")) for path in sorted(src.rglob("*.py"))}
    documented = _documented_methods(files)
    found = Survey()
    for file, tree in files.items():
        for name, node in _definitions(tree):
            _check_words(found, file, name, node)
        for item in _public_callables(file, tree):
            _check_callable(found, item, documented)
    _check_examples(found, files)
    return found


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Function]]:
    yield "", tree
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | Function):
            yield node.name, node


def _public_callables(file: str, tree: ast.Module) -> Iterator[_Callable]:
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield _Callable(file, node.name, node, None)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and (
                    not inner.name.startswith("_") or inner.name in {"__init__", "__call__"}
                ):
                    yield _Callable(file, f"{node.name}.{inner.name}", inner, node)


def _documented_methods(files: Mapping[str, ast.Module]) -> dict[tuple[str, str, str], str]:
    """Return the docstring by file, class and method, inherited from the classes of src that a class has as bases."""
    local = {(file, node.name): node for file, tree in files.items() for node in _classes(tree)}
    anywhere = {name: node for (_, name), node in local.items()}

    def inherited(file: str, cls: str, method: str, seen: frozenset[str]) -> str:
        node = local.get((file, cls), anywhere.get(cls))
        if node is None or cls in seen:
            return ""
        own = (ast.get_docstring(inner) for inner in node.body if isinstance(inner, Function) and inner.name == method)
        texts = (inherited(file, _last_name(base), method, seen | {cls}) for base in node.bases)
        return next(filter(None, own), None) or next(filter(None, texts), "")

    return {
        (file, cls, inner.name): inherited(file, cls, inner.name, frozenset())
        for (file, cls), node in local.items()
        for inner in node.body
        if isinstance(inner, Function)
    }


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def _last_name(node: ast.AST) -> str:
    """Return ``b`` of ``a.b``, ``a`` of ``a`` and of ``a[...]``, and "" of anything else."""
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _check_words(found: Survey, file: str, name: str, node: ast.Module | ast.ClassDef | Function) -> None:
    text = ast.get_docstring(node)
    if not text:
        return
    found.looked_at["opening"] += 1
    found.looked_at["none"] += 1
    for kind, pattern in (("opening", _OPENING.match(text)), ("none", _NONE.search(text))):
        if pattern:
            found.shortfalls.append(_shortfall(kind, file, getattr(node, "lineno", 1), name))


def _check_callable(found: Survey, item: _Callable, documented: Mapping[tuple[str, str, str], str]) -> None:
    if item.owner is None:
        text = ast.get_docstring(item.node) or ""
    else:
        text = documented[item.file, item.owner.name, item.node.name]
        if item.node.name in {"__init__", "__call__"}:
            text += ast.get_docstring(item.owner) or ""
    for kind, asked, given in (
        ("missing", not item.node.name.startswith("_"), bool(text)),
        ("shapes", _has_tensors(item.node), _SHAPE.search(text) is not None),
        ("raises", _raises(item.node), "Raises:" in text),
    ):
        if asked:
            found.looked_at[kind] += 1
            if not given:
                found.shortfalls.append(_shortfall(kind, item.file, item.node.lineno, item.name))


def _has_tensors(function: Function) -> bool:
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [function.returns, *(one.annotation for one in parameters if one is not None)]
    names = {_last_name(node) for one in annotations if one is not None for node in ast.walk(one)}
    return bool(names & _TENSORS)


def _raises(function: Function) -> bool:
    """Return whether the function itself raises an error of `graftwerk.errors`, functions inside it left out."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ClassDef | ast.Lambda | Function):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _last_name(node.exc.func) in ERRORS:
            return True
        waiting.extend(ast.iter_child_nodes(node))
    return False


def _error_names() -> frozenset[str]:
    tree = ast.parse((SRC / "errors.py").read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.ClassDef))


ERRORS = _error_names()


def _check_examples(found: Survey, files: Mapping[str, ast.Module]) -> None:
    for name, (module, attribute) in public_api(files["__init__.py"]).items():
        found.looked_at["doctest"] += 1
        file, node = _defined(files, module, attribute)
        if node is None or ">>>" not in (ast.get_docstring(node) or ""):
            found.shortfalls.append(_shortfall("doctest", file, node.lineno if node else 1, name))


def _defined(files: Mapping[str, ast.Module], module: str, name: str) -> tuple[str, ast.ClassDef | Function | None]:
    """Return file and definition of a name, followed through the imports of modules that only pass it on."""
    file = f"{module.removeprefix('graftwerk.').replace('.', '/')}.py"
    for node in files[file].body if file in files else []:
        if isinstance(node, ast.ClassDef | Function) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _defined(files, node.module or "", alias.name)
    return file, None


def public_api(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Return module and attribute of each public name, from the table ``_HOMES`` of the package's `__init__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and _last_name(node.targets[0]) == "_HOMES":
            return dict(ast.literal_eval(node.value))
    raise SystemExit("no table _HOMES in src/graftwerk/__init__.py")


def _shortfall(kind: str, file: str, line: int, name: str) -> Shortfall:
    return Shortfall(kind, file.partition("/")[0].removesuffix(".py"), file, line, name or "module")


def main(arguments: list[str] | None = None) -> None:
    """Print the counts as a table, and exit with 1 if a count of the whole package is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="name every place that falls short, file by file")
    parser.add_argument("--room", help="one room only")
    options = parser.parse_args(arguments)
    found = survey()
    counts = found.counts()
    print(f"{'room':<18}" + "".join(f"{kind:>10}" for kind in KINDS))
    for room, kinds in counts.items():
        if options.room in (None, room):
            print(f"{room:<18}" + "".join(f"{kinds[kind]:>10}" for kind in KINDS))
    totals = Counter(one.kind for one in found.shortfalls)
    print(f"{'all, of':<18}" + "".join(f"{totals[kind]:>4}/{found.looked_at[kind]:<5}" for kind in KINDS))
    if options.list:
        for one in sorted(found.shortfalls, key=lambda one: (one.file, one.line)):
            if options.room in (None, one.room):
                print(f"src/graftwerk/{one.file}:{one.line}: {one.kind}: {one.name}")
    if found.shortfalls:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
