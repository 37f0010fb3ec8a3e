"""A run file whose LoRA trains rows of the embedding: trained, resumed, evaluated and loaded like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from graftwerk.errors import ConfigError, RunInterrupted, UnsupportedError
from graftwerk.methods.trainable_tokens import ROWS
from graftwerk.serialization.folder import load_adapter
from graftwerk.serialization.untrusted_files import read_tensors
from graftwerk.training.events import Event
from graftwerk.training.train import train

METHOD = {"name": "lora", "r": 2, "trainable_token_indices": [101, 102]}


def stored(run: Any) -> dict[str, torch.Tensor]:
    return read_tensors(run.adapter / "adapter_model.safetensors")


def test_train_token_rows_resumes_bit_exact(run_file: Callable[..., Any], tmp_path: Any) -> None:
    whole = train(run_file(tmp_path / "whole", method=METHOD))

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 6:
            raise KeyboardInterrupt

    tree = run_file(tmp_path / "stopped", method=METHOD)
    with pytest.raises((RunInterrupted, KeyboardInterrupt)):
        train(tree, listener=stop)
    resumed = train(tree, resume=True)
    first, second = stored(whole), stored(resumed)
    assert all(torch.equal(first[key], second[key]) for key in first)
    (key,) = [key for key in first if key.endswith(ROWS)]
    model = AutoModelForSequenceClassification.from_pretrained(tree["model"], num_labels=3)
    start = model.get_input_embeddings().weight[[101, 102]]
    assert first[key].shape == start.shape
    assert not torch.allclose(first[key], start, atol=1e-4)
    graft = load_adapter(model, whole.adapter)
    assert graft.method.trainable_token_indices == (101, 102)  # type: ignore[attr-defined]


def test_train_token_row_outside_vocabulary_raises(run_file: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="is out of range"):
        train(run_file(method={**METHOD, "trainable_token_indices": [10**6]}))


def test_activation_cache_with_token_rows_raises(run_file: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match="rows of an embedding are trained"):
        train(run_file(method={**METHOD, "layers": "top-1"}, trunk_cache=True))
