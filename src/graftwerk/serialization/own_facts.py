"""The content of `graftwerk.json`: what an adapter folder says beyond PEFT's configuration."""

from __future__ import annotations

from typing import Any

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.machine import version_of
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.quantized_layers import quantization_of
from graftwerk.modeling.saving import class_name
from graftwerk.sanitize import redact, redacted
from graftwerk.serialization.fingerprint import digests_beside, fingerprint, fingerprint_of_codes
from graftwerk.serialization.info import FORMAT
from graftwerk.serialization.peft_tokens import rows_of
from graftwerk.serialization.restore import INDICES, START
from graftwerk.serialization.strict_json import SEAL

_RESERVED = ("format", "name", "base", "files", SEAL)


def own_facts(adapter: Adapter, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an adapter folder's `graftwerk.json`.

    Args:
        adapter: The adapter.
        facts: Metadata of the caller; replaced by what it becomes.

    Raises:
        ConfigError: The metadata hold a name that is written from the adapter itself.
    """
    reserved = [key for key in _RESERVED if key in facts]
    if reserved:
        raise ConfigError(
            f"metadata may not hold `{reserved[0]}`: it is written from the adapter itself", where="metadata"
        )
    model = adapter.model
    name = redact(facts.pop("model", None) or getattr(model.config, "_name_or_path", "") or "") or None
    facts |= {key: redacted(facts[key]) for key in ("data", "command") if key in facts}
    known = facts.pop("base_fingerprint", None)
    base: dict[str, Any] = {
        "name": name,
        "architecture": class_name(model),
        "model_type": model.config.model_type,
        "fingerprint": _base_fingerprint(adapter) if known is None or rows_of(adapter) else known,
        "beside": _digests_beside(adapter),
    }
    if (quantization := quantization_of(model)) is not None:
        base["quantization"] = {**quantization, "codes": fingerprint_of_codes(model)}
    labels = facts.get("labels") or _labels(adapter)
    facts["labels"] = None if labels is None else [str(label) for label in labels]
    facts.setdefault("versions", _versions())
    facts.setdefault("parameters", _parameters(adapter))
    facts["method"] = adapter.method.to_dict()
    return {"format": FORMAT, "name": adapter.name, "base": base, **facts}


def _base_fingerprint(adapter: Adapter) -> str | None:
    try:
        return fingerprint(adapter.model, rows_of(adapter))
    except UnsupportedError:  # trained in place: the base is gone, and the adapter, being all weights, needs none
        return None


def _digests_beside(adapter: Adapter) -> dict[str, str]:
    if adapter.weights is not None:
        return {}
    try:
        return digests_beside(adapter.model, adapter.heads, rows_of(adapter))
    except UnsupportedError:
        return {}


def _parameters(adapter: Adapter) -> dict[str, Any]:
    # By tensors and not by what trains now: a loaded adapter may be frozen. PiSSA's start and SHiRA's places never do.
    sizes = {
        key: tensor.numel()
        for key, tensor in adapter.state_dict().items()
        if START not in key and not key.endswith(INDICES)
    }
    head = sum(size for key, size in sizes.items() if adapter.is_head(key))
    own, total = sum(sizes.values()) - head, adapter.num_base_parameters
    return {"trained": own, "head": head, "total": total, "share": own / total}


def _labels(adapter: Adapter) -> list[str] | None:
    names = adapter.label_names
    if not adapter.answers or all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        return None
    return names


def _versions() -> dict[str, str]:
    found = {package: version_of(package) for package in ("graftwerk", "torch", "transformers")}
    return {package: version for package, version in found.items() if version is not None}
