"""The results and failures of the runs of a comparison, by method and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from graftwerk.experiments.aggregation import TrialResult

Result = TypeVar("Result", bound=TrialResult)


class RunResults(Generic[Result]):
    """Hold what the runs of some methods have given so far.

    Args:
        methods: Names of the methods.

    Attributes:
        found: Results by method and seed.
        failed: Reasons of failed runs by method and seed.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self.found: dict[str, dict[int, Result]] = {name: {} for name in methods}
        self.failed: dict[str, dict[int, str]] = {name: {} for name in methods}

    def __iter__(self) -> Iterator[Result]:
        for by_seed in self.found.values():
            yield from by_seed.values()

    @property
    def num_found(self) -> int:
        """Number of runs that have given a result."""
        return sum(map(len, self.found.values()))

    @property
    def num_failed(self) -> int:
        """Number of failed runs."""
        return sum(map(len, self.failed.values()))

    def sort(self) -> None:
        """Sort by seed: runs that are made at once end in any order."""
        results: tuple[dict[str, dict[int, Any]], ...] = (self.found, self.failed)
        for by_method in results:
            for name, by_seed in by_method.items():
                by_method[name] = dict(sorted(by_seed.items()))
