"""Read the parts of a model off the table of architectures: targets, attentions, stacks, heads; nothing is changed.

`read_architecture(model)` finds them by the names in `module_names.py`. A model of an architecture that is not listed
still has its linear layers as targets (`OTHER_LINEAR`), so that LoRA on named or all linear layers works; methods that
need to know the role of a layer name the known architectures in their error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftwerk.kernels.memory_efficient import own_base
from graftwerk.methods.base import Method, Role, TargetModule
from graftwerk.modeling.adapter_slots import CHILD
from graftwerk.modeling.layer_checks import adds_bias_last, is_weight_only, unfit
from graftwerk.modeling.module_index import base_modules, module_index
from graftwerk.modeling.module_names import BY_TYPE, ModuleNames, is_causal
from graftwerk.modeling.parameter_targets import parameter_targets
from graftwerk.modeling.vocabulary_tables import read_tables

StackKind = Literal["encoder", "decoder", "causal"]
"""`encoder` reads both ways; `decoder` is the second half of an encoder-decoder; `causal` is a decoder-only model."""


@dataclass(frozen=True)
class AttentionLayer:
    """One module that calls transformers' attention interface.

    Attributes:
        path: Its path in the model.
        stack: The kind of stack it stands in.
        cross: Whether its keys and values come from the encoder.
        layer: Index of its layer within the stack.
        kv_heads, head_dim: Heads G of keys and values, and their width D.
    """

    path: str
    stack: StackKind
    cross: bool
    layer: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LayerStack:
    """A module that takes `input_ids` or `inputs_embeds` and runs layers over them.

    Attributes:
        path: Its path ("" where the model itself is the stack).
        kind: How it reads.
        width: Width d of its input embeddings.
        layers: The path of its list of layers.
    """

    path: str
    kind: StackKind
    width: int
    layers: str


@dataclass(frozen=True)
class Architecture:
    """The parts of a model, as far as methods need them.

    Attributes:
        model_type: As its configuration has it.
        known: True if it is in the table.
        targets: Modules that an adapter module can be built for.
        attentions: Its attention modules.
        stacks: Its stacks of layers.
        heads: Modules outside the base model that a task put there (`classifier`, `score`): trained whole with every
            adapter.
        by_path: Targets by path.
        tables: Its embeddings and the layers that score its vocabulary, whose single rows can be adapted.
        parameters: Its parameters, for methods that name some.
    """

    model_type: str
    known: bool
    targets: tuple[TargetModule, ...]
    attentions: tuple[AttentionLayer, ...]
    stacks: tuple[LayerStack, ...]
    heads: tuple[str, ...]
    by_path: Mapping[str, TargetModule] = field(default_factory=dict)
    tables: tuple[TargetModule, ...] = ()
    parameters: tuple[TargetModule, ...] = ()

    def candidates(self, method: Method) -> tuple[TargetModule, ...]:
        """Return what a method chooses its targets from: parameters too, if its settings name some."""
        return self.targets + self.parameters if getattr(method, "target_parameters", None) else self.targets


_TASK_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|QuestionAnsweringSimple|MultipleChoice"
    r"|ImageClassification\w*|ImagesAndTextClassification|VideoClassification|AudioClassification"
    r"|AudioFrameClassification|XVector|CTC|SemanticSegmentation)$"
)
"""Models whose head is drawn at random when they are made from a pretrained base."""
_HEAD_NAMES = frozenset({
    "classifier", "projector", "score", "head", "ctc_head", "qa_outputs", "classification_head", "decode_head",
    "auxiliary_head",
})  # fmt: skip
"""Names of heads in models without a base model as a part of its own."""


def read_architecture(model: PreTrainedModel) -> Architecture:
    """Return the architecture of a model; read once for as long as its modules are the same, adapters left out."""
    return module_index(model).cached("architecture", lambda: _read(model))


def _read(model: PreTrainedModel) -> Architecture:
    config = model.config
    layout = BY_TYPE.get(config.model_type)
    base = base_path(model)
    heads = _task_heads(model, base)
    targets: list[TargetModule] = []
    layer_of = _LayerFinder(layout)

    def stack_of(path: str) -> str | None:
        if layout is None or layer_of(path)[0] is None:
            return layer_of.list_of(path)
        return _stack_kind(model, layout, path)

    outputs = model.get_output_embeddings()  # in T5 it lies beside the stacks, and there the base is the model itself
    modules, seen = base_modules(model), set[int]()
    for path, module in _distinct(model):
        inside = bool(path) and _inside(path, base) and module is not outputs
        in_head = any(_inside(path, head) for head in heads)
        if path and (in_head or not inside) and isinstance(module, nn.Linear | Conv1D):
            parent, _, name = path.rpartition(".")
            silent, has_bias = is_weight_only(modules[parent], name), module.bias is not None
            shape = linear_shape(module)
            targets.append(TargetModule(path, Role.HEAD, *shape, has_bias, weight_only=silent, unfit=unfit(module)))
        if in_head:
            continue
        reached = inside and (isinstance(module, nn.Linear | Conv1D) or adds_bias_last(module))
        for name, bias in module._parameters.items():
            if bias is not None and is_bias(name) and not (reached and name == "bias") and id(bias) not in seen:
                seen.add(id(bias))
                where, width = f"{path}.{name}".removeprefix("."), bias.numel()
                layer = layer_of(where)[0]
                targets.append(TargetModule(where, Role.LOOSE_BIAS, width, width, True, None, layer, stack_of(where)))
        if not inside:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            targets.append(_linear_target(model, layout, modules, path, module, layer_of(path), stack_of(path)))
        elif reached and (bias := module._parameters.get("bias")) is not None:
            width = bias.numel()
            targets.append(TargetModule(path, Role.NORM, width, width, True, None, layer_of(path)[0], stack_of(path)))
    return Architecture(
        model_type=config.model_type,
        known=layout is not None,
        targets=tuple(targets),
        attentions=_attentions(model, layout, targets),
        stacks=_stacks(model, layout, base),
        heads=heads,
        by_path={target.path: target for target in targets},
        tables=read_tables(model),
        parameters=tuple(parameter_targets(_distinct(model), modules, lambda path: layer_of(path)[0], stack_of)),
    )


def _linear_target(
    model: PreTrainedModel,
    layout: ModuleNames | None,
    modules: Mapping[str, nn.Module],
    path: str,
    module: nn.Linear | Conv1D,
    place: tuple[int | None, str | None],
    stack: str | None,
) -> TargetModule:
    """Return a linear layer of the base as a target, with its role if the architecture is in the table."""
    layer, relative = place
    role, ffn = Role.OTHER_LINEAR, None
    if layout is not None and relative is not None:
        role = layout.roles.get(relative, Role.OTHER_LINEAR)
    if role in (Role.FFN_IN, Role.FFN_GATE, Role.FFN_OUT) and relative is not None:
        ffn = f"{path.removesuffix(relative)}{_block(relative)}"
    parent, _, name = path.rpartition(".")
    reason = unfit(module)
    if layout is not None and reason is None and _is_idle_cross(model.config, layout, parent):
        reason = "cross-attention is called with an encoder's states alone, and this model has no encoder"
    silent, has_bias = is_weight_only(modules[parent], name), module.bias is not None
    return TargetModule(path, role, *linear_shape(module), has_bias, ffn, layer, stack, silent, reason)


def _task_heads(model: PreTrainedModel, base_path: str) -> tuple[str, ...]:
    """Return the names of the children that a task put beside the base, if the model is of such a task."""
    if _TASK_HEADS.search(own_base(type(model)).__name__) is None:
        return ()
    return tuple(
        name
        for name, child in model.named_children()
        if (name != base_path if base_path else name in _HEAD_NAMES)
        and name != CHILD
        and any(True for _ in child.parameters())
    )


def is_bias(name: str) -> bool:
    """Return True if a parameter's name, or its last part, marks a bias (`q_bias`, `in_proj_bias`, `bias_ih_l0`)."""
    return "bias" in name.rpartition(".")[2].split("_")


def linear_shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return (in, out) of a linear layer, also of GPT-2's transposed one and of quantized ones."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def base_path(model: PreTrainedModel) -> str:
    """Return the path of the base within a model with a head, "" if the model is the base itself."""
    base = model.base_model
    if base is model:
        return ""
    return next(name for name, module in _distinct(model) if module is base)


def _distinct(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield as `named_modules` does, without adapters: shared modules once, under their first path."""
    seen: set[int] = set()
    for path, module in base_modules(model).items():
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def _is_idle_cross(config: Any, layout: ModuleNames, path: str) -> bool:
    """Return True for the cross-attention of a decoder that is used alone, as in `BartForCausalLM`."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return False
    return path.endswith(tuple(f".{name}" for name in layout.cross))


def _inside(path: str, base_path: str) -> bool:
    return not base_path or path == base_path or path.startswith(base_path + ".")


def _block(relative: str) -> str:
    """Return `mlp` for `mlp.up_proj`, and "" for `fc1` or `output.dense`, which belong to the layer itself."""
    head = relative.rpartition(".")[0]
    return "" if head in ("intermediate", "output") else head


class _LayerFinder:
    """Split a path into the index of its layer and the rest."""

    def __init__(self, layout: ModuleNames | None) -> None:
        names = {layout.layers} if layout is not None else {"layers", "layer", "h", "block", "blocks"}
        alternatives = "|".join(re.escape(name) for name in sorted(names))
        self.pattern = re.compile(rf"(?:^|\.)(?:{alternatives})\.(\d+)\.(.+)$")

    def __call__(self, path: str) -> tuple[int | None, str | None]:
        match = self.pattern.search(path)
        return (int(match[1]), match[2]) if match else (None, None)

    def list_of(self, path: str) -> str | None:
        """Return the path of the list of layers that a module is in, or None."""
        match = self.pattern.search(path)
        return path[: match.start(1) - 1] if match else None


def _stack_kind(model: PreTrainedModel, layout: ModuleNames, path: str) -> StackKind:
    if model.config.is_encoder_decoder:
        return "decoder" if "decoder" in path.split(".") else "encoder"
    return "causal" if is_causal(model.config) else "encoder"


def _attentions(
    model: PreTrainedModel, layout: ModuleNames | None, targets: list[TargetModule]
) -> tuple[AttentionLayer, ...]:
    if layout is None:
        return ()
    found, modules = [], base_modules(model)
    for target in targets:
        if target.role not in (Role.KEY, Role.FUSED_QKV) or target.layer is None or target.unfit is not None:
            continue
        path = target.path.rpartition(".")[0]
        module = modules[path]
        width = target.out_features // (3 if target.role is Role.FUSED_QKV else 1)
        head_dim = next(
            value
            for name in ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_per_head")
            if isinstance(value := getattr(module, name, None), int)
        )
        cross = any(path.endswith(name) for name in layout.cross)
        kind = _stack_kind(model, layout, path)
        found.append(AttentionLayer(path, kind, cross, target.layer, width // head_dim, head_dim))
    return tuple(found)


def _stacks(model: PreTrainedModel, layout: ModuleNames | None, base_path: str) -> tuple[LayerStack, ...]:
    if layout is None:
        return ()
    if not layout.causal and not model.config.is_encoder_decoder:
        layers = f"{base_path}.{layout.layers}".removeprefix(".")
        if layers in base_modules(model):  # the decoder of an encoder-decoder, used alone, has a wrapper in between
            kind = _stack_kind(model, layout, base_path)
            return (LayerStack(base_path, kind, _embedding_width(model.base_model), layers),)
    found = []
    for path, module in _distinct(model):
        if (path.split(".")[-1] == layout.layers or path == layout.layers) and isinstance(module, nn.ModuleList):
            stack = path.rpartition(".")[0]
            width = _embedding_width(model.get_submodule(stack) if stack else model)
            found.append(LayerStack(stack, _stack_kind(model, layout, stack), width, path))
    return tuple(found)


def _embedding_width(stack: nn.Module) -> int:
    embedding = stack.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[1])
