"""Rows whose hidden states are cached: the place of each, and the name of all of them together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.modeling.frozen_layers import FrozenPrefix
from graftwerk.serialization.fingerprint import fingerprint
from graftwerk.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NOT_IN_KEY = frozenset(
    ("id2label", "label2id", "num_labels", "problem_type", "_name_or_path", "architectures", "transformers_version",
     "use_cache", "dtype", "pad_token_id", "output_hidden_states", "output_attentions", "classifier_dropout")
)  # fmt: skip


class Slots:
    """Places of the cached rows: distinct rows, longest first, one after the other."""

    def __init__(self, splits: Sequence[Sequence[Example]]) -> None:
        distinct: dict[bytes, Example] = {}
        named: dict[int, bytes] = {}
        for examples in splits:
            for example in examples:
                name = _bytes(example)
                named[id(example)] = name
                distinct.setdefault(name, example)
        self.names = sorted(distinct, key=lambda name: (-distinct[name].length, name))
        self.rows = [distinct[name] for name in self.names]
        starts: dict[bytes, int] = {}
        self.tokens = 0
        for name, row in zip(self.names, self.rows, strict=True):
            starts[name] = self.tokens
            self.tokens += row.length
        self._start = {place: starts[name] for place, name in named.items()}
        self._alive = splits  # ids are of use as long as the objects live

    def start(self, example: Example) -> int | None:
        """Return the number of the row's first token among those of all rows, or None if the row is not cached."""
        return self._start.get(id(example))


def _bytes(example: Example) -> bytes:
    """Return the inputs that a row's hidden states depend on, as bytes."""
    return json.dumps(example.inputs, sort_keys=True, separators=(",", ":")).encode()


def key_of(slots: Slots, model: PreTrainedModel, cut: FrozenPrefix, computed: Mapping[str, Any]) -> str:
    """Return a digest of everything that the hidden states depend on.

    Args:
        slots: The cached rows.
        model: Model that computes them.
        cut: Frozen layers that are skipped.
        computed: Types, machine and sizes of batches of the computation.
    """
    import transformers

    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_IN_KEY}
    facts = {
        "weights": fingerprint(model),
        "class": type(model.base_model).__name__,
        "config": config,
        "attention": str(getattr(model.config, "_attn_implementation", "")).removeprefix("graftwerk_"),
        "cut": [cut.skipped, cut.shift, cut.stack.rpartition(".")[2]],
        "versions": [torch.__version__, transformers.__version__],
        **computed,
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name in slots.names:
        digest.update(len(name).to_bytes(8, "little") + name)
    return digest.hexdigest()
