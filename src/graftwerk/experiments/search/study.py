"""The trials of a search, as an Optuna study in a journal file.

One process asks and tells; workers only train. What trial n tries depends on the seed, on n and on the trials before
it alone (each trial has a sampler of its own, seeded by its number), so that a search that was killed tries the same
as one that was not. A trial that was running then stays RUNNING in the journal, which has no heartbeat:
it is taken over here, under its number, and its run resumes from its checkpoint.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwerk.errors import ConflictError
from graftwerk.experiments.search.journal import cut_torn_end, require_optuna
from graftwerk.experiments.search.space import Axis, grid, value_text
from graftwerk.training.resume_check import differences

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["median", "wilcoxon", "none"]
STARTUP_TRIALS = 4
"""Finished trials before any is pruned."""
P_THRESHOLD = 0.05
"""Of the Wilcoxon test: a trial is given up if its rows are worse than the best trial's with less than this."""
INFEASIBLE = "infeasible"
"""State of a trial that the plan of its memory refused; for Optuna it is pruned, and breaks a constraint."""
_NAME = "search"


@dataclass(frozen=True)
class Ticket:
    """A trial to be run.

    Attributes:
        number: Its number, from 0.
        settings: What it tries, by dotted key.
        resumed: True if it ran before, and was killed.
        trial: Optuna's trial.
    """

    number: int
    settings: dict[str, Any]
    resumed: bool
    trial: Any


class Study:
    """A study on disk. The caller holds the lock of its folder, and calls from one thread at a time.

    Args:
        path: The journal file.
        axes: The space.
        defaults: Settings that the first trial tries, if the space holds them.
        sampler: Name of the sampler.
        pruner: Name of the pruner.
        seed: Seed of the sampler.
        higher: True if a higher value is better.

    Raises:
        ResourceError: Optuna is not installed.
        IntegrityError: The journal is damaged.
    """

    def __init__(
        self,
        path: Path,
        axes: Sequence[Axis],
        defaults: Mapping[str, Any],
        *,
        sampler: Sampler = "tpe",
        pruner: Pruner = "median",
        seed: int = 0,
        higher: bool = True,
    ) -> None:
        self._optuna = optuna = require_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        self.cut = cut_torn_end(path)
        self.axes, self.sampler, self.pruner, self.seed, self.higher = list(axes), sampler, pruner, seed, higher
        fits = all(axis.holds(defaults.get(axis.key)) for axis in self.axes)
        self.defaults = dict(defaults) if fits else None
        self.grid = grid(self.axes) if sampler == "grid" else []
        random.Random(seed).shuffle(self.grid)
        with _quiet(optuna):
            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
            if not storage.get_all_studies():
                optuna.create_study(study_name=_NAME, storage=storage, direction="maximize" if higher else "minimize")
            median = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
            self._study = optuna.load_study(study_name=_NAME, storage=storage, pruner=median)
        self._stale = [trial for trial in self._trials() if not trial.state.is_finished()]

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Store what the study is of, or refuse to go on with another one's trials.

        Args:
            identity: Settings of the run file under ``config``, the space, the rows, as JSON values.

        Raises:
            ConflictError: The trials were made with others.
        """
        before = self._study.user_attrs.get("identity")
        if before is None or not self._trials():
            self._study.set_user_attr("identity", dict(identity))
            return
        if changed := differences(before, identity):
            raise ConflictError(
                f"this folder holds a search with other settings: {'; '.join(changed)}",
                hint="another output_dir for another search; or --overwrite (overwrite=True) to start over",
            )

    def __len__(self) -> int:
        return len(self._trials())

    @property
    def stale(self) -> int:
        """Return the number of trials that were running when an earlier process was killed, and are still to do."""
        return len(self._stale)

    def next(self) -> Ticket:
        """Return the next trial: one that was killed, or else a new one."""
        if self._stale:
            frozen = self._stale.pop(0)
            self._study.sampler = self._sampler_of(frozen.number)
            with _quiet(self._optuna):
                trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
                return Ticket(trial.number, self._suggested(trial), True, trial)
        self._study.sampler = self._sampler_of(len(self))
        with _quiet(self._optuna):
            trial = self._study.ask()
            return Ticket(trial.number, self._suggested(trial), False, trial)

    def is_hopeless(self, ticket: Ticket, step: int, value: float, rows: Sequence[float] | None) -> bool:
        """Store an evaluation of a running trial, and return True if the pruner gives it up.

        Args:
            ticket: The trial.
            step: Percent of an epoch that it has trained.
            value: The metric on the validation rows.
            rows: Score of each validation row, higher is better; or None if there is none.
        """
        trial, known = ticket.trial, self._frozen(ticket).intermediate_values
        if step not in known:
            trial.report(value, step)
        if self.pruner == "none":
            return False
        if self.pruner == "median":
            return bool(trial.should_prune())
        if rows is None:
            return False
        trial.set_user_attr(f"rows:{step}", list(rows))
        return self._is_worse_by_row(step, rows)

    def was_hopeless(self, ticket: Ticket) -> bool:
        """Return True if a trial that is taken over had been given up at its last evaluation."""
        frozen = self._frozen(ticket)
        if not frozen.intermediate_values:
            return False
        step = max(frozen.intermediate_values)
        rows = frozen.user_attrs.get(f"rows:{step}")
        with _quiet(self._optuna):
            return self.is_hopeless(ticket, step, frozen.intermediate_values[step], rows)

    def complete(self, ticket: Ticket, value: float, seconds: float) -> None:
        """Store the result of a trial."""
        ticket.trial.set_user_attr("seconds", seconds)
        self._study.tell(ticket.number, value)

    def prune(self, ticket: Ticket, seconds: float) -> None:
        """Store that a trial was given up."""
        ticket.trial.set_user_attr("seconds", seconds)
        self._study.tell(ticket.number, state=self._optuna.trial.TrialState.PRUNED)

    def refuse(self, ticket: Ticket, reason: str, seconds: float, lacks: int) -> None:
        """Store that a trial cannot fit into memory, as a constraint that it breaks: the sampler goes elsewhere."""
        ticket.trial.set_user_attr("reason", reason)
        with _quiet(self._optuna):  # a kill may have come between this and the next line
            ticket.trial.set_constraint("memory", lacks)
        self.prune(ticket, seconds)

    def fail(self, ticket: Ticket, reason: str, seconds: float) -> None:
        """Store why a trial came to no result."""
        ticket.trial.set_user_attr("seconds", seconds)
        ticket.trial.set_user_attr("reason", reason)
        self._study.tell(ticket.number, state=self._optuna.trial.TrialState.FAIL)

    def records(self) -> list[dict[str, Any]]:
        """Return all trials as JSON values: number, state, settings, value, evaluations, seconds, reason."""
        told = []
        for trial in self._trials():
            told.append(
                {
                    "number": trial.number,
                    "state": INFEASIBLE if _is_infeasible(trial) else trial.state.name.lower(),
                    "settings": {axis.key: self._value(axis, trial.params[axis.key])
                                 for axis in self.axes if axis.key in trial.params},
                    "value": trial.value if trial.state.name == "COMPLETE" else None,
                    "evaluations": [[step / 100, value] for step, value in sorted(trial.intermediate_values.items())],
                    "seconds": trial.user_attrs.get("seconds"),
                    "reason": trial.user_attrs.get("reason"),
                }
            )  # fmt: skip
        return told

    def importances(self) -> dict[str, float]:
        """Return the share of each axis in what makes a trial good (PED-ANOVA), or {} with too few trials."""
        done = [trial for trial in self._trials() if trial.state.name == "COMPLETE"]
        if len({trial.value for trial in done}) < 2:
            return {}
        with _quiet(self._optuna):
            found = self._optuna.importance.get_param_importances(self._study)
        return {key: float(share) for key, share in found.items()}

    # -- inside ------------------------------------------------------------------------------------------------------

    def _trials(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False))

    def _frozen(self, ticket: Ticket) -> Any:
        return self._trials()[ticket.number]

    def _sampler_of(self, number: int) -> Any:
        """Return the sampler of one trial."""
        samplers, seed = self._optuna.samplers, random.Random(f"{self.seed}:{number}").randrange(2**31)
        fixed = self.grid[number] if self.grid and number < len(self.grid) else None
        if number == 0 and not self.grid:
            fixed = self.defaults
        with _quiet(self._optuna):
            if fixed is not None:
                values = {axis.key: self._stored(axis, fixed[axis.key]) for axis in self.axes}
                return samplers.PartialFixedSampler(values, samplers.RandomSampler(seed=seed))
            if self.sampler == "random":
                return samplers.RandomSampler(seed=seed)
            return samplers.TPESampler(seed=seed)

    def _suggested(self, trial: Any) -> dict[str, Any]:
        found = {}
        for axis in self.axes:
            points = axis.choices or (axis.points() if self.grid else ())
            if points:
                got = trial.suggest_categorical(axis.key, [self._stored(axis, point) for point in points])
            elif axis.integer:
                got = trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
            else:
                got = trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)
            found[axis.key] = self._value(axis, got)
        return found

    @staticmethod
    def _stored(axis: Axis, value: Any) -> Any:
        """Return a choice as Optuna stores it: numbers and texts as they are, lists as text."""
        return value if value is None or isinstance(value, bool | int | float | str) else value_text(value)

    def _value(self, axis: Axis, stored: Any) -> Any:
        """Return the value of a setting from what Optuna stores."""
        if axis.choices:
            return next(choice for choice in axis.choices if self._stored(axis, choice) == stored)
        return axis.rounded(stored)

    def _is_worse_by_row(self, step: int, rows: Sequence[float]) -> bool:
        """Return True if these rows are worse than those of the best trial at the same step (Wilcoxon's test).

        Optuna's pruner wants each row as a step of its own; stored like that a study would be rows x evaluations lines.
        So it gets a study in memory with the two trials.
        """
        optuna = self._optuna
        done = [trial for trial in self._trials() if trial.state.name == "COMPLETE"]
        if len(done) < STARTUP_TRIALS:
            return False
        best = (max if self.higher else min)(done, key=lambda trial: trial.value)
        of_best = best.user_attrs.get(f"rows:{step}")
        if of_best is None or len(of_best) != len(rows):
            return False
        with _quiet(optuna):
            pair = optuna.create_study(direction="maximize")
            mean = sum(of_best) / len(of_best)
            pair.add_trial(optuna.trial.create_trial(value=mean, intermediate_values=dict(enumerate(of_best))))
            pair.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING, intermediate_values=dict(enumerate(rows))
                )
            )
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=P_THRESHOLD)
            return bool(pruner.prune(pair, pair.get_trials(deepcopy=False)[1]))


def _is_infeasible(trial: Any) -> bool:
    return trial.state.is_finished() and any(value > 0 for value in trial.constraints.values())


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna's remarks about its experimental parts and about unusual choices to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
