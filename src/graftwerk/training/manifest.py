"""`manifest.json`: what everything downstream reads of a run."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError
from graftwerk.machine import version_of
from graftwerk.modeling.attach import Adapter
from graftwerk.modeling.quantized_layers import quantization_of
from graftwerk.sanitize import redact, redacted
from graftwerk.training.data_summary import summary_of
from graftwerk.training.optim import peak_rates
from graftwerk.training.run_dir import CONFIG
from graftwerk.training.setup import SPLITS, Prepared
from graftwerk.yaml_files import parse_yaml

if TYPE_CHECKING:
    import torch

    from graftwerk.training.trainer import Trainer

FORMAT = 1
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy")


def opening(
    settings: RunConfig, prepared: Prepared, adapter: Adapter, base_fingerprint: str, compute: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest of a run that begins: all that is known before the first step.

    Args:
        settings: Settings of the run.
        prepared: Its rows, tokenizer, task and method.
        adapter: The adapter, attached to the base.
        base_fingerprint: Fingerprint of the base's weights.
        compute: What the last bits of its answers depend on, as `compute_of` says.
    """
    splits = prepared.splits
    head, own = adapter.num_head_parameters, adapter.num_parameters
    total = adapter.num_base_parameters
    return {
        "format": FORMAT,
        "status": "running",
        "graftwerk": version_of("graftwerk") or "unknown",
        "versions": versions(prepared, settings),
        "config_digest": f"sha256:{hashlib.sha256(settings.dump().encode()).hexdigest()}",
        "model": redact(settings.model),
        "base_fingerprint": base_fingerprint,
        "task": prepared.task.name,
        "task_settings": prepared.task.to_dict(),
        "method": prepared.method.to_dict(),
        "labels": None if splits.labels is None else list(splits.labels),
        "max_length": prepared.max_length,
        "compute": compute,
        **({} if settings.quantization is None else {"quantization": settings.quantization.to_dict()}),
        "data": {
            "fingerprint": splits.fingerprint,
            "origin": redacted(splits.origin),
            "rows": rows_of(prepared),
            "findings": redacted(prepared.findings),
            "summary": summary_of(prepared),
            **({} if prepared.augmented is None else {"augmented": redacted(prepared.augmented)}),
        },
        "parameters": {"trained": own + head, "head": head, "total": total, "share": (own + head) / total},
        "cost": {},
        "metrics": {},
        "best": None,
        "trunk": None,
        "command": redact(command(settings)),
        "seed": settings.training.seed,
    }


def versions(prepared: Prepared, settings: RunConfig) -> dict[str, str]:
    """Return the versions of Python and of the packages that compute a run."""
    return {
        "python": sys.version.split()[0],
        **{name: version_of(name) or "unknown" for name in _packages(settings, prepared)},
    }


def _packages(settings: RunConfig, prepared: Prepared) -> list[str]:
    """Return the packages that computed the run, those of a slow tokenizer and of the metrics included."""
    from graftwerk.evaluation.metrics import packages_of

    more = [] if prepared.tokenizer.is_fast else ["sentencepiece"]
    more += [] if settings.quantization is None else ["bitsandbytes"]
    return [*PACKAGES, *more, *packages_of(prepared.task.metrics)]


def rows_of(prepared: Prepared) -> dict[str, int]:
    """Return the rows of each split; augmented rows are counted apart from the real ones."""
    rows = {name: len(prepared.examples[name]) for name in SPLITS}
    if prepared.augmented is not None:
        rows["train"] -= prepared.augmented["rows"]
        rows["augmented"] = prepared.augmented["rows"]
    return rows


def data_identity(prepared: Prepared) -> str:
    """Return the fingerprint of the rows that a resumed run must be trained on, augmented ones included."""
    real = prepared.splits.fingerprint
    return real if prepared.augmented is None else f"{real}+{prepared.augmented['fingerprint']}"


def run_plan(trainer: Trainer) -> dict[str, Any]:
    """Return the plan of a training, for its `start` event."""
    rates = peak_rates(trainer.adapter, trainer.settings, trainer.task)
    return {
        "total_steps": trainer.total_steps,
        "steps_per_epoch": trainer.steps_per_epoch,
        "rows_per_step": trainer.rows_per_step,
        "rows": {"train": len(trainer.train), "validation": len(trainer.validation)},
        "method": trainer.adapter.method.name,
        "learning_rate": rates.method,
        "head_learning_rate": rates.head,
        "device": str(trainer.device),
        "compute_type": str(trainer.dtype).removeprefix("torch."),
        "model_dtype": str(trainer.adapter.model.dtype).removeprefix("torch."),
        "processes": trainer.distributed.world_size,
        "left_out": trainer.adapter.left_out(),
        **({} if (quantized := quantization_of(trainer.adapter.model)) is None else {"quantization": quantized}),
    }


def compute_of(trainer: Trainer) -> dict[str, Any]:
    """Return the types and batch sizes of a run's predictions, which `evaluate` uses as well."""
    import torch

    return {
        "type": str(trainer.evaluate.dtype).removeprefix("torch."),
        "model_dtype": str(trainer.adapter.model.dtype).removeprefix("torch."),
        "device": trainer.device.type,
        "eval_batch_size": trainer.evaluate.batch_size,
        "processes": trainer.distributed.world_size,
        "threads": torch.get_num_threads(),
    }


def environment(dtype: torch.dtype, quantized: bool = False) -> dict[str, Any]:
    """Return the facts that the last bits of sums depend on beside the settings.

    Args:
        dtype: Type of the base's weights; float32, which older runs had, is left out.
        quantized: True if bitsandbytes computes.
    """
    import torch

    own = {} if dtype == torch.float32 else {"model_dtype": str(dtype).removeprefix("torch.")}
    if quantized:
        own["bitsandbytes"] = version_of("bitsandbytes") or "unknown"
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), **own}


def command(settings: RunConfig) -> str:
    """Return how to repeat the run, from any folder: its resolved run file, into another folder than its own."""
    folder = os.fspath(settings.output_dir.absolute())
    place = f"{folder}-repeated"
    try:
        means_itself = parse_yaml(place.encode(), "output_dir") == place
    except ConfigError:
        means_itself = False
    if not means_itself:  # ": " or " #" in a folder's name
        place = json.dumps(place, ensure_ascii=False)
    return shlex.join(["graftwerk", "train", os.path.join(folder, CONFIG), f"output_dir={place}"])
