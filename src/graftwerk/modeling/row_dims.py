"""The dimension of a layer's input that holds the rows of a batch; without knowing it, no adapter can differ by row.

Shapes alone do not tell: a sequence-first (T, B, d) with T a multiple of B looks like a batch, and adapters would
change each other's tokens without an error. So architectures are listed, each tested against its rows one by one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from graftwerk.errors import UnsupportedError
from graftwerk.methods.base import Role, TargetModule
from graftwerk.modeling.adapter_slots import AttachedAdapter

_BATCH_FIRST = frozenset(
    """
    albert apertus arcee audio-spectrogram-transformer bart beit bert bert-generation big_bird bigbird_pegasus biogpt
    bitnet blenderbot blenderbot-small bloom camembert clip_text_model clip_vision_model codegen cohere cohere2 convnext
    convnextv2 cpmant ctrl data2vec-audio data2vec-text data2vec-vision deit diffllama dinov2 dinov2_with_registers
    dinov3_vit distilbert electra ernie ernie4_5 esm eurobert exaone4 falcon falcon_mamba flaubert fnet funnel gemma
    gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite gte helium hubert
    hunyuan_v1_dense ijepa imagegpt jais2 jina_embeddings_v3 layoutlm lfm2 llama longt5 m2m_100 mamba mamba2 marian
    markuplm mbart megatron-bert ministral ministral3 mistral mixtral mobilebert modernbert modernbert-decoder mpnet mpt
    mt5 nanochat nemotron nomic_bert olmo olmo2 olmo3 olmoe openai-gpt opt pegasus pegasus_x persimmon phi phi3 plbart
    prophetnet pvt qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta roberta-prelayernorm roc_bert roformer seed_oss
    segformer siglip_vision_model smollm3 splinter squeezebert stablelm starcoder2 t5 tapas trocr umt5 unispeech
    unispeech-sat vaultgemma vit vit_mae vit_msn wav2vec2 wavlm whisper xlm xlm-roberta xlm-roberta-xl yoso
    """.split()  # noqa: SIM905 - a list of 120 lines says no more
)
"""Architectures whose layers all get (B, ..., d), or (B·T, d) with the tokens of a row together."""

_SEQUENCE_FIRST: dict[str, tuple[str, ...]] = {
    "xlnet": ("layer.",),
    "longformer": (".attention.self.",),
    "led": (".longformer_self_attn.",),
}
"""Architectures of which some layers get (T, B, d): parts of the paths of these layers. The others are batch-first."""

_WHY_NOT = {
    "deberta": "its layers project position embeddings too, which all rows share",
    "deberta-v2": "its layers project position embeddings too, which all rows share",
    "sew-d": "its layers project position embeddings too, which all rows share",
    "wav2vec2-conformer": "its layers project position embeddings too, which all rows share",
    "fsmt": "it computes position by position",
    "switch_transformers": "its experts get tokens of all rows, sorted anew",
}


def row_dim(model_type: str, path: str) -> int:
    """Return the dimension of rows in the input of a layer: 0, or 1 for a sequence-first one."""
    parts = _SEQUENCE_FIRST.get(model_type)
    return int(parts is not None and any(part in f"{path}." for part in parts))


def _reads_tokens(table: TargetModule, adapter: AttachedAdapter) -> bool:
    """Return True for the input embedding, what is tied to it, and a layer that scores the vocabulary."""
    inputs = [other.path for other in adapter.targets if other.is_input]
    return table.role is Role.VOCABULARY or table.is_input or table.tied_to in inputs


def check_rows(model: nn.Module, adapters: Iterable[AttachedAdapter]) -> None:
    """Check that these adapters can differ by row: the row dimension of each layer that they work in has to be known.

    Raises:
        UnsupportedError: they cannot; the message says why.
    """
    model_type = model.config.model_type  # type: ignore[union-attr]
    why = None
    if model_type not in _BATCH_FIRST and model_type not in _SEQUENCE_FIRST:
        why = _WHY_NOT.get(model_type, "which dimension of its layers holds the rows of a batch is not known")  # type: ignore[arg-type]
    for adapter in adapters:
        for path in adapter.heads:
            if row_dim(model_type, path):  # type: ignore[arg-type]
                why = f"`{path}`, which is trained whole, has the tokens in its first dimension"
        for target in adapter.targets:
            if target.is_table and not _reads_tokens(target, adapter):
                why = f"`{target.path}` may be called with other numbers than a row's tokens"
            elif target.is_table and model_type in _SEQUENCE_FIRST:
                why = f"`{target.path}`, of which rows are trained, may have the tokens in its first dimension"
            elif target.weight_only:
                why = f"`{target.path}` is never called: its weight is read, and is the same for all rows"
            if target.role is Role.PARAMETER:
                why = f"target_parameters changes `{target.path}`, which is the same for the tokens of all rows"
    if why is not None:
        raise UnsupportedError(
            f"adapters cannot differ by row on a model of type `{model_type}`: {why}",
            where="activate(model, rows=...)",
            hint="activate one adapter at a time, and run its rows in a batch of their own",
        )
