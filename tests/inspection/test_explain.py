"""`explain`: spectra against numpy, completeness of attributions, and a planted word that decides the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import graftwerk as gw
from graftwerk.cli.explain import show_layers, show_tokens
from graftwerk.cli.main import main
from graftwerk.cli.output import Output
from graftwerk.errors import ConfigError, ResourceError, UnsupportedError
from graftwerk.evaluation.settings import EvaluationSettings
from graftwerk.inspection import attribution
from graftwerk.inspection.spectra import spectra
from graftwerk.methods.base_weights import base_weight
from graftwerk.modeling.module_index import base_modules
from graftwerk.reporting.html import write_report
from tests.exports.conftest import Make

pytest.importorskip("captum")


@pytest.mark.parametrize("method", ["lora", {"name": "lora", "r": 3, "use_dora": True}, "oft", "hira"])
def test_spectra_are_those_of_the_merged_weights(method: Any, tiny_encoder: Path, make_adapter: Make) -> None:
    folder = make_adapter(tiny_encoder, method, "classification")
    found = gw.explain(folder)
    model = gw.open(folder).model.double()
    (adapter,) = gw.adapters(model).values()
    before = {path: base_weight(base_modules(model)[path]).clone() for path, _ in adapter.modules()}
    adapter.merge()
    assert found["base_unchanged"] is True
    assert len(found["layers"]) == len(adapter.hosts) > 5
    for layer in found["layers"]:
        weight = before[layer["name"]].numpy()
        update = base_weight(base_modules(model)[layer["name"]]).detach().numpy() - weight
        values = np.linalg.svd(update, compute_uv=False)
        assert layer["norm"] == pytest.approx(np.linalg.norm(update), rel=1e-5)
        assert layer["share"] == pytest.approx(np.linalg.norm(update) / np.linalg.norm(weight), rel=1e-5)
        count = min(len(layer["singular_values"]), 16)
        assert layer["singular_values"][:count] == pytest.approx(values[:count], abs=1e-5)
        shares = values[values > 1e-9] / values.sum()
        assert layer["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
        left, _, right = np.linalg.svd(weight, full_matrices=False)
        kept = round(0.1 * min(weight.shape))
        inside = left[:, :kept].T @ update @ right[:kept].T
        assert layer["in_main_directions"] == pytest.approx((inside**2).sum() / (update**2).sum(), rel=1e-4, abs=1e-9)
        assert layer["by_chance"] == pytest.approx(kept**2 / weight.size)


def test_spectra_of_factors_form_nothing_as_large_as_the_weight(tiny_encoder: Path, make_adapter: Make) -> None:
    model = gw.open(make_adapter(tiny_encoder, "lora", "classification")).model
    (adapter,) = gw.adapters(model).values()
    expected = list(spectra(adapter, adapter))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                largest = max(largest, made.untyped_storage().nbytes() // 8)
            return made

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr("graftwerk.inspection.spectra.PIECE", 256)
        sliced = list(spectra(adapter, adapter))
    weights = [base_weight(base_modules(model)[layer.name]) for layer in expected]
    assert max(min(weight.shape) ** 2 for weight in weights) == 32 * 32
    assert largest == 32 * 32  # the squares of the smaller side; the weights have up to twice as many entries
    assert max(weight.numel() for weight in weights) == 2 * largest
    for one, other in zip(expected, sliced, strict=True):
        assert (one.norm, one.similarity) == pytest.approx((other.norm, 1.0))
        assert one.in_main_directions == pytest.approx(other.in_main_directions)


@pytest.mark.parametrize("other", ["lora", pytest.param("oft", marks=pytest.mark.slow)])
def test_similarity_of_two_adapters_is_that_of_the_merged_weights(
    other: str, tiny_encoder: Path, make_adapter: Make
) -> None:
    folders = [make_adapter(tiny_encoder, "hira" if other == "oft" else "lora", "classification")]
    folders.append(make_adapter(tiny_encoder, {"name": other, "r": 4}, "classification", scale=0.2))
    updates = []
    for folder in folders:
        model = gw.open(folder).model.double()
        (adapter,) = gw.adapters(model).values()
        before = {path: base_weight(base_modules(model)[path]).clone() for path, _ in adapter.modules()}
        adapter.merge()
        updates.append({path: (base_weight(base_modules(model)[path]) - old).numpy() for path, old in before.items()})
    for one, two in (folders, folders[::-1]):
        for layer in gw.explain(one, against=two)["layers"]:
            first, second = (found[layer["name"]].ravel() for found in updates)
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert layer["similarity"] == pytest.approx(cosine, abs=1e-5)


def test_similarity_is_the_cosine_of_two_updates(tiny_encoder: Path, make_adapter: Make, tmp_path: Path) -> None:
    one = make_adapter(tiny_encoder, "lora", "classification")
    other = make_adapter(tiny_encoder, {"name": "lora", "r": 3, "target_modules": "attention"}, "classification")
    minus = gw.combine([(other, 1.0), (one, -2.0), (other, -1.0)], tmp_path / "minus")["out"]
    opposite = gw.explain(one, against=minus)["layers"]
    assert all(layer["similarity"] == pytest.approx(-1.0, abs=1e-5) for layer in opposite)
    near = {layer["name"]: layer["similarity"] for layer in gw.explain(one, against=other)["layers"]}
    assert {value is None for value in near.values()} == {True, False}  # where the other one has no update
    assert all(-1 < value < 1 for value in near.values() if value is not None)


def test_methods_that_are_no_update_of_weights_say_so(tiny_encoder: Path, make_adapter: Make) -> None:
    found = gw.explain(make_adapter(tiny_encoder, "prefix", "classification"))
    assert found["layers"] == []
    assert "no update of weights" in found["notes"][0]
    with pytest.raises(UnsupportedError, match="no update of weights"):
        gw.explain(
            make_adapter(tiny_encoder, "prompt", "classification"),
            against=make_adapter(tiny_encoder, "lora", "classification"),
        )


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "houlsby"])
def test_attributions_add_up_to_the_difference(method: str, tiny_encoder: Path, make_adapter: Make) -> None:
    folder = make_adapter(tiny_encoder, method, "classification")
    text = "a small animal that eats grass"
    told = list[tuple[int, int]]()
    result = gw.explain(folder, text, on_progress=lambda *at: told.append(at))
    (found,) = result["attributions"]
    one = found["adapter"]
    assert told[-1][0] == told[-1][1]
    assert sum("the base has no head" in note for note in result["notes"]) == 1
    assert sum(one["scores"]) - (one["value"] - one["baseline"]) == pytest.approx(one["delta"], abs=1e-4)
    assert abs(one["delta"]) <= 0.01 * abs(one["value"] - one["baseline"])
    assert len(one["tokens"]) == len(one["scores"])
    predictor = gw.open(folder)
    assert found["answer"] == predictor(text)["label"]
    assert found["base"] is None
    inputs = predictor.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        share = predictor.model(**inputs).logits.softmax(-1).max()
    assert float((share / (1 - share)).log()) == pytest.approx(one["value"], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_written_answers_are_explained_beside_the_base(
    family: str,
    text_model: Callable[[str], Path],
    make_adapter: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_adapter(text_model(family), "lora", {"name": "summarization"}, scale=0.3)
    result = gw.explain(folder, "The small program shows a window and closes it.")
    (found,) = result["attributions"]
    adapter, base = found["adapter"], found["base"]
    assert not any("no head" in note for note in result["notes"])
    assert adapter["value"] < 0
    assert base["value"] < 0
    assert base["value"] != adapter["value"]
    assert base["tokens"] == adapter["tokens"]
    exact = [abs(one["delta"]) <= 0.01 * abs(one["value"] - one["baseline"]) for one in (adapter, base)]
    assert (
        all(exact) or family == "t5"
    )  # drawn at random, it has steps that no number of points follows: then it is said
    assert any("of the integrals are off" in note for note in result["notes"]) == (not all(exact))
    monkeypatch.setattr(attribution, "ANSWER", 5)
    loaded = gw.open(folder)._loaded
    question = attribution._written(loaded, found["text"])
    ids, inputs = question.ids, {}
    if family in ("t5", "bart"):
        written = loaded.model.generate(ids, max_new_tokens=5, max_length=None, do_sample=False, num_beams=1)
        inputs, labels = {"decoder_input_ids": written[:, :-1]}, written[:, 1:]
    else:
        labels = ids.clone()
        labels[:, : question.length] = -100
    count = int((labels != -100).sum())
    if family == "gpt2":
        short = replace(loaded, evaluation=EvaluationSettings(max_new_tokens=2))
        again = attribution._written(short, found["text"])
        assert again.ids.shape[1] - again.length == 2 < count  # as long as the run says
    with torch.no_grad():
        mean = loaded.model(input_ids=ids, labels=labels, **inputs).loss
        assert float(question.value(loaded.model.get_input_embeddings()(ids))) == pytest.approx(-float(mean) * count)


def test_attribution_of_a_multilabel_answer_is_of_the_largest_output(tiny_encoder: Path, make_adapter: Make) -> None:
    folder = make_adapter(tiny_encoder, "lora", "multilabel")
    (found,) = gw.explain(folder, "a small animal")["attributions"]
    predictor = gw.open(folder)
    with torch.no_grad():
        outputs = predictor.model(**predictor.tokenizer("a small animal", return_tensors="pt")).logits
    assert found["adapter"]["value"] == pytest.approx(float(outputs.max()), abs=1e-4)


def test_without_text_replaces_what_is_not_special_by_the_first_token_for_nothing() -> None:
    names = ("mask_token_id", "unk_token_id", "eos_token_id", "pad_token_id")
    known = dict(zip(names, (13, 12, 11, 10), strict=True))
    question: Any = SimpleNamespace(ids=torch.tensor([[10, 5, 11, 6, 7]]), length=4)
    for name, expected in (("", 13), *zip(names, (12, 11, 10, 0), strict=True)):
        known |= {name: None} if name else {}
        tokenizer = SimpleNamespace(all_special_ids=[10, 11, 12, 13], **known)
        loaded: Any = SimpleNamespace(tokenizer=tokenizer)
        assert attribution._without_text(loaded, question).tolist() == [[10, expected, 11, expected, 7]]


def test_planted_word_is_found_first(tiny_encoder: Path, tmp_path: Path, glosses: Path) -> None:
    """A word decides the label; it has the largest score in 95 of 100 rows."""
    texts = [json.loads(line)["text"] for line in glosses.read_text(encoding="utf-8").splitlines()]
    texts = [" ".join(text.split()[:8]) for text in texts][:300]
    planted = ["animal" if number % 2 else "food" for number in range(len(texts))]
    rows = []
    for number, (text, word) in enumerate(zip(texts, planted, strict=True)):
        words = [one for one in text.split() if one not in ("animal", "food")]
        words.insert(number % (len(words) + 1), word)
        rows.append({"text": " ".join(words), "label": word})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model": str(tiny_encoder), "data": {"train": str(file), "validation": 40}, "method": "lora"}
    run = gw.train(config, output_dir=tmp_path / "run", quiet=True, num_train_epochs=20, learning_rate=5e-3)
    assert run.manifest["metrics"]["validation"]["accuracy"]["value"] > 0.95
    found = gw.explain(run.folder, [row["text"] for row in rows[:100]])
    right = [each for each, row in zip(found["attributions"], rows, strict=False) if each["answer"] == row["label"]]
    first = 0
    for each in right:
        words: list[tuple[str, float]] = []
        for token, score in zip(each["adapter"]["tokens"], each["adapter"]["scores"], strict=True):
            if token.startswith("##"):  # a word is the sum of its pieces
                words[-1] = words[-1][0] + token[2:], words[-1][1] + score
            else:
                words.append((token, score))
        first += max(words, key=lambda word: word[1])[0] == each["answer"]
    kept = gw.explain(run.folder, rows[0]["text"], attention=True, save=True)
    assert json.loads((run.folder / "explanation.json").read_text())["attention"] == kept["attention"]
    assert "Which words decide" in write_report(run.folder).read_text()
    with pytest.raises(ConfigError, match="adapter alone"):
        gw.explain(run.adapter.rename(tmp_path / "alone"), save=True)
    assert len(right) >= 95
    assert first >= 0.95 * len(right), (first, len(right))


def test_explain_refuses_what_it_cannot_explain(
    tiny_encoder: Path,
    make_adapter: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tagged = make_adapter(tiny_encoder, "lora", "similarity")
    assert gw.explain(tagged)["layers"]
    with pytest.raises(UnsupportedError, match="not explained by tokens"):
        gw.explain(tagged, "a text")
    monkeypatch.setattr(attribution, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="need Captum"):
        gw.explain(make_adapter(tiny_encoder, "lora", "classification"), "a text")


def test_show_tokens_and_layers_print_the_largest_scores_and_times_chance(capsys: pytest.CaptureFixture[str]) -> None:
    scores = [(-1) ** place * place / 10 for place in range(12)]
    tokens = [f"word{place}." for place in range(12)]
    show_tokens(Output(), {"text": "t", "answer": "a", "adapter": {"tokens": tokens, "scores": scores}, "base": None})
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if "word" in line]
    assert shown == [[tokens[place], f"{scores[place]:+.3f}"] for place in range(11, 3, -1)]
    layer = {"name": "dense", "norm": 1.5, "share": 0.02, "rank": 4, "effective_rank": 2.5, "by_chance": 0.01}
    show_layers(Output(), [{**layer, "in_main_directions": 0.03}, {**layer, "in_main_directions": None}], False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("dense")]
    assert rows[0] == ["dense", "1.5", "2.00%", "2.5", "of", "4", "3.0", "x"]
    assert rows[1][-1] == "-"


def test_explain_command_shows_layers_and_tokens(
    capsys: pytest.CaptureFixture[str],
    tiny_encoder: Path,
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    folder = str(make_adapter(tiny_encoder, "lora", "classification"))
    assert main(["explain", folder, "a small animal", "--against", folder]) == 0
    said = capsys.readouterr().out
    for words in ("effective rank", "+1.000", "a small animal -> ", "token", "the base is unchanged"):
        assert words in said
    assert main(["explain", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attributions"] == []
    assert main(["explain", folder + "/none"]) == 2
    page = tmp_path / "explained.html"
    assert main(["explain", folder, "a small animal", "--html", str(page), "--quiet"]) == 0
    assert "Which words decide" in page.read_text()
    assert main(["explain", folder, "--html", str(page)]) == 7
    assert main(["explain", folder, "--overwrite"]) == 2
