"""The parameters of one adapter, walked once: switching asks for them each time.

A walk through 210 adapted layers takes a millisecond. It stays valid as long as the base's modules are the same objects
at the same paths, and the modules and parameters of the adapter as well, which is checked in a tenth of that time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any
from weakref import ref

from torch import nn

from graftwerk.modeling.adapter_slots import CHILD
from graftwerk.modeling.module_index import ModuleIndex, Registers


class AdapterWalk:
    """All parameters of an adapter, and every object that was met on the way to them.

    Args:
        index: The base's modules now.
        name: The adapter.
        modules: Path of each host and the adapter's module there, in the order of its parameters.

    Attributes:
        parameters: Raw key (``<module path>.<parameter>``) and parameter, any shape; those that do not train as well.
    """

    def __init__(self, index: ModuleIndex, name: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
        found = list(modules)
        self.parameters = tuple(walk(found))
        hosts = [index.modules[path]._modules for path, _ in found]
        slots = [children[CHILD] for children in hosts]
        self._index, self._name, self._hosts = ref(index), name, hosts
        self._slots = [one._modules for one in slots if one is not None]
        self._objects = self._now()
        self._registers = Registers(part for _, module in found for part in module.modules())

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of an adapter walks for itself

    def holds(self, index: ModuleIndex) -> bool:
        """Return True if a walk would meet the same objects."""
        return index is self._index() and self._now() == self._objects and self._registers.hold()

    def _now(self) -> list[Any]:
        """Return the slots of each host, and the adapter's module in each."""
        return [*map(dict.get, self._hosts, repeat(CHILD)), *map(dict.get, self._slots, repeat(self._name))]


def walk(modules: Iterable[tuple[str, nn.Module]]) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield raw key and parameter, any shape, of modules by their hosts' paths."""
    for path, module in modules:
        for key, parameter in module.named_parameters():
            yield join(path, key), parameter


def join(path: str, key: str) -> str:
    """Return the raw key of a tensor in the adapter's module at a path, which is empty for the model itself."""
    return f"{path}.{key}" if path else key
