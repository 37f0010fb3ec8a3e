"""The space of a search: a method's own (`methods.search_spaces`), narrowed or widened by the user."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

from graftwerk.config import RunConfig
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.experiments.axes import flow, several
from graftwerk.experiments.search.settings import SearchSettings
from graftwerk.methods.search_spaces import SEARCH_SPACES
from graftwerk.settings_parsing import known_keys, spellings
from graftwerk.training.settings import TrainingSettings
from graftwerk.yaml_files import parse_override_value

PATHS = frozenset({"warm_start", "trunk_cache_dir", "init_text"})
"""Settings whose text may hold anything."""
NOT_SEARCHED = PATHS | {"seed", "report_to", "class_weights"}
"""Settings that are no axes: trials share one seed, and the others change no score or take values of many kinds."""
LOG_FACTOR = 10
"""A range that spans this factor is searched on a logarithmic scale."""
GRID_POINTS = 4
"""Values of a range in a grid."""
DIGITS = 3
"""Significant digits of a value from a range, so that run files stay readable."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Axis:
    """One setting that is searched: a range, or choices.

    Attributes:
        key: Dotted key of the run file: ``training.learning_rate``, ``method.r``.
        low: Lower end of the range.
        high: Upper end.
        log: True if the range is searched on a logarithmic scale.
        integer: True if its values are whole numbers.
        choices: The choices, or () for a range.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Return the key without its section."""
        return self.key.partition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Return the axis as JSON values."""
        if self.choices:
            return {"key": self.key, "choices": list(self.choices)}
        return {"key": self.key, "low": self.low, "high": self.high, "log": self.log, "integer": self.integer}

    def rounded(self, value: float) -> float | int:
        """Return a value of the range as it goes into a run file."""
        return int(value) if self.integer else float(f"{value:.{DIGITS}g}")

    def points(self) -> tuple[Any, ...]:
        """Return the values of a grid: the choices, or values spread evenly over the range."""
        if self.choices:
            return self.choices
        parts = [place / (GRID_POINTS - 1) for place in range(GRID_POINTS)]
        if self.log:
            values = [self.low * (self.high / self.low) ** part for part in parts]
        else:
            values = [self.low + (self.high - self.low) * part for part in parts]
        return tuple(dict.fromkeys(self.rounded(round(value) if self.integer else value) for value in values))

    def holds(self, value: Any) -> bool:
        """Return True if a value is on the axis."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(value_text(choice) for choice in self.choices)
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"


def value_text(value: Any) -> str:
    """Return a value as a run file has it.

    Example:
        >>> value_text(["q_proj", "v_proj"]), value_text(None), value_text(0.001)
        ('[q_proj, v_proj]', 'null', '0.001')
    """
    if isinstance(value, float):
        return f"{value:g}"
    return flow(value)


def read_space(base: RunConfig, given: Mapping[str, Any]) -> tuple[list[Axis], dict[str, Any], list[str]]:
    """Return the space of a search.

    Args:
        base: The run file, with its method.
        given: Settings by key: ``"1e-4..1e-2"`` and ``"4,8,16"`` (or a list) are axes, a single value fixes a setting.

    Returns:
        The axes; the other settings by dotted key, as `RunConfig.build` takes them; notes on axes that were left out.

    Raises:
        ConfigError: A setting is unknown or has a wrong value, or nothing is left to search.
    """
    own, fixed = dict[str, Any](), dict[str, Any]()
    for key, value in given.items():
        full = _full_key(base, key)
        values = None if full is None and _elsewhere(key) else _values(base, full or key, value)
        if full is None and "." not in key and not _elsewhere(key):
            raise _unknown(base, key)
        if values is None:
            fixed[full or key] = value
        elif full is None:
            raise _unknown(base, key)
        elif full in own:
            raise ConfigError(f"`{full}` is given twice", where=key, hint="give it once")
        else:
            own[full] = values
    settled = RunConfig.build(base.model_dump(mode="json"), fixed) if fixed else base
    axes, notes = [], list[str]()
    for name, text in SEARCH_SPACES[base.method.name].items():
        key = str(_full_key(base, name))
        if key in own or key in fixed:
            continue
        if key == "training.num_train_epochs" and settled.training.max_steps is not None:
            notes.append("training.num_train_epochs is not searched: training.max_steps settles the length")
            continue
        try:
            axes.append(_axis(settled, key, _values(base, key, text)))
        except ConfigError as error:  # at odds with another setting of the run file
            notes.append(f"{key} is not searched: {error.what}")
    axes = [
        axis if axis.holds(now := value_of(settled, axis.key)) or now == "auto" else _with(axis, now) for axis in axes
    ]
    axes += [_axis(settled, key, values) for key, values in own.items()]
    if not axes:
        raise ConfigError("nothing is left to search", hint="for instance learning_rate=1e-4..1e-2")
    if settled.training.max_steps is not None and "training.num_train_epochs" in own:
        raise ConfigError(
            "training.max_steps settles the length, so that searching num_train_epochs would change nothing",
            where="num_train_epochs",
            hint="leave one of them out",
        )
    order = [str(_full_key(base, name)) for name in SEARCH_SPACES[base.method.name]]
    return sorted(axes, key=lambda axis: order.index(axis.key) if axis.key in order else len(order)), fixed, notes


def default_settings(base: RunConfig, axes: Sequence[Axis]) -> dict[str, Any]:
    """Return the values of the run file for all axes, the method's rate in place of `auto`."""
    from graftwerk.methods.learning_rates import default_learning_rates

    of_method, of_head = default_learning_rates(base.method, base.task.name)
    rates = {"learning_rate": of_method, "head_learning_rate": of_head or of_method}
    found = {axis.key: value_of(base, axis.key) for axis in axes}
    return {key: rates.get(key.partition(".")[2]) if value == "auto" else value for key, value in found.items()}


def grid(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return all combinations of the axes' points."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in product(*(axis.points() for axis in axes))]


def held_fixed(base: RunConfig, axes: Sequence[Axis]) -> dict[str, Any]:
    """Return the settings of the method's own space that are no axes, with the values that all trials have."""
    keys = [str(_full_key(base, name)) for name in SEARCH_SPACES[base.method.name]]
    searched = {axis.key for axis in axes}
    return {key: value_of(base, key) for key in keys if key not in searched}


def value_of(config: RunConfig, key: str) -> Any:
    """Return a setting of a run as a JSON value."""
    part, _, name = key.partition(".")
    return getattr(config, part).model_dump(mode="json")[name]


def _with(axis: Axis, value: Any) -> Axis:
    """Return a default axis with the run file's own value among its choices; a range stays as it is."""
    return Axis(axis.key, choices=(value, *axis.choices)) if axis.choices else axis


def _full_key(base: RunConfig, key: str) -> str | None:
    """Return ``training.<field>`` or ``method.<field>``, or None if neither has such a setting."""
    section, dot, name = key.partition(".")
    for part, model in (("training", TrainingSettings), ("method", type(base.method))):
        if dot and section != part:
            continue
        field = next(iter(spellings(model, name if dot else key) & {*model.model_fields}), None)
        if field is not None:
            return f"{part}.{field}"
    return None


def _elsewhere(key: str) -> bool:
    """Return True for a setting of another part of the run file, where a comma or dots mean nothing to a search."""
    section = key.partition(".")[0]
    parts = {*RunConfig.model_fields} - {"training", "method"} | known_keys(DataSettings)
    return section in parts


def _values(base: RunConfig, key: str, value: Any) -> Any:
    """Return a range ``(low, high)`` or a list of values, or None for a single value."""
    tail = key.rpartition(".")[2]
    if isinstance(value, str) and tail not in PATHS:
        if match := _RANGE.fullmatch(value):
            return tuple(parse_override_value(end, key) for end in match.groups())
        if ".." in value:
            raise ConfigError(f"`{value}` is no range", where=key, hint="a range is two numbers: 1e-4..1e-2")
    return None if isinstance(value, str) and tail in PATHS else several(value, key, takes_list=_takes_list(base, key))


def _takes_list(base: RunConfig, key: str) -> bool:
    """Return True if a list is one value of this setting, or if it is not a setting that is searched."""
    full = _full_key(base, key)
    if full is None:
        return True
    part, _, name = full.partition(".")
    annotation = getattr(base, part).__class__.model_fields[name].annotation
    return "tuple" in str(annotation) or tuple in get_args(annotation)


def _axis(base: RunConfig, key: str, values: Any) -> Axis:
    """Return the axis of some values, each checked as a setting of the run.

    Raises:
        ConfigError: A value is wrong or there twice, or the range is empty.
    """
    name = key.partition(".")[2]
    if name in NOT_SEARCHED:
        raise ConfigError(f"`{key}` is not searched", where=key, hint="give it one value")
    tree = base.model_dump(mode="json")
    try:
        checked = [value_of(RunConfig.build(tree, {key: value}), key) for value in values]
    except ConfigError as error:
        raise ConfigError(error.what, where=key) from None
    if isinstance(values, tuple):
        low, high = checked
        if low >= high:
            raise ConfigError(f"the range {low:g}..{high:g} is empty", where=key, hint="the lower end comes first")
        whole = isinstance(low, int) and isinstance(high, int)
        return Axis(key, low, high, log=low > 0 and high / low >= LOG_FACTOR, integer=whole)
    if any(checked.count(value) > 1 for value in checked):
        raise ConfigError(f"`{key}` has a value twice", where=key, hint="give each value once")
    if len(checked) < 2:
        raise ConfigError(f"`{key}` has one value to try", where=key, hint=f"{name}={value_text(checked[0])} fixes it")
    if any(isinstance(value, float) and not math.isfinite(value) for value in checked):
        raise ConfigError(f"`{key}` has a value that is no number", where=key)
    return Axis(key, choices=tuple(checked))


def _unknown(base: RunConfig, key: str) -> ConfigError:
    searched = [*SEARCH_SPACES[base.method.name]]
    own = [*SearchSettings.model_fields]
    known = sorted(known_keys(TrainingSettings) | known_keys(type(base.method)))
    near = did_you_mean(
        key.rpartition(".")[2], [*searched, *own, *known], f"searched by default: {', '.join(searched)}"
    )
    return ConfigError(f"{base.method.name} has no setting `{key}` that could be searched", where=key, hint=near)
