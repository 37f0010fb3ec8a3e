"""The proof, in a run's manifest, that training left the base as it was: a digest of every tensor before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.module_index import base_parameters
from graftwerk.serialization.base_digests import KEY, base_digests, drawn_tensors, type_of

MOST = 3000
"""Tensors whose digests a manifest has room for."""


def digests_before(adapter: Adapter, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return the proof as far as it goes before the first step.

    Args:
        adapter: The adapter, on its base.
        earlier: Manifest of the run that is resumed, or empty; it knows the base from before the first step.

    Returns:
        ``before``: the digest of each tensor by name; ``changed``: None until the end; ``trained``: number of the
        base's parameters that train; ``drawn``: names of those that no checkpoint holds; ``left_out``: why there are
        no digests, or None.
    """
    model = adapter.model
    before = base_digests(model)
    known = (earlier.get(KEY) or {}).get("before") or {}
    if _types(known) == _types(before):
        before = known
    crowded = len(before) > MOST
    return {
        "before": {} if crowded else before,
        "changed": None,
        "trained": sum(parameter.requires_grad for parameter in base_parameters(model).values()),
        "drawn": [name for name in drawn_tensors(model) if name in before],
        "left_out": f"the manifest has no room for the digests of {len(before):,} tensors" if crowded else None,
    }


def changed_tensors(adapter: Adapter, proof: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests, by name, of base tensors that are not what they were before training."""
    after, before = base_digests(adapter.model), proof["before"]
    return {name: digest for name, digest in after.items() if name in before and before[name] != digest}


def _types(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: type_of(digest) for name, digest in digests.items()}
