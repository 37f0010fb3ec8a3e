"""The base of a run or an adapter, loaded as its settings say: as it is, or quantized while it is read."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from graftwerk.methods.base import Method
from graftwerk.models.quantization import Quantization, import_bitsandbytes
from graftwerk.tasks.base import Splits, Task

if TYPE_CHECKING:
    from graftwerk.modeling.quantize import QuantizationErrors


def load_base(
    name: str,
    task: Task,
    splits: Splits,
    *,
    dtype: torch.dtype,
    revision: str | None,
    quantization: Quantization | None,
    compute: torch.dtype,
    device: torch.device,
    method: Method | None,
    skipped: Collection[str] = (),
    errors: QuantizationErrors | None = None,
) -> Any:
    """Load a base model with the task's head.

    Args:
        name: Hub id, folder, GGUF file, or ``pkg://package/folder``.
        task: The task that decides the head.
        splits: The task's rows with their label names.
        dtype: Type of the weights that are not quantized.
        revision: For a hub id: branch, tag or commit.
        quantization: How linear layers are quantized, or None.
        compute: Compute type, of layers in 4 bits as well unless the settings name another.
        device: Where weights are quantized; others stay in the machine's memory.
        method: The adapter's method, whose saved modules are not quantized, or None if it is not known.
        skipped: Further layers that are not quantized, by path; some may not exist.
        errors: Collects the quantization error of each weight, or None.

    Returns:
        The model, in evaluation mode; if it is quantized, with samples of its full weights for its fingerprint.

    Raises:
        ResourceError: bitsandbytes is not installed.
        ConfigError, UnsupportedError, ModelError, IntegrityError: As `load_model` and `quantizer` raise them.
    """
    from graftwerk.models.load import load_model

    if quantization is None:
        return load_model(name, task, splits, dtype=dtype, revision=revision)
    import_bitsandbytes()
    from graftwerk.modeling.quantize import quantizer
    from graftwerk.models.hardware import TYPES
    from graftwerk.serialization.fingerprint import FullWeights

    full = FullWeights()
    saved = () if method is None or method.modules_to_save == "auto" else method.modules_to_save
    made = quantizer(
        quantization.name,
        double_quant=bool(quantization.double_quant),
        compute=TYPES.get(quantization.compute_type, compute),
        skip=quantization.skip,
        whole=(*saved, *skipped),
        seen=full.see,
        errors=errors,
    )
    model = load_model(name, task, splits, dtype=dtype, revision=revision, quantizer=made, device=device)
    full.keep(model)
    return model
