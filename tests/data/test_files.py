"""Files of rows: what was written is read back, every row knows its line, and a bad row costs nothing but itself."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import socket
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.data.files import read_file
from graftwerk.data.rows import Table
from graftwerk.data.sources import read_source
from graftwerk.errors import ConfigError, DataError, GraftwerkError, IntegrityError, ResourceError

# Everything that UTF-8 can write: no lone surrogates. NUL is a fault of its own below.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
cells = st.lists(st.tuples(text, text), min_size=1, max_size=15)


def read(tmp_path: Path, name: str, content: str | bytes) -> Table:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(path, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(cells, st.sampled_from([("csv", ","), ("tsv", "\t")]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_read_file_csv_and_tsv_roundtrip(
    folder: Path, rows: list[tuple[str, str]], kind: tuple[str, str], end: str, mark: bool
) -> None:
    ending, delimiter = kind
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "label"])
    writer.writerows(rows)
    table = read(folder, f"a.{ending}", ("\ufeff" if mark else "") + file.getvalue())
    assert table.bad == []
    assert [(row["text"], row["label"]) for row in table.rows] == rows
    assert table.columns == ("text", "label")


def lines_of(content: str) -> list[str]:
    """Lines as the csv module counts them."""
    return io.StringIO(content, newline="").readlines()


@given(cells)
def test_read_file_csv_rows_have_their_first_line_number(folder: Path, rows: list[tuple[str, str]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "label"])
    for at, (first, second) in enumerate(rows):
        writer.writerow([f"<{at}>{first}", second])
    table = read(folder, "a.csv", file.getvalue())
    lines = lines_of(file.getvalue())
    assert all(lines[line - 1].startswith(f'"<{at}>') for at, line in enumerate(table.lines))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    st.lists,
    max_leaves=5,
)
objects = st.lists(st.dictionaries(text, values, max_size=4), min_size=1, max_size=10)


@given(objects, st.booleans())
def test_read_file_jsonl_roundtrip(folder: Path, rows: list[dict[str, Any]], ascii_only: bool) -> None:
    content = "\n\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    table = read(folder, "a.jsonl", content)
    assert table.rows == rows
    assert table.lines == [1 + 2 * at for at in range(len(rows))]
    assert table.bad == []


@given(objects, st.sampled_from([None, 2]))
def test_read_file_json_roundtrip_with_line_numbers(
    folder: Path, rows: list[dict[str, Any]], indent: int | None
) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=False)
    table = read(folder, "a.json", content)
    assert table.rows == rows
    assert all(content.split("\n")[line - 1].lstrip(" [").startswith("{") for line in table.lines)
    assert len(set(table.lines)) == (len(rows) if indent else 1)


@given(st.binary(max_size=200), st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]))
def test_read_file_arbitrary_bytes_give_rows_or_data_error(folder: Path, content: bytes, ending: str) -> None:
    try:
        table = read(folder, f"any.{ending}", content)
    except DataError:
        return
    assert table.read == len(table.rows) + len(table.bad)


JSONL_FAULTS = {
    "broken": (b'{"text": "a"', "broken JSON"),
    "comma": (b'{"text": "a",}', "broken JSON"),
    "list": (b'["a"]', "a list, not an object"),
    "number": (b"17", "a number, not an object"),
    "null": (b"null", "null, not an object"),
    "utf8": (b'{"text": "\xff"}', "not UTF-8 (byte 0xff)"),
    "latin1": ('{"text": "café"}'.encode("latin-1"), "not UTF-8 (byte 0xe9)"),
    "nul": (b'{"text": "a\0b"}', "NUL"),
    "twice": (b'{"text": "a", "text": "b"}', "`text` more than once"),
    "nan": (b'{"text": NaN}', "NaN is not JSON"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "broken JSON"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"}", "broken JSON"),
}


@pytest.mark.parametrize("fault", JSONL_FAULTS)
def test_read_file_bad_jsonl_line_is_reported_and_others_are_read(tmp_path: Path, fault: str) -> None:
    line, reason = JSONL_FAULTS[fault]
    table = read(tmp_path, "a.jsonl", b'{"text": "first"}\n' + line + b'\n\n{"text": "last"}\n')
    assert [row["text"] for row in table.rows] == ["first", "last"]
    assert table.lines == [1, 4]
    assert [bad.line for bad in table.bad] == [2]
    assert reason in table.bad[0].reason
    assert table.read == 3


CSV_FAULTS = {
    "few": (b"alone", "has 1 fields where the header has 2"),
    "many": (b"a,b,c", "has 3 fields where the header has 2"),
    "utf8": (b"\xff\xfe,1", "not UTF-8 (byte 0xff)"),
    "nul": (b"a\0b,1", "NUL"),
    "after quote": (b'"a"b,1', "broken quoting"),
    "unclosed": (b'"a,1', "broken quoting"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_read_file_bad_csv_row_is_reported_and_others_are_read(tmp_path: Path, fault: str) -> None:
    line, reason = CSV_FAULTS[fault]
    table = read(tmp_path, "a.csv", b'text,label\n"two\nlines",1\n' + line + b"\nlast,0\n")
    assert [row["text"] for row in table.rows] == ["two\nlines", "last"]
    assert table.lines == [2, 5]
    assert [bad.line for bad in table.bad] == [4]
    assert reason in table.bad[0].reason


def test_read_file_long_csv_field_restores_field_size_limit(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)
    table = read(tmp_path, "a.csv", "text\n" + "x" * 300_000 + "\n")
    assert len(table.rows[0]["text"]) == 300_000
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"", "empty"),
        ("a.csv", b"text,text\na,b\n", "`text` more than once"),
        ("a.csv", "text,label\n".encode("utf-16"), "UTF-16"),
        ("a.csv", b"te\xffxt,label\n", "header is not UTF-8"),
        ("a.json", b'{"text": "a"}', "list of objects"),
        ("a.json", b'[{"text": "a"}', "comma or the end of the list"),
        ("a.json", b"[1 2]", "comma or the end of the list"),
        ("a.json", b"[] x", "after the end"),
        ("a.json", b"", "list of objects"),
        ("a.parquet", b"PAR1 no", "parquet"),
    ],
)
def test_read_file_unreadable_file_raises(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, name, content)
    assert reason in caught.value.what
    assert str(tmp_path / name) in str(caught.value.where)


def test_read_file_broken_json_list_raises_with_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.json", '[\n  {"text": "a"},\n  {"text": b}\n]')
    assert str(caught.value.where).endswith("a.json:3")


def test_read_file_parquet_places_are_row_numbers(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "ä", "label": 1}, {"text": None, "label": 0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet", "a.parquet")
    assert table.rows == rows
    assert table.where(1) == f"{tmp_path / 'a.parquet'} row 2"


def test_read_file_unknown_suffix_or_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in `\.docx`") as caught:
        read(tmp_path, "a.docx", "x")
    assert ".jsonl" in str(caught.value.hint)
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(ConfigError, match="a folder"):
        read_file(tmp_path / "f.csv", "f.csv")


def test_read_file_without_permission_raises_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    # tests may run as root, whom no mode stops
    monkeypatch.setattr("graftwerk.data.compressed.open_regular", refuse)
    with pytest.raises(ResourceError, match="Permission denied"):
        read_file(tmp_path / "a.csv", "a.csv")


def test_read_file_pipe_device_or_socket_raises(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.csv"))
        (tmp_path / "device.txt").symlink_to("/dev/zero")
        for name in ("pipe.jsonl", "socket.csv", "device.txt"):
            with pytest.raises(ConfigError, match="only regular files"):
                read_source(str(tmp_path / name))
            with pytest.raises(GraftwerkError) as caught:
                read_file(tmp_path / name, name)
            assert caught.value.exit_code in (3, 5)


def test_read_file_bomb_behind_honest_bytes_raises_early(tmp_path: Path) -> None:
    """Over the whole file it is no bomb: 200 MB come from 4 MB."""
    honest = gzip.compress(random.Random(0).randbytes(4 << 20), compresslevel=0)
    (tmp_path / "a.txt.gz").write_bytes(honest + 200 * gzip.compress(bytes(1 << 20)))
    assert_refused_within(tmp_path / "a.txt.gz", IntegrityError, 100 << 20)


def test_read_file_larger_than_the_memory_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"some text\n" * 100)
    monkeypatch.setattr("graftwerk.data.compressed.available", lambda: 1000)
    with pytest.raises(ResourceError, match="does not fit") as caught:
        read_file(tmp_path / "a.txt", "a.txt")
    assert "stream" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["rows", "values"])
def test_read_file_parquet_bomb_raises_early(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [None] * 30_000_000 if name == "rows" else ["long" * 10_000] * 4_000
    column = pyarrow.nulls(len(rows), pyarrow.string()) if name == "rows" else pyarrow.array(rows)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    del rows, column
    assert_refused_within(tmp_path / "a.parquet", IntegrityError, 50 << 20)


def test_read_file_malformed_zip_raises(tmp_path: Path) -> None:
    good = io.BytesIO()
    with zipfile.ZipFile(good, "w") as archive:
        archive.writestr("rows.txt", "a line\n" * 20)
    content = good.getvalue()
    assert read(tmp_path, "good.zip", content).rows[0] == {"text": "a line"}
    directory = content.index(b"PK\x01\x02")
    for position, value in [(directory + 6, 99), (directory + 10, 77), (8, 77), (directory + 42, 255), (4, 99)]:
        changed = bytearray(content)
        changed[position] = value  # version needed, method, local method, offset of the member
        expected_of_reader(tmp_path, "odd.zip", bytes(changed))
    for end in range(0, len(content), 7):
        expected_of_reader(tmp_path, "cut.zip", content[:end])
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"{number}.txt", b"")
    with pytest.raises(DataError, match="20,000"):
        read(tmp_path, "many.zip", many.getvalue())


@given(
    content=st.binary(max_size=300),
    position=st.integers(0, 10**6),
    ending=st.sampled_from([".csv.gz", ".txt.bz2", ".jsonl.xz", ".zip", ".parquet", ".json"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_read_file_damaged_file_raises_graftwerk_error(
    folder: Path, content: bytes, position: int, ending: str
) -> None:
    whole = bytearray(_WHOLE[ending]())
    at = position % len(whole)
    whole[at : at + len(content) // 10] = content[: len(content) // 10]
    for spoilt in (bytes(whole), content):
        expected_of_reader(folder, "spoilt" + ending, spoilt)


def _zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", "text,label\n" + "word,a\n" * 40)
    return held.getvalue()


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    held = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"] * 20, "label": [0, 1] * 20}), held)
    return held.getvalue()


_WHOLE: dict[str, Callable[[], bytes]] = {
    ".csv.gz": lambda: gzip.compress(b"text,label\n" + b"word,a\n" * 40),
    ".txt.bz2": lambda: bz2.compress(b"a line\n" * 40),
    ".jsonl.xz": lambda: lzma.compress(b'{"text": "a"}\n' * 40),
    ".zip": _zipped,
    ".parquet": _parquet,
    ".json": lambda: b'[{"text": "a", "label": 10000000000000000000000, "x": 1e999}, {"text": "\\ud800"}]',
}


def expected_of_reader(folder: Path, name: str, content: bytes) -> None:
    """Rows, or an error with a code of its own."""
    with suppress(DataError, ConfigError, IntegrityError):
        read(folder, name, content)


def assert_refused_within(path: Path, error: type[GraftwerkError], most: int) -> None:
    """Python's own memory is measured; a test that needs none of torch's has no other."""
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read_file(path, path.name)
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
