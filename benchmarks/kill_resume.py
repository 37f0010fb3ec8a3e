"""Kill -9 a training at random moments, resume it, and compare every byte with an undisturbed one.

    python benchmarks/kill_resume.py --kills 50 [--method lora] [--seed 0] [--json FILE]

A tiny BERT with random weights learns real dictionary glosses, with dropout. Trainings run in forked children of one
process that has everything imported, so that most kills hit a training and not an import. Each child goes on where
the one before it was killed; a run that reaches its end is compared and the next one begins. Compared are the
adapter's weights, the weights, moments and random states of every checkpoint left, and every logged loss. Exit code 0
means that nothing differed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROWS = Path(__file__).parents[1] / "examples" / "data" / "topic_wordnet_gloss.sample.jsonl"
TIMES = ("seconds", "left_seconds", "path", "cost")


def tiny_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    texts = [json.loads(line)["text"].lower() for line in ROWS.read_text(encoding="utf-8").splitlines()]
    words = [word for word, _ in Counter(word for text in texts for word in text.split()).most_common(400)]
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def run_file(model: Path, output_dir: Path, method: str) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {
            "train": str(ROWS), "columns": {"text": "text", "label": "label"}, "max_train_rows": 160, "validation": 24,
            "filter": {"label": ["noun.act", "noun.animal", "noun.body", "noun.food", "noun.person", "noun.plant"]},
        },
        "method": method,
        "training": {
            "max_steps": 60, "per_device_train_batch_size": 8, "eval_steps": 10, "save_steps": 3, "logging_steps": 1,
            "report_to": ["jsonl"],
        },
        "evaluation": {"resamples": 100},
        "output_dir": str(output_dir),
    }  # fmt: skip


def child(function: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def left_by(folder: Path) -> dict[str, bytes | list[dict[str, Any]]]:
    """What has to be the same: files by their bytes, the log by its lines without what the clock says."""
    files = [
        folder / "adapter" / "adapter_model.safetensors",
        *sorted((folder / "checkpoints").glob("step-*/*.safetensors")),
    ]
    left: dict[str, Any] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left["metrics.jsonl"] = [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines
        if line["kind"] in ("step", "evaluation", "diagnosis")
    ]
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, default=None, help="write the verdict there too")
    arguments = parser.parse_args()
    from graftwerk.training.train import train

    draw = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    tiny_model(folder / "model")
    train(run_file(folder / "model", folder / "undisturbed", arguments.method))
    expected = left_by(folder / "undisturbed")
    tree = run_file(folder / "model", folder / "run", arguments.method)
    begun = time.monotonic()
    os.waitpid(child(lambda: train({**tree, "output_dir": str(folder / "timed")})), 0)
    whole = time.monotonic() - begun
    kills = runs = 0
    differing: list[str] = []
    hit_at: Counter[int] = Counter()
    last = False
    while kills < arguments.kills or not last:
        pid = child(lambda: train(tree, resume=True))
        last = kills >= arguments.kills  # the last one is left to reach its end
        if not last:
            time.sleep(draw.uniform(0.05, 1.0) * whole)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -signal.SIGKILL:
            kills += 1
            newest = max((folder / "run" / "checkpoints").glob("step-*"), default=None)
            hit_at[0 if newest is None else int(newest.name.removeprefix("step-"))] += 1
            print(f"kill {kills:3d}: newest checkpoint {newest.name if newest else 'none yet'}", flush=True)
            continue
        if code != 0:
            print(f"a resume ended with exit code {code}; its folder is kept: {folder}", file=sys.stderr)
            return 1
        runs += 1
        found = left_by(folder / "run")
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        differing += wrong
        print(
            f"run {runs} is done after {kills} kills: {'differs in ' + ', '.join(wrong) if wrong else 'same bytes'}",
            flush=True,
        )
        shutil.rmtree(folder / "run")
    verdict = {
        "kills": kills,
        "runs": runs,
        "files_compared": len(expected),
        "differing": differing,
        "method": arguments.method,
        "seed": arguments.seed,
        "seconds_of_a_run": round(whole, 2),
        "checkpoints_at_the_kills": {str(step): count for step, count in sorted(hit_at.items())},
        "machine": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(verdict, indent=1) + "\n")
    said = "DIFFERENT" if differing else "all bytes the same"
    print(f"{kills} kills, {runs} runs to the end, {len(expected)} files each: {said}")
    if differing:
        print(f"kept: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
