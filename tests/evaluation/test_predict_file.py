"""Prediction for many rows: in order, with their own columns, in bounded memory, stopped and gone on with."""

from __future__ import annotations

import csv
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from graftwerk.data.row_source import SourceRow
from graftwerk.errors import ConfigError, ConflictError, DataError, RunInterrupted
from graftwerk.evaluation.answer_files import Columns, written_rows
from graftwerk.evaluation.evaluate import predict
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.evaluation.predict_file import predict_file
from graftwerk.evaluation.stream import GROWTH, Answered, chunks_of, predict_stream
from graftwerk.training.train import train

BATCH = 4


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, glosses: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(
        {
            "model": str(tiny_encoder),
            "data": {"train": str(glosses), "validation": 24},
            "method": {"name": "lora", "r": 2},
            "training": {"max_steps": 3, "report_to": ["jsonl"], "learning_rate": 1e-2},
            "output_dir": str(folder / "run"),
        }
    ).folder


@pytest.fixture(scope="module")
def writer(text_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a task that writes."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps({"document": f"a bird {n}", "summary": f"bird {n}"}) + "\n" for n in range(8)))
    return train(
        {
            "model": str(text_model("t5")),
            "task": "summarization",
            "data": {"train": str(rows), "validation": None},
            "method": {"name": "lora", "r": 2},
            "training": {"max_steps": 1, "report_to": ["jsonl"]},
            "evaluation": {"generate": False, "max_new_tokens": 4, "generation_batch_size": 2},
            "output_dir": str(tmp_path_factory.mktemp("runs") / "run"),
        }
    ).folder


def texts(count: int) -> list[str]:
    return [f"a bird of {'many ' * (n * 7 % 5)}colours {n}" for n in range(count)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """31 rows of csv: one with an empty cell, one with a field too many, one that needs quotes."""
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        cells = csv.writer(file)
        cells.writerow(["id", "text", "label"])
        for number, text in enumerate(texts(31)):
            odd = {3: "", 5: 'a "bird",\nflying'}.get(number, text)
            cells.writerow([number, odd, "x", *(["more"] if number == 9 else [])])
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -- every row, in order


def test_predict_file_answers_every_row_in_order_with_its_own_columns(run: Path, rows: Path, tmp_path: Path) -> None:
    said = predict_file(run, rows, tmp_path / "out.csv", batch_size=BATCH)
    found = read(tmp_path / "out.csv")
    assert [row["id"] for row in found] == [str(n) if n != 9 else "" for n in range(31)]
    assert found[5]["text"] == 'a "bird",\nflying'
    assert {row["label"] for row in found} == {"x", ""}  # the rows' own, not ours
    empty = {n: row["reason"] for n, row in enumerate(found) if not row["predicted_label"]}
    assert empty == {3: "`text` is empty", 9: "has 4 fields where the header has 3"}
    assert (said["rows"], said["answered"], said["unanswered"]) == (31, 29, 2)
    assert said["notes"] == [
        "the rows have columns of these names themselves: `label` is in `predicted_label`",
        (
            "2 of 31 rows have no answer: `text` is empty (1); has 4 fields where the header has 3 (1);"
            f" the first is {rows}:5"
        ),
    ]
    one = predict(run, found[0]["text"])["predictions"][0]
    assert found[0]["predicted_label"] == one["label"]
    for name, score in one["scores"].items():
        assert float(found[0][f"score_{name}"]) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".tsv"])
def test_predict_file_writes_the_form_of_its_ending(run: Path, rows: Path, tmp_path: Path, ending: str) -> None:
    predict_file(run, rows, tmp_path / "out.csv", batch_size=BATCH)
    path = tmp_path / f"out{ending}"
    predict_file(run, rows, path, batch_size=BATCH)
    expected = read(tmp_path / "out.csv")
    if ending == ".parquet":
        found = pyarrow.parquet.read_table(path).to_pylist()
        assert isinstance(found[0]["score_noun.animal"], float)
    elif ending == ".jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert found[0]["scores"]["noun.animal"] == float(expected[0]["score_noun.animal"])
        assert found[3]["scores"] is None
    else:
        with path.open(newline="") as file:
            found = list(csv.DictReader(file, delimiter="\t"))
    for row, other in zip(found, expected, strict=True):
        for name in ("id", "text", "label", "predicted_label", "reason"):
            assert (row[name] or "") == other[name]


def test_predict_file_keeps_the_types_of_parquet_and_of_json(run: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "n": n, "tags": [n], "more": None if n else 0.5} for n, text in enumerate(texts(6))]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict_file(run, source, tmp_path / "a.parquet", batch_size=BATCH)
    first = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert [str(first.schema.field(name).type) for name in ("n", "tags", "more")] == ["int64", "string", "double"]
    assert first["tags"][5].as_py() == "[5]"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    predict_file(run, tmp_path / "rows.parquet", tmp_path / "b.parquet", batch_size=BATCH)
    second = pyarrow.parquet.read_table(tmp_path / "b.parquet")
    assert second["tags"].to_pylist() == [row["tags"] for row in rows]
    assert second["label"].to_pylist() == first["label"].to_pylist()


def test_predict_file_without_any_answer_gives_the_reasons(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.txt"
    source.write_text("\n\n  \n")
    said = predict_file(run, source, tmp_path / "out.csv")
    assert said["unanswered"] == 3
    assert read(tmp_path / "out.csv") == [{"text": text, "reason": "the text is empty"} for text in ("", "", "  ")]


def test_predict_file_for_a_task_that_writes_gives_its_output(writer: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.txt"
    source.write_text("a bird\n\na fish in the sea\nbread\n")
    said = predict_file(writer, source, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in found] == ["a bird", "", "a fish in the sea", "bread"]
    assert found[1]["output"] is None
    assert said["unanswered"] == 1
    alone = predict(writer, ["a fish in the sea"])["predictions"][0]["output"]
    assert found[2]["output"] == alone


# -- stopped and gone on with


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_predict_file_resumes_a_file_cut_anywhere_to_the_same_bytes(
    run: Path, rows: Path, tmp_path: Path, ending: str
) -> None:
    whole = tmp_path / f"whole{ending}"
    predict_file(run, rows, whole, batch_size=BATCH)
    content = whole.read_bytes()
    for cut in (0, 30, len(content) // 3, len(content) // 2, len(content) - 1, len(content)):
        path = tmp_path / f"cut{cut}{ending}"
        path.write_bytes(content[:cut])
        said = predict_file(run, rows, path, batch_size=BATCH, resume=True)
        assert path.read_bytes() == content, cut
        assert (said["rows"], said["unanswered"]) == (31, 2)
        assert (said["resumed_at"] > 0) == (cut > len(content) // 4), cut
    assert said["resumed_at"] == 31


def test_predict_file_refuses_to_go_on_with_other_rows_or_answers(run: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    predict_file(run, rows, path, batch_size=BATCH)
    content = path.read_text()
    for wrong, why in [
        (content.replace("a bird of colours 0", "a fish", 1), r"rows.csv:2 differs in `text`"),
        (content.replace("predicted_label", "guess", 1), "its columns are"),
        (content + content.splitlines()[-1] + "\n", "more rows than"),
        ("".join(line.replace(",0.", ",0.9") for line in content.splitlines(keepends=True)), "not this adapter's"),
    ]:
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=why):
            predict_file(run, rows, path, batch_size=BATCH, resume=True)
        assert path.read_text() == wrong


def test_predict_file_stopped_in_the_middle_says_what_is_there(run: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"

    def stop(done: int, total: int | None) -> None:
        assert total == 31
        if done >= 12:
            raise RunInterrupted(2, "stopped by Ctrl-C")

    with pytest.raises(RunInterrupted) as stopped:
        predict_file(run, rows, path, batch_size=BATCH, on_progress=stop)
    assert stopped.value.recovered == f"12 of 31 rows are in {path}"
    assert "--resume" in str(stopped.value)
    assert len(path.read_text().splitlines()) == 12
    asked: list[int] = []
    predict_file(run, rows, path, batch_size=BATCH, resume=True, on_progress=lambda done, _: asked.append(done))
    assert len(path.read_text().splitlines()) == 31
    assert {4, 31} <= set(asked)
    assert not {*range(5, 13)} & set(asked)  # after the head of the file, its rows are not answered again


def test_predict_file_that_exists_is_not_written_over(run: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("mine")
    with pytest.raises(ConflictError, match="--overwrite"):
        predict_file(run, rows, path)
    with pytest.raises(ConfigError, match="rows itself"):
        predict_file(run, rows, rows, overwrite=True)
    with pytest.raises(ConfigError, match="its ending says the form"):
        predict_file(run, rows, tmp_path / "out.xlsx")
    with pytest.raises(ConfigError, match="cannot be resumed"):
        predict_file(run, rows, tmp_path / "out.parquet", resume=True)
    assert path.read_text() == "mine"


# -- the stream


def test_predict_stream_gives_the_answers_of_predict_in_order(run: Path) -> None:
    asked = texts(30)
    stream = predict_stream(run, iter(asked), batch_size=BATCH)
    found = list(stream)
    assert [one["row"]["text"] for one in found] == asked
    for one, other in zip(found, predict(run, asked, batch_size=BATCH)["predictions"], strict=True):
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)
    assert stream.notes == []


def test_predict_stream_reads_no_more_than_it_answers(run: Path) -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        for number in range(1 << 40):
            taken.append(number)
            yield f"bird {number}"

    stream = predict_stream(run, endless(), batch_size=BATCH)
    assert next(stream)["row"] == {"text": "bird 0"}
    assert len(taken) <= BATCH + 1


def test_predict_stream_takes_mappings_and_says_what_is_wrong(run: Path) -> None:
    rows: Any = [{"gloss": "a bird", "n": 1}, {"n": 2}, {"gloss": None}, {"gloss": "bread"}]
    found = list(predict_stream(run, rows, columns={"text": "gloss"}))
    assert [one["reason"] for one in found] == [None, "`gloss` is missing", "`gloss` is missing", None]
    assert found[1]["row"] == {"n": 2}
    with pytest.raises(ConfigError, match="no column `text`"):
        predict_stream(run, rows)
    with pytest.raises(ConfigError, match="give texts, or mappings"):
        predict_stream(run, [1, 2])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="give rows or data"):
        predict_stream(run)
    assert list(predict_stream(run, iter(()))) == []


def test_chunks_of_grow_from_one_batch_and_do_not_wait_when_told() -> None:
    many: Any = [object()] * 100
    assert [len(rows) for rows in chunks_of(many, 2)] == [2, 4, 8, 16, 32, 32, 6]
    waiting: Any = [1, None, 2, 3, None, 4]
    eager: Any = list(chunks_of(waiting, 2, eager=True))
    assert eager == [[1], [2, 3], [4]]
    patient: Any = list(chunks_of(waiting, 2))
    assert patient == [[1, 2], [3, 4]]


def test_columns_of_answers_step_aside_for_the_rows_own() -> None:
    columns = Columns.of(["reason", "score_a", "predicted_score_a"], {"scores": {"a": 0.5}}, flat=True)
    assert columns.names == (
        "reason",
        "score_a",
        "predicted_score_a",
        "predicted_predicted_score_a",
        "predicted_reason",
    )
    assert "`reason` is in `predicted_reason`" in str(columns.note)


def test_written_rows_are_the_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    content = b'a,b\n1,"x ""\ny"\n2,z\n'
    ends = [4, 15, 19]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        assert [row.end for row in written_rows(path)] == [end for end in ends if end <= cut]
    other = tmp_path / "a.jsonl"
    other.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ConfigError, match="byte 13"):
        list(written_rows(other))


def test_predict_stream_of_a_missing_or_empty_source_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        predict_stream(run, data=tmp_path / "a.jsonl")


MEMORY = """
import resource, sys
from graftwerk.evaluation.predict_file import predict_file
peaks = []
def watch(done, total):
    if done:
        peaks.append((done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
predict_file(sys.argv[1], sys.argv[2], sys.argv[3], on_progress=watch)
early = next(peak for done, peak in peaks if done >= 2 * 16 * 64)
print(early, peaks[-1][1], peaks[-1][0])
"""


@pytest.mark.slow
def test_predict_file_memory_is_flat_over_100_000_rows(run: Path, tmp_path: Path) -> None:
    count = 100_000
    source = tmp_path / "rows.txt"
    with source.open("w") as file:
        file.writelines(f"bird {n}\n" for n in range(count))
    out = tmp_path / "out.jsonl"
    child = [sys.executable, "-c", MEMORY, str(run), str(source), str(out)]
    early, last, done = map(float, subprocess.run(child, check=True, capture_output=True, text=True).stdout.split())
    assert done == count
    assert last - early < 24, f"{early:.0f} MB after the first chunks, {last:.0f} MB after {count:,} rows"
    with out.open() as file:
        assert all(json.loads(line)["text"] == f"bird {n}" for n, line in enumerate(file))


def test_predict_file_holds_no_more_rows_than_its_chunks(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.txt"
    source.write_text("".join(f"bird {n}\n" for n in range(700)))
    held: list[int] = []

    def watch(done: int, total: int | None) -> None:
        if done % 128 == 0:
            # The type and not isinstance, which asks dead weakref proxies of other libraries for their class.
            held.append(sum(type(one) in (Answered, SourceRow) for one in gc.get_objects()))

    gc.collect()  # rows of earlier tests
    predict_file(run, source, tmp_path / "out.jsonl", batch_size=BATCH, on_progress=watch)
    assert len(held) >= 5
    assert 0 < max(held) <= 4 * GROWTH * BATCH  # of 1,400


def test_answerer_counts_rows_that_do_not_fit_the_template(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_adapter_for(run)
    encode = type(opened).encode

    def picky(self: Any, rows: Any) -> Any:
        if any("7" in row["text"] for row in rows):
            raise DataError("the template does not take it")
        return encode(self, rows)

    monkeypatch.setattr(type(opened), "encode", picky)
    found = list(predict_stream(run, texts(9), batch_size=BATCH))
    assert [n for n, one in enumerate(found) if one["reason"]] == [7]
    assert found[7]["reason"] == "the template does not take it"
    assert found[8]["label"]
