"""What every augmenter keeps to, noise and models alike."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwerk.augmentation.filters import REASONS
from graftwerk.augmentation.pipeline import Augmented, about_of, make
from graftwerk.augmentation.progress_log import journal_of
from graftwerk.augmentation.settings import AUGMENTERS, FromFile, parse_augmenter
from graftwerk.data.keyed_rng import fingerprint

Rows = list[dict[str, Any]]
TASK = {"name": "translation"}
WRITER: dict[str, Any] = {"model": "WRITER", "task": TASK, "batch_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "word_dropout": {"probability": 0.3, "n": 2},
    "word_shuffle": {"distance": 2, "n": 2},
    "word_insertion": {"probability": 0.3, "n": 2},
    "back_translation": {**WRITER, "n": 2, "tag": "<BT>"},
    "back_translation, beams": {**WRITER, "n": 2, "num_beams": 3},
    "back_translation, round trip": {**WRITER, "through": {"model": "WRITER", "task": TASK}, "top_p": 0.9, "n": 2},
    "forward_translation": {**WRITER, "temperature": 0.7},
}
MODELS = [name for name in CASES if "model" in CASES[name]]
CHANCE = [name for name in CASES if "beams" not in name]


@pytest.fixture
def augment(tiny_writer: Path, tmp_path: Path) -> Callable[..., Augmented]:
    def run(case: str, rows: Rows, out: str = "out.jsonl", **options: Any) -> Augmented:
        text = json.dumps({**CASES[case], **options.pop("settings", {})}).replace("WRITER", str(tiny_writer))
        settings = parse_augmenter({"name": case.partition(",")[0], **json.loads(text)})
        return make(rows, [settings], tmp_path / out, **options)

    return run


def test_cases_cover_every_augmenter() -> None:
    assert {case.partition(",")[0] for case in CASES} == set(AUGMENTERS) - {FromFile.name}


@pytest.mark.parametrize("case", CASES)
def test_make_counts_rows_made_and_left_out(case: str, augment: Callable[..., Augmented], pairs: Rows) -> None:
    before = copy.deepcopy(pairs)
    made = augment(case, pairs)
    assert pairs == before, "the originals were changed"
    counts = made.counts[0]
    assert made.rows == counts["made"] > 0
    assert counts["made"] + sum(counts["left_out"].values()) == CASES[case].get("n", 1) * len(pairs)
    assert set(counts["left_out"]) <= set(REASONS)
    lines = made.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [*made.parts[0]]
    assert not journal_of(made.path).exists()


@pytest.mark.parametrize("case", CASES)
def test_make_rows_record_origin_and_keep_other_fields(
    case: str, augment: Callable[..., Augmented], pairs: Rows
) -> None:
    for row in augment(case, pairs).parts[0]:
        origin = row["origin"]
        original = pairs[row["id"]]
        reads = origin.get("reads", origin.get("part"))
        writes = origin.get("writes", origin.get("part"))
        assert origin["kind"] == case.partition(",")[0]
        assert origin["row"] == fingerprint(original[reads])
        assert origin["seed"] == 0
        assert 0 <= origin["variant"] < CASES[case].get("n", 1)
        assert {"n": CASES[case].get("n", 1)}.items() <= origin["settings"].items()
        assert "weight" not in origin["settings"]
        assert (origin["model"] is None) is (case not in MODELS)
        if case in MODELS:
            assert set(origin["model"]) == {"name", "fingerprint", "adapter"}
            assert len(origin["model"]["fingerprint"]) == 32
        assert row[writes] != original[writes]
        others = set(original) - {writes}
        assert {name: row[name] for name in others} == {name: original[name] for name in others}


@pytest.mark.parametrize("case", [case for case in CASES if case not in MODELS or "round" in case])
def test_make_keeps_labels(case: str, augment: Callable[..., Augmented], labelled: Rows) -> None:
    by_text = {fingerprint(row["text"]): row["label"] for row in labelled}
    made = augment(case, labelled).parts[0]
    assert made
    assert all(row["label"] == by_text[row["origin"]["row"]] for row in made)


@pytest.mark.parametrize("case", CASES)
def test_make_shuffled_rows_give_same_rows(case: str, augment: Callable[..., Augmented], pairs: Rows) -> None:
    one = augment(case, pairs, "one.jsonl")
    other = augment(case, [pairs[place] for place in (3, 0, 5, 2, 4, 1)], "other.jsonl")
    lines = [made.path.read_text(encoding="utf-8").splitlines() for made in (one, other)]
    assert Counter(lines[0]) == Counter(lines[1])
    assert (one.fingerprint != other.fingerprint) is (lines[0] != lines[1]), "the order of the rows counts"


@pytest.mark.parametrize("case", CHANCE)
def test_make_depends_on_seed(case: str, augment: Callable[..., Augmented], pairs: Rows) -> None:
    first = augment(case, pairs, "1.jsonl")
    assert augment(case, pairs, "2.jsonl").path.read_bytes() == first.path.read_bytes()
    other = augment(case, pairs, "3.jsonl", settings={"seed": 1})
    assert [row | {"origin": 0} for row in other.parts[0]] != [row | {"origin": 0} for row in first.parts[0]]


@given(data=st.data())
def test_make_noise_of_a_row_is_independent_of_other_rows(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Dropout and shuffle of a row stay the same whatever stands beside it in the file, and wherever it stands."""
    texts = data.draw(st.lists(st.text("abc de", min_size=1).filter(str.strip), min_size=1, max_size=8, unique=True))
    kept = data.draw(st.lists(st.sampled_from(texts), min_size=1, unique=True))
    folder = tmp_path_factory.mktemp("rows")
    settings = [parse_augmenter(name) for name in ("word_dropout", "word_shuffle")]
    whole = make([{"text": text} for text in texts], settings, folder / "whole.jsonl")
    part = make([{"text": text} for text in kept], settings, folder / "part.jsonl")
    for all_rows, some_rows in zip(whole.parts, part.parts, strict=True):
        wanted = {fingerprint(text) for text in kept}
        expected = [row for row in all_rows if row["origin"]["row"] in wanted]
        assert sorted(map(json.dumps, some_rows)) == sorted(map(json.dumps, expected))


class Killed(Exception):  # noqa: N818 - stands for a kill
    pass


@pytest.mark.parametrize("case", MODELS)
def test_make_resume_after_kill_gives_equal_bytes(
    case: str, augment: Callable[..., Augmented], pairs: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = augment(case, pairs, "whole.jsonl")

    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        augment(case, pairs, on_progress=kill)
    journal = journal_of(whole.path.with_name("out.jsonl"))
    batches = journal.read_bytes().count(b"\n")
    assert batches >= 3, "who is made, the model, a batch"
    written: list[int] = []
    from graftwerk.augmentation import translate

    write = translate._write
    monkeypatch.setattr(translate, "_write", lambda *given: written.append(len(given[3]) * given[4]) or write(*given))
    with journal.open("ab") as file:
        file.write(b'["0.0 half a line')
    made = augment(case, pairs, resume=True)
    assert made.path.read_bytes() == whole.path.read_bytes()
    first = len(written)
    assert max(written) <= WRITER["batch_size"], "of answers, not of texts with several each"
    augment(case, pairs, "again.jsonl")
    assert len(written) - first == first + batches - 2, "what was done was not done again"
    assert about_of(made.path).read_bytes() == about_of(whole.path).read_bytes()


@pytest.mark.parametrize("case", ["word_dropout", "back_translation"])
def test_make_resume_of_finished_file_returns_it(case: str, augment: Callable[..., Augmented], pairs: Rows) -> None:
    first = augment(case, pairs)
    again = augment(case, pairs, resume=True)
    assert again.found
    assert not first.found
    assert (again.parts, again.counts, again.fingerprint) == (first.parts, first.counts, first.fingerprint)
    assert augment(case, pairs, resume=True, settings={"weight": 2.0}).found, "how often rows are used makes no others"
