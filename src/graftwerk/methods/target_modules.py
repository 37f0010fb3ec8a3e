"""Layers by the ends of their paths: `q_proj` and `layers.0.q_proj` both name `model.layers.0.q_proj`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from graftwerk.errors import ConfigError, UnsupportedError, did_you_mean
from graftwerk.methods.base import ATTENTION_ROLES, Role, TargetModule


def endings(path: str) -> Iterator[str]:
    """Everything that names this module: its whole path, and what is left of it after each dot."""
    yield path
    while path:
        path = path.partition(".")[2]
        if path:
            yield path


def named_by(places: Iterable[TargetModule]) -> frozenset[str]:
    """Everything that names at least one of the places."""
    return frozenset(ending for place in places for ending in endings(place.path))


def linear_places(places: Iterable[TargetModule]) -> list[TargetModule]:
    """Return the linear layers among the places that an adapter works in like in any other."""
    return [place for place in places if _is_linear(place) and place.unfit is None and not place.weight_only]


def _is_linear(place: TargetModule) -> bool:
    return place.role not in (Role.NORM, Role.LOOSE_BIAS)


def select(available: Sequence[TargetModule], targets: Sequence[str]) -> list[TargetModule]:
    """Return the linear layers that the targets name.

    Raises:
        ConfigError: a target matches nothing; the nearest names are given.
        UnsupportedError: a target names only layers that no adapter works in; the reason is given.
    """
    places = [place for place in available if _is_linear(place) and place.unfit is None]
    known, wanted = named_by(places), frozenset(targets)
    for target in targets:
        if target not in known:
            for place in available:
                if _is_linear(place) and place.unfit is not None and target in endings(place.path):
                    raise UnsupportedError(
                        f"target_modules: no adapter works in `{place.path}`: {place.unfit}",
                        where="method.target_modules",
                        hint=f"leave `{target}` out",
                    )
            names = sorted({place.path.rpartition(".")[2] for place in places})
            hint = did_you_mean(target, names)
            raise ConfigError(
                f"target_modules: `{target}` matches no layer of this model",
                where="method.target_modules",
                hint=f"{hint}The layers end in: {', '.join(names[:30])}",
            )
    return [place for place in places if not wanted.isdisjoint(endings(place.path))]


def linear_targets(
    available: Sequence[TargetModule], wanted: Sequence[str] | Literal["attention", "all-linear"]
) -> list[TargetModule]:
    """Return the linear layers that ``target_modules`` names.

    Raises:
        UnsupportedError: ``attention`` on a model whose attention is not known.
        ConfigError: a name matches nothing.
    """
    linear = linear_places(available)
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
    """Raise ConfigError for a key of a pattern (``rank_pattern=...``) that names none of the chosen modules."""
    known = named_by(chosen) if any(patterns.values()) else frozenset()
    for field, pattern in patterns.items():
        for key in pattern:
            if key not in known:
                raise ConfigError(f"`{key}` matches none of the adapted layers", where=f"method.{field}")


def check_inputs(chosen: Sequence[TargetModule], setting: str) -> None:
    """Raise ConfigError for a layer whose weight is read and which is never called: it has no input to drop from."""
    for target in chosen:
        if target.weight_only:
            raise ConfigError(
                f"there is no input to drop from in {target.path}: its weight is read, and it is never called",
                where=f"method.{setting}",
                hint=f"set {setting} to 0, or leave this layer out of target_modules",
            )


def check_targets(chosen: Sequence[TargetModule], targets: Sequence[str]) -> None:
    """Refuse a target that names layers of the model, but none of those that were chosen by `layers`.

    Raises:
        ConfigError: naming it.
    """
    known = named_by(chosen)
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"target_modules: `{target}` is in none of the chosen layers",
                where="method.layers",
                hint="choose layers that have it, or leave it out of target_modules",
            )


def value_of(pattern: Mapping[str, float], path: str, default: float) -> float:
    """The value of the longest key that names this module."""
    if pattern:
        for ending in endings(path):  # the longest first
            if ending in pattern:
                return pattern[ending]
    return default
