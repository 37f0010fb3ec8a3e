"""The registry of methods: name to class, and shorthands."""

from __future__ import annotations

from typing import Any

from graftwerk.methods.base import Method
from graftwerk.methods.bitfit import BitFit
from graftwerk.methods.bottleneck import Bottleneck
from graftwerk.methods.full import Full
from graftwerk.methods.hira import HiRA
from graftwerk.methods.ia3 import IA3
from graftwerk.methods.linear_probe import Probe
from graftwerk.methods.lora import LoRA
from graftwerk.methods.miss import MiSS
from graftwerk.methods.oft import OFT
from graftwerk.methods.prefix_tuning import Prefix
from graftwerk.methods.prompt_tuning import Prompt
from graftwerk.methods.ptuning import PTuning
from graftwerk.methods.shira import SHiRA
from graftwerk.other_names import OTHER_METHODS
from graftwerk.settings_parsing import parse_choice

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (LoRA, MiSS, HiRA, SHiRA, OFT, Bottleneck, Prefix, Prompt, PTuning, IA3, BitFit, Probe, Full)
}
SHORTHANDS: dict[str, dict[str, Any]] = {
    "dora": {"name": "lora", "use_dora": True},
    "rslora": {"name": "lora", "use_rslora": True},
    "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    "qera": {"name": "lora", "init_lora_weights": "qera"},
    "houlsby": {"name": "bottleneck", "placement": "houlsby"},
    "pfeiffer": {"name": "bottleneck", "placement": "pfeiffer"},
    "parallel": {"name": "bottleneck", "placement": "parallel"},
}
"""Common names for a setting of a method."""


def parse_method(value: Any) -> Method:
    """Return the method that a value describes.

    Args:
        value: ``"lora"``, ``{"name": "lora", "r": 8}``, or a method already built.

    Raises:
        ConfigError: no such method or setting; the nearest name is suggested.

    Example:
        >>> parse_method({"name": "lora", "r": 4}).r
        4
    """
    return parse_choice(
        value, Method, METHODS, what="a method", where="method", shorthands=SHORTHANDS, also_called=OTHER_METHODS
    )
