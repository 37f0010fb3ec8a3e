"""The day a GPU is at hand: right on the device, waits a step, P2, P3, P4 and P7 beside PEFT, a 1B Llama, memory.

python -m benchmarks.on_gpu --minutes 10                     the accelerator of this machine
python -m benchmarks.on_gpu --minutes 2 --device cpu --dry-run    tiny models: tries the script, measures nothing

Parts run in the order of their worth until the minutes are over, and each is stored as soon as it ends: the same
command again goes on with those that are left, and with those that failed. `on_gpu.json` holds all rows, `on_gpu.md` is
the page. Run from the repository's root with the `dev` extra installed: the contract matrix is that of the tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import harness, material, page
from benchmarks.harness import Options, Row, WrongResultError

OUT = harness.RESULTS / "on_gpu"
CLOSE = 2e-3
"""Largest difference of logits and gradients from the CPU's, relative to the largest value, in float32."""
SHAPES = {
    False: {
        "vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": True,
    },
    True: {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Llama of 1.2 billion parameters, and that of a dry run."""


@dataclass(frozen=True)
class Setting:
    """Where parts run, how large, and until when."""

    device: str
    dry_run: bool
    deadline: float
    clock: Callable[[], float] = time.monotonic

    def left(self) -> float:
        return self.deadline - self.clock()


@dataclass(frozen=True)
class Part:
    """One piece that is stored as a whole; ``seconds`` is what it may take: it is not begun with less time left."""

    name: str
    run: Callable[[Setting], Sequence[Row]]
    seconds: float


class NotHereError(Exception):
    """Something that this machine lacks; the part is skipped, and the page says why."""


# -- the contract matrix -----------------------------------------------------------------------------------------------


def contract(method: str) -> Callable[[Setting], Sequence[Row]]:
    """Compare one method on the device with the CPU, on every family: logits, gradients, and the base after detach."""

    def run(setting: Setting) -> list[Row]:
        from tests.contract.cases import PAIRS

        families = [family for one, family in PAIRS if one == method][: 2 if setting.dry_run else None]
        wrong = {family: text for family in families if (text := differs(method, family, setting.device))}
        return [
            Row(
                goal="contract",
                what=f"{method}: families that give the CPU's logits and gradients",
                ours=len(families) - len(wrong),
                peer=len(families),
                unit="families",
                ratio=None,
                target="all",
                reached=not wrong,
                note="; ".join(f"{family}: {text}" for family, text in wrong.items()),
            )
        ]

    return run


def differs(method: str, family: str, device: str) -> str:
    """How a method on a family differs on the device; '' if it does not."""
    import torch

    import graftwerk.modeling.attach as gw
    from tests.contract.cases import method_of, model_and_batch, perturb
    from tests.contract.test_contract import loss_of

    def grafted(place: str) -> tuple[Any, dict[str, Any], Any]:
        model, batch = model_and_batch(method, family)
        model = model.to(place)
        torch.manual_seed(5)
        return model, {name: tensor.to(place) for name, tensor in batch.items()}, gw.attach(model, method_of(method))

    def answers(model: Any, batch: dict[str, Any], graft: Any) -> dict[str, Any]:
        loss_of(model, batch).backward()
        found = {key: parameter.grad.cpu() for key, parameter in graft.named_parameters() if parameter.grad is not None}
        with torch.no_grad():
            found["logits"] = model(**batch).logits.cpu()
            gw.detach(model)
            found["logits of the base"] = model(**batch).logits.cpu()
        return found

    try:
        first = grafted("cpu")
        perturb(first[2].parameters(), 7)
        second = grafted(device)
        second[2].load_state_dict(first[2].state_dict())
        expected, found = answers(*first), answers(*second)
    except Exception as error:  # one pair that fails says nothing of the others
        return f"{type(error).__name__}: {str(error)[:200]}"
    if expected.keys() != found.keys():
        return f"other parameters have gradients: {sorted(expected.keys() ^ found.keys())[:3]}"
    apart = {
        key: float((found[key] - value).abs().max() / value.abs().max().clamp_min(1e-3))
        for key, value in expected.items()
    }
    key = max(apart, key=lambda name: apart[name])
    return "" if apart[key] <= CLOSE else f"{key} differs by {apart[key]:.1e} of the largest"


# -- waits -------------------------------------------------------------------------------------------------------------


@contextmanager
def counted_waits(device: str) -> Iterator[Callable[[], int]]:
    """Count inside how often the host waits for the device: torch's own count on CUDA, on a CPU what would wait.

    Raises:
        NotHereError: torch does not count on this kind of device.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    kind = torch.device(device).type
    if kind == "cuda":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield lambda: sum("synchronizing CUDA operation" in str(one.message) for one in said)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return
    if kind != "cpu":
        raise NotHereError(f"torch does not count waits on {kind}")
    waiting = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func._schema.name.removeprefix("aten::") in waiting
            return func(*args, **(kwargs or {}))

    with Count() as mode:
        yield lambda: mode.seen


def waits(setting: Setting) -> list[Row]:
    """Waits of a step of `Trainer`: those of six steps less those of two, so that what happens once drops out."""
    methods = ["lora", "prompt"] if setting.dry_run else ["lora", "dora", "ia3", "houlsby", "prefix", "prompt"]
    rows = []
    for family, task in (("bert", "classification"), ("llama", "causal"), ("bart", "summarization")):
        for method in methods[: 1 if setting.dry_run and family != "bert" else None]:
            few, many = (waits_of(setting.device, family, task, method, steps) for steps in (2, 6))
            each = (many - few) / 4
            rows.append(
                Row(
                    goal="waits",
                    what=f"{method}, {family}, {task}",
                    ours=each,
                    peer=None,
                    unit="waits/step",
                    ratio=None,
                    target="at most 1",
                    reached=each <= 1,
                    settings={"in two steps": few, "in six": many},
                )
            )
    return rows


def waits_of(device: str, family: str, task: str, method: str, steps: int) -> int:
    import torch

    from graftwerk.modeling.attach import attach
    from graftwerk.tasks.base import Example
    from graftwerk.tasks.registry import parse_task
    from graftwerk.training.checkpoint import Checkpoints
    from graftwerk.training.distributed.single import SingleProcess
    from graftwerk.training.settings import TrainingSettings
    from graftwerk.training.trainer import Trainer
    from graftwerk.training.trainer_inputs import RunContext, TrainingData
    from tests.contract.cases import method_of
    from tests.families import FAMILIES

    torch.manual_seed(0)
    classes = task == "classification"
    model = FAMILIES[family].build(classifier=classes)
    draw = torch.Generator().manual_seed(0)
    examples = []
    for row in range(4 * steps):
        ids = torch.randint(3, 64, (12,), generator=draw).tolist()
        examples.append(Example({"input_ids": ids}, row % 2 if classes else ids))
    settings = TrainingSettings(max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, trunk_cache=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            attach(model, method_of(method)),
            parse_task(task).for_model(model.config),
            SimpleNamespace(pad_token_id=0, pad_token_type_id=0),  # type: ignore[arg-type]
            TrainingData(examples),
            settings,
            RunContext(Checkpoints(Path(folder) / "checkpoints")),
            distributed=SingleProcess(torch.device(device)),
        )
        with counted_waits(device) as seen:
            trainer.fit()
            return seen()


# -- the goals ---------------------------------------------------------------------------------------------------------


def goal(module: str, **extra: Any) -> Callable[[Setting], Sequence[Row]]:
    """Run a benchmark's own `measure` on the device."""

    def run(setting: Setting) -> Sequence[Row]:
        from importlib import import_module

        options = Options(setting.dry_run, 1 if setting.dry_run else 5, argparse.Namespace(**extra))
        with material.on(setting.device, tiny=setting.dry_run):
            return list(import_module(f"benchmarks.{module}").measure(options))

    return run


def bytes_kept(setting: Setting) -> list[Row]:
    """P3 in this process: an accelerator's allocator counts exactly, whatever ran before."""
    from benchmarks import p2_lora_step as p2
    from benchmarks import p3_bytes_kept as p3

    rows = []
    with material.on(setting.device, tiny=setting.dry_run):
        for name, (load, batch) in p2.cases(setting.dry_run).items():
            for p in p2.DROPOUTS:
                model, _, twin = p2.pair(load, p)
                sides = (model, twin)
                kept = [p3.kept(side, batch) for side in sides]
                rows.append(p3.row(f"{name}, dropout {p}: kept for backward", p, kept[:1], kept[1:], "bytes"))
                if setting.device != "cpu":
                    peaks = [material.peak_above_weights(p2.training(side, batch)) for side in sides]
                    what = f"{name}, dropout {p}: peak above the weights"
                    rows.append(p3.row(what, p, peaks[:1], peaks[1:], "bytes"))
                del model, twin, sides, _
                gc.collect()
    return rows


# -- a Llama of a billion parameters -----------------------------------------------------------------------------------


def llama(kind: str) -> Callable[[Setting], Sequence[Row]]:
    """Tokens a second and peak memory of LoRA on a 1B-shaped Llama, ours and PEFT's one after the other."""

    def run(setting: Setting) -> list[Row]:
        sides = {side: llama_side(setting, kind, side) for side in ("ours", "peft")}
        ours, peer = sides["ours"], sides["peft"]
        about = {"side by side": sides, "shape": SHAPES[setting.dry_run], "LoRA": "r 16, all linear layers, AdamW"}
        speed = ours["tokens/s"] / peer["tokens/s"]
        share = ours["peak"] / ours["planned"]
        return [
            Row(
                goal="1B",
                what=f"Llama in {kind}: tokens a second of training",
                ours=ours["tokens/s"],
                peer=peer["tokens/s"],
                unit="tokens/s",
                ratio=speed,
                target="faster than PEFT",
                reached=speed > 1,
                settings=about,
            ),
            Row(
                goal="1B",
                what=f"Llama in {kind}: peak memory",
                ours=ours["peak"] / 1e9,
                peer=peer["peak"] / 1e9,
                unit="GB",
                ratio=ours["peak"] / peer["peak"],
                target="less than PEFT",
                reached=ours["peak"] < peer["peak"],
                settings=about,
            ),
            Row(
                goal="1B",
                what=f"Llama in {kind}: measured peak over planned bytes",
                ours=ours["peak"] / 1e9,
                peer=ours["planned"] / 1e9,
                unit="GB",
                ratio=share,
                target="within 5 %",
                reached=abs(share - 1) <= 0.05,
                settings={"planned": "weights, 16 bytes a trained parameter, what autograd keeps, a tile of logits"},
            ),
        ]

    return run


def llama_side(setting: Setting, kind: str, side: str) -> dict[str, float]:
    import torch

    from graftwerk.devices import release
    from graftwerk.evaluation.peak_memory import peak_memory, resident
    from graftwerk.kernels.chunked_cross_entropy import TILES

    device = torch.device(setting.device)
    release()
    before = resident(device)
    model = llama_model(setting, kind)
    weights = sum(map(bytes_of, model.parameters()))
    loss_of, trained = llama_loss(model, side)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rows, length = (2, 16) if setting.dry_run else (4, 512)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=draw).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with material.kept_for_backward(model) as counted, torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(batch)
        kept = counted()
    del loss
    tile = ids.numel() * model.config.vocab_size // TILES * 4
    planned = weights + 16 * sum(parameter.numel() for parameter in trained) + kept + tile
    with peak_memory(above=before, device=device) as peak:
        step()
        step()
    with material.on(setting.device):
        timed = harness.interleaved({"step": step}, repeats=2 if setting.dry_run else 10)["step"]
    return {
        "tokens/s": ids.numel() / statistics.median(timed.times),
        "worst tokens/s": ids.numel() / timed.worst,
        "peak": float(peak.bytes or 1),
        "planned": float(planned),
        "weights": float(weights),
        "kept for backward": float(kept),
    }


def bytes_of(weight: Any) -> int:
    """Bytes of a weight, with the scales of a quantized one."""
    scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
    return int(weight.nbytes + (0 if scales is None else scales.nbytes))


def llama_model(setting: Setting, kind: str) -> Any:
    """Random weights, made on the device in bfloat16, quantized there if asked."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[setting.dry_run], max_position_embeddings=2048)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(setting.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if kind == "nf4":
        try:
            import bitsandbytes
        except ImportError:
            raise NotHereError("bitsandbytes is not installed: pip install 'graftwerk[quantized]'") from None
        for path, layer in list(model.named_modules()):
            if type(layer) is torch.nn.Linear and path != "lm_head":
                quantized = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                quantized.load_state_dict({"weight": layer.weight.detach().cpu()})
                model.set_submodule(path, quantized.to(setting.device))
        model.is_loaded_in_4bit = True
    return model.train()


def llama_loss(model: Any, side: str) -> tuple[Callable[[dict[str, Any]], Any], list[Any]]:
    """The loss of a side's training step, and what it trains."""
    if side == "ours":
        import graftwerk as gw
        from graftwerk.tasks.causal import Causal

        graft = gw.attach(model, gw.LoRA(r=16, target_modules="all-linear"))
        objective = Causal().objective
        return lambda batch: objective.loss(objective.forward(model, batch), batch), list(graft.parameters())
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return lambda batch: wrapped(**batch, use_cache=False).loss, [p for p in wrapped.parameters() if p.requires_grad]


# -- the run -----------------------------------------------------------------------------------------------------------


def parts(dry_run: bool) -> list[Part]:
    """All parts, the most valuable first; each method's matrix is one."""
    from tests.contract.cases import METHODS

    p7 = ["prompt", "ranks"] if dry_run else ["decode", "prompt", "ranks", "methods"]
    chosen = ["lora", "prefix"] if dry_run else list(METHODS)
    return [
        Part("waits", waits, 60),
        Part("1B bfloat16", llama("bfloat16"), 60),
        Part("P2", goal("p2_lora_step"), 60),
        Part("P3", bytes_kept, 30),
        Part("P4", goal("p4_causal_loss"), 60),
        *(Part(f"P7 {one}", goal("p7_mixed_rows", part=[one]), 60) for one in p7),
        Part("1B nf4", llama("nf4"), 60),
        *(Part(f"contract {method}", contract(method), 20) for method in chosen),
    ]


@dataclass
class Results:
    """What has been found so far, in a file."""

    file: Path
    identity: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def opened(cls, file: Path, identity: dict[str, Any], *, fresh: bool) -> Results:
        """Read what an earlier call left.

        Raises:
            SystemExit: It was on another device, or with other versions or code.
        """
        if fresh or not file.is_file():
            return cls(file, identity)
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["identity"] != identity:
            apart = [key for key in identity if before["identity"].get(key) != identity[key]]
            raise SystemExit(f"{file} is of another {', '.join(apart)}: give --fresh to replace it, or another --out")
        return cls(file, identity, before["parts"])

    def done(self, name: str) -> bool:
        return self.parts.get(name, {}).get("status") in ("done", "skipped")

    def store(self, name: str, **found: Any) -> None:
        self.parts[name] = found
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"identity": self.identity, "parts": self.parts}, indent=1) + "\n"
        beside = self.file.with_suffix(".part")
        beside.write_text(content, encoding="utf-8")
        beside.replace(self.file)


def run(chosen: Sequence[Part], results: Results, setting: Setting, say: Callable[[str], object] = print) -> list[str]:
    """Run what is not done yet until the time is over; gives the names of what is left."""
    from graftwerk.devices import release

    for part in chosen:
        if results.done(part.name):
            continue
        if setting.left() < (1 if setting.dry_run else part.seconds):
            continue  # a shorter one may still fit
        started = setting.clock()
        found: dict[str, Any]
        try:
            found = {"status": "done", "rows": [asdict(row) for row in part.run(setting)]}
        except (NotHereError, ModuleNotFoundError) as error:
            found = {"status": "skipped", "rows": [], "note": str(error)}
        except Exception as error:
            kind = "wrong" if isinstance(error, WrongResultError) else type(error).__name__
            found = {"status": "failed", "rows": [], "note": f"{kind}: {str(error)[-500:]}"}
        release()
        results.store(part.name, **found, seconds=round(setting.clock() - started, 1))
        say(f"{part.name}: {found['status']}{': ' + found['note'] if found.get('note') else ''}")
        for row in found["rows"]:
            say("  " + harness.line(row))
    return [part.name for part in chosen if not results.done(part.name)]


def drawn(results: Results, left: Sequence[str]) -> str:
    """The page."""
    identity = results.identity
    lines = ["# On an accelerator", ""]
    if identity["dry run"]:
        lines += ["**A dry run with tiny models: the figures mean nothing.**", ""]
    lines += [f"- {key}: {value}" for key, value in identity.items() if key != "dry run"]
    for name, part in results.parts.items():
        if part["status"] != "done":
            lines.append(f"- **{name}** was {part['status']}: {page._cell(part['note'])}")
    if left:
        lines.append(f"- not run yet, for want of time or because they failed: {', '.join(left)}")
    rows = [row for part in results.parts.values() for row in part["rows"]]
    lines += ["", page.TABLE, *(page._line(row) for row in rows)]
    if notes := [f"- {page._cell(row['what'])}: {page._cell(row['note'])}" for row in rows if row["note"]]:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def identity_of(device: str, dry_run: bool) -> dict[str, Any]:
    import torch

    from graftwerk.models.hardware import device_name

    kind = torch.device(device).type
    machine = harness.machine()
    return {
        "device": f"{kind}: {device_name(kind)}",
        "versions": ", ".join(f"{name} {machine[name]}" for name in harness.PACKAGES),
        "commit": harness._commit(),
        "dry run": dry_run,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no part is begun that may end later (10)")
    parser.add_argument("--device", default=None, help="the accelerator of this machine, unless it is named")
    parser.add_argument("--dry-run", action="store_true", help="tiny models: tries the script")
    parser.add_argument("--out", type=Path, default=None, help=f"folder of on_gpu.json and on_gpu.md ({OUT})")
    parser.add_argument("--part", action="append", help="this part alone; may be given several times")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier call has found")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from graftwerk.devices import best_device

    device = given.device or best_device().type
    if device == "cpu" and not given.dry_run:
        print("this machine has no accelerator; --device cpu --dry-run tries the script", file=sys.stderr)
        return 2
    chosen = parts(given.dry_run)
    if unknown := set(given.part or ()) - {part.name for part in chosen}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are: {', '.join(p.name for p in chosen)}")
    chosen = [part for part in chosen if not given.part or part.name in given.part]
    folder = given.out or (OUT / "dry-run" if given.dry_run else OUT)
    results = Results.opened(folder / "on_gpu.json", identity_of(device, given.dry_run), fresh=given.fresh)
    left = run(chosen, results, Setting(device, given.dry_run, started + 60 * given.minutes))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "on_gpu.md").write_text(drawn(results, left), encoding="utf-8")
    print(f"{folder / 'on_gpu.md'}: " + (f"{len(left)} parts are left; run the same again" if left else "complete"))
    return 1 if any(part["status"] == "failed" for part in results.parts.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
