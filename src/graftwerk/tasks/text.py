"""The base of all tasks in which a model predicts text: reading without classes, and the parts by kind of model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import PrivateAttr

from graftwerk.data.settings import DataSettings
from graftwerk.data.splits_reader import read_splits
from graftwerk.data.stream import read_stream
from graftwerk.errors import UnsupportedError
from graftwerk.tasks.base import Task
from graftwerk.tasks.collator import Collator, TextCollator
from graftwerk.tasks.decoder import TextDecoder
from graftwerk.tasks.example import IGNORED as IGNORED
from graftwerk.tasks.generation import Generation
from graftwerk.tasks.generation import Layout as Layout
from graftwerk.tasks.splits import Splits, splits_of, splits_of_stream
from graftwerk.tasks.token_objective import NextTokenObjective, Seq2SeqObjective, TokenObjective

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class TextTask(Task):
    """Abstract; subclasses read and encode rows in their ways. Call `for_model` before anything else is used."""

    best_metric = "loss"
    has_head = False
    generates = True
    layouts: ClassVar[tuple[Layout, ...]] = ("causal", "encoder-decoder")
    """The kinds of models that can do it."""

    _layout: Layout = PrivateAttr(default="causal")

    def for_model(self, config: PreTrainedConfig) -> Self:
        layout: Layout = "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "causal"
        if layout not in self.layouts:
            raise UnsupportedError(
                f"{self.title} needs a {' or '.join(self.layouts)} model, and `{config.model_type}` is none",
                where="task",
            )
        bound = self.model_copy()
        bound._layout = layout
        return bound

    @property
    def layout(self) -> Layout:
        """Return the kind of model that the task is bound to."""
        return self._layout

    @property
    def can_pack(self) -> bool:
        return self._layout == "causal"

    def read(self, data: DataSettings, labels: Sequence[str] | None = None) -> Splits:
        if data.streaming:
            return splits_of_stream(data, read_stream(data, self.row_format, self.fields), self.fields)
        chosen, findings = read_splits(data, self.row_format)
        return splits_of(data, chosen, findings, self.fields)

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {}

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        return AutoModelForCausalLM if self._layout == "causal" else AutoModelForSeq2SeqLM

    @property
    def collator(self) -> Collator:
        return TextCollator()

    @property
    def objective(self) -> TokenObjective:
        return NextTokenObjective() if self._layout == "causal" else Seq2SeqObjective()

    @property
    @abstractmethod
    def decoder(self) -> TextDecoder:
        """Return the part that makes predictions, and knows the texts of a row."""

    @property
    def generation(self) -> Generation:
        """Return the part that batches prompts and reads generated texts."""
        return Generation(self._layout)
