"""`write_report`: the page of a run, comparison, search or sequence, from plain files in its folder. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwerk.errors import ConfigError, ConflictError
from graftwerk.own_files import refuse_links
from graftwerk.reporting.comparison import comparison_page
from graftwerk.reporting.explanation import explanation_page, explanation_sections
from graftwerk.reporting.files import (
    COMPARISON,
    CONFIG,
    LOG,
    MANIFEST,
    REPORT,
    SEARCH,
    SEQUENCE,
    number,
    read_json,
    read_log,
    read_text,
    write_page,
)
from graftwerk.reporting.run import run_page
from graftwerk.reporting.search import search_page
from graftwerk.reporting.sequence import sequence_page

EVALUATION, PREDICTIONS, ANALYSIS, EXPLANATION = "evaluation.json", "predictions", "analysis.json", "explanation.json"


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run, a comparison, a search or a sequence.

    It is one file that fetches nothing from a network. What is missing (test rows, a log, the end of the run) is said
    on the page.

    Returns:
        Its path.

    Raises:
        ConfigError: the folder holds neither a run nor a comparison.
        IntegrityError: its main file is damaged, or one of its files is a link.
        ResourceError: a file cannot be read, or the page not written.

    Example:
        >>> from graftwerk import write_report
        >>> write_report("runs/nothing-here")
        Traceback (most recent call last):
        graftwerk.errors.ConfigError: there is no folder runs/nothing-here
        ...
    """
    folder = Path(folder)
    refuse_links(
        folder, (COMPARISON, SEARCH, SEQUENCE, MANIFEST, EVALUATION, EXPLANATION, PREDICTIONS, LOG, CONFIG, REPORT)
    )
    if (folder / COMPARISON).is_file():
        return write_page(folder, comparison_page(folder.resolve(), read_json(folder / COMPARISON)))
    if (folder / SEARCH).is_file():
        return write_page(folder, search_page(folder.resolve(), read_json(folder / SEARCH)))
    if (folder / SEQUENCE).is_file():
        return write_page(folder, sequence_page(folder.resolve(), read_json(folder / SEQUENCE)))
    if not (folder / MANIFEST).is_file():
        what = f"{folder} holds neither a run nor a comparison" if folder.is_dir() else f"there is no folder {folder}"
        hint = f"a folder with {MANIFEST} (a run), {COMPARISON} (a comparison), {SEARCH} (a search) or {SEQUENCE}"
        raise ConfigError(what, hint=hint)
    manifest = read_json(folder / MANIFEST)
    evaluation = read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
    analysed = folder / PREDICTIONS / ANALYSIS
    analysis = read_json(analysed) if analysed.is_file() else {}
    explanation = read_json(folder / EXPLANATION) if (folder / EXPLANATION).is_file() else {}
    events, broken = read_log(folder / LOG)
    config = read_text(folder / CONFIG) if (folder / CONFIG).is_file() else ""
    return write_page(
        folder,
        run_page(
            folder.resolve(),
            manifest,
            evaluation,
            analysis,
            events,
            broken,
            config,
            _confidence(config),
            explanation_sections(explanation),
        ),
    )


def write_explanation(path: str | Path, explanation: Mapping[str, Any], title: str, *, overwrite: bool = False) -> Path:
    """Write an explanation as a page of its own: one file that needs nothing else.

    Returns:
        Its path.

    Raises:
        ConflictError: There is such a file already.
        ResourceError: It cannot be written.
    """
    path = Path(path)
    check_free(path, overwrite)
    return write_page(path.parent, explanation_page(explanation, title), path.name)


def check_free(path: Path, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        ConflictError: It exists, and is not to be replaced.
    """
    if path.exists() and not overwrite:
        raise ConflictError(f"{path} exists", where=str(path), hint="--overwrite (overwrite=True) replaces it")


def _confidence(config: str) -> float | None:
    """Return the level of the intervals from the text of a run file, or None if it cannot be read."""
    import yaml

    try:
        return number(yaml.safe_load(config), "evaluation", "confidence")
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
