"""The form of files of text: their encoding and, of csv and tsv files, the character between fields.

Both are recognised unless the settings name them. What is recognised beside the usual (UTF-8, commas, tabs in .tsv) is
reported. A file is taken for Windows-1252, of which the printable part of Latin-1 is a part, if it is not UTF-8 and its
other bytes look like the letters and signs of Western European text; a UTF-8 file with a few wrong bytes is none.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from graftwerk.errors import ConfigError, DataError

TextRows = Literal["line", "document"]
USUAL = {".csv": ",", ".tsv": "\t"}
"""The character between fields of each ending that has one."""
CANDIDATES = (",", ";", "\t", "|")
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars", " ": "spaces"}
WESTERN = "cp1252"
SAMPLE_BYTES = 1 << 16
SAMPLE_RECORDS = 50
SCANNED_BYTES = 1 << 26
"""Of a file that is not UTF-8, for what else it is."""
_MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_HIGH = re.compile(rb"[\x80-\xff]")
_LETTER = rb"[\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xc0-\xcf\xd1-\xd6\xd8-\xdd\xdf-\xef\xf1-\xf6\xf8-\xfd]"
_WESTERN = re.compile(
    # letters that stand alone or in pairs among ASCII ones, and the signs that western text uses
    rb"(?<![\x80-\xff])(?:" + _LETTER + rb"|[\xd1\xf1]){1,2}(?![\x80-\xff])"
    rb"|[\x80\x82\x84\x85\x8b\x91-\x97\x99\x9b\xa0\xa1\xa3\xa7\xa9\xab\xae\xb0-\xb3\xb5\xb7\xbb-\xbf]"
)


@dataclass(frozen=True)
class TextForm:
    """Settings of files of text.

    Attributes:
        rows: Unit of a .txt file that is one row: a line, or a document between blank lines.
        delimiter: Character between the fields of csv and tsv files, or None to recognise it.
        encoding: Name of the encoding, or None to recognise it.
    """

    rows: TextRows = "line"
    delimiter: str | None = None
    encoding: str | None = None


RECOGNISE = TextForm()
"""The form of files of which nothing is said."""


@dataclass(frozen=True)
class Recognised:
    """The form of one file.

    Attributes:
        encoding: Name of Python's codec; a byte order mark of UTF-8 is left out by it.
        delimiter: The character between fields; of files without fields, a comma that nothing reads.
        notes: Sentences on what was recognised beside the usual.
    """

    encoding: str
    delimiter: str
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Return the name of the encoding for messages."""
        return "UTF-8" if self.encoding == "utf-8-sig" else self.encoding


def recognise_form(name: str, kind: str, form: TextForm, content: Callable[[], Iterable[bytes]]) -> Recognised:
    """Recognise how a file of text is to be read.

    Args:
        name: The file, for messages.
        kind: Its ending, without that of a compression.
        form: What the settings say.
        content: Function that gives the bytes of the file from their beginning.

    Raises:
        ConfigError: The settings name a delimiter for a file that has no fields.
        DataError: The file is UTF-16, or begins with the mark of another encoding than the settings name.
    """
    usual = USUAL.get(kind)
    if usual is None and form.delimiter is not None:
        raise ConfigError(
            "a delimiter is between the fields of csv and tsv files", where=name, hint="leave `data.delimiter` out"
        )
    head = _head(content())
    notes: list[str] = []
    encoding = _named_encoding(name, form.encoding, head) if form.encoding else None
    if encoding is None:
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(
                "the file is UTF-16, not UTF-8", where=f"{name}:1", hint="data.encoding=utf-16, or save it as UTF-8"
            )
        encoding = "utf-8-sig"
        if kind in (*USUAL, ".txt") and is_western(content):
            encoding = WESTERN
            notes.append(f"{name} is read as Windows-1252 (Latin-1), not UTF-8; `data.encoding` names another one")
    elif encoding != "utf-8-sig" and _reads_as_utf8(head):
        notes.append(f"{name} reads well as UTF-8, and `data.encoding` says {form.encoding}: look at its letters")
    delimiter = form.delimiter or usual or ","
    if form.delimiter is None and usual is not None:
        delimiter = guess_delimiter(head.decode(encoding, errors="replace"), usual, whole=len(head) < SAMPLE_BYTES)
        if delimiter != usual:
            of = NAMES[delimiter]
            notes.append(f"the fields of {name} are read as separated by {of}; `data.delimiter` names another one")
    return Recognised(encoding, delimiter, tuple(notes))


def _head(pieces: Iterable[bytes]) -> bytes:
    head = bytearray()
    for piece in pieces:
        head += piece
        if len(head) >= SAMPLE_BYTES:
            break
    return bytes(head[:SAMPLE_BYTES])


def _named_encoding(name: str, given: str, head: bytes) -> str:
    codec = codecs.lookup(given).name
    if codec in ("utf-8", "utf-8-sig"):
        return "utf-8-sig"
    if head.startswith(codecs.BOM_UTF8):
        raise DataError(
            f"the file begins with the mark of UTF-8, and `data.encoding` says {given}",
            where=f"{name}:1",
            hint="leave `data.encoding` out",
        )
    return codec


def _reads_as_utf8(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return "\0" not in text and not text.isascii()


def is_western(content: Callable[[], Iterable[bytes]]) -> bool:
    """Return True for text that is not UTF-8 and looks like Windows-1252 or Latin-1.

    Args:
        content: Function that gives the bytes from their beginning.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in content():
            decoder.decode(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return _looks_western(content())
    return False


def _looks_western(pieces: Iterable[bytes]) -> bool:
    high = western = multibyte = scanned = 0
    for piece in pieces:
        if b"\0" in piece:  # no text
            return False
        high += len(_HIGH.findall(piece))
        western += sum(len(_HIGH.findall(found)) for found in _WESTERN.findall(piece))
        multibyte += len(_MULTIBYTE.findall(piece))
        scanned += len(piece)
        if scanned >= SCANNED_BYTES:
            break
    return western >= 0.9 * high and 2 * multibyte <= 0.05 * high


def guess_delimiter(text: str, usual: str, *, whole: bool = True) -> str:
    """Return the character between the fields of the first records: the usual one, unless only another fits.

    Args:
        text: The beginning of a file.
        usual: The character that its ending stands for.
        whole: False if the text may end in the middle of a record.
    """
    width, share = _fit(text, usual, whole)
    if width > 1 and share >= 0.5:
        return usual
    fits = {other: _fit(text, other, whole) for other in CANDIDATES if other != usual}
    fitting = {other: (share, width) for other, (width, share) in fits.items() if width > 1 and share >= 0.9}
    return max(fitting, key=lambda other: fitting[other]) if fitting else usual


def _fit(text: str, delimiter: str, whole: bool) -> tuple[int, float]:
    """Return the number of fields of the header, and the share of the other records that have as many."""
    records = [len(cells) for cells in islice(_cells(text, delimiter), SAMPLE_RECORDS + 1) if cells]
    if not whole and len(records) <= SAMPLE_RECORDS:
        records = records[:-1]
    if not records:
        return 0, 0.0
    width, others = records[0], records[1:]
    return width, sum(count == width for count in others) / len(others) if others else 1.0


def _cells(text: str, delimiter: str) -> Iterator[list[str]]:
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
            if cells != ["sep=", ""]:
                yield cells
    except csv.Error:  # a field longer than the module takes
        return
