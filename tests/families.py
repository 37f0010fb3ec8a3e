"""Tiny models, built from configs, one for each listed architecture, in each of the shapes that the tests need.

`FAMILIES` go through every contract test. `MORE` are close relatives: what is peculiar to them is tried in
`tests/contract/test_more_families.py`, and the whole contract in the slow tests.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor

Kind = Literal["encoder", "decoder", "seq2seq"]

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {**SMALL, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 4}
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, **IDS,
}  # fmt: skip


class _Mould:
    """A model from which copies are cast: its modules as bytes in memory, its tensors beside them.

    A tenth of the time of `copy.deepcopy`, which was a third of all that the contract test took.
    """

    def __init__(self, model: Any) -> None:
        self.tensors: list[Tensor] = []
        places: dict[int, int] = {}
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=pickle.HIGHEST_PROTOCOL)

        def place(found: Any) -> int | None:
            if not isinstance(found, Tensor):
                return None
            if id(found) not in places:
                places[id(found)] = len(self.tensors)
                self.tensors.append(found)
            return places[id(found)]

        pickler.persistent_id = place  # type: ignore[method-assign]
        pickler.dump(model)
        self.bytes = file.getvalue()

    def cast(self) -> Any:
        made: dict[int, Tensor] = {}

        def tensor(place: int) -> Tensor:
            if place not in made:
                source = self.tensors[place]
                made[place] = source.detach().clone()
                if isinstance(source, torch.nn.Parameter):
                    made[place] = torch.nn.Parameter(made[place], source.requires_grad)
            return made[place]

        unpickler = pickle.Unpickler(io.BytesIO(self.bytes))
        unpickler.persistent_load = tensor  # type: ignore[method-assign]
        return unpickler.load()


_BUILT: dict[tuple[Any, ...], tuple[_Mould, Tensor]] = {}


@dataclass(frozen=True)
class Family:
    name: str
    kind: Kind
    config: Callable[[], Any]
    lm: str
    classifier: str | None

    def build(self, *, classifier: bool = False, labels: int = 3, seed: int = 0, dropout: float = 0.0) -> Any:
        """A model in eval mode, weights drawn from ``seed``; dropout off unless asked.

        The first of a kind is built, the others are cast from it; torch's random state is
        afterwards as if it had been built.
        """
        key = (self, classifier, labels, seed, dropout)
        if key not in _BUILT:
            model = self._built(classifier=classifier, labels=labels, seed=seed, dropout=dropout)
            _BUILT[key] = _Mould(model), torch.get_rng_state()
        mould, state = _BUILT[key]
        torch.set_rng_state(state)
        return mould.cast()

    def _built(self, *, classifier: bool, labels: int, seed: int, dropout: float) -> Any:
        config = self.config()
        for key in list(vars(config)):
            if "dropout" in key or key.endswith("pdrop"):
                setattr(config, key, dropout)
        config.num_labels = labels
        torch.manual_seed(seed)
        cls = getattr(tf, self.classifier if classifier and self.classifier else self.lm)
        model = cls(config).eval()
        # Biases and norms start at 0 and 1, which would hide mistakes; every weight is made generic.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if (
                labels != 3
            ):  # the head comes first in the stream of random numbers; the base must not depend on its size
                usual = dict(self.build(classifier=classifier, seed=seed).base_model.named_parameters())
                for name, parameter in model.base_model.named_parameters():
                    parameter.copy_(usual[name])
        return model

    def batch(
        self, rows: int = 3, tokens: int = 7, *, seed: int = 0, padded: bool = True, labels: bool = False
    ) -> dict[str, Tensor]:
        """Token ids from 3 up, right-padded rows of different length, and decoder inputs for encoder-decoder models."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 64, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(1, rows):
                mask[row, tokens - row :] = 0
        ids = torch.where(mask.bool(), ids, torch.zeros_like(ids))
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.kind == "seq2seq":
            batch["decoder_input_ids"] = torch.randint(3, 64, (rows, tokens - 2), generator=generator)
        if labels:
            if self.kind == "seq2seq":
                batch["labels"] = batch.pop("decoder_input_ids")
            else:
                batch["labels"] = torch.where(mask.bool(), ids, torch.full_like(ids, -100))
        return batch


FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "encoder", lambda: tf.BertConfig(**SMALL, max_position_embeddings=64), "BertForMaskedLM",
        "BertForSequenceClassification"),
        Family("roberta", "encoder", lambda: tf.RobertaConfig(**SMALL, max_position_embeddings=64, pad_token_id=0,
        type_vocab_size=1), "RobertaForMaskedLM", "RobertaForSequenceClassification"),
        Family("distilbert", "encoder", lambda: tf.DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=4,
        hidden_dim=24, max_position_embeddings=64, pad_token_id=0), "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification"),
        Family("modernbert", "encoder", lambda: tf.ModernBertConfig(**SMALL, max_position_embeddings=64,
        pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, global_attn_every_n_layers=2,
        local_attention=4), "ModernBertForMaskedLM", "ModernBertForSequenceClassification"),
        Family("electra", "encoder", lambda: tf.ElectraConfig(**SMALL, embedding_size=12, max_position_embeddings=64),
        "ElectraForMaskedLM", "ElectraForSequenceClassification"),
        Family("gpt2", "decoder", lambda: tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_inner=24,
        n_positions=64, **IDS), "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        Family("opt", "decoder", lambda: tf.OPTConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16, **IDS), "OPTForCausalLM",
        "OPTForSequenceClassification"),
        Family("llama", "decoder", lambda: tf.LlamaConfig(**GATED), "LlamaForCausalLM",
        "LlamaForSequenceClassification"),
        Family("qwen2", "decoder", lambda: tf.Qwen2Config(**{k: v for k, v in GATED.items() if k != "head_dim"}),
        "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
        Family("mistral", "decoder", lambda: tf.MistralConfig(**GATED, sliding_window=4), "MistralForCausalLM",
        "MistralForSequenceClassification"),
        Family("gemma", "decoder", lambda: tf.GemmaConfig(**GATED), "GemmaForCausalLM",
        "GemmaForSequenceClassification"),
        Family("t5", "seq2seq", lambda: tf.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2,
        num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2), "T5ForConditionalGeneration",
        "T5ForSequenceClassification"),
        Family("bart", "seq2seq", lambda: tf.BartConfig(**BART), "BartForConditionalGeneration",
        "BartForSequenceClassification"),
        Family("mbart", "seq2seq", lambda: tf.MBartConfig(**BART), "MBartForConditionalGeneration",
        "MBartForSequenceClassification"),
        Family("marian", "seq2seq", lambda: tf.MarianConfig(**{**BART, "decoder_start_token_id": 0}), "MarianMTModel",
        None),
    )
}  # fmt: skip

_NARROW = {key: value for key, value in GATED.items() if key != "head_dim"}
_ROBERTA = {**SMALL, "max_position_embeddings": 64, "pad_token_id": 0, "type_vocab_size": 1}

MORE = {
    family.name: family
    for family in (
        Family("xlm-roberta", "encoder", lambda: tf.XLMRobertaConfig(**_ROBERTA), "XLMRobertaForMaskedLM",
        "XLMRobertaForSequenceClassification"),
        Family("camembert", "encoder", lambda: tf.CamembertConfig(**_ROBERTA), "CamembertForMaskedLM",
        "CamembertForSequenceClassification"),
        Family("qwen3", "decoder", lambda: tf.Qwen3Config(**GATED), "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification"),
        Family("phi", "decoder", lambda: tf.PhiConfig(**_NARROW), "PhiForCausalLM", "PhiForSequenceClassification"),
        Family("gemma2", "decoder", lambda: tf.Gemma2Config(**GATED, sliding_window=4, query_pre_attn_scalar=4),
        "Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
        Family("gemma3", "decoder", lambda: tf.Gemma3TextConfig(**GATED, sliding_window=4, query_pre_attn_scalar=4,
        layer_types=["sliding_attention", "full_attention"]), "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification"),
        Family("olmo2", "decoder", lambda: tf.Olmo2Config(**_NARROW), "Olmo2ForCausalLM",
        "Olmo2ForSequenceClassification"),
        Family("granite", "decoder", lambda: tf.GraniteConfig(**_NARROW), "GraniteForCausalLM", None),
        Family("smollm3", "decoder", lambda: tf.SmolLM3Config(**_NARROW, no_rope_layers=[1, 0]), "SmolLM3ForCausalLM",
        "SmolLM3ForSequenceClassification"),
        Family("stablelm", "decoder", lambda: tf.StableLmConfig(**_NARROW, partial_rotary_factor=0.5),
        "StableLmForCausalLM", "StableLmForSequenceClassification"),
        Family("mt5", "seq2seq", lambda: tf.MT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2,
        num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2), "MT5ForConditionalGeneration",
        "MT5ForSequenceClassification"),
        Family("pegasus", "seq2seq", lambda: tf.PegasusConfig(**BART), "PegasusForConditionalGeneration", None),
        Family("m2m_100", "seq2seq", lambda: tf.M2M100Config(**BART, encoder_layerdrop=0.0, decoder_layerdrop=0.0),
        "M2M100ForConditionalGeneration", None),
        Family("blenderbot", "seq2seq", lambda: tf.BlenderbotConfig(**BART), "BlenderbotForConditionalGeneration",
        None),
        Family("plbart", "seq2seq", lambda: tf.PLBartConfig(**BART), "PLBartForConditionalGeneration",
        "PLBartForSequenceClassification"),
    )
}  # fmt: skip
ALL = {**FAMILIES, **MORE}
