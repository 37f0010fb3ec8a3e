"""Read a source into rows by their fields, as tasks do."""

from __future__ import annotations

from typing import Any

from graftwerk.data.rows import Table
from graftwerk.data.sources import name_parts, read_source


def read_rows(source: Any, *, split: str = "train", **fields: Any) -> Table:
    return name_parts(read_source(source, split), **fields)
