"""Axes of an ablation: settings of one method or of the training, each with several values, and the cells they make.

`method.r=4,8,16 method.target_modules=attention,all-linear` makes six cells in a full grid; one at a time, it makes
one cell with the run file's own values and one for each other value. The effect of an axis is the difference between
the means over all cells with one value and with another, on the same rows and with the same other values.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, did_you_mean
from graftwerk.experiments.axes import several, text_of, written
from graftwerk.experiments.method_specs import NO_AXES, MethodSpec, slug
from graftwerk.settings import Settings
from graftwerk.settings_parsing import spellings
from graftwerk.training.settings import TrainingSettings

Design = Literal["grid", "one-at-a-time"]
DESIGNS = get_args(Design)
MOST = 200
"""Cells of an ablation."""
EXAMPLE = "for instance method.r=4,8,16"


@dataclass(frozen=True)
class Cell:
    """One combination of values.

    Attributes:
        spec: What is trained.
        values: Value by axis.
    """

    spec: MethodSpec
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """Axes and cells of an ablation.

    Attributes:
        axes: Values by key of the run file, each key complete: ``method.r``.
        design: All combinations, or one change at a time.
        cells: The cells, in order.
    """

    axes: Mapping[str, tuple[Any, ...]]
    design: Design
    cells: tuple[Cell, ...]

    @property
    def specs(self) -> list[MethodSpec]:
        """Return the specs of the cells, in order."""
        return [cell.spec for cell in self.cells]

    def groups(self, measured: Container[str]) -> dict[str, dict[str, list[str]]]:
        """Return the names of the cells that have each value of each axis, so that nothing else differs between them.

        A combination of the other axes counts only if it was measured with every value of this one.

        Args:
            measured: Names of the cells that have a result.
        """
        found: dict[str, dict[str, list[str]]] = {}
        for axis, values in self.axes.items():
            blocks: dict[str, dict[str, str]] = {}
            for cell in self.cells:
                others = repr([(key, value) for key, value in cell.values.items() if key != axis])
                if cell.spec.name in measured:
                    blocks.setdefault(others, {})[text_of(cell.values[axis])] = cell.spec.name
            levels = [text_of(value) for value in values]
            whole = [block for block in blocks.values() if all(level in block for level in levels)]
            found[axis] = {level: [block[level] for block in whole] for level in levels}
        return found

    def words(self) -> list[str]:
        """Return the axes and the design as arguments of the command."""
        said = [f"{axis}={written(values)}" for axis, values in self.axes.items()]
        return said if self.design == "grid" else [*said, f"design={self.design}"]

    def planned(self, seeds: Sequence[int]) -> str:
        """Return how many runs there will be, and of what."""
        parts = [f"{len(values)} values of {axis}" for axis, values in self.axes.items()]
        how = "all combinations" if self.design == "grid" else "one change at a time"
        runs = len(self.cells) * len(seeds)
        said = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} (seeds={','.join(map(str, seeds))})"
        return f"{', '.join(parts)}, {how}: {len(self.cells)} cells, {said}: {runs:,} run{'s' if runs > 1 else ''}"


def read_ablation(base: RunConfig, axes: Mapping[str, Any], design: str = "grid") -> Ablation:
    """Read the axes of an ablation and make its cells.

    Args:
        base: Settings that all cells share; with one change at a time, its values are those of the first cell.
        axes: Values by key: ``{"method.r": "4,8,16"}``, or a sequence of values.
        design: ``grid`` or ``one-at-a-time``.

    Raises:
        ConfigError: There is no axis, an unknown one, a wrong value, one twice, or a combination that is refused.
    """
    if design not in DESIGNS:
        raise ConfigError(f"there is no design `{design}`", where="design", hint=f"there are: {', '.join(DESIGNS)}")
    if not axes:
        raise ConfigError("no setting has several values to compare", hint=EXAMPLE)
    read: dict[str, tuple[Any, ...]] = {}
    for key, given in axes.items():
        axis = axis_of(base, key)
        if axis in read:
            raise ConfigError(f"`{axis}` is given twice", where=key, hint="give one of them")
        read[axis] = _values(base, axis, key, given)
    own = {axis: _value(base, axis) for axis in read}
    if design == "grid":
        combined = [dict(zip(read, values, strict=True)) for values in product(*read.values())]
    else:
        read = {axis: (own[axis], *(it for it in values if it != own[axis])) for axis, values in read.items()}
        combined = [own, *({**own, axis: it} for axis, values in read.items() for it in values[1:])]
    if len(combined) > MOST:
        raise ConfigError(f"{len(combined):,} cells are too many", hint=f"at most {MOST}; or design=one-at-a-time")
    return Ablation(read, design, tuple(_cell(base, values, at) for at, values in enumerate(combined)))  # type: ignore[arg-type]


def axis_of(base: RunConfig, key: str) -> str:
    """Return the complete key of an axis: ``method.r`` for ``method.rank``, ``training.learning_rate`` for ``lr``.

    Raises:
        ConfigError: It is no setting of the method or of the training that can be an axis.
    """
    part, _, name = key.rpartition(".")
    models: dict[str, type[Settings]] = {"method": type(base.method), "training": TrainingSettings}
    for section, model in models.items():
        field = next(iter(spellings(model, name) & {*model.model_fields}), "")
        if part in (section, "") and field and field not in NO_AXES:
            return f"{section}.{field}"
    if name in NO_AXES and part in ("training", ""):
        hint = "seeds=0,1,2" if name == "seed" else EXAMPLE
        raise ConfigError(f"`{key}` is no axis of an ablation", where=key, hint=hint)
    known = [f"{section}.{field}" for section, model in models.items() for field in model.model_fields]
    near = did_you_mean(key if part else f"method.{key}", known)
    own = ", ".join(field for field in type(base.method).model_fields)
    raise ConfigError(
        f"`{key}` is no setting of {base.method.name} or of the training",
        where=key,
        hint=f"{near} {base.method.name} has: {own}".strip(),
    )


def _values(base: RunConfig, axis: str, key: str, given: Any) -> tuple[Any, ...]:
    values = several(given, key)
    if values is None or len(values) < 2:
        raise ConfigError(f"`{key}` needs several values", where=key, hint=EXAMPLE)
    read = [_value(RunConfig.build(base.model_dump(mode="json"), {axis: value}), axis) for value in values]
    if len({*map(text_of, read)}) < len(read):
        raise ConfigError(f"`{key}` has a value twice", where=key, hint="give each value once")
    return tuple(read)


def _value(config: RunConfig, axis: str) -> Any:
    section, _, field = axis.partition(".")
    return config.model_dump(mode="json")[section][field]


def _cell(base: RunConfig, values: Mapping[str, Any], at: int) -> Cell:
    config = RunConfig.build(base.model_dump(mode="json"), dict(values))
    method = config.method
    short = {axis.partition(".")[2]: text_of(value) for axis, value in values.items()}
    try:
        name = slug(method.name, short)
    except ConfigError:  # too long for a folder; the table names the values
        name = f"{method.name}-cell{at + 1}"
    return Cell(MethodSpec(name, method, {"name": method.name, **short}, dict(values)), values)
