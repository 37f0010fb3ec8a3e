"""The matrix: every method, every family, and the pairs that are refused, each with its reason.

README's capability table is rendered from here (`python -m tests.contract.cases`); the contract tests hold every cell
of it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwerk.methods.base import Method
from graftwerk.methods.registry import parse_method
from tests.families import ALL, FAMILIES, MORE, Family

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 2},
    "lora attention": {"name": "lora", "r": 2, "target_modules": "attention"},
    "rslora": {"name": "lora", "r": 2, "use_rslora": True},
    "dora": {"name": "lora", "r": 2, "use_dora": True},
    "pissa": {"name": "lora", "r": 2, "init_lora_weights": "pissa"},
    "lora tokens": {"name": "lora", "r": 2, "trainable_token_indices": [40, 3, 17]},
    "miss": {"name": "miss", "r": 5},
    "hira": {"name": "hira", "r": 2},
    "shira": {"name": "shira", "r": 2},
    "oft": {"name": "oft", "oft_block_size": 4},
    "houlsby": {"name": "bottleneck", "placement": "houlsby", "adapter_size": 3},
    "pfeiffer": {"name": "bottleneck", "placement": "pfeiffer", "adapter_size": 3},
    "parallel": {"name": "bottleneck", "placement": "parallel", "adapter_size": 3, "scaling": 2.0},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3},
    "prefix mlp": {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "ptuning mlp": {"name": "ptuning", "num_virtual_tokens": 3, "encoder_hidden_size": 6},
    "ptuning lstm": {
        "name": "ptuning", "num_virtual_tokens": 3, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM",
    },
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "probe": {"name": "probe"},
    "full": {"name": "full"},
}  # fmt: skip

NO_BIAS, NO_HEAD = "this model has none", "the task head alone"
REFUSED: dict[tuple[str, str], str] = {
    **{
        ("bitfit", family): NO_BIAS
        for family in (
            "modernbert", "llama", "mistral", "gemma", "t5", "qwen3", "gemma2", "gemma3", "olmo2", "granite", "smollm3",
            "mt5",
        )
    },
    **{("probe", family): NO_HEAD for family in ("marian", "granite", "pegasus", "m2m_100", "blenderbot")},
}  # fmt: skip
"""(method, family) -> words of the error."""
REASONS = {
    NO_BIAS: "BitFit trains biases, and this architecture has none in its linear layers and norms.",
    NO_HEAD: "A linear probe trains a task head, and transformers has none for this architecture.",
}
"""Words of an error -> what the table in the README says about it."""

PAIRS = [(method, family) for method in METHODS for family in FAMILIES if (method, family) not in REFUSED]
MORE_PAIRS = [(method, family) for method in METHODS for family in MORE if (method, family) not in REFUSED]
CORE = ("bert", "llama", "t5")
"""An encoder, a decoder, and both: every method is tried on them in every run of the tests."""


def in_turn(pairs: Iterable[tuple[str, str]], *, core: Container[str] = CORE, every: int = 3) -> list[Any]:
    """Return cases of ``pairs``: slow ones but for the families of the core and each ``every``-th of the others.

    The families take turns, so that the fast cases meet each method and each family.
    """
    methods, families = list(METHODS), list(ALL)
    return [
        pair
        if pair[1] in core or (methods.index(pair[0]) + families.index(pair[1])) % every == 0
        else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in pairs
    ]


def method_of(name: str) -> Method:
    return parse_method(METHODS[name])


def has_head(method: str, family: Family) -> bool:
    """Encoders are tried as classifiers, so that heads are in every check; the others as language models."""
    return family.classifier is not None and (family.kind == "encoder" or method == "probe")


def model_and_batch(method: str, family_name: str, *, rows: int = 3, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    family = ALL[family_name]
    model = family.build(classifier=has_head(method, family), seed=seed)
    batch = family.batch(rows=rows, seed=seed + 1)
    if family.kind == "seq2seq" and has_head(method, family):
        # These heads read the end token: one in each row, at the same place.
        batch = {
            "input_ids": batch["input_ids"].clamp_min(3),
            "attention_mask": torch.ones_like(batch["attention_mask"]),
        }
        batch["input_ids"][:, -1] = 2
    return model, batch


def perturb(parameters: Iterator[torch.nn.Parameter], seed: int, scale: float = 0.3) -> None:
    """Move every element away from where it starts, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def table() -> str:
    """Return the capability table in Markdown, a row for each family, and the reasons of its refusals below it."""
    notes = {reason: number for number, reason in enumerate(dict.fromkeys(REFUSED.values()), 1)}

    def cell(method: str, family: str) -> str:
        reason = REFUSED.get((method, family))
        return "yes" if reason is None else f"no ({notes[reason]})"

    lines = [f"| family | {' | '.join(METHODS)} |", f"|---|{'---|' * len(METHODS)}"]
    lines += [f"| {family} | {' | '.join(cell(method, family) for method in METHODS)} |" for family in ALL]
    merges = " | ".join("yes" if method_of(method).mergeable else "no" for method in METHODS)
    lines += [f"| *can be merged* | {merges} |", ""]
    return "\n".join([*lines, *(f"{number}. {REASONS[reason]}" for reason, number in notes.items())])


if __name__ == "__main__":
    print(table())
