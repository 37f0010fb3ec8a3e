"""The trunk once: what is kept equals what would be computed, is used only where it may be, and is checked."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftwerk.inject.attach as gw
from graftwerk import fast
from graftwerk.errors import Interrupted, UnsupportedError
from graftwerk.inject import trunk as cutting
from graftwerk.inject.targets import anatomy
from graftwerk.methods.catalog import parse_method
from graftwerk.store.safety import read_tensors
from graftwerk.tasks.base import Example
from graftwerk.tasks.causal import CausalLM
from graftwerk.tasks.classification import Classification
from graftwerk.train.checkpoint import Checkpoints
from graftwerk.train.events import Event
from graftwerk.train.folder import read_manifest
from graftwerk.train.loop import Trainer
from graftwerk.train.run import train
from graftwerk.train.settings import TrainingSettings
from graftwerk.train.trunkstore import FileStates, MemoryStates, chunks, make_room, open_file
from tests.contract.cases import perturb
from tests.families import FAMILIES

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 2, "lora_dropout": 0.1, "layers": "top-1"},
    "bottleneck": {"name": "bottleneck", "adapter_size": 3, "layers": "top-1"},
    "ia3": {"name": "ia3", "layers": "top-1"},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3, "layers": "top-1"},
    "prefix mlp": {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6,
                   "layers": "top-1"},
    "bitfit": {"name": "bitfit", "layers": "top-1"},
    "probe": {"name": "probe"},
}  # fmt: skip
NO_BIAS = ("modernbert", "llama", "mistral", "gemma", "t5")
LAYERED_T5 = "hand more than hidden states on"


class Tokenizer:
    pad_token_id, pad_token_type_id = 0, 0


def rows(count: int, seed: int = 0, labels: int = 3, most: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, most, (1,), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        found.append(Example({"input_ids": ids}, int(torch.randint(0, labels, (1,), generator=generator))))
    return found


def of_text(examples: list[Example]) -> list[Example]:
    """The same rows with the second half of each as what is to be learnt."""
    return [
        Example(row.inputs, [-100] * (row.length // 2) + row.inputs["input_ids"][row.length // 2 :]) for row in examples
    ]


def trainer(
    model: Any,
    method: dict[str, Any],
    folder: Path,
    *,
    task: Any = None,
    train_rows: list[Example] | None = None,
    validation: list[Example] | None = None,
    emit: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Trainer:
    torch.manual_seed(3)
    graft = gw.attach(model, parse_method(method))
    given = {"num_train_epochs": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return Trainer(
        graft, task or Classification(), Tokenizer(), train_rows or rows(40), validation or [],
        TrainingSettings.model_validate({**given, **settings}), checkpoints=Checkpoints(folder / "checkpoints"),
        emit=emit,
    )  # fmt: skip


def losses_of(events: list[Event]) -> list[float]:
    return [event.figures["loss"] for event in events if event.kind == "step"]


# -- equal ------------------------------------------------------------------------------------------------------------


def _cases() -> Iterator[tuple[str, str]]:
    for method in METHODS:
        for family in FAMILIES:
            if not (method == "bitfit" and family in NO_BIAS) and not (method == "probe" and family == "marian"):
                yield method, family


@pytest.mark.parametrize(("method", "family"), list(_cases()))
def test_logits_and_gradients_are_those_of_the_whole_model(method: str, family: str) -> None:
    """Padded rows, in training mode; every family is skipped as said, or refused with the reason."""
    chosen = FAMILIES[family]
    head = method == "probe"
    model = chosen.build(classifier=head)
    batch = chosen.batch()
    if head and chosen.kind == "seq2seq":
        batch = {"input_ids": batch["input_ids"].clamp_min(3), "attention_mask": torch.ones_like(batch["input_ids"])}
        batch["input_ids"][:, -1] = 2
    graft = gw.attach(model, parse_method(METHODS[method] | ({"lora_dropout": 0.0} if method == "lora" else {})))
    perturb(graft.parameters(), 7, 0.1)
    model.train()

    def call() -> Any:
        return model(**batch)

    view = anatomy(model)
    cut = cutting.find_cut(model, view, graft.method, graft.heads)
    assert (cut.skipped, cut.depth) == ((2, 2) if head else (1, 2))
    if family == "t5" and not head:
        with pytest.raises(UnsupportedError, match=LAYERED_T5):
            cutting.reach(model, cut, call)
        return
    stacks = {stack.path for stack in view.stacks}
    hosts = [model.get_submodule(path) for path in (*graft.hosts, *graft.heads) if path not in stacks]
    assert cutting.below(model, cut, hosts, call)
    extras = cutting.extras_of(model, cut, call)
    with torch.no_grad():
        states = cutting.reach(model, cut, call)
    wanted = call().logits
    slopes = torch.autograd.grad(wanted.square().sum(), list(graft.parameters()), allow_unused=True)
    layers = model.get_submodule(cut.layers)
    ran: list[int] = []
    handles = [
        child.register_forward_hook(lambda m, a, o, at=at: ran.append(at))
        for at, layer in enumerate(layers)
        for child in layer.children()
    ]
    with cutting.skipping(model, cut, states, extras=extras):
        found = call().logits
    for handle in handles:
        handle.remove()
    assert set(ran) == set(range(cut.skipped, cut.depth))
    mask = batch["attention_mask"].bool()
    if found.dim() == 3 and found.shape[1] == mask.shape[1]:
        found, wanted = found[mask], wanted[mask]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    with cutting.skipping(model, cut, states, extras=extras):
        again = torch.autograd.grad(call().logits.square().sum(), list(graft.parameters()), allow_unused=True)
    for one, other in zip(slopes, again, strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    assert all("forward" not in layer.__dict__ for layer in layers)
    assert torch.equal(call().logits[mask] if call().logits.dim() == 3 and found.dim() == 2 else call().logits, wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "method", "task"),
    [("bert", "lora", "classification"), ("bert", "probe", "classification"), ("llama", "lora", "causal"),
     ("gpt2", "prefix", "causal"), ("bert", "bottleneck", "classification"), ("modernbert", "lora", "classification"),
     ("opt", "bitfit", "causal"), ("gpt2", "ia3", "causal")],
)  # fmt: skip
def test_fifty_steps_are_those_without_a_cache(
    family: str, method: str, task: str, checkpointing: bool, tmp_path: Path
) -> None:
    causal = task == "causal"
    examples = of_text(rows(40)) if causal else rows(40)
    told: dict[bool, list[Event]] = {True: [], False: []}
    made = {}
    for kept in (True, False):
        model = FAMILIES[family].build(classifier=not causal)
        work = trainer(
            model, METHODS[method], tmp_path / str(kept), task=CausalLM().on(model.config) if causal else None,
            train_rows=examples, validation=examples[:9], emit=told[kept].append, trunk_cache=kept,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        work.fit()
        made[kept] = (work, [value.clone() for value in work.graft.state_dict().values()])
    with_cache, without = losses_of(told[True]), losses_of(told[False])
    assert len(with_cache) == 50
    assert len(set(with_cache)) > 40
    torch.testing.assert_close(torch.tensor(with_cache), torch.tensor(without), atol=1e-5, rtol=0)
    figures = made[True][0].trunk.figures()
    assert figures["on"]
    assert figures["kept"]
    assert figures["rows_computed"] == 0
    assert figures["rows_served"] == 5 * (40 + 9)
    scores = {
        kept: [event.figures["loss"] for event in told[kept] if event.kind == "evaluation"] for kept in (True, False)
    }
    torch.testing.assert_close(torch.tensor(scores[True]), torch.tensor(scores[False]), atol=1e-5, rtol=0)
    assert not made[False][0].trunk.figures()["on"]


def test_switched_off_by_the_flag_of_all_fast_paths(tmp_path: Path) -> None:
    """The plain way is the same training: the trunk is in evaluation mode, though it is computed."""
    told: dict[bool, list[Event]] = {True: [], False: []}
    for plainly in (True, False):
        model = FAMILIES["bert"].build(classifier=True, dropout=0.2)
        work = trainer(model, METHODS["lora"], tmp_path / str(plainly), emit=told[plainly].append)
        if plainly:
            with fast.plain("trunk"):
                work.fit()
            assert not work.trunk.figures()["kept"]
        else:
            work.fit()
            assert work.trunk.figures()["kept"]
            assert work.trunk.figures()["dropout_off"]
    torch.testing.assert_close(
        torch.tensor(losses_of(told[True])), torch.tensor(losses_of(told[False])), atol=1e-5, rtol=0
    )
