"""MiSS, HiRA, SHiRA and OFT as PEFT writes them down, and back: one table, for their settings are called as PEFT's.

PEFT has three of them for `nn.Linear` alone. On GPT-2, whose layers are `Conv1D`, they are stored under a type of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftwerk.errors import AdapterError
from graftwerk.methods.base import Method
from graftwerk.methods.base_weights import is_transposed
from graftwerk.methods.hira import HiRA
from graftwerk.methods.miss import MiSS
from graftwerk.methods.oft import OFT
from graftwerk.methods.shira import SHiRA
from graftwerk.modeling.architectures import Architecture
from graftwerk.modeling.attach import Adapter
from graftwerk.serialization.naming import endings
from graftwerk.serialization.peft_format import (
    PREFIX,
    Restored,
    Stored,
    common_config,
    module_paths,
    most_common,
    own_tensors,
    target_config,
    write_own,
)
from graftwerk.serialization.peft_reading import by_layer, check_layers, listed, read_heads, refuse_resized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """The layout of one method's folders in PEFT.

    Attributes:
        method: The settings' class.
        parts: The parameters of a layer.
        settings: Fields that are written and read under their own names.
        constants: What else PEFT's configuration says, always the same.
        conv1d: Whether PEFT has the method for `Conv1D`.
        chooses_layers: Whether PEFT's configuration can choose layers by number.
        check: Raises AdapterError if a layer's tensors cannot be what they should, given its output and input width.
    """

    method: type[Method]
    parts: tuple[str, ...]
    settings: tuple[str, ...]
    constants: Mapping[str, Any]
    conv1d: bool = False
    chooses_layers: bool = True
    check: Callable[[str, Mapping[str, Tensor], int, int], None] | None = None


def write_linear(adapter: Adapter, base_name: str | None) -> Stored:
    """Return what a folder of MiSS, HiRA, SHiRA or OFT holds."""
    method = adapter.method
    assert method.peft_type is not None
    layout = LAYOUTS[method.peft_type]
    paths = [target.path for target in adapter.targets]
    transposed = any(is_transposed(adapter.model.get_submodule(path)) for path in paths)
    if transposed and not layout.conv1d:
        return write_own(adapter, base_name)
    targets = (
        target_config(adapter, paths)
        if layout.chooses_layers
        else {"target_modules": endings(paths, module_paths(adapter.model, adapter.heads))}
    )
    config = {
        **common_config(adapter, method.peft_type, base_name),
        **{name: getattr(method, name) for name in layout.settings},
        **targets,
        **layout.constants,
    }
    if isinstance(method, HiRA):
        ranks = {path: method.rank_at(path) for path in paths}
        rank = most_common(ranks.values())
        config["r"], config["fan_in_fan_out"] = rank, transposed
        config["rank_pattern"] = {path: value for path, value in ranks.items() if value != rank}
    return Stored(config, own_tensors(adapter))


def read_linear(
    model: PreTrainedModel, architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Restored:
    """Return settings and tensors of a folder of MiSS, HiRA, SHiRA or OFT.

    Args:
        model: The base.
        architecture: Its architecture.
        config: Checked content of `adapter_config.json`.
        tensors: By PEFT's keys; their shapes are those of each method's module, D (r, out) or A (r, in) for instance.

    Returns:
        Settings, and tensors by raw keys.

    Raises:
        AdapterError: tensors are missing, have impossible shapes, or do not belong to this model.
        UnsupportedError: the folder holds weights of a base with another vocabulary.
    """
    layout = LAYOUTS[config["peft_type"]]
    layers, rest = by_layer(refuse_resized(model, tensors), layout.parts)
    heads, raw = read_heads(model, config, rest, PREFIX, adapted=layers)
    check_layers(model, architecture, config, layers, heads)
    faults = [f"{path}.{part}" for path, found in layers.items() for part in layout.parts if part not in found]
    if faults:
        raise AdapterError(listed("missing", faults))
    for path, found in layers.items():
        if layout.check is not None:
            target = architecture.by_path[path]
            layout.check(path, found, target.out_features, target.in_features)
    settings = {name: config[name] for name in layout.settings if config.get(name) is not None}
    if layout.method is HiRA:
        ranks = {path: found["hira_A"].shape[0] for path, found in layers.items()}
        settings["rank_pattern"] = {path: rank for path, rank in ranks.items() if rank != config["r"]}
    if layout.method is MiSS and settings.get("init_weights") is False:
        settings["init_weights"] = True  # a random start, and the same function
    if layout.method is OFT:  # whose series of 3 terms PEFT makes as that of 4
        settings["num_cayley_neumann_terms"] = max(4, settings.get("num_cayley_neumann_terms", 5))
    method = layout.method.parse({**settings, "target_modules": list(layers), "modules_to_save": heads})
    raw.update({f"{path}.{part}": tensor for path, found in layers.items() for part, tensor in found.items()})
    return Restored(method, raw)


def _check_hira(path: str, found: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
    a, b = found["hira_A"], found["hira_B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"mis-shaped: {path} has hira_A {tuple(a.shape)} and hira_B {tuple(b.shape)}, not (r, in) and (out, r)"
        )


def _check_shira(path: str, found: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
    indices, values = found["shira_indices"], found["shira_weight"]
    if indices.shape != (2, values.numel()):
        raise AdapterError(
            f"mis-shaped: {path}.shira_indices has shape {tuple(indices.shape)} for {values.numel()} values"
        )
    for positions, size in zip(indices, (out_features, in_features), strict=True):
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < size:
            raise AdapterError(f"{path}.shira_indices points outside the layer's ({out_features}, {in_features})")


LAYOUTS: Mapping[str, Layout] = {
    "MISS": Layout(
        MiSS,
        ("miss_block",),
        ("r", "miss_dropout", "mini_r", "init_weights"),
        {"bias": "none"},
    ),
    "HIRA": Layout(
        HiRA, ("hira_A", "hira_B"), ("r", "hira_dropout"), {"init_weights": True}, conv1d=True, check=_check_hira
    ),
    "SHIRA": Layout(
        SHiRA,
        ("shira_weight", "shira_indices"),
        ("r", "random_seed"),
        {"mask_type": "random", "fan_in_fan_out": False, "init_weights": True},
        chooses_layers=False,
        check=_check_shira,
    ),
    "OFT": Layout(
        OFT,
        ("oft_R.weight",),
        ("r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
        # Without the version PEFT takes the series for that of its versions before 0.18.
        {"peft_version": "0.18.0", "bias": "none", "module_dropout": 0.0, "coft": False, "init_weights": True},
    ),
}
