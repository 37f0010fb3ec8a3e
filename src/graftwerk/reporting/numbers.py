"""Write metrics and their differences for a page; plain numbers as `formatting` does, with narrow spaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graftwerk import formatting
from graftwerk.formatting import DASH
from graftwerk.reporting.files import number

MINUS, THIN = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}"
METRICS = {
    "accuracy": "accuracy", "f1_macro": "macro F1", "f1_weighted": "weighted F1", "roc_auc": "ROC-AUC",
    "exact_match": "exact match", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "rougeL_stemmed": "ROUGE-L, stemmed", "bleu": "BLEU", "chrf": "chrF", "perplexity": "perplexity",
    "length": "words an answer", "pearson": "Pearson", "spearman": "Spearman", "rmse": "RMSE", "mae": "MAE",
    "f1_micro": "micro F1", "f1_labels": "macro F1 over labels", "average_precision": "average precision",
    "entity_f1": "entity F1", "entity_precision": "entity precision", "entity_recall": "entity recall",
    "entity_f1_macro": "macro entity F1", "word_accuracy": "word accuracy", "recall_at_1": "recall at 1",
    "recall_at_10": "recall at 10", "reciprocal_rank": "mean reciprocal rank",
}  # fmt: skip
NO_SHARES = {
    "bleu": " points", "chrf": " points", "perplexity": "", "length": " words", "pearson": " points",
    "spearman": " points", "rmse": "", "mae": "",
}  # fmt: skip
"""Metrics that are not shares of one, and what their differences are counted in."""
TIMES_100 = frozenset({"pearson", "spearman"})
"""No shares, but shown times 100 like them."""
OWN_UNIT = frozenset({"rmse", "mae"})
"""In the unit of the rows' numbers, which may be of any size."""
LESS_IS_BETTER = frozenset({"perplexity", "loss", "rmse", "mae"})


def metric_name(metric: str) -> str:
    """Return a metric's name for readers: `rougeL` is ROUGE-L."""
    return METRICS.get(metric, metric.replace("_", " "))


def title(name: str) -> str:
    """Capitalise the first letter; the rest stays, and names with capitals of their own (chrF) too."""
    first = name.partition(" ")[0]
    return name if first != first.lower() else name[:1].upper() + name[1:]


def percent(value: float | None) -> str:
    """Format a share in percent: 0.786 -> 78.6 %."""
    return DASH if value is None else f"{_fixed(100 * value)}{THIN}%"


def bare_percent(value: float | None) -> str:
    """Format a share in percent without the sign: 0.786 -> 78.6."""
    return DASH if value is None else _fixed(100 * value)


def scale(metric: str) -> float:
    """Return the factor for display of a metric: 100 for shares, which are shown in percent, else 1."""
    return 1.0 if metric in NO_SHARES and metric not in TIMES_100 else 100.0


def unit(metric: str) -> str:
    """Return the unit of a difference, with a leading space."""
    return NO_SHARES.get(metric, " points")


def heading(metric: str) -> str:
    """Return a metric's name with its unit, for a column or an axis: `Accuracy, %`, `BLEU`."""
    ending = ", \N{MULTIPLICATION SIGN} 100" if metric in TIMES_100 else "" if metric in NO_SHARES else ", %"
    return title(metric_name(metric)) + ending


def least_span(metric: str) -> float:
    """Return the least span of an axis: two points, or nothing for metrics in the unit of the rows' numbers."""
    return 0.0 if metric in OWN_UNIT else 2 / scale(metric)


def value_of(metric: str, value: float | None) -> str:
    """Format a value with its unit: `78.6 %`, BLEU `23.4`, perplexity `12.3`."""
    return percent(value) if metric not in NO_SHARES else bare(metric, value)


def bare(metric: str, value: float | None) -> str:
    """Format a value without the percent sign."""
    if value is not None and metric in OWN_UNIT:
        return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", MINUS)
    return DASH if value is None else _fixed(scale(metric) * value)


def interval_of(metric: str, figure: Any) -> str:
    """Format the interval of a metric in its own unit: ``75.0 to 82.2``, or a dash if there is none."""
    return interval(figure, lambda value: bare(metric, value))


def signed(metric: str, value: float | None) -> str:
    """Format a difference in the metric's own unit: +1.2, −0.4, 0.0."""
    if value is not None and metric in OWN_UNIT:
        return bare(metric, value) if value <= 0 else f"+{bare(metric, value)}"
    return signed_points(None if value is None else value * scale(metric) / 100)


def share(value: float | None) -> str:
    """Format a share as `formatting.share` does, with narrow spaces."""
    return formatting.share(value, THIN)


def interval(figure: Any, show: Callable[[float | None], str] = bare_percent) -> str:
    """Format an interval: ``75.0 to 82.2``, or a dash if there is none."""
    low, high = number(figure, "low"), number(figure, "high")
    return DASH if low is None or high is None else f"{show(low)} to {show(high)}"


def signed_points(value: float | None) -> str:
    """Format a difference of shares in points, with its sign: +1.2, −0.4, 0.0."""
    if value is None:
        return DASH
    text = f"{abs(100 * value):.1f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def count(value: float | None) -> str:
    """Format a count in short as `formatting.short_count` does, with narrow spaces."""
    return formatting.short_count(value, THIN)


def exact(value: float | None) -> str:
    """Format a count with all its digits: 338,690."""
    return DASH if value is None else f"{value:,.0f}".replace("-", MINUS)


def byte_size(value: float | None) -> str:
    """Format a size in bytes as `formatting.byte_size` does, with narrow spaces."""
    return formatting.byte_size(value, THIN)


def seconds(value: float | None) -> str:
    """Return a time with one decimal below ten seconds: 4.1 s, 42 s, 3 min 20 s, 1 h 05 min."""
    return f"{value:.1f}{THIN}s" if value is not None and 0 < value < 9.95 else formatting.duration(value, THIN)


def milliseconds(value: float | None) -> str:
    """Format a time in milliseconds, or a dash if there is none."""
    return DASH if value is None else f"{formatting.milliseconds(value)}{THIN}ms"


def short(text: str) -> str:
    """Shorten a number for an axis, without a last zero: 1.0 k -> 1 k."""
    return text.replace(f".0{THIN}", THIN)


def plain(value: float | None) -> str:
    """Format any number with four significant digits: 0.6931, 12.4, 0.001, 2e-05."""
    return DASH if value is None else f"{value:.4g}".replace("-", MINUS)


def plural(number_: int, one: str, many: str | None = None) -> str:
    """Format a number with its noun: ``1 row``, ``2,000 rows``."""
    return f"{number_:,} {one if number_ == 1 else many or one + 's'}"


def listed(names: list[str], last: str = "and") -> str:
    """List names in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else ""


def settings(method: Mapping[str, Any]) -> str:
    """Format a method's settings in one line, without its name and empty ones."""
    said = [
        f"{key} {_setting(value)}" for key, value in method.items() if key != "name" and value not in (None, {}, [])
    ]
    return ", ".join(said)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _fixed(value: float) -> str:
    text = f"{value:.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def lost(points: float | None) -> str:
    """Format points that were lost: 1.2, or with a minus what was gained."""
    return DASH if points is None else f"{points:.1f}".replace("-", MINUS)
