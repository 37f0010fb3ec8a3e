"""Two commits side by side: is this checkout slower than an earlier one, and by how much?

Each case runs in two long-lived processes, one with the code of each commit, which take single steps in turn: old, new,
old, new. What the machine does meanwhile falls on neighbours alike, so the median of the neighbours' ratios shows a few
percent even where absolute times drift by tens of percent. P1 and P10 start whole commands, and take fewer rounds; P3
counts bytes. The earlier commit is checked out into a temporary folder.

    python -m benchmarks.commits COMMIT [--only p2,p7] [--rounds 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DRAWS = 2000

FEWER = 5
"""Cases that start a command take this many times fewer rounds."""

Step = Callable[[], object]
Built = tuple[Step, Step]
"""What comes before a step, outside the clock, and the step; a number that it gives stands for its seconds."""


def nothing() -> None:
    """Do nothing before a step."""


def training_step(model: str, dropout: float) -> Built:
    """P2: forward and backward of LoRA on all linear layers."""
    from benchmarks import material, p2_lora_step

    rows, length = {"minilm": (16, 32), "smollm2": (2, 64)}[model]
    load, name, classes = {
        "minilm": (material.minilm, material.MINILM, 2),
        "smollm2": (material.smollm2, material.SMOLLM2, None),
    }[model]
    batch = material.labelled(material.token_batch(name, rows, length), classes=classes)
    ours, _, _ = p2_lora_step.pair(load, dropout)
    return nothing, p2_lora_step.training(ours, batch)


def causal_loss(share: float) -> Built:
    """P4: a step of a causal language model with ``share`` of its tokens labelled."""
    import graftwerk as gw
    from benchmarks import material
    from graftwerk.tasks.causal import Causal

    model = material.smollm2()
    material.randomise(gw.attach(model, gw.LoRA(r=8, target_modules="all-linear")))
    model.train()
    task: Any = Causal()
    objective = getattr(task, "objective", task)  # a task was its own objective once
    batch = material.labelled(material.token_batch(material.SMOLLM2, 2, 64), share)

    def step() -> None:
        objective.loss(objective.forward(model, batch), batch).backward()

    return model.zero_grad, step


def mixed_rows(tokens: int) -> Built:
    """P7: eight rows with eight adapters, one decoding step or a prompt."""
    import graftwerk as gw
    from benchmarks import material, p7_mixed_rows

    number = 8
    ids = material.token_batch(material.SMOLLM2, number, p7_mixed_rows.CONTEXT + tokens)["input_ids"]
    with tempfile.TemporaryDirectory() as name:
        folders = p7_mixed_rows.adapters(Path(name), number)
        model = p7_mixed_rows.ours_with(folders)
    gw.activate(model, rows=[folder.name for folder in folders])
    return nothing, p7_mixed_rows.forward(model, ids, tokens)


def stored_adapters() -> tuple[Any, tempfile.TemporaryDirectory[str]]:
    """Return SmolLM2 with two adapters loaded, and the folder that both are in, which lives as long as the object."""
    from benchmarks import p7_mixed_rows

    kept = tempfile.TemporaryDirectory()
    folders = p7_mixed_rows.adapters(Path(kept.name), 2)
    return p7_mixed_rows.ours_with(folders), kept


def loading() -> Built:
    """P8: one more adapter from its folder."""
    import graftwerk as gw

    model, folders = stored_adapters()
    loaded: list[Any] = []

    def before() -> None:
        while loaded:
            loaded.pop().delete()

    def step() -> None:
        loaded.append(gw.load(model, Path(folders.name, "a0"), name="more", force=True))

    return before, step


def switching() -> Built:
    """P8: a thousand switches between two loaded adapters."""
    import graftwerk as gw

    model, _ = stored_adapters()

    def step() -> None:
        for _ in range(500):
            gw.activate(model, "a0")
            gw.activate(model, "a1")

    return nothing, step


def merging(undo: bool) -> Built:
    """P8: merge an adapter into its base, or take it out again."""
    import graftwerk as gw

    model, _ = stored_adapters()
    gw.activate(model, "a1")
    adapter = getattr(gw, "adapters", None) or gw.grafts  # type: ignore[attr-defined]
    chosen = adapter(model)["a1"]
    merged = [False]

    def turn(wanted: bool) -> None:
        if merged[0] != wanted:
            (chosen.merge if wanted else chosen.unmerge)()
            merged[0] = wanted

    return (lambda: turn(undo)), (lambda: turn(not undo))


def command(*words: str) -> Built:
    """P1 and P10: a graftwerk command in a process of its own, which begins cold but for the disk's caches."""
    line = [sys.executable, "-m", "graftwerk", *words]
    return nothing, lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def short_run(*overrides: str) -> Built:
    """A training run on film snippets, from the start of the command to its end."""
    rows = ("data.max_train_rows=160", "data.validation=60", "data.test=60", "num_train_epochs=1")
    fixed = ("training.processes=1", "training.compute_type=float32", "training.report_to=[]")
    out = tempfile.TemporaryDirectory()
    _, step = command(
        "train", str(ROOT / "examples" / "movies.yaml"), "--overwrite", "-q", *rows, *fixed, *overrides,
        f"output_dir={out.name}/run",
    )  # fmt: skip
    return (lambda: Path(out.name).mkdir(exist_ok=True)), step


def bytes_kept(dropout: float) -> Built:
    """P3: what autograd keeps of a LoRA step; a number of bytes, the same each time."""
    from benchmarks import material, p2_lora_step, p3_bytes_kept

    batch = material.labelled(material.token_batch(material.MINILM, 16, 32), classes=2)
    model, _, _ = p2_lora_step.pair(material.minilm, dropout)
    return nothing, lambda: p3_bytes_kept.kept(model, batch)


CASES: dict[str, Callable[[], Built]] = {
    "p1 a training run of 160 rows": short_run,
    "p2 MiniLM 16x32": lambda: training_step("minilm", 0.0),
    "p2 MiniLM 16x32, dropout 0.1": lambda: training_step("minilm", 0.1),
    "p2 SmolLM2 2x64": lambda: training_step("smollm2", 0.0),
    "p2 SmolLM2 2x64, dropout 0.1": lambda: training_step("smollm2", 0.1),
    "p3 bytes kept": lambda: bytes_kept(0.0),
    "p3 bytes kept, dropout 0.1": lambda: bytes_kept(0.1),
    "p4 SmolLM2 2x64, 30 % labelled": lambda: causal_loss(0.3),
    "p7 eight rows, one token": lambda: mixed_rows(1),
    "p7 eight rows, 32 tokens": lambda: mixed_rows(32),
    "p8 load": loading,
    "p8 switch": switching,
    "p8 merge": lambda: merging(undo=False),
    "p8 unmerge": lambda: merging(undo=True),
    "p10 --help": lambda: command("--help"),
    "p10 one training step": lambda: short_run("training.max_steps=1"),
}


def work(case: str) -> None:
    """Take a step for each line that is read, and write its seconds."""
    import gc

    import torch

    torch.manual_seed(0)
    before, step = CASES[case]()
    for _ in range(1 if case.startswith(("p1 ", "p10")) else 3):
        before()
        step()
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    for _ in sys.stdin:
        before()
        start = time.perf_counter()
        found = step()
        print(found if isinstance(found, int) else time.perf_counter() - start, flush=True)


class Worker:
    """A process with the code of one checkout."""

    def __init__(self, checkout: Path, case: str) -> None:
        paths = {"PYTHONPATH": f"{checkout / 'src'}{os.pathsep}{checkout}", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--work", case],
            cwd=checkout, env={**os.environ, **paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer("ready")

    def _answer(self, wanted: str | None = None) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if wanted is None or line.strip() == wanted:
                return line.strip()
        raise SystemExit(f"the process of {self.process.args!r:.200} ended with {self.process.wait()}")

    def step(self) -> float:
        """Return the seconds of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def median_and_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the ratios and the 95 % interval of a bootstrap over rounds."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    return statistics.median(ratios), medians[DRAWS // 40], medians[-DRAWS // 40 - 1]


def compare(case: str, old: Path, new: Path, rounds: int) -> dict[str, Any]:
    """Take ``rounds`` steps of both, in turn; who is first changes each round."""
    workers = [Worker(old, case), Worker(new, case)]
    times: list[tuple[float, float]] = []
    for round_ in range(max(3, rounds // FEWER) if case.startswith(("p1 ", "p10")) else rounds):
        both = {side: workers[side].step() for side in ((0, 1) if round_ % 2 else (1, 0))}
        times.append((both[0], both[1]))
    for worker in workers:
        worker.close()
    ratio, low, high = median_and_interval([new_ / old_ for old_, new_ in times])
    medians = [statistics.median(side) for side in zip(*times, strict=True)]
    return {"case": case, "old": medians[0], "new": medians[1], "ratio": ratio, "low": low, "high": high}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="the earlier commit")
    parser.add_argument("--only", help="the first words of cases, with commas between them: p2,p8")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each side")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--work", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work)
        return
    if given.commit is None:
        parser.error("the earlier commit is missing")
    chosen = [case for case in CASES if not given.only or case.startswith(tuple(given.only.split(",")))]
    if not chosen:
        parser.error(f"no case begins with {given.only!r}; there are: {', '.join(CASES)}")
    found = []
    print(f"{'':32}{'old':>11}{'new':>11}   new over old (95 % interval)")
    with checked_out(given.commit) as old:
        for case in chosen:
            row = compare(case, old, ROOT, given.rounds)
            found.append(row)
            scale, unit = (1e-6, "MB") if case.startswith("p3") else (1e3, "ms")
            sides = "".join(f"{row[side] * scale:8.2f} {unit}" for side in ("old", "new"))
            print(f"{case:32}{sides}   {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
