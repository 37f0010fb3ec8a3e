"""What simple means reach on the rows of finished runs, and how much better the runs are, in paired intervals.

    python -m benchmarks.baselines RUN...                     runs of one task, with the same rows
    python -m benchmarks.baselines --synopses FILE FOLDER     files for `classification` of pairs and `similarity`

Each baseline learns from the run's own training rows, chooses on its validation rows, and answers its test rows. Those
of numbers and of labels learn from the validation rows too, once their settings are chosen:

* numbers: ridge regression on TF-IDF; several labels: one-against-rest logistic regression on TF-IDF,
  with threshold 0.5, and with strength and threshold chosen on the validation rows;
* tags: a dictionary of the training rows' spans, of those that are more often a span than not;
* pairs: logistic regression on the TF-IDF cosine of the two texts; vectors: TF-IDF itself.

A run that was not evaluated yet is evaluated first.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

import graftwerk as gw
from graftwerk.config import RunConfig
from graftwerk.evaluation.metrics import point
from graftwerk.evaluation.paired_bootstrap import paired_difference
from graftwerk.evaluation.results_io import load_evaluation
from graftwerk.tasks.multilabel import best_threshold
from graftwerk.tasks.predictions import ClassPredictions, LabelPredictions, Predictions, ScorePredictions
from graftwerk.tasks.spans import spans_of
from graftwerk.tasks.splits import Splits
from graftwerk.tasks.tag_predictions import NOBODY, TagPredictions
from graftwerk.tasks.vector_predictions import SimilarityPredictions

STRENGTHS = (1.0, 3.0, 10.0, 30.0)
"""Of logistic regression, tried on the validation rows; of ridge regression the penalty."""
SIZES = {"test": 1000, "validation": 300, "train": 3000}
PREFIX = "golang|github|node|python3?|ruby|r|cran|rust|fonts|texlive|ghc|haskell|gir1\\.2|kf5|qml|php|elpa|test|dict|js"
FAMILY = re.compile(rf"^(?:lib|(?:{PREFIX})-)*(.[a-z]*).*$")
"""Packages of one source are described in much the same words: `libtsk-dev` and `libtsk19` are of one family, `tsk`."""


def vectorizer(texts: Sequence[str]) -> TfidfVectorizer:
    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit(texts)


def features(splits: Splits) -> list[Any]:
    """Return the TF-IDF of the texts of training, validation and test rows."""
    texts = [[row["text"] for row in rows] for rows in (splits.train, splits.validation, splits.test)]
    words = vectorizer(texts[0])
    return [words.transform(part) for part in texts]


def usual_labels(splits: Splits, ours: LabelPredictions) -> LabelPredictions:
    """Strength 10 and threshold 0.5 whatever the rows, learnt from all that are not measured."""
    rows = [*splits.train, *splits.validation]
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2).fit([row["text"] for row in rows])
    targets = np.array([[name in row["labels"] for name in splits.labels or ()] for row in rows], dtype=int)
    model = OneVsRestClassifier(LogisticRegression(C=10.0, max_iter=2000))
    model.fit(words.transform([row["text"] for row in rows]), targets)
    scores = model.predict_proba(words.transform([row["text"] for row in splits.test]))
    return replace(ours, scores=scores, thresholds=np.full(scores.shape[1], 0.5))


def labels(splits: Splits, ours: LabelPredictions) -> LabelPredictions:
    names = splits.labels or ()
    train, held, test = (
        np.array([[name in row["labels"] for name in names] for row in rows], dtype=int)
        for rows in (splits.train, splits.validation, splits.test)
    )
    assert np.array_equal(test, ours.targets)
    x, y, z = features(splits)
    tried = []
    for strength in STRENGTHS:
        model = OneVsRestClassifier(LogisticRegression(C=strength, max_iter=2000))
        scores = model.fit(x, train).predict_proba(y)
        threshold = best_threshold(scores.ravel(), held.ravel())
        tried.append((point("f1_micro", LabelPredictions(None, scores, held, np.array([threshold]))), threshold, model))
    _, threshold, model = max(tried, key=lambda one: one[0] or 0.0)
    model.fit(vstack([x, y]), np.concatenate([train, held]))
    return replace(ours, scores=model.predict_proba(z), thresholds=np.full(len(names), threshold))


def numbers(splits: Splits, ours: ScorePredictions) -> ScorePredictions:
    assert np.allclose([row["score"] for row in splits.test], np.asarray(ours.targets))
    x, y, z = features(splits)
    train, held = ([row["score"] for row in rows] for rows in (splits.train, splits.validation))
    models = [Ridge(strength / 10).fit(x, train) for strength in STRENGTHS]
    best = min(models, key=lambda model: float(np.square(model.predict(y) - held).sum()))
    return replace(ours, values=best.fit(vstack([x, y]), [*train, *held]).predict(z))


def tags(splits: Splits, ours: TagPredictions) -> TagPredictions:
    inside: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in splits.train:
        for start, end, kind in spans_of(row["tags"]):
            inside[tuple(row["tokens"][start:end])][kind] += 1
    longest = max(map(len, inside))
    seen = Counter(
        piece
        for row in splits.train
        for start in range(len(row["tokens"]))
        for size in range(1, longest + 1)
        if (piece := tuple(row["tokens"][start : start + size])) in inside and len(piece) == size
    )
    known = {words: kinds.most_common(1)[0][0] for words, kinds in inside.items() if 2 * kinds.total() >= seen[words]}
    ids = {name: at for at, name in enumerate(ours.labels)}
    found = np.full_like(ours.tags, NOBODY)
    assert ours.target_names == [tuple(row["tags"]) for row in splits.test]
    assert len(ours.tags) == len(splits.test), "a row is longer than a window"
    for number, row in enumerate(splits.test):
        words, at = row["tokens"], 0
        found[number, : len(words)] = ids["O"]
        while at < len(words):
            sizes = range(min(longest, len(words) - at), 0, -1)
            size = next((size for size in sizes if tuple(words[at : at + size]) in known), 0)
            if size:
                kind = known[tuple(words[at : at + size])]
                found[number, at] = ids[f"B-{kind}"]
                found[number, at + 1 : at + size] = ids.get(f"I-{kind}", ids["O"])
            at += max(size, 1)
    return replace(ours, tags=found)


def pairs(splits: Splits, ours: ClassPredictions) -> ClassPredictions:
    names = splits.labels or ()
    words = vectorizer([text for row in splits.train for text in (row["text"], row["text_pair"])])

    def cosines(rows: Sequence[Any]) -> np.ndarray:
        first, second = (words.transform([row[part] for row in rows]) for part in ("text", "text_pair"))
        return np.asarray(first.multiply(second).sum(axis=1))  # (n, 1)

    model = LogisticRegression(C=1000.0).fit(cosines(splits.train), [names.index(row["label"]) for row in splits.train])
    assert [names.index(row["label"]) for row in splits.test] == np.asarray(ours.targets).tolist()
    return replace(ours, scores=model.predict_proba(cosines(splits.test)))


def vectors(splits: Splits, ours: SimilarityPredictions) -> SimilarityPredictions:
    words = vectorizer([text for row in splits.train for text in (row["anchor"], row["positive"])])
    anchors, others = (words.transform([row[part] for row in splits.test]).toarray() for part in ("anchor", "positive"))
    return replace(ours, anchors=anchors.astype(np.float32), others=others.astype(np.float32))


BASELINES: dict[str, tuple[dict[str, Callable[[Splits, Any], Predictions]], tuple[str, ...]]] = {
    "multilabel": ({"TF-IDF": usual_labels, "TF-IDF, tuned": labels}, ("f1_micro", "f1_labels")),
    "regression": ({"TF-IDF, tuned": numbers}, ("pearson", "spearman", "rmse")),
    "token-classification": ({"dictionary": tags}, ("entity_f1",)),
    "classification": ({"TF-IDF cosine": pairs}, ("accuracy",)),
    "similarity": ({"TF-IDF": vectors}, ("recall_at_10", "recall_at_1", "reciprocal_rank")),
}


def measured(run: Path) -> Predictions:
    found = load_evaluation(run, run / "adapter")
    if found is None:
        gw.evaluate(run, store=True, quiet=True)
        found = load_evaluation(run, run / "adapter")
    assert found is not None
    return found[1]


def compare(runs: Sequence[Path]) -> None:
    config = RunConfig.load(runs[0] / "config.yaml")
    answers = {run.name: measured(run) for run in runs}
    first = next(iter(answers.values()))
    splits = config.task.read(config.data)
    baselines, metrics = BASELINES[config.task.name]
    sides = {name: baseline(splits, first) for name, baseline in baselines.items()} | answers
    for metric in metrics:
        print(metric, {name: round(point(metric, answer) or 0.0, 4) for name, answer in sides.items()})
        names = list(sides)
        for at, a in enumerate(names):
            for b in names[:at] if a in answers else ():
                gap = paired_difference(sides[a], sides[b], metric=metric)
                print(f"  {a} - {b}: {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")


def write_synopses(source: Path, folder: Path) -> None:
    """Write 1,000 descriptions to measure on, 300 to choose on and 3,000 to train on, no family of packages in two."""
    families: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        families[FAMILY.sub(r"\1", row["package"])].append(row)
    left = sorted(families)
    random.Random(0).shuffle(left)
    parts: dict[str, list[dict[str, str]]] = {}
    for split, size in SIZES.items():
        part = parts[split] = []
        while len(part) < size:
            part += families[left.pop()]
        del part[size:]
    for number, (split, part) in enumerate(parts.items()):
        drawn = random.Random(number)
        asked = []
        for at, row in enumerate(part):
            other = part[(at + drawn.randrange(1, len(part))) % len(part)]
            own = at % 2 == 0
            document = (row if own else other)["document"]
            asked.append({"text": row["summary"], "text_pair": document, "label": "right" if own else "another"})
        for name, lines in (("synopses", part), ("pairs", asked)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders of one task")
    parser.add_argument("--synopses", nargs=2, type=Path, metavar=("FILE", "FOLDER"), help="write files of rows")
    options = parser.parse_args()
    if options.synopses:
        write_synopses(*options.synopses)
    if options.runs:
        compare(options.runs)


if __name__ == "__main__":
    main()
