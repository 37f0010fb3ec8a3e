"""P10: how long a command takes to begin: `graftwerk --help`, and the first training step of MiniLM.

    python -m benchmarks.p10_start [--repeats N] [--quick]

Cold processes, with a cache folder of their own: "first start" has nothing kept but the probe of the hardware, which is
made once for a machine; "next start" finds its rows read and encoded. The seconds are the run's own (`manifest.json`),
from the moment the kernel started the process. The peer is the same command with nothing kept and no fast path
(GRAFTWERK_PLAIN=1), so the ratio says what keeping is worth; the goals are bounds on the seconds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import ROOT, Options, Row, Timed, expect, spawn

HELP_SECONDS, FIRST_STEP_SECONDS = 0.3, 8.0


def first_step(folder: Path, env: dict[str, str], *, quick: bool) -> tuple[float, dict[str, Any]]:
    run = folder / "run"
    command = [sys.executable, "-m", "graftwerk", "train", str(ROOT / "examples" / "movies.yaml"), "--overwrite", "-q"]
    small = ["data.max_train_rows=200", "data.validation=50", "data.test=50"] if quick else []
    spawn([*command, "training.max_steps=1", "training.report_to=[]", f"output_dir={run}", *small], env)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return float(manifest["cost"]["first_step_seconds"]), manifest


def measure(options: Options) -> list[Row]:
    graftwerk = [sys.executable, "-m", "graftwerk"]
    repeats = options.repeats
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        env = {"GRAFTWERK_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        plain_env = {**env, "GRAFTWERK_PLAIN": "1"}
        expect("train" in spawn([*graftwerk, "--help"]).stdout, "--help does not list train")
        helps = harness.fresh({"help": [*graftwerk, "--help"]}, repeats=4 * repeats, warmup=1)["help"]
        times: dict[str, list[float]] = {"first": [], "next": [], "plain": []}
        said = []
        for round_ in range(repeats if options.quick else repeats + 1):
            shutil.rmtree(folder / "cache" / "prepared", ignore_errors=True)
            for side, its_env in (("first", env), ("next", env), ("plain", plain_env)):
                seconds, manifest = first_step(folder, its_env, quick=options.quick)
                said.append({key: manifest["data"][key] for key in ("fingerprint", "rows", "findings")})
                if round_ or options.quick:  # the first round warms the disk's cache, and probes the hardware
                    times[side].append(seconds)
        expect(all(each == said[0] for each in said), "kept rows or findings are others than those read anew")
    rows = [
        Row(
            goal="P10",
            what="graftwerk --help",
            ours=helps.median,
            peer=None,
            unit="s",
            ratio=None,
            target=f"in {HELP_SECONDS} s",
            reached=helps.median <= HELP_SECONDS,
            worst={"ours": helps.worst},
            settings={"times": [round(each, 4) for each in helps.times]},
        )
    ]
    plain = Timed(tuple(times["plain"]))
    for side, what in (("first", "first start"), ("next", "next start of the same run file")):
        ours = Timed(tuple(times[side]))
        rows.append(
            Row(
                goal="P10",
                what=f"first training step, {what}",
                ours=ours.median,
                peer=plain.median,
                unit="s",
                ratio=statistics.median(times["plain"]) / ours.median,
                target=f"within {FIRST_STEP_SECONDS:g} s",
                reached=ours.median <= FIRST_STEP_SECONDS,
                worst={"ours": ours.worst, "peer": plain.worst},
                settings={
                    "run file": "examples/movies.yaml",
                    "peer": "GRAFTWERK_PLAIN=1: nothing kept, no fast path",
                    "times": {side: [round(each, 3) for each in times[side]], "plain": list(plain.times)},
                },
            )
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(harness.main("P10", measure))
