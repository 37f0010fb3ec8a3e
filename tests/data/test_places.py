"""More places that rows come from: text, aligned files, folders, patterns, lists, compressed files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pytest

from graftwerk.data.compressed import FREE_BYTES
from graftwerk.data.fields import text_part
from graftwerk.data.rows import resolve_bad_rows
from graftwerk.data.settings import DataSettings, Pair
from graftwerk.data.sources import read_source
from graftwerk.data.text_form import TextForm
from graftwerk.errors import ConfigError, DataError, IntegrityError
from tests.data.reading import read_rows

CSV = b"text,label\ngood,1\nbad,0\n"


def texts(source: Any, **settings: Any) -> list[str]:
    return [row["text"] for row in read_source(source, **settings).rows]


# text


def test_read_source_text_by_line_or_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\u2028still two\n\n  \nthree\n".encode())
    table = read_source(str(path))
    assert [row["text"] for row in table.rows] == ["one", "two\u2028still two", "three"]
    assert table.where(2) == f"{path}:5"
    documents = read_source(str(path), form=TextForm("document"))
    assert [row["text"] for row in documents.rows] == ["one\ntwo\u2028still two", "three"]
    assert documents.lines == [1, 5]


def test_read_source_damaged_text_lines_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe4d\nnu\0l\n")
    table = read_source(str(tmp_path / "a.txt"))
    assert [row["text"] for row in table.rows] == ["good"]
    assert [(bad.line, bad.reason[:10]) for bad in table.bad] == [(2, "is not UTF"), (3, "holds a NU")]


# pairs


def pair(folder: Path, source: str, target: str) -> Pair:
    (folder / "a.de").write_text(source, encoding="utf-8")
    (folder / "a.en").write_text(target, encoding="utf-8")
    return Pair(source=str(folder / "a.de"), target=str(folder / "a.en"))


def test_read_rows_aligned_files_pair_lines(tmp_path: Path) -> None:
    files = pair(tmp_path, "Ja\nNein\n\n", "Yes\nNo\nEmpty on the other side\n")
    table = read_rows(files, parts={"source": text_part, "target": text_part})
    assert table.rows == [{"source": "Ja", "target": "Yes"}, {"source": "Nein", "target": "No"}]
    assert table.where(1) == f"{files.source}:2"
    with pytest.raises(DataError, match="1 of 3 rows"):
        resolve_bad_rows(table, "fail")


def test_read_source_aligned_files_of_unequal_length_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.de has 3 lines, .*a\.en has 2"):
        read_source(pair(tmp_path, "a\nb\nc", "a\nb\n"))


# several files


def test_read_rows_several_files_keep_file_and_line(tmp_path: Path) -> None:
    for name, content in (("b.jsonl", '{"text": "b1"}\n{"text": "b2"}\n'), ("a.jsonl", '\n{"text": "a1"}\nbroken\n')):
        (tmp_path / name).write_text(content)
    (tmp_path / "c.jsonl").write_text("")
    (tmp_path / "README").write_text("about")
    listed = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]
    table = read_rows(listed, parts={"text": text_part})
    assert [row["text"] for row in table.rows] == ["b1", "b2", "a1"]
    assert [table.where(at) for at in range(3)] == [f"{listed[0]}:1", f"{listed[0]}:2", f"{listed[1]}:2"]
    assert [table.at(bad.line) for bad in table.bad] == [f"{listed[1]}:3"]
    assert table.read == 4
    folder = read_source(str(tmp_path))
    assert [row["text"] for row in folder.rows] == ["a1", "b1", "b2"]  # by name, not as the disk lists them
    assert folder.where(2) == f"{tmp_path / 'b.jsonl'}:2"
    assert folder.passed_over == ("README",)
    assert texts(str(tmp_path / "?.jsonl")) == ["a1", "b1", "b2"]


def test_read_source_without_rows_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file of rows"):
        read_source(str(tmp_path))
    (tmp_path / "a.csv").write_bytes(CSV)
    (tmp_path / "b.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ConfigError, match=r"several kinds \(1 x \.csv, 1 x \.jsonl\)"):
        read_source(str(tmp_path))
    with pytest.raises(ConfigError, match="no file matches"):
        read_source(str(tmp_path / "*.tsv"))
    with pytest.raises(DataError, match="has the columns other"):
        read_source([str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")])


# compressed


def write(path: Path, content: bytes) -> Path:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../inner.csv", content)  # the name leads nowhere: nothing is unpacked
    else:
        path.write_bytes(pack[path.suffix](content))
    return path


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.bz2", "a.csv.xz", "a.zip"])
def test_read_source_compressed_is_read_and_bomb_raises(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, CSV)
    assert texts(str(path)) == ["good", "bad"]
    assert read_source(str(path)).where(1) == f"{path}:3"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError):
        read_source(str(path))
    with pytest.raises(IntegrityError, match="expands to more than 200 times"):
        read_source(str(write(tmp_path / name, b"text\n" + b"\0" * (FREE_BYTES + 1))))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_read_source_zip_of_several_files_raises(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", CSV)
        archive.writestr("__MACOSX/a.csv", b"")
    assert texts(str(tmp_path / "a.zip")) == ["good", "bad"]
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("b.csv", CSV)
    with pytest.raises(DataError, match="holds 2 files"):
        read_source(str(tmp_path / "a.zip"))


# settings


def test_data_settings_parse_pairs_lists_and_sets() -> None:
    def settings(train: Any, **more: Any) -> DataSettings:
        return DataSettings.model_validate({"train": train, **more})

    assert settings({"source": "a.de", "target": "a.en"}).source == Pair(source="a.de", target="a.en")
    assert settings(["a.csv", "b.csv"]).source == ["a.csv", "b.csv"]
    sets = settings([{"source": "a.de", "target": "a.en", "weight": 2}, {"source": "b.csv"}], temperature=float("inf"))
    assert [each.weight for each in sets.sets] == [2, 1]
    assert sets.sets[0].rows_from == Pair(source="a.de", target="a.en")
    assert json.loads(json.dumps(sets.model_dump(mode="json"), allow_nan=False))["temperature"] == "infinity"
    for wrong in ({"train": "a.csv", "temperature": 2}, {"train": [{"source": ["a"], "target": "b"}]}):
        with pytest.raises(ValueError, match=r"temperature|one `source`"):
            DataSettings.model_validate(wrong)
