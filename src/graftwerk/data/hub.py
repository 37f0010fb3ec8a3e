"""Data sets of the Hugging Face hub, through the `datasets` library. Data files only: no loading script is ever run."""

from __future__ import annotations

from typing import Any

from graftwerk.data.rows import Table
from graftwerk.errors import ConfigError, ResourceError


def read_hub(name: str, split: str, source: str) -> Table:
    """Read one split of a hub data set. Classes become their names, and a class of -1 (unlabelled) becomes None.

    Args:
        name: ``owner/name`` or ``owner/name/configuration``.
        split: Name of the split: `train`.
        source: Name of the source for messages, as the run file has it.

    Raises:
        ConfigError: no such data set, configuration or split.
        ResourceError: no network and not in the local cache, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            "reading from the hub needs the package datasets", where=source, hint="pip install 'graftwerk[data]'"
        ) from None
    owner, _, rest = name.partition("/")
    short, _, configuration = rest.partition("/")
    repository = f"{owner}/{short}" if short else owner
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        content = datasets.load_dataset(repository, configuration or None, split=split)
    except (ConnectionError, TimeoutError) as error:
        # datasets' own offline error is a ConnectionError.
        raise ResourceError(
            f"there is no local file `{source}`, and as a data set of the hub `{repository}` is not in the local cache"
            " and the hub cannot be reached",
            where=_first(error),
            hint="fetch it once with a network, or give a local file with its ending",
        ) from None
    except (datasets.exceptions.DatasetNotFoundError, ValueError, FileNotFoundError, RuntimeError) as error:
        raise ConfigError(
            f"the data set `{repository}` cannot be used: {_first(error)}",
            where=source,
            hint="owner/name/configuration names a configuration, owner/name:split a split",
        ) from None
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()
    named = {column: kind for column, kind in content.features.items() if isinstance(kind, datasets.ClassLabel)}
    rows: list[dict[str, Any]] = content.to_list()
    for row in rows:
        for column, kind in named.items():
            value = row[column]
            row[column] = None if value is None or value < 0 else kind.int2str(value)
    return Table(source, source, rows, list(range(1, len(rows) + 1)), [], tuple(content.column_names), "row", len(rows))


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
