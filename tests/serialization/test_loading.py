"""What loading costs, counted and never timed: walks, sums, bytes, calls; and that nothing remembered goes stale."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graftwerk.modeling.attach as gw
from graftwerk.errors import AdapterError, IntegrityError
from graftwerk.modeling import architectures as targets
from graftwerk.modeling import module_index as structure_module
from graftwerk.modeling.build import build_from_tensors
from graftwerk.serialization import fingerprint as fingerprint_module
from graftwerk.serialization import untrusted_files as safety
from graftwerk.serialization.folder import load_adapter, save_adapter
from graftwerk.serialization.untrusted_files import read_tensors
from tests.contract.cases import METHODS, method_of, model_and_batch, perturb
from tests.families import FAMILIES


def saved(folder: Path, method: str = "lora", family: str = "llama") -> Path:
    model, _ = model_and_batch(method, family)
    graft = gw.attach(model, method_of(method), name="a")
    perturb(graft.parameters(), 7)
    return save_adapter(graft, folder / "adapter")


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original = getattr(module, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)
    return calls


@pytest.mark.parametrize("method", ["lora", "dora", "houlsby", "prefix", "prompt", "ia3"])
def test_load_adapter_ten_times_walks_base_once(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, method)
    model = FAMILIES["llama"].build()
    anatomies = counted(monkeypatch, targets, "_read")
    samples = counted(monkeypatch, fingerprint_module, "_sample")
    walks = counted(monkeypatch, structure_module, "_walk")
    load_adapter(model, folder, "first")
    base = sum(1 for _ in model.named_parameters() if "graft" not in _[0].split("."))  # the output embedding included
    assert len(anatomies) == 1
    assert len(samples) == base
    whole = [args for args in walks if args[1] == "" and args[0] is model]
    assert len(whole) == 1
    for number in range(9):
        load_adapter(model, folder, f"n{number}")
    assert len(anatomies) == 1
    assert len(samples) == base
    assert len([args for args in walks if args[1] == "" and args[0] is model]) == 1


def test_load_adapter_number_of_calls_is_constant(tmp_path: Path) -> None:
    """Flat in the number loaded: Python's own count of calls, the first one apart."""
    folder = saved(tmp_path)
    model = FAMILIES["llama"].build()
    load_adapter(model, folder, "first")
    counts = []
    for number in range(24):
        calls = 0

        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        gc.disable()  # what other tests left behind is not counted
        sys.setprofile(count)
        try:
            load_adapter(model, folder, f"n{number}")
        finally:
            sys.setprofile(None)
            gc.enable()
        counts.append(calls)
    # One more look at each graft that is there already is all that may be added.
    assert counts[-1] - counts[1] <= 24
    assert max(counts[1:]) <= counts[1] * 1.02


def test_load_adapter_hundred_times_allocates_only_adapter_tensors(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    size = sum(tensor.nbytes for tensor in read_tensors(folder / "adapter_model.safetensors").values())
    model = FAMILIES["llama"].build()
    base = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for number in range(100):
        load_adapter(model, folder, f"n{number}")
    storages = [tensor.untyped_storage() for tensor in model.state_dict().values()]
    blocks = {one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in base}
    assert len(blocks) == 100
    assert sum(blocks.values()) == 100 * size


def test_load_adapter_parameters_share_memory_with_tensors_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path)
    drawn = counted(monkeypatch, nn.init, "kaiming_uniform_")
    read: list[torch.Tensor] = []
    original = safety._tensor
    monkeypatch.setattr(safety, "_tensor", lambda *args: (read.append(original(*args)), read[-1])[1])
    graft = load_adapter(FAMILIES["llama"].build(), folder)
    drawn.clear()
    graft = load_adapter(graft.model, folder, "second")
    assert not drawn
    own = {parameter.data_ptr() for _, module in graft.modules() for parameter in module.parameters()}
    assert own == {tensor.data_ptr() for tensor in read[-len(own) :]}


def test_load_adapter_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    weights = folder / "adapter_model.safetensors"
    taken = counted(monkeypatch, safety, "checksum")
    read = counted(monkeypatch, safety, "_read_into")
    load_adapter(FAMILIES["llama"].build(), folder)
    assert len(read) == 1
    assert weights not in [args[0] for args in taken]


@pytest.mark.parametrize("where", [4, 40, -1])
def test_load_adapter_changed_byte_of_weights_raises(where: int, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[where] ^= 1
    weights.write_bytes(content)
    model = FAMILIES["llama"].build()
    with pytest.raises(IntegrityError, match="is not the file that was written"):
        load_adapter(model, folder)
    assert not gw.adapters(model)
    os.truncate(weights, len(content) - 4)
    with pytest.raises(IntegrityError, match="is not the file that was written"):
        load_adapter(model, folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_load_adapter_nan_or_infinity_raises(bad: float, tmp_path: Path) -> None:

    folder = saved(tmp_path)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    list(tensors.values())[5].view(-1)[3] = bad
    save_file(tensors, weights)
    (folder / "graftwerk.json").unlink()
    with pytest.raises(AdapterError, match="NaN or infinity"):
        load_adapter(FAMILIES["llama"].build(), folder)


def test_load_adapter_large_finite_values_are_accepted(tmp_path: Path) -> None:

    folder = saved(tmp_path)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for tensor in tensors.values():
        tensor.fill_(3e38)
    save_file(tensors, weights)
    (folder / "graftwerk.json").unlink()
    load_adapter(FAMILIES["llama"].build(), folder)


@pytest.mark.parametrize("change", ["step", "load", "replace", "module"])
def test_load_adapter_base_changed_after_first_load_raises(change: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = FAMILIES["llama"].build()
    load_adapter(model, folder, "first")
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        if change == "step":
            layer.weight.add_(1)
        elif change == "load":
            model.load_state_dict({key: tensor + 0.5 for key, tensor in model.state_dict().items()})
        elif change == "replace":
            layer.weight = nn.Parameter(layer.weight + 1)
        else:
            other = FAMILIES["llama"].build(seed=9).model.layers[0]
            model.model.layers[0] = other
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(model, folder, "second")
    assert "second" not in gw.adapters(model)
    load_adapter(model, folder, "forced", force=True)


def test_read_architecture_follows_added_and_removed_modules() -> None:
    model = FAMILIES["llama"].build()
    view = targets.read_architecture(model)
    assert targets.read_architecture(model) is view
    extra = nn.Linear(4, 4)
    model.model.extra = extra
    assert "model.extra" in targets.read_architecture(model).by_path
    model.model.extra = nn.Linear(4, 6)
    assert targets.read_architecture(model).by_path["model.extra"].out_features == 6
    del model.model.extra
    assert targets.read_architecture(model).by_path.keys() == view.by_path.keys()
    gw.attach(model, method_of("lora"), name="a")
    assert targets.read_architecture(model) == view


def test_detach_after_load_leaves_no_attributes(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = FAMILIES["llama"].build()
    before = set(model.__dict__)
    load_adapter(model, folder)
    gw.detach(model)
    assert set(model.__dict__) == before


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby"])
def test_load_adapter_mismatched_file_keeps_model_and_active_adapters(method: str, tmp_path: Path) -> None:

    folder = saved(tmp_path, method)
    model = FAMILIES["llama"].build()
    load_adapter(model, folder, "first")
    load_adapter(model, folder, "second")
    gw.activate(model, ["first", "second"])
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = list(tensors)[3]
    tensors[key] = tensors[key].reshape(-1, 1)
    save_file(tensors, weights)
    own = folder / "graftwerk.json"
    values = safety.read_sealed(own)
    values["files"]["adapter_model.safetensors"] = safety.checksum(weights)
    own.write_text(json.dumps(values))
    with pytest.raises(AdapterError):
        load_adapter(model, folder, "third")
    assert list(gw.adapters(model)) == ["first", "second"]
    assert gw.adapters(model)["first"]._model_adapters.selection.names == ("first", "second")


def test_load_adapter_follows_training_mode_of_model(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = FAMILIES["llama"].build().train()
    graft = load_adapter(model, folder, trainable=True)
    assert all(module.training for _, inner in graft.modules() for module in inner.modules())
    model.eval()
    second = load_adapter(model, folder, "second")
    assert not any(module.training for _, inner in second.modules() for module in inner.modules())
    assert second.frozen
    graft.activate()  # parameters of an inactive adapter require no gradient
    assert all(parameter.requires_grad for parameter in graft.parameters())
    assert METHODS["lora"]["r"] == second.method.r  # type: ignore[attr-defined]


@pytest.mark.parametrize("trainable", [False, True])
def test_stored_tensors_are_moved_as_one_block_and_then_viewed(trainable: bool) -> None:
    """Tensors of another type take the way of those for another device: their values have to be copied."""
    graft = gw.attach(FAMILIES["llama"].build(), method_of("lora"))
    perturb(graft.parameters(), 7)
    targets = graft._model_adapters.adapters["default"].targets
    hosts = [graft.model.get_submodule(target.path) for target in targets]
    stored = graft.state_dict()
    block = torch.cat([tensor.reshape(-1).double() for tensor in stored.values()])
    parts = block.split([tensor.numel() for tensor in stored.values()])
    tensors = {key: part.view_as(stored[key]) for key, part in zip(stored, parts, strict=True)}
    copies: list[int] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                copies.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Copies():
        built = build_from_tensors(graft.method, targets, hosts, tensors, trainable)
    assert built is not None
    assert copies == [block.numel()]
    own = {f"{path}.{key}": value for path, module in built.items() for key, value in module.named_parameters()}
    assert own.keys() == stored.keys()
    assert all(torch.equal(parameter, stored[key]) for key, parameter in own.items())
    assert len({parameter.untyped_storage().data_ptr() for parameter in own.values()}) == 1
    assert all(parameter.requires_grad is trainable for parameter in own.values())
    first, *others = own.values()
    with torch.no_grad():
        first.add_(1)
    assert all((parameter._version != first._version) is trainable for parameter in others)
    assert all((module.block is None) is trainable for module in built.values())
