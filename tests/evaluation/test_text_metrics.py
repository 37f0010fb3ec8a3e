"""Metrics of texts against direct calls of sacreBLEU and rouge-score, and bootstrap draws against texts drawn again."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from graftwerk.errors import ResourceError
from graftwerk.evaluation import metrics, text_metrics
from graftwerk.evaluation.metrics import METRICS, metrics_of, packages_of, require_packages, statistic_of
from graftwerk.evaluation.results_io import load_evaluation, store_evaluation
from graftwerk.evaluation.text_metrics import UnicodeWords
from graftwerk.experiments.recommended_method import recommend
from graftwerk.experiments.significance import describe_difference, margin_of, verdict
from graftwerk.experiments.table import compare_to_best, format_metric
from graftwerk.reporting import numbers
from graftwerk.serialization.info import OWN_FILE
from graftwerk.tasks.language_codes import iso_code
from graftwerk.tasks.predictions import ClassPredictions, TextPredictions
from graftwerk.tasks.summarization import Summarization
from graftwerk.tasks.translation import Translation
from tests.tiny_text import GNOME, rows_of

TEXTS = ("exact_match", "rouge1", "rouge2", "rougeL", "rougeL_stemmed", "bleu", "chrf", "length")


def made(n: int = 24, seed: int = 0) -> TextPredictions:
    """References of real text; answers with words dropped and swapped, one right, one empty."""
    rng = np.random.default_rng(seed)
    references = [row["target"] for row in rows_of(GNOME["de"])[:n]]
    answers = []
    for text in references:
        words = [word for word in text.split() if rng.random() > 0.3]
        at = int(rng.integers(len(words))) if words else 0
        answers.append(" ".join(words[at:] + words[:at]) if rng.random() < 0.3 else " ".join(words))
    answers[0], answers[1] = references[0], ""
    tokens = rng.integers(1, 30, n)
    return TextPredictions(1.0, rng.gamma(2.0, 1.0, n) * tokens, tokens, tuple(answers), tuple(references))


def directly(name: str, answers: list[str], references: list[str]) -> float:
    if name == "bleu":
        return float(sacrebleu.corpus_bleu(answers, [references]).score)
    if name == "chrf":
        return float(sacrebleu.corpus_chrf(answers, [references]).score)
    if name == "exact_match":
        return float(np.mean([a.split() == r.split() for a, r in zip(answers, references, strict=True)]))
    if name == "length":
        return float(np.mean([len(answer.split()) for answer in answers]))
    name, _, stemmed = name.partition("_")
    scorer = RougeScorer([name], use_stemmer=bool(stemmed))
    return float(np.mean([scorer.score(r, a)[name].fmeasure for a, r in zip(answers, references, strict=True)]))


@pytest.mark.parametrize("name", TEXTS)
def test_metrics_of_texts_equal_reference_packages(name: str) -> None:
    found = made()
    assert found.texts is not None
    assert found.references is not None
    value = metrics_of(found, names=[name], resamples=100)[name]["value"]
    assert value == pytest.approx(directly(name, list(found.texts), list(found.references)), abs=1e-9)
    assert value > 0, "a figure of zero shows nothing"


@pytest.mark.parametrize("name", TEXTS)
def test_statistic_of_texts_equals_metric_of_drawn_rows(name: str) -> None:
    found, rng = made(), np.random.default_rng(1)
    assert found.texts is not None
    assert found.references is not None
    drawn = rng.multinomial(24, np.full(24, 1 / 24), size=3)
    for weights, value in zip(drawn, statistic_of(name, found)(drawn.astype(float)), strict=True):
        rows = np.repeat(np.arange(24), weights)
        texts, references = [found.texts[row] for row in rows], [found.references[row] for row in rows]
        assert value == pytest.approx(directly(name, texts, references), abs=1e-9)


def test_perplexity_averages_over_tokens_not_rows() -> None:
    found = TextPredictions(None, np.array([2.0, 30.0]), np.array([2, 10]))
    assert METRICS["perplexity"].value(found) == pytest.approx(math.exp(32 / 12))
    assert statistic_of("perplexity", found)(np.array([[2.0, 0.0], [1.0, 1.0]])) == pytest.approx(
        [math.exp(1.0), math.exp(32 / 12)]
    )
    assert not METRICS["bleu"].defined(found)


def test_metrics_of_texts_have_reproducible_signatures() -> None:
    figures = metrics_of(made(), names=["bleu", "chrf", "rougeL"], resamples=100)
    version = sacrebleu.__version__
    assert figures["bleu"]["signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert figures["chrf"]["signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    assert figures["rougeL"]["signature"].startswith("f-measure|stemmer:no|tok:rouge-score|version:")
    for figure in figures.values():
        assert figure["low"] < figure["value"] < figure["high"]


def answered(texts: list[str], references: list[str], languages: list[str] | None = None) -> TextPredictions:
    ones = np.ones(len(texts))
    spoken = None if languages is None else tuple(languages)
    return TextPredictions(1.0, ones, ones.astype(int), tuple(texts), tuple(references), languages=spoken)


CHINESE = (
    ["我喜欢在公园里看书。", "今天天气不错,我们出去走走。"],
    ["我很喜欢在公园里看书。", "今天天气很好,我们出去走走吧。"],
)
JAPANESE = (["私は毎日公園で本を読みます。"], ["私は毎朝公園で本を読みます。"])
GERMAN = (["Öffnen Sie das Menü."], ["Öffnen Sie jetzt das kleine Menü."])


@pytest.mark.parametrize(
    ("language", "pair", "tokenizer"),
    [("zh", CHINESE, "zh"), ("ja", JAPANESE, "char"), ("de", GERMAN, "13a"), ("", CHINESE, "13a")],
)
def test_bleu_uses_tokenizer_of_language(
    language: str, pair: tuple[list[str], list[str]], tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    text_metrics._tokenizer_of.cache_clear()
    texts, references = pair
    found = answered(texts, references, [language] * len(texts))
    figure = metrics_of(found, names=["bleu"], resamples=100)["bleu"]
    expected = sacrebleu.corpus_bleu(texts, [references], tokenize=tokenizer).score
    assert figure["value"] == pytest.approx(expected, abs=1e-9)
    assert f"|tok:{tokenizer}|" in figure["signature"]
    text_metrics._tokenizer_of.cache_clear()


UNDIVIDED = {
    "zh": "今天天气很好我们去公园",
    "ja": "今日は天気がいいです",
    "th": "วันนี้อากาศดีมาก",
    "lo": "ສະບາຍດີເຈົ້າ",
    "km": "សួស្តីអ្នក",
    "my": "မင်္ဂလာပါခင်ဗျာ",
    "bo": "བཀྲ་ཤིས་བདེ་ལེགས",
    "yue": "今日天氣好好我哋去公園",
    "shn": "မႂ်ႇသုင်ၶႃႈ",
}
CODES = [
    "zh",
    "zh_CN",
    "zh-TW",
    "zho_Hans",
    "zho_Hant",
    "cmn_Hans",
    "yue_Hant",
    "wuu",
    "lzh",
    "ja",
    "ja_XX",
    "jpn_Jpan",
    "th",
    "th_TH",
    "tha_Thai",
    "lo",
    "lao_Laoo",
    "km",
    "km_KH",
    "khm_Khmr",
    "my",
    "my_MM",
    "mya_Mymr",
    "bod_Tibt",
    "dzo_Tibt",
    "shn_Mymr",
]


@pytest.mark.parametrize("code", CODES)
def test_bleu_of_identical_texts_without_spaces_is_100_for_every_code(code: str) -> None:
    language = iso_code(code)
    assert language is not None
    text = UNDIVIDED.get(language, UNDIVIDED["bo" if language == "dz" else "zh"])
    figure = metrics_of(answered([text] * 2, [text] * 2, [language] * 2), names=["bleu"], resamples=100)["bleu"]
    assert figure["value"] == pytest.approx(100)
    assert "|tok:13a|" not in figure["signature"]


def test_bleu_unnamed_language_without_spaces_is_noted() -> None:
    text = UNDIVIDED["th"]
    figures = [
        metrics_of(answered([text] * 2, [text] * 2, spoken), names=["bleu"], resamples=100)["bleu"]
        for spoken in (None, ["", "th"], ["th", "th"])
    ]
    assert "2 of 2 references are written without spaces" in figures[0]["note"]
    assert "1 of 2 references" in figures[1]["note"]
    assert "without spaces" not in figures[2].get("note", "")
    german = metrics_of(answered(*GERMAN), names=["bleu"], resamples=100)["bleu"]
    assert "without spaces" not in german.get("note", "")


def test_tokenizer_of_japanese_and_korean_uses_mecab_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: name)
    text_metrics._tokenizer_of.cache_clear()
    assert [text_metrics._tokenizer_of(code) for code in ("ja", "ko", "zh", "fr")] == [
        "ja-mecab", "ko-mecab", "zh", "13a",
    ]  # fmt: skip
    text_metrics._tokenizer_of.cache_clear()


def test_bleu_mixed_languages_tokenizes_each_row_by_its_language() -> None:
    texts, references = [*CHINESE[0], *GERMAN[0]], [*CHINESE[1], *GERMAN[1]]
    found = answered(texts, references, ["zh", "zh", "de"])
    assert METRICS["bleu"].signature is not None
    assert "|tok:13a+zh|" in METRICS["bleu"].signature(found)
    draws = statistic_of("bleu", found)(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert draws[0] == pytest.approx(sacrebleu.corpus_bleu(*_corpus(CHINESE), tokenize="zh").score)
    assert draws[1] == pytest.approx(sacrebleu.corpus_bleu(*_corpus(GERMAN)).score)


def _corpus(pair: tuple[list[str], list[str]]) -> tuple[list[str], list[list[str]]]:
    return pair[0], [pair[1]]


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        # Words in common: die, für. The pieces of an ASCII tokenizer would also share "t", "r", "gr", "en".
        ("die Tür für Größen", "die Tore für Grüße", 0.5),
        ("быстрая лиса прыгает", "быстрая лиса спит", 2 / 3),  # of which rouge-score itself sees nothing
        ("Gru\u0308n", "grün", 1.0),
        ("हिन्दी में", "हिन्दी को", 0.5),
        ("今天很好", "今天不好", 0.75),
    ],
)
def test_rouge_non_ascii_text_uses_unicode_words(text: str, reference: str, value: float) -> None:
    figure = metrics_of(answered([text], [reference]), names=["rouge1"], resamples=100)["rouge1"]
    assert figure["value"] == pytest.approx(value)
    assert "|tok:unicode-words|" in figure["signature"]


def test_rouge_ascii_references_equal_rouge_score() -> None:
    found = answered(["a na\u00efve_answer 2nd"], ["A na ve answer, 2nd!"])
    figure = metrics_of(found, names=["rouge1"], resamples=100)["rouge1"]
    assert figure["value"] == 1.0
    assert "|tok:rouge-score|" in figure["signature"]
    # Words of two to five letters that the stemmer would change: rouge-score stems from four letters on.
    for text in rows_of(GNOME["de"])[0]["target"], "it's 3.14_x -- B2B (c)", "is was his runs used ties adopt flies":
        assert UnicodeWords().tokenize(text) == DefaultTokenizer().tokenize(text)
        assert UnicodeWords(stemmed=True).tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("reference", "tokenizer"), [("the café's packages", "unicode-words"), ("the packages", "rouge")]
)
def test_rouge_stemmed_compares_stems(reference: str, tokenizer: str) -> None:
    found = answered([reference.replace("packages", "package")], [reference])
    figures = metrics_of(found, names=["rougeL", "rougeL_stemmed"], resamples=100)
    assert figures["rougeL"]["value"] < 1
    assert figures["rougeL_stemmed"]["value"] == 1
    assert "|stemmer:no|" in figures["rougeL"]["signature"]
    assert f"|stemmer:porter|tok:{tokenizer}" in figures["rougeL_stemmed"]["signature"]


def test_require_packages_missing_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages((*Translation.metrics, *Summarization.metrics))
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "sacrebleu" else find_spec(name))
    require_packages(Summarization.metrics)
    with pytest.raises(ResourceError, match=r"BLEU, chrF need the package sacrebleu") as error:
        require_packages(Translation.metrics)
    assert "graftwerk[text]" in str(error.value.hint)
    assert packages_of(Translation.metrics) == ["sacrebleu"]
    assert packages_of(Summarization.metrics) == ["rouge-score"]


# -- units and directions


def difference(value: float, low: float, high: float) -> Any:
    return {"a": "lora", "b": "ia3", "value": value, "low": low, "high": high, "p": 0.01}


def method(name: str, value: float, trained: int) -> dict[str, Any]:
    return {"name": name, "figure": {"value": value}, "cost": {"trained_parameters": trained}}


def test_shown_keeps_points_and_scales_shares_to_percent() -> None:
    assert format_metric(0.396, "rougeL") == "39.6"
    assert format_metric(23.42, "bleu") == "23.4"
    assert format_metric(12.34, "perplexity") == "12.3"
    assert describe_difference(difference(3.1, 1.2, 5.0), "bleu") == "better by 3.1 points [1.2, 5.0]"
    assert describe_difference(difference(0.031, 0.012, 0.05), "rougeL") == "better by 3.1 points [1.2, 5.0]"
    assert margin_of("bleu", 20.0) == 1.0
    assert margin_of("rougeL", 0.4) == 0.01
    assert margin_of("perplexity", 12.0) == pytest.approx(0.12)


def test_same_rows_compares_references_and_token_counts() -> None:
    one, other = made(), made()
    assert one.references is not other.references
    assert one.same_rows(replace(other, texts=None)), "read from two files, answered differently"
    assert not one.same_rows(replace(other, tokens=other.tokens + 1))
    assert other.references is not None
    assert not one.same_rows(replace(other, references=("another", *other.references[1:])))
    assert not one.same_rows(ClassPredictions(None, np.ones((24, 2)), None))
    few, many = (
        ClassPredictions(None, np.ones((3, 2)), np.array([0, 1, 1])),
        ClassPredictions(None, np.ones((3, 4)), None),
    )
    assert few.same_rows(replace(few, targets=np.array([0, 1, 1])))
    assert not few.same_rows(replace(few, targets=np.array([0, 1, 0])))
    assert not few.same_rows(replace(many, targets=few.targets))


def test_verdict_lower_perplexity_is_better() -> None:
    d = difference(-2.0, -3.0, -1.0)
    assert verdict(d, "perplexity") == "better"
    assert verdict(d, "bleu") == "worse"
    assert describe_difference(d, "perplexity") == "better by 2.0 [1.0, 3.0]"
    assert compare_to_best([d], "ia3", "lora", "perplexity") == "worse by 2.0 [1.0, 3.0]"
    methods = [method("ia3", 12.0, 10), method("lora", 10.0, 100)]
    chosen = recommend(methods, [d], prefer="trained_parameters", metric="perplexity")
    assert chosen is not None
    assert chosen["method"] == "lora"
    near = [method("ia3", 10.05, 10), method("lora", 10.0, 100)]
    chosen = recommend(near, [difference(-0.05, -0.2, 0.1)], prefer="trained_parameters", metric="perplexity")
    assert chosen is not None
    assert chosen["method"] == "ia3"
    assert chosen["reason"].startswith("+0.1 against lora, the best mean, no difference shown")
    assert chosen["reason"].endswith("up to 0.2 worse")


@pytest.mark.parametrize("name", METRICS)
def test_report_numbers_agree_with_metrics_table(name: str) -> None:
    """The page imports nothing of ours, so it has a list of its own."""
    metric = METRICS[name]
    assert numbers.metric_name(name) == metric.title
    assert numbers.scale(name) == metric.scale
    assert numbers.unit(name) == metric.words
    assert (name in numbers.LESS_IS_BETTER) == (metric.higher is False)


def test_load_evaluation_answers_with_unusual_line_breaks_roundtrip(tmp_path: Path) -> None:
    """A line of the file ends at a line feed alone."""
    texts = ["a\u2028b", "c\x85d\x1ce\x0bf\r\n"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / OWN_FILE).write_text("{}")
    store_evaluation(tmp_path, tmp_path / "adapter", {}, answered(texts, texts))
    _, again = load_evaluation(tmp_path, tmp_path / "adapter") or pytest.fail("nothing is stored")
    assert isinstance(again, TextPredictions)
    assert again.texts == tuple(texts)


def test_load_evaluation_languages_roundtrip(tmp_path: Path) -> None:
    """A comparison reads them, and must count the same words as the evaluation did."""
    found = answered(*CHINESE, ["zh", "zh"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / OWN_FILE).write_text("{}")
    store_evaluation(tmp_path, tmp_path / "adapter", {}, found)
    _, again = load_evaluation(tmp_path, tmp_path / "adapter") or pytest.fail("nothing is stored")
    assert isinstance(again, TextPredictions)
    assert again.languages == ("zh", "zh")
    assert METRICS["bleu"].value(again) == METRICS["bleu"].value(found)
    with_sets = replace(found, sets=("a", "b"))
    assert with_sets.of_set("b").languages == ("zh",)
