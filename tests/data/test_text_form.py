"""Encodings and delimiters: recognised and reported, or named and checked; the same in memory and in a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftwerk.config import RunConfig
from graftwerk.data.row_source import open_source
from graftwerk.data.settings import DataSettings
from graftwerk.data.sources import read_source
from graftwerk.data.stream import rows_of
from graftwerk.data.text_form import RECOGNISE, TextForm, guess_delimiter, is_western
from graftwerk.errors import ConfigError, DataError

GERMAN = "Überschrift;Größe;Note\nSchöne Grüße aus Köln, Max;klein;gut\nEin Café für 3 € – „fein“;;schlecht\n"
ROWS = [
    {"Überschrift": "Schöne Grüße aus Köln, Max", "Größe": "klein", "Note": "gut"},
    {"Überschrift": "Ein Café für 3 € – „fein“", "Größe": "", "Note": "schlecht"},
]


def streamed(path: Path, form: TextForm = RECOGNISE) -> tuple[list[Any], list[str]]:
    notes: list[str] = []
    return [row for _, row in rows_of(path, {}, form, notes.append)], notes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GERMAN.encode("cp1252"), ["Windows-1252", "semicolons"]),
        (GERMAN.encode(), ["semicolons"]),
        (b"\xef\xbb\xbf" + GERMAN.encode(), ["semicolons"]),
        (b"sep=;\r\n" + GERMAN.replace("\n", "\r\n").encode("cp1252"), ["Windows-1252", "semicolons"]),
        (GERMAN.replace(";", "\t").encode("cp1252"), ["Windows-1252", "tabs"]),
        (GERMAN.replace(";", "|").encode(), ["vertical bars"]),
    ],
    ids=["latin", "utf8", "mark", "excel", "tabs", "bars"],
)
def test_read_recognises_encoding_and_delimiter_and_says_so(tmp_path: Path, content: bytes, said: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    table = read_source(str(path))
    assert table.rows == ROWS
    assert table.bad == []
    assert [any(word in note for word in said) for note in table.notes] == [True] * len(said)
    assert streamed(path) == (ROWS, list(table.notes))
    source = open_source(path)
    assert [row.cells for row in source if row] == ROWS
    assert source.notes == table.notes


@pytest.mark.parametrize(
    "content",
    [
        b"text,label\na;b;c,1\n",
        "text\nä; ö; ü\n".encode(),
        b"text\tb,label\n1,2\n",
        b"text,label\nbroken,row,here\ngood,1\nfine,2\n",
        b"text,label\n\xc3\xa4 and \xff,1\n",
    ],
)
def test_read_of_a_usual_file_says_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    table = read_source(str(path))
    assert table.notes == ()
    assert streamed(path)[1] == []
    assert "Ã" not in str(table.rows)


@pytest.mark.parametrize(
    ("content", "western"),
    [
        ("Grüße, señor Ångström".encode("latin-1"), True),
        ("50 € – „gut“".encode("cp1252"), True),
        ("Grüße".encode(), False),
        (b"plain", False),
        ("Grüße und Küsse ".encode() * 20 + b"\xfc", False),
        ("Привет, мир".encode("cp1251"), False),
        (bytes(range(128, 256)), False),
        (b"\xff\xfe\xff", False),
    ],
)
def test_is_western_tells_latin_letters_from_damage_and_other_scripts(content: bytes, western: bool) -> None:
    assert is_western(lambda: (content[:7], content[7:])) is western


def test_guess_delimiter_prefers_the_usual_unless_only_another_fits() -> None:
    assert guess_delimiter("a, b;c\n1;2\n3;4\n5;6\n", ",") == ";"
    assert guess_delimiter("a,b\n1,2\n", "\t") == ","
    assert guess_delimiter("a;b\n1;2;3\n1;2;3\n", ",") == ","
    assert guess_delimiter('a;b\n"1;\n2";3\n4;5', ",", whole=False) == ";"
    assert guess_delimiter("", ",") == ","


def test_given_encoding_and_delimiter_are_followed_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text:label\nŁódź:1\n".encode("cp1250"))
    form = TextForm(delimiter=":", encoding="cp1250")
    assert read_source(str(path), form=form).rows == [{"text": "Łódź", "label": "1"}]
    assert streamed(path, form) == ([{"text": "Łódź", "label": "1"}], [])
    assert read_source(str(path)).notes == ()  # Polish is not Western
    path.write_bytes("text:label\nGrüße:1\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"data\.encoding=utf-16"):
        read_source(str(path))
    form = TextForm(delimiter=":", encoding="utf-16")
    assert read_source(str(path), form=form).rows == streamed(path, form)[0] == [{"text": "Grüße", "label": "1"}]
    path.write_bytes("text,label\nGrüße,1\n".encode())
    notes = read_source(str(path), form=TextForm(encoding="latin-1")).notes
    assert len(notes) == 1
    assert "reads well as UTF-8" in notes[0]
    path.write_bytes(b"\xef\xbb\xbftext,label\na,1\n")
    with pytest.raises(DataError, match="mark of UTF-8"):
        read_source(str(path), form=TextForm(encoding="cp1252"))
    path.write_bytes(b"text,label\na\x81,1\nb,2\n")
    table = read_source(str(path), form=TextForm(encoding="cp1252"))
    assert [bad.reason for bad in table.bad] == ["is not cp1252 (byte 0x81)"]


def test_given_delimiter_for_a_file_without_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(ConfigError, match="csv and tsv"):
            read_source(str(tmp_path / name), form=TextForm(delimiter=";"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("delimiter=ab", "no character that separates"),
        ("encoding=utf-99", "no encoding"),
        ("encoding=base64", "of text"),
    ],
)
def test_settings_of_the_form_are_checked(given: str, said: str) -> None:
    tree = {"model": "m", "data": {"train": "rows.csv"}, "method": "lora"}
    with pytest.raises(ConfigError, match=said):
        RunConfig.build(tree, [f"data.{given}"])
    assert RunConfig.build(tree, ["data.delimiter=tab"]).data.delimiter == "\t"
    assert DataSettings(train="a", delimiter="\\t").delimiter == "\t"
