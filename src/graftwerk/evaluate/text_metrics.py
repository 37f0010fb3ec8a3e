"""Exact match, ROUGE, BLEU, chrF and perplexity of generated texts, as points and as functions of row weights.

Each metric is a function of sums over rows (matches, n-grams, log-likelihoods), so a bootstrap draw is a weighted sum
and costs no new comparison of texts. BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacreBLEU's (Post 2018,
arXiv:1804.08771), over the corpus; ROUGE (Lin 2004) is rouge-score's F-measure without stemming, the mean over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np

from graftwerk.errors import EnvironmentFault
from graftwerk.evaluate.bootstrap import Floats, Statistic
from graftwerk.tasks.predictions import TextPredictions

Texts = tuple[str, ...]
ROUGES = ("rouge1", "rouge2", "rougeL")


def exact_match(predictions: TextPredictions) -> float:
    """Share of rows whose answer is the reference to the letter, but for white space around and inside it."""
    return float(_exact(*_pairs(predictions)).mean())


def exact_match_statistic(predictions: TextPredictions) -> Statistic:
    return _mean(_exact(*_pairs(predictions)))


def rouge1(predictions: TextPredictions) -> float:
    return float(_rouge(*_pairs(predictions))[:, 0].mean())


def rouge2(predictions: TextPredictions) -> float:
    return float(_rouge(*_pairs(predictions))[:, 1].mean())


def rouge_l(predictions: TextPredictions) -> float:
    return float(_rouge(*_pairs(predictions))[:, 2].mean())


def rouge1_statistic(predictions: TextPredictions) -> Statistic:
    return _mean(_rouge(*_pairs(predictions))[:, 0])


def rouge2_statistic(predictions: TextPredictions) -> Statistic:
    return _mean(_rouge(*_pairs(predictions))[:, 1])


def rouge_l_statistic(predictions: TextPredictions) -> Statistic:
    return _mean(_rouge(*_pairs(predictions))[:, 2])


def rouge_signature() -> str:
    return f"f-measure|stemmer:no|tok:rouge-score|version:{version('rouge-score')}"


def bleu(predictions: TextPredictions) -> float:
    return float(bleu_statistic(predictions)(np.ones((1, predictions.rows)))[0])


def bleu_statistic(predictions: TextPredictions) -> Statistic:
    return _of_sums("BLEU", *_pairs(predictions))


def bleu_signature() -> str:
    return _signature("BLEU")


def chrf(predictions: TextPredictions) -> float:
    return float(chrf_statistic(predictions)(np.ones((1, predictions.rows)))[0])


def chrf_statistic(predictions: TextPredictions) -> Statistic:
    return _of_sums("CHRF", *_pairs(predictions))


def chrf_signature() -> str:
    return _signature("CHRF")


def perplexity(predictions: TextPredictions) -> float:
    """exp of the mean negative log-likelihood of a trained token."""
    return float(np.exp(predictions.nll.sum() / predictions.tokens.sum()))


def perplexity_statistic(predictions: TextPredictions) -> Statistic:
    nll, tokens = predictions.nll.astype(np.float64), predictions.tokens.astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        counted = weights @ tokens
        mean = np.divide(weights @ nll, counted, out=np.full(len(weights), np.nan), where=counted > 0)
        result: Floats = np.exp(mean)
        return result

    return statistic


def length(predictions: TextPredictions) -> float:
    """Words of an answer, on average."""
    return float(_words(_pairs(predictions)[0]).mean())


def length_statistic(predictions: TextPredictions) -> Statistic:
    return _mean(_words(_pairs(predictions)[0]))


def _pairs(predictions: TextPredictions) -> tuple[Texts, Texts]:
    assert predictions.texts is not None
    assert predictions.references is not None
    return predictions.texts, predictions.references


def _mean(values: Floats) -> Statistic:
    return lambda weights: weights @ values / weights.sum(axis=1)


def _words(texts: Sequence[str]) -> Floats:
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def _exact(texts: Texts, references: Texts) -> Floats:
    same = [text.split() == reference.split() for text, reference in zip(texts, references, strict=True)]
    return np.array(same, dtype=np.float64)


@lru_cache(maxsize=8)
def _rouge(texts: Texts, references: Texts) -> Floats:
    """(n, 3): the F-measures of `ROUGES` of each row."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge-score", "ROUGE") from None
    scorer = RougeScorer(list(ROUGES), use_stemmer=False)
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return np.array([[row[name].fmeasure for name in ROUGES] for row in rows], dtype=np.float64).reshape(-1, 3)


def _of_sums(name: str, texts: Texts, references: Texts) -> Statistic:
    """A corpus metric of sacreBLEU, from the sums of its statistics over the rows of a draw."""
    metric, sums = _sacrebleu(name), _statistics(name, texts, references)

    def statistic(weights: Floats) -> Floats:
        return np.array([metric._compute_score_from_stats(list(drawn)).score for drawn in weights @ sums])

    return statistic


@lru_cache(maxsize=8)
def _statistics(name: str, texts: Texts, references: Texts) -> Floats:
    rows = _sacrebleu(name)._extract_corpus_statistics(list(texts), [list(references)])
    return np.array(rows, dtype=np.float64)


def _sacrebleu(name: str) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise _missing("sacrebleu", "BLEU and chrF") from None
    return getattr(metrics, name)()


def _signature(name: str) -> str:
    """With which options and version: what somebody else needs to get the same number."""
    from sacrebleu import metrics

    metric = getattr(metrics, name)(references=[["a"]])
    return str(metric.get_signature())


def _missing(package: str, what: str) -> EnvironmentFault:
    return EnvironmentFault(f"{what} needs the package {package}", mend="pip install 'graftwerk[text]'")
