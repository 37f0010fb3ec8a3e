"""P3: what a LoRA step keeps for backward, and its peak memory above the weights, against PEFT.

Bytes are counted storage by storage as autograd keeps them, with the model's own loss on both sides. Peaks are those of
fresh processes, one for each side and repeat.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import harness, material
from benchmarks.harness import Options, Row, expect, spawn
from benchmarks.p2_lora_step import DROPOUTS, cases, pair, training

TARGETS = {0.0: 0.65, 0.1: 0.40}


def kept(model: Any, batch: Mapping[str, Any]) -> int:
    with material.kept_for_backward(model) as counted:
        loss = model(**batch).loss
        size = counted()
    expect(bool(loss.requires_grad), "no gradient is asked for")
    return size


def peak(case: str, p: float, side: str) -> None:
    """In a process of its own: one step's peak above the weights, as JSON."""
    load, batch = cases(False)[case]
    model, graft, twin = pair(load, p)
    chosen, other = (model, twin) if side == "ours" else (twin, model)
    del model, twin, graft, other
    gc.collect()
    print(json.dumps(material.peak_above_weights(training(chosen, batch))))


def measure(options: Options) -> Sequence[Row]:
    if options.extra.peak:
        peak(options.extra.peak[0], float(options.extra.peak[1]), options.extra.peak[2])
        return []
    rows = []
    for name, (load, batch) in cases(options.quick).items():
        for p in DROPOUTS:
            model, _, twin = pair(load, p)
            ours, peer = kept(model, batch), kept(twin, batch)
            rows.append(row(f"{name}, dropout {p}: kept for backward", p, [ours], [peer], "bytes"))
            del model, twin, _
            gc.collect()
            if options.quick:
                continue
            peaks: dict[str, list[int]] = {"ours": [], "peft": []}
            for _ in range(options.repeats):
                for side, found in peaks.items():
                    command = [sys.executable, "-m", "benchmarks.p3_bytes_kept", "--peak", name, str(p), side]
                    found.append(int(spawn(command).stdout.split()[-1]))
            rows.append(row(f"{name}, dropout {p}: peak above the weights", p, peaks["ours"], peaks["peft"], "bytes"))
    return rows


def row(what: str, p: float, ours: list[int], peer: list[int], unit: str) -> Row:
    mine, theirs = statistics.median(ours), statistics.median(peer)
    return Row(
        goal="P3",
        what=what,
        ours=mine,
        peer=theirs,
        unit=unit,
        ratio=mine / theirs,
        target=f"at most {TARGETS[p]} of PEFT's",
        reached=mine / theirs <= TARGETS[p],
        worst={"ours": max(ours), "peer": max(peer)},
        settings={"ours": ours, "peer": peer, "LoRA": "r 8, alpha 16, all linear layers, float32, the same weights"},
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peak", nargs=3, default=None, metavar=("CASE", "DROPOUT", "SIDE"), help=argparse.SUPPRESS)


if __name__ == "__main__":
    raise SystemExit(harness.main("P3", measure, arguments))
