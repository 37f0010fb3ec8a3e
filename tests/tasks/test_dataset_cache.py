"""Rows that an earlier start read and encoded: the same as without, and made again when anything has changed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftwerk.config import RunConfig
from graftwerk.data.settings import DataSettings
from graftwerk.errors import DataError
from graftwerk.kernels import flags as fast
from graftwerk.models.cache import cache_folder
from graftwerk.tasks import dataset_cache as kept
from graftwerk.tasks.base import Splits
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.registry import parse_task
from graftwerk.training.events import Event
from graftwerk.training.setup import SPLITS, Prepared, prepare

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
GLOSSES, GNOME = EXAMPLES / "topic_wordnet_gloss.sample.jsonl", EXAMPLES / "gnome.de-en.sample.jsonl"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of reading and encoding were really done, for classification."""
    done: list[str] = []
    for name in ("read", "encode"):
        plain = getattr(Classification, name)

        def counted(self: Any, *args: Any, plain: Any = plain, name: str = name) -> Any:
            done.append(name)
            return plain(self, *args)

        monkeypatch.setattr(Classification, name, counted)
    return done


def held() -> list[Path]:
    return sorted((cache_folder() / "prepared").glob("*"))


def data(file: Path, **more: Any) -> DataSettings:
    return DataSettings.model_validate({"train": str(file), "validation": 2, **more})


def rows_file(folder: Path, rows: Sequence[Any] | None = None) -> Path:
    file = folder / "rows.jsonl"
    chosen = [{"text": f"row number {at}", "label": "ab"[at % 2]} for at in range(12)] if rows is None else rows
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return file


def everything(splits: Splits) -> dict[str, Any]:
    """All that there is to see of splits, `where` included."""
    rows = {split: list(getattr(splits, split)) for split in SPLITS}
    places = {split: [where(at) for at in range(len(rows[split]))] for split, where in splits.where.items()}
    return {**vars(splits), **rows, "where": places, "cache_key": None}


RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "classification": ("bert", {"task": "classification"}, {"train": str(GLOSSES), "test": 8}),
    "masked": ("bert", {"task": "masked"}, {"train": str(GLOSSES), "max_train_rows": 40}),
    "causal": ("llama", {"task": "causal"}, {"train": [str(GLOSSES)], "max_train_rows": 40}),
    "translation": (
        "mbart",
        {"task": {"name": "translation", "both_directions": True}},
        {"train": str(GNOME), "max_train_rows": 40},
    ),
    "several sets": (
        "mbart",
        {"task": "translation"},
        {
            "train": [{"source": str(GNOME)}, {"source": str(EXAMPLES / "gnome.fr-en.sample.jsonl"), "max_rows": 30}],
            "validation": 10,
        },
    ),
    "instruction": (
        "llama",
        {"task": {"name": "instruction", "template": "plain"}},
        {
            "train": str(EXAMPLES / "summary_debian_synopsis.sample.jsonl"),
            "columns": {"prompt": "document", "completion": "summary"},
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_prepare_from_cache_equals_uncached(
    name: str, tmp_path: Path, tiny_encoder: Path, text_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, task, rows = RUNS[name]
    model = tiny_encoder if family == "bert" else text_model(family)
    tree = {"model": str(model), **task, "method": "lora", "output_dir": str(tmp_path / "run")}
    tree["data"] = {"validation": 10, "max_length": 24, "max_truncated": 1.0, "on_bad_row": "skip", **rows}
    settings = RunConfig.build(tree)

    def start() -> tuple[Prepared, list[Event]]:
        said: list[Event] = []
        return prepare(settings, said.append), said

    with fast.plain("prepared"):
        plain, plain_said = start()
    assert not held()
    start()
    assert held()
    for cls in type(settings.task).__mro__:
        for verb in ("read", "encode"):
            if verb in vars(cls):
                monkeypatch.setattr(cls, verb, _never)
    again, said = start()
    assert everything(again.splits) == everything(plain.splits)
    assert again.splits.cache_key is not None
    for split in SPLITS:
        assert list(again.examples[split]) == list(plain.examples[split])
        assert all(one.row is None or type(one.row) is dict for one in again.examples[split])
    assert said == plain_said
    assert (again.findings, again.prior_loss, again.task) == (plain.findings, plain.prior_loss, plain.task)


def _never(*_: Any) -> None:
    raise AssertionError("read or encoded again")


CHANGES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "the file's content": lambda file, more: file.write_text(file.read_text().replace("number 3", "number 33")),
    "a setting": lambda file, more: more.update(split_seed=1),
    "another file of the folder": lambda file, more: (file.parent / "more.jsonl").write_text(file.read_text()),
    "a file of another kind": lambda file, more: (file.parent / "notes.md").write_text("n"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_read_changed_source_or_setting_misses_cache(what: str, tmp_path: Path, calls: list[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file, more = rows_file(folder), {}
    task = Classification()
    first = kept.read(task, data(folder, **more))
    assert kept.read(task, data(folder, **more)).cache_key == first.cache_key
    assert calls == ["read"]
    CHANGES[what](file, more)
    assert everything(kept.read(task, data(folder, **more))) == everything(task.read(data(folder, **more)))
    assert calls == ["read"] * 3


def test_read_changed_content_of_same_size_and_mtime_misses_cache(tmp_path: Path) -> None:
    file = rows_file(tmp_path)
    kept.read(Classification(), data(file))
    state = file.stat()
    file.write_text(file.read_text().replace("row number 3", "ROW NUMBER 4"))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    now = kept.read(Classification(), data(file))
    assert any("ROW NUMBER 4" in row["text"] for row in (*now.train, *now.validation))


def test_encode_other_tokenizer_or_length_misses_cache(tmp_path: Path, tiny_encoder: Path, calls: list[str]) -> None:
    from shutil import copytree

    from graftwerk.models.load import load_tokenizer

    tokenizer, task = load_tokenizer(str(tiny_encoder)), parse_task("classification")
    splits = kept.read(task, data(rows_file(tmp_path)))
    other = copytree(tiny_encoder, tmp_path / "model")
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    for length, folder in ((8, tiny_encoder), (8, tiny_encoder), (6, tiny_encoder), (8, other)):
        kept.encode(task, splits, "train", tokenizer, length, folder)
    assert calls == ["read", "encode", "encode", "encode"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content.replace(b"row number 4", b"row number 5"),
        lambda content: content[:65] + b"[]",
        lambda content: b"\xff" * 200,
    ],
    ids=["empty", "cut off", "altered", "another value", "noise"],
)
def test_read_damaged_cache_file_is_rewritten(
    damage: Callable[[bytes], bytes], tmp_path: Path, calls: list[str]
) -> None:
    settings = data(rows_file(tmp_path))
    whole = kept.read(Classification(), settings)
    (file,) = held()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert everything(kept.read(Classification(), settings)) == everything(whole)
    assert file.read_bytes() == good
    assert calls == ["read", "read"]


def test_read_cache_file_of_wrong_type_is_rewritten(tmp_path: Path) -> None:
    import hashlib

    settings = data(rows_file(tmp_path))
    whole = kept.read(Classification(), settings)
    (file,) = held()
    for content in (b"[]", b'{"train": 3}', b"null", b'{"train": [], "validation": [], "test": [], "labels": 7}'):
        file.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        assert everything(kept.read(Classification(), settings)) == everything(whole)


def test_read_errors_are_not_cached(tmp_path: Path) -> None:
    file = rows_file(tmp_path, [{"text": "one", "label": "a"}, {"text": "two"}])
    said = []
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            kept.read(Classification(), data(file))
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not held()


def test_read_unwritable_cache_folder_reads_uncached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path / "file"))
    settings = data(rows_file(tmp_path))
    assert kept.read(Classification(), settings).cache_key is None
    assert kept.read(Classification(), settings).train
    assert calls == ["read", "read"]


def test_keep_values_that_json_would_change_are_not_cached(tmp_path: Path) -> None:
    splits = kept.read(Classification(), data(rows_file(tmp_path)))
    before = held()
    for value in (float("nan"), (1, 2), {1: 2}, b"x", object()):
        odd = replace(splits, train=[{"text": value}])
        assert not kept._keep("0" * 64, kept._plain_splits(odd))
    assert held() == before


def test_cache_folder_is_bounded_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for at in range(4):
        place = tmp_path / str(at)
        place.mkdir()
        files.append(rows_file(place))
    kept.read(Classification(), data(files[0]))
    (first,) = held()
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(kept, "MOST_BYTES", 3 * first.stat().st_size + 30)
    for at, file in enumerate(files[1:], start=1):
        os.utime(first, ns=(at, at))
        kept.read(Classification(), data(files[0]))  # used, so not the oldest
        assert first.stat().st_mtime_ns > at
        kept.read(Classification(), data(file))
    assert len(held()) == 3
    assert first in held()
    monkeypatch.setattr(kept, "MOST_BYTES_EACH", 10)
    assert kept.read(Classification(), data(files[0], split_seed=5)).cache_key is None


def test_cache_key_includes_reading_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = data(rows_file(tmp_path))
    first = kept.read(Classification(), settings).cache_key
    monkeypatch.setattr(kept, "_code", lambda: ["another version"])
    assert kept.read(Classification(), settings).cache_key != first
