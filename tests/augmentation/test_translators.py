"""Who can write: our adapters on encoder-decoders and causal models, and bare causal models; asked as by `predict`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftwerk as gw
from graftwerk.augmentation import translate
from graftwerk.augmentation.progress_log import Journal
from graftwerk.augmentation.settings import BackTranslation
from graftwerk.augmentation.translate import Answer, Question, ask
from graftwerk.errors import ConflictError
from tests.tiny_text import GNOME, rows_of

LENGTH = 6
TEXTS = [row["source"][:40] for row in rows_of(GNOME["de"])[:5]]


def asked(model: Path, folder: Path, **settings: object) -> tuple[list[str], dict[str, str | None]]:
    making = BackTranslation(model=str(model), temperature=0, max_new_tokens=LENGTH, batch_size=2, **settings)
    with Journal(folder / "made.jsonl", {"rows": "x"}, keep=False) as journal:
        found, identity = ask(making, 0, [Question(text) for text in TEXTS], 1, journal, "leg")
    answers: list[Answer] = [found[Question(text)][0] for text in TEXTS]
    return [answer.text for answer in answers], identity


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_ask_adapter_uses_prompt_format_of_training(
    family: str, text_model: Callable[[str], Path], tmp_path: Path
) -> None:
    run = gw.train(
        {
            "model": str(text_model(family)),
            "task": {"name": "translation", "source_lang": "de", "target_lang": "en"},
            "data": {"train": str(GNOME["de"]), "max_train_rows": 8, "max_length": 500, "allow": "all"},
            "method": {"name": "lora", "r": 2, "init_lora_weights": False},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.001},
            "evaluation": {"generate": False, "max_new_tokens": LENGTH},
            "output_dir": str(tmp_path / "run"),
        }
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    written, identity = asked(run.folder, tmp_path / "a")
    assert len(set(written)) > 1
    assert identity["adapter"] is not None
    from_adapter, same = asked(run.adapter, tmp_path / "b")
    assert (from_adapter, same) == (written, identity), "a run folder and its adapter folder are the same writer"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"source": text}) + "\n" for text in TEXTS), "utf-8")
    predicted = gw.predict(run, data=str(rows))
    assert [row["output"] for row in predicted["predictions"]] == written


def test_ask_other_weights_than_in_journal_raises_conflict(text_model: Callable[[str], Path], tmp_path: Path) -> None:
    task = {"name": "translation", "source_lang": "de", "target_lang": "en"}
    making = BackTranslation(model=str(text_model("t5")), task=task, temperature=0, max_new_tokens=LENGTH)
    questions = [Question(text) for text in TEXTS]
    with Journal(tmp_path / "made.jsonl", {"rows": "x"}, keep=False) as journal:
        found, identity = ask(making, 0, questions[:2], 1, journal, "leg")
    with Journal(tmp_path / "made.jsonl", {"rows": "x"}, keep=True) as journal:
        again, same = ask(making, 0, questions[:2], 1, journal, "leg")
        assert (again, same) == (found, identity), "the same weights resume"
    other = tmp_path / "other"
    shutil.copytree(text_model("t5"), other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    changed = making.model_copy(update={"model": str(other)})
    with (
        Journal(tmp_path / "made.jsonl", {"rows": "x"}, keep=True) as journal,
        pytest.raises(ConflictError, match="other weights"),
    ):
        ask(changed, 0, questions, 1, journal, "leg")


def test_ask_base_causal_model_uses_task_template(text_model: Callable[[str], Path], tmp_path: Path) -> None:
    task = {"name": "translation", "source_lang": "de", "target_lang": "en"}
    written, identity = asked(text_model("llama"), tmp_path, task=task)
    assert identity["adapter"] is None
    assert len(set(written)) > 1
    other, _ = asked(text_model("llama"), tmp_path, task={**task, "template": "{source} ="})
    assert other != written


def test_write_answer_beyond_its_own_limit_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer row of the batch lets the model write on, and must not change what the others become."""
    monkeypatch.setattr(translate, "_limit", lambda settings, loaded, example: example.limit)
    monkeypatch.setattr(translate, "_end_tokens", lambda model, tokenizer: {2})
    for name in ("evaluation_mode", "autocast", "own_search"):
        monkeypatch.setattr(translate, name, lambda *_: nullcontext())
    rows = [[0, 5, 5, 5, 2, 1], [0, 5, 5, 5, 2, 1], [2, 5, 5, 5, 5, 5]]
    asked_for: dict[str, Any] = {}
    model = SimpleNamespace(generate=lambda **options: asked_for.update(options) or rows)
    generation = SimpleNamespace(
        collate_prompts=lambda prompts, tokenizer: {},
        options=lambda *_: {},
        new_tokens=lambda written, tensors: torch.tensor(written, device="cpu"),
        decode=lambda tokens, tokenizer: tokens,
    )
    task = SimpleNamespace(layout="encoder-decoder", generation=generation)
    loaded: Any = SimpleNamespace(model=model, task=task, tokenizer=None, dtype=torch.float32)
    batch: Any = [(Question("a"), SimpleNamespace(prompt=(), limit=limit)) for limit in (3, 4, 9)]
    found = translate._write(BackTranslation(model="m", num_beams=2), 0, loaded, batch, 1)
    assert found == [[[rows[0][:5], False]], [[rows[1][:5], True]], [[rows[2], False]]]
    assert asked_for["max_new_tokens"] == 9
