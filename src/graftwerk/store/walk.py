"""The modules of a model without the grafts on it; the walk costs the same however many adapters there are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from graftwerk.inject.record import CHILD


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the base by path, the model itself as ``""``, in the order of `named_modules`."""
    return dict(_walk(model, ""))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of the base by name; of tied ones the first name."""
    found: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for path, module in _walk(model, ""):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                found[f"{path}.{name}" if path else name] = parameter
    return found


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != CHILD:
            yield from _walk(child, f"{path}.{name}" if path else name)
