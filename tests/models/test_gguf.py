"""GGUF files: unpacked once, kept whole, loaded like any folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from graftwerk.errors import IntegrityError, ModelError, ResourceError
from graftwerk.models import gguf as unpacking
from graftwerk.models.load import load_config, load_model, load_tokenizer, model_folder
from graftwerk.models.positions import fix_padding
from graftwerk.tasks.base import Splits
from graftwerk.tasks.classification import Classification

WIDTH, INNER, VOCABULARY = 32, 64, 260


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights in Q8_0 and float32, and a byte-level tokenizer."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    # The byte alphabet of GPT-2's tokenizer: printable bytes stand for themselves, the others are moved up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + at) for at in range(256 - len(printable))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*alphabet, "th", "the", "<s>", "<|endoftext|>"])
    writer.add_token_types([1] * 258 + [3, 3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCABULARY, WIDTH),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_v.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }
    for name, shape in shapes.items():
        tensor = draw.standard_normal(shape).astype(np.float32)
        if name == "blk.0.ffn_up.weight":
            packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_unpacked_once_into_plain_folder(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(str(tiny_gguf))
    assert (folder / "model.safetensors").is_file()
    assert not hasattr(load_config(str(tiny_gguf)), "quantization_config")

    def never(*args: object) -> None:
        raise AssertionError("unpacked a second time")

    monkeypatch.setattr(unpacking, "_unpack", never)
    unpacking._digest.cache_clear()
    assert model_folder(str(tiny_gguf)) == folder
    assert [entry.name for entry in folder.parent.iterdir() if entry.name.startswith(".")] == []


def test_gguf_model_classifies_and_saves(tiny_gguf: Path, tmp_path: Path) -> None:
    import gguf

    task = Classification()
    splits = Splits([], [], [], ("a", "b"), "none")
    tokenizer = load_tokenizer(str(tiny_gguf))
    model = load_model(str(tiny_gguf), task, splits)
    fix_padding(model, tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"
    examples = task.encode([{"text": "the cat"}, {"text": "there"}], tokenizer, splits, 16)
    assert model(**task.collator.collate(examples, tokenizer)).logits.shape == (2, 2)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}["blk.0.ffn_up.weight"]
    expected = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.detach(), expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_gguf_changed_file_is_unpacked_anew(tiny_gguf: Path, tmp_path: Path) -> None:
    first = model_folder(str(tiny_gguf))
    other = tmp_path / "tiny.gguf"
    content = bytearray(tiny_gguf.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert model_folder(str(other)) != first


def test_gguf_invalid_or_truncated_file_raises(tmp_path: Path, tiny_gguf: Path) -> None:
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"\x80\x04pickle")
    with pytest.raises(IntegrityError, match="not a GGUF file"):
        model_folder(str(fake))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot unpack"):
        model_folder(str(cut))


def test_gguf_unwritable_cache_raises_with_bytes_needed(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("GRAFTWERK_CACHE", str(blocked))
    with pytest.raises(ResourceError, match="cannot be kept") as caught:
        model_folder(str(tiny_gguf))
    assert "bytes are needed" in str(caught.value.where)
    assert "GRAFTWERK_CACHE" in str(caught.value.hint)


def test_gguf_failed_unpacking_leaves_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWERK_CACHE", str(tmp_path))

    def full(temporary: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking, "_move_whole", full)
    with pytest.raises(ResourceError, match="No space left"):
        model_folder(str(tiny_gguf))
    assert list((tmp_path / "gguf").iterdir()) == []


def test_put_existing_copy_is_not_replaced(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "model.safetensors").write_text(folder.name)
    unpacking._move_whole(mine, theirs)
    assert (theirs / "model.safetensors").read_text() == "theirs"
    shutil.rmtree(theirs)
    unpacking._move_whole(mine, theirs)
    assert (theirs / "model.safetensors").read_text() == "mine"


@pytest.mark.slow
def test_gguf_real_model_answers_in_english(smollm: str) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(smollm)
    model = AutoModelForCausalLM.from_pretrained(model_folder(smollm), use_safetensors=True).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.chat_template


def test_unpack_prints_no_progress_bar_and_restores_tqdm(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_gguf_pytorch_utils as theirs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = theirs.tqdm
    capfd.readouterr()
    unpacking._unpack(tiny_gguf, tmp_path / "copy")
    said = capfd.readouterr()
    assert "GGUF tensors" not in said.err + said.out
    assert (said.out, said.err) == ("", "")
    assert theirs.tqdm is before
