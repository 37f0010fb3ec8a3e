"""Replay: some rows of what is to be retained are trained on in every step, beside the run's own.

Source: Chaudhry et al. 2019, arXiv:1902.10486 (a small memory of rows of earlier tasks); Rolnick et al. 2019,
arXiv:1811.11682.

Loss: weight * mean over the kept rows of the step. Heads of earlier runs are frozen: only the shared part learns.
Trade-off: simple and strong, and needs the rows, which may not be kept everywhere; a step costs `share` more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from torch import Tensor

from graftwerk.tasks.base import Example
from graftwerk.tasks.regression import Regression, scale_of
from graftwerk.training.gradients import GradientAccumulator
from graftwerk.training.retained_rows import Retained
from graftwerk.training.retention.base import Setting, Strategy, batches_of, kept_examples
from graftwerk.training.settings import ReplaySettings
from graftwerk.training.step_batches import PreparedStep


class Replay(Strategy):
    """Train on kept rows of every entry."""

    name: ClassVar[str] = "replay"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv:1902.10486"

    def __init__(self, setting: Setting, settings: ReplaySettings) -> None:
        super().__init__(setting)
        self.settings = settings
        self.memory: list[tuple[Retained, Example]] = []
        self._scales: dict[str, float] = {}

    def start(self) -> None:
        for entry in self.setting.meter.entries:
            kept = kept_examples(self.setting, entry, self.settings.rows, self.name)
            self.remember(entry, kept)

    def remember(self, entry: Retained, examples: list[Example]) -> None:
        """Add rows to the memory; numbers of a regression weigh by their variance, as where they were learnt."""
        self.memory += [(entry, example) for example in examples]
        self._scales[entry.name] = 1.0
        if isinstance(entry.task, Regression):
            deviation = scale_of([float(example.target) for example in examples], centred=True)[1]
            self._scales[entry.name] = 1 / deviation**2

    def drawn(self, step: int, rows: int) -> list[int]:
        """Return the places of a step's rows in the memory.

        Args:
            step: Number of the step.
            rows: Rows of the run's own in the step.
        """
        wanted = min(len(self.memory), max(1, round(self.settings.share * rows)))
        places = np.random.default_rng([self.setting.seed, step]).permutation(len(self.memory))
        return sorted(places[:wanted].tolist())

    def losses(self, step: int, own: PreparedStep, gradients: GradientAccumulator) -> Iterator[Tensor]:
        setting = self.setting
        places = self.drawn(step, len(own.rows))
        mine = [self.memory[place] for place in places[setting.processes.rank :: setting.processes.world_size]]
        for entry in {entry.name: entry for entry, _ in self.memory}.values():
            examples = [example for other, example in mine if other is entry]
            factor = self.settings.weight * self._scales.get(entry.name, 1.0) / len(places)
            for rows, batch in batches_of(setting, entry.task, examples, own.micro_batch):
                with setting.meter.lent(entry):
                    outputs = entry.task.objective.forward(gradients.model, batch)
                    yield factor * rows * entry.task.objective.loss(outputs, batch)

    @property
    def bytes(self) -> int:
        return sum(8 * example.length for _, example in self.memory)
