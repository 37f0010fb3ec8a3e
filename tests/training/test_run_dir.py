"""The names in a run folder."""

from __future__ import annotations

from pathlib import Path

from graftwerk.augmentation.augment import AUGMENTED
from graftwerk.augmentation.pipeline import about_of
from graftwerk.augmentation.progress_log import journal_of
from graftwerk.training.run_dir import MADE_BEFORE


def test_made_before_names_every_file_of_augmentation() -> None:
    rows = Path(AUGMENTED)
    assert (rows.name, about_of(rows).name, journal_of(rows).name) == MADE_BEFORE
