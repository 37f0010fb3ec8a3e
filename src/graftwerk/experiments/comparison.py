"""`Comparison`: the result of a comparison or an ablation on disk, and its table."""

from __future__ import annotations

from typing import Any

from graftwerk.experiments.result_folder import ResultFolder
from graftwerk.experiments.table import as_text, rich_table
from graftwerk.reporting.files import COMPARISON as COMPARISON
from graftwerk.serialization.untrusted_files import understood


class Comparison(ResultFolder):
    """A comparison on disk: `comparison.json`, beside a run folder for each method and seed."""

    file, key, counted = COMPARISON, "comparison", ("methods", "seeds")

    def _as_text(self) -> str:
        return as_text(self.result)

    def __rich__(self) -> Any:
        with understood(self.folder / COMPARISON):
            return rich_table(self.result)
