"""Errors about rows that were given to a command, in the words of the command and not of a run file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from graftwerk.errors import ConfigError, DataError, ModelError

_SETTLED = re.compile(r"\b(?:data|task|training|method|model)\.[a-z_]+")
"""Keys of a run file that neither command takes."""


@contextmanager
def naming_source(data: str | None) -> Iterator[None]:
    """Let errors about rows that were given speak of them, and advise nothing that these commands cannot take.

    Reading speaks of a run file, for which it was made: of its train rows and of its keys.

    Args:
        data: Where the rows come from, or None for texts or the run's own rows.
    """
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        if data is not None:
            error.what = error.what.replace("the train rows", f"the rows of {data}")
            if error.where and _SETTLED.fullmatch(error.where):
                error.where = data
        if error.hint and (_SETTLED.search(error.hint) or "another task: task=" in error.hint):
            error.hint = _applicable_hint(error.hint, data)
        raise


def _applicable_hint(hint: str, data: str | None) -> str:
    if data is None:
        return "shorten or leave out what does not fit; how rows are read was settled by the training"
    if "data.columns" in hint:
        near = hint.partition("? ")[0] + "? " if hint.startswith("did you mean") else ""
        return f"{near}`--column PART=NAME` (columns={{part: name}}) says which column plays which part"
    return f"correct these rows, or leave them out of {data}; the training has fixed how rows are read"
