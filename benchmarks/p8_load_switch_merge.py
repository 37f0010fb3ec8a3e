"""P8: loading the 1st, 24th and 48th adapter, switching between 49, merging and unmerging, against PEFT.

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


def measure(options: Options) -> list[Row]:
    from peft import PeftModel
    from safetensors.torch import load_file

    import graftwerk as gw

    last, asked = (3, (1, 2, 3)) if options.quick else (48, ASKED)
    times: dict[str, list[float]] = {}

    def note(key: str, call: Callable[[], Any]) -> None:
        times.setdefault(key, []).append(clocked(call))

    with tempfile.TemporaryDirectory() as name:
        base = loaded_model()
        graft = gw.attach(base, gw.LoRA(r=8, target_modules="all-linear"), name="first")
        material.randomise(graft)
        folder = graft.save(Path(name) / "own")
        theirs = graft.save(Path(name) / "peft")
        (theirs / "graftwerk.json").unlink()  # what PEFT itself writes: no fingerprint, no checksums
        gw.detach(base)
        weights = folder / "adapter_model.safetensors"
        for repeat in range(options.repeats):
            mine, own = loaded_model(), loaded_model()
            plain, peers = loaded_model(), []
            for number in range(1, last + 1):
                keep = number in asked
                each = f"a{number}"
                note("raw" if keep else "_", lambda: load_file(weights))
                note(f"peft format {number}" if keep else "_", lambda: gw.load(mine, theirs, name=each))
                note(f"own format {number}" if keep else "_", lambda: gw.load(own, folder, name=each))

                def load() -> None:
                    if peers:
                        peers[0].load_adapter(theirs, each, low_cpu_mem_usage=True)
                    else:
                        peers.append(PeftModel.from_pretrained(plain, theirs, each, low_cpu_mem_usage=True))

                note(f"peft {number}" if keep else "_", load)
            peer = peers[0]
            ids = material.token_batch(material.SMOLLM2, 2, 8)["input_ids"]
            with torch.inference_mode():
                expect(bool(torch.equal(mine(ids).logits, own(ids).logits)), "both formats give the same model")
            for _ in range(3):
                note("switch", lambda: gw.activate(mine, "a1"))
                note("switch peft", lambda: peer.set_adapter("a1"))
                gw.activate(mine, f"a{last}")
                peer.set_adapter(f"a{last}")
            with torch.inference_mode():
                before, theirs_before = mine(ids).logits, peer(ids).logits
                expect(bool((before - theirs_before).abs().max() < 5e-3), "logits differ from PEFT's")
            bits = {key: value.clone() for key, value in mine.state_dict().items() if "graft" not in key}
            for _ in range(3):
                note("merge", lambda: gw.grafts(mine)[f"a{last}"].merge())
                with torch.inference_mode():
                    expect(bool((mine(ids).logits - before).abs().max() < 5e-3), "merged differs from unmerged")
                note("unmerge", lambda: gw.grafts(mine)[f"a{last}"].unmerge())
                note("merge peft", lambda: peer.merge_adapter([f"a{last}"]))
                note("unmerge peft", lambda: peer.unmerge_adapter())
            state = mine.state_dict()
            expect(all(torch.equal(state[key], value) for key, value in bits.items()), "unmerging is not exact")
            del mine, own, peer, peers, plain, bits, state
    timed = {key: Timed(tuple(values)) for key, values in times.items() if key != "_"}
    return rows(timed, asked)


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
            )  # fmt: skip
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
                f"load no. {number}, {form}, against PEFT", f"{form} {number}", f"peft {number}", f"{least}x faster",
                faster, faster >= least, note,
            )  # fmt: skip
        flat = timed[f"{form} {asked[-1]}"].median / timed[f"{form} {asked[1]}"].median
        add(
            f"load no. {asked[-1]} against no. {asked[1]}, {form}", f"{form} {asked[-1]}", f"{form} {asked[1]}",
            "flat: at most 1.1", flat, flat <= 1.1,
        )  # fmt: skip
    for what, least in (("switch", 200.0), ("merge", 10.0), ("unmerge", 1.0)):
        faster = timed[f"{what} peft"].median / timed[what].median
        add(f"{what}, {asked[-1]} loaded", what, f"{what} peft", f"{least:g}x faster", faster, faster >= least)
    return found


if __name__ == "__main__":
    raise SystemExit(harness.main("P8", measure))
