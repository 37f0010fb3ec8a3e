"""End of a run: the predictions of its held-out rows are stored one by one, analysed, and compared with a guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftwerk.errors import ConfigError
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.tasks.base import Example, Predictions, Splits, Task
from graftwerk.training.events import Event, Listener
from graftwerk.training.run_dir import RunDir


class RowAnalysis:
    """Predictions of the splits of a run, for the main process.

    Args:
        folder: The run folder.
        manifest: The run's manifest; ``chance`` is filled in.
        settings: Level and draws of intervals.
    """

    def __init__(self, folder: RunDir, manifest: dict[str, Any], settings: EvaluationSettings) -> None:
        self.folder, self.manifest, self.settings = folder, manifest, settings
        self._analyses: dict[str, Any] = {}

    def add(
        self, split: str, task: Task, predictions: Predictions, examples: Sequence[Example], splits: Splits
    ) -> None:
        """Store the predictions of a split row by row, and compare them with a guess.

        Args:
            split: Name of the split; its metrics are in the manifest already.
            task: The task.
            predictions: Predictions with targets.
            examples: The encoded rows.
            splits: The rows.

        Raises:
            ResourceError: They cannot be written.
        """
        from graftwerk.evaluation.analysis import analysis_of
        from graftwerk.evaluation.chance import against_chance
        from graftwerk.evaluation.row_results import records_of, write_records
        from graftwerk.serialization.untrusted_files import checksum

        labels = splits.labels or ()
        judged, records = records_of(
            task, predictions, examples, getattr(splits, split), labels, splits.where.get(split)
        )
        file = checksum(write_records(self.folder.path, split, records))
        lengths = [example.length for example in examples]
        self._analyses[split] = {**analysis_of(predictions, labels, judged, records, lengths), "file": file}
        known = against_chance(
            predictions,
            labels,
            self.manifest["metrics"][split],
            confidence=self.settings.confidence,
            resamples=self.settings.resamples,
        )
        if known is not None:
            self.manifest.setdefault("chance", {})[split] = known

    def finish(self, emit: Listener, step: int) -> None:
        """Write the analyses, and tell of a run that is not shown to be better than a guess.

        Raises:
            ResourceError: They cannot be written.
        """
        from graftwerk.evaluation.analysis import write_analysis

        if not self._analyses:
            return
        try:
            write_analysis(self.folder.path, self._analyses)
        except ConfigError as error:  # labels of kilobytes must not cost the result
            emit(Event("warning", step, text=f"the report has no analysis of errors: {error.what}"))
        split = "test" if "test" in self._analyses else "validation"
        known = self.manifest.get("chance", {}).get(split, {})
        if "text" in known:
            text = f"{split} rows: {known['text']}"
            emit(Event("diagnosis", step, code="at_chance", text=text, hint=known.get("hint")))
