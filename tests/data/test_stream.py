"""Streamed rows are those of the same files in memory: the rows, their places, what is found, what is refused."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from graftwerk.data import stream
from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, DataError, IntegrityError
from graftwerk.tasks.base import Splits
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.translation import Translation

CSV = '''text,label
"a tree, tall
and old",1

"he said ""no""",0
plain 5" screen,1
"broken"x,0
too,many,fields
last one,0
'''
JSONL = "".join(
    [
        *(json.dumps({"text": f"text {number}", "label": number % 3}) + "\n" for number in range(23)),
        "\n",
        "{\n",
        "[1]\n",
    ]
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 3)


def write(path: Path, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def read(source: Any, *, streaming: bool, task: Any = None, **changes: Any) -> Splits:
    settings = {"train": source, "validation": None, "on_bad_row": "skip", "streaming": streaming, **changes}
    return (task or Classification()).read(DataSettings.model_validate(settings))


def places(splits: Splits) -> list[tuple[Any, str]]:
    return [(row, splits.where["train"](at)) for at, row in enumerate(splits.train)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl.gz", JSONL),
        ("a.csv", CSV),
        ("a.csv", CSV.replace("\n", "\r\n")),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode() + b"caf\xe9,1\n"),
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.csv", CSV + '"never closed,1\nthis is a row,1\n'),
    ],
)
def test_stream_rows_places_and_bad_rows_equal_in_memory(tmp_path: Path, name: str, content: str | bytes) -> None:
    source = write(tmp_path / name, content)
    one, other = (read(source, streaming=streaming) for streaming in (True, False))
    assert len(one.train) > 2
    assert places(one) == places(other)
    assert one.labels == other.labels
    skipped = [[it for it in splits.issues if it.code == "rows-skipped"] for splits in (one, other)]
    assert skipped[0] == skipped[1]


@pytest.mark.parametrize("text_rows", ["line", "document"])
def test_stream_text_by_line_or_document_equals_in_memory(tmp_path: Path, text_rows: str) -> None:
    source = write(tmp_path / "a.txt", "one\ntwo\r\n\n \nthree\u2028still three\nfour\n\nfive")
    one, other = (read(source, streaming=streaming, task=Causal(), text_rows=text_rows) for streaming in (True, False))
    assert places(one) == places(other)
    assert len(one.train) == (5 if text_rows == "line" else 3)


def test_stream_several_files_filter_and_max_rows_equal_in_memory(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", JSONL)
    write(tmp_path / "b.jsonl", JSONL.replace("text 1", "other 1"))
    for source in (str(tmp_path), f"{tmp_path}/*.jsonl", [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]):
        one, other = (read(source, streaming=it, filter={"label": [0, 2]}) for it in (True, False))
        assert places(one) == places(other)
    first = read(str(tmp_path), streaming=True, max_train_rows=8)
    assert list(first.train) == list(read(str(tmp_path), streaming=False).train)[:8]
    fewer = read(str(tmp_path), streaming=True, max_train_rows=99, filter={"label": [0, 2, 7]})
    assert {"fewer-rows", "filter-unmatched"} <= {it.code for it in fewer.issues}


def test_stream_bad_row_raises_with_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", JSONL)
    with pytest.raises(DataError, match="2 of 25 rows") as caught:
        read(source, streaming=True, on_bad_row="fail")
    assert f"{source}:25: broken JSON" in str(caught.value.where)


def test_stream_bad_rows_beyond_five_are_counted_in_the_message(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", JSONL + "{broken\n" * 7)
    with pytest.raises(DataError) as caught:
        read(source, streaming=True, on_bad_row="fail")
    assert str(caught.value.where).count("a.jsonl:") == 5
    with pytest.raises(DataError) as in_memory:
        read(source, streaming=False, on_bad_row="fail")
    assert str(caught.value) == str(in_memory.value)


def test_stream_issues_equal_in_memory(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(40)]
    rows += [{"text": "Text  3", "label": "b"}, {"text": "text 4", "label": "b"}, {"text": "alone", "label": "c"}]
    train = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    test = write(tmp_path / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:5]))
    one, other = (read(train, streaming=it, test=test) for it in (True, False))
    codes = {it.code: it.rows for it in one.issues}
    assert codes.pop("streamed") == 43
    assert codes.pop("conflicting-labels") == 1  # here only the row that contradicts; in memory the one before, too
    expected = {it.code: it.rows for it in other.issues}
    assert expected.pop("conflicting-labels") == 2
    assert codes == expected
    assert {"duplicates", "leakage", "rare-classes", "absent-classes"} == set(codes)
    assert next(it for it in one.issues if it.code == "leakage").grave


def test_stream_fingerprint_covers_every_row(tmp_path: Path) -> None:
    before = read(write(tmp_path / "a.jsonl", JSONL), streaming=True).fingerprint
    assert read(write(tmp_path / "b.jsonl", JSONL), streaming=True).fingerprint == before
    assert read(write(tmp_path / "b.jsonl", JSONL.replace("text 9", "text x")), streaming=True).fingerprint != before


def test_stream_shortened_file_raises(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", JSONL)
    rows = read(source, streaming=True).train
    assert rows[22] == {"text": "text 22", "label": "1"}
    write(tmp_path / "a.jsonl", "".join(JSONL.splitlines(keepends=True)[:9]))
    with pytest.raises(DataError, match="9 rows where 23 were counted"):
        list(rows)


def test_stream_iteration_uses_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 100)
    lines = (json.dumps({"text": f"{number} {'x' * 4000}", "label": number % 2}) + "\n" for number in range(6000))
    rows = read(write(tmp_path / "a.jsonl", "".join(lines)), streaming=True).train
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows) == 6000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000 < 6000 * 4000  # pieces of 1 MB, and a hundred rows


def test_stream_bomb_raises_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwerk.data.compressed.FREE_BYTES", 1000)
    with pytest.raises(IntegrityError, match="expands to more than"):
        read(write(tmp_path / "a.txt.gz", ("x" * 1000 + "\n") * 3000), streaming=True, task=Causal())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"validation": 0.1}, "give `validation` a source of its own"),
        ({"test": 5}, "give `test` a source of its own"),
        ({"streaming": False, "buffer_rows": 5}, "does nothing without"),
        ({"train": [{"source": "a.jsonl"}]}, "lists several sets"),
        ({"augment": ["word_dropout"]}, "graftwerk augment"),
    ],
)
def test_data_settings_invalid_with_streaming_raise(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataSettings.model_validate({"train": "a.jsonl", "validation": None, "streaming": True, **changes})


@pytest.mark.parametrize("source", ["hub://owner/name", "a.parquet", "a.json", {"source": "a.de", "target": "a.en"}])
def test_stream_source_without_lines_raises(tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.parquet", "a.json"):
        Path(name).write_text("")
    with pytest.raises(ConfigError, match="not read row by row"):
        read(source, streaming=True)


def test_stream_both_directions_raises(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"source": "a", "target": "b"}\n')
    task = Translation(source_lang="de_DE", target_lang="en_XX", both_directions=True)
    with pytest.raises(ConfigError, match="not turned around"):
        read(source, streaming=True, task=task)


def test_stream_same_source_held_out_raises(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", JSONL)
    with pytest.raises(ConfigError, match="the same source"):
        read(source, streaming=True, validation=source)
