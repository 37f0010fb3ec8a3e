"""The modules of a model without the adapters on it, walked once.

Attaching, loading and saving ask again and again for the modules and parameters of a base. The answer is cached at the
model and valid as long as every module has the child and parameter objects that it had then, which is checked in a
tenth of the time that a walk takes, however many adapters there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, TypeVar

from torch import nn

from graftwerk.errors import ConflictError
from graftwerk.modeling.adapter_slots import CHILD, AdapterSlots

_ATTRIBUTE = "_graftwerk_structure"
_WRAPPED = "_fsdp_wrapped_module"
Made = TypeVar("Made")


class Registers:
    """The children and parameters that some modules have now, adapters' slots left out, to ask later if they still do.

    Args:
        modules: The modules, some perhaps twice.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        distinct = {id(module): module for module in modules}.values()
        self._children = [module._modules for module in distinct]
        self._seen = list(map(dict, self._children))
        self._own = self._without_slots()
        self._parameters: list[Any] = [module._parameters for module in distinct]
        entries = [(own, name) for own in self._parameters for name in own]
        self._owners, self._names = [own for own, _ in entries], [name for _, name in entries]
        self._objects = [own[name] for own, name in entries]

    def hold(self) -> bool:
        """Return True if all children and parameters are still the same objects under the same names."""
        if self._children != self._seen:  # modules are equal if they are the same; tensors compare their values
            if self._without_slots() != self._own:
                return False
            self._seen = list(map(dict, self._children))
        number = sum(map(len, self._parameters))
        return number == len(self._objects) and all(map(is_, map(dict.get, self._owners, self._names), self._objects))

    def _without_slots(self) -> list[dict[str, Any]]:
        return [
            {name: child for name, child in own.items() if type(child) is not AdapterSlots} for own in self._children
        ]


class ModuleIndex:
    """The modules and parameters of a base.

    Attributes:
        modules: All modules by path, the model itself as ``""``, in the order of `named_modules`; shared ones under
            each of their paths.
        parameters: All parameters by name; of tied ones the first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(_walk(model, ""))
        self.parameters: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for path, module in self.modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.parameters[f"{path}.{name}" if path else name] = parameter
        self._registers = Registers(self.modules.values())
        self.trusted = False
        self._made: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[ModuleIndex], tuple[nn.Module]]:
        return ModuleIndex, (nn.Module(),)  # a copy of a model has other objects: it walks for itself

    def holds(self) -> bool:
        """Return True if all modules and parameters are still the same objects at the same paths."""
        return self._registers.hold()

    def cached(self, key: str, make: Callable[[], Made]) -> Made:
        """Return a value that follows from the structure alone, made once."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


def module_index(model: nn.Module) -> ModuleIndex:
    """Return the index of a model as it is now."""
    found = model.__dict__.get(_ATTRIBUTE)
    if found is None or found.modules.get("") is not model or not (found.trusted or found.holds()):
        found = ModuleIndex(model)
        model.__dict__[_ATTRIBUTE] = found
    return found


@contextmanager
def frozen_index(model: nn.Module) -> Iterator[None]:
    """Trust the index inside the block, in which nobody exchanges modules of the base."""
    found = module_index(model)
    found.trusted, before = True, found.trusted
    try:
        yield
    finally:
        found.trusted = before


def forget(model: nn.Module) -> None:
    """Remove the index from the model."""
    model.__dict__.pop(_ATTRIBUTE, None)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of the base by path."""
    return module_index(model).modules


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters of the base, any shape, by name; of tied ones the first name."""
    return module_index(model).parameters


def check_parameters(model: nn.Module, parameters: Iterable[nn.Parameter], wish: str) -> None:
    """Check that these are still parameters of the model.

    Args:
        model: The model.
        parameters: Any shape.
        wish: The action that needs them; completes "cannot ...".

    Raises:
        ConflictError: one is not.
    """
    now = {id(parameter) for parameter in base_parameters(model).values()}
    if any(id(parameter) not in now for parameter in parameters):
        raise ConflictError(
            f"cannot {wish}: the model's parameters have been replaced since, as offloading does",
            hint="load the base again",
        )


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != CHILD:
            # What FSDP wraps in place keeps its path, and comes after its wrapper: the index holds what is wrapped.
            inner = path if name == _WRAPPED else f"{path}.{name}" if path else name
            yield from _walk(child, inner)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put every module of a model back into the mode, training or not, that it was in before the block."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
