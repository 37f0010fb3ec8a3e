"""The rules of a recommendation, one a line: for whom, how many points, why, and where that was measured.

A candidate's points are the sum over the rules that hold. `plan` figures and measured comparisons add to them
(`recommend.py`, `evidence.py`). To change a recommendation, change a line here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AIMS = ("quality", "memory", "speed", "size", "many-tasks")
ALL = frozenset(AIMS)

CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "lora": {"name": "lora"},
    "lora-r64": {"name": "lora", "r": 64, "lora_alpha": 64, "use_rslora": True},
    "lora-top": {"name": "lora", "layers": "top-third"},
    "dora": {"name": "lora", "use_dora": True},
    "hira": {"name": "hira", "r": 32},
    "shira": {"name": "shira", "r": 32},
    "bottleneck": {"name": "bottleneck"},
    "prefix": {"name": "prefix"},
    "prompt": {"name": "prompt"},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "probe": {"name": "probe"},
    "full": {"name": "full"},
}
"""Candidates and their settings; the rest are the method's defaults. ``top-third``: of the layers."""

RESULTS, RATES, SPEED = "docs/results.md", "docs/decisions/0006", "docs/performance.md"
PEFT = "PEFT's benchmark: Llama-3.2-3B, MetaMathQA to GSM8K, one seed, 1,319 rows (+-2.7 points)"
FORGET = "RTE, MRPC, CoLA, SST-2 in sequence on BERT-base, 5 runs"
LESTER = "Lester et al. 2021, arXiv:2104.08691"
COUNT = "counted"
BILLION = 10**9


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        candidate: One of `CANDIDATES`.
        aims: For whom it holds.
        points: What it adds.
        why: The reason, for people.
        source: Where that was measured.
        parameters: Least and most parameters of the model.
        rows: Least and most training rows.
        writes: True for tasks that write text, False for others, None for both.
    """

    candidate: str
    aims: frozenset[str]
    points: float
    why: str
    source: str
    parameters: tuple[float, float] = (0, math.inf)
    rows: tuple[float, float] = (0, math.inf)
    writes: bool | None = None

    def holds(self, aim: str, parameters: int, rows: int, writes: bool) -> bool:
        """Return True if the rule is about this case."""
        return (
            aim in self.aims
            and self.parameters[0] <= parameters < self.parameters[1]
            and self.rows[0] <= rows < self.rows[1]
            and self.writes in (None, writes)
        )


def _for(*aims: str) -> frozenset[str]:
    return frozenset(aims)


SMALL, LARGE = (0, BILLION), (BILLION, math.inf)
FEW, SOME, MANY = (0, 500), (500, 5_000), (5_000, math.inf)

RULES: tuple[Rule, ...] = (
    # candidate     aims                   points  why                                                            source
    Rule("lora", ALL, 2, "near full fine-tuning, and free at inference once merged", RESULTS),
    Rule("lora", _for("quality"), 1, ".789 on film snippets, full fine-tuning .795", RATES, SMALL, writes=False),
    Rule("lora", _for("quality"), 1, "2.6 BLEU above bottlenecks, 4.7 above prefix", RESULTS, writes=True),
    Rule("lora", _for("many-tasks"), 2, "switched in .08 ms, mixed row by row, read by PEFT and vLLM", SPEED),
    Rule("lora-r64", _for("quality"), 4, "rank 64 with rsLoRA is best there: 51.3, LoRA r 32 47.8", PEFT, LARGE, MANY),
    Rule("lora-r64", _for("quality"), 2, "51.3 where LoRA r 32 has 47.8, on more rows than these", PEFT, LARGE, SOME),
    Rule("lora-r64", _for("size", "many-tasks"), -2, "eight times the adapter of rank 8", COUNT),
    Rule("lora-top", _for("speed"), 4, "the same score on film snippets in less than half of the time: the layers "
         "below are computed once and need no backward pass", SPEED),
    Rule("lora-top", _for("memory"), 3, "the layers below keep nothing for a backward pass", COUNT),
    Rule("lora-top", _for("size"), 1, "a third of LoRA's parameters", COUNT),
    Rule("lora-top", _for("quality"), -1, "fewer layers to learn in", RESULTS),
    Rule("dora", _for("quality"), 2, ".798 on film snippets, LoRA .789 (one seed)", RATES, SMALL),
    Rule("dora", _for("quality"), 0.5, "46.9, no better than LoRA's 47.8", PEFT, LARGE),
    Rule("dora", _for("speed", "memory"), -1, "a norm of each weight in every step", SPEED),
    Rule("hira", _for("quality"), 3, "51.3, level with the best", PEFT, LARGE),
    Rule("shira", _for("quality"), 2.5, "51.0 at the least memory of the best", PEFT, LARGE),
    Rule("shira", _for("memory"), 2, "51.0 at the least memory of the best", PEFT, LARGE),
    Rule("shira", _for("quality"), 1, ".766 on film snippets, above MiSS and HiRA", RATES, SMALL),
    Rule("bottleneck", _for("quality"), 2, "2 points around LoRA; second of four in translation", RESULTS),
    Rule("bottleneck", _for("quality"), 1, "as good at any rate near its default: little to tune with few rows", RATES,
         rows=FEW),
    Rule("bottleneck", _for("many-tasks"), 1, "mixed row by row in one batch, but stays in the forward pass", SPEED),
    Rule("prefix", _for("quality"), -1, "4.7 BLEU below LoRA", RESULTS, writes=True),
    Rule("prefix", _for("many-tasks", "size"), 1, "a few vectors a layer; mixed row by row in one batch", COUNT),
    Rule("prompt", _for("quality"), -2, "five points below the others whatever the rate", RATES, SMALL),
    Rule("prompt", _for("quality"), -1, "nears the others only with the model's size", LESTER, LARGE),
    Rule("prompt", _for("size"), 2, "twenty vectors", COUNT),
    Rule("ia3", _for("size"), 3, "three vectors a layer; 1.9 BLEU above the base", RESULTS),
    Rule("ia3", _for("many-tasks"), 2, "a few thousand numbers a task, mixed row by row", COUNT),
    Rule("ia3", _for("quality"), -1, "4.2 BLEU below LoRA", RESULTS, writes=True),
    Rule("ia3", _for("quality"), 1, "so few parameters that few rows suffice", RATES, rows=FEW),
    Rule("bitfit", _for("size"), 1.5, "biases alone; .764 on film snippets", RATES),
    Rule("bitfit", _for("memory"), 1, "no activations of linear layers are kept", COUNT),
    Rule("probe", _for("speed", "memory"), 2, "no backward pass through the model", COUNT),
    Rule("probe", _for("quality"), -3, ".648 on film snippets, LoRA .789", RATES),
    Rule("probe", _for("memory", "speed", "size"), -2, "15 points below LoRA on film snippets", RATES),
    Rule("full", _for("quality"), 2.5, ".795 on film snippets, LoRA .789", RATES, (0, BILLION / 3),
         (1_000, math.inf)),
    Rule("full", _for("quality"), -2, "47.2, below LoRA's variants, and forgets most (19.9 points, LoRA .6)",
         f"{PEFT}; {FORGET}", LARGE),
    Rule("full", _for("memory", "speed", "size", "many-tasks"), -4, "every weight has a gradient, two moments and "
         "a copy for each task", COUNT),
)  # fmt: skip

EPOCHS: tuple[tuple[tuple[float, float], float, str], ...] = (
    ((0, 300), 10, "few rows: more passes, and the best checkpoint is kept"),
    ((300, 1_000), 5, "under a thousand rows"),
    ((1_000, 50_000), 3, "the usual number"),
    ((50_000, math.inf), 1, "so many rows that one pass is a long training"),
)
"""Starting epochs by training rows."""


def settings_of(candidate: str, depth: int) -> dict[str, Any]:
    """Return the settings of a candidate for a model of so many layers."""
    settings = dict(CANDIDATES[candidate])
    if settings.get("layers") == "top-third":
        settings["layers"] = f"top-{max(1, depth // 3)}"
    return settings


def epochs_for(rows: int) -> tuple[float, str]:
    """Return the starting epochs for so many rows, and why.

    Example:
        >>> epochs_for(2_000)
        (3, 'the usual number')
    """
    return next((epochs, why) for (low, high), epochs, why in EPOCHS if low <= rows < high)
