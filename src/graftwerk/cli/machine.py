"""What this machine has: cores, memory, versions, the compute type that is fast here."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
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
    "scikit-learn",
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
    """Cores, memory (bytes), devices, probed compute type, package versions. Imports torch."""
    import torch

    from graftwerk.models.hardware import compute_type

    total, available = memory()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "compute_type": str(compute_type("auto")).removeprefix("torch."),
        "offline": bool(os.environ.get("HF_HUB_OFFLINE")),
        "versions": {name: _version(name) for name in ("graftwerk", *PACKAGES, *OPTIONAL)},
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory in all and to be had now, the limit of a container heeded; None where the system does not say."""
    total: int | None = None
    available: int | None = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
        if limit is not None and total is not None and limit < total:
            total = limit
            if used is not None and available is not None:
                available = min(available, limit - used)
    return total, available


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
