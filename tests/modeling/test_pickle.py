"""Adapted models through pickle, `torch.save` and other processes. Nothing here reads a pickle but the tests."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.folder import load_adapter
from tests.contract.cases import METHODS, REFUSED, in_turn, method_of, model_and_batch, perturb


def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def with_two(method: str, family: str) -> tuple[Any, dict[str, Tensor]]:
    """A model with an adapter ``a`` of this method, active, and a LoRA ``b``."""
    model, batch = model_and_batch(method, family)
    perturb(gw.attach(model, method_of(method), name="a").parameters(), 5)
    perturb(gw.attach(model, parse_method({"name": "lora", "r": 2}), name="b").parameters(), 6)
    gw.activate(model, "a")
    return model, batch


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


PAIRS = [(method, family) for method in METHODS for family in ("bert", "llama") if (method, family) not in REFUSED]


@pytest.mark.parametrize(("method", "family"), in_turn(PAIRS, core=(), every=2))
def test_pickled_model_is_independent_and_equal(method: str, family: str) -> None:
    model, batch = with_two(method, family)
    bare, _ = model_and_batch(method, family)
    wanted = dict.fromkeys(("b", "a"), 0)
    found = {}
    for name in wanted:
        gw.activate(model, name)
        found[name] = answers(model, batch)
    for through in (through_pickle, through_torch):
        copied = through(model)
        assert gw.adapters(copied)["a"].model is copied
        assert torch.equal(answers(copied, batch), found["a"])  # which was active
        gw.activate(copied, "b")
        assert torch.equal(answers(copied, batch), found["b"])
        assert torch.equal(answers(model, batch), found["a"])
        gw.detach(copied)
        assert torch.equal(answers(copied, batch), answers(bare, batch))
        assert [type(module) for module in copied.modules()] == [type(module) for module in bare.modules()]


def test_pickled_model_keeps_rows_merges_and_what_trains() -> None:
    model, batch = with_two("lora", "bert")
    gw.activate(model, rows=["a", None, "b"])
    mixed = answers(model, batch)
    copied = through_pickle(model)
    assert torch.equal(answers(copied, batch), mixed)
    copied(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for graft in gw.adapters(copied).values() for parameter in graft.parameters())
    gw.activate(model, "a")
    before = answers(model, batch)
    gw.adapters(model)["a"].merge()
    copied = through_torch(model)
    assert torch.equal(answers(copied, batch), answers(model, batch))
    gw.adapters(copied)["a"].unmerge()
    assert torch.equal(answers(copied, batch), before)


@pytest.mark.parametrize("trainable", [False, True])
def test_pickle_of_a_loaded_adapter_holds_its_tensors_once(trainable: bool, tmp_path: Path) -> None:
    model, batch = model_and_batch("lora", "llama")
    graft = gw.attach(model, parse_method({"name": "lora", "r": 8}))
    perturb(graft.parameters(), 5)
    graft.save(tmp_path)
    loaded, _ = model_and_batch("lora", "llama")
    load_adapter(loaded, tmp_path, trainable=trainable)
    assert torch.equal(answers(through_pickle(loaded), batch), answers(model, batch))
    assert len(pickle.dumps(loaded)) < 1.1 * len(pickle.dumps(model))


_CHILD = """
import sys, torch
for number in range(int(sys.argv[2])):
    model, batch, wanted = torch.load(f"{sys.argv[1]}/{number}.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted), number
"""


def test_unpickled_model_works_without_importing_graftwerk(tmp_path: Path) -> None:
    pairs = [("lora", "bert"), ("dora", "llama"), ("prefix", "llama"), ("prompt", "bert"), ("parallel", "gpt2")]
    for number, pair in enumerate(pairs):
        model, batch = with_two(*pair)
        torch.save((model, batch, answers(model, batch)), tmp_path / f"{number}.pt")
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(tmp_path), str(len(pairs))]
    subprocess.run(command, check=True, timeout=120)


def _answer(pipe: Any, model: Any, batch: dict[str, Tensor]) -> None:
    pipe.send(answers(model, batch).tolist())


@pytest.mark.slow
def test_model_sent_to_spawned_process_gives_equal_outputs() -> None:
    model, batch = with_two("lora", "bert")
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, model, batch))
    process.start()
    assert here.poll(120)
    assert here.recv() == answers(model, batch).tolist()
    process.join()
