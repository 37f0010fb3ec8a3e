"""The one table of architectures: the names of their parts, and the role of each in a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from graftwerk.methods.base import Role


@dataclass(frozen=True)
class ModuleNames:
    """Names of the parts of one group of architectures; paths are relative to a layer.

    Attributes:
        model_types: The architectures.
        layers: Path from a stack to its list of layers.
        roles: Role by path.
        causal: True for decoder-only models.
        cross: Names of cross-attention modules.
    """

    model_types: tuple[str, ...]
    layers: str
    roles: Mapping[str, Role]
    causal: bool = False
    cross: tuple[str, ...] = ()


_BERT = ModuleNames(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "roberta-prelayernorm"),
    layers="encoder.layer",
    roles={
        "attention.self.query": Role.QUERY,
        "attention.self.key": Role.KEY,
        "attention.self.value": Role.VALUE,
        "attention.output.dense": Role.ATTENTION_OUT,
        "crossattention.self.query": Role.QUERY,
        "crossattention.self.key": Role.KEY,
        "crossattention.self.value": Role.VALUE,
        "crossattention.output.dense": Role.ATTENTION_OUT,
        "intermediate.dense": Role.FFN_IN,
        "output.dense": Role.FFN_OUT,
    },
    cross=("crossattention.self",),
)
_PROJECTIONS = {
    "self_attn.q_proj": Role.QUERY,
    "self_attn.k_proj": Role.KEY,
    "self_attn.v_proj": Role.VALUE,
}
_GATED = ModuleNames(
    model_types=(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo",
        "olmo2",
        "granite",
        "smollm3",
        "stablelm",
    ),
    layers="layers",
    roles={
        **_PROJECTIONS,
        "self_attn.o_proj": Role.ATTENTION_OUT,
        "mlp.gate_proj": Role.FFN_GATE,
        "mlp.up_proj": Role.FFN_IN,
        "mlp.down_proj": Role.FFN_OUT,
    },
    causal=True,
)
_BART = ModuleNames(
    model_types=("bart", "mbart", "marian", "m2m_100", "pegasus", "blenderbot", "plbart"),
    layers="layers",
    roles={
        **_PROJECTIONS,
        "self_attn.out_proj": Role.ATTENTION_OUT,
        "encoder_attn.q_proj": Role.QUERY,
        "encoder_attn.k_proj": Role.KEY,
        "encoder_attn.v_proj": Role.VALUE,
        "encoder_attn.out_proj": Role.ATTENTION_OUT,
        "fc1": Role.FFN_IN,
        "fc2": Role.FFN_OUT,
    },
    cross=("encoder_attn",),
)


def _t5_roles() -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for block in ("layer.0.SelfAttention", "layer.1.EncDecAttention"):
        for name, role in (("q", Role.QUERY), ("k", Role.KEY), ("v", Role.VALUE), ("o", Role.ATTENTION_OUT)):
            roles[f"{block}.{name}"] = role
    for block in ("layer.1.DenseReluDense", "layer.2.DenseReluDense"):
        # v1.1 and mT5 gate: wi_0 goes through the activation, wi_1 is multiplied with it.
        for name, role in (("wi", Role.FFN_IN), ("wi_1", Role.FFN_IN), ("wi_0", Role.FFN_GATE), ("wo", Role.FFN_OUT)):
            roles[f"{block}.{name}"] = role
    return roles


LAYOUTS: tuple[ModuleNames, ...] = (
    _BERT,
    _GATED,
    _BART,
    ModuleNames(
        model_types=("distilbert",),
        layers="transformer.layer",
        roles={
            "attention.q_lin": Role.QUERY,
            "attention.k_lin": Role.KEY,
            "attention.v_lin": Role.VALUE,
            "attention.out_lin": Role.ATTENTION_OUT,
            "ffn.lin1": Role.FFN_IN,
            "ffn.lin2": Role.FFN_OUT,
        },
    ),
    ModuleNames(
        model_types=("modernbert",),
        layers="layers",
        roles={
            "attn.Wqkv": Role.FUSED_QKV,
            "attn.Wo": Role.ATTENTION_OUT,
            "mlp.Wi": Role.FFN_IN,
            "mlp.Wo": Role.FFN_OUT,
        },
    ),
    ModuleNames(
        model_types=("gpt2",),
        layers="h",
        roles={
            "attn.c_attn": Role.FUSED_QKV,
            "attn.c_proj": Role.ATTENTION_OUT,
            "mlp.c_fc": Role.FFN_IN,
            "mlp.c_proj": Role.FFN_OUT,
        },
        causal=True,
    ),
    ModuleNames(
        model_types=("opt",),
        layers="layers",
        roles={**_PROJECTIONS, "self_attn.out_proj": Role.ATTENTION_OUT, "fc1": Role.FFN_IN, "fc2": Role.FFN_OUT},
        causal=True,
    ),
    ModuleNames(
        model_types=("phi",),
        layers="layers",
        roles={**_PROJECTIONS, "self_attn.dense": Role.ATTENTION_OUT, "mlp.fc1": Role.FFN_IN, "mlp.fc2": Role.FFN_OUT},
        causal=True,
    ),
    ModuleNames(model_types=("t5", "mt5", "umt5"), layers="block", roles=_t5_roles(), cross=("EncDecAttention",)),
)

BY_TYPE = {model_type: layout for layout in LAYOUTS for model_type in layout.model_types}
"""The names by model type."""


def is_causal(config: PreTrainedConfig) -> bool:
    """Return whether a known architecture is a decoder-only one, in which a token reads only those before it."""
    if config.is_encoder_decoder:
        return False
    layout = BY_TYPE.get(config.model_type)
    return (layout is not None and layout.causal) or bool(getattr(config, "is_decoder", False))
