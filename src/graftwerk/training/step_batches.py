"""The batches of a step: cut into micro-batches, collated, and on their way to the device before it is free.

Legend: B rows of a micro-batch, T tokens of a row with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwerk.devices import is_out_of_memory
from graftwerk.evaluation.inference import collated, moved
from graftwerk.tasks.base import Example, Task
from graftwerk.tasks.packing import pack
from graftwerk.training.batch_sampler import BatchSampler, micro_batches
from graftwerk.training.distributed import Distributed
from graftwerk.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedStep:
    """The batches of a step, collated and on their way to the device.

    Attributes:
        rows: Rows of the step, of all processes.
        micro_batch: Rows of a micro-batch.
        examples: Examples of each micro-batch of this process.
        batches: Their tensors, (B, T) each.
        weights: Number of targets of each micro-batch.
        drawn: States of torch's generator before and after collating, (n,) uint8 each.
    """

    rows: Sequence[int]
    micro_batch: int
    examples: list[list[Example]]
    batches: list[dict[str, Tensor]]
    weights: list[float]
    drawn: tuple[Tensor, Tensor]


class StepBatches:
    """Prepare the batches of steps, for this process.

    Args:
        model: Model as `Distributed.prepare` returned it.
        task: Task as it is trained, with class weights.
        tokenizer: Tokenizer of the model.
        sampler: Sampler of the rows, which holds their examples.
        settings: Training settings.
        processes: Processes that train together.
        max_length: Tokens of a packed row.
        dtype: Type that forward passes compute in.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        sampler: BatchSampler,
        settings: TrainingSettings,
        processes: Distributed,
        max_length: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.task, self.tokenizer, self.sampler = model, task, tokenizer, sampler
        self.settings, self.processes, self.max_length = settings, processes, max_length
        self.dtype = dtype
        self._next: PreparedStep | None = None

    def prefetch(self, rows: Sequence[int], micro_batch: int) -> None:
        """Prepare the next step while the device works on this one.

        What collating draws belongs to that step: the generator is afterwards as it was, so that a checkpoint between
        the two has the state of the step that was taken.

        Args:
            rows: Rows of the next step, of all processes.
            micro_batch: Rows of a micro-batch.
        """
        before = torch.get_rng_state()
        try:
            self._next = self.prepare(rows, micro_batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._next = None  # prepared in its own step then, which can do with less
        finally:
            torch.set_rng_state(before)

    def take(self, rows: Sequence[int], micro_batch: int) -> PreparedStep:
        """Return the batches of a step: those that were prepared before, if they are of this step and drawn as now.

        Args:
            rows: Rows of the step, of all processes.
            micro_batch: Rows of a micro-batch.
        """
        step, self._next = self._next, None
        if step is None or (step.rows, step.micro_batch) != (rows, micro_batch):
            return self.prepare(rows, micro_batch)
        before, after = step.drawn
        if not torch.equal(before, torch.get_rng_state()):  # a checkpoint was loaded, or somebody has seeded
            return self.prepare(rows, micro_batch)
        torch.set_rng_state(after)
        return step

    def prepare(self, rows: Sequence[int], micro_batch: int) -> PreparedStep:
        """Collate this process's share of a step and send it to the device.

        Args:
            rows: Rows of the step, of all processes.
            micro_batch: Rows of a micro-batch.
        """
        processes, objective = self.processes, self.task.objective
        pieces = micro_batches(
            rows,
            self.sampler.lengths,
            micro_batch,
            tokens=self.settings.per_device_train_tokens,
            processes=processes.world_size,
            process=processes.rank,
        )
        before = torch.get_rng_state()
        # A process without rows left takes part with weight zero: the others wait for its gradients.
        examples = [[self.sampler.examples[row] for row in piece or rows[:1]] for piece in pieces]
        batches = [objective.prepare(self._collated(some), self.model) for some in examples]
        weights = [objective.num_targets(batch) if piece else 0 for piece, batch in zip(pieces, batches, strict=True)]
        sent = [moved(batch, processes.device) for batch in batches]
        return PreparedStep(rows, micro_batch, examples, sent, weights, (before, torch.get_rng_state()))

    def _collated(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collate examples into tensors (B, T) on the host."""
        if self.settings.packing:
            return pack(examples, self.tokenizer, self.max_length)
        if self.settings.per_device_train_tokens is not None:  # which bounds a micro-batch, its padding counted
            return self.task.collator.collate_training(examples, self.tokenizer)
        longest = min(self.sampler.longest, self.max_length)  # of streamed rows, that before they were cut is known
        return collated(self.task, examples, self.tokenizer, self.dtype, longest, training=True)
