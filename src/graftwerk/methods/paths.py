"""Layers by the ends of their paths: `q_proj` and `layers.0.q_proj` both name `model.layers.0.q_proj`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from graftwerk.errors import ConfigError, UnsupportedError, did_you_mean
from graftwerk.methods.base import Place, Role


def endings(path: str) -> Iterator[str]:
    """Everything that names this module: its whole path, and what is left of it after each dot."""
    yield path
    while path:
        path = path.partition(".")[2]
        if path:
            yield path


def named_by(places: Iterable[Place]) -> frozenset[str]:
    """Everything that names at least one of the places."""
    return frozenset(ending for place in places for ending in endings(place.path))


def linear_places(places: Iterable[Place]) -> list[Place]:
    """Return the linear layers among the places that an adapter works in like in any other."""
    return [place for place in places if _is_linear(place) and place.unfit is None and not place.weight_only]


def _is_linear(place: Place) -> bool:
    return place.role not in (Role.NORM, Role.LOOSE_BIAS, Role.HEAD)


def select(available: Sequence[Place], targets: Sequence[str]) -> list[Place]:
    """Return the linear layers that the targets name.

    A target names layers outside the base model (`lm_head`) only where it names none inside.

    Raises:
        ConfigError: a target matches nothing; the nearest names are given.
        UnsupportedError: a target names only layers that no adapter works in; the reason is given.
    """
    places = [place for place in available if _is_linear(place) and place.unfit is None]
    heads = [place for place in available if place.role is Role.HEAD and place.unfit is None]
    known, wanted = named_by(places), frozenset(targets)
    outside, known_outside = wanted - known, named_by(heads)
    for target in targets:
        if target not in known and target not in known_outside:
            for place in available:
                if place.unfit is not None and target in endings(place.path):
                    raise UnsupportedError(
                        f"target_modules: no adapter works in `{place.path}`: {place.unfit}",
                        where="method.target_modules",
                        mend=f"leave `{target}` out",
                    )
            names = sorted({place.path.rpartition(".")[2] for place in places})
            hint = did_you_mean(target, names)
            raise ConfigError(
                f"target_modules: `{target}` matches no layer of this model",
                where="method.target_modules",
                mend=f"{hint}The layers end in: {', '.join(names[:30])}",
            )
    chosen = [place for place in places if not wanted.isdisjoint(endings(place.path))]
    return chosen + [place for place in heads if not outside.isdisjoint(endings(place.path))]


def check_targets(chosen: Sequence[Place], targets: Sequence[str]) -> None:
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
                mend="choose layers that have it, or leave it out of target_modules",
            )


def value_of(pattern: Mapping[str, float], path: str, default: float) -> float:
    """The value of the longest key that names this module."""
    if pattern:
        for ending in endings(path):  # the longest first
            if ending in pattern:
                return pattern[ending]
    return default
