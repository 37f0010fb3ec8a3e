"""Evaluation and prediction of what training left: a run, an adapter alone, an adapter of PEFT's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftwerk.errors import AdapterError, ConfigError, DataError, GraftwerkError, IntegrityError, ModelError
from graftwerk.evaluation import metrics
from graftwerk.evaluation.evaluate import evaluate, predict, run_model
from graftwerk.evaluation.loading import load_adapter_for
from graftwerk.evaluation.results_io import EVALUATION, PREDICTIONS, load_evaluation
from graftwerk.models import hardware
from graftwerk.serialization.untrusted_files import read_sealed
from graftwerk.tasks.causal import Causal
from graftwerk.tasks.classification import Classification
from graftwerk.tasks.collator import ClassCollator
from graftwerk.training.train import train
from tests.families import FAMILIES
from tests.training.test_waits import Words
from tests.training.test_waits import examples as examples_of


@pytest.fixture(scope="module")
def settings(tiny_encoder: Path, glosses: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_encoder),
        "data": {"train": str(glosses), "validation": 24, "test": 36},
        "method": {"name": "lora", "r": 2},
        "training": {"num_train_epochs": 2, "report_to": ["jsonl"], "learning_rate": 3e-3},
        "evaluation": {"latency_batches": 2, "resamples": 200},
    }


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train({**settings, "output_dir": str(tmp_path_factory.mktemp("runs") / "run")}).folder


@pytest.fixture
def labelled(glosses: Path, tmp_path: Path) -> Path:
    """The same rows under other column names."""
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in glosses.read_text().splitlines()][:30]
    path.write_text("".join(json.dumps({"gloss": row["text"], "topic": row["label"]}) + "\n" for row in rows))
    return path


# -- asking a model


def test_run_model_returns_scores_in_row_order(run: Path, gloss_texts: list[str]) -> None:
    opened = load_adapter_for(run)
    texts = sorted(gloss_texts[:20], key=lambda text: text[::-1])
    examples = opened.encode([{"text": text} for text in texts])
    ask = {"model": opened.model, "task": opened.task, "tokenizer": opened.tokenizer}
    together = run_model(examples=examples, batch_size=7, **ask)
    alone = [run_model(examples=[example], batch_size=1, **ask).scores[0] for example in examples]
    assert np.allclose(together.scores, alone, atol=1e-6)
    assert len({tuple(row) for row in together.scores.round(6).tolist()}) > 10, "all answers alike show no order"
    assert together.targets is None
    assert together.loss is None


def test_run_model_batches_longest_first_and_reports_progress(run: Path, gloss_texts: list[str]) -> None:
    opened = load_adapter_for(run)
    examples = opened.encode([{"text": text} for text in gloss_texts[:25]])
    seen: list[list[int]] = []

    class WatchedCollator(ClassCollator):
        def collate(self, examples: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
            seen.append([example.length for example in examples])
            return super().collate(examples, tokenizer)

    class Watched(Classification):
        @property
        def collator(self) -> ClassCollator:
            return WatchedCollator()

    told: list[tuple[int, int]] = []
    run_model(
        opened.model, Watched(), examples, opened.tokenizer, batch_size=10, on_progress=lambda *at: told.append(at)
    )
    lengths = [length for batch in seen for length in batch]
    assert lengths == sorted((example.length for example in examples), reverse=True)
    assert told == [(10, 25), (20, 25), (25, 25)]


def test_run_model_loss_is_row_mean_and_training_mode_is_restored(run: Path, glosses: Path) -> None:
    opened = load_adapter_for(run)
    rows = [json.loads(line) for line in glosses.read_text().splitlines()][:11]
    examples = opened.encode(rows)
    opened.model.train()
    found = run_model(opened.model, opened.task, examples, opened.tokenizer, batch_size=4)
    assert opened.model.training
    each = -np.log(found.scores[np.arange(11), found.targets])
    assert found.loss == pytest.approx(each.mean(), rel=1e-5)


def test_run_model_without_rows_returns_empty(run: Path) -> None:
    opened = load_adapter_for(run)
    assert len(run_model(opened.model, opened.task, [], opened.tokenizer).scores) == 0


def test_run_model_stores_no_keys_and_values() -> None:
    """A plan of 7 billion parameters counted 1.6 GB of them."""
    model, seen = FAMILIES["llama"].build(), list[Any]()
    model.model.register_forward_hook(lambda *call: seen.append(call[-1].past_key_values))
    run_model(model, Causal(), examples_of("causal", 4), Words())  # type: ignore[arg-type]
    assert seen == [None]
    assert model.config.use_cache


# -- evaluate


def test_evaluate_run_uses_its_test_rows(run: Path) -> None:
    result = evaluate(run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert (result["split"], result["rows"]) == ("test", 36)
    assert result["labels"] == manifest["labels"]
    for name, figure in result["metrics"].items():
        assert figure["value"] == pytest.approx(manifest["metrics"]["test"][name]["value"]), name
    cost = result["cost"]
    assert set(cost) == {"latency_ms_batch_1", "latency_ms_batch_32", "adapter_bytes", "peak_memory_bytes"}
    # A tiny model may fit into memory that this process holds already.
    assert all(value > 0 or name == "peak_memory_bytes" for name, value in cost.items())
    cut = [note for note in result["notes"] if note.endswith("of 36 rows were cut to 64 tokens")]
    assert result["notes"] == cut
    assert len(cut) == 1
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("trunk", [False, True])
def test_evaluate_run_gives_bit_equal_scores_to_training(
    settings: dict[str, Any], trunk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a row's answer depends on its batch; the machine that evaluates may be fast in another type."""
    seen: list[Any] = []

    real = metrics.metrics_of
    monkeypatch.setattr(metrics, "metrics_of", lambda p, *a, **o: seen.append(p) or real(p, *a, **o))
    monkeypatch.delenv(hardware.ENVIRONMENT, raising=False)
    monkeypatch.setattr(hardware, "_fastest", lambda *_: "bfloat16")
    training = {**settings["training"], "per_device_eval_batch_size": 5, "trunk_cache": trunk}
    method = {"name": "lora", "r": 2, "layers_to_transform": [1]}
    run = train({**settings, "method": method, "training": training, "output_dir": str(tmp_path / "run")})
    in_training = seen[1]
    assert run.manifest["compute"] == {
        "type": "bfloat16",
        "model_dtype": "float32",
        "device": "cpu",
        "eval_batch_size": 5,
        "processes": 1,
        "threads": torch.get_num_threads(),
    }
    monkeypatch.setattr(hardware, "_fastest", lambda *_: "float32")
    seen.clear()
    result = evaluate(run)
    assert (result["compute"]["type"], result["compute"]["eval_batch_size"]) == ("bfloat16", 5)
    assert np.array_equal(seen[0].scores, in_training.scores)
    assert not [note for note in result["notes"] if "round" in note]
    monkeypatch.setenv(hardware.ENVIRONMENT, "float32")
    other = evaluate(run, batch_size=7)
    assert other["compute"]["type"] == "float32"
    (note,) = [note for note in other["notes"] if "round" in note]
    assert note.endswith("compute type float32 (in training: bfloat16), rows a forward pass 7 (in training: 5)")
    assert load_adapter_for(run.adapter).eval_batch_size == 5  # the adapter alone knows it too


def test_evaluate_adapter_folder_inside_run_equals_run(run: Path) -> None:
    assert evaluate(run / "adapter")["metrics"] == evaluate(run)["metrics"]


def test_evaluate_without_test_rows_notes_validation_bias(settings: dict[str, Any], tmp_path: Path) -> None:
    data = {**settings["data"], "test": None}
    made = train({**settings, "data": data, "method": "probe", "output_dir": str(tmp_path / "run")})
    result = evaluate(made)
    assert result["split"] == "validation"
    assert "chose the checkpoint" in result["notes"][-1]


def test_evaluate_given_data_and_columns(run: Path, labelled: Path, glosses: Path) -> None:
    result = evaluate(run, labelled, columns={"text": "gloss", "label": "topic"})
    assert (result["split"], result["rows"]) == ("data", 30)
    narrow = evaluate(run, labelled, columns={"text": "gloss", "label": "topic"}, confidence=0.5)
    wide, half = (each["metrics"]["accuracy"] for each in (result, narrow))
    assert half["value"] == wide["value"]
    assert half["high"] - half["low"] < wide["high"] - wide["low"]
    with pytest.raises(ConfigError, match="no column"):
        evaluate(run, labelled)
    with pytest.raises(ConfigError, match="no data is given"):
        evaluate(run, columns={"text": "gloss"})
    assert evaluate(run, glosses)["rows"] == 240


def test_evaluate_adapter_alone_without_data_raises(run: Path, glosses: Path, tmp_path: Path) -> None:
    alone = tmp_path / "somewhere"
    shutil.copytree(run / "adapter", alone)
    with pytest.raises(ConfigError, match="adapter folder alone"):
        evaluate(alone)
    found, wanted = (evaluate(place, glosses)["metrics"]["accuracy"]["value"] for place in (alone, run))
    assert found == wanted
    with pytest.raises(ConfigError, match="can be stored"):
        evaluate(alone, glosses, store=True)


def test_evaluate_unknown_label_raises(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a tree", "label": "vegetable"}\n{"text": "a dog", "label": "animal"}\n')
    with pytest.raises(AdapterError, match="vegetable"):
        evaluate(run, path)


def test_evaluate_data_changed_since_training_raises(settings: dict[str, Any], glosses: Path, tmp_path: Path) -> None:
    """Held-out rows are drawn again from the file; with other rows in it, some may have been learnt from."""
    copy = tmp_path / "rows.jsonl"
    shutil.copy(glosses, copy)
    data = {**settings["data"], "train": str(copy)}
    made = train({**settings, "data": data, "method": "probe", "output_dir": str(tmp_path / "run")})
    copy.write_text("\n".join(copy.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(IntegrityError, match="changed since"):
        evaluate(made)


def test_evaluate_folder_without_run_or_adapter_raises(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        evaluate(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="neither a run folder nor an adapter"):
        evaluate(tmp_path)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "manifest.json").write_text('{"status": "running"}')
    with pytest.raises(ConfigError, match="no adapter yet"):
        evaluate(unfinished)


def test_evaluate_other_base_raises_unless_forced(run: Path, tiny_encoder: Path, glosses: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_encoder, other)
    weights = {name: tensor + 0.1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="another base"):
        evaluate(run, model=str(other))
    assert evaluate(run, model=str(other), force=True)["rows"] == 36


# -- what is stored


def test_evaluate_store_writes_predictions_of_every_row(run: Path) -> None:
    result = evaluate(run, store=True)
    kept, predictions = load_evaluation(run, run / "adapter") or pytest.fail("nothing is stored")
    assert kept["metrics"] == result["metrics"]
    assert predictions.scores.shape == (36, 12)
    assert predictions.targets is not None
    right = (predictions.scores.argmax(1) == predictions.targets).mean()
    assert right == pytest.approx(result["metrics"]["accuracy"]["value"])
    assert predictions.loss == pytest.approx(result["loss"])


def test_load_evaluation_of_changed_adapter_returns_none(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    evaluate(copy, store=True)
    assert load_evaluation(copy, copy / "adapter") is not None
    own = copy / "adapter" / "graftwerk.json"
    own.write_text(own.read_text().replace('"seed": 0', '"seed": 7'))
    assert load_evaluation(copy, copy / "adapter") is None


def test_load_evaluation_missing_or_other_format_returns_none(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    evaluate(copy, store=True)
    (copy / PREDICTIONS).unlink()
    assert load_evaluation(copy, copy / "adapter") is None
    evaluate(copy, store=True)
    stored = {**read_sealed(copy / EVALUATION), "format": 99}
    (copy / EVALUATION).write_text(json.dumps(stored))
    assert load_evaluation(copy, copy / "adapter") is None


# -- predict


def test_predict_texts_returns_labels_and_scores(run: Path, gloss_texts: list[str]) -> None:
    result = predict(run, gloss_texts[:5])
    assert result["notes"] == []
    labels = json.loads((run / "manifest.json").read_text())["labels"]
    for answer in result["predictions"]:
        assert set(answer) == {"label", "scores"}
        assert list(answer["scores"]) == labels
        assert sum(answer["scores"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["scores"], key=answer["scores"].__getitem__)
    one = predict(run, gloss_texts[0])["predictions"]
    assert one[0]["label"] == result["predictions"][0]["label"]
    assert one[0]["scores"] == pytest.approx(result["predictions"][0]["scores"], abs=1e-6)


def test_modules_to_save_by_suffix_train_evaluate_and_predict(
    settings: dict[str, Any], gloss_texts: list[str], tmp_path: Path
) -> None:
    method = {"name": "ia3", "modules_to_save": ["classifier", "pooler"]}
    training = {**settings["training"], "max_steps": 2, "num_train_epochs": 1}
    first = train({**settings, "method": method, "training": training, "output_dir": str(tmp_path / "first")}).folder
    assert evaluate(first)["rows"] == 36
    assert len(predict(first, gloss_texts[:2])["predictions"]) == 2
    training["warm_start"] = str(first)
    second = train({**settings, "method": method, "training": training, "output_dir": str(tmp_path / "second")})
    assert second.manifest["status"] == "finished"


def test_predict_data_without_labels_returns_predictions(run: Path, gloss_texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("gloss\n" + "\n".join(f'"{text}"' for text in gloss_texts[:4]) + "\n")
    found = predict(run, data=path, columns={"text": "gloss"})["predictions"]
    assert [answer["text"] for answer in found] == gloss_texts[:4]
    alone = predict(run, gloss_texts[:4])["predictions"]
    assert [answer["label"] for answer in found] == [answer["label"] for answer in alone]


def test_predict_truncated_texts_are_counted(run: Path) -> None:
    limit = 64 - 2  # [CLS] and [SEP]
    result = predict(run, ["short", "a very long text " * 100, " ".join("a" * limit), " ".join("a" * (limit + 1))])
    assert result["notes"] == ["2 of 4 rows were cut to 64 tokens"]
    whole, cut = (result["predictions"][at]["scores"] for at in (2, 3))
    assert cut == pytest.approx(whole, abs=1e-6), "the last letter is what was cut"


def test_predict_invalid_input_raises(run: Path, tmp_path: Path) -> None:
    assert predict(run, []) == {"predictions": [], "notes": []}
    with pytest.raises(ConfigError, match=r"give texts or data$"):
        predict(run)
    with pytest.raises(ConfigError, match="not both"):
        predict(run, "text", data="rows.csv")
    with pytest.raises(ConfigError, match="text 2 of 2 is empty"):
        predict(run, ["good", "  "])
    with pytest.raises(ConfigError, match="no text"):
        predict(run, [3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no data is given"):
        predict(run, "text", columns={"text": "gloss"})
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(DataError, match="1 of 2 rows"):
        predict(run, data=broken)


# -- adapters of PEFT's


def test_predict_peft_adapter_equals_peft(tiny_encoder: Path, gloss_texts: list[str], tmp_path: Path) -> None:
    """It stores no labels: they are numbered where the base has others, and answers are PEFT's."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "peft")
    found = predict(tmp_path / "peft", gloss_texts[:3], model=str(tiny_encoder))["predictions"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    batch = tokenizer(gloss_texts[:3], return_tensors="pt", padding=True, truncation=True, max_length=64)
    with torch.no_grad():
        wanted = model(**batch).logits.softmax(-1)
    for answer, row in zip(found, wanted.tolist(), strict=True):
        assert list(answer["scores"]) == ["0", "1", "2"]
        assert list(answer["scores"].values()) == pytest.approx(row, abs=1e-5)


def test_predict_adapter_of_other_task_raises(tiny_decoder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_decoder)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(GraftwerkError, match="CAUSAL_LM"):
        predict(tmp_path / "peft", "text", model=str(tiny_decoder))


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"text": "a", "label": "zzz"}], AdapterError),
        ([{"text": "a", "label": "noun.act"}, {"text": "", "label": "noun.act"}], DataError),
        ([{"txet": "a", "label": "noun.act"}], ConfigError),
        ([], DataError),
    ],
)
def test_evaluate_error_about_given_rows_names_their_file(
    run: Path, tmp_path: Path, rows: list[dict[str, str]], error: type[GraftwerkError]
) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asks: list[Any] = [lambda: evaluate(run, str(path))]
    if error is not AdapterError:  # labels are not looked at
        asks.append(lambda: predict(run, data=str(path)))
    for ask in asks:
        with pytest.raises(error) as caught:
            ask()
        said = str(caught.value)
        assert "given.jsonl" in said
        assert "train rows" not in said
        assert not re.search(
            r"\b(data|training|task)\.[a-z_]+\b", (caught.value.hint or "") + (caught.value.where or "")
        )


def test_evaluate_base_with_nan_names_the_base(run: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_encoder, base)
    tensors = load_file(base / "model.safetensors")
    next(value for key, value in tensors.items() if key.endswith("layer.1.output.dense.bias"))[0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for ask in (
        lambda: evaluate(run, model=str(base), force=True),
        lambda: predict(run, ["a text"], model=str(base), force=True),
    ):
        with pytest.raises(ModelError, match="weights of the base model hold NaN"):
            ask()
