"""Match modules by the ends of their paths: `q_proj` and `layers.0.q_proj` both name `model.layers.0.q_proj`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from graftwerk.errors import ConfigError, UnsupportedError, did_you_mean
from graftwerk.methods.base import ATTENTION_ROLES, Role, TargetModule


def endings(path: str) -> Iterator[str]:
    """Yield every name of a module: its whole path, and the rest of it after each dot, longest first.

    Example:
        >>> list(endings("layers.0.q_proj"))
        ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    yield path
    while path:
        path = path.partition(".")[2]
        if path:
            yield path


def named_by(modules: Iterable[TargetModule]) -> frozenset[str]:
    """Return every name of at least one of the targets."""
    return frozenset(ending for module in modules for ending in endings(module.path))


def linear_layers(modules: Iterable[TargetModule]) -> list[TargetModule]:
    """Return the linear layers that an adapter can work in as in any other."""
    return [module for module in modules if _is_linear(module) and module.unfit is None and not module.weight_only]


def _is_linear(module: TargetModule) -> bool:
    return module.role not in (Role.NORM, Role.LOOSE_BIAS, Role.HEAD, Role.PARAMETER)


def select(available: Sequence[TargetModule], targets: Sequence[str]) -> list[TargetModule]:
    """Return the linear layers that the targets name.

    A target names layers outside the base model (`lm_head`) only if it names none inside.

    Raises:
        ConfigError: a target matches nothing; the nearest names are suggested.
        UnsupportedError: a target names only layers that no adapter works in; the reason is given.
    """
    modules = [module for module in available if _is_linear(module) and module.unfit is None]
    heads = [module for module in available if module.role is Role.HEAD and module.unfit is None]
    known, wanted = named_by(modules), frozenset(targets)
    outside, known_outside = wanted - known, named_by(heads)
    for target in targets:
        if target not in known and target not in known_outside:
            for module in available:
                if module.unfit is not None and target in endings(module.path):
                    raise UnsupportedError(
                        f"target_modules: no adapter works in `{module.path}`: {module.unfit}",
                        where="method.target_modules",
                        hint=f"leave `{target}` out",
                    )
            names = sorted({module.path.rpartition(".")[2] for module in modules})
            raise ConfigError(
                f"target_modules: `{target}` matches no layer of this model",
                where="method.target_modules",
                hint=did_you_mean(target, names, f"The layers end in: {', '.join(names[:30])}"),
            )
    chosen = [module for module in modules if not wanted.isdisjoint(endings(module.path))]
    return chosen + [module for module in heads if not outside.isdisjoint(endings(module.path))]


def linear_targets(
    available: Sequence[TargetModule], wanted: Sequence[str] | Literal["attention", "all-linear"]
) -> list[TargetModule]:
    """Return the linear layers that ``target_modules`` names.

    Args:
        available: A model's modules.
        wanted: ``attention``, ``all-linear``, or names.

    Raises:
        UnsupportedError: ``attention`` on a model whose attention is not known, or no linear layer at all.
        ConfigError: a name matches nothing.
    """
    linear = linear_layers(available)
    if not isinstance(wanted, str):
        return select(available, wanted)
    if wanted == "all-linear":
        if not linear:
            raise UnsupportedError(
                "this model has no linear layers outside its head",
                where="method.target_modules",
                hint="use probe, which trains the head alone, or full",
            )
        return linear
    chosen = [target for target in linear if target.role in ATTENTION_ROLES]
    if not chosen:
        raise UnsupportedError(
            "which layers of this model are its attention is not known",
            where="method.target_modules",
            hint="use all-linear, or list the layers by name",
        )
    return chosen


def check_patterns(chosen: Sequence[TargetModule], **patterns: Mapping[str, float]) -> None:
    """Check that each key of a pattern names one of the chosen modules.

    Args:
        chosen: The adapted modules.
        **patterns: Settings by name (``rank_pattern=...``).

    Raises:
        ConfigError: a key matches none of them.
    """
    known = named_by(chosen) if any(patterns.values()) else frozenset()
    for field, pattern in patterns.items():
        for key in pattern:
            if key not in known:
                raise ConfigError(f"`{key}` matches none of the adapted layers", where=f"method.{field}")


def check_inputs(chosen: Sequence[TargetModule], setting: str) -> None:
    """Check that each layer has an input to drop entries from.

    Raises:
        ConfigError: a layer's weight is read and the layer is never called.
    """
    for target in chosen:
        if target.weight_only:
            raise ConfigError(
                f"there is no input to drop from in {target.path}: its weight is read, and it is never called",
                where=f"method.{setting}",
                hint=f"set {setting} to 0, or leave this layer out of target_modules",
            )


def check_targets(chosen: Sequence[TargetModule], targets: Sequence[str], setting: str = "target_modules") -> None:
    """Check that each target is in one of the layers that were chosen by `layers`.

    Raises:
        ConfigError: a target names layers of the model, but none of the chosen ones.
    """
    known = named_by(chosen)
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"{setting}: `{target}` is in none of the chosen layers",
                where="method.layers",
                hint=f"choose layers that have it, or leave it out of {setting}",
            )


def value_of(pattern: Mapping[str, float], path: str, default: float) -> float:
    """Return the value of the longest key that names this module, or the default."""
    if pattern:
        for ending in endings(path):  # the longest first
            if ending in pattern:
                return pattern[ending]
    return default
