"""`combine`: sums of adapters are sums of their updates, whatever their ranks, methods and signs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import graftwerk as gw
from graftwerk.cli.combine import weighted
from graftwerk.cli.main import main
from graftwerk.errors import AdapterError, ConfigError, ConflictError, GraftwerkError, UnsupportedError
from graftwerk.exports import update_arithmetic as sums
from graftwerk.models.load import load_model
from tests.cli.commands import Said
from tests.exports.conftest import Make

SMALL = {"name": "lora", "r": 2, "lora_alpha": 3, "target_modules": "all-linear", "rank_pattern": {"query": 3}}
LARGE = {"name": "lora", "r": 5, "use_rslora": True, "target_modules": "attention"}


def updates(base: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an adapter adds to each matrix of the base, and its head."""
    model = load_model(str(base), gw.open(folder)._loaded.task, gw.open(folder)._loaded.splits).double()
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapter = gw.load(model, folder)
    head = {key: value for key, value in adapter.state_dict().items() if adapter.is_head(key)}
    adapter.merge()
    after = dict(model.named_parameters())
    found = {name: after[name].detach() - value for name, value in before.items() if name in after}
    return {name: value for name, value in found.items() if value.abs().max() > 0}, head


@pytest.mark.parametrize("by", ["linear", "cat"])
@pytest.mark.parametrize(("base", "task"), [("encoder", "classification"), ("gpt2", "causal")])
def test_sum_is_that_of_the_full_updates(
    by: Any,
    base: str,
    task: str,
    tiny_encoder: Path,
    text_model: Callable[[str], Path],
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    model = tiny_encoder if base == "encoder" else text_model("gpt2")
    small = {**SMALL, "rank_pattern": {}} if base == "gpt2" else SMALL
    one, two = make_adapter(model, small, task), make_adapter(model, LARGE, task, "other", 0.2)
    result = gw.combine({one: 0.7, two: -1.3}, tmp_path / "sum", by=by)
    assert result["residual"] == 0.0
    assert result["rank"] == (8 if base == "encoder" else 7)
    assert not any("weighted mean" in note for note in result["notes"])  # one head alone is added
    own, part = (json.loads((folder / "graftwerk.json").read_text()) for folder in (result["out"], one))
    assert own["base"]["fingerprint"] == part["base"]["fingerprint"]
    assert own["max_length"] == part["max_length"] == 48
    (a, head), (b, _), (found, its) = (updates(model, folder) for folder in (one, two, result["out"]))
    assert found.keys() == a.keys() | b.keys()
    for name, value in found.items():
        wanted = 0.7 * a.get(name, 0) - 1.3 * b.get(name, 0)
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0)
    assert its.keys() == head.keys()
    for key, value in its.items():  # of the parts that are added, not of those that are taken away
        torch.testing.assert_close(value, head[key])


def test_sum_of_other_methods_is_that_of_their_updates(tiny_encoder: Path, make_adapter: Make, tmp_path: Path) -> None:
    methods = [{"name": "lora", "r": 2, "use_dora": True}, {"name": "hira", "r": 2}, "oft", "shira", "miss", "pissa"]
    parts = [make_adapter(tiny_encoder, method, "classification", f"a{at}") for at, method in enumerate(methods)]
    weights = [0.5, -0.25, 1.0, 2.0, 0.1, 0.3]
    result = gw.combine(list(zip(parts, weights, strict=True)), tmp_path / "sum")
    assert result["residual"] == 0.0
    each = [updates(tiny_encoder, folder) for folder in parts]
    found, its = updates(tiny_encoder, result["out"])
    for name, value in found.items():
        wanted = sum(weight * its.get(name, 0) for weight, (its, _) in zip(weights, each, strict=True))
        torch.testing.assert_close(value, wanted, atol=2e-6, rtol=0)
    positive = [(weight, head) for weight, (_, head) in zip(weights, each, strict=True) if weight > 0]
    for key, value in its.items():
        mean = sum(weight * head[key] for weight, head in positive) / sum(weight for weight, _ in positive)
        torch.testing.assert_close(value, mean)


def test_sum_equals_pefts_concatenation(tiny_decoder: Path, make_adapter: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    parts = [make_adapter(tiny_decoder, {"name": "lora", "r": rank}, "causal") for rank in (2, 3)]
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)  # PEFT adds in its type
    model = peft.PeftModel.from_pretrained(base, str(parts[0]), "one")
    model.load_adapter(str(parts[1]), "two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", combination_type="cat")
    theirs = {
        name.removeprefix("base_model.model."): module.get_delta_weight("sum")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "sum" in module.lora_A
    }
    found, _ = updates(tiny_decoder, gw.combine({parts[0]: 0.7, parts[1]: 0.4}, tmp_path / "sum")["out"])
    assert len(theirs) == len(found) > 4
    for name, value in theirs.items():
        torch.testing.assert_close(found[f"{name}.weight"], value.double(), atol=1e-6, rtol=0)


def test_svd_is_the_nearest_update_of_the_rank_and_tells_what_is_lost(
    tiny_encoder: Path, make_adapter: Make, tmp_path: Path
) -> None:
    one, two = (make_adapter(tiny_encoder, method, "classification") for method in (SMALL, LARGE))
    result = gw.combine({one: 1.0, two: 1.0}, tmp_path / "sum", by="svd", rank=2)
    (a, _), (b, _), (found, _) = (updates(tiny_encoder, folder) for folder in (one, two, result["out"]))
    lost = whole = 0.0
    for name, value in found.items():
        wanted = (a.get(name, 0) + b.get(name, torch.zeros_like(value))).detach().numpy()
        values = np.linalg.svd(wanted, compute_uv=False)
        distance = np.linalg.norm(value.detach().numpy() - wanted)
        assert distance == pytest.approx(np.sqrt((values[2:] ** 2).sum()), abs=1e-5)
        lost, whole = lost + distance**2, whole + (values**2).sum()
    assert result["residual"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert 0 < result["residual"] < 1
    usual = gw.combine({one: 1.0, two: 1.0}, tmp_path / "usual", by="svd")
    assert usual["rank"] == 5
    gone = gw.combine([(one, 1.0), (two, -1.0), (one, -1.0)], tmp_path / "gone")
    assert gone["rank"] == 5
    assert gone["out"].is_dir()


def test_reduced_to_more_than_an_update_has_keeps_what_it_has() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6, 2), (2, 8)))
    for rank in (None, 5):
        (left, right), left_out, norm = sums.reduced((torch.cat([b, b], 1), torch.cat([a, a])), rank)
        assert (left.shape, right.shape) == ((6, 2), (2, 8))
        torch.testing.assert_close(left @ right, 2 * b @ a)
        assert left_out < 1e-9 < norm


def test_ties_and_dare_are_those_of_peft() -> None:
    merge = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights = [1.0, 0.5, -0.7]
    ours = sums.SPARSE["ties"](parts, [0.7] * 3, 0.25, generator)  # PEFT elects signs before it weights
    torch.testing.assert_close(ours, merge.ties(parts, torch.tensor([0.7] * 3, dtype=torch.float64), 0.25))
    draws = torch.stack([sums.SPARSE["dare"](parts, weights, 0.5, generator) for _ in range(4000)])
    exact = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)
    assert float((draws.mean(0) - exact).abs().max()) < 0.12  # 5 standard errors of the largest entry
    dropped = torch.stack([sums.dropped(parts[0], 0.5, generator) for _ in range(400)])
    assert float((dropped == 0).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_della_drops_small_entries_of_a_row_more_often() -> None:
    update = torch.tensor([[4.0, -3.0, 2.0, 1.0, -0.5]], dtype=torch.float64)
    probability = sums.by_size(update, 0.5)
    assert probability.tolist()[0] == pytest.approx([0.4, 0.45, 0.5, 0.55, 0.6])
    assert sums.by_size(update, 1.0).tolist() == [[0.0] * 5]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sums.dropped(update, probability, generator) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), update, atol=0.3, rtol=0)
    assert torch.equal(sums.agreeing_mean([update, -update / 2]), update)


@pytest.mark.parametrize("by", ["ties", "dare", "della"])
def test_sparse_sums_are_seeded_and_of_the_sum_of_the_ranks(
    by: Any, tiny_encoder: Path, make_adapter: Make, tmp_path: Path
) -> None:
    one, two = (make_adapter(tiny_encoder, {"name": "lora", "r": rank}, "classification") for rank in (2, 3))
    parts = {one: 1.0, two: 1.0}
    results = [gw.combine(parts, tmp_path / str(at), by=by, seed=at // 2) for at in range(3)]
    assert results[0]["rank"] == 5
    assert 0 < results[0]["residual"] < 1
    assert [(result["density"], result["seed"]) for result in results] == [(0.5, 0), (0.5, 0), (0.5, 1)]
    first, again, other = (updates(tiny_encoder, result["out"])[0] for result in results)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert (by == "ties") == all(torch.equal(value, other[name]) for name, value in first.items())
    whole = gw.combine(parts, tmp_path / "whole", by="dare", density=1.0)
    exact = updates(tiny_encoder, gw.combine(parts, tmp_path / "exact")["out"])[0]
    for name, value in updates(tiny_encoder, whole["out"])[0].items():
        torch.testing.assert_close(value, exact[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"by": "cta"}, ConfigError, "did you mean `cat`"),
        ({"weights": (0.0, 1.0)}, ConfigError, "any number but 0"),
        ({"weights": (float("nan"), 1.0)}, ConfigError, "any number but 0"),
        ({"weights": (-1.0, -1.0)}, ConfigError, "all weights are negative"),
        ({"rank": 0}, ConfigError, "leaves nothing"),
        ({"rank": 2, "by": "cat"}, ConfigError, "keeps all factors"),
        ({"density": 1.5}, ConfigError, "above 0 and at most 1"),
        ({"method": "prefix"}, UnsupportedError, "no update of weights"),
        ({"method": "bitfit"}, UnsupportedError, "an update of its bias"),
        ({"method": {"name": "lora", "trainable_token_indices": [5]}}, UnsupportedError, "more than linear layers"),
        ({"method": "oft", "by": "svd"}, ConfigError, "no rank of its own"),
        ({"columns": {"text": "a"}}, ConfigError, "no data is given"),
        ({"full": True}, ConflictError, "not empty"),
    ],
)
def test_combine_refuses_what_makes_no_sum(
    changes: dict[str, Any],
    error: type[GraftwerkError],
    said: str,
    tiny_encoder: Path,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    method = changes.pop("method", "lora")
    parts = [make_adapter(tiny_encoder, one, "classification", f"a{at}") for at, one in enumerate(("lora", method))]
    out = parts[0] if changes.pop("full", False) else tmp_path / "sum"
    weights = changes.pop("weights", (1.0, 1.0))
    with pytest.raises(error) as raised:
        gw.combine(list(zip(parts, weights, strict=True)), out, **changes)
    assert said in str(raised.value)
    assert not (tmp_path / "sum").exists()


def test_combine_refuses_parts_of_other_bases(
    tiny_encoder: Path, text_model: Callable[[str], Path], make_adapter: Make, tmp_path: Path
) -> None:
    one, other = (
        make_adapter(tiny_encoder, "lora", "classification"),
        make_adapter(text_model("gpt2"), "lora", "causal"),
    )
    with pytest.raises(AdapterError):
        gw.combine({one: 1.0, other: 1.0}, tmp_path / "sum")


def test_parts_of_other_labels_give_their_updates_and_the_first_its_head(
    tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path
) -> None:
    one = make_adapter(tiny_encoder, "lora", "classification")
    scores = make_adapter(tiny_encoder, LARGE, "regression")
    result = gw.combine({one: 1.0, scores: 0.5}, tmp_path / "sum", data=labelled)
    assert any("the head is that of" in note for note in result["notes"])
    (a, head), (found, its) = (updates(tiny_encoder, folder) for folder in (one, result["out"]))
    assert all(torch.equal(value, head[key]) for key, value in its.items())
    assert any(not torch.allclose(value, a.get(name, torch.zeros(()))) for name, value in found.items())
    assert list(result["metrics"]["by_adapter"]) == [str(one), "combined"]
    assert any("is not measured" in note for note in result["notes"])


def test_combine_command_measures_the_sum_against_its_parts(
    capsys: pytest.CaptureFixture[str], tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path
) -> None:
    def graftwerk(*arguments: object) -> Said:
        code = main(["combine", *map(str, arguments)])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    one, two = (make_adapter(tiny_encoder, {"name": "lora", "r": rank}, "classification") for rank in (2, 3))
    said = graftwerk(f"{one}=0.5", "--subtract", f"{two}=0.25", "--out", tmp_path / "a", "--data", labelled, "--json")
    assert said.code == 0, said.err
    result = said.json
    assert [part["weight"] for part in result["parts"]] == [0.5, -0.25]
    metrics = result["metrics"]
    assert list(metrics["by_adapter"]) == [str(one), str(two), "combined"]
    assert [each["b"] for each in metrics["differences"]] == [str(one), str(two)]
    values = {name: each[metrics["differences"][0]["metric"]]["value"] for name, each in metrics["by_adapter"].items()}
    assert len({*values.values()}) > 1
    for each in metrics["differences"]:
        assert each["value"] == pytest.approx(values["combined"] - values[each["b"]])
    alone = gw.evaluate(result["out"], data=labelled, quiet=True)
    assert alone["metrics"] == metrics["by_adapter"]["combined"]
    words = ("--by", "svd", "--rank", 2, "--data", labelled)
    again = graftwerk(result["out"], one, "--out", tmp_path / "b", *words)
    assert again.code == 0, again.err
    assert "sum minus it" in again.out
    assert len(re.findall(r"[-+]\d\.\d{3} \([-+]", again.out)) == 2  # in the one metric that decides
    lost = json.loads((tmp_path / "b" / "graftwerk.json").read_text())["combined"]["residual"]
    assert f"rank up to 2, {100 * lost:.2g} % of the update left out" in again.err
    assert again.last == str(tmp_path / "b")
    assert "the head is the weighted mean" in again.err
    assert graftwerk(f"{one}=much", "--out", tmp_path / "c").code == 2
    assert weighted(str(one)) == (str(one), 1.0)
