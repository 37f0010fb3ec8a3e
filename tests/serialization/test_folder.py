"""Adapter folders: written whole or not at all, read back exactly, refused with reasons, models unharmed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftwerk.modeling.attach as gw
from graftwerk.errors import (
    AdapterError,
    ConfigError,
    ConflictError,
    DivergedError,
    GraftwerkError,
    IntegrityError,
    ResourceError,
    UnsupportedError,
)
from graftwerk.methods.registry import parse_method
from graftwerk.serialization.fingerprint import fingerprint
from graftwerk.serialization.folder import load_adapter, read_adapter_config, save_adapter
from tests.families import FAMILIES

BERT = FAMILIES["bert"]


def bert(seed: int = 0, labels: int = 3) -> Any:
    return BERT.build(classifier=True, seed=seed, labels=labels)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**BERT.batch()).logits


def grafted(method: Any = "lora", name: str = "news", seed: int = 1) -> gw.Adapter:
    graft = gw.attach(bert(), parse_method(method), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return graft


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def untouched(act: Callable[[Any], Any], error: type[GraftwerkError], match: str) -> GraftwerkError:
    """``act`` fails on a model, which is as before: its modules, flags, outputs, and torch's random state."""
    model = bert()
    model.classifier.weight.requires_grad_(False)
    before = run(model)
    modules = [(path, type(module)) for path, module in model.named_modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        act(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [(path, type(module)) for path, module in model.named_modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(run(model), before)
    return caught.value


# -- writing ----------------------------------------------------------------------------------------------------------


def test_save_adapter_writes_files_and_facts(tmp_path: Path) -> None:
    graft = grafted()
    metadata = {
        "model": "someone/bert",
        "labels": ["bad", "fair", "good"],
        "task": "classification",
        "metrics": {"test": {"accuracy": {"value": 0.8, "low": 0.75, "high": float("nan")}}},
        "command": "graftwerk train run.yaml",
    }
    folder = save_adapter(graft, tmp_path / "adapter", metadata=metadata)
    assert sorted(files(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "graftwerk.json"]
    info = read_adapter_config(folder)
    assert (info.peft_type, info.name, info.base_name) == ("LORA", "news", "someone/bert")
    assert info.labels == ["bad", "fair", "good"]
    assert info.base_fingerprint == fingerprint(bert())
    assert info.method == graft.method
    assert info.own["metrics"]["test"]["accuracy"] == {"value": 0.8, "low": 0.75, "high": None}
    assert info.own["parameters"]["trained"] == graft.num_parameters
    assert "metadata" not in info.own
    assert "accuracy" in (folder / "README.md").read_text()


def test_save_adapter_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    save_adapter(grafted(), tmp_path / "a")
    save_adapter(grafted(), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_save_adapter_takes_labels_from_model_config(tmp_path: Path) -> None:
    graft = grafted()
    graft.model.config.id2label = {0: "a", 1: "b", 2: "c"}
    assert read_adapter_config(save_adapter(graft, tmp_path / "a")).labels == ["a", "b", "c"]
    assert read_adapter_config(save_adapter(grafted(), tmp_path / "b")).labels is None


def test_save_adapter_replaces_own_files_and_keeps_others(tmp_path: Path) -> None:
    folder = save_adapter(grafted({"name": "lora", "init_lora_weights": "pissa"}), tmp_path / "adapter")
    assert (folder / "graftwerk_training.safetensors").exists()
    (folder / "tokenizer.json").write_text("mine")
    (folder / "other").mkdir()
    (folder / "other" / "file").write_text("mine too")
    save_adapter(grafted("ia3"), folder)
    assert read_adapter_config(folder).peft_type == "IA3"
    assert not (folder / "graftwerk_training.safetensors").exists()
    assert (folder / "tokenizer.json").read_text() == "mine"
    assert (folder / "other" / "file").read_text() == "mine too"


def test_save_adapter_foreign_folder_raises_conflict(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConflictError, match="holds no adapter"):
        save_adapter(grafted(), tmp_path)
    assert list(files(tmp_path)) == ["thesis.tex"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_save_adapter_nan_or_infinity_raises_and_keeps_old(value: float, tmp_path: Path) -> None:
    folder = save_adapter(grafted(), tmp_path / "adapter")
    before = files(folder)
    bad = grafted()
    with torch.no_grad():
        next(bad.parameters()).view(-1)[3] = value
    with pytest.raises(DivergedError, match="NaN or infinity"):
        save_adapter(bad, folder)
    assert files(folder) == before


def test_save_adapter_invalid_metadata_raises(tmp_path: Path) -> None:
    for metadata in ({"files": 1}, {"format": 2}, {"name": "x"}, {"thing": object()}):
        with pytest.raises(ConfigError, match="metadata"):
            save_adapter(grafted(), tmp_path / "adapter", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_save_adapter_file_size_limit_keeps_old(tmp_path: Path) -> None:
    """A file-size limit in a child: exit 5 with the bytes needed, the old adapter whole, nothing left behind."""
    folder = save_adapter(grafted(), tmp_path / "adapter")
    before = files(folder)
    large = grafted({"name": "lora", "r": 16})
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_adapter(large, folder)
        except ResourceError as fault:
            os._exit(0 if "bytes are needed" in fault.what and "file size" in fault.what and fault.recovered else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert files(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_save_adapter_merged_or_disabled_equals_active(tmp_path: Path) -> None:
    graft = grafted()
    save_adapter(graft, tmp_path / "active")
    graft.merge()
    save_adapter(graft, tmp_path / "merged")
    graft.unmerge()
    with gw.disabled(graft.model):
        save_adapter(graft, tmp_path / "sleeping")
    assert files(tmp_path / "active") == files(tmp_path / "merged") == files(tmp_path / "sleeping")


@pytest.mark.parametrize("keep_base", [True, False])
def test_save_adapter_full_fine_tuning_roundtrip(keep_base: bool, tmp_path: Path) -> None:
    graft = grafted({"name": "full", "keep_base": keep_base})
    expected = run(graft.model)
    save_adapter(graft, tmp_path / "kept")
    assert read_adapter_config(tmp_path / "kept").base_fingerprint == (fingerprint(bert()) if keep_base else None)
    assert torch.equal(run(graft.model), expected)
    model = bert()
    load_adapter(model, tmp_path / "kept")
    assert torch.equal(run(model), expected)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_load_adapter_sets_name_and_flags_and_keeps_rng_state(tmp_path: Path) -> None:
    graft = grafted()
    expected = run(graft.model)
    folder = save_adapter(graft, tmp_path / "adapter")
    model = bert()
    random = torch.get_rng_state()
    loaded = load_adapter(model, folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert loaded.name == "news"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(run(model), expected)
    second = load_adapter(model, folder, "second", trainable=True)
    assert {key for key, _ in second.named_parameters()} == {key for key, _ in graft.named_parameters()}
    assert gw.adapters(model).keys() == {"news", "second"}
    with pytest.raises(ConflictError):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    "name", ["../up", "a.b", "a/b", "%2e%2e", "a\0", "\u202eabc", "x" * 65, "-a", "", "a b", "ä", "a\n"]
)
def test_load_adapter_invalid_name_raises(name: str, tmp_path: Path) -> None:
    folder = save_adapter(grafted(), tmp_path / "adapter")
    if name:
        untouched(lambda model: load_adapter(model, folder, name), ConfigError, "name")
    (folder / "graftwerk.json").write_text(json.dumps({**read_adapter_config(folder).own, "name": name or " "}))
    untouched(lambda model: load_adapter(model, folder), ConfigError, "name")


def test_load_adapter_base_with_other_weights_raises(tmp_path: Path) -> None:
    folder = save_adapter(grafted(), tmp_path / "adapter", metadata={"model": "right/base"})
    other = bert(seed=9)
    before = run(other)
    with pytest.raises(AdapterError, match="another base") as caught:
        load_adapter(other, folder)
    assert caught.value.exit_code == 4
    assert "right/base" in str(caught.value)
    assert fingerprint(bert()) in caught.value.what
    assert fingerprint(other) in caught.value.what
    assert torch.equal(run(other), before)
    load_adapter(other, folder, force=True)
    assert not torch.equal(run(other), before)


def test_load_adapter_base_of_other_architecture_raises(tmp_path: Path) -> None:
    folder = save_adapter(grafted(), tmp_path / "adapter", metadata={"model": "right/base"})
    other = FAMILIES["roberta"].build(classifier=True)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(other, folder)
    with pytest.raises(AdapterError, match="not known here"):
        load_adapter(other, folder, force=True)
    assert not gw.adapters(other)


def as_peft(folder: Path) -> Path:
    (folder / "graftwerk.json").unlink()
    return folder


def edited(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


A = torch.ones(8, 16)
LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), "missing.*query.lora_B"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith(LAYER)], "missing.*query"),
        (lambda t: t.pop("base_model.model.classifier.bias"), r"missing: classifier\.bias"),
        (lambda t: [t.pop(key) for key in list(t) if "classifier" in key], "missing.*classifier"),
        (lambda t: t.update({"base_model.model.bert.extra.weight": torch.ones(1)}), "not known here.*extra"),
        (lambda t: t.update({"something": torch.ones(1)}), "not known here.*something"),
        (lambda t: t.update({LAYER.replace("0", "7") + ".lora_A.weight": A}), "not known here.*layer.7"),
        (lambda t: t.update({f"{LAYER}.lora_embedding_A": torch.ones(1)}), "not known here.*embedding"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(8, 17)}), "mis-shaped.*query"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": A[:4], f"{LAYER}.lora_B.weight": A.T[:, :4]}), "rank 4"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(8)}), "mis-shaped.*query"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(8, 16, dtype=torch.int8)}), "int8"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.full((8, 16), torch.nan)}), "NaN"),
        (lambda t: t.update({"base_model.model.classifier.weight": torch.ones(3, 15)}), "head has shape|mis-shaped"),
        (lambda t: [t.pop(key) for key in list(t) if "lora" in key], "no tensors"),
    ],
)  # fmt: skip
def test_load_adapter_mismatched_tensors_are_listed(change: Callable[..., Any], match: str, tmp_path: Path) -> None:
    folder = edited(as_peft(save_adapter(grafted(), tmp_path / "adapter")), change)
    error = untouched(lambda model: load_adapter(model, folder), AdapterError, match)
    assert error.exit_code == 4
    assert str(folder) in str(error.where)


def test_load_adapter_model_without_head_raises_with_hint(tmp_path: Path) -> None:
    folder = as_peft(save_adapter(grafted(), tmp_path / "adapter"))
    with pytest.raises(AdapterError, match=r"not known here.*classifier") as caught:
        load_adapter(BERT.build(), folder)
    assert "task head" in str(caught.value.hint)


def test_load_adapter_corrupted_file_raises(tmp_path: Path) -> None:
    """One bit anywhere: `graftwerk.json` says what was written. Without it the folder is PEFT's, and read as it is."""
    folder = save_adapter(grafted({"name": "ptuning", "num_virtual_tokens": 2}), tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json", "graftwerk_training.safetensors"):
        whole = (folder / name).read_bytes()
        for position in (len(whole) // 2, len(whole) - 3):
            changed = bytearray(whole)
            changed[position] ^= 1
            (folder / name).write_bytes(changed)
            untouched(lambda model: load_adapter(model, folder), GraftwerkError, name)
        (folder / name).write_bytes(whole[:-1])
        untouched(lambda model: load_adapter(model, folder), GraftwerkError, name)
        (folder / name).unlink()
        untouched(lambda model: load_adapter(model, folder), GraftwerkError, name)
        (folder / name).write_bytes(whole)
    load_adapter(bert(), folder)
    assert load_adapter(bert(), as_peft(folder)).method.to_dict()["encoder_reparameterization_type"] == "NONE"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "lora", "r": 60_000}},
        {"method": {"name": "lora", "r": 4}},
        {"method": {"name": "bottleneck", "adapter_size": 10**9}},
        {"method": {"name": "prompt", "num_virtual_tokens": 10**9}},
        {"method": {"name": "prefix", "num_virtual_tokens": 10**9}},
        {
            "method": {
                "name": "prefix",
                "num_virtual_tokens": 2,
                "prefix_projection": True,
                "encoder_hidden_size": 10**9,
            }
        },
        {"method": {"name": "ptuning", "num_virtual_tokens": 2, "encoder_hidden_size": 10**9}},
        {"method": {"name": "probe"}},
    ],
)
def test_load_adapter_settings_of_other_size_raise_before_allocation(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_adapter(grafted(), tmp_path / "adapter")
    (folder / "graftwerk.json").write_text(json.dumps({**read_adapter_config(folder).own, **changes}))
    untouched(lambda model: load_adapter(model, folder), AdapterError, "the file holds")


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (UnsupportedError, {"format": 2}),
        (IntegrityError, {"base": None}),
        (IntegrityError, {"base": {"fingerprint": 3}}),
        (IntegrityError, {"method": "lora"}),
        (IntegrityError, {"method": {"name": "nothing"}}),
        (IntegrityError, {"labels": [1]}),
        (IntegrityError, {"labels": "abc"}),
        (IntegrityError, {"files": {}}),
        (IntegrityError, {"files": {"../../etc/passwd": {"bytes": 1, "crc32": 1}}}),
        (ConfigError, {"method": {"name": "lora", "unknown": 1}}),
    ],
)
def test_load_adapter_invalid_graftwerk_json_raises(
    error: type[GraftwerkError], changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_adapter(grafted(), tmp_path / "adapter")
    (folder / "graftwerk.json").write_text(json.dumps({**read_adapter_config(folder).own, **changes}))
    untouched(lambda model: load_adapter(model, folder), error, ".")


def test_read_adapter_config_folder_without_adapter_raises(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no folder"):
        read_adapter_config(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapter_config(tmp_path)
    folder = save_adapter(grafted("bitfit"), tmp_path / "bitfit")
    (folder / "graftwerk.json").unlink()
    with pytest.raises(AdapterError, match=r"GRAFTWERK_BITFIT.*graftwerk\.json"):
        read_adapter_config(folder)


def test_load_adapter_pickled_weights_raise(tmp_path: Path) -> None:
    folder = as_peft(save_adapter(grafted(), tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    error = untouched(lambda model: load_adapter(model, folder), IntegrityError, "pickle")
    assert error.exit_code == 8


def test_load_adapter_recovers_interrupted_replacement(tmp_path: Path) -> None:
    folder = save_adapter(grafted(), tmp_path / "adapter")
    shutil.move(folder, tmp_path / ".adapter.replaced")
    assert load_adapter(bert(), folder).name == "news"


def test_load_adapter_other_number_of_labels_gets_own_head(tmp_path: Path) -> None:
    model = bert(labels=5)
    expected_width = 5
    save_adapter(gw.attach(model, parse_method("lora"), "five"), tmp_path / "adapter")
    three = bert()
    load_adapter(three, tmp_path / "adapter")
    assert run(three).shape[-1] == expected_width
    with gw.disabled(three):
        assert run(three).shape[-1] == 3


def test_load_adapter_concurrent_save_gives_old_or_new(tmp_path: Path) -> None:
    """A writer replaces the folder as fast as it can; each load finds one whole adapter."""
    folder = tmp_path / "news"
    grafts = [grafted(seed=seed) for seed in (1, 2)]
    known = []
    for graft in grafts:
        graft.save(folder)
        known.append(graft.state_dict())
    writer = os.fork()
    if writer == 0:
        try:
            signal.alarm(120)
            while True:
                for graft in grafts:
                    save_adapter(graft, folder, metadata={"base_fingerprint": "0" * 16})
        finally:
            os._exit(0)
    try:
        model, seen, loads, end = bert(), set(), 0, time.monotonic() + 60
        while loads < 60 or (seen != {0, 1} and time.monotonic() < end):  # a writer that waits for the disk may be late
            loads += 1
            graft = load_adapter(model, folder, force=True)
            state = graft.state_dict()
            seen.add(next(at for at, other in enumerate(known) if all(torch.equal(state[k], other[k]) for k in other)))
            graft.delete()
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert seen == {0, 1}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_save_adapter_files_follow_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = grafted("prompt").save(tmp_path / "news")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def test_adapter_save_without_writer_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = grafted()
    assert (
        files(adapter.save(tmp_path / "a", task="news")).keys() == files(save_adapter(adapter, tmp_path / "b")).keys()
    )
    monkeypatch.setattr(gw.Adapter, "writer", None)
    with pytest.raises(UnsupportedError, match="no file format is registered"):
        adapter.save(tmp_path / "c")
