"""Facts about this machine: cores, memory, versions, and the compute type that is fast on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "tensorboard",
)
OPTIONAL = {
    "datasets": "data from the hub",
    "pyarrow": "parquet files",
    "gguf": "models stored as GGUF files",
    "bitsandbytes": "4-bit and 8-bit bases",
    "peft": "comparing adapter folders with the peft library",
}


def describe_machine() -> dict[str, Any]:
    """Return cores, memory in bytes, devices, compute type and package versions. Imports torch."""
    import torch

    from graftwerk.devices import device_names
    from graftwerk.machine import available, version_of
    from graftwerk.models.hardware import compute_type, usable_cores

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory(),
        "memory_available_bytes": available(),
        "devices": device_names(),
        "compute_type": str(compute_type("auto")).removeprefix("torch."),
        "offline": bool(os.environ.get("HF_HUB_OFFLINE")),
        "versions": {name: version_of(name) for name in ("graftwerk", *PACKAGES, *OPTIONAL)},
    }


def memory() -> int | None:
    """Return the total memory in bytes, at most a container's limit, or None if the system does not say."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number("/sys/fs/cgroup/memory.max")
    return total if limit is None else min(total, limit)


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
