"""The contract of strategies: a start on the model as it is before the first step, and a loss in every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from graftwerk.data.stream import StreamedRows
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.evaluation.inference import moved
from graftwerk.evaluation.sample_outputs import sample_rows
from graftwerk.modeling.attach import Adapter
from graftwerk.tasks.base import Example, Task
from graftwerk.training.distributed import Distributed
from graftwerk.training.gradients import GradientAccumulator
from graftwerk.training.retained import RetainedMeter
from graftwerk.training.retained_rows import Retained
from graftwerk.training.step_batches import PreparedStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "training.retain"


@dataclass(frozen=True)
class Setting:
    """Parts of a training that strategies work with.

    Attributes:
        meter: The entries of `evaluation.retained` and their heads.
        adapter: The adapter that is trained.
        task: The run's own task.
        tokenizer: Tokenizer of the model.
        processes: Processes that train together.
        train: The run's own encoded training rows.
        seed: Seed of the run.
        warm: True if the run starts from the weights of another.
    """

    planned: ClassVar[bool] = False
    """True where the model has no values (`training.planning`), so that nothing is computed at the start."""

    meter: RetainedMeter
    adapter: Adapter
    task: Task
    tokenizer: PreTrainedTokenizerBase
    processes: Distributed
    train: Sequence[Example]
    seed: int
    warm: bool

    def batch(self, task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return examples of a task as a batch, (B, T) each, on the device."""
        collated = task.collator.collate_training(examples, self.tokenizer)
        return moved(task.objective.prepare(collated, self.adapter.model), self.processes.device)


class Strategy(ABC):
    """One loss against forgetting, or a watch over it.

    What it works with is made by `start` from the settings and the model as it is before the first step, the same in a
    resumed run; rows of a step follow from the seed and the step's number. So nothing of a loss is stored in
    checkpoints.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def start(self) -> None:
        """Prepare on the model as it is before the first step, in evaluation mode.

        Raises:
            ConfigError, UnsupportedError: The rows or the model do not have what the strategy needs.
        """

    def hold(self) -> None:
        """Hold what `start` leaves, without values: in the plan of a run, whose model has none."""
        self.start()

    def losses(self, step: int, own: PreparedStep, gradients: GradientAccumulator) -> Iterator[Tensor]:
        """Yield losses (scalars) that add up to the strategy's over all processes; each is propagated before the next.

        Args:
            step: Number of the step, from 0.
            own: The batches of the run's own rows.
            gradients: The accumulator, for its model and size of micro-batches.
        """
        yield from ()

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Return the bytes of tensors that it holds."""


def kept_examples(
    setting: Setting, entry: Retained, most: int, strategy: str, *, held_out: bool = False
) -> list[Example]:
    """Return encoded training rows of an entry, evenly spaced; rows that are measured are never among them.

    Args:
        setting: What strategies work with.
        entry: The entry.
        most: Most of them.
        strategy: Name of the strategy, for messages.
        held_out: Take validation rows in their place, if there are any and the test rows are measured.

    Raises:
        ConfigError: The entry has no training rows.
        UnsupportedError: They are streamed.
    """
    rows = entry.splits.train
    if held_out and entry.split == "test" and entry.splits.validation:
        rows = entry.splits.validation
    if isinstance(rows, StreamedRows):
        raise UnsupportedError(
            f"rows of `{entry.name}` are streamed, and some of them would have to be kept", where=f"{KEY}.{strategy}"
        )
    if not rows:
        raise ConfigError(
            f"`{entry.name}` has rows to measure and none to train on",
            where=f"{KEY}.{strategy}",
            hint="name the run that was trained on them (run: runs/earlier), or `general`",
        )
    chosen = [rows[place] for place in sample_rows(len(rows), most)]
    measured = {_tokens(example) for each in setting.meter.entries for example in each.examples}
    encoded = entry.task.encode(chosen, setting.tokenizer, entry.splits, entry.max_length)
    # another entry may be measured on rows that this one was trained on
    return [example for example in encoded if _tokens(example) not in measured]


def _tokens(example: Example) -> tuple[int, ...]:
    return tuple(example.inputs["input_ids"])


def batches_of(setting: Setting, task: Task, examples: Sequence[Example], size: int) -> Iterator[tuple[int, Any]]:
    """Yield the number of rows and the batch, (B, T) each, of every piece of some examples, on the device.

    Args:
        setting: What strategies work with.
        task: Task that collates them.
        examples: The examples.
        size: Most rows of a piece.
    """
    ordered = sorted(examples, key=lambda example: example.length)
    for start in range(0, len(ordered), size):
        piece = ordered[start : start + size]
        yield len(piece), setting.batch(task, piece)
