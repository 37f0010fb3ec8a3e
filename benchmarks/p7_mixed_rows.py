"""P7: a batch whose rows all use different adapters, against the bare base and against PEFT's mixed batch.

SmolLM2-135M, 32 rows with 32 LoRA adapters on all 210 linear layers. Run in pieces: --part decode, prompt, ranks,
registered, methods (all by default).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, material
from benchmarks.harness import Options, Row, Timed, expect, interleaved

PARTS = ("decode", "prompt", "ranks", "registered", "methods")
CONTEXT = 16
"""Tokens in the cache before a decoding step."""
METHODS: dict[str, dict[str, Any]] = {
    "ia3": {"name": "ia3"},
    "bottleneck, houlsby, 16 wide": {"name": "bottleneck", "adapter_size": 16},
    "bottleneck, parallel, 16 wide": {"name": "bottleneck", "placement": "parallel", "adapter_size": 16},
    "dora r 8 on attention": {"name": "lora", "use_dora": True, "target_modules": "attention"},
    "prefix of 10": {"name": "prefix", "num_virtual_tokens": 10},
    "prompt of 10": {"name": "prompt", "num_virtual_tokens": 10},
}


def loaded_model() -> Any:
    """SmolLM2 with its weights in memory of its own: pages of a file may be dropped and read again meanwhile."""
    model = material.smollm2().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.requires_grad_(False)


def adapters(folder: Path, number: int, ranks: tuple[int, ...] = (8,)) -> list[Path]:
    """Folders of LoRA adapters with different random weights."""
    import graftwerk as gw

    model, made = material.smollm2(), []
    for index in range(number):
        graft = gw.attach(model, gw.LoRA(r=ranks[index % len(ranks)], target_modules="all-linear"), name=f"a{index}")
        material.randomise(graft, seed=index)
        made.append(graft.save(folder / f"a{index}", base_fingerprint="0" * 32))
        graft.delete()
    return made


def ours_with(folders: list[Path]) -> Any:
    import graftwerk as gw

    model = loaded_model()
    for folder in folders:
        gw.load(model, folder, name=folder.name, force=True)
    return model


def peft_with(folders: list[Path]) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(loaded_model(), folders[0], folders[0].name, low_cpu_mem_usage=True)
    for folder in folders[1:]:
        model.load_adapter(folder, folder.name, low_cpu_mem_usage=True)
    return model.eval()


def forward(model: Any, ids: torch.Tensor, tokens: int, **inputs: Any) -> Callable[[], torch.Tensor]:
    """A decoding step behind a filled cache (``tokens`` 1), or a prompt; gives the last logits (B, V)."""
    past = None
    if tokens == 1:
        with torch.inference_mode():
            past = model(ids[:, :CONTEXT], use_cache=True, **inputs).past_key_values
    asked = ids[:, CONTEXT : CONTEXT + tokens]

    def run() -> torch.Tensor:
        with torch.inference_mode():
            if past is not None and past.get_seq_length() > CONTEXT:
                past.crop(-1)
            logits: torch.Tensor = model(
                asked, past_key_values=past, use_cache=past is not None, logits_to_keep=1, **inputs
            ).logits
            return logits[:, -1]

    return run


def row(
    what: str, timed: dict[str, Timed], ours: str, peer: str, target: str, reached: bool, ratio: float, note: str = ""
) -> Row:
    return Row(
        goal="P7",
        what=what,
        ours=timed[ours].median * 1e3,
        peer=timed[peer].median * 1e3,
        unit="ms/step",
        ratio=ratio,
        target=target,
        reached=reached,
        worst={name: side.worst * 1e3 for name, side in timed.items()},
        settings={
            "times": {name: side.times for name, side in timed.items()},
            "peft": "LoRA on the same weights, adapter_names=[...], inference_mode",
            "rows": "all 32 adapters different, r 8 on 210 layers, loaded from folders, frozen",
        },
        note=note,
    )


def against_peft(options: Options, what: str, tokens: int, ranks: tuple[int, ...]) -> list[Row]:
    import graftwerk as gw

    number = 4 if options.quick else 32
    ids = material.token_batch(material.SMOLLM2, number, CONTEXT + tokens)["input_ids"]
    with tempfile.TemporaryDirectory() as name:
        folders = adapters(Path(name), number, ranks)
        mine, bare = ours_with(folders), loaded_model()
        peer = peft_with(folders)
    names = [folder.name for folder in folders]
    gw.activate(mine, rows=names)
    sides = {
        "base": forward(bare, ids, tokens),
        "ours": forward(mine, ids, tokens),
        "peft": forward(peer, ids, tokens, adapter_names=names),
    }
    found, theirs, base = sides["ours"](), sides["peft"](), sides["base"]()
    expect(bool((found - theirs).abs().max() < 5e-3), f"logits differ from PEFT's by {(found - theirs).abs().max()}")
    expect(bool((found - base).abs().max() > 0.1), "the adapters do nothing")
    timed = interleaved(sides, repeats=options.repeats * (3 if tokens == 1 else 1), warmup=3 if tokens == 1 else 1)
    over, faster = timed["ours"].median / timed["base"].median, timed["peft"].median / timed["ours"].median
    return [
        row(f"{what}, over the bare base", timed, "ours", "base", "at most 1.10", over <= 1.10, over),
        row(f"{what}, against PEFT", timed, "ours", "peft", "4.8x faster", faster >= 4.8, faster),
    ]


def registered(options: Options) -> list[Row]:
    import graftwerk as gw

    number, extra = (4, 20) if options.quick else (32, 968)
    ids = material.token_batch(material.SMOLLM2, number, CONTEXT + 1)["input_ids"]
    with tempfile.TemporaryDirectory() as name:
        folders = adapters(Path(name), number)
        few, many = ours_with(folders), ours_with(folders)
        small = gw.attach(loaded_model(), gw.LoRA(r=1, target_modules=["q_proj", "v_proj"]), name="small")
        folder = small.save(Path(name) / "small", base_fingerprint="0" * 32)
        for index in range(extra):
            gw.load(many, folder, name=f"more{index}", force=True)
    for model in (few, many):
        gw.activate(model, rows=[folder.name for folder in folders])
    sides = {"32 registered": forward(few, ids, 1), "1,000 registered": forward(many, ids, 1)}
    expect(torch.equal(sides["32 registered"](), sides["1,000 registered"]()), "idle adapters change the answer")
    timed = interleaved(sides, repeats=options.repeats * 3, warmup=3)
    ratio = timed["1,000 registered"].median / timed["32 registered"].median
    note = "the 968 idle ones: r 1 on the 60 query and value layers"
    return [
        row(
            "1,000 registered against 32", timed, "1,000 registered", "32 registered", "at most 1.05", ratio <= 1.05,
            ratio, note,
        )
    ]  # fmt: skip


def methods(options: Options) -> list[Row]:
    import graftwerk as gw
    from graftwerk.methods.registry import parse_method

    number, rows = (3 if options.quick else 32), []
    ids = material.token_batch(material.SMOLLM2, number, CONTEXT + 1)["input_ids"]
    bare = loaded_model()
    names = [f"a{index}" for index in range(number)]
    for title, settings in METHODS.items():
        model = loaded_model()
        torch.manual_seed(0)
        for seed, name in enumerate(names):
            graft = gw.attach(model, parse_method(settings), name=name)
            material.randomise(graft, seed=seed)
            graft.freeze()
        gw.activate(model, rows=names)
        mixed = forward(model, ids, 1)
        together = mixed()
        gw.activate(model, rows=names)
        timed = interleaved({"base": forward(bare, ids, 1), "ours": mixed}, options.repeats * 3, warmup=3)
        gw.activate(model, names[-1])
        alone = forward(model, ids[-1:], 1)()
        expect(bool((together[-1] - alone[0]).abs().max() < 5e-3), f"{title}: the last row is not its adapter's")
        ratio = timed["ours"].median / timed["base"].median
        rows.append(row(f"32 rows, one token: {title}", timed, "ours", "base", "at most 1.10", ratio <= 1.10, ratio))
        del model
    return rows


def measure(options: Options) -> list[Row]:
    parts = options.extra.part or [part for part in PARTS if not options.quick or part != "decode"]  # as in `ranks`
    rows: list[Row] = []
    if "decode" in parts:
        rows += against_peft(options, "32 rows, one token", 1, (8,))
    if "prompt" in parts:
        rows += against_peft(options, "32 rows, 32 tokens", 32, (8,))
    if "ranks" in parts:
        rows += against_peft(options, "32 rows, one token, ranks 4, 8, 16", 1, (4, 8, 16))
    if "registered" in parts:
        rows += registered(options)
    if "methods" in parts:
        rows += methods(options)
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=PARTS, help="this piece alone; may be given several times")


if __name__ == "__main__":
    raise SystemExit(harness.main("P7", measure, arguments, keep=True))
