"""From a source to rows by their parts: columns, filters, bad rows counted or fatal, hub data sets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.data.fields import label_part, text_part
from graftwerk.data.rows import Table, resolve_bad_rows
from graftwerk.data.settings import source_name
from graftwerk.data.sources import is_hub_id, name_parts, read_source
from graftwerk.data.text_form import TextForm
from graftwerk.errors import ConfigError, DataError, ResourceError
from tests.data.reading import read_rows

PARTS = {"text": text_part, "label": label_part}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_read_rows_renames_columns_and_drops_others(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"review": "good", "stars": 5, "who": "x"}])
    table = read_rows(source, parts=PARTS, columns={"text": "review", "label": "stars"})
    assert table.rows == [{"text": "good", "label": "5"}]
    assert table.where(0) == f"{source}:1"


def test_read_rows_missing_column_raises_with_suggestion(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"txet": "good", "label": 1}])
    with pytest.raises(ConfigError) as caught:
        read_rows(source, parts=PARTS)
    assert "no column `text`" in caught.value.what
    assert "did you mean `txet`?" in str(caught.value.hint)
    assert "txet, label" in str(caught.value.hint)


def test_name_parts_unseparated_fields_raises_with_delimiter_hint(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\ngood, bad;1\n")
    table = read_source(str(tmp_path / "a.csv"), form=TextForm(delimiter=","))
    with pytest.raises(ConfigError) as caught:
        name_parts(table, parts=PARTS)
    assert "`data.delimiter` names it" in str(caught.value.hint)


def test_read_rows_unknown_field_raises_with_suggestion(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "good", "label": 1}])
    with pytest.raises(ConfigError, match="no part `lable`") as caught:
        read_rows(source, parts=PARTS, columns={"lable": "label"})
    assert "did you mean `label`?" in str(caught.value.hint)


def test_read_rows_optional_field_is_read_if_present(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "good", "label": 1}])
    assert read_rows(source, parts={"text": text_part}, optional={"label": label_part}).rows == [
        {"text": "good", "label": "1"}
    ]
    assert read_rows(source, parts={"text": text_part}, optional={"other": label_part}).rows == [{"text": "good"}]


ROWS = [
    {"text": "a", "label": "x", "n": 1, "b": True, "s": "one"},
    {"text": "b", "label": "x", "n": 2.0, "b": False, "s": "two"},
    {"text": "c", "label": "x", "n": "2", "b": "true", "s": "One"},
    {"text": "d", "label": "x", "n": None, "b": None, "s": "three"},
]


@pytest.mark.parametrize(
    ("filter", "kept"),
    [
        ({"n": 2}, "bc"),
        ({"n": [1, 2]}, "abc"),
        ({"b": True}, "ac"),
        ({"s": "one"}, "a"),
        ({"s": ["one", "three"]}, "ad"),
        ({"s": ["one", "two"], "n": 2}, "b"),
    ],
)
def test_read_rows_filter_compares_numbers_and_text_by_type(tmp_path: Path, filter: Any, kept: str) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    assert "".join(row["text"] for row in read_rows(source, parts=PARTS, filter=filter).rows) == kept


def test_read_rows_filter_without_match_raises_with_frequent_values(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="most frequent values of `s`: 'one' \\(1\\)"):
        read_rows(source, parts=PARTS, filter={"s": "ten"})
    with pytest.raises(ConfigError, match="no column `sort`"):
        read_rows(source, parts=PARTS, filter={"sort": "ten"})


def test_read_rows_unmatched_filter_values_are_listed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    assert read_rows(source, parts=PARTS, filter={"s": ["one", "ten"], "n": [1, 9]}).unmatched == ("s: ten", "n: 9")
    assert read_rows(source, parts=PARTS, filter={"s": ["one", "two"]}).unmatched == ()


def test_read_rows_filtered_row_is_not_validated(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "", "label": 1, "keep": 0}, {"text": "a", "label": 1, "keep": 1}])
    table = read_rows(source, parts=PARTS, filter={"keep": 1})
    assert table.bad == []
    assert table.lines == [2]


BAD = [
    ({"text": "", "label": 1}, "`text` is empty"),
    ({"text": " \t\u00a0", "label": 1}, "`text` is empty"),
    ({"label": 1}, "`text` is missing"),
    ({"text": None, "label": 1}, "`text` is missing"),
    ({"text": 7, "label": 1}, "`text` is the number 7, not text"),
    ({"text": ["a"], "label": 1}, "`text` is a list, not text"),
    ({"text": "a\0b", "label": 1}, "`text` holds a NUL"),
    ({"text": "\ud800", "label": 1}, "`text` holds half of a surrogate pair"),
    ({"text": "a"}, "`label` is missing"),
    ({"text": "a", "label": None}, "`label` is missing"),
    ({"text": "a", "label": "  "}, "`label` is empty"),
    ({"text": "a", "label": [1]}, "`label` is a list, not a class"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_resolve_bad_rows_fail_raises_with_file_and_line(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"text": "good", "label": 0}
    source = write(tmp_path / "a.jsonl", [good, row, good])
    table = read_rows(source, parts=PARTS)
    with pytest.raises(DataError) as caught:
        resolve_bad_rows(table, "fail")
    assert f"{source}:2: {reason}" in str(caught.value.where)
    assert "1 of 3 rows" in caught.value.what
    assert caught.value.exit_code == 3
    [finding] = resolve_bad_rows(table, "skip")
    assert (finding.code, finding.rows) == ("rows-skipped", 1)
    assert table.lines == [1, 3]


def test_resolve_bad_rows_many_are_counted_and_first_five_shown(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "", "label": 1}] * 30 + [{"text": "a", "label": 1}])
    with pytest.raises(DataError) as caught:
        resolve_bad_rows(read_rows(source, parts=PARTS), "fail")
    assert "30 of 31" in caught.value.what
    assert str(caught.value.where).count("is empty") == 5
    assert "and 25 more" in str(caught.value.where)


rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"text": st.text("ab ", max_size=3), "label": st.sampled_from([0, "x", None, ""])}),
        st.just("broken"),
    ),
    min_size=1,
    max_size=30,
)


@given(rows)
def test_read_rows_every_row_is_read_or_reported_bad(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("".join("{\n" if row == "broken" else json.dumps(row) + "\n" for row in rows))
    table = read_rows(str(path), parts=PARTS)
    good = [
        at
        for at, row in enumerate(rows, 1)
        if row != "broken" and row["text"].strip() and row["label"] not in (None, "")
    ]
    assert table.lines == good
    assert sorted([*table.lines, *(bad.line for bad in table.bad)]) == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1, "1"),
        (1.0, "1"),
        ("1", "1"),
        (-3, "-3"),
        (0.5, "0.5"),
        (True, "true"),
        (False, "false"),
        (" pos ", "pos"),
        ("ü", "ü"),
    ],
)
def test_label_part_normalizes_names(value: Any, name: str) -> None:
    assert label_part(value) == name


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "", "\n", [], {}, b"x"])
def test_label_part_invalid_value_raises(value: Any) -> None:
    with pytest.raises(ValueError):
        label_part(value)


# the hub


def test_is_hub_id_rejects_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert is_hub_id("owner/name")
    assert is_hub_id("owner/name/configuration:test")
    for path in (
        "owner/here",
        "name.csv",
        "owner/name.jsonl",
        "./owner/name",
        "~/x/y",
        "pkg://owner/name",
        "/owner/name",
        "one",
    ):
        assert not is_hub_id(path), path


def test_read_rows_hub_offline_raises_resource_error() -> None:
    with pytest.raises(ResourceError, match=r"no local file `owner/absent`.*cannot be reached") as caught:
        read_rows("owner/absent", parts=PARTS)
    assert caught.value.exit_code == 5


def test_read_rows_hub_data_set_gives_class_names_and_row_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    content = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)

    def load(name: str, configuration: str | None, split: str) -> Any:
        asked.append((name, configuration, split))
        return content

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_rows("hub://owner/name", parts=PARTS)
    assert table.rows == [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
    assert table.at(table.bad[0].line) == "hub://owner/name row 3"
    read_rows("owner/name/plain:test", parts=PARTS, split="train")
    assert asked == [("owner/name", None, "train"), ("owner/name", "plain", "test")]


def test_read_rows_unknown_hub_split_raises_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match="Should be one of"):
        read_rows("owner/name:tset", parts=PARTS)


def test_read_rows_imports_no_heavy_library(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "good", "label": 1}])
    code = (
        "import sys\n"
        "from graftwerk.data import batching, checks, split\n"
        "from graftwerk.data.sources import name_parts, read_source\n"
        "from graftwerk.data.fields import text_part\n"
        f"name_parts(read_source({source!r}), parts={{'text': text_part}})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'numpy', 'accelerate', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_table_at_returns_file_and_line() -> None:
    assert Table("s", "a.csv", [], []).at(3) == "a.csv:3"


def test_shown_names_three_sources_and_counts_the_rest() -> None:
    assert source_name(["a.csv", "b.csv", "c.csv"]) == "a.csv, b.csv, c.csv"
    assert source_name(["a.csv", "b.csv", "c.csv", "d.csv", "e.csv"]) == "a.csv, b.csv, c.csv, and 2 more"
