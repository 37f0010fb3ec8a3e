"""`verify`: the files of an adapter, and every tensor of its base as it is now, against what its run wrote down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graftwerk.errors import IntegrityError
from graftwerk.evaluation.loading import find, load_adapter_for
from graftwerk.inspection.adapter import describe_adapter
from graftwerk.serialization.base_digests import KEY, base_digests, type_of


def verify(target: Any, *, model: str | None = None) -> dict[str, Any]:
    """Check that an adapter's files and its base are what they were when it was trained.

    Args:
        target: A run folder, an adapter folder (ours or PEFT's), or the `Run` that `train` returned.
        model: The base model, if it is not where the adapter says.

    Returns:
        ``files``: names of the files that are as they were written. ``tensors``: number of base tensors that were
        compared; ``changed``: names of those that are not what they were before training; ``changed_in_training``:
        names of those that training itself changed; ``trained`` and ``drawn``: numbers of parameters of the base that
        are not compared, since they train or since no checkpoint holds them; ``notes``: what could not be checked, and
        why. ``unchanged``: True if everything that was compared is as it was, None if there was nothing to compare.

    Raises:
        IntegrityError: A file of the adapter or the run was changed.
        ConfigError, DataError, AdapterError, ModelError, ResourceError: As for `predict`.
    """
    found = find(target)
    describe_adapter(found.info.folder)  # reads every file of the folder, and compares it with what was written
    files = sorted(found.info.own["files"]) if found.info.own else []
    notes = [] if files else ["the adapter is of another tool, which stores no digests of its files"]
    proof = _proof(found.manifest, notes)
    before: dict[str, str] = {name: one for name, one in proof["before"].items() if name not in proof["drawn"]}
    changed: list[str] = []
    if before:
        loaded = load_adapter_for(target, model=model, force=True)
        now = base_digests(loaded.model, {name: type_of(one) for name, one in before.items()})
        changed = [name for name, digest in before.items() if now.get(name) != digest]
        if missing := [name for name in changed if name not in now]:
            notes.append(f"the base has no tensors of these names now: {', '.join(missing[:5])}")
        if changed and found.manifest.get("quantization") is not None:
            notes.append("codes of a quantized base may differ between devices and versions of bitsandbytes")
    in_training = sorted(proof["changed"] or {})
    return {
        "files": files,
        "tensors": len(before),
        "changed": changed,
        "changed_in_training": in_training,
        "trained": proof["trained"],
        "drawn": len(proof["drawn"]),
        "unchanged": not changed and not in_training if before else None,
        "notes": notes,
    }


def _proof(manifest: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the digests that a manifest holds; what cannot be said is added to the notes.

    Raises:
        IntegrityError: They are not what a run writes.
    """
    nothing = {"before": {}, "changed": {}, "trained": 0, "drawn": []}
    proof: dict[str, Any] | None = manifest.get(KEY)
    if proof is None:
        whose = "the run is of an older version" if manifest else "an adapter folder alone has no manifest"
        notes.append(f"the base's tensors cannot be compared: {whose} and no digests of them")
        return nothing
    known = (
        isinstance(proof, dict)
        and isinstance(proof.get("before"), dict)
        and isinstance(proof.get("changed"), dict | None)
        and isinstance(proof.get("drawn"), list)
        and type(proof.get("trained")) is int
        and all(isinstance(one, str) for one in proof["before"].values())
        and all(isinstance(getattr(torch, type_of(one), None), torch.dtype) for one in proof["before"].values())
    )
    if not known:
        raise IntegrityError(f"the manifest's `{KEY}` is not what a run writes", where=KEY)
    if proof.get("left_out"):
        notes.append(str(proof["left_out"]))
    if proof["trained"] and not proof["before"]:
        notes.append("the whole base was trained (full fine-tuning): there is no frozen part to compare")
    elif proof["trained"]:
        notes.append(f"{proof['trained']} parameters of the base were trained and are not compared")
    if proof["changed"] is None:
        notes.append("the run is not finished: only the digests from before training are known")
    if manifest.get("quantization") is not None:
        notes.append("the base is quantized: its codes and their scales are compared, not the weights they stand for")
    return proof
