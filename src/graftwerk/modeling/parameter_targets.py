"""Bare parameters as targets: which a model has, and which modules carry the adapters on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import AdapterModule, Role, TargetModule
from graftwerk.methods.base_weights import is_coded, weight_type
from graftwerk.methods.lora_parameters import ParameterAdapters, ParameterLoRA, is_stored_transposed
from graftwerk.modeling.adapted_module import AdaptedParameters
from graftwerk.modeling.adapter_slots import slots_of
from graftwerk.modeling.layer_checks import is_weight_only


def parameter_targets(
    distinct: Iterable[tuple[str, nn.Module]],
    modules: Mapping[str, nn.Module],
    layer_of: Callable[[str], int | None],
    stack_of: Callable[[str], str | None],
) -> Iterator[TargetModule]:
    """Yield every parameter of a model but those of the model itself, which PEFT does not reach either.

    Args:
        distinct: Path and module, shared ones once.
        modules: All modules by path.
        layer_of: Gives the number of the layer that a path is in.
        stack_of: Gives the stack that a path is in.
    """
    for path, module in distinct:
        if not path:
            continue
        parent, _, child = path.rpartition(".")
        silent = is_weight_only(modules[parent], child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            where = f"{path}.{name}"
            reason = _unfit(module, parameter, silent)
            experts, in_features, out_features = 1, 0, 0
            if reason is None:
                experts, out_features, in_features = (1, *parameter.shape)[-3:]
                if is_stored_transposed(module, experts) and parameter.dim() == 3:
                    in_features, out_features = out_features, in_features
            yield TargetModule(
                where, Role.PARAMETER, in_features, out_features, False, None, layer_of(where), stack_of(where),
                unfit=reason, experts=experts,
            )  # fmt: skip


def _unfit(module: nn.Module, parameter: nn.Parameter, silent: bool) -> str | None:
    """Return the reason why no adapter works on a parameter of any shape, or None if one does."""
    if is_coded(parameter):
        return f"it holds {weight_type(parameter)}, which is quantized"
    if parameter.dim() not in (2, 3):
        return f"it has {parameter.dim()} dimension{'s' if parameter.dim() != 1 else ''}, not two or three"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} reads its weights from a list of its own"
    if silent:
        return "its module is never called"
    if parameter.dim() == 3 and parameter.shape[0] == 1 and getattr(module, "is_transposed", False):
        return "it holds a single transposed expert"
    return None


def by_host(targets: Sequence[TargetModule], built: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Return built adapter modules by the path of the module that carries them, those of parameters joined.

    Raises:
        UnsupportedError: A module and a parameter of it are targets.
    """
    hosts: dict[str, AdapterModule] = {}
    updates: dict[str, dict[str, ParameterLoRA]] = {}
    for target in targets:
        module = built[target.path]
        if isinstance(module, ParameterLoRA):
            updates.setdefault(target.host, {})[target.path.rpartition(".")[2]] = module
        else:
            hosts[target.path] = module
    for path, found in updates.items():
        if path in hosts:
            raise _two_ways(path)
        hosts[path] = ParameterAdapters(found)
        hosts[path].train(next(iter(found.values())).training)
    return hosts


def refuse_two_ways(
    base: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module], heads: Sequence[str], silent: Collection[str]
) -> None:
    """Check that no module has its parameters adapted by one adapter and its outputs, or all of it, by another.

    Args:
        base: Modules of the base by path.
        hosts: Adapter modules of the new adapter by the path of their host.
        heads: Paths of modules that the new adapter saves whole.
        silent: Paths of layers whose weight is read without a call, so that all adapters change what is read.

    Raises:
        UnsupportedError: There is one.
    """
    for path, module in (*hosts.items(), *((path, None) for path in heads)):
        # By the class of the module: a look at each adapter on it would make loading slower with every adapter.
        if isinstance(base[path], AdaptedParameters) == isinstance(module, ParameterAdapters):
            continue
        if slots_of(base[path]) is not None and path not in silent:
            raise _two_ways(path)


def _two_ways(path: str) -> UnsupportedError:
    return UnsupportedError(
        f"`{path}` would be adapted in two ways: its parameters by themselves, and the module",
        where="method.target_parameters",
        hint="adapt it in one way with all adapters, or delete the other adapter first",
    )
