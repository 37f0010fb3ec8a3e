"""How a method's defaults were chosen: some settings of one method, on rows that no published result uses.

    python benchmarks/defaults.py lora learning_rate=5e-4,1e-3,2e-3 --seeds 0,1
    python benchmarks/defaults.py bottleneck learning_rate=1e-3,2e-3 method.layer_norm=true,false

Every combination of the values given is trained with every seed. Reads the film snippets, takes away every row that
`examples/movies.yaml` trains, chooses or measures on, and splits the rest: 2,000 to train on, 1,500 to measure on.
Prints one JSON object a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

from graftwerk.config import RunConfig, parse_overrides
from graftwerk.data.settings import DataSettings
from graftwerk.training.train import train

EXAMPLE = Path(__file__).parent.parent / "examples" / "movies.yaml"


def rows(folder: Path) -> tuple[Path, Path]:
    """Files with rows for training and for measuring, none of which the example uses."""
    config = RunConfig.load(EXAMPLE)
    task = config.task
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
    parser.add_argument("method", help="its name, as in a run file")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE,VALUE", help="a key of a run file, and what to try")
    parser.add_argument("--seeds", default="0", help="for instance 0,1,2")
    options = parser.parse_args()
    keys = [entry.partition("=")[0] for entry in options.settings]
    values = [entry.partition("=")[2].split(",") for entry in options.settings]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_file, test_file = rows(folder)
        fixed = {
            "method": options.method,
            "data.train": str(train_file),
            "data.filter": {},
            "data.validation": None,
            "data.test": str(test_file),
            "data.max_train_rows": None,
            "training.report_to": [],
        }
        for number, chosen in enumerate(itertools.product(*values)):
            tried = dict(zip(keys, chosen, strict=True))
            for seed in map(int, options.seeds.split(",")):
                started = time.monotonic()
                settings = parse_overrides([f"{key}={value}" for key, value in tried.items()])
                out = {"output_dir": str(folder / f"{number}-{seed}"), "training.seed": seed}
                run = train(EXAMPLE, **{**fixed, **settings, **out})
                accuracy = run.manifest["metrics"]["test"]["accuracy"]
                seconds = round(time.monotonic() - started, 1)
                result = {"method": options.method, **tried, "seed": seed, **accuracy, "seconds": seconds}
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
