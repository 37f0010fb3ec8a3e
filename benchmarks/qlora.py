"""QLoRA beside LoRA on SmolLM2-135M: the same rows, steps and seeds; bytes of the weights, losses, measured peaks.

    python benchmarks/qlora.py [--steps 100] [--kinds none,nf4,qera,int8] [--rows 4] [--tokens 64] [--seeds 0]
        [--example domain] [--json FILE]

Each run has a process of its own and the run file of an example with short rows. Prints one line per run, and for each
kind the ratio of each figure to LoRA's in full precision: mean and range over the seeds. `qera` is nf4 with
`init_lora_weights: qera`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwerk.config import RunConfig
from graftwerk.evaluation.base_model import load_base
from graftwerk.tasks.splits import Splits

EXAMPLES = Path(__file__).parent.parent / "examples"


def overrides(kind: str, seed: int, folder: Path, options: argparse.Namespace) -> list[str]:
    """Return what differs from the example."""
    return [
        f"quantization={ {'none': 'null', 'qera': 'nf4'}.get(kind, kind) }",
        *(["method.init_lora_weights=qera"] if kind == "qera" else []),
        f"training.seed={seed}",
        f"training.max_steps={options.steps}",
        f"training.per_device_train_batch_size={options.rows}",
        f"training.eval_steps={options.steps}",
        "training.logging_steps=1",
        "training.processes=1",
        "training.compute_type=float32",
        f"data.max_length={options.tokens}",
        "data.max_truncated=1.0",
        "data.validation=40",
        "data.test=null",
        "evaluation={generate: false}" if "instruction" in options.example else "evaluation={}",
        f"output_dir={folder}",
    ]


def weights_of(kind: str, config: RunConfig) -> dict[str, int]:
    """Return the bytes of the linear layers that are quantized, with their scales, and of all else."""
    cpu = torch.device("cpu")
    model = load_base(
        config.model, config.task, Splits((), (), (), None, ""), dtype=torch.float32, revision=None,
        quantization=config.quantization, compute=torch.float32, device=cpu, method=config.method,
    )  # fmt: skip
    outputs = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not outputs]
    linear = {id(layer.weight): layer.weight for layer in layers}
    others = sum(each.nbytes for each in model.parameters() if id(each) not in linear)
    return {"linear": sum(map(_stored, linear.values())), "others": others}


def _stored(weight: Tensor) -> int:
    state = getattr(weight, "quant_state", None)
    scales = [getattr(weight, "SCB", None), getattr(state, "absmax", None), getattr(state, "offset", None)]
    if state is not None and state.nested:
        scales += [state.state2.absmax]
    return weight.nbytes + sum(each.nbytes for each in scales if isinstance(each, Tensor))


def train(kind: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train in a process of its own; return what its files say."""
    changes, example = overrides(kind, seed, folder, options), EXAMPLES / f"{options.example}.yaml"
    subprocess.run(
        [sys.executable, "-m", "graftwerk", "train", str(example), *changes], check=True, stdout=subprocess.DEVNULL
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event.get("kind") == "step"]
    validation = [event["loss"] for event in events if event.get("kind") == "evaluation"]
    return {
        "kind": kind,
        "seed": seed,
        **weights_of(kind, RunConfig.load(example, changes)),
        "first_loss": losses[0],
        "last_losses": sum(losses[-20:]) / len(losses[-20:]),
        "validation_loss": validation[-1],
        "peak_memory_bytes": manifest["cost"]["peak_memory_bytes"],
        "seconds": manifest["cost"]["training_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kinds", default="none,nf4,qera,int8")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--example", default="domain", choices=("domain", "glosses-instruction"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    kinds, seeds = options.kinds.split(","), [int(seed) for seed in options.seeds.split(",")]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            for kind in kinds:
                found.append(train(kind, seed, Path(name, f"{kind}-{seed}"), options))
                print(json.dumps(found[-1]), flush=True)
    lora = {each["seed"]: each for each in found if each["kind"] == "none"}
    for kind in kinds if lora else ():
        for key in [key for key in found[0] if key not in ("kind", "seed")]:
            shares = [each[key] / lora[each["seed"]][key] for each in found if each["kind"] == kind]
            mean, low, high = sum(shares) / len(shares), min(shares), max(shares)
            print(f"{kind} {key}: {mean:.4f} of LoRA's ({low:.4f} to {high:.4f})", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
