"""The GGUF adapter in llama.cpp itself, on SmolLM2's own weights.

`pip install llama-cpp-python` compiles llama.cpp (CMake and a C++ compiler; a quarter of an hour on a core).
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graftwerk as gw
from graftwerk.models.load import load_tokenizer
from graftwerk.resource_paths import locate
from tests.exports.conftest import Make

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small boat that",
    "To install a package on Debian,",
    "def fibonacci(n):",
    "Water boils at",
)
TOKENS = 16


def in_float32(source: Path, out: Path) -> None:
    """Write a GGUF file again with its weights in float32, so that both programs compute with the same numbers."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(
            name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def our_tokens(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Return the likeliest next tokens, one after the other, and by how much each was likelier than the second."""
    found, leads = list(ids), []
    for _ in range(TOKENS):
        logits = model(torch.tensor([found])).logits[0, -1]  # (V,)
        best = logits.topk(2)
        found.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return found[len(ids) :], leads


@pytest.mark.slow
def test_llama_cpp_with_gguf_adapter_writes_the_same_tokens(smollm: str, make_adapter: Make, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, which needs a C++ compiler")
    method = {"name": "lora", "r": 8, "target_modules": "all-linear"}
    folder = make_adapter(locate(smollm), method, "instruction", scale=0.06)
    out = gw.export(folder, tmp_path / "gguf", to="gguf")["out"]

    predictor = gw.open(folder)
    tokenizer, model = load_tokenizer(smollm), predictor.model.float().eval()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ours = [our_tokens(model, ids) for ids in prompts]
    with gw.disabled(model):
        bare = [our_tokens(model, ids)[0] for ids in prompts]
    assert sum(with_it != without for (with_it, _), without in zip(ours, bare, strict=True)) >= 3
    del predictor, model
    gc.collect()

    base = tmp_path / "base.gguf"
    in_float32(locate(smollm), base)
    llama = llama_cpp.Llama(
        str(base), lora_path=str(out / "adapter.gguf"), n_ctx=64, n_threads=1, seed=0, verbose=False
    )
    for ids, (tokens, leads) in zip(prompts, ours, strict=True):
        theirs = []
        for token in llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            theirs.append(int(token))
            if len(theirs) == TOKENS:
                break
        differ = [at for at in range(TOKENS) if theirs[at] != tokens[at]]
        # llama.cpp caches keys and values in float16: of two equally likely tokens it may take the other
        assert not differ or leads[differ[0]] < 0.05, (ids, tokens, theirs)
