"""Early stopping on what is retained: training ends once too much is lost, and the best step before it is saved.

Source: Prechelt 1998, doi:10.1007/3-540-49430-8_3 (stop by rows that are not trained on); here the rows are of what was
learnt before.

No loss. In each evaluation the kept rows of every entry are answered; the first entry that has lost more than the
bound ends the training. Saved is the evaluated step before it that is best on the run's validation rows, or without
any the last one. The rows are not those by which forgetting is measured, which would make it look smaller: validation
rows of an earlier run, or without any its training rows, which are forgotten first.
Trade-off: costs forward passes and no gradient; it gives up what the steps that are left would have taught.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from graftwerk.errors import ConfigError
from graftwerk.evaluation.metrics import METRICS, point
from graftwerk.tasks.base import Predictions
from graftwerk.training.callbacks.base import TrainingLoop
from graftwerk.training.events import Event
from graftwerk.training.retained import exceeds, metric_of, points_lost
from graftwerk.training.retained_rows import Retained
from graftwerk.training.retention.base import KEY, Setting, Strategy, kept_examples
from graftwerk.training.settings import RetainedStopSettings
from graftwerk.training.validation import StopEvaluation


class RetainedStop(Strategy):
    """Stop when an entry has lost more than a bound.

    Attributes:
        entries: The entries, with the rows that are looked at.
        before: Their predictions before the first step.
        exceeded: True once one of them has lost more than the bound.
    """

    name: ClassVar[str] = "early_stopping"
    paper: ClassVar[str] = "Prechelt 1998, doi:10.1007/3-540-49430-8_3"

    def __init__(self, setting: Setting, settings: RetainedStopSettings) -> None:
        super().__init__(setting)
        self.settings = settings
        self.entries: list[Retained] = []
        self.before: dict[str, Predictions] = {}
        self._measured, self.exceeded = 0, False

    def start(self) -> None:
        meter = self.setting.meter
        for entry in meter.entries:
            rows = kept_examples(self.setting, entry, self.settings.rows, self.name, held_out=True)
            own = replace(entry, examples=rows)
            if rows:
                self.before[entry.name] = found = meter.measure(own, generate=False)
            if not rows or metric_of(own, found, found) is None:
                raise ConfigError(
                    f"`{entry.name}` has no rows that tell what is lost: none but those it is measured on, or no "
                    "metric is defined on them",
                    where=f"{KEY}.{self.name}",
                    hint="more rows, or training.retain without early_stopping",
                )
            self.entries.append(own)

    def hold(self) -> None:
        """Hold no tensors: predictions are small, and a forward pass of kept rows is that of an evaluation."""

    def look(self, trainer: TrainingLoop) -> None:
        """Measure what is lost if an evaluation is due; before the run's own, which then may find a best state."""
        state = trainer.state
        if self.exceeded or not trainer.evaluation_due or state.step == self._measured:
            return
        trainer.clock.pause()
        try:
            lost = {entry.name: self._lost(entry) for entry in self.entries}
        except StopEvaluation:  # a resumed run makes up for it
            return
        finally:
            trainer.clock.pause()
        self._measured = state.step
        trainer.saved_step = -1  # this state is saved again, with what was found
        over = [name for name, (_, points, percent) in lost.items() if exceeds(self.settings.within, points, percent)]
        if over:
            self.exceeded = True
            state.evaluated = state.step  # it cannot become the best one
            kept = (
                f"step {state.best['step']} is saved" if state.best else "no step before it was measured: it is saved"
            )
            losses = "; ".join(_describe_loss(name, *lost[name][:2]) for name in over)
            text = f"{losses}, more than {self.settings.within}; {kept}"
            trainer.emit(Event("early_stopping", state.step, text=text))
        elif not trainer.validation:
            worst = max(points for _, points, _ in lost.values())
            state.best = {"step": state.step, "metric": "forgetting", "value": worst}

    def _lost(self, entry: Retained) -> tuple[str | None, float, float]:
        """Return the metric, and what an entry has lost in points and in percent; endless if none is defined now."""
        before, after = self.before[entry.name], self.setting.meter.measure(entry, generate=False)
        metric = metric_of(entry, before, after)
        if metric is None:
            return None, float("inf"), float("inf")
        first, second = point(metric, before), point(metric, after)
        assert first is not None
        assert second is not None
        return metric, *points_lost(metric, second - first, first)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, as JSON values."""
        return {"measured": self._measured, "exceeded": self.exceeded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the values that `state_dict` returned.

        Raises:
            TypeError: The state is of another form.
        """
        if type(state["measured"]) is not int or type(state["exceeded"]) is not bool:
            raise TypeError("`early_stopping` is no step and no answer")
        self._measured, self.exceeded = state["measured"], state["exceeded"]

    @property
    def bytes(self) -> int:
        rows = sum(8 * example.length for entry in self.entries for example in entry.examples)
        found = sum(array.nbytes for each in self.before.values() for array in each.tensors().values())
        return rows + found


def _describe_loss(name: str, metric: str | None, points: float) -> str:
    if metric is None:
        return f"no metric is defined any more on `{name}`"
    unit = "points" if METRICS[metric].words == " points" else "%"
    return f"`{name}` has lost {points:.1f} {unit} ({METRICS[metric].title})"
