"""How the default learning rates were chosen: one method, one rate at a time, on rows that no published figure uses.

    python benchmarks/defaults.py lora=5e-4,1e-3,2e-3 prefix=1e-2,3e-2 --seeds 0,1

Reads the film snippets, takes away every row that `examples/movies.yaml` trains, chooses or measures on, and splits
the rest: 2,000 to train on, 1,500 to measure on. Prints one JSON object a run.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from graftwerk.config import RunConfig
from graftwerk.data.settings import DataSettings
from graftwerk.tasks.catalog import task_named
from graftwerk.train.run import train

EXAMPLE = Path(__file__).parent.parent / "examples" / "movies.yaml"


def rows(folder: Path) -> tuple[Path, Path]:
    """Files with rows for training and for measuring, none of which the example uses."""
    config = RunConfig.load(EXAMPLE)
    task = task_named(config.task)
    used = task.read(config.data)
    texts = {row["text"] for split in (used.train, used.validation, used.test) for row in split}
    everything = task.read(DataSettings(train=config.data.train, filter=config.data.filter, validation=None))
    left = [row for row in everything.train if row["text"] not in texts]
    random.Random(123).shuffle(left)
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, part in zip(files, (left[:2000], left[2000:3500]), strict=True):
        file.write_text("".join(json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in part), "utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="METHOD=RATE,RATE", help="a method and the rates to try")
    parser.add_argument("--seeds", default="0", help="for instance 0,1,2")
    parser.add_argument("--head", default="auto", help="learning rate of the head")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_file, test_file = rows(folder)
        for entry in options.methods:
            method, _, rates = entry.partition("=")
            for rate in rates.split(","):
                for seed in options.seeds.split(","):
                    started = time.monotonic()
                    run = train(
                        EXAMPLE,
                        method=method,
                        output_dir=str(folder / f"{method}-{rate}-{seed}"),
                        **{
                            "data.train": str(train_file),
                            "data.filter": {},
                            "data.validation": None,
                            "data.test": str(test_file),
                            "data.max_train_rows": None,
                            "training.learning_rate": float(rate),
                            "training.head_learning_rate": options.head
                            if options.head == "auto"
                            else float(options.head),
                            "training.seed": int(seed),
                        },
                    )
                    accuracy = run.manifest["metrics"]["test"]["accuracy"]
                    seconds = round(time.monotonic() - started, 1)
                    print(
                        json.dumps({"method": method, "rate": rate, "seed": seed, **accuracy, "seconds": seconds}),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
