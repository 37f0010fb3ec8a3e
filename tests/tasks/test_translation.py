"""Translation: what each family's tokenizer makes of a pair, who is told which language, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from graftwerk.data.settings import DataSettings
from graftwerk.errors import ConfigError, DataError
from graftwerk.evaluation.metrics import metrics_by_set, metrics_of
from graftwerk.tasks.language_codes import codes_of, language_name
from graftwerk.tasks.registry import parse_task
from graftwerk.tasks.text import IGNORED
from graftwerk.tasks.translation import Translation
from tests.tiny_text import GNOME, marian_tokenizer, rows_of

TRAINED = Path(os.environ.get("GRAFTWERK_TRAINED_MBART", "no-such-folder"))
"""A trained mBART-50-like model with German and English, where somebody has one."""
ROWS = rows_of(GNOME["de"])[:6]
CODES = {
    "mbart": ("de_DE", "en_XX"),
    "mbart50": ("de_DE", "en_XX"),
    "nllb": ("deu_Latn", "eng_Latn"),
    "m2m100": ("de", "en"),
}


def on(folder: Path, **settings: Any) -> tuple[Translation, Any]:
    task = Translation(**settings).for_model(AutoConfig.from_pretrained(folder))
    return task, AutoTokenizer.from_pretrained(folder)


def pairs(source: str, target: str, n: int = 6) -> list[dict[str, str]]:
    return [{**row, "source_lang": source, "target_lang": target} for row in ROWS[:n]]


# -- the labels are the family's own


@pytest.mark.parametrize("family", [*CODES, "bart", "t5", "marian"])
def test_encode_inputs_and_labels_equal_tokenizer(family: str, text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model(family))
    source, target = CODES.get(family, ("de", "en"))
    examples = task.encode(pairs(source, target), tokenizer, None, 512)
    if family in CODES:
        tokenizer.src_lang, tokenizer.tgt_lang = source, target
    prefix = "translate German to English: " if family == "t5" else ""
    texts, answers = [prefix + row["source"] for row in ROWS], [row["target"] for row in ROWS]
    golden = tokenizer(texts, text_target=answers)
    assert [example.inputs["input_ids"] for example in examples] == golden["input_ids"]
    assert [example.target for example in examples] == golden["labels"]
    assert [example.prompt for example in examples] == golden["input_ids"]
    assert all(tokenizer.eos_token_id in example.target for example in examples)
    assert [example.truncated for example in examples] == [0] * 6


@pytest.mark.parametrize("family", CODES)
def test_encode_language_code_position_follows_family(family: str, text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model(family))
    source, target = CODES[family]
    example = task.encode(pairs(source, target), tokenizer, None, 512)[0]
    codes = codes_of(tokenizer)
    assert codes is not None
    first, last = (0, -1)
    place = last if family == "mbart" else first
    assert example.inputs["input_ids"][place] == codes.ids[source]
    assert example.target[place] == codes.ids[target]
    forced = "decoder_start_token_id" if family == "mbart" else "forced_bos_token_id"
    assert task.generation.options(None, tokenizer, example)[forced] == codes.ids[target]


def test_encode_mixed_languages_leaves_tokenizer_unchanged(
    text_model: Callable[[str], Path],
) -> None:
    task, tokenizer = on(text_model("mbart50"))
    before = tokenizer.src_lang, tokenizer.tgt_lang
    rows = [
        {**ROWS[0], "source_lang": "de_DE", "target_lang": "en_XX"},
        {**ROWS[1], "source_lang": "fr_XX", "target_lang": "de_DE"},
        {**ROWS[2], "source_lang": "de_DE", "target_lang": "en_XX"},
    ]
    examples = task.encode(rows, tokenizer, None, 512)
    code = tokenizer.lang_code_to_id
    assert [example.inputs["input_ids"][0] for example in examples] == [code["de_DE"], code["fr_XX"], code["de_DE"]]
    assert [example.target[0] for example in examples] == [code["en_XX"], code["de_DE"], code["en_XX"]]
    assert [example.row for example in examples] == rows
    assert [task.generation.group(example) for example in examples] == ["en_XX", "de_DE", "en_XX"]
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == before
    assert tokenizer("a")["input_ids"][0] == code[before[0]]


@pytest.mark.parametrize("family", ["mbart", "mbart50", "m2m100", "nllb", "t5", "marian"])
def test_translation_loss_equals_model_loss(family: str, text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model(family))
    model = AutoModelForSeq2SeqLM.from_pretrained(text_model(family)).eval()
    batch = task.collator.collate(task.encode(pairs(*CODES.get(family, ("de", "en"))), tokenizer, None, 512), tokenizer)
    own = float(task.objective.loss(task.objective.forward(model, batch), batch))
    assert own == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert task.objective.num_targets(batch) == int((batch["labels"] != IGNORED).sum())


@pytest.mark.skipif(not TRAINED.is_dir(), reason="GRAFTWERK_TRAINED_MBART names no folder of a trained mBART")
def test_encode_trained_mbart_equals_tokenizer() -> None:
    task, tokenizer = on(TRAINED)
    examples = task.encode(ROWS, tokenizer, None, 512)
    golden = AutoTokenizer.from_pretrained(TRAINED, src_lang="de_DE", tgt_lang="en_XX")(
        [row["source"] for row in ROWS], text_target=[row["target"] for row in ROWS]
    )
    assert [example.inputs["input_ids"] for example in examples] == golden["input_ids"]
    assert [example.target for example in examples] == golden["labels"]


@pytest.mark.parametrize(
    ("family", "settings", "row", "language"),
    [
        ("mbart50", {"source_lang": "de_DE", "target_lang": "zh_CN"}, {}, "zh"),
        ("mbart50", {"target_lang": "zh_CN"}, {"source_lang": "de_DE", "target_lang": "ja_XX"}, "ja"),
        ("t5", {"source_lang": "German", "target_lang": "jpn"}, {}, "ja"),
        ("marian", {}, {}, "en"),  # the model of one pair says it itself
        ("bart", {}, {}, None),
    ],
)
def test_predictions_carry_language_of_each_answer(
    family: str, settings: dict[str, str], row: dict[str, str], language: str | None, text_model: Callable[[str], Path]
) -> None:
    task, tokenizer = on(text_model(family), **settings)
    examples = task.encode([{"source": "a", "target": "b", **row}], tokenizer, None, 64)
    found = task.decoder.predictions([torch.ones(1, 2)], examples, 1.0, ["c"])
    assert found.languages == (None if language is None else (language,))


def test_encode_without_target_has_prompt_and_no_labels(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("mbart50"), source_lang="de_DE", target_lang="en_XX")
    asked = task.encode([task.example_from_text(row["source"]) for row in ROWS], tokenizer, None, 512)
    known = task.encode(pairs("de_DE", "en_XX"), tokenizer, None, 512)
    assert [example.prompt for example in asked] == [example.prompt for example in known]
    assert {example.target for example in asked} == {None}
    assert {task.decoder.reference(example) for example in asked} == {None}
    assert [task.decoder.reference(example) for example in known] == [row["target"] for row in ROWS]


def test_encode_truncates_both_sides_and_keeps_eos(
    text_model: Callable[[str], Path],
) -> None:
    for family in ("mbart50", "marian"):  # a fast tokenizer and one in Python
        task, tokenizer = on(text_model(family))
        whole = task.encode(pairs(*CODES.get(family, ("de", "en"))), tokenizer, None, 512)
        cut = task.encode(pairs(*CODES.get(family, ("de", "en"))), tokenizer, None, 10)
        for long, short in zip(whole, cut, strict=True):
            lost = max(long.length - 10, 0) + max(len(long.target) - 10, 0)
            assert short.truncated == lost
            assert short.length <= 10
            assert short.target[-1] == tokenizer.eos_token_id
        assert any(example.truncated for example in cut)


# -- who is told what, in words


def test_encode_multilingual_marian_prepends_language_token(tmp_path: Path, text_model: Callable[[str], Path]) -> None:
    task = Translation(target_lang="fra").for_model(AutoConfig.from_pretrained(text_model("marian")))
    tokenizer = marian_tokenizer(tmp_path, ["fra", "eng"])
    example = task.encode([{"source": "Drucken", "target": "Imprimer"}], tokenizer, None, 64)[0]
    assert tokenizer.convert_ids_to_tokens(example.prompt)[0] == ">>fra<<"
    with pytest.raises(ConfigError, match="no language `xyz`") as error:
        task._changed(target_lang="xyz").encode([{"source": "Drucken"}], tokenizer, None, 64)
    assert "fra, eng" in str(error.value.hint)


def test_encode_causal_template_trains_answer_alone(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("gpt2"), template="{source_lang}: {source}\n{target_lang}:\n")
    row = {"source": "Drucker", "target": "Printer", "source_lang": "de", "target_lang": "en_XX"}
    example = task.encode([row], tokenizer, None, 64)[0]
    learnt = [token for token in example.target if token != IGNORED]
    assert tokenizer.decode(example.prompt) == "German: Drucker\nEnglish:\n"
    assert tokenizer.decode(example.inputs["input_ids"]) == "German: Drucker\nEnglish:\nPrinter<|endoftext|>"
    assert learnt == [*tokenizer("Printer")["input_ids"], tokenizer.eos_token_id]
    assert example.target == [IGNORED] * len(example.prompt) + learnt
    assert example.inputs["input_ids"][len(example.prompt) :] == learnt


def test_encode_t5_custom_prefix(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("t5"), prefix="nach {target_lang}: ")
    example = task.encode([{"source": "Drucker", "target_lang": "deu_Latn"}], tokenizer, None, 64)[0]
    assert example.prompt == tokenizer("nach German: Drucker")["input_ids"]
    plain, _ = on(text_model("t5"), prefix="")
    assert plain.encode([{"source": "Drucker"}], tokenizer, None, 64)[0].prompt == tokenizer("Drucker")["input_ids"]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("de_DE", "German"), ("de", "German"), ("deu_Latn", "German"), ("__de__", "German"), (">>deu<<", "German"),
        ("German", "German"), ("pt-BR", "Portuguese"), ("zho_Hans", "Chinese"), ("zh_CN", "Chinese"), ("qq", None),
    ],
)  # fmt: skip
def test_language_name_of_known_code_spellings(code: str, name: str | None) -> None:
    assert language_name(code) == name


# -- reading


def data(tmp_path: Path, rows: list[dict[str, str]], **settings: Any) -> DataSettings:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSettings(train=str(path), **settings)


def test_read_both_directions_doubles_pairs_within_a_split(tmp_path: Path) -> None:
    settings = data(tmp_path, rows_of(GNOME["de"])[:20], validation=4, test=4)
    one, both = (Translation(both_directions=both).read(settings) for both in (False, True))
    assert (len(one.train), len(both.train), len(both.test)) == (12, 24, 8)
    for split in ("train", "validation", "test"):
        forth, back = getattr(both, split)[::2], getattr(both, split)[1::2]
        assert forth == getattr(one, split)
        for row, turned in zip(forth, back, strict=True):
            assert (turned["source"], turned["target"]) == (row["target"], row["source"])
            assert (turned["source_lang"], turned["target_lang"]) == ("en_XX", "de_DE")
        assert [both.where[split](place) for place in (2, 3)] == [one.where[split](1)] * 2
    assert both.origin["rows"] == {"train": 24, "validation": 8, "test": 8}
    assert both.fingerprint != one.fingerprint
    settled = Translation(both_directions=True).resolved(both)
    assert (settled.source_lang, settled.target_lang) == ("de_DE", "en_XX")


def test_resolved_takes_languages_that_all_rows_share(tmp_path: Path) -> None:
    german, french = rows_of(GNOME["de"])[:8], rows_of(GNOME["fr"])[:8]
    alike = Translation().read(data(tmp_path, german, validation=2))
    assert Translation().resolved(alike).to_dict()["source_lang"] == "de_DE"
    mixed = Translation().read(data(tmp_path, german + french, validation=2))
    assert Translation().resolved(mixed).source_lang is None


# -- what is refused


def test_encode_unknown_language_code_raises_with_known_ones(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("mbart50"), source_lang="de", target_lang="en_XX")
    with pytest.raises(ConfigError, match="no language `de`") as error:
        task.encode([{"source": "a", "target": "b"}], tokenizer, None, 64)
    assert error.value.where == "task.source_lang"
    assert "did you mean `de_DE`" in str(error.value.hint)
    assert "ar_AR" in str(error.value.hint)
    assert "sl_SI" in str(error.value.hint)
    with pytest.raises(DataError, match="no language `deutsch`") as said:
        task.encode([{"source": "a", "target": "b", "source_lang": "deutsch"}], tokenizer, None, 64)
    assert "sl_SI" in str(said.value.hint)
    t5, words = on(text_model("t5"), source_lang="de", target_lang="qq")
    with pytest.raises(ConfigError, match="`qq` is no language") as unknown:
        t5.encode([{"source": "a", "target": "b"}], words, None, 64)
    assert "German" in str(unknown.value.hint)


def test_encode_missing_target_language_raises(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("mbart50"), source_lang="de_DE")
    with pytest.raises(ConfigError, match="nothing says the target language"):
        task.encode([{"source": "a", "target": "b"}], tokenizer, None, 64)


def test_both_directions_give_metrics_by_direction(text_model: Callable[[str], Path]) -> None:
    rows = [row for pair in pairs("de_DE", "en_XX") for row in Translation(both_directions=True)._both([pair])]
    task, tokenizer = on(text_model("mbart50"), both_directions=True)
    examples = task.encode(rows, tokenizer, None, 64)
    kept = [torch.ones(len(rows), 2)]
    texts = [row["target"] if row["target_lang"] == "en_XX" else "nichts" for row in rows]
    found = task.decoder.predictions(kept, examples, 1.0, texts)
    names = ["de_DE-en_XX", "en_XX-de_DE"]
    assert found.sets == tuple(names) * len(pairs("de_DE", "en_XX"))
    each = metrics_by_set(found, names=["exact_match"], resamples=100)
    assert [each[name]["exact_match"]["value"] for name in names] == [1.0, 0.0]
    assert metrics_of(found, names=["exact_match"], resamples=100)["exact_match"]["value"] == 0.5
    alone, _ = on(text_model("mbart50"))
    assert alone.decoder.predictions(kept, examples, 1.0, texts).sets is None


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_encode_both_directions_indistinguishable_raises(family: str, text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model(family), both_directions=True)
    with pytest.raises(ConfigError, match="which direction"):
        task.encode(pairs("de", "en"), tokenizer, None, 64)


def test_encode_marian_of_other_pair_raises(text_model: Callable[[str], Path]) -> None:
    task, tokenizer = on(text_model("marian"))
    with pytest.raises(DataError, match="German alone"):
        task.encode(pairs("fr", "en"), tokenizer, None, 64)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "Translate: {text}"}, "{text} is not known here"),
        ({"template": "Translate."}, "{source} must stand in it once"),
        ({"template": "{source} {source}"}, "{source} must stand in it once"),
        ({"template": "{source.__class__}"}, "not known here"),
        ({"template": "{source!r}"}, "not known here"),
        ({"template": "{source"}, "brace"),
        ({"prefix": "{source}: "}, "{source} is not known here"),
    ],
)
def test_parse_task_invalid_translation_template_raises(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_task({"name": "translation", **settings})
    assert said in str(error.value)


@pytest.mark.parametrize(("family", "setting"), [("t5", "template"), ("gpt2", "prefix")])
def test_translation_for_model_setting_without_effect_raises(
    family: str, setting: str, text_model: Callable[[str], Path]
) -> None:
    text = "{source}" if setting == "template" else "to German: "
    with pytest.raises(ConfigError, match="reads a"):
        on(text_model(family), **{setting: text})
