"""The gate for base models: nothing of a hostile or damaged folder is run or opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftwerk.errors import AdapterError, ConfigError, GraftwerkError, IntegrityError, ModelError, ResourceError
from graftwerk.models.load import load_config, load_model, load_tokenizer, model_folder


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A copy of a good model that a test may spoil."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_encoder, copy)
    return copy


def edit(path: Path, **changes: Any) -> None:
    tree = json.loads(path.read_text())
    tree.update(changes)
    path.write_text(json.dumps(tree))


LOADERS = [lambda place: load_model(place, None, None), load_config, load_tokenizer]


@pytest.fixture
def canary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module beside the model that leaves a mark when it is imported."""
    mark = folder / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n")
    return mark


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_load_remote_code_raises_and_never_runs(folder: Path, canary: Path, file: str, load: Any) -> None:
    names = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModel": "modeling_evil.Evil"}
    edit(folder / file, auto_map=names | {"AutoTokenizer": ["modeling_evil.Evil", None]})
    with pytest.raises(IntegrityError, match="auto_map") as caught:
        load(str(folder))
    assert caught.value.exit_code == 8
    assert caught.value.where == str(folder / file)
    assert not canary.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@v1:function"},
        {"_attn_implementation_internal": {"text": "evil/kernel"}},
        {"text_config": {"deep": [{"_experts_implementation": "evil/kernel"}]}},
        {"attn_kernel": ["kernels-community/flash-attn"]},
        {"vision": {"trust_remote_code": True}},
        {"vision": [{"auto_map": {"AutoModel": "other/repository--modeling.Evil"}}]},
    ],
)
def test_load_model_nested_remote_code_raises(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(IntegrityError) as caught:
        load_model(str(folder), None, None)
    assert "config.json" in str(caught.value.where)


def test_model_folder_harmless_config_fields_pass(folder: Path) -> None:
    edit(
        folder / "config.json",
        auto_map={},
        trust_remote_code=False,
        _attn_implementation="sdpa",
        use_mamba_kernels=True,
    )
    assert model_folder(str(folder)) == folder


class Boom:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_load_model_pickled_weights_raise_unopened(folder: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "opened"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Boom(mark)))
    with pytest.raises(IntegrityError, match="pickle only") as caught:
        load_model(str(folder), None, None)
    assert name in caught.value.what
    assert not mark.exists()


@pytest.mark.parametrize("start", [b"", (40).to_bytes(8, "little")], ids=["bare", "with a plausible length"])
def test_load_model_pickle_named_safetensors_raises(folder: Path, tmp_path: Path, start: bytes) -> None:
    mark = tmp_path / "opened"
    (folder / "model.safetensors").write_bytes(start + pickle.dumps(Boom(mark)) * 10)
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        load_model(str(folder), None, None)
    assert not mark.exists()


@pytest.mark.parametrize("size", [0, 4, 20, 200, 20_000, -1])
def test_load_model_truncated_weights_raise(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(IntegrityError) as caught:
        load_model(str(folder), None, None)
    assert str(folder) in str(caught.value)


def test_load_model_lfs_pointer_raises(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ResourceError, match="Git LFS pointer"):
        load_model(str(folder), None, None)


@pytest.mark.parametrize(
    ("missing", "load"),
    [
        ("config.json", load_config),
        ("model.safetensors", lambda place: load_model(place, None, None)),
        ("tokenizer.json", load_tokenizer),
    ],
)
def test_load_missing_file_raises_with_its_path(folder: Path, missing: str, load: Any) -> None:
    (folder / missing).unlink()
    with pytest.raises(ResourceError) as caught:
        load(str(folder))
    assert str(folder / missing) in caught.value.what
    assert caught.value.exit_code == 5


def test_load_model_sharded_reads_only_shards_beside_index(folder: Path) -> None:
    weights = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00001-of-00001.safetensors"
    weights.rename(shard)
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        names = list(file.keys())
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard.name)}))
    load_model(str(folder), None, None)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}))
    with pytest.raises(ResourceError, match="model-00002-of-00002"):
        load_model(str(folder), None, None)
    for elsewhere in ("../secret.safetensors", "/etc/passwd", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, elsewhere)}))
        with pytest.raises(IntegrityError, match="no safetensors file beside it"):
            load_model(str(folder), None, None)
    for content in ("[]", "{}", '{"weight_map": {"a": 1}}', "{"):
        index.write_text(content)
        with pytest.raises(IntegrityError):
            load_model(str(folder), None, None)


def test_load_model_adapter_folder_raises(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(AdapterError, match="a base model and an adapter"):
        load_model(str(folder), None, None)
    (folder / "config.json").unlink()
    with pytest.raises(AdapterError, match="is an adapter"):
        load_model(str(folder), None, None)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"model_type": 7}', b"[]", b'{"model_type": "nobody"}']
)
def test_load_config_invalid_content_raises(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises((IntegrityError, ModelError)):
        load_config(str(folder))


def test_load_config_oversized_file_raises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwerk.models.safety_checks.MAX_CONFIG_BYTES", 100)
    with pytest.raises(IntegrityError, match="never so large"):
        load_config(str(folder))


@pytest.mark.parametrize(
    "name", ["", " ", "a\0b", "./nowhere", "/nowhere", "a/b/c", "pkg://x", "-x", "a/..", "owner/../name"]
)
def test_load_config_invalid_name_raises(name: str) -> None:
    with pytest.raises(GraftwerkError) as caught:
        load_config(name)
    assert isinstance(caught.value, ConfigError | ResourceError)


def test_load_config_file_raises_with_hint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ConfigError, match="is no model") as caught:
        load_config(str(tmp_path / "model.safetensors"))
    assert "folder" in str(caught.value.hint)


def test_load_config_revision_of_folder_raises(tiny_encoder: Path) -> None:
    with pytest.raises(ConfigError, match="for hub models"):
        load_config(str(tiny_encoder), revision="main")


def test_safety_checks_import_neither_torch_nor_transformers() -> None:
    import subprocess

    code = "import sys, graftwerk.models.safety_checks; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# -- resources


def assert_refused(act: Callable[[], Any], most: int = 100 << 20) -> None:
    """Before memory is taken for what a file asks for; Python's own is measured, torch's would raise another error."""
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            act()
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 10**9},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"hidden_size": 10**30},
        {"rope_parameters": [{"factor": 2**63}]},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("load", LOADERS)
def test_load_impossible_sizes_raise_before_reading(folder: Path, changes: Any, load: Any) -> None:
    edit(folder / "config.json", **changes)
    assert_refused(lambda: load(str(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 30_000, "num_attention_heads": 4},
        {"vocab_size": 2 * 10**9},
        {"intermediate_size": 10**9},
        {"num_hidden_layers": 100_000},
        {"max_position_embeddings": 10**9},
        {"hidden_size": 2**20, "intermediate_size": 2**40, "num_hidden_layers": 1000},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_load_model_larger_than_its_weights_raises_before_building(folder: Path, changes: Any) -> None:
    edit(folder / "config.json", **changes)
    assert_refused(lambda: load_model(str(folder), None, None))


def test_load_model_larger_than_memory_raises_resource_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwerk.models.load.available", lambda: 1000)
    with pytest.raises(ResourceError, match="does not fit into memory"):
        load_model(str(folder), None, None)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt"])
def test_load_tokenizer_bomb_raises_before_reading(folder: Path, file: str) -> None:
    line = b"[],\n" if file.endswith(".json") else b"a\n"
    with (folder / file).open("wb") as stream:
        stream.write(b'{"a": [')
        for _ in range(16):
            stream.write(line * (1 << 18))
    assert_refused(lambda: load_tokenizer(str(folder)))


@pytest.mark.parametrize("entry", [b'"%d":{},', b"[],", b"1,", b'"a":"b",'])
def test_model_folder_header_bomb_raises_before_reading(folder: Path, entry: bytes) -> None:
    for size in (60 << 20, 3 << 20):
        body = entry * (size // len(entry))
        content = b'{"x":[' + body + b"1]}" if entry in (b"[],", b"1,") else b"{" + body + b'"z":{}}'
        (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
        del body, content
        assert_refused(lambda: model_folder(str(folder)))


def test_model_folder_pipe_raises_without_blocking(folder: Path) -> None:
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with pytest.raises(ResourceError, match="is missing"):
            model_folder(str(folder))
