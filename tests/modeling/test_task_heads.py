"""A task's head is trained and stored with the adapter, whatever the task's input is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import graftwerk.modeling.attach as gw
from graftwerk.methods.lora import LoRA
from graftwerk.serialization.folder import load_adapter, save_adapter
from tests.modeling.unusual import PATCHES, S, answer, built, moved

WHISPER: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
    "max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
WAV2VEC2: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
IMAGE, SOUND, MEL = {"pixel_values": (2, 3, 8, 8)}, {"input_values": (2, 400)}, {"input_features": (2, 8, 32)}
CASES = [
    ("ViTForImageClassification", lambda: tf.ViTConfig(**PATCHES), IMAGE, ("classifier",)),
    ("DeiTForImageClassificationWithTeacher", lambda: tf.DeiTConfig(**PATCHES), IMAGE,
     ("cls_classifier", "distillation_classifier")),
    ("CLIPForImageClassification", lambda: tf.CLIPConfig(text_config=S, vision_config=PATCHES), IMAGE,
     ("classifier",)),
    ("WhisperForAudioClassification", lambda: tf.WhisperConfig(**WHISPER), MEL, ("projector", "classifier")),
    ("Wav2Vec2ForSequenceClassification", lambda: tf.Wav2Vec2Config(**WAV2VEC2), SOUND, ("projector", "classifier")),
    ("Wav2Vec2ForCTC", lambda: tf.Wav2Vec2Config(**WAV2VEC2), SOUND, ("lm_head",)),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "config", "shapes", "heads"), CASES, ids=[case[0] for case in CASES])
def test_task_head_is_trained_and_saved(
    cls: str, config: Any, shapes: dict[str, tuple[int, ...]], heads: tuple[str, ...], tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    model = built(cls, config()).float()
    model.config.num_labels = 3
    graft = gw.attach(model, LoRA(r=2))
    assert graft.heads == heads
    model(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for key, parameter in graft.named_parameters() if graft.is_head(key))
    gw.detach(model)
    graft = moved(model, LoRA(r=2))
    model.float()
    expected = answer(model, **batch)
    save_adapter(graft, tmp_path / "a")
    other = built(cls, config()).float()
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(answer(other, **batch), expected)
