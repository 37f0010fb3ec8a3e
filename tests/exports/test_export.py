"""`export`: folders for PEFT and vLLM, GGUF files for llama.cpp, each compared with the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import graftwerk as gw
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.exports import export as module
from graftwerk.exports.gguf import _llama_order
from tests.exports.conftest import Make
from tests.tiny_text import SYNOPSES

peft = pytest.importorskip("peft")
IN_PEFT = ("lora", "dora", "pissa", "miss", "hira", "shira", "oft", "ia3", "prompt", "ptuning")
PATTERNS = {"r": 4, "rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"k_proj": 3}}
KINDS: list[dict[str, Any]] = [{"r": 4}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, PATTERNS]


@pytest.mark.parametrize("method", IN_PEFT)
def test_peft_folder_answers_as_the_adapter_under_a_new_base_name(
    method: str, tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_encoder, method, "classification")
    result = gw.export(folder, tmp_path / "peft", to="peft", base_name="org/tiny", data=labelled)
    assert result["parity"]["max_abs_difference"] < 1e-5
    config = json.loads((result["out"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert result["notes"] == [f"compared on 24 {labelled}, loaded by peft"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    inputs = gw.open(folder).tokenizer("An animal that eats grass.", return_tensors="pt")
    scores = peft.PeftModel.from_pretrained(base, str(result["out"])).eval()(**inputs).logits.softmax(-1)[0]
    expected = gw.open(folder)("An animal that eats grass.")["scores"]
    assert scores.tolist() == pytest.approx(list(expected.values()), abs=1e-5)
    assert gw.open(result["out"], model=str(tiny_encoder))("Grass.")["scores"].keys() == expected.keys()


def test_peft_folder_is_checked_by_the_own_reader_without_peft(
    tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    folder = make_adapter(tiny_encoder, "lora", "classification")
    result = gw.export(folder, tmp_path / "peft", to="peft", data=labelled)
    assert result["parity"]["max_abs_difference"] < 1e-5
    assert "peft is not installed" in result["notes"][0]
    assert "means nothing elsewhere" in result["notes"][1]
    assert (result["out"] / "graftwerk.json").exists()


@pytest.mark.parametrize("method", ["houlsby", "bitfit", "prefix"])
def test_method_that_peft_lacks_here_is_refused(
    method: str, tiny_encoder: Path, make_adapter: Make, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_encoder, method, "classification")
    with pytest.raises(UnsupportedError, match="PEFT has no"):
        gw.export(folder, tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("settings", KINDS)
def test_vllm_folder_has_one_rank_and_scale_and_the_adapters_answers(
    settings: dict[str, Any], tiny_decoder: Path, make_adapter: Make, tmp_path: Path
) -> None:
    method = {"name": "lora", "target_modules": "all-linear", **settings}
    folder = make_adapter(tiny_decoder, method, "instruction", "news")
    result = gw.export(folder, tmp_path / "vllm", to="vllm", base_name="org/tiny")
    assert result["parity"]["max_abs_difference"] < 1e-5
    config = json.loads((result["out"] / "adapter_config.json").read_text())
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"} & config.keys()
    tensors = load_file(result["out"] / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    line = f"vllm serve org/tiny --enable-lora --max-lora-rank {8 if config['r'] <= 8 else 16} --lora-modules"
    assert result["command"] == f"{line} news={tmp_path / 'vllm'}"


@pytest.mark.parametrize("to", ["vllm", "gguf"])
@pytest.mark.parametrize(
    ("method", "task", "said"),
    [
        ("dora", "instruction", "DoRA"),
        ("ia3", "instruction", "this is IA3"),
        ("lora", "classification", "causal language models"),
        ({"name": "lora", "trainable_token_indices": [5, 6]}, "instruction", "no more than factors"),
    ],
    ids=["dora", "ia3", "head", "tokens"],
)
def test_adapter_with_more_than_factors_is_refused(
    to: Any, method: Any, task: str, said: str, tiny_decoder: Path, make_adapter: Make, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_decoder, method, task)
    with pytest.raises(UnsupportedError, match=said) as caught:
        gw.export(folder, tmp_path / "out", to=to)
    assert "merged" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", KINDS)
def test_gguf_adapter_read_back_answers_as_the_adapter(
    settings: dict[str, Any], tiny_decoder: Path, make_adapter: Make, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    method = {"name": "lora", "target_modules": "all-linear", **settings}
    result = gw.export(make_adapter(tiny_decoder, method, "instruction"), tmp_path / "gguf", to="gguf")
    assert result["parity"]["max_abs_difference"] < 1e-5
    reader = gguf.GGUFReader(result["out"] / "adapter.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["adapter.type"].contents() == "lora"
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.attn_q.weight.lora_a"][0] == 32  # ggml counts the fastest dimension first
    assert shapes["blk.1.attn_k.weight.lora_b"][1] == 16
    assert (result["out"] / "Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"


def test_llama_order_pairs_the_rows_that_llama_cpp_rotates_together() -> None:
    """transformers rotates row i of a head with row i + half; llama.cpp rotates neighbouring rows."""
    assert _llama_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_gguf_of_another_architecture_is_refused_by_name(
    text_model: Callable[[str], Path], make_adapter: Make, tmp_path: Path
) -> None:
    folder = make_adapter(text_model("gpt2"), "lora", "causal")
    with pytest.raises(UnsupportedError, match="`gpt2` are not written as GGUF"):
        gw.export(folder, tmp_path / "gguf", to="gguf")


def test_export_to_merged_is_merge(tiny_encoder: Path, make_adapter: Make, labelled: str, tmp_path: Path) -> None:
    folder = make_adapter(tiny_encoder, "lora", "classification")
    result = gw.export(folder, tmp_path / "merged", to="merged", data=labelled)
    assert (result["to"], result["dtype"]) == ("merged", "float32")
    with pytest.raises(ConfigError, match="no base to name"):
        gw.export(folder, tmp_path / "other", to="merged", base_name="org/tiny")


def test_unknown_program_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no export to `vlm`") as caught:
        gw.export(tmp_path, tmp_path / "out", to="vlm")  # type: ignore[arg-type]
    assert "did you mean `vllm`?" in str(caught.value.hint)


def test_summarizer_goes_to_peft(text_model: Callable[[str], Path], make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter(text_model("t5"), "lora", "summarization")
    result = gw.export(folder, tmp_path / "peft", to="peft", data=str(SYNOPSES), rows=5)
    assert result["parity"]["max_abs_difference"] < 1e-5
    assert result["parity"]["rows"] == 5


def test_prefix_of_a_decoder_goes_to_peft(tiny_decoder: Path, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter(tiny_decoder, "prefix", "instruction")
    result = gw.export(folder, tmp_path / "peft", to="peft")
    assert result["parity"]["max_abs_difference"] < 1e-5
