"""The budget of a comparison: how many trials, or how many seconds, each method may spend on its own settings.

A method that was tuned against one that was not is a comparison of efforts. With a budget every method gets the same:
so many trials, or so many seconds of training. Without values to try (`learning_rate=1e-3,3e-3`) a method tries its own
learning rate, three times it and a third of it, and then random ones within a factor of ten with half, once and twice
its size (rank, virtual tokens, reduction factor). All methods draw the same factors.

Trials have a seed that no reported run has, and are measured on validation rows; what was chosen is trained again with
the seeds of the comparison. The best of several trials looks better than it is, and that would favour whoever tries
more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, product
from typing import Any

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.experiments.method_specs import MethodSpec, slug
from graftwerk.experiments.tuning import Axes, crossed, refuse_own_values
from graftwerk.formatting import duration
from graftwerk.formatting import seconds as precise
from graftwerk.methods.bottleneck import REDUCTION
from graftwerk.methods.learning_rates import default_learning_rates
from graftwerk.methods.registry import parse_method

FACTORS = (1.0, 3.0, 1 / 3)
"""Of the method's own learning rate, tried first; then random ones up to `REACH`."""
REACH = 10.0
SIZES = ("r", "num_virtual_tokens", "adapter_size", "reduction_factor", "oft_block_size")
"""Settings that say how large an adapter is; a method's first one that is set is its size."""
RATE = "training.learning_rate"
MOST = 200
"""Trials of a method, however many seconds it may spend."""
HINT = "budget=4 is four trials for each method, budget=10min ten minutes of training for each"
_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """A number of trials, or seconds of training, that each method may spend on its settings.

    Attributes:
        trials: Largest number of trials.
        seconds: Seconds of training after which no further trial begins, or None.
    """

    trials: int
    seconds: float | None = None

    def allows(self, spent: Sequence[float]) -> bool:
        """Return True if another trial fits, if it takes no longer than the longest before it.

        Args:
            spent: Seconds of each trial so far. The first one always fits.
        """
        if self.seconds is None or not spent:
            return len(spent) < self.trials
        return len(spent) < self.trials and sum(spent) + max(spent) <= self.seconds

    def __str__(self) -> str:
        """Return the budget in words: ``4 trials``, or ``10 min of training``."""
        if self.seconds is not None:
            return f"{duration(self.seconds)} of training"
        return f"{self.trials} trial{'s' if self.trials > 1 else ''}"


def parse_budget(given: int | float | str | None) -> Budget | None:
    """Parse a budget: `4` or `"4"` are trials, `"90s"`, `"10min"` and `"1h"` are time.

    Raises:
        ConfigError: It is something else, or nothing: a budget of 0 would train no method.

    Example:
        >>> parse_budget("10min").seconds
        600.0
    """
    if given is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(given).strip().lower())
    amount, unit = (float(found[1]), found[2]) if found else (-1.0, "")
    if found is None or isinstance(given, bool) or (unit and unit not in _SECONDS):
        raise ConfigError(f"{given!r:.40} is not a budget", where="budget", hint=HINT)
    if amount == 0:
        raise ConfigError("a budget of 0 lets no method try anything", where="budget", hint=HINT)
    if unit:
        return Budget(MOST, amount * _SECONDS[unit])
    if amount != int(amount) or amount > MOST:
        raise ConfigError(f"a budget is 1 to {MOST} whole trials, or a time, not {given}", where="budget", hint=HINT)
    return Budget(int(amount))


def tuning_seed(seeds: Sequence[int]) -> int:
    """Return the seed of the trials: the smallest that no reported run has."""
    return next(seed for seed in count() if seed not in seeds)


def candidates(spec: MethodSpec, base: RunConfig, axes: Axes, budget: Budget) -> list[MethodSpec]:
    """Return what a method tries, in order; the budget says how far it gets.

    Args:
        spec: The method.
        base: Settings that all methods share.
        axes: Values to try by setting of the training, or nothing for the method's own space.
        budget: The budget.

    Raises:
        ConfigError: The method has a value of its own for what is to be tried.
    """
    if not axes:
        moved = (_moved(spec, base, *factors) for factors in _factors())
        return list(islice(_once(moved), budget.trials))
    refuse_own_values(spec, axes)
    grid = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if len(grid) > budget.trials:  # a part of the grid, and not its first corner
        random.Random(0).shuffle(grid)
    return [crossed(spec, tried) for tried in grid[: budget.trials]]


def _factors() -> Iterator[tuple[float, float]]:
    """Yield factors of the learning rate and of the size, without end."""
    yield from ((factor, 1.0) for factor in FACTORS)
    rng = random.Random(0)
    while True:
        yield REACH ** rng.uniform(-1, 1), rng.choice((0.5, 1.0, 2.0))


def _once(specs: Iterator[MethodSpec]) -> Iterator[MethodSpec]:
    """Leave out specs whose rounded values were tried before."""
    seen = set()
    for spec in specs:
        if spec.name not in seen:
            seen.add(spec.name)
            yield spec


def _moved(spec: MethodSpec, base: RunConfig, factor: float, size: float) -> MethodSpec:
    method = spec.method.to_dict()
    rate = spec.changes.get(RATE, base.training.learning_rate)
    if rate == "auto":
        rate = default_learning_rates(spec.method, base.task.name)[0]
    tried: dict[str, Any] = {"learning_rate": float(f"{rate * factor:.3g}")}
    changes: dict[str, Any] = {RATE: tried["learning_rate"]}
    name = next((name for name in SIZES if method.get(name)), "reduction_factor")
    if name in method and size != 1.0:
        # twice the reduction is half the size
        wanted = (
            (method[name] or REDUCTION) / size if name == "reduction_factor" else max(1, round(method[name] * size))
        )
        tried[name] = changes[f"method.{name}"] = wanted
        if name == "r" and "lora_alpha" in method:  # the scale alpha/r stays
            changes["method.lora_alpha"] = method["lora_alpha"] * wanted / method["r"]
    own = {key.removeprefix("method."): value for key, value in changes.items() if key.startswith("method.")}
    return replace(
        spec,
        name=slug(spec.name, tried),
        method=parse_method({**method, **own}),
        changes={**spec.changes, **changes},
        tried_for=spec.name,
    )


class Trials:
    """The trials of all methods, each within the same budget.

    Args:
        tries: What each method may try, in order, by its name.
        budget: The budget.
        seed: Seed of the trials.

    Attributes:
        spent: Seconds of each trial that was made, by method.
    """

    def __init__(self, tries: Mapping[str, Sequence[MethodSpec]], budget: Budget, seed: int) -> None:
        self.tries, self.budget, self.seed = tries, budget, seed
        self.spent: dict[str, list[float]] = {name: [] for name in tries}
        self._begun = dict.fromkeys(tries, 0)

    @property
    def number(self) -> int | None:
        """Number of trials in all, or None if time says how many there will be."""
        return None if self.budget.seconds is not None else sum(map(len, self.tries.values()))

    @property
    def made(self) -> list[MethodSpec]:
        """Trials that were made, method by method."""
        return [spec for name, tries in self.tries.items() for spec in tries[: len(self.spent[name])]]

    def next(self) -> MethodSpec | None:
        """Begin the next trial of the method that has begun the fewest, or return None if none may begin now.

        Of a budget of time a method makes one trial at a time: what it spends says whether another one fits.
        """
        for name in sorted(self.tries, key=lambda name: self._begun[name]):
            begun, spent = self._begun[name], self.spent[name]
            waits = self.budget.seconds is not None and begun > len(spent)
            if begun < len(self.tries[name]) and not waits and self.budget.allows(spent):
                self._begun[name] += 1
                return self.tries[name][begun]
        return None

    def done(self, spec: MethodSpec, seconds: float) -> None:
        """Count a trial that has ended.

        Args:
            spec: The trial.
            seconds: What it took of the budget.
        """
        self.spent[spec.tried_for].append(seconds)

    def summary(self, failed: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
        """Return what `comparison.json` says of the budget."""
        spent = {
            name: {
                "trials": len(seconds),
                "seconds": sum(seconds),
                "failed": sum(bool(failed.get(spec.name)) for spec in self.tries[name]),
            }
            for name, seconds in self.spent.items()
        }
        given = {"trials": self.budget.trials} if self.budget.seconds is None else {"seconds": self.budget.seconds}
        return {**given, "seed": self.seed, "spent": spent}


def describe_budget(summary: Mapping[str, Any]) -> str:
    """Return the note on a budget and on what each method spent of it."""
    budget = Budget(summary["trials"]) if "trials" in summary else Budget(MOST, summary["seconds"])
    spent = ", ".join(
        f"{name} {one['trials']} in {precise(one['seconds'])}" + (f" ({one['failed']} failed)" if one["failed"] else "")
        for name, one in summary["spent"].items()
    )
    over = [name for name, one in summary["spent"].items() if budget.seconds and one["seconds"] > budget.seconds]
    more = f"; the first trial always runs, and is over the budget for {', '.join(over)}" if over else ""
    return (
        f"each method could spend {budget} on its settings; trials and time spent: {spent}{more}; they were trained "
        f"with seed {summary['seed']}, which no result has"
    )
