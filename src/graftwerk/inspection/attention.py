"""Attention weights of a pass by layer and head, and the share of them that virtual tokens take.

Weights of a layer are taken while the pass runs (`recorded_attention`) and made small at once: tokens of a text longer
than `MOST` are taken together in groups, columns added up and rows averaged, so that each row still sums to 1. What is
kept is a few hundred numbers a head, however long the text is.

Legend: H heads, Q queries, S columns, n virtual columns: a prefix's own, or a prompt's in front of the text; q and s
the rows and columns of a map, grouped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import UnsupportedError
from graftwerk.evaluation.inference import evaluation_mode
from graftwerk.evaluation.loading import LoadedAdapter
from graftwerk.inspection.attribution import Question
from graftwerk.modeling.architectures import AttentionLayer, read_architecture
from graftwerk.modeling.attention_weights import recorded_attention
from graftwerk.modeling.module_index import base_modules

MOST = 40
"""Rows and columns of a map; the tokens of longer texts are taken together."""
DECIMALS = 4


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one layer.

    Attributes:
        name: Path of the attention module.
        stack: `encoder`, `decoder` (of an encoder-decoder) or `causal`.
        cross: True if a decoder looks at its encoder's states.
        virtual: Virtual tokens that it sees, n.
        virtual_columns: The first columns of each map, which are theirs.
        share: Share of the attention that goes to them, mean over heads and queries; None if there are none.
        shares: The same for each head.
        maps: For each head a row for each query (or group of them): weights of the virtual columns, then of the keys.
    """

    name: str
    stack: str
    cross: bool
    virtual: int
    virtual_columns: int
    share: float | None
    shares: list[float] | None
    maps: list[list[list[float]]]


@dataclass(frozen=True)
class TextAttention:
    """The attention of one text's pass.

    Attributes:
        text: The text.
        answer: Its answer, as it is attributed.
        tokens: Tokens of the text, or groups of them: ``first … last``; of causal models with the answer behind it.
        decoder_tokens: The same of what a decoder reads, or None without one.
        layers: In the order in which the pass calls them.
    """

    text: str
    answer: str
    tokens: list[str]
    decoder_tokens: list[str] | None
    layers: list[AttentionMaps]


@dataclass
class _Call:
    """One call of an attention module: its weights as they come in, columns grouped already.

    Attributes:
        layer: What the module is.
        queries, keys: Tokens on both sides, without virtual ones.
        columns: S.
        parts: Maps (H, q, s) of the next few queries.
        sums: Attention to the virtual columns by head and query, (H, q).
    """

    layer: AttentionLayer
    queries: int
    keys: int
    columns: int
    parts: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    def add(self, weights: Tensor) -> None:
        """Take the weights of the next few queries, (H, q, S)."""
        n = self.columns - self.keys
        virtual, text = weights[..., :n], weights[..., n:]
        self.parts.append(torch.cat([_grouped(virtual), _grouped(text)], dim=-1).cpu())
        self.sums.append(virtual.sum(-1).cpu())

    def maps(self) -> AttentionMaps:
        """Return what is kept of the call; queries of virtual tokens, which come first, are left out."""
        n = self.columns - self.keys
        whole = torch.cat(self.parts, dim=1)[:, -self.queries :]  # (H, Q, s)
        sizes = _grouped(torch.ones(1, self.queries, device="cpu"))  # (1, q)
        rows = _grouped(whole.transpose(1, 2)).transpose(1, 2) / sizes[..., None]  # (H, q, s)
        shares = torch.cat(self.sums, dim=1)[:, -self.queries :].mean(1)  # (H,)
        return AttentionMaps(
            name=self.layer.path,
            stack=self.layer.stack,
            cross=self.layer.cross,
            virtual=n,
            virtual_columns=min(n, -(-n // _size(n))),
            share=float(shares.mean()) if n else None,
            shares=[round(share, DECIMALS) for share in shares.tolist()] if n else None,
            maps=[[[round(x, DECIMALS) for x in row] for row in head] for head in rows.tolist()],
        )


def attend(loaded: LoadedAdapter, question: Question) -> TextAttention:
    """Return the attention of the pass that answers a question, the eager kernel in place of the model's for that pass.

    Raises:
        UnsupportedError: The model's attention does not go through transformers' interface.
    """
    model, calls = loaded.model, list[_Call]()
    known = {attention.path: attention for attention in read_architecture(model).attentions}
    stack = "causal" if question.causal else "encoder"
    layers = {
        id(module): known.get(path, AttentionLayer(path, stack, False, 0, 0, 0))  # type: ignore[arg-type]
        for path, module in base_modules(model).items()
    }
    decoder = None if question.decoder_ids is None else question.decoder_ids.shape[1]

    def take(module: nn.Module, start: int, weights: Tensor) -> None:
        weights = weights[0].float()  # (H, q, S)
        if start == 0:
            layer, text = layers[id(module)], question.ids.shape[1]
            queries = decoder if layer.stack == "decoder" and decoder is not None else text
            calls.append(_Call(layer, queries, text if layer.cross else queries, weights.shape[-1]))
        calls[-1].add(weights)

    with torch.no_grad(), evaluation_mode(model), recorded_attention(model, take):
        question.value(model.get_input_embeddings()(question.ids))
    if not calls:
        raise UnsupportedError(
            f"the attention of {type(model).__name__} does not go through transformers' attention interface",
            hint="leave --attention out; layers and tokens are explained without it",
        )

    def shown(ids: Tensor) -> list[str]:
        return list(_labels([loaded.tokenizer.decode([token]) for token in ids[0].tolist()]))

    return TextAttention(
        text=question.text,
        answer=question.answer,
        tokens=shown(question.ids),
        decoder_tokens=None if question.decoder_ids is None else shown(question.decoder_ids),
        layers=[call.maps() for call in calls],
    )


def _size(count: int) -> int:
    """Return how many neighbours are taken together so that there are `MOST` groups or fewer."""
    return max(1, -(-count // MOST))


def _grouped(values: Tensor) -> Tensor:
    """Return the sums of neighbouring groups along the last dimension: (..., n) to (..., ceil(n / size))."""
    count, size = values.shape[-1], _size(values.shape[-1])
    if size == 1:
        return values
    filled = F.pad(values, (0, -count % size))
    return filled.view(*filled.shape[:-1], -1, size).sum(-1)


def _labels(tokens: Sequence[str]) -> Iterator[str]:
    """Yield the tokens, or the first and the last of each group."""
    size = _size(len(tokens))
    for start in range(0, len(tokens), size):
        group = tokens[start : start + size]
        yield group[0] if len(group) == 1 else f"{group[0]} … {group[-1]}"
