"""P8: loading the 1st, 24th and 48th adapter, switching between 48, merging and unmerging, against PEFT.

SmolLM2-135M, LoRA r 8 on all 210 linear layers; the file is in the page cache for every side.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, material
from benchmarks.harness import Options, Row, Timed, expect
from benchmarks.p7_mixed_rows import loaded_model

ASKED = (1, 24, 48)


def clocked(call: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        kept = call()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    del kept
    return seconds


class Sitting:
    """Three models side by side: ours with folders as PEFT writes them, ours with our own folders, and PEFT's."""

    def __init__(self, times: dict[str, list[float]], own: Path, plain: Path) -> None:
        self.times, self.own, self.plain = times, own, plain
        self.mine, self.second, self.base = loaded_model(), loaded_model(), loaded_model()
        self.peer: Any = None

    def note(self, key: str, call: Callable[[], Any]) -> None:
        if key == "_":
            call()  # not clocked: a full collection of garbage before each of 48 loads takes longer than all of them
        else:
            self.times.setdefault(key, []).append(clocked(call))

    def load(self, number: int, asked: bool) -> None:
        from safetensors.torch import load_file

        import graftwerk as gw

        name, label = f"a{number}", (lambda kind: f"{kind} {number}" if asked else "_")
        self.note("raw" if asked else "_", lambda: load_file(self.own / "adapter_model.safetensors"))
        self.note(label("peft format"), lambda: gw.load(self.mine, self.plain, name=name))
        self.note(label("own format"), lambda: gw.load(self.second, self.own, name=name))
        self.note(label("peft"), lambda: self._load_peft(name))

    def _load_peft(self, name: str) -> None:
        from peft import PeftModel

        if self.peer is None:
            self.peer = PeftModel.from_pretrained(self.base, self.plain, name, low_cpu_mem_usage=True)
        else:
            self.peer.load_adapter(self.plain, name, low_cpu_mem_usage=True)

    def switch_and_merge(self, last: str) -> None:
        import graftwerk as gw

        ids = material.token_batch(material.SMOLLM2, 2, 8)["input_ids"]

        def logits(model: Any) -> torch.Tensor:
            with torch.inference_mode():
                found: torch.Tensor = model(ids).logits
                return found

        for _ in range(3):
            self.note("switch", lambda: gw.activate(self.mine, "a1"))
            self.note("switch peft", lambda: self.peer.set_adapter("a1"))
            gw.activate(self.mine, last)
            self.peer.set_adapter(last)
        before = logits(self.mine)
        expect(torch.equal(before, logits(self.second)), "the two formats give different models")
        expect(bool((before - logits(self.peer)).abs().max() < 5e-3), "logits differ from PEFT's")
        bits = {key: value.clone() for key, value in self.mine.state_dict().items() if "graft" not in key.split(".")}
        graft = gw.adapters(self.mine)[last]
        for _ in range(3):
            self.note("merge", graft.merge)
            expect(bool((logits(self.mine) - before).abs().max() < 5e-3), "merged differs from unmerged")
            self.note("unmerge", graft.unmerge)
            self.note("merge peft", lambda: self.peer.merge_adapter([last]))
            self.note("unmerge peft", lambda: self.peer.unmerge_adapter())
        state = self.mine.state_dict()
        expect(all(torch.equal(state[key], value) for key, value in bits.items()), "unmerging is not exact")
        self.note("merge for good", lambda: graft.merge(keep_base=False))
        expect(bool((logits(self.mine) - before).abs().max() < 5e-3), "merged for good differs from unmerged")


def measure(options: Options) -> list[Row]:
    import graftwerk as gw

    asked = (1, 2, 3) if options.quick else ASKED
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        base = loaded_model()
        graft = gw.attach(base, gw.LoRA(r=8, target_modules="all-linear"), name="first")
        material.randomise(graft)
        own, plain = graft.save(Path(name) / "own"), graft.save(Path(name) / "plain")
        (plain / "graftwerk.json").unlink()  # what PEFT itself writes: no fingerprint, no checksums
        gw.detach(base)
        for _ in range(options.repeats):
            sitting = Sitting(times, own, plain)
            for number in range(1, asked[-1] + 1):
                sitting.load(number, number in asked)
            sitting.switch_and_merge(f"a{asked[-1]}")
    return rows({key: Timed(tuple(values)) for key, values in times.items()}, asked)


def rows(timed: dict[str, Timed], asked: tuple[int, ...]) -> list[Row]:
    settings = {
        "times": {key: side.times for key, side in timed.items()},
        "peft": "load_adapter(low_cpu_mem_usage=True), set_adapter, merge_adapter, unmerge_adapter",
        "raw": "safetensors.torch.load_file of the same file, which maps the file and reads no values",
    }
    wanted = {1: 15, 24: 15, 48: 100}
    found = []

    def add(what: str, ours: str, peer: str, target: str, ratio: float, reached: bool, note: str = "") -> None:
        found.append(
            Row(
                "P8",
                what,
                timed[ours].median * 1e3,
                timed[peer].median * 1e3,
                "ms",
                ratio,
                target,
                reached,
                {"ours": timed[ours].worst * 1e3, "peer": timed[peer].worst * 1e3},
                settings,
                note,
            )
        )

    for form in ("peft format", "own format"):
        for number in asked:
            mine = timed[f"{form} {number}"].median
            note = "the first load takes the base's fingerprint" if (form, number) == ("own format", 1) else ""
            over, faster = mine / timed["raw"].median, timed[f"peft {number}"].median / mine
            least = wanted.get(number, 15)
            add(
                f"load no. {number}, {form}, over the raw read",
                f"{form} {number}",
                "raw",
                "at most 2",
                over,
                over <= 2,
                note,
            )
            add(
                f"load no. {number}, {form}, against PEFT",
                f"{form} {number}",
                f"peft {number}",
                f"{least}x faster",
                faster,
                faster >= least,
                note,
            )
        flat = timed[f"{form} {asked[-1]}"].median / timed[f"{form} {asked[1]}"].median
        add(
            f"load no. {asked[-1]} against no. {asked[1]}, {form}",
            f"{form} {asked[-1]}",
            f"{form} {asked[1]}",
            "flat: at most 1.1",
            flat,
            flat <= 1.1,
        )
    for what, peer, least, note in (
        ("switch", "switch", 200.0, ""),
        ("merge", "merge", 10.0, "keeps what it touches, so that unmerging is exact; PEFT subtracts, and is not"),
        ("merge for good", "merge", 10.0, "keep_base=False: in place and without a way back"),
        ("unmerge", "unmerge", 1.0, ""),
    ):
        faster = timed[f"{peer} peft"].median / timed[what].median
        add(f"{what}, {asked[-1]} loaded", what, f"{peer} peft", f"{least:g}x faster", faster, faster >= least, note)
    return found


if __name__ == "__main__":
    raise SystemExit(harness.main("P8", measure))
