"""Adapters as the PEFT library makes and reads them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch


def save_peft_adapter(model: Any, config: peft.PeftConfig, folder: Path, *, scale: float = 0.3) -> Any:
    """Attach an adapter of PEFT with random weights to a model, and save it.

    Args:
        model: The base model.
        config: PEFT's configuration of the adapter.
        folder: Folder that the adapter is saved to.
        scale: Standard deviation of what is added to each trained parameter.

    Returns:
        PEFT's model, in evaluation mode.
    """
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(folder))
    return adapted


def load_in_peft(model: Any, folder: Path) -> Any:
    """Return PEFT's model with an adapter folder loaded, in evaluation mode; a missing key is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
