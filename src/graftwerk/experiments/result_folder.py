"""The folder of a comparison, a search or a sequence: one sealed file with the result, and its page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from graftwerk.errors import ConfigError, ConflictError, IntegrityError
from graftwerk.own_files import refuse_links
from graftwerk.reporting.files import COMPARISON, MANIFEST, SEARCH, SEQUENCE
from graftwerk.sanitize import redacted
from graftwerk.serialization.atomic import write_file
from graftwerk.serialization.strict_json import dump_object
from graftwerk.serialization.untrusted_files import read_sealed, understood

FORMAT = 1
SCALE = 16
"""Times the size of other JSON files that the result may have: it holds each trial, or each pair of methods."""
HOLDS = {MANIFEST: "a run", COMPARISON: "a comparison", SEARCH: "a search", SEQUENCE: "a sequence"}
"""Kinds of folders, each by the file that no other kind has."""


class ResultFolder:
    """A result on disk; its subclasses say of what.

    Attributes:
        folder: Its folder, with the folders of its runs.
        result: Contents of the file with the result.
        report: Path of `report.html`, or None if no report was requested.

    Raises:
        ConfigError: There is no such file in that folder.
        IntegrityError: The file is damaged, or has another format version.
    """

    file: ClassVar[str]
    key: ClassVar[str]
    """Of the folder in what `--json` prints."""
    counted: ClassVar[tuple[str, ...]]
    """Lists of the result whose lengths say how large it is."""

    def __init__(self, folder: str | Path, *, report: Path | None = None) -> None:
        self.folder, self.report = Path(folder), report
        if not (self.folder / self.file).is_file():
            raise ConfigError(f"{folder} holds no {HOLDS[self.file][2:]}: it has no {self.file}")
        refuse_links(self.folder, (self.file,))
        self.result = read_sealed(self.folder / self.file, scale=SCALE)
        if self.result.get("format") != FORMAT:
            raise IntegrityError(f"{self.file} has another format than {FORMAT}", where=str(self.folder))

    @classmethod
    def reported(cls, folder: Path, wanted: bool) -> Self:
        """Return the result in a folder, with its page if one is wanted."""
        if not wanted:
            return cls(folder)
        from graftwerk.reporting.html import write_report

        return cls(folder, report=write_report(folder))

    def to_dict(self) -> dict[str, Any]:
        """Return the object that the command prints with `--json`."""
        return {self.key: str(self.folder), "report": str(self.report) if self.report else None, **self.result}

    def table(self) -> str:
        """Return the result as plain text: a table, and notes below."""
        with understood(self.folder / self.file):
            return self._as_text()

    def _as_text(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        sizes = (f"{len(self.result[name])} {name}" for name in self.counted)
        return f"<{HOLDS[self.file][2:].capitalize()} {self.folder}: {', '.join(sizes)}>"


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write the file with a result, sealed and without secrets."""
    write_file(path, dump_object(redacted(result), path, room=SCALE, seal=True), own=True)


def refuse_others(folder: Path, file: str) -> None:
    """Refuse a folder that holds something else than what is to be written there.

    Args:
        folder: The folder; it need not exist.
        file: Name of the file with the result.

    Raises:
        ConflictError: It holds a run, or another kind of result.
    """
    what = HOLDS[file][2:]
    for name, held in HOLDS.items():
        if name != file and (folder / name).exists():
            hint = f"give the {what} another one: output_dir=runs/{what}"
            raise ConflictError(f"{folder} is the folder of {held}", hint=hint)
